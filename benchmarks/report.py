"""Measure dirtylog against its peers and write the tables and charts of the documentation.

    python -m benchmarks.report             # all sizes and densities, about half an hour
    python -m benchmarks.report --quick     # without 2^28 pages, a few minutes

Writes docs/benchmarks.md and docs/_static/benchmarks/*.svg. Ratios of one run on
one machine; absolute times are there to be divided, not to be quoted.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import sys
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

import dirtylog as dl
from benchmarks.peers.claims import Claim, all_claims, filler, random_pages
from benchmarks.peers.contestants import CONTESTANTS, Python
from benchmarks.peers.timing import side_by_side
from dirtylog._core import simd_path

matplotlib.use("svg")
import matplotlib.pyplot as plt

DOCS = Path(__file__).resolve().parents[1] / "docs"
DENSITIES = (0, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 0.5, 1)
WORKS = {
    "mark": "mark k random pages",
    "numbers": "harvest to page numbers",
    "runs": "harvest to runs",
    "words": "harvest to words",
    "union": "union of two sets",
    "count": "count",
}
# A contestant is left out where one round would take so many pages of Python objects.
MOST_PYTHON_PAGES = 1 << 18
MOST_LIST_PAGES = 1 << 24

Times = dict[tuple[str, int, float], dict[str, float]]


def machine() -> str:
    """Return the name of the processor, and the software that matters."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    return (
        f"{model}, {platform.system()} {platform.release().split('-')[0]}, Python {platform.python_version()}, "
        f"numpy {np.__version__}, dirtylog {dl.__version__} ({simd_path()})"
    )


def takes_part(kind: type[Any], size: int, density: float) -> bool:
    """Return whether a contestant can do this work in bearable time."""
    if kind is Python:
        return 1 << size <= MOST_PYTHON_PAGES
    if kind.name == "bitarray":
        return (1 << size) * density <= MOST_LIST_PAGES
    return True


def measure(sizes: tuple[int, ...], densities: tuple[float, ...]) -> Times:
    """Return the median seconds of every contestant, by work, size and density."""
    times: Times = {}
    for size in sizes:
        for density in densities:
            pages = random_pages(1 << size, density)
            field = []
            for kind in CONTESTANTS:
                if takes_part(kind, size, density):
                    contestant = kind(1 << size)
                    contestant.prepare(pages)
                    field.append(contestant)
            for work in WORKS:
                if density == 0 and work in ("mark", "union"):
                    continue
                works = {
                    contestant.name: (
                        contestant.clear if work == "mark" else filler(contestant, pages, 1 << size),
                        getattr(contestant, work),
                    )
                    for contestant in field
                    if work in contestant.works
                }
                times[work, size, density] = side_by_side(works, seconds=0.3, rounds=9)
                print(f"2^{size} {density:g} {work}", file=sys.stderr, flush=True)
    return times


def charts(times: Times, directory: Path) -> list[str]:
    """Draw cost against density and against size, both axes logarithmic; returns the file names."""
    directory.mkdir(parents=True, exist_ok=True)
    names = []
    sizes = sorted({size for _, size, _ in times})
    densities = sorted({density for _, _, density in times if density > 0})
    views = [("density", [(sizes[-1], d) for d in densities], f"2^{sizes[-1]} pages", "dirty pages, share of all")]
    middle = 1e-4
    views.append(("size", [(s, middle) for s in sizes], f"{middle:.2%} dirty", "pages"))
    for kind, points, title, label in views:
        figure, axes = plt.subplots(2, 3, figsize=(13, 7), constrained_layout=True)
        for axis, (work, text) in zip(axes.flat, WORKS.items(), strict=True):
            for contestant in CONTESTANTS:
                line = [
                    (density if kind == "density" else 1 << size, times[work, size, density][contestant.name] * 1e3)
                    for size, density in points
                    if contestant.name in times.get((work, size, density), {})
                ]
                if line:
                    bold = contestant.name == "dirtylog"
                    width = 2.5 if bold else 1.2
                    axis.loglog(*zip(*line, strict=True), marker="o", ms=3, lw=width, label=contestant.name)
            axis.set_title(text, fontsize=10)
            axis.set_xlabel(label)
            axis.set_ylabel("ms")
            axis.grid(alpha=0.3)
        axes.flat[1].legend(fontsize=8)
        figure.suptitle(f"Cost against {kind}, {title}")
        name = f"cost-against-{kind}.svg"
        figure.savefig(directory / name, metadata={"Date": None})
        plt.close(figure)
        names.append(name)
    return names


def table(times: Times, work: str, size: int) -> list[str]:
    """Return a table of one work at one size: dirtylog's time, and the peers' as multiples of it."""
    peers = [kind.name for kind in CONTESTANTS if kind.name != "dirtylog" and work in kind.works]
    rows = [f"| dirty | dirtylog, ms | {' | '.join(peers)} |", "|" + "---:|" * (len(peers) + 2)]
    for density in sorted({d for w, s, d in times if (w, s) == (work, size)}):
        found = times[work, size, density]
        ours = found["dirtylog"]
        cells = [f"{found[peer] / ours:,.1f}x" if peer in found else "-" for peer in peers]
        rows.append(f"| {density:.4%} | {ours * 1e3:.4f} | {' | '.join(cells)} |")
    return rows


def claim_rows(claims: list[Claim]) -> list[str]:
    """Return the table of claims, those missed said as plainly as those met."""
    rows = ["| work | found | wanted | |", "|---|---:|---:|---|"]
    for claim in claims:
        bound = "at least" if claim.at_least else "at most"
        verdict = "met" if claim.met else "**missed**"
        note = f"; {claim.note}" if claim.note else ""
        rows.append(f"| {claim.work} | {claim.ratio:,.2f} | {bound} {claim.wanted:g} | {verdict}{note} |")
    return rows


def write(claims: list[Claim], times: Times) -> Path:
    """Write the page; what it explains by hand stands in benchmarks-notes.md beside it."""
    names = charts(times, DOCS / "_static" / "benchmarks")
    lines = [
        "# Benchmarks",
        "",
        f"Written by `python -m benchmarks.report` on {datetime.date.today()}: {machine()}.",
        "Ratios are medians of interleaved rounds in one run.",
        "",
        "```{include} benchmarks-notes.md",
        "```",
        "",
        "## Claims",
        "",
        *claim_rows(claims),
        "",
        "## Charts",
        "",
        *(f"![{name[:-4]}](_static/benchmarks/{name})\n" for name in names),
        "## Tables",
        "",
        "A peer's column is its time as a multiple of dirtylog's: above 1, dirtylog is faster. A dash: the peer",
        "cannot do this work, or would take minutes for it.",
    ]
    for work, text in WORKS.items():
        for size in sorted({s for w, s, _ in times if w == work}):
            lines += ["", f"### {text[0].upper()}{text[1:]}, 2^{size} pages", "", *table(times, work, size)]
    DOCS.mkdir(exist_ok=True)
    page = DOCS / "benchmarks.md"
    page.write_text("\n".join(lines) + "\n")
    return page


def main() -> int:
    """Measure and write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="sizes 2^18 and 2^24 only")
    args = parser.parse_args()
    sizes = (18, 24) if args.quick else (18, 24, 28)
    times = measure(sizes, DENSITIES)
    claims = list(all_claims())
    print(write(claims, times))
    return 0


if __name__ == "__main__":
    sys.exit(main())
