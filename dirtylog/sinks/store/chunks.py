"""From dirty pages to dirty chunks: which chunks of a regular grid have a byte in a page that was written.

Nothing here works page by page or item by item: a run of pages is a run of items, and a run of items is cut into few
runs of chunks, axis by axis from the outermost in memory inwards.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from math import prod
from typing import SupportsIndex

import numpy as np
import numpy.typing as npt

from dirtylog._bits.pages import DirtyPages
from dirtylog._bits.ranges import union

__all__ = ["ChunkMap"]

Numbers = npt.NDArray[np.int64]


class ChunkMap:
    """The chunks of an array's regular grid, numbered, and which of them some dirty pages touch.

    Parameters
    ----------
    shape : sequence of int
        The array's shape.
    chunks : sequence of int
        The shape of a chunk. Those at the end of an axis may be cut short.
    itemsize : int
        Bytes per item.
    offset : int, default 0
        Where the array's first byte lies in the memory that the pages are of, in bytes: ``first_page * page_size`` of
        a source that a log has attached at `first_page`.
    order : "C", "F" or sequence of int, default "C"
        How the array lies in memory, without gaps: the last axis innermost (C), the first one (Fortran), or all axes
        from the outermost to the innermost.

    Attributes
    ----------
    shape, chunks : tuple of int
        As given.
    grid : tuple of int
        Chunks along each axis.
    count : int
        Chunks in all. They are numbered in C order of the grid, whatever the order of the array.
    itemsize, offset : int
        As given.
    nbytes : int
        Bytes of the array.

    Raises
    ------
    TypeError
        A size is not an integer.
    ValueError
        The lengths differ, a size is negative, a chunk or an item has no extent, or `order` does not name each axis
        once.

    Notes
    -----
    Needs no store: use it with any format that has chunks (Zarr, HDF5, TileDB, your own). Immutable, so thread-safe.

    Examples
    --------
    >>> import dirtylog as dl
    >>> from dirtylog.sinks.store import ChunkMap
    >>> chunks = ChunkMap((1000, 512), (100, 512), itemsize=8)  # rows of one page each, a hundred per chunk
    >>> dirty = dl.DirtyPages.from_runs([[99, 2], [777, 1]], npages=1000)
    >>> chunks.of_pages(dirty)
    array([0, 1, 7])
    >>> chunks.slices(7)
    (slice(700, 800, None), slice(0, 512, None))
    """

    __slots__ = (
        "_memory_chunks",
        "_memory_grid",
        "_memory_shape",
        "_order",
        "chunks",
        "count",
        "grid",
        "itemsize",
        "nbytes",
        "offset",
        "shape",
    )

    def __init__(
        self,
        shape: Sequence[SupportsIndex],
        chunks: Sequence[SupportsIndex],
        itemsize: SupportsIndex,
        *,
        offset: SupportsIndex = 0,
        order: str | Sequence[SupportsIndex] = "C",
    ) -> None:
        self.shape: tuple[int, ...] = tuple(map(operator.index, shape))
        self.chunks: tuple[int, ...] = tuple(map(operator.index, chunks))
        self.itemsize: int = operator.index(itemsize)
        self.offset: int = operator.index(offset)
        if len(self.shape) != len(self.chunks):
            raise ValueError(
                f"shape {self.shape} has {len(self.shape)} axes and chunks {self.chunks} has {len(self.chunks)}; give "
                "one extent for each axis"
            )
        if any(size < 0 for size in self.shape):
            raise ValueError(f"negative dimensions are not allowed, and the shape is {self.shape}")
        if any(size < 1 for size in self.chunks):
            raise ValueError(f"chunks is {self.chunks}; each extent must be at least 1")
        if self.itemsize < 1 or self.offset < 0:
            raise ValueError(
                f"itemsize is {self.itemsize} and offset {self.offset}; they must be at least 1 and at least 0"
            )
        self._order = _order_of(order, len(self.shape))
        self.grid: tuple[int, ...] = tuple(
            -(-size // extent) for size, extent in zip(self.shape, self.chunks, strict=True)
        )
        self.count: int = prod(self.grid)
        self.nbytes: int = prod(self.shape) * self.itemsize
        if self.offset + self.nbytes > np.iinfo(np.int64).max:
            raise ValueError(f"an array of {self.nbytes} bytes at {self.offset} does not end within 2**63 bytes")
        # Axes from the outermost in memory to the innermost. One chunk without axes is like one of one item.
        self._memory_shape = tuple(self.shape[axis] for axis in self._order) or (1,)
        self._memory_chunks = tuple(self.chunks[axis] for axis in self._order) or (1,)
        self._memory_grid = tuple(self.grid[axis] for axis in self._order) or (1,)

    def __repr__(self) -> str:
        """Say what grid it is."""
        return f"<ChunkMap: shape {self.shape} in {self.count} chunks of {self.chunks}, {self.itemsize} bytes per item>"

    def of_pages(self, pages: DirtyPages) -> Numbers:
        """Return the chunks that have a byte in a dirty page.

        Parameters
        ----------
        pages : DirtyPages
            Of the memory in which the array lies at `offset`; may go on behind it.

        Returns
        -------
        ndarray of int64, shape (n,)
            Chunk numbers, ascending: exactly those, no more.

        Raises
        ------
        TypeError
            `pages` is not DirtyPages.
        ValueError
            The memory ends before the array does (I9).

        Notes
        -----
        O(runs of pages times axes, and dirty chunks); sorts.
        """
        if not isinstance(pages, DirtyPages):
            raise TypeError(f"pages is {type(pages).__name__}; it must be DirtyPages")
        end = self.offset + self.nbytes
        if end > pages.npages * pages.page_size:
            raise ValueError(
                f"the array ends at byte {end} and the memory of these pages at {pages.npages * pages.page_size} "
                f"({pages.npages} pages of {pages.page_size}); is offset {self.offset} right?"
            )
        if not self.count:
            return np.empty(0, np.int64)
        runs = pages.runs()
        # First byte and end of each run, in the array; then first item and last.
        first = np.maximum(runs[:, 0] * pages.page_size - self.offset, 0)
        last = np.minimum((runs[:, 0] + runs[:, 1]) * pages.page_size - self.offset, self.nbytes) - 1
        inside = first <= last
        numbers = _expanded(self._chunk_runs(first[inside] // self.itemsize, last[inside] // self.itemsize))
        if self._order == tuple(range(len(self.shape))):
            return numbers
        # Chunks are numbered as the memory lies so far.
        places = dict(zip(self._order, np.unravel_index(numbers, self._memory_grid), strict=True))
        across = np.ravel_multi_index([places[axis] for axis in range(len(self.shape))], self.grid)
        return np.sort(np.asarray(across, np.int64))

    def _chunk_runs(self, first: Numbers, last: Numbers) -> Numbers:
        """Return runs of chunks, in the order of memory, of runs of items; ascending, none touching the next."""
        found = []
        above = np.zeros(len(first), np.int64)  # chunks that come before, by the axes further out
        for axis, chunk in enumerate(self._memory_chunks):
            items = prod(self._memory_shape[axis + 1 :])
            chunks = prod(self._memory_grid[axis + 1 :])
            # A run of items is: the end of one row of this axis, whole rows, and the beginning of one more. Whole rows
            # are whole rows of chunks; the other two are runs along the axes further in.
            begin, end = -(-first // items), (last + 1) // items
            whole = begin < end
            low, high = begin[whole] // chunk, (end[whole] - 1) // chunk
            found.append(np.stack([above[whole] + low * chunks, (high - low + 1) * chunks], axis=1))
            head = first < begin * items
            # Where a run lies inside one row it is all head.
            tail = (last >= end * items) & (end >= begin)
            row = begin[head] - 1
            above = np.append(above[head] + row // chunk * chunks, above[tail] + end[tail] // chunk * chunks)
            first, last = (
                np.append(first[head] - row * items, np.zeros(int(tail.sum()), np.int64)),
                np.append(np.minimum(last[head] - row * items, items - 1), last[tail] - end[tail] * items),
            )
        return union(np.concatenate(found), np.empty((0, 2), np.int64))

    def slices(self, number: SupportsIndex) -> tuple[slice, ...]:
        """Return where a chunk lies in the array.

        Parameters
        ----------
        number : int
            Of a chunk.

        Returns
        -------
        tuple of slice
            One for each axis: ``array[chunks.slices(number)]`` is the chunk.

        Raises
        ------
        IndexError
            There is no such chunk.
        """
        chosen = operator.index(number)
        if not 0 <= chosen < self.count:
            raise IndexError(f"chunk {chosen} is out of range; there are {self.count}, from 0 on")
        places = np.unravel_index(chosen, self.grid) if self.grid else ()
        return tuple(
            slice(int(place) * chunk, min((int(place) + 1) * chunk, size))
            for place, chunk, size in zip(places, self.chunks, self.shape, strict=True)
        )

    def nbytes_of(self, numbers: npt.ArrayLike) -> int:
        """Return the bytes of the array that lie in some chunks: what writing them whole costs, uncompressed.

        Parameters
        ----------
        numbers : array-like of int
            Of chunks.

        Raises
        ------
        IndexError
            There is no such chunk.
        """
        chosen = np.asarray(numbers, np.int64).reshape(-1)
        if len(chosen) and not 0 <= chosen.min() <= chosen.max() < self.count:
            raise IndexError(
                f"chunks {chosen.min()} to {chosen.max()} are not all there; there are {self.count}, from 0 on"
            )
        items = np.ones(len(chosen), np.int64)
        places = np.unravel_index(chosen, self.grid) if self.grid else ()
        for place, chunk, size in zip(places, self.chunks, self.shape, strict=True):
            items *= np.minimum(chunk, size - place * chunk)
        return int(items.sum()) * self.itemsize


def _order_of(order: str | Sequence[SupportsIndex], naxes: int) -> tuple[int, ...]:
    """Return the axes from the outermost in memory to the innermost."""
    axes = tuple(range(naxes))
    if isinstance(order, str):
        if order not in ("C", "F"):
            raise ValueError(f"order is {order!r}; it must be 'C', 'F', or the axes from the outermost inwards")
        return axes if order == "C" else axes[::-1]
    chosen = tuple(map(operator.index, order))
    if sorted(chosen) != list(axes):
        raise ValueError(f"order is {chosen}; it must name each of the {naxes} axes once")
    return chosen


def _expanded(runs: Numbers) -> Numbers:
    """Return the numbers in some runs that are ascending and do not overlap."""
    first, count = runs.T
    before = np.cumsum(count) - count
    numbers: Numbers = np.arange(int(count.sum()), dtype=np.int64) + np.repeat(first - before, count)
    return numbers
