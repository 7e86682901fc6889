"""The page space of a process: numbers for stretches of memory that come and go, apart as long as there is room."""

from __future__ import annotations

from dirtylog.errors import DirtyLogError

__all__ = ["Numbering"]


class Numbering:
    """Gives page numbers to stretches of memory, and takes them back.

    Parameters
    ----------
    npages : int
        Size of the page space.
    pid : int
        The process, for the error.

    Notes
    -----
    A number that was somebody's is given away again only when all others are used: whoever keeps a copy
    by page numbers has the content of memory that is gone under it.
    """

    def __init__(self, npages: int, pid: int) -> None:
        self.npages: int = npages
        self.used: int = 0  # pages from here on were never anybody's: a sink has zeros for them
        self._pid = pid
        self._free: list[tuple[int, int]] = []

    def allocate(self, npages: int) -> tuple[int, bool]:
        """Find so many pages for a new stretch; return the first, and whether they were somebody's before.

        Raises
        ------
        DirtyLogError
            There is no room.
        """
        if self.used + npages <= self.npages:
            first = self.used
            self.used += npages
            return first, False
        for i, (first, room) in enumerate(self._free):
            if room >= npages:
                rest = (first + npages, room - npages)
                self._free[i : i + 1] = [rest] if rest[1] else []
                return first, True
        raise DirtyLogError(
            f"process {self._pid} has mapped {npages} pages more than the {self.npages} that were set aside for it; "
            f"attach again, with spare={2 * (self.npages + npages)}"
        )

    def place(self, first: int, npages: int) -> None:
        """Take numbers that are given: nobody else has them, and nobody is told whether they were somebody's."""
        self.used = max(self.used, first + npages)

    def release(self, first: int, npages: int) -> None:
        """Take back the pages of a stretch that is gone."""
        self._free.append((first, npages))
        self._free.sort()
        merged: list[tuple[int, int]] = []
        for start, length in self._free:
            if merged and merged[-1][0] + merged[-1][1] == start:
                merged[-1] = (merged[-1][0], merged[-1][1] + length)
            else:
                merged.append((start, length))
        self._free = merged
