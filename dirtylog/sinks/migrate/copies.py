"""The last copies that were sent, as far as a bounded cache holds them: what a page has changed since goes alone."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from dirtylog._bits.deltas import sort_pages

__all__ = ["Copies"]


# The frame of what is not sent yet.
_NEVER = np.iinfo(np.int64).max


class Copies:
    """What the other end has, of as many pages as fit.

    Parameters
    ----------
    nbytes : int
        Of the memory.
    page_size : int
        In bytes.
    cache : int
        Bytes that the copies may take; fewer than a page: there are none.

    Notes
    -----
    Page ``g`` has place ``g % places`` and no other, and takes it from a page that did not go in this round or the one
    before. Memory is committed for what is kept. A place also says in which frame its page went last: a line that
    breaks takes frames with it, and what went in those is not what the other end has.
    """

    def __init__(self, nbytes: int, page_size: int, cache: int) -> None:
        npages = -(-nbytes // page_size)
        self.page_size: int = page_size
        self.places: int = min(cache // page_size, npages)
        # Where not all pages have places, those that are sent again take them: the first round goes through once.
        self._older = 0 if self.places == npages else -1
        self._begun: list[int] = []
        self._data = np.empty(self.places * page_size, np.uint8)
        self._pages = np.full(self.places, -1, np.int64)
        self._frames = np.zeros(self.places, np.int64)

    def round(self, frame: int) -> None:
        """Note that a round begins with this frame."""
        self._begun = [*self._begun[-1:], frame]
        if len(self._begun) > 1:
            self._older = self._begun[0]

    def sort(
        self, window: memoryview, extents: npt.NDArray[np.int64], out: memoryview
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint8], int]:
        """Say of each page of a window whether it is zero, changed a little, or goes whole; `out` has the changes."""
        found = sort_pages(
            window, extents, self._data, self._pages, self._frames, self.page_size, older=self._older, out=out
        )
        # Until it is said in which frame each of them goes: if that is never said, they are forgotten.
        self.went(found[0], _NEVER)
        return found

    def went(self, numbers: npt.NDArray[np.int64], frame: int) -> None:
        """Note in which frame some pages go."""
        if self.places:
            places = numbers % self.places
            self._frames[places[self._pages[places] == numbers]] = frame

    def forget(self, frame: int) -> None:
        """Forget what went in frames from this one on."""
        self._pages[self._frames >= frame] = -1
