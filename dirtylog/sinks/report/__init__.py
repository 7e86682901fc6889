"""A trace as one HTML page that stands alone: its charts are drawn in the browser, and nothing is asked of anybody.

The charts are Plotly's, from the vendored file that ``vendored.json`` names. Of the maintained libraries it is the one
that draws a heat map over real time as a picture (columns and rows of any size, fast on a phone), and has hover, zoom
and a range slider. ECharts is smaller (1.1 MB, not 1.5), but its heat map is of categories, a shape for each cell.
Vega-Lite needs three files and an interpreter under a policy without ``eval``; Observable Plot has no brush; uPlot, at
50 KB, has no heat map: it would be our own chart code.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from dirtylog._public import publish
from dirtylog.sinks.trace import Trace
from dirtylog.sinks.trace.digest import Digest, digest
from dirtylog.sinks.trace.names import short_names, size_text

__all__ = ["report_html"]

# 1 and 10 Gbit/s.
BANDWIDTHS = (1.25e8, 1.25e9)
# Steps per doubling in the map's 16-bit logarithms: up to 2**40 page writes, within 0.03 %.
STEPS = 1600
# So many regions have a colour of their own; so many have rows in the map.
COLOURED, NAMED, ROWS = 8, 14, 160
LONGEST_NAME = 120
# What the sliders offer, per decade: 1, 1.25, 1.6, ... (the preferred numbers of ISO 3).
PREFERRED = (1.0, 1.25, 1.6, 2.0, 2.5, 3.2, 4.0, 5.0, 6.3, 8.0)
# Seconds from one snapshot to the next that can be chosen.
RHYTHMS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 300, 600, 3600)


def report_html(trace: Trace, *, bandwidths: Sequence[float] = BANDWIDTHS, downtime: float = 0.3) -> str:
    """Make a page of a trace: a map of what was written where and when, rates, snapshots, and a migration to try.

    Parameters
    ----------
    trace : Trace
        Read once, from its beginning; its harvests are not disturbed.
    bandwidths : sequence of float, optional
        Bytes per second: the migration's slider begins with the first, and each has
        a button.
    downtime : float, default 0.3
        Seconds of pause that a migration may end with; where that slider begins.

    Returns
    -------
    str
        HTML of less than 2 MB, whatever the trace's length. A content security
        policy forbids the browser to load anything, and to run any script but the
        page's two, by their hashes. The same trace makes the same page. With
        ``#t=2,5`` after its address it opens on the time from 2 to 5 s; else on that in which the
        program's own code ran.

    Raises
    ------
    TraceError
        The trace is damaged.
    ValueError
        A bandwidth is not positive and finite, or `downtime` is negative.

    Notes
    -----
    The migration's figures are those of :func:`dirtylog.sinks.trace.what_if` for the
    same numbers; of a trace with more than 383 epochs, with adjacent epochs joined.
    Holds what `dirtylog record` noted: the command line of the program is shown.
    """
    for bandwidth in bandwidths:
        if not (bandwidth > 0 and math.isfinite(bandwidth)):
            raise ValueError(f"bandwidth is {bandwidth}; it must be a positive number of bytes per second")
    if not (downtime >= 0 and math.isfinite(downtime)):
        raise ValueError(f"downtime is {downtime}; it must be a finite number of seconds, 0 or more")
    facts = digest(trace)
    here = Path(__file__).parent

    def text(name: str) -> str:
        return (here / name).read_text(encoding="utf-8")

    vendored = json.loads(text("vendored.json"))
    scripts = [text("plotly-cartesian.min.js"), text("page.js")]
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    data = json.dumps(_data(trace, facts, bandwidths, downtime), separators=(",", ":"))
    folded = 1 - sum(block.npages for block in facts.map(ROWS, NAMED).blocks) / max(facts.npages, 1)
    fields = {
        "title": escape(f"dirtylog: {trace.path.name}"),
        "style": text("page.css"),
        "hashes": " ".join(f"'sha256-{digest}'" for digest in hashes),
        "page_size": f"{facts.page_size:,}",
        "facts": _facts(trace, facts),
        "folded": f"Regions that were never written, {100 * folded:.0f} % of the page space, are left out."
        if folded >= 0.005
        else "",
        "memory": size_text(facts.npages * facts.page_size),
        "library": f"{vendored['name']} {vendored['version']}",
        "licence": escape(text("plotly-LICENSE.txt")),
        # Nothing in a name may end the element.
        "data": data.replace("<", "\\u003c"),
        "charts": scripts[0],
        "script": scripts[1],
    }
    return re.sub(r"\{(\w+)\}", lambda match: fields[match[1]], text("page.html"))


def _facts(trace: Trace, facts: Digest) -> str:
    about = trace.about
    interval = facts.seconds / facts.epochs if facts.epochs else 0.0
    if facts.inexact:
        exact = (
            f"{facts.inexact:,} of {facts.epochs:,} harvests are upper bounds: the source lost track there, and "
            "reported more pages than were written"
        )
    else:
        exact = "every harvest is exact: it holds the pages that were written since the one before, and no others"
    if facts.sampled:
        exact += "; how often and how soon pages are written again is estimated from some of them"
    size = size_text(max(facts.memory, facts.distinct) * facts.page_size)
    regions = f" in {len(facts.regions):,} regions" if trace.regions else ""
    rows = [
        ("What", about.get("command", ""), "command"),
        ("When", about.get("started", ""), ""),
        ("Where", about.get("machine", ""), ""),
        ("How long", f"{facts.seconds:.4g} s, {facts.epochs:,} harvests, on average one every {interval:.3g} s", ""),
        ("How exact", exact, ""),
        ("Not seen", about.get("missed", ""), ""),
        ("Start, end", _apart(trace, facts), ""),
        ("Memory", f"{size}{regions}{': ' + about['watched'] if about.get('watched') else ''}", ""),
    ]
    return "".join(
        f'<dt>{key}</dt><dd class="{kind}">{escape(value[:1000])}</dd>' for key, value, kind in rows if value
    )


def _program(trace: Trace, facts: Digest) -> tuple[int, int] | None:
    """Return the columns in which the program's own code ran, where these are not all: the first, and that after."""
    n = len(facts.column_pages)
    begins, ends = trace.program
    first = int(np.searchsorted(facts.edges, begins))
    after = int(np.searchsorted(facts.edges, ends, side="right")) - 1 if ends < facts.seconds else n
    return (first, after) if first < after and (first, after) != (0, n) else None


