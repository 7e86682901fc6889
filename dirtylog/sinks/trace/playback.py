"""Plays traces back: replays what was recorded into any sink, and asks what a migration would have done."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from dirtylog.epochs import Epoch
from dirtylog.log import DirtyLog
from dirtylog.sinks.forecast import Forecast, forecast
from dirtylog.sinks.trace.reader import Trace
from dirtylog.sinks.trace.runs import Runs

__all__ = ["replay", "what_if"]


def replay(trace: Trace, sink: Callable[[Epoch], object]) -> int:
    """Hand every epoch that is left of a trace to a sink, as an observer's epoch.

    Parameters
    ----------
    trace : Trace
        Harvested to its end.
    sink : callable
        Called with each :class:`dirtylog.Epoch` while it is held.

    Returns
    -------
    int
        How many epochs there were.

    Raises
    ------
    TraceError
        The trace is damaged.
    Exception
        What the sink raises.

    Notes
    -----
    Does not wait: ``trace.time`` is the time of the epoch. A sink that wants a
    log of its own, such as :class:`dirtylog.sinks.rate.RateMeter`, attaches the
    trace to it as it would any source, with ``clock=lambda: trace.time``.
    """
    log = DirtyLog()
    log.attach(trace, name=str(trace.path))
    replayed = 0
    with log.observer("replay") as observer:
        while not trace.done:
            with observer.collect() as epoch:
                sink(epoch)
            replayed += 1
    return replayed


def what_if(trace: Trace, bandwidth: float, downtime: float, *, start: float = 0.0, max_rounds: int = 30) -> Forecast:
    """Estimate how a migration would have gone that began at a moment of a trace.

    Parameters
    ----------
    trace : Trace
        Read from its beginning; its harvests are not disturbed.
    bandwidth : float
        Bytes per second.
    downtime : float
        Seconds that the program may be paused for.
    start : float, default 0.0
        When the migration begins, in seconds since the recording began.
    max_rounds : int, default 30
        Where it has not converged by then, it does not.

    Returns
    -------
    Forecast
        Verdict ``"unknown"`` where the trace ends before the migration does.

    Notes
    -----
    A round that ends inside an epoch is given the share of that epoch's pages
    that its time has in it. Finer intervals make better forecasts.
    """
    stretches = _Stretches(trace)
    if start > 0:
        stretches.take(start)
    return forecast(
        trace.npages,
        trace.page_size,
        lambda _, seconds: stretches.take(seconds),
        bandwidth=bandwidth,
        downtime=downtime,
        max_rounds=max_rounds,
    )


@dataclass(frozen=True, slots=True)
class Sample:
    """What was written between two moments of a trace, in seconds since the recording began."""

    start: float
    end: float
    runs: Runs


def samples(trace: Trace) -> Iterator[Sample]:
    """Cut a trace at its epochs: what a :class:`dirtylog.sinks.rate.RateMeter` would have seen.

    Parameters
    ----------
    trace : Trace
        Read from its beginning; its harvests are not disturbed.

    Yields
    ------
    Sample
        An epoch of the same moment as the one before is in the next sample.

    Raises
    ------
    TraceError
        The trace is damaged.
    """
    waiting, last = Runs.nothing(trace.npages), 0.0
    for epoch in trace.epochs():
        waiting |= epoch.runs
        if epoch.time > last:
            yield Sample(last, epoch.time, waiting)
            waiting, last = Runs.nothing(trace.npages), epoch.time


def working_set(last: Sequence[Sample], seconds: float) -> int:
    """Return how many different pages were written in the last `seconds` of some samples.

    Parameters
    ----------
    last : sequence of Sample
        In order of time.
    seconds : float
        A sample that reaches further back counts whole.

    Returns
    -------
    int
        In pages.
    """
    found: Runs | None = None
    for sample in reversed(last):
        found = sample.runs if found is None else found | sample.runs
        if last[-1].end - sample.start >= seconds:
            break
    return found.count if found is not None else 0


class _Stretches:
    """Cuts a trace into adjacent stretches of time and counts the different pages in each."""

    def __init__(self, trace: Trace) -> None:
        self._empty = Runs.nothing(trace.npages)
        self._epochs = trace.epochs()
        self._now = 0.0
        self._began = 0.0
        self._current = next(self._epochs, None)

    def take(self, seconds: float) -> float | None:
        """Count the pages of the next `seconds`, or return None where the trace ends before."""
        end = self._now + seconds
        union, partly = self._empty, 0.0
        while True:
            current = self._current
            if current is None:
                return None
            # What of this epoch's time is in this stretch; the rest belongs to its neighbours.
            length = current.time - self._began
            share = (min(end, current.time) - max(self._now, self._began)) / length if length > 0 else 1.0
            if share >= 1:
                union |= current.runs
            else:
                partly += share * ((current.runs | union).count - union.count)
            if current.time >= end:
                self._now = end
                return union.count + partly
            self._began = current.time
            self._current = next(self._epochs, None)
