"""What of some named arrays is written: where each lies in a log's pages, in what chunks, and which are dirty."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self, SupportsIndex

import numpy as np
import numpy.typing as npt

from dirtylog._bits.flat import array_of, flat_array
from dirtylog._bits.pages import DirtyPages
from dirtylog.log import Epoch
from dirtylog.sinks.snapshot.space import Space
from dirtylog.sinks.store.chunks import ChunkMap

if TYPE_CHECKING:
    from dirtylog._typing import Memory

__all__ = [
    "Chunking",
    "Part",
    "Task",
    "Written",
    "chunks_within",
    "default_chunks",
    "parts_of",
    "summary",
    "tasks",
    "written",
]

Chunking = Sequence[SupportsIndex] | Mapping[str, Sequence[SupportsIndex]] | None

# Bytes of a chunk: large enough that a request is not most of its cost, small enough that one page does not cost much.
LARGE = 1 << 20
# From this share of an array's bytes on all of it is written.
WHOLE = 0.75


def default_chunks(shape: Sequence[int], itemsize: int, order: Sequence[int] | None = None) -> tuple[int, ...]:
    """Return chunks whose bytes lie together in memory: at most 1 MiB, and at least 256 KiB where the axes allow it.

    Parameters
    ----------
    shape : sequence of int
        Of the array.
    itemsize : int
        Bytes per item.
    order : sequence of int, optional
        Axes from the outermost in memory to the innermost; C order by default.

    Returns
    -------
    tuple of int
        One item along the outer axes, some along one axis, all along the inner ones.
    """
    return chunks_within(LARGE, shape, itemsize, order)


def chunks_within(
    limit: int, shape: Sequence[int], itemsize: int, order: Sequence[int] | None = None
) -> tuple[int, ...]:
    """Return chunks whose bytes lie together in memory, as large as they can be within a number of bytes."""
    axes = tuple(range(len(shape))) if order is None else tuple(order)
    chunks = [1] * len(shape)
    size = itemsize
    for axis in reversed(axes):
        # As many as divide the axis best: a chunk at the end that is nearly empty costs a request.
        most = max(1, limit // size)
        if shape[axis] > most:
            pieces = -(-shape[axis] // most)
            chunks[axis] = -(-shape[axis] // pieces)
            break
        chunks[axis] = max(1, shape[axis])
        size *= chunks[axis]
    return tuple(chunks)


class Part:
    """One array as it is stored, or the rows of a larger one that are here.

    Attributes
    ----------
    name : str
        Of the array in the store.
    array : ndarray
        A view of the memory: of numbers that every program reads, else of bytes, with an axis more. Or what is read
        when it is indexed by slices, and has a shape and a dtype.
    kind : object
        The type that the array has here, as NumPy describes it.
    chunks : ChunkMap
        Its grid, at its place in the pages.
    first_row : int
        Where it begins in the stored array along the first axis: a multiple of the chunks' extent.
    sparse : bool
        Whether a chunk of zeros is stored as nothing. Zeros of numbers have signs, so of bytes alone.
    """

    __slots__ = ("array", "chunks", "first_row", "kind", "name", "sparse")

    def __init__(
        self, name: str, array: Any, kind: Any, chunks: ChunkMap, first_row: int = 0, sparse: bool = False
    ) -> None:
        self.name: str = name
        self.kind: Any = kind
        self.array: Any = array
        self.chunks: ChunkMap = chunks
        self.first_row: int = first_row
        self.sparse: bool = sparse

    @classmethod
    def of_memory(
        cls,
        name: str,
        memory: Memory,
        row: tuple[Any, ...],
        place: int,
        chunks: Sequence[SupportsIndex] | None,
        first_row: int,
    ) -> Self:
        """Make it of an array, as a snapshot would describe it, at its place in the pages."""
        _, kind, shape, order, _, _ = row
        what = f"array {name!r}"
        axes = {"C": tuple(range(len(shape))), "F": tuple(reversed(range(len(shape))))}.get(order, order)
        array = array_of(memory, what) if len(shape) == np.ndim(memory) else flat_array(memory, what=what)
        array = array.reshape(shape) if array.shape != shape else array
        extents = tuple(map(operator.index, chunks if chunks is not None else ()))
        if chunks is None:
            extents = default_chunks(shape, array.itemsize, axes)
        if len(extents) != len(shape):
            raise ValueError(f"{what} has shape {shape} and chunks {extents}; give one extent for each axis")
        if not _is_number(array.dtype):
            flat = flat_array(memory, what=what)
            array = np.ndarray((*shape, array.itemsize), np.uint8, flat, 0, (*array.strides, 1))
            extents, axes = (*extents, array.shape[-1]), (*axes, len(shape))
        if first_row and (not shape or first_row % extents[0]):
            raise ValueError(
                f"{what} begins at row {first_row} of the stored array, which is not a multiple of its chunks' "
                f"{extents[:1]} rows: two parts would write one chunk"
            )
        grid = ChunkMap(array.shape, extents, array.itemsize, offset=place, order=axes)
        return cls(name, array, kind, grid, first_row)

    def selection(self, slices: tuple[slice, ...]) -> tuple[slice, ...]:
        """Return where a place in the array lies in the stored one."""
        if not self.first_row:
            return slices
        return (slice(slices[0].start + self.first_row, slices[0].stop + self.first_row), *slices[1:])


class Task:
    """What of one array is to be written.

    Attributes
    ----------
    part : Part
        The array.
    numbers : ndarray of int64
        Its dirty chunks.
    whole : bool
        Whether all of it is written in one call: it is new, or little of it is clean.
    count, nbytes : int
        Chunks that are written, and bytes before they are compressed.
    """

    __slots__ = ("count", "nbytes", "numbers", "part", "whole")

    def __init__(self, part: Part, numbers: npt.NDArray[np.int64] | None) -> None:
        self.part: Part = part
        self.numbers: npt.NDArray[np.int64] = np.arange(part.chunks.count) if numbers is None else numbers
        whole, count, nbytes = written(part.chunks, self.numbers)
        self.whole: bool = whole
        self.count: int = count
        self.nbytes: int = nbytes

    def all_numbers(self) -> Iterable[int]:
        """Go through the chunks that are written."""
        return range(self.part.chunks.count) if self.whole else map(int, self.numbers)


def written(chunks: ChunkMap, numbers: npt.NDArray[np.int64]) -> tuple[bool, int, int]:
    """Tell what is written where some chunks of an array are dirty.

    Returns
    -------
    whole : bool
        Whether all of the array is, in one call: little of it is clean.
    count, nbytes : int
        Chunks, and their bytes before they are compressed.
    """
    nbytes = chunks.nbytes_of(numbers)
    if nbytes and nbytes >= WHOLE * chunks.nbytes:
        return True, chunks.count, chunks.nbytes
    return False, len(numbers), nbytes


@dataclass(frozen=True, slots=True)
class Written:
    """What was written of one epoch.

    Attributes
    ----------
    epoch : int
        Its number.
    pages, dirty_bytes : int
        Dirty pages, and bytes of them.
    exact : bool
        Whether the sources vouch for them.
    chunks, nbytes : int
        What was written: chunks, and bytes before compression.
    whole : tuple of str
        Arrays that were written whole.
    """

    epoch: int
    pages: int
    dirty_bytes: int
    exact: bool
    chunks: int
    nbytes: int
    whole: tuple[str, ...]


def summary(epoch: Epoch, work: Sequence[Task]) -> dict[str, Any]:
    """Return the attributes of :class:`Written` for an epoch and what is written of it."""
    pages = epoch.pages
    return {
        "epoch": epoch.number,
        "pages": pages.count,
        "dirty_bytes": pages.nbytes,
        "exact": pages.exact,
        "chunks": sum(task.count for task in work),
        "nbytes": sum(task.nbytes for task in work),
        "whole": tuple(task.part.name for task in work if task.whole),
    }


def parts_of(
    arrays: Mapping[str, Memory],
    npages: int,
    page_size: int,
    *,
    chunks: Chunking = None,
    places: Mapping[str, SupportsIndex] | None = None,
    memory: Memory | None = None,
    first_row: int = 0,
) -> list[Part]:
    """Lay out arrays in a page space and in chunks.

    Parameters
    ----------
    arrays : mapping of str to array
        By the names that they have in the store.
    npages, page_size : int
        Of the page space: of the log that is observed.
    chunks : sequence of int, or mapping of str to sequence of int, optional
        The shape of a chunk, or one for each array; `default_chunks` otherwise.
    places : mapping of str to int, optional
        Where each array begins in the page space, in bytes.
    memory : buffer, optional
        What the page space is: the arrays are views of it, and lie where they lie in it.
    first_row : int
        Where the arrays begin in the stored ones.

    Raises
    ------
    ValueError
        The page space and the arrays do not fit each other.
    TypeError
        Something is not an array.
    """
    if not isinstance(arrays, Mapping) or not arrays:
        raise ValueError("arrays must be a mapping of names to at least one array")
    for name in arrays:
        pieces = name.split("/") if isinstance(name, str) else []
        if not pieces or any(piece in ("", ".", "..", "zarr.json") or piece.startswith("__") for piece in pieces):
            raise ValueError(
                f"the array {name!r} cannot be stored by that name; use letters, digits, '_' and '/' inside"
            )
    rows = {row[0]: row for row in Space(arrays, page_size).rows()}
    found = _places(arrays, rows, npages, page_size, places, memory)
    parts = []
    for name in arrays:
        chosen = chunks.get(name) if isinstance(chunks, Mapping) else chunks
        parts.append(Part.of_memory(name, arrays[name], rows[name], found[name], chosen, first_row))
        end = found[name] + parts[-1].chunks.nbytes
        if end > npages * page_size:
            raise ValueError(
                f"array {name!r} ends at byte {end} of the page space, which has {npages} pages of {page_size}: attach "
                "the source of its memory to the log first, and say by places= where it begins"
            )
    return parts


def _places(
    arrays: Mapping[str, Memory],
    rows: Mapping[str, tuple[Any, ...]],
    npages: int,
    page_size: int,
    places: Mapping[str, SupportsIndex] | None,
    memory: Memory | None,
) -> dict[str, int]:
    if places is not None:
        if memory is not None or set(places) != set(arrays):
            raise ValueError(f"places names {sorted(places)}; it must name {sorted(arrays)}, without memory= beside it")
        return {name: operator.index(place) for name, place in places.items()}
    if memory is not None:
        base = flat_array(memory, what="memory")
        start = {
            name: _address(flat_array(array, what=f"array {name!r}")) - _address(base) for name, array in arrays.items()
        }
        for name, place in start.items():
            if not 0 <= place <= base.nbytes - rows[name][5]:
                raise ValueError(f"array {name!r} does not lie in memory=, which has {base.nbytes} bytes")
        return start
    needed = max(-(-(row[4] + row[5]) // page_size) for row in rows.values())
    if needed != npages:
        # Fail closed (I6): of pages that are not where they are expected nobody could say whose they are.
        raise ValueError(
            f"the arrays, each from a page of its own on, are {needed} pages and the log has {npages}; say by places= "
            "at which byte of the log each begins, or by memory= what they are views of"
        )
    return {name: row[4] for name, row in rows.items()}


def tasks(parts: Sequence[Part], pages: DirtyPages | None) -> list[Task]:
    """Tell what of some arrays is to be written.

    Parameters
    ----------
    parts : sequence of Part
        The arrays.
    pages : DirtyPages or None
        What is dirty; None where everything is new.
    """
    found = [Task(part, None if pages is None else part.chunks.of_pages(pages)) for part in parts]
    return [task for task in found if task.count]


def _address(array: npt.NDArray[Any]) -> int:
    return int(array.ctypes.data)


def _is_number(dtype: np.dtype[Any]) -> bool:
    """Whether every program that reads Zarr has this type: others are stored as bytes."""
    return dtype.kind in "biufc" and dtype.isnative and dtype.itemsize <= (16 if dtype.kind == "c" else 8)
