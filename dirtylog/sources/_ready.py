"""Waits for descriptors whatever their numbers: select(2) refuses those above 1023, which a large program has."""

from __future__ import annotations

import selectors
from collections.abc import Iterable

__all__ = ["ready"]

# poll(2) counts milliseconds in 31 bits. Whoever waits longer asks again.
LONGEST = 86400.0


def ready(descriptors: Iterable[int], seconds: float | None = None) -> set[int]:
    """Wait until one of the descriptors can be read, or its other end is gone.

    Parameters
    ----------
    descriptors : iterable of int
        Each once.
    seconds : float, optional
        How long at most, up to a day; for ever by default.

    Returns
    -------
    set of int
        Those that can be read; none if the time is over.
    """
    with selectors.PollSelector() as selector:
        for each in descriptors:
            selector.register(each, selectors.EVENT_READ)
        return {key.fd for key, _ in selector.select(None if seconds is None else min(max(seconds, 0.0), LONGEST))}
