"""Many arrays in one block of memory, so that one tracker and one harvest do for all of them."""

from __future__ import annotations

import mmap
from collections.abc import Mapping, Sequence
from typing import Any, SupportsIndex

import numpy as np
from numpy.typing import DTypeLike

from dirtylog._bits.pages import DirtyPages
from dirtylog.sources.memory.arrays import shape_and_dtype, zeros

__all__ = ["Arena", "arena"]

LINE = 64


class Arena(dict[str, "np.ndarray[Any, Any]"]):
    """Arrays by name that lie in one block; made by `arena`.

    Attributes
    ----------
    block : ndarray of uint8
        All of the memory, which starts on a page: what to track.
    """

    def __init__(self, arrays: Mapping[str, tuple[SupportsIndex | Sequence[SupportsIndex], DTypeLike]]) -> None:
        """Lay out the arrays; see `arena`."""
        kinds = {name: shape_and_dtype(*request) for name, request in arrays.items()}
        self._bytes: dict[str, range] = {}
        end = 0
        for name, (_, _, nbytes) in kinds.items():
            alignment = mmap.PAGESIZE if nbytes >= mmap.PAGESIZE else LINE
            start = -(-end // alignment) * alignment
            end = start + nbytes
            self._bytes[name] = range(start, end)
        self.block: np.ndarray[Any, Any] = zeros(end, np.uint8)
        super().__init__(
            {
                name: self.block[self._bytes[name].start : self._bytes[name].stop].view(kind).reshape(shape)
                if nbytes
                else np.zeros(shape, kind)
                for name, (shape, kind, nbytes) in kinds.items()
            }
        )

    def pages(self, name: str) -> range:
        """Tell which pages of the block an array touches.

        Parameters
        ----------
        name : str
            Of the array; KeyError for one that is not here.

        Returns
        -------
        range
            Page numbers, as a tracker of `block` gives them (I9); the first and
            the last may hold other arrays too.
        """
        place = self._bytes[name]
        return range(place.start // mmap.PAGESIZE, -(-place.stop // mmap.PAGESIZE)) if place else range(0)

    def changed(self, dirty: DirtyPages) -> list[str]:
        """List the arrays that touch a dirty page.

        Parameters
        ----------
        dirty : DirtyPages
            A harvest of a tracker of `block`.

        Returns
        -------
        list of str
            In the order of the block; an array smaller than a page is named when
            a neighbour in its page was written.

        Raises
        ------
        ValueError
            `dirty` is of another number of pages.

        Notes
        -----
        O(arrays * log(dirty pages)).
        """
        npages = -(-self.block.nbytes // mmap.PAGESIZE)
        if dirty.npages != npages:
            raise ValueError(f"{dirty.npages} pages were harvested and the block has {npages}; track its block")
        numbers = dirty.indices()
        places = [self.pages(name) for name in self._bytes]
        first = np.searchsorted(numbers, [place.start for place in places])
        end = np.searchsorted(numbers, [place.stop for place in places])
        return [name for name, some in zip(self._bytes, first < end, strict=True) if some]

    def __repr__(self) -> str:
        """Name the sizes."""
        return f"<Arena: {len(self)} arrays in {self.block.nbytes} bytes>"


def arena(arrays: Mapping[str, tuple[SupportsIndex | Sequence[SupportsIndex], DTypeLike]]) -> Arena:
    """Make many arrays of zeros in one block, to be tracked at once.

    A tracker per array costs a few system calls each time it is opened,
    harvested and closed. Ten thousand arrays in one block cost one.

    Parameters
    ----------
    arrays : mapping of str to (shape, dtype)
        As for `dirtylog.zeros`.

    Returns
    -------
    Arena
        A dict of the names to C-contiguous arrays. Track its ``block``. An
        array of at least a page starts on a page of its own; smaller ones share
        pages, and start on a cache line.

    Raises
    ------
    ValueError
        There are no bytes to lay out, a negative size, or a dtype that holds
        objects.
    MemoryError
        The system refused.

    Notes
    -----
    The memory goes when the arena and the last view of it go. Thread-safe once
    made, as its arrays are.

    Examples
    --------
    >>> import dirtylog as dl
    >>> layers = dl.arena({"weights": ((100, 64), "float32"), "bias": (64, "float32")})
    >>> with dl.track(layers.block) as tracker:
    ...     layers["weights"][70] = 1
    ...     dirty = tracker.harvest()
    >>> layers.changed(dirty), layers.pages("weights")
    (['weights'], range(0, 7))
    """
    made = Arena(arrays)
    if not made.block.nbytes:
        raise ValueError(f"{len(made)} arrays of 0 bytes leave nothing to track; name at least one that has bytes")
    return made
