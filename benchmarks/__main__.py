"""The table: ``python -m benchmarks`` compares dirtylog with its reference and with numpy, by ratio in one run."""

import argparse
import math
import time

import numpy as np

import dirtylog as dl
from benchmarks.gil import kept_speed
from benchmarks.peers.timing import side_by_side
from benchmarks.works import BATCH, DENSITIES, OPERATIONS, SIZES, Contestants, contestants
from dirtylog import _core
from dirtylog.commands._terminal import seconds_text, show_table, with_progress

ONCE_FROM_PAGES = 1 << 19  # with more dirty pages, plain Python takes seconds: once must do


def measured(works: Contestants, dirty_pages: float, seconds: float) -> dict[str, float]:
    """Time the contestants side by side; the reference only once where it would take too long."""
    once = {}
    if dirty_pages >= ONCE_FROM_PAGES:
        prepare, work = works["reference"]
        works = {name: steps for name, steps in works.items() if name != "reference"}
        prepare()
        begun = time.perf_counter()
        work()
        once["reference"] = time.perf_counter() - begun
    return {**side_by_side(works, seconds=seconds), **once}


def ratio_text(ratio: float) -> str:
    """Write a ratio with two digits or so."""
    return f"{ratio:,.1f} x" if ratio < 10 else f"{ratio:,.0f} x"


def batch_nanoseconds(seconds: float) -> float:
    """Time a mark in a batch of a million random pages of a 64 GiB VM."""
    bitmap = dl.DirtyBitmap(SIZES[-1])
    pages = np.random.default_rng(0).integers(SIZES[-1], size=BATCH)
    times = side_by_side({"batch": (bitmap.harvest, lambda: bitmap.mark_pages(pages))}, seconds=seconds)
    return times["batch"] / BATCH * 1e9


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--seconds", type=float, default=0.1, help="time for each contestant (0.1)")
    parser.add_argument("--operations", nargs="+", choices=OPERATIONS, default=OPERATIONS)
    parser.add_argument("--sizes", nargs="+", type=int, default=SIZES, metavar="PAGES")
    args = parser.parse_args()
    cases = [(name, size, density) for name in args.operations for size in args.sizes for density in DENSITIES]
    rows = []
    claims: dict[str, float] = {}
    for operation, npages, density in with_progress(cases, "measuring"):
        if operation == "mark" and not density:
            continue
        times = measured(contestants(operation, npages, density), npages * density, args.seconds)
        by_reference = times["reference"] / times["dirtylog"]
        by_numpy = times["numpy"] / times["dirtylog"]
        if operation.startswith("harvest") and npages == SIZES[-1]:
            if density == 0.01:
                claims[f"{operation} at 1 %, against reference"] = by_reference
            worst = f"{operation}, against numpy, the worst density"
            claims[worst] = min(claims.get(worst, math.inf), by_numpy)
        rows.append(
            [
                operation,
                f"2^{npages.bit_length() - 1}" if npages & (npages - 1) == 0 else f"{npages:,}",
                f"{density:.2%}",
                *(seconds_text(times[name]) for name in ("dirtylog", "numpy", "reference")),
                ratio_text(by_numpy),
                ratio_text(by_reference),
            ]
        )
    show_table(
        f"Medians of interleaved rounds, {_core.simd_path()}",
        ["operation", "pages", "dirty", "dirtylog", "numpy", "reference", "numpy /", "reference /"],
        rows,
    )
    summary = [[what, ratio_text(ratio)] for what, ratio in claims.items()]
    summary.append(["mark in a batch of a million random pages", f"{batch_nanoseconds(args.seconds):.1f} ns"])
    summary += [[f"second thread's speed beside: {name}", f"{share:.0%}"] for name, share in kept_speed().items()]
    show_table("In short, 2^24 pages", ["", ""], summary)


if __name__ == "__main__":
    main()