def _apart(trace: Trace, facts: Digest) -> str:
    """Say what was written while the program was loaded, and while its interpreter took itself down."""
    span = _program(trace, facts)
    if span is None:
        return ""
    texts = [
        f"{size_text(int(facts.column_pages[part].sum()) * facts.page_size)} in {seconds:.3g} s while {what}"
        for part, seconds, what in (
            (slice(0, span[0]), facts.edges[span[0]], "the program was loaded"),
            (slice(span[1], None), facts.seconds - facts.edges[span[1]], "its interpreter took itself down"),
        )
        if seconds > 0
    ]
    return f"{', '.join(texts)}; the time in between is selected at first"


def _data(trace: Trace, facts: Digest, bandwidths: Sequence[float], downtime: float) -> dict[str, Any]:
    """Collect what the page draws, as plain lists."""
    plan = facts.map(ROWS, NAMED)
    unnamed = "all pages" if facts.regions == [""] else "pages of no region"
    full = [block.name[:LONGEST_NAME] or unnamed for block in plan.blocks]
    block_sizes = [block.npages * facts.page_size for block in plan.blocks]
    cells = np.maximum(plan.cells, 1).astype(np.float64)
    codes = np.where(plan.cells > 0, np.rint(np.log2(cells) * STEPS) + 1, 0).astype("<u2")
    hot = list(facts.written())[:COLOURED]
    sums = facts.by_region(hot)
    sizes = facts.sizes() * facts.page_size
    hot_full = [facts.regions[i][:LONGEST_NAME] or unnamed for i in hot]
    hot_names, hot_briefs = (short_names(hot_full, sizes[hot].tolist(), brief=brief) for brief in (False, True))
    rest = bool(sums[-1].any())
    edges, shares = facts.windows(sums if rest else sums[:-1])
    bins = int(np.flatnonzero(facts.gaps.any(axis=0)).max(initial=0)) + 1
    speeds, speed = _choices(1e6, 1e11, bandwidths, bandwidths[0] if bandwidths else BANDWIDTHS[0])
    span = _program(trace, facts)
    pauses, pause = _choices(1e-3, 30.0, [0.0, downtime], downtime)
    return {
        "pageSize": facts.page_size,
        "npages": facts.npages,
        "memory": max(facts.memory, facts.distinct),
        "distinct": facts.distinct,
        "sampled": facts.sampled,
        "named": facts.regions != [""],
        "interval": facts.seconds / facts.epochs if facts.epochs else 0.0,
        "program": [float(facts.edges[i]) for i in span] if span else None,
        # Not rounded: the page calculates with them as Python does.
        "edges": facts.edges.tolist(),
        "columnEpochs": facts.column_epochs.tolist(),
        "columnInexact": facts.column_inexact.tolist(),
        "columnPages": facts.column_pages.tolist(),
        "columnPeaks": [None if math.isnan(peak) else peak for peak in facts.column_peaks.tolist()],
        "before": base64.b64encode(_packed(facts)).decode(),
        "blocks": [
            {"name": name, "label": label, "brief": brief, "start": block.start, "end": block.end}
            for block, name, label, brief in zip(
                plan.blocks,
                full,
                short_names(full, block_sizes),
                short_names(full, block_sizes, brief=True),
                strict=True,
            )
        ],
        "rows": {
            "first": plan.first.tolist(),
            "last": plan.last.tolist(),
            "npages": plan.npages.tolist(),
            "edges": _rounded(plan.edges),
        },
        "grid": base64.b64encode(codes.tobytes()).decode(),
        "steps": STEPS,
        "windows": _rounded(edges),
        "regionNames": [*hot_names, *(["all others"] if rest else [])],
        "regionBriefs": [*hot_briefs, *(["all others"] if rest else [])],
        "regionRest": [*([False] * len(hot_names)), *([True] if rest else [])],
        "regionPages": [_rounded(row, 3) for row in shares],
        "gaps": facts.gaps[:, :bins].tolist(),
        "often": facts.often.tolist(),
        "levels": [
            {"span": level.span, "groups": level.groups, "pages": level.pages.tolist()} for level in facts.levels
        ],
        "rhythms": _rhythms(facts),
        "speeds": speeds,
        "speed": speed,
        "presets": [float(bandwidth) for bandwidth in bandwidths],
        "pauses": pauses,
        "pause": pause,
    }


