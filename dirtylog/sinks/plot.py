"""Pictures of traces and migrations, with matplotlib: each function takes Axes and returns them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from dirtylog.errors import BackendUnavailable
from dirtylog.sinks.forecast import Forecast
from dirtylog.sinks.trace import Trace
from dirtylog.sinks.trace.digest import digest
from dirtylog.sinks.trace.names import short_names

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["dirty_rate", "heat_map", "migration"]

# Below this share a colour says no more than that something was written.
LEAST = 1e-3
# Okabe and Ito's: told apart by who does not see red or green.
BLUE, VERMILION = "#0072B2", "#D55E00"


def _axes(ax: Axes | None) -> Axes:
    if ax is not None:
        return ax
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise BackendUnavailable("plots", f"import matplotlib: {error}", "pip install matplotlib") from error
    return pyplot.gca()


def heat_map(trace: Trace, ax: Axes | None = None, *, rows: int = 256, **kwargs: Any) -> Axes:
    """Draw which pages were written when, region by region.

    Parameters
    ----------
    trace : Trace
        Read once, from its beginning; its harvests are not disturbed.
    ax : Axes, optional
        Where to draw; pyplot's current Axes if left out.
    rows : int, default 256
        About so many parts of what was written, from the bottom (the first page) to
        the top.
    **kwargs
        For :meth:`matplotlib.axes.Axes.pcolormesh`.

    Returns
    -------
    Axes
        Seconds to the right; upwards the regions by name, or page numbers where the
        trace has no regions; by colour, on a logarithmic scale, the share of a
        part's pages that one harvest found written.

    Raises
    ------
    BackendUnavailable
        matplotlib is not installed.
    ValueError
        `rows` is less than 1.
    TraceError
        The trace is damaged.

    Notes
    -----
    As in the page of :func:`dirtylog.sinks.report.report_html`: parts that were never
    written are left out, regions that were hardly written share a band at the top,
    and where a trace has more than 383 epochs, adjacent ones share a column, which
    shows their mean.
    """
    if rows < 1:
        raise ValueError(f"rows is {rows}; it must be 1 or more")
    ax = _axes(ax)
    facts = digest(trace)
    plan = facts.map(rows)
    ax.set(xlabel="seconds", title="Pages written")
    if not plan.blocks:
        return ax
    from matplotlib.colors import LogNorm

    shares = plan.cells / (plan.npages[:, None] * facts.column_epochs)
    options: dict[str, Any] = {"cmap": "viridis_r", "norm": LogNorm(LEAST, 1), "rasterized": True}
    if "vmin" in kwargs or "vmax" in kwargs:
        del options["norm"]
    mesh = ax.pcolormesh(
        facts.edges,
        plan.edges,
        np.ma.masked_equal(np.where(shares > 0, np.maximum(shares, LEAST), 0), 0),
        **options | kwargs,
    )
    if facts.regions == [""]:
        places = np.unique(np.linspace(0, len(shares), 5).round().astype(int))
        numbers = [*plan.first.tolist(), int(plan.last[-1])]
        ax.set_yticks(plan.edges[places], [f"{numbers[place]:,}" for place in places])
        ax.set_ylabel("page")
    else:
        names = [block.name or "pages of no region" for block in plan.blocks]
        sizes = [block.npages * facts.page_size for block in plan.blocks]
        middles = [(plan.edges[block.start] + plan.edges[block.end]) / 2 for block in plan.blocks]
        ax.set_yticks(middles, short_names(names, sizes))
        ax.tick_params(axis="y", length=0)
        for block in plan.blocks[1:]:
            ax.axhline(float(plan.edges[block.start]), color=ax.get_facecolor(), linewidth=1.5)
    if ax.figure is not None:
        bar = ax.figure.colorbar(mesh, ax=ax, label="share of pages written in a harvest")
        if "norm" not in kwargs and "norm" in options:
            bar.set_ticks([0.001, 0.01, 0.1, 1], labels=["0.1 %", "1 %", "10 %", "100 %"])
            bar.minorticks_off()
    return ax


def dirty_rate(trace: Trace, ax: Axes | None = None, **kwargs: Any) -> Axes:
    """Draw how many bytes per second got dirty.

    Parameters
    ----------
    trace : Trace
        Read once, from its beginning; its harvests are not disturbed.
    ax : Axes, optional
        Where to draw; pyplot's current Axes if left out.
    **kwargs
        For :meth:`matplotlib.axes.Axes.stairs`.

    Returns
    -------
    Axes
        Seconds to the right, MiB per second upwards, over windows of one length.

    Raises
    ------
    BackendUnavailable
        matplotlib is not installed.
    TraceError
        The trace is damaged.

    Notes
    -----
    Windows are as long as most epochs (or columns of adjacent epochs, of a trace that
    has more than 383), and an epoch's pages count as even over its time: so a last
    epoch of a few milliseconds makes no needle.
    """
    ax = _axes(ax)
    facts = digest(trace)
    edges, pages = facts.windows(facts.column_pages)
    ax.set(xlabel="seconds", ylabel="MiB dirtied per second", title="Dirty rate")
    if len(pages):
        rates = pages * facts.page_size / np.diff(edges) / 2**20
        ax.stairs(rates, edges, **{"fill": True, "color": BLUE, "alpha": 0.8, **kwargs})
        ax.set_ylim(bottom=0)
    return ax


def migration(forecast: Forecast, ax: Axes | None = None, **kwargs: Any) -> Axes:
    """Draw a migration round by round.

    Parameters
    ----------
    forecast : Forecast
        Of :func:`dirtylog.sinks.trace.what_if` or a rate meter.
    ax : Axes, optional
        Where to draw; pyplot's current Axes if left out.
    **kwargs
        For :meth:`matplotlib.axes.Axes.bar`.

    Returns
    -------
    Axes
        A bar for each round, as wide as it takes seconds and as high as what it
        sends in MiB, and one for the pause at the end, where that is known.

    Raises
    ------
    BackendUnavailable
        matplotlib is not installed.
    """
    ax = _axes(ax)
    sent = [item.nbytes / 2**20 for item in forecast.rounds]
    seconds = [item.seconds for item in forecast.rounds]
    starts = np.cumsum([0.0, *seconds])
    style = {"align": "edge", "color": BLUE, "edgecolor": "white", "linewidth": 0.5, **kwargs}
    ax.bar(starts[:-1], sent, width=seconds, label="sent while it runs", **style)
    rest = forecast.downtime * forecast.bandwidth / 2**20
    ax.bar(
        starts[-1:], [rest], width=[forecast.downtime], label="sent while it is paused", **style | {"color": VERMILION}
    )
    ax.set(
        xlabel="seconds",
        ylabel="MiB",
        title=f"Migration at {forecast.bandwidth / 1e6:.4g} MB/s: {forecast.verdict}",
        yscale="log",
    )
    ax.legend()
    return ax
