"""Measure things side by side: medians of interleaved rounds, so that a noisy moment hits all alike."""

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any


def side_by_side(
    works: Mapping[str, tuple[Callable[[], Any], Callable[[], Any]]], *, seconds: float = 0.5, rounds: int = 15
) -> dict[str, float]:
    """Return the median seconds of each work.

    Parameters
    ----------
    works : mapping of str to (prepare, work)
        `prepare` runs before each round and is not timed.
    seconds : float
        Ends after this long for each work, but not before 3 rounds.
    rounds : int
        At most so many rounds.
    """
    times: dict[str, list[float]] = {name: [] for name in works}
    spent = dict.fromkeys(works, 0.0)
    gc.collect()
    gc.disable()
    try:
        for prepare, work in works.values():
            prepare()
            work()
        for turn in range(rounds):
            for name, (prepare, work) in works.items():
                if turn >= 3 and spent[name] > seconds:
                    continue
                begun = time.perf_counter()
                prepare()
                start = time.perf_counter()
                result = work()
                end = time.perf_counter()
                del result
                times[name].append(end - start)
                spent[name] += end - begun
    finally:
        gc.enable()
    return {name: statistics.median(values) for name, values in times.items()}
