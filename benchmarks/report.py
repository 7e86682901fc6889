"""Measure dirtylog against its peers and write the tables and charts of the documentation.

    python -m benchmarks.report             # all sizes and densities, about half an hour
    python -m benchmarks.report --quick     # without 2^28 pages, a few minutes
    python -m benchmarks.report --redraw    # measures nothing: the page and charts from recorded.json again

Writes benchmarks/recorded.json, and from it docs/benchmarks.md and docs/_static/benchmarks/*.svg. The figures are
ratios of one run on one machine; the absolute times are there to be divided, not to be quoted.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import sys
from dataclasses import asdict, dataclass
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
RECORDED = Path(__file__).with_name("recorded.json")
DENSITIES = (0, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 0.5, 1)
WORKS = {
    "mark": "mark k random pages",
    "numbers": "harvest to page numbers",
    "runs": "harvest to runs",
    "words": "harvest to words",
    "union": "union of two sets",
    "count": "count",
}
# What each chart answers, in the reader's words.
QUESTIONS = {
    "mark": "How long does it take to mark pages?",
    "numbers": "How long does a harvest take, if you want page numbers?",
    "runs": "How long does a harvest take, if you want runs of pages?",
    "words": "How long does a harvest take, if you want the words of the bitmap?",
    "union": "How long does it take to unite two sets of pages?",
    "count": "How long does it take to count the dirty pages?",
}
# One colour for a contestant, in every chart: readers learn it once.
COLOURS = {
    "dirtylog": "#0072b2",
    "kernel's loop": "#111111",
    "numpy": "#d55e00",
    "numpy, bool views": "#e6a700",
    "bitarray": "#009e73",
    "pyroaring": "#cc6fa5",
    "pure Python": "#8a8a8a",
}
MIDDLE = 1e-4  # the density that sentences and the chart over sizes speak of
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


@dataclass(frozen=True)
class Run:
    """One run of the whole comparison: all that the page says."""

    date: str
    machine: str
    claims: list[Claim]
    times: Times
    note: str = ""

    def save(self, path: Path = RECORDED) -> None:
        """Keep the figures, so that the page can be drawn again without measuring again."""
        rows = [
            {"work": work, "size": size, "density": density, "seconds": seconds}
            for (work, size, density), seconds in self.times.items()
        ]
        head = {"date": self.date, "machine": self.machine, "note": self.note}
        lists = {"claims": [asdict(claim) for claim in self.claims], "times": rows}
        lines = [f'"{name}": [\n' + ",\n".join(map(json.dumps, rows)) + "\n]" for name, rows in lists.items()]
        path.write_text(json.dumps(head, indent=0)[:-2] + ",\n" + ",\n".join(lines) + "\n}\n")

    @classmethod
    def load(cls, path: Path = RECORDED) -> Run:
        """Read what `save` kept."""
        found = json.loads(path.read_text())
        times = {(row["work"], row["size"], row["density"]): row["seconds"] for row in found["times"]}
        return cls(found["date"], found["machine"], [Claim(**row) for row in found["claims"]], times, found["note"])


def chart(times: Times, work: str, points: list[tuple[int, float]], across: str, path: Path) -> None:
    """Draw one work's cost against density or size, both axes logarithmic, every contestant in the legend."""
    with plt.rc_context({"svg.fonttype": "none", "svg.hashsalt": path.name, "font.family": "sans-serif"}):
        figure, axis = plt.subplots(figsize=(9, 4.6), constrained_layout=True)
        for name, colour in COLOURS.items():
            line = [
                (density if across == "density" else 1 << size, times[work, size, density][name] * 1e3)
                for size, density in points
                if name in times.get((work, size, density), {})
            ]
            width = 3 if name == "dirtylog" else 1.6
            order = 3 if name == "dirtylog" else 2
            label = name if line else f"{name} (not in this chart)"
            xs, ys = zip(*line, strict=True) if line else ((), ())
            axis.loglog(xs, ys, marker="o", ms=4, lw=width, color=colour, label=label, zorder=order, gid=f"line {name}")
        axis.set_xlabel("dirty pages, share of all" if across == "density" else "pages")
        axis.set_ylabel("milliseconds (lower is better)")
        axis.grid(alpha=0.3)
        legend = figure.legend(loc="outside right upper", frameon=False, fontsize=9)
        for handle, name in zip(legend.legend_handles, COLOURS, strict=True):
            handle.set_gid(f"legend {name}")
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)


