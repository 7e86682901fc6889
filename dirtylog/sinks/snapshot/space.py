"""The page space of a snapshot: one array, or several by name, each beginning at a page boundary.

Page ``i`` is bytes ``[i * page_size, (i + 1) * page_size)`` of the space (I9). Between the end of an array and the next
page boundary there is nothing, which reads as zeros.
"""

from __future__ import annotations

import bisect
import math
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dirtylog._bits.copying import gather, scatter
from dirtylog._bits.flat import array_of, flat_bytes
from dirtylog._bits.pages import DirtyPages, check_geometry
from dirtylog._core import zero_pages
from dirtylog.sinks.snapshot import footer as footers
from dirtylog.sinks.snapshot.footer import Footer, Row, SnapshotError
from dirtylog.sources.memory import probe

if TYPE_CHECKING:
    from dirtylog._typing import Memory

__all__ = ["Space", "arrays_of", "blank", "check_row", "dtype_of", "said"]

# The name of the only region of memory that was given without one.
NAMELESS = ""
# Type and order of what is bytes, or was given as such.
BYTES = ("|u1", "C")


# One type as NumPy writes it: byte order, letter, size, unit of time. Where there is a count before it, or a comma, it
# parses the text as Python's.
_PLAIN = re.compile(r"[<>|=]?[A-Za-z]\w*(\[\w*\])?")


def _type(kind: Any) -> Any:
    """Turn what JSON made of a type back into what it was: text, a list of fields, or a type and its shape."""
    if isinstance(kind, list):
        if all(isinstance(field, list) for field in kind):
            return [_field(*field) for field in kind]
        return _type(kind[0]), *map(_shape, kind[1:])
    if not isinstance(kind, str) or _PLAIN.fullmatch(kind) is None:
        raise ValueError(f"{kind!r:.50} is not one plain type")
    return kind


def _field(name: Any, kind: Any, *shape: Any) -> tuple[Any, ...]:
    """Turn back a field; its name may be a title and a name."""
    return tuple(name) if isinstance(name, list) else name, _type(kind), *map(_shape, shape)


def _shape(shape: Any) -> int | tuple[int, ...]:
    """Turn back a shape; text in the place of one would be read as a type."""
    if isinstance(shape, int):
        return shape
    if not isinstance(shape, list) or not all(isinstance(each, int) for each in shape):
        raise ValueError(f"{shape!r:.50} is not a shape")
    return tuple(shape)


def _order(array: npt.NDArray[Any]) -> str | tuple[int, ...]:
    """Name the order of an array in memory, which is what pages are made of (I9): C, F, or the axes, widest first."""
    if array.flags.c_contiguous:
        return "C"
    if array.flags.f_contiguous:
        return "F"
    return tuple(sorted(range(array.ndim), key=lambda axis: -array.strides[axis]))


def _axes(order: str | tuple[int, ...], shape: tuple[int, ...]) -> list[int]:
    """Return the axes, widest first; those of one item lie anywhere."""
    axes = range(len(shape)) if isinstance(order, str) else order
    return [axis for axis in (reversed(axes) if order == "F" else axes) if shape[axis] != 1]


def _dtype(kind: Any) -> np.dtype[Any]:
    return np.lib.format.descr_to_dtype(_type(kind))


def dtype_of(kind: Any, name: str) -> np.dtype[Any]:
    """Return the type that a region's row describes.

    Raises
    ------
    SnapshotError
        It describes none.
    """
    try:
        return _dtype(kind)
    except (ValueError, TypeError, SyntaxError, RecursionError, KeyError, IndexError) as error:
        raise SnapshotError(f"{name}: a region's type cannot be used: {error}") from None


class Region:
    """One array of a page space.

    Parameters
    ----------
    name : str
        Its name; empty where memory was given without one.
    memory : buffer
        The array, or any contiguous buffer.
    start : int
        Where it begins in the page space, in bytes.
    writable : bool
        Whether it is to be written.
    """

    __slots__ = ("dtype", "end", "kind", "name", "nbytes", "order", "shape", "start", "view")

    def __init__(self, name: str, memory: Memory, start: int, *, writable: bool) -> None:
        what = f"memory {name!r}" if name else "out" if writable else "memory"
        self.view: memoryview = flat_bytes(memory, writable=writable, what=what)
        array = array_of(memory, what)
        self.dtype: np.dtype[Any] = np.dtype(np.uint8)
        self.kind: Any = "|u1"
        self.order: str | tuple[int, ...] = "C"
        self.shape: tuple[int, ...] = (self.view.nbytes,)
        # A buffer that is not an array comes without a type: bytes.
        if array.dtype.kind != "V" or array.dtype.names is not None or isinstance(memory, np.ndarray):
            try:
                self.kind = np.lib.format.dtype_to_descr(array.dtype)
            except ValueError as error:
                raise TypeError(
                    f"{what} has the type {array.dtype}, which cannot be written down ({error}); pass its bytes, "
                    ".view(numpy.uint8) of it, and keep the type"
                ) from None
            # As it comes back: of a type that NumPy does not know by itself, the size is left.
            self.dtype = np.lib.format.descr_to_dtype(self.kind)
            self.shape, self.order = array.shape, _order(array)
        self.name: str = name
        self.nbytes: int = self.view.nbytes
        self.start: int = start
        self.end: int = start + self.nbytes

    @property
    def address(self) -> int:
        """Where it begins in this process."""
        return int(np.frombuffer(self.view, np.uint8).ctypes.data)

    def mappings(self) -> list[probe.Mapping]:
        """Return the mappings that it lies in; none where the system does not tell."""
        return probe.mappings_of(self.address, self.nbytes)

    def row(self) -> Row:
        """Return what the footer says of it."""
        return (self.name, self.kind, self.shape, self.order, self.start, self.nbytes)

    def is_like(self, row: Row, name: str) -> bool:
        """Say whether it has the values of an array that was saved, if it has the same bytes; bytes are any array's."""
        if BYTES in ((self.kind, self.order), (row[1], row[3])):
            return True
        return (
            self.shape == row[2]
            and self.dtype == dtype_of(row[1], name)
            and _axes(self.order, self.shape) == _axes(row[3], row[2])
        )


