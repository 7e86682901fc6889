"""Measure harvests on this machine, as ratios to plain Python and to numpy.

Marks random pages of a bitmap and harvests them to page numbers, by dirtylog, by
`dirtylog.reference` and by numpy, side by side in one run. The whole comparison with
other libraries is `python -m benchmarks.report`, in a checkout.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import TYPE_CHECKING, Any

import numpy as np

from dirtylog.commands import _terminal

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["add_arguments", "run"]

DENSITIES = (0.0001, 0.01, 0.1, 0.5)
ROUNDS = 5
# Plain Python takes seconds past this.
MOST_REFERENCE_PAGES = 1 << 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "--pages", type=page_count, default=1 << 20, metavar="N", help="pages of the bitmap (default %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def page_count(text: str) -> int:
    """Read a number of pages that fits into memory several times."""
    if not text.isdecimal() or not 1 <= int(text) <= 1 << 28:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of pages from 1 to {1 << 28}")
    return int(text)


def median(work: Callable[[], object], prepare: Callable[[], object]) -> float:
    """Return the median seconds of `work`; `prepare` is not timed."""
    times = []
    for _ in range(ROUNDS):
        prepare()
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def measure(npages: int, density: float) -> dict[str, Any]:
    """Return the seconds of one harvest to page numbers, and how many times as long the others took."""
    from dirtylog import DirtyBitmap, DirtyPages, reference

    pages = np.unique(np.random.default_rng(1).integers(0, npages, max(1, int(npages * density))))
    bitmap = DirtyBitmap(npages)
    dirty = DirtyPages.from_indices(pages, npages)
    ours = median(lambda: bitmap.harvest().indices(), lambda: bitmap.merge(dirty))
    words = dirty.words.copy()
    theirs = median(lambda: np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")), lambda: None)
    row: dict[str, Any] = {"density": density, "dirty": int(pages.size), "seconds": ours, "numpy": theirs / ours}
    if npages <= MOST_REFERENCE_PAGES:
        twin = reference.DirtyBitmap(npages)
        marks = pages.tolist()
        plain = median(lambda: twin.harvest().indices(), lambda: twin.mark_pages(marks))
        row["reference"] = plain / ours
    return row


def times_text(row: dict[str, Any], name: str) -> str:
    """Write a ratio; a dash where it was not measured."""
    return f"{row[name]:,.0f} x" if name in row else "-"


def run(args: argparse.Namespace) -> int:
    """Measure every density and print the table."""
    rows = [measure(args.pages, density) for density in _terminal.with_progress(DENSITIES, "measuring")]
    if args.json:
        _terminal.show_json({"pages": args.pages, "rows": rows})
        return 0
    _terminal.show_table(
        f"A harvest of {args.pages:,} pages to page numbers; how many times as long the others take",
        ["dirty", "pages", "dirtylog", "numpy", "plain Python"],
        [
            [
                f"{row['density']:.2%}",
                f"{row['dirty']:,}",
                _terminal.seconds_text(row["seconds"]),
                times_text(row, "numpy"),
                times_text(row, "reference"),
            ]
            for row in rows
        ],
    )
    return 0
