"""What an epoch of a trace reported, as the runs that are in the file: it takes no bitmap to count, draw and unite."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from dirtylog._bits import ranges
from dirtylog._bits.pages import DirtyPages

__all__ = ["Runs"]

# A run takes 16 bytes, and a page one bit of a bitmap: with more runs than that, a bitmap is smaller.
PAGES_PER_RUN = 128


class Runs:
    """A set of pages of a trace.

    Parameters
    ----------
    runs : array of int64, shape (n, 2)
        First page and count, ascending, none overlapping; not changed any more.
    npages : int
        Pages of the trace.

    Notes
    -----
    A file of a few bytes may speak of 2**32 pages in each of a million epochs. So nothing here takes time or memory in
    proportion to the page space, unless the runs take more than its bitmap would. Immutable.
    """

    __slots__ = ("_held", "npages")

    def __init__(self, runs: npt.NDArray[np.int64] | DirtyPages, npages: int) -> None:
        self.npages: int = npages
        if not isinstance(runs, DirtyPages) and len(runs) * PAGES_PER_RUN > npages:
            runs = DirtyPages.from_runs(runs, npages)
        self._held = runs

    @classmethod
    def nothing(cls, npages: int) -> Runs:
        """No page."""
        return cls(np.empty((0, 2), np.int64), npages)

    def runs(self) -> npt.NDArray[np.int64]:
        """Return first page and count of each run, ascending."""
        return self._held.runs() if isinstance(self._held, DirtyPages) else self._held

    @property
    def count(self) -> int:
        """Number of pages."""
        return self._held.count if isinstance(self._held, DirtyPages) else int(self._held[:, 1].sum())

    def pages(self, page_size: int, *, exact: bool) -> DirtyPages:
        """Return them as pages: as large as a bitmap, unless they are few."""
        return DirtyPages.from_runs(self.runs(), self.npages, page_size, exact=exact)

    def count_ranges(self, among: Mapping[str, tuple[int, int]]) -> dict[str, int]:
        """Count the pages in each range of (first, count) pages."""
        return ranges.count_ranges(self.runs(), among)

    def __or__(self, other: Runs) -> Runs:
        """Return the pages of both."""
        a, b = self._held, other._held
        if isinstance(a, DirtyPages) or isinstance(b, DirtyPages):
            return Runs(_bitmap(a, self.npages) | _bitmap(b, self.npages), self.npages)
        return Runs(ranges.union(a, b), self.npages)


def _bitmap(held: npt.NDArray[np.int64] | DirtyPages, npages: int) -> DirtyPages:
    return held if isinstance(held, DirtyPages) else DirtyPages.from_runs(held, npages)
