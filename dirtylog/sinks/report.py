"""A trace as one HTML page that stands alone: every chart is inside it, and nothing is asked of anybody."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING

from dirtylog.errors import BackendUnavailable
from dirtylog.sinks import plot
from dirtylog.sinks.forecast import Forecast
from dirtylog.sinks.trace import Trace, what_if

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["report_html"]

# 1 and 10 Gbit/s.
BANDWIDTHS = (1.25e8, 1.25e9)

PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<link rel="icon" href="data:,">
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem; color: #1c1917; }}
img {{ width: 100%; height: auto; }}
table {{ border-collapse: collapse; }} td, th {{ padding: .2rem 1rem .2rem 0; text-align: left; }}
td + td {{ font-variant-numeric: tabular-nums; }}
</style></head><body>
<h1>{title}</h1>
{body}
</body></html>
"""


def report_html(trace: Trace, *, bandwidths: Sequence[float] = BANDWIDTHS, downtime: float = 0.3) -> str:
    """Make a page of a trace: figures, heat map, dirty rate, and a migration for each bandwidth.

    Parameters
    ----------
    trace : Trace
        Read from its beginning; its harvests are not disturbed.
    bandwidths : sequence of float, optional
        Bytes per second, to forecast a migration for each.
    downtime : float, default 0.3
        Seconds of pause that a migration may end with.

    Returns
    -------
    str
        HTML. Images are data URIs, and a content security policy forbids the
        browser to load anything.

    Raises
    ------
    BackendUnavailable
        matplotlib is not installed.
    TraceError
        The trace is damaged.
    """
    forecasts = [what_if(trace, bandwidth, downtime) for bandwidth in bandwidths]
    body = [
        _summary(trace),
        _picture("Which pages were written when", lambda ax: plot.heat_map(trace, ax)),
        _picture("How much was written per second", lambda ax: plot.dirty_rate(trace, ax)),
        f"<h2>Migration</h2><p>With at most {downtime:g} s of pause.</p>",
        _table(["bandwidth", "verdict", "rounds", "seconds", "why"], map(_forecast_row, forecasts)),
        *(_picture(f"Migration at {f.bandwidth:g} bytes per second", _migration(f)) for f in forecasts if f.rounds),
    ]
    return PAGE.format(title=escape(f"dirtylog: {trace.path.name}"), body="\n".join(body))


def _summary(trace: Trace) -> str:
    nbytes, seconds, inexact = 0, 0.0, 0
    regions = dict.fromkeys(trace.regions, 0)
    for epoch in trace.epochs():
        nbytes += epoch.nbytes
        seconds = epoch.time
        inexact += not epoch.exact
        for name, count in epoch.runs.count_ranges(trace.regions).items():
            regions[name] += count
    rows = [
        ["memory", f"{trace.npages} pages of {trace.page_size} bytes, {_mib(trace.npages * trace.page_size)}"],
        ["recorded", f"{trace.length} epochs in {seconds:.3f} s"],
        ["dirtied", f"{_mib(nbytes)}, {_mib(nbytes / seconds if seconds else 0.0)} per second"],
        ["inexact epochs", str(inexact)],
    ]
    hot = sorted(regions.items(), key=lambda item: -item[1])[:20]
    lines = [[name, _mib(count * trace.page_size)] for name, count in hot if count]
    return _table([], rows) + (f"<h2>Hot regions</h2>{_table(['region', 'dirtied'], lines)}" if lines else "")


def _mib(size: float) -> str:
    return f"{size / 2**20:.2f} MiB"


def _forecast_row(forecast: Forecast) -> list[str]:
    return [
        f"{forecast.bandwidth / 1e6:g} MB/s",
        forecast.verdict,
        str(len(forecast.rounds)),
        f"{forecast.seconds:.3f}",
        forecast.reason,
    ]


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return f"<tr>{''.join(f'<{tag}>{escape(cell)}</{tag}>' for cell in cells)}</tr>"

    head = line(header, "th") if header else ""
    return f"<table>{head}{''.join(line(row, 'td') for row in rows)}</table>"


def _migration(forecast: Forecast) -> Callable[[Axes], Axes]:
    return lambda ax: plot.migration(forecast, ax)


def _picture(text: str, draw: Callable[[Axes], Axes]) -> str:
    """Draw into a figure of its own, apart from pyplot's, and return it as an image inside the page."""
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError as error:
        raise BackendUnavailable("plots", f"import matplotlib: {error}", "pip install matplotlib") from error
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    draw(figure.add_subplot())
    file = io.BytesIO()
    # The same trace makes the same page: no date in it, and no random names.
    with mpl.rc_context({"svg.hashsalt": "dirtylog", "svg.fonttype": "path"}):
        figure.savefig(file, format="svg", metadata=dict.fromkeys(["Creator", "Date", "Format", "Type"]))
    data = base64.b64encode(file.getvalue()).decode("ascii")
    return f'<p><img alt="{escape(text)}" src="data:image/svg+xml;base64,{data}"></p>'
