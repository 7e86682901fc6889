"""What a writer pays for the first write to a page after a harvest, back end by back end.

Run ``python -m benchmarks.track_write``. One byte is written into each page, all pages in a row by one numpy
store, so that the figures are of the faults and not of Python.
"""

import argparse
import statistics
import time

import numpy as np

import dirtylog as dl

PAGE = 4096


def seconds_a_page(array, after):
    """Return the median seconds of a store to one page, with `after` called between the rounds."""
    taken = []
    for number in range(9):
        after()
        before = time.perf_counter()
        array[::PAGE] = number
        taken.append(time.perf_counter() - before)
    return statistics.median(taken) / (array.size // PAGE)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mib", type=int, default=64, help="size of the array")
    options = parser.parse_args()
    array = dl.empty(options.mib << 20, np.uint8)
    array[:] = 1
    untracked = seconds_a_page(array, lambda: None)
    print(f"{'back end':12} {'ns a page':>10} {'over untracked':>15}")
    print(f"{'untracked':12} {untracked * 1e9:10.0f}")
    for backend in ("userfaultfd", "mprotect", "compare"):
        try:
            tracker = dl.track(array, backend)
        except dl.BackendUnavailable as error:
            print(f"{backend:12} {error}")
            continue
        with tracker:
            cost = seconds_a_page(array, tracker.harvest)
        print(f"{backend:12} {cost * 1e9:10.0f} {cost / untracked:14.0f}x")


if __name__ == "__main__":
    main()
