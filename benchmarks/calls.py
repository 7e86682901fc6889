"""What the call itself costs, where there is next to nothing to do: nanoseconds, and against another build.

``python -m benchmarks.calls``: each call on few pages. ``--against DIRECTORY``: beside a checkout of another revision,
built in place; both are measured in turns, in processes of their own, and the ratio is of the medians.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np

import dirtylog as dl

ROOT = Path(__file__).parents[1]
ROUNDS = 25
NUMBERS = [3, 4, 5, 900, 901, 902, 903, 1000]

Call = Callable[[], Any]


def calls() -> dict[str, Call]:
    """Return each call, ready to be made any number of times."""
    small, large = dl.DirtyBitmap(2**10), dl.DirtyBitmap(2**24)
    marked = dl.DirtyBitmap(2**10)
    after_parts = dl.DirtyBitmap(2**26)
    after_parts.mark_pages(np.arange(0, 2**26, 2**17))
    for first in range(0, 2**26, 2**17):
        after_parts.harvest(first, 2**17)  # leaves the top bit of each span, which the first harvest of all takes
    foreign = dl.DirtyBitmap.from_buffer(np.zeros(16, np.uint64))
    one, array = dl.DirtyPages.from_indices([3], 2**10), np.array(NUMBERS)

    def mark_and_harvest() -> None:
        marked.mark(3)
        marked.harvest()

    return {
        "a function that does nothing": lambda: None,
        "mark": lambda: marked.mark(3),
        "mark_range of 8": lambda: marked.mark_range(3, 8),
        "mark_pages of 8, list": lambda: marked.mark_pages(NUMBERS),
        "mark_pages of 8, array": lambda: marked.mark_pages(array),
        "harvest of nothing, 2^10": small.harvest,
        "harvest of nothing, 2^24": large.harvest,
        "nothing after parts, 2^26": after_parts.harvest,
        "harvest of nothing, foreign 2^10": foreign.harvest,
        "mark and harvest": mark_and_harvest,
        "indices of one page": one.indices,
        "runs of one page": one.runs,
    }


def run(call: Call, count: int) -> None:
    """Make a call `count` times."""
    for _ in repeat(None, count):
        call()


def nanoseconds(call: Call) -> float:
    """Measure one call for about half a millisecond."""
    start = time.perf_counter_ns()
    run(call, 2000)
    return (time.perf_counter_ns() - start) / 2000


def serve() -> None:
    """Measure what standard input asks for, a name a line."""
    found = calls()
    for call in found.values():
        run(call, 1000)
    for line in sys.stdin:
        print(nanoseconds(found[line.strip()]), flush=True)


def server(directory: Path) -> subprocess.Popen[str]:
    """Start a process that measures the dirtylog of a directory."""
    # Its own dirtylog, and this file, which the other revision may not have.
    code = f"import runpy, sys; sys.path.insert(0, {str(directory)!r}); runpy.run_path({__file__!r})['serve']()"
    return subprocess.Popen(
        [sys.executable, "-P", "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONHASHSEED": "0"},
    )


def ask(process: subprocess.Popen[str], name: str) -> float:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(f"{name}\n")
    process.stdin.flush()
    return float(process.stdout.readline())


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.calls", description=__doc__)
    parser.add_argument("--against", type=Path, metavar="DIRECTORY", help="a checkout of another revision")
    args = parser.parse_args()
    servers = [server(directory.absolute()) for directory in [ROOT, args.against] if directory]
    print(f"{'nanoseconds, median and least':34} {'this':>14} {'other':>14} {'ratio':>7}")
    for name in calls():
        times: list[list[float]] = [[] for _ in servers]
        for _ in range(ROUNDS):
            for mine, process in zip(times, servers, strict=True):
                mine.append(ask(process, name))
        row = [f"{statistics.median(mine):7.0f} {min(mine):6.0f}" for mine in times]
        ratio = f"{statistics.median(times[1]) / statistics.median(times[0]):7.2f}" if args.against else ""
        print(f"{name:34} {' '.join(row)} {ratio}")
    for process in servers:
        process.communicate()


if __name__ == "__main__":
    main()
