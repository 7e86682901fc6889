"""The last copies that were sent, as far as a bounded cache holds them: what a page has changed since goes alone."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["Copies"]


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
    breaks takes frames with it, and what went in those is not what the other end has. A :class:`Packer` fills all this.

    Attributes
    ----------
    places : int
        How many pages fit.
    older : int
        A page that has no place takes its one if that is empty, or if what it holds went before this frame; -1: none.
    data, pages, frames : array
        The copies; which page each place holds, or -1; in which frame it went last.
    """

    def __init__(self, nbytes: int, page_size: int, cache: int) -> None:
        npages = -(-nbytes // page_size)
        self.page_size: int = page_size
        self.places: int = min(cache // page_size, npages)
        # Where not all pages have places, those that are sent again take them: the first round goes through once.
        self.older: int = 0 if self.places == npages else -1
        self._begun: list[int] = []
        self.data: npt.NDArray[np.uint8] = np.empty(self.places * page_size, np.uint8)
        self.pages: npt.NDArray[np.int64] = np.full(self.places, -1, np.int64)
        self.frames: npt.NDArray[np.int64] = np.zeros(self.places, np.int64)

    def round(self, frame: int) -> None:
        """Note that a round begins with this frame."""
        self._begun = [*self._begun[-1:], frame]
        if len(self._begun) > 1:
            self.older = self._begun[0]

    def forget(self, frame: int) -> None:
        """Forget what went in frames from this one on."""
        self.pages[self.frames >= frame] = -1
