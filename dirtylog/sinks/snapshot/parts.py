"""Reads an array of a snapshot, or some of its rows, and of the chain nothing else."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, SupportsIndex

import numpy as np
import numpy.typing as npt

from dirtylog._bits.pages import DirtyPages
from dirtylog.sinks._bytes.extents import WINDOW, PackedExtents
from dirtylog.sinks._bytes.pageio import read_extents
from dirtylog.sinks.snapshot._mapping import read_parts
from dirtylog.sinks.snapshot.chain import ChainMovedError, Layer, StrPath, checked_path, directories_of, settled
from dirtylog.sinks.snapshot.index import Index, index, overlap
from dirtylog.sinks.snapshot.space import Space, arrays_of

__all__ = ["Written", "extents_of", "fetch", "put_back", "read"]


def _view(data: Any) -> memoryview:
    return memoryview(data)


class Written(Protocol):
    """A source whose pages are those of the memory: a tracker of it."""

    def harvest(self) -> DirtyPages:
        """Take what was written."""

    def peek(self) -> DirtyPages:
        """Look at what was written."""


def put_back(written: DirtyPages | Written, put: Callable[[DirtyPages], object]) -> DirtyPages:
    """Call `put` for pages, or for what a tracker reports, which then starts clean; return all of them.

    Pages are put back while they are still writable, so nothing faults, and harvested afterwards.
    """
    if isinstance(written, DirtyPages):
        put(written)
        return written
    if not (hasattr(written, "peek") and hasattr(written, "harvest")):
        raise TypeError(f"{type(written).__name__} is neither DirtyPages nor a tracker, which say what was written")
    done = late = written.peek()
    while late:
        put(late)
        # What was written between the two looks is put back as well, and so on: nothing is dropped.
        late = written.harvest() - late
        done |= late
    return done


def extents_of(pages: DirtyPages, nbytes: int, what: str) -> npt.NDArray[np.int64]:
    """Return where pages of memory lie in it (I9).

    Raises
    ------
    ValueError
        They are of other memory.
    """
    npages = -(-nbytes // pages.page_size)
    if pages.npages != npages:
        raise ValueError(
            f"the pages are {pages.npages} of {pages.page_size} bytes; {what} of {nbytes} bytes has {npages}"
        )
    return pages.byte_runs(nbytes)


def _each(found: Index, wanted: npt.NDArray[np.int64]) -> Iterator[tuple[str, str, int, npt.NDArray[np.int64]]]:
    """Go through the files that hold what is wanted, oldest first: each as in :class:`Index`, and pieces of it.

    Pieces are offset in the memory, length and offset in the file, and are laid over those of the files before.
    """
    if found.rows is not None:
        for number, pieces in found.pieces(wanted):
            yield *found.files[number], pieces
        return
    # More runs than are kept in order: one file over the other.
    for number, (path, digest, offset) in enumerate(found.files):
        with Layer(path, digest) as layer:
            # The base has all pages: those it does not hold are zero in it.
            blocks = layer.pieces() if number else iter([np.array([[0, layer.footer.nbytes, 0]])])
            for block in blocks:
                at, extents = overlap(block[:, 0], block[:, 0] + block[:, 1], wanted)
                if len(extents):
                    shifts = block[at, 2] - block[at, 0]
                    yield path, digest, offset, np.column_stack([extents, extents[:, 0] + shifts])


def _fill(found: Index, begin: int, out: memoryview) -> None:
    """Read bytes of the memory, from `begin` on, each from the newest file that holds it."""
    for path, digest, offset, pieces in _each(found, np.array([[begin, len(out)]])):
        if not read_parts(path, bytes.fromhex(digest), offset, out, begin, pieces):
            raise ChainMovedError(path)


def fetch(found: Index, wanted: npt.NDArray[np.int64], space: Space) -> None:
    """Read extents of the memory into it.

    Raises
    ------
    ChainMovedError
        A writer replaced a file meanwhile.
    """
    staging = memoryview(bytearray(WINDOW))
    for path, digest, _, pieces in _each(found, wanted):
        with Layer(path, digest) as layer:
            packed = PackedExtents.of_extents(pieces)
            for begin, end, window in packed.windows():
                part = staging[: end - begin]
                into, places = (np.ascontiguousarray(window[:, columns]) for columns in ([0, 1], [2, 1]))
                read_extents(layer.descriptor, part, places, packed=True, name=path)
                space.scatter(part, into)


def _numbers(rows: Any, length: int) -> npt.NDArray[np.int64]:
    """Return the numbers of the rows that are asked for."""
    if isinstance(rows, slice):
        return np.arange(*rows.indices(length), dtype=np.int64)
    numbers = np.asarray(rows)
    if numbers.ndim != 1 or (numbers.dtype.kind not in "iu" and len(numbers)):
        raise TypeError(f"rows is {type(rows).__name__}; a number, a slice or a list of numbers is needed")
    outside = numbers[(numbers < 0) | (numbers >= length)]
    if len(outside):
        raise IndexError(f"row {outside[0]} is out of range; the array has rows 0 to {length - 1}")
    return numbers.astype(np.int64)


def read(
    path: StrPath,
    *,
    region: str | None = None,
    rows: SupportsIndex | slice | Sequence[int] | npt.NDArray[Any] | None = None,
    search: Sequence[StrPath] = (),
) -> Any:
    """Read an array of a snapshot, or some of its rows, and nothing else of the chain.

    Parameters
    ----------
    path : str or path
        The snapshot.
    region : str, optional
        Name of the array; not needed where there is one.
    rows : int, slice, or sequence of int, optional
        Which rows, along the first axis. All by default.
    search : sequence of str or path
        Directories to look for parents in, after each file's own.

    Returns
    -------
    ndarray
        New, with the dtype and order it was saved with: ``array[rows]``.

    Raises
    ------
    KeyError, IndexError
        There is no such array, or no such row.
    SnapshotError
        A file of the chain is missing, damaged or not the one its child was taken over.

    Notes
    -----
    O(chain + what is read): of each file the footer, and the pages of what is asked for that no later file holds.
    The digests of the data are not checked, since each is of a whole MiB; :func:`verify` does that. Rows of an
    array in another order than C do not lie together: all of the array is read for them.

    Examples
    --------
    >>> import tempfile, numpy as np
    >>> from dirtylog.sinks import snapshot
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     about = snapshot.save(directory + "/start", {"weights": np.arange(6.0).reshape(3, 2), "bias": np.zeros(9)})
    ...     snapshot.read(directory + "/start", region="weights", rows=[2, 0]).tolist()
    [[4.0, 5.0], [0.0, 1.0]]
    """
    name, directories = checked_path(path), directories_of(search)

    def work() -> Any:
        found = index(name, directories)
        regions = {row[0]: row for row in found.footer.regions}
        wanted = next(iter(regions)) if region is None and len(regions) == 1 else region
        if wanted not in regions:
            raise KeyError(f"region is {region!r}; {name} has the arrays {list(regions)}: name one of them")
        _, kind, shape, order, start, nbytes = regions[wanted]

        def shaped(data: npt.NDArray[np.uint8], shape: tuple[int, ...]) -> Any:
            row = (wanted, kind, shape, order, 0, len(data))
            return arrays_of((row,), data, name)[wanted]

        if rows is None or order != "C" or not shape:
            data = np.empty(nbytes, np.uint8)
            _fill(found, start, _view(data))
            whole = shaped(data, shape)
            return whole if rows is None else whole[rows]
        one = isinstance(rows, SupportsIndex) and not isinstance(rows, np.ndarray)
        numbers = _numbers([operator.index(rows)] if one else rows, shape[0])  # type: ignore[arg-type]
        width = nbytes // shape[0]
        data = np.empty(len(numbers) * width, np.uint8)
        at = 0
        # Rows that follow each other are one range.
        for group in np.split(numbers, np.flatnonzero(np.diff(numbers) != 1) + 1) if len(numbers) else ():
            size = len(group) * width
            _fill(found, start + int(group[0]) * width, _view(data)[at : at + size])
            at += size
        result = shaped(data, (len(numbers), *shape[1:]))
        return result[0] if one else result

    return settled(work)
