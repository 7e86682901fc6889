"""Dirty pages as byte extents, and the windows in which a sink works through them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Self

import numpy as np
import numpy.typing as npt

from dirtylog._bits.pages import DirtyPages

__all__ = ["WINDOW", "PackedExtents"]

# What a sink gathers, digests and writes at once, in bytes: small enough to stay in a core's own cache, large
# enough that a system call and a digest cost nothing beside it. Part of the snapshot format (one digest a window).
WINDOW = 1 << 20


class PackedExtents:
    """The bytes of some pages, seen as one packed stream cut into windows.

    Parameters
    ----------
    pages : DirtyPages
        Which pages.
    nbytes : int
        Size of the memory in bytes; the last page may reach past it and is cut.

    Notes
    -----
    O(runs) to make, O(log runs + runs in the window) a window. Immutable: safe in any number of threads.
    """

    def __init__(self, pages: DirtyPages, nbytes: int) -> None:
        # I9: page i is bytes [i * page_size, (i + 1) * page_size) of the memory.
        self._take(pages.byte_runs(nbytes))

    @classmethod
    def of_extents(cls, extents: npt.NDArray[np.int64]) -> Self:
        """Make from ascending extents that do not overlap, without a set of pages.

        A third column, an offset elsewhere, is cut as the first one is.
        """
        self = cls.__new__(cls)
        self._take(extents)
        return self

    def _take(self, extents: npt.NDArray[np.int64]) -> None:
        self.extents: npt.NDArray[np.int64] = extents
        self.ends: npt.NDArray[np.int64] = np.cumsum(extents[:, 1])
        self.total: int = int(self.ends[-1]) if len(extents) else 0

    def window(self, begin: int, end: int) -> npt.NDArray[np.int64]:
        """Return the extents of bytes `begin` to `end` of the packed stream, cut where the window cuts them.

        Not to be written to: where nothing is cut, they are those of the whole.
        """
        first = int(self.ends.searchsorted(begin, side="right"))
        part = self.extents[first : int(self.ends.searchsorted(end, side="left")) + 1]
        if not len(part):
            return part
        before = begin - int(self.ends[first] - self.extents[first, 1])
        return _cut(part, before, int(self.ends[first + len(part) - 1]) - min(end, self.total))

    def windows(self, size: int = WINDOW) -> Iterator[tuple[int, int, npt.NDArray[np.int64]]]:
        """Go through the stream: ``(begin, end, extents)`` for each window of `size` bytes, the last one shorter.

        As :meth:`window` answers, but looked up together: what is asked of numpy between two windows, whose bytes have
        driven everything else out of the caches, takes as long as a tenth of the copy.
        """
        begins = np.arange(0, self.total, size)
        ends = np.minimum(begins + size, self.total)
        firsts = self.ends.searchsorted(begins, side="right")
        lasts = self.ends.searchsorted(ends, side="left")
        before = begins - (self.ends[firsts] - self.extents[firsts, 1])
        behind = self.ends[lasts] - ends
        columns = (begins, ends, firsts, lasts + 1, before, behind)
        for begin, end, first, last, skipped, left in zip(*(each.tolist() for each in columns), strict=True):
            yield begin, end, _cut(self.extents[first:last], skipped, left)


def _cut(part: npt.NDArray[np.int64], before: int, behind: int) -> npt.NDArray[np.int64]:
    """Leave out so many bytes before the window and behind it."""
    if before or behind:
        part = part.copy()
        part[-1, 1] -= behind
        part[0, 1] -= before
        part[0, ::2] += before
    return part
