"""Pictures of traces and migrations, with matplotlib: each function takes Axes and returns them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from dirtylog._bits.strip import density
from dirtylog.errors import BackendUnavailable
from dirtylog.sinks.forecast import Forecast
from dirtylog.sinks.trace import Trace

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["dirty_rate", "heat_map", "migration"]

MAX_COLUMNS = 1000


def _axes(ax: Axes | None) -> Axes:
    if ax is not None:
        return ax
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise BackendUnavailable("plots", f"import matplotlib: {error}", "pip install matplotlib") from error
    return pyplot.gca()


def heat_map(trace: Trace, ax: Axes | None = None, *, rows: int = 256, **kwargs: Any) -> Axes:
    """Draw which pages were written when.

    Parameters
    ----------
    trace : Trace
        Read from its beginning; its harvests are not disturbed.
    ax : Axes, optional
        Where to draw; pyplot's current Axes if left out.
    rows : int, default 256
        Parts of the page space, from the bottom (page 0) to the top.
    **kwargs
        For :meth:`matplotlib.axes.Axes.pcolormesh`.

    Returns
    -------
    Axes
        Seconds to the right, page numbers upwards, and by colour the share of
        the pages that was dirty.

    Raises
    ------
    BackendUnavailable
        matplotlib is not installed.
    TraceError
        The trace is damaged.

    Notes
    -----
    Where a trace has more than 1000 epochs, adjacent ones share a column, which
    shows their mean.
    """
    ax = _axes(ax)
    together = max(1, -(-trace.length // MAX_COLUMNS))
    times, columns, group = [0.0], [], []
    for epoch in trace.epochs():
        group.append(density(epoch.runs, rows))
        if len(group) == together or epoch.number == trace.length:
            columns.append(np.mean(group, axis=0))
            times.append(epoch.time)
            group = []
    ax.set(xlabel="seconds", ylabel="page", title="Pages written")
    if columns and len(columns[0]):
        edges = np.linspace(0, trace.npages, len(columns[0]) + 1)
        options = {"cmap": "inferno", "vmin": 0.0, "vmax": 1.0, "rasterized": True, **kwargs}
        mesh = ax.pcolormesh(np.array(times), edges, np.array(columns).T, **options)
        if ax.figure is not None:
            ax.figure.colorbar(mesh, ax=ax, label="share of pages dirty")
    return ax


def dirty_rate(trace: Trace, ax: Axes | None = None, **kwargs: Any) -> Axes:
    """Draw how many bytes per second got dirty.

    Parameters
    ----------
    trace : Trace
        Read from its beginning; its harvests are not disturbed.
    ax : Axes, optional
        Where to draw; pyplot's current Axes if left out.
    **kwargs
        For :meth:`matplotlib.axes.Axes.stairs`.

    Returns
    -------
    Axes
        Seconds to the right, MiB per second upwards.

    Raises
    ------
    BackendUnavailable
        matplotlib is not installed.
    TraceError
        The trace is damaged.
    """
    ax = _axes(ax)
    times, rates, last, waiting = [0.0], [], 0.0, 0
    for epoch in trace.epochs():
        waiting += epoch.nbytes
        if epoch.time > last:
            rates.append(waiting / (epoch.time - last) / 2**20)
            times.append(epoch.time)
            last, waiting = epoch.time, 0
        elif rates:
            # A second epoch of the same moment is of the same stretch of time.
            rates[-1] += waiting / (times[-1] - times[-2]) / 2**20
            waiting = 0
    ax.set(xlabel="seconds", ylabel="MiB dirtied per second", title="Dirty rate")
    if rates:
        ax.stairs(rates, times, **{"fill": True, "color": "#c2410c", "alpha": 0.8, **kwargs})
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
    style = {"align": "edge", "color": "#0369a1", "edgecolor": "white", "linewidth": 0.5, **kwargs}
    ax.bar(starts[:-1], sent, width=seconds, label="sent while it runs", **style)
    rest = forecast.downtime * forecast.bandwidth / 2**20
    ax.bar(
        starts[-1:], [rest], width=[forecast.downtime], label="sent while it is paused", **style | {"color": "#c2410c"}
    )
    ax.set(
        xlabel="seconds",
        ylabel="MiB",
        title=f"Migration at {forecast.bandwidth / 1e6:.4g} MB/s: {forecast.verdict}",
        yscale="log",
    )
    ax.legend()
    return ax