def sentence(times: Times, work: str, size: int, density: float = MIDDLE) -> str:
    """Return what a chart answers at one point, as a sentence."""
    found = times[work, size, density]
    ours = found["dirtylog"]
    peers = sorted((found[name] / ours, name) for name in found if name != "dirtylog")
    said = [
        f"{ratio:,.0f} times (*{name}*)" if ratio >= 10 else f"{ratio:.1f} times (*{name}*)" for ratio, name in peers
    ]
    listed = f"{', '.join(said[:-1])} and {said[-1]}" if len(said) > 1 else said[0]
    return (
        f"With 2^{size} pages, {density:.2%} of them dirty, *dirtylog* takes {ours * 1e3:.2g} ms. "
        f"{'The others take' if len(said) > 1 else 'The other contestant takes'} {listed} as long."
    )


def pictures(times: Times, directory: Path) -> list[str]:
    """Draw one chart for each question, and return the lines of the page that ask, answer and show it."""
    directory.mkdir(parents=True, exist_ok=True)
    for old in directory.glob("*.svg"):
        old.unlink()
    sizes = sorted({size for _, size, _ in times})
    largest = sizes[-1]
    densities = sorted({density for _, _, density in times if density > 0})
    views = [(work, "density", [(largest, d) for d in densities], question) for work, question in QUESTIONS.items()]
    by_size = "How does a harvest to page numbers grow with the memory?"
    views.insert(2, ("numbers", "size", [(s, MIDDLE) for s in sizes], by_size))
    lines = []
    for work, across, points, question in views:
        name = f"{work}-by-{across}.svg"
        chart(times, work, points, across, directory / name)
        size = largest if across == "density" else sizes[0]
        fixed = f"2^{largest} pages" if across == "density" else f"{MIDDLE:.2%} dirty"
        lines += [f"### {question}", "", sentence(times, work, size), ""]
        lines += [f"![{question} {fixed}, against {across}.](_static/benchmarks/{name})", ""]
    return lines


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


def write(run: Run) -> Path:
    """Write the page; what it explains by hand stands in benchmarks-notes.md beside it."""
    missed = sum(not claim.met for claim in run.claims)
    lines = [
        "# Benchmarks",
        "",
        f"Measured by `python -m benchmarks.report` on {run.date}: {run.machine}.",
        "Ratios are medians of interleaved rounds in one run.",
        *([run.note] if run.note else []),
        "",
        "## One chart per question",
        "",
        "A contestant has the same colour in every chart. Both axes are logarithmic.",
        "",
        *pictures(run.times, DOCS / "_static" / "benchmarks"),
        "## Claims",
        "",
        f"{len(run.claims) - missed} of {len(run.claims)} claims are met, {missed} missed.",
        "",
        *folded("All claims", claim_rows(run.claims)),
        "",
        "```{include} benchmarks-notes.md",
        "```",
        "",
        "## Tables",
        "",
        "A peer's column is its time as a multiple of dirtylog's: above 1, dirtylog is faster. A dash: the peer",
        "cannot do this work, or would take minutes for it.",
    ]
    for work, text in WORKS.items():
        for size in sorted({s for w, s, _ in run.times if w == work}):
            lines += ["", *folded(f"{text[0].upper()}{text[1:]}, 2^{size} pages", table(run.times, work, size))]
    page = DOCS / "benchmarks.md"
    page.write_text("\n".join(lines) + "\n")
    return page


def folded(title: str, rows: list[str]) -> list[str]:
    """Return a table that the reader opens when wanted."""
    return ["<details>", f"<summary>{title}</summary>", "", *rows, "", "</details>"]


def main() -> int:
    """Measure, record and write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="sizes 2^18 and 2^24 only")
    parser.add_argument("--redraw", action="store_true", help="measure nothing: write the page from recorded.json")
    args = parser.parse_args()
    if not args.redraw:
        times = measure((18, 24) if args.quick else (18, 24, 28), DENSITIES)
        Run(str(datetime.date.today()), machine(), list(all_claims()), times).save()
    print(write(Run.load()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
