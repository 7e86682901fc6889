"""Ten thousand small arrays: a tracker for each, beside one arena of all of them.

``python -m benchmarks.many_trackers [COUNT]``: seconds to open, harvest and close, by count. What one tracker costs
must not grow with how many there are.
"""

import sys
import time
from collections.abc import Callable
from contextlib import ExitStack

import numpy as np

import dirtylog as dl

ELEMENTS = 1500


def seconds(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def one_each(count: int) -> tuple[float, float, float]:
    """Open, harvest and close a tracker for each array, every one of which was written."""
    arrays = [np.ones(ELEMENTS) for _ in range(count)]
    trackers: list[dl.Tracker] = []
    with ExitStack() as stack:
        opened = seconds(lambda: trackers.extend(stack.enter_context(dl.track(array)) for array in arrays))
        for array in arrays:
            array[ELEMENTS // 2] = 2
        harvested = seconds(lambda: [tracker.harvest() for tracker in trackers])
        closed = seconds(stack.close)
    return opened, harvested, closed


def one_arena(count: int) -> tuple[float, float, float]:
    """Open, harvest and close one tracker for all of them."""
    arena = dl.arena({str(i): (ELEMENTS, float) for i in range(count)})
    start = time.perf_counter()
    tracker = dl.track(arena.block)
    opened = time.perf_counter() - start
    for array in arena.values():
        array[ELEMENTS // 2] = 2
    harvested = seconds(tracker.harvest)
    return opened, harvested, seconds(tracker.close)


def main() -> None:
    most = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
    one_each(10)
    print(f"{'arrays':>8}  {'':10} {'open':>8} {'harvest':>8} {'close':>8}  seconds")
    for count in (most // 10, most):
        for name, run in (("one each", one_each), ("one arena", one_arena)):
            times = " ".join(f"{part:8.4f}" for part in run(count))
            print(f"{count:8}  {name:10} {times}")


if __name__ == "__main__":
    main()
