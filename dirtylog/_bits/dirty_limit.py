"""How many pages per second one vCPU may dirty, in the model and in KVM alike: who has dirtied more stands still."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

__all__ = ["DirtyLimit"]

# What may be dirtied at once after a rest, in seconds of the limit.
_SAVED = 0.1
# A pause is never longer than this at once, so that a new limit or a kick is seen soon.
_NAP = 0.005
# Nor shorter than what a clock can tell.
_LEAST = 0.0001


class DirtyLimit:
    """The limit of one vCPU, and how far it has been used.

    Notes
    -----
    `wait` belongs to the vCPU's thread, the others to any. A vCPU may overshoot
    within one stay in guest mode; it stands still for that afterwards, so that
    the mean holds.

    References
    ----------
    ``dirtylimit_calc_throttle`` and ``vcpu_dirty_limit`` in QEMU's ``system/dirtylimit.c``.
    """

    __slots__ = ("_clock", "_dirtied", "_free", "_left", "_rate", "_sleep", "_when")

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, sleep: Callable[[float], object] = time.sleep
    ) -> None:
        self._clock, self._sleep = clock, sleep
        self._rate: float | None = None
        self._dirtied = 0
        # What had been dirtied when there was no limit yet: nobody stands still for that.
        self._free = 0
        self._left = 0.0
        self._when = clock()

    @property
    def rate(self) -> float | None:
        """Pages per second; None: as many as it likes."""
        return self._rate

    def hold(self, rate: float | None, dirtied: int) -> None:
        """Set the limit.

        Parameters
        ----------
        rate : float or None
            Pages per second.
        dirtied : int
            Pages that the vCPU has dirtied up to now.

        Raises
        ------
        ValueError
            `rate` is not a positive number.
        """
        if rate is not None and not 0 < rate < math.inf:
            raise ValueError(f"dirty_limit is {rate}; it must be a positive number of pages per second, or None")
        if self._rate is None:
            self._free = dirtied
        self._rate = rate

    def wait(self, dirtied: int, kicked: Callable[[], bool] = bool) -> None:
        """Stand still for what was dirtied above the limit.

        Parameters
        ----------
        dirtied : int
            Pages that the vCPU has dirtied since it was made.
        kicked : callable
            Whether it is to leave at once.
        """
        rate, now = self._rate, self._clock()
        if rate is None:
            self._dirtied, self._left, self._when = dirtied, 0.0, now
            return
        if self._free > self._dirtied:
            self._dirtied, self._left, self._when = self._free, 0.0, now
        new, self._dirtied = dirtied - self._dirtied, dirtied
        self._left = min(self._left + (now - self._when) * rate, rate * _SAVED) - new
        self._when = now
        # Another limit changes how long it takes; what was dirtied above the last one is stood still for all the same.
        while self._left < 0 and (rate := self._rate) is not None and not kicked():
            self._sleep(min(max(-self._left / rate, _LEAST), _NAP))
            now = self._clock()
            self._left += (now - self._when) * rate
            self._when = now
