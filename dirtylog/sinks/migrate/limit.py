"""Throttle those vCPUs of a migrating guest that write most, and leave the others alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Protocol

__all__ = ["DirtyLimit"]


class _Limited(Protocol):
    """A vCPU that counts the pages that it dirties, and can be held to so many per second."""

    @property
    def dirtied(self) -> int:
        """Pages so far."""

    dirty_limit: float | None


class DirtyLimit:
    """What :func:`send` calls as `throttle`: hold the vCPUs that write most to what is left for each of them.

    Parameters
    ----------
    vcpus : iterable of vCPU
        Of a :class:`dirtylog.VM`, or of KVM with dirty rings.
    clock : callable
        Seconds, monotonic.

    Notes
    -----
    Rates are means since the call before, or since this was made: make it just before the migration. Of what all of
    them dirtied together, the fraction that was asked for has to go. It is taken from the top: vCPUs below the level
    that results are not limited. A vCPU that was limited is taken to want what it wanted before.

    References
    ----------
    QEMU's migration capability ``dirty-limit``, which holds all vCPUs to one number that the user gives.

    Examples
    --------
    ``send(sock, memory, observer, throttle=DirtyLimit(vm.vcpus), pause=vm_stops)``
    """

    def __init__(self, vcpus: Iterable[_Limited], *, clock: Callable[[], float] = time.monotonic) -> None:
        self._vcpus = tuple(vcpus)
        self._clock = clock
        self._when = clock()
        self._dirtied = [vcpu.dirtied for vcpu in self._vcpus]
        self._wanted = [0.0] * len(self._vcpus)

    def __call__(self, fraction: float) -> None:
        """Let only what is left of the fraction be dirtied; 0: everything."""
        if not 0 <= fraction < 1:
            raise ValueError(f"fraction is {fraction}; it must be 0 or more, and less than 1")
        self._measure()
        level = _level(self._wanted, (1 - fraction) * sum(self._wanted))
        for vcpu, wanted in zip(self._vcpus, self._wanted, strict=True):
            vcpu.dirty_limit = level if fraction and wanted > level else None

    def _measure(self) -> None:
        now, before = self._clock(), self._when
        if now <= before:
            return
        self._when = now
        for i, vcpu in enumerate(self._vcpus):
            dirtied = vcpu.dirtied
            rate = (dirtied - self._dirtied[i]) / (now - before)
            self._dirtied[i] = dirtied
            self._wanted[i] = rate if vcpu.dirty_limit is None else max(rate, self._wanted[i])


def _level(rates: list[float], allowed: float) -> float:
    """Return the rate to which the largest have to be cut so that all together are what is allowed."""
    left = allowed
    ascending = sorted(rates)
    for i, rate in enumerate(ascending):
        # Whoever is below the others' share keeps what it has.
        if rate * (len(ascending) - i) > left:
            return left / (len(ascending) - i)
        left -= rate
    return ascending[-1] if ascending else 0.0
