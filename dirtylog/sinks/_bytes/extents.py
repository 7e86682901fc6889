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
        """Return the extents of bytes `begin` to `end` of the packed stream, cut where the window cuts them."""
        first = int(self.ends.searchsorted(begin, side="right"))
        last = int(self.ends.searchsorted(end, side="left"))
        return self._cut(begin, end, first, last)

    def _cut(self, begin: int, end: int, first: int, last: int) -> npt.NDArray[np.int64]:
        part = self.extents[first : last + 1].copy()
        if len(part):
            part[-1, 1] -= int(self.ends[first + len(part) - 1]) - min(end, self.total)
            skipped = begin - (int(self.ends[first]) - int(self.extents[first, 1]))
            if skipped:
                part[0, 1] -= skipped
                part[0, ::2] += skipped
        return part

    def windows(self, size: int = WINDOW) -> Iterator[tuple[int, int, npt.NDArray[np.int64]]]:
        """Go through the stream: ``(begin, end, extents)`` for each window of `size` bytes, the last one shorter."""
        begins = np.arange(0, self.total, size)
        # Looked up together: one at a time, the look-ups would take longer than the digests.
        firsts = self.ends.searchsorted(begins, side="right").tolist()
        lasts = self.ends.searchsorted(begins + size, side="left").tolist()
        for begin, first, last in zip(begins.tolist(), firsts, lasts, strict=True):
            end = min(begin + size, self.total)
            yield begin, end, self._cut(begin, end, first, last)
