"""Which pages go over which of several channels: stripes in turn, so that a page goes over the same one all the time.

What goes over one channel arrives in order. So no channel need wait for another between two rounds: of each page the
last copy that was sent is the last that is laid.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from dirtylog.sinks._bytes.extents import WINDOW

__all__ = ["MAX_CHANNELS", "Share"]

MAX_CHANNELS = 64
# Two channels never mark pages in the same word.
_WORD = 64


@dataclass(frozen=True, slots=True)
class Share:
    """The stripes of one channel.

    Parameters
    ----------
    index, channels : int
        Which of how many channels.
    granule : int
        Bytes of what goes again or not.
    """

    index: int
    channels: int
    granule: int

    @classmethod
    def all(cls, channels: int, granule: int) -> list[Self]:
        """Return the shares of all channels."""
        return [cls(index, channels, granule) for index in range(channels)]

    @property
    def stripe(self) -> int:
        """Granules in a stripe: a MiB of them, or a word."""
        return max(WINDOW // self.granule // _WORD, 1) * _WORD

    @property
    def numbers(self) -> tuple[int, int, int]:
        """What packs and takes pages has to know of it."""
        return self.index, self.channels, self.stripe

    def count(self, granules: int) -> int:
        """Return how many of the first so many granules are its own."""
        stripes, rest = divmod(granules, self.stripe)
        own = (stripes - self.index + self.channels - 1) // self.channels if stripes > self.index else 0
        return own * self.stripe + (rest if stripes % self.channels == self.index else 0)

    def of(self, extents: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return what of some extents is its own."""
        if self.channels == 1 or not len(extents):
            return extents
        size = self.stripe * self.granule
        first = extents[:, 0] // size
        counts = (extents.sum(axis=1) - 1) // size - first + 1
        row = np.repeat(np.arange(len(extents)), counts)
        stripes = first[row] + np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
        own = stripes % self.channels == self.index
        row, begin = row[own], stripes[own] * size
        starts = np.maximum(extents[row, 0], begin)
        ends = np.minimum(extents[row].sum(axis=1), begin + size)
        return np.stack([starts, ends - starts], axis=1)

    def owners(self, granules: int) -> npt.NDArray[np.int64]:
        """Return the channel of each of so many granules."""
        return np.arange(granules) // self.stripe % self.channels