def _choices(low: float, high: float, given: Sequence[float], first: float) -> tuple[list[float], int]:
    """Return what a slider offers, and the place of the first: the given values are among it, as they were given."""
    steps = [mantissa * 10.0**exponent for exponent in range(-3, 12) for mantissa in PREFERRED]
    values = sorted({*(step for step in steps if low <= step <= high), *map(float, given), float(first)})
    return values, values.index(float(first))


def _rhythms(facts: Digest) -> list[float]:
    """Return what can be chosen between two snapshots: no shorter than a column, no longer than the trace."""
    lengths = np.diff(facts.edges)
    shortest = 0.9 * float(np.median(lengths)) if len(lengths) else 0.0
    return [every for every in RHYTHMS if shortest <= every <= facts.seconds] or [facts.seconds]


def _packed(facts: Digest) -> bytes:
    """Pack when pages were written before, column by column: seven bits per byte, the lowest first."""
    packed = bytearray()
    for column in range(len(facts.column_pages)):
        for count in facts.before[: column + 1, column].tolist():
            while count > 127:
                packed.append(count & 127 | 128)
                count >>= 7
            packed.append(count)
    return bytes(packed)


def _rounded(values: Any, digits: int = 6) -> list[float]:
    return [round(value, digits) for value in np.asarray(values).tolist()]


publish(__name__, globals(), __all__)