class Space:
    """Several arrays, or one, as one page space.

    Parameters
    ----------
    memory : buffer or mapping of str to buffer
        The arrays.
    page_size : int
        In bytes.
    writable : bool
        Whether they are to be written.

    Raises
    ------
    TypeError, ValueError
        One of them is not a contiguous buffer, or a name will not do.
    """

    def __init__(self, memory: Memory | Mapping[str, Memory], page_size: int, *, writable: bool = False) -> None:
        _, page_size = check_geometry(0, page_size)
        if not footers.MIN_PAGE_SIZE <= page_size <= footers.MAX_PAGE_SIZE:
            raise ValueError(
                f"page_size is {page_size}; a snapshot has pages of {footers.MIN_PAGE_SIZE} to "
                f"{footers.MAX_PAGE_SIZE} bytes"
            )
        self.page_size: int = page_size
        self.named: bool = isinstance(memory, Mapping)
        self.regions: list[Region] = []
        at = 0
        items: Any = memory.items() if isinstance(memory, Mapping) else [(NAMELESS, memory)]
        for name, each in items:
            if self.named and not (isinstance(name, str) and 0 < len(name) <= footers.MAX_NAME and name.isprintable()):
                raise ValueError(
                    f"the name {name!r:.80} will not do for memory: it must be a str of 1 to {footers.MAX_NAME} "
                    "printable characters"
                )
            region = Region(name, each, -(-at // page_size) * page_size, writable=writable)
            self.regions.append(region)
            at = region.end
        if not 0 < len(self.regions) <= footers.MAX_REGIONS:
            raise ValueError(f"memory has {len(self.regions)} arrays; a snapshot has 1 to {footers.MAX_REGIONS}")
        self.nbytes: int = at
        self.npages: int = -(-at // page_size)
        if self.npages > footers.MAX_PAGES:
            raise ValueError(f"the memory has {self.npages} pages; a snapshot has at most {footers.MAX_PAGES}")
        self._starts: list[int] = [region.start for region in self.regions]

    def views(self) -> list[tuple[int, memoryview]]:
        """Return where each region begins, and its bytes."""
        return [(region.start, region.view) for region in self.regions]

    def rows(self) -> tuple[Row, ...]:
        """Return what the footer says of the regions."""
        return tuple(region.row() for region in self.regions)

    def pages(self, pages: DirtyPages | Mapping[str, DirtyPages]) -> DirtyPages:
        """Return pages of the space: as they are, or joined from the pages of each region.

        Raises
        ------
        TypeError, ValueError
            They do not describe the memory.
        """
        if not isinstance(pages, Mapping):
            if not isinstance(pages, DirtyPages):
                raise TypeError(f"pages is {type(pages).__name__}; DirtyPages are needed")
            if (pages.npages, pages.page_size) != (self.npages, self.page_size):
                raise ValueError(
                    f"pages has {pages.npages} pages of {pages.page_size} bytes; the memory of {self.nbytes} bytes has "
                    f"{-(-self.nbytes // pages.page_size)}"
                )
            return pages
        names = [region.name for region in self.regions]
        if not self.named or set(pages) != set(names):
            raise ValueError(f"pages has {sorted(pages)}; the memory has {names}: pages by name go with memory by name")
        runs, exact = [], True
        for region in self.regions:
            part = pages[region.name]
            own = -(-region.nbytes // self.page_size)
            if not isinstance(part, DirtyPages):
                raise TypeError(f"pages[{region.name!r}] is {type(part).__name__}; DirtyPages are needed")
            if (part.npages, part.page_size) != (own, self.page_size):
                raise ValueError(
                    f"pages[{region.name!r}] has {part.npages} pages of {part.page_size} bytes; the array has {own} of "
                    f"{self.page_size}"
                )
            runs.append(part.runs() + np.array([region.start // self.page_size, 0]))
            exact = exact and part.exact
        return DirtyPages.from_runs(np.concatenate(runs), self.npages, self.page_size, exact=exact)

    def nonzero(self) -> DirtyPages:
        """Return the pages that hold something."""
        held = []
        for region in self.regions:
            zeros = zero_pages(region.view, self.page_size)
            runs = (DirtyPages._all(zeros.npages, self.page_size, exact=True) - zeros).runs()
            held.append(runs + np.array([region.start // self.page_size, 0]))
        return DirtyPages.from_runs(np.concatenate(held), self.npages, self.page_size)

    def parts(self, extents: npt.NDArray[np.int64]) -> Iterator[tuple[Region, npt.NDArray[np.int64], int, int]]:
        """Cut extents at the regions: region, its extents, where they lie in the packed stream, and zeros behind."""
        begin, end = int(extents[0, 0]), int(extents[-1].sum())
        at = 0
        for index in range(bisect.bisect_right(self._starts, begin) - 1, bisect.bisect_left(self._starts, end)):
            region = self.regions[index]
            after = self._starts[index + 1] if index + 1 < len(self._starts) else region.end
            first = int(np.searchsorted(extents.sum(axis=1), region.start, side="right"))
            last = int(np.searchsorted(extents[:, 0], after, side="left"))
            own = extents[first:last].copy()
            if not len(own):
                continue
            stops = np.minimum(own.sum(axis=1), after)
            own[:, 0] = np.maximum(own[:, 0], region.start)
            padding = max(int(stops[-1]) - max(region.end, int(own[-1, 0])), 0)
            own[:, 1] = np.minimum(stops, region.end) - own[:, 0]
            own = own[own[:, 1] > 0]
            own[:, 0] -= region.start
            length = int(own[:, 1].sum())
            yield region, own, at, padding
            at += length + padding

    def gather(self, extents: npt.NDArray[np.int64], packed: memoryview) -> None:
        """Copy extents of the space one after the other into `packed`."""
        if len(self.regions) == 1:
            gather(self.regions[0].view, extents, packed)
            return
        for region, own, at, padding in self.parts(extents):
            end = at + int(own[:, 1].sum())
            gather(region.view, own, packed[at:end])
            np.frombuffer(packed, np.uint8)[end : end + padding] = 0

    def scatter(self, packed: memoryview, extents: npt.NDArray[np.int64]) -> None:
        """Copy a packed buffer to extents of the space: the reverse of :meth:`gather`."""
        if len(self.regions) == 1:
            scatter(packed, extents, self.regions[0].view)
            return
        for region, own, at, _ in self.parts(extents):
            scatter(packed[at : at + int(own[:, 1].sum())], own, region.view)

    def clear(self) -> None:
        """Fill with zeros."""
        for region in self.regions:
            np.frombuffer(region.view, np.uint8)[:] = 0


def said(dtype: np.dtype[Any], shape: tuple[int, ...], order: str | tuple[int, ...]) -> str:
    """Describe an array for an error."""
    return f"{dtype} of shape {shape} in order {order}"


def check_row(row: Row, name: str) -> np.dtype[Any]:
    """Return the type of a region's row, whose array has the bytes that the row says.

    Raises
    ------
    SnapshotError
        A type is none, or its array is of another size.
    """
    region, kind, shape, _, _, length = row
    dtype = dtype_of(kind, name)
    if dtype.hasobject or dtype.itemsize * math.prod(shape) != length:
        raise SnapshotError(
            f"{name}: the array {region!r} cannot be used: {dtype} of shape {shape} does not have {length} bytes"
        )
    return dtype


def arrays_of(regions: tuple[Row, ...], memory: npt.NDArray[np.uint8], name: str) -> dict[str, Any]:
    """Return the arrays of a snapshot, by name, as views of the bytes of its page space.

    Raises
    ------
    SnapshotError
        A type or a shape is none, or does not fit the bytes.
    """
    found: dict[str, Any] = {}
    for row in regions:
        region, _, shape, order, start, _ = row
        dtype = check_row(row, name)
        try:
            if isinstance(order, str):
                found[region] = np.ndarray(shape, dtype, memory, start, order="F" if order == "F" else "C")
            else:
                dense: Any = np.ndarray([shape[axis] for axis in order], dtype, memory, start)
                found[region] = dense.transpose(np.argsort(order))
        except (ValueError, TypeError, SyntaxError, RecursionError, KeyError, IndexError) as error:
            raise SnapshotError(f"{name}: the array {region!r} cannot be used: {error}") from None
    return found


def blank(footer: Footer, name: str) -> tuple[Any, dict[str, Any]]:
    """Return zeroed memory for a snapshot: what :func:`~dirtylog.sinks.snapshot.restore` answers, and it by names."""
    arrays = arrays_of(footer.regions, np.zeros(footer.nbytes, np.uint8), name)
    return (arrays if footer.named else arrays[NAMELESS]), arrays
