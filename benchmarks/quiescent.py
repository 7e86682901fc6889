"""``python -m benchmarks.quiescent``: a harvest while nobody marks beside an ordinary one, in one run, by density."""

import argparse
import time

import numpy as np

import dirtylog as dl
from dirtylog._core import simd_path

DENSITIES = (0, 0.001, 0.01, 0.1, 0.5, 1)


def seconds(bitmap: dl.DirtyBitmap, pages: dl.DirtyPages, *, quiescent: bool) -> float:
    """Return what one harvest of these pages takes."""
    bitmap.merge(pages)
    begin = time.perf_counter()
    found = bitmap.harvest(quiescent=quiescent)
    taken = time.perf_counter() - begin
    if found.count != pages.count:
        raise AssertionError(f"{found.count} pages were harvested of {pages.count}")
    return taken


def main() -> None:
    """Print a row for each size and density: the shortest of some rounds, both ways in turn."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quiescent", description=__doc__)
    parser.add_argument("--rounds", type=int, default=30, help="harvests of each kind (default: 30)")
    options = parser.parse_args()
    print(f"{'pages':>12} {'dirty':>7} {'ordinary':>12} {'quiescent':>12} {'ratio':>6}   ({simd_path()})")
    for npages in (1 << 18, 1 << 21, 1 << 24):
        bitmap, random = dl.DirtyBitmap(npages), np.random.default_rng(1)
        for density in DENSITIES:
            pages = dl.DirtyPages.from_indices(np.flatnonzero(random.random(npages) < density), npages)
            best = [
                min(times)
                for times in zip(
                    *([seconds(bitmap, pages, quiescent=how) for how in (False, True)] for _ in range(options.rounds)),
                    strict=True,
                )
            ]
            ratio = best[0] / best[1]
            print(f"{npages:>12,} {density:>7.1%} {best[0] * 1e6:>9.1f} us {best[1] * 1e6:>9.1f} us {ratio:>6.1f}")


if __name__ == "__main__":
    main()
