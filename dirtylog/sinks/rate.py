"""How fast memory gets dirty: a meter that observes a log and takes no bits from anybody."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from operator import index
from types import MappingProxyType
from typing import Self

from dirtylog._bits.pages import DirtyPages
from dirtylog._bits.ranges import count_ranges
from dirtylog.log import DirtyLog
from dirtylog.sinks.forecast import Forecast, forecast

__all__ = ["Peak", "Rate", "RateMeter", "unite"]


@dataclass(frozen=True, slots=True)
class Rate:
    """What got dirty between two samples.

    Attributes
    ----------
    seconds : float
        From the sample before to this one.
    pages, nbytes : int
        Different pages that were written, and their size.
    pages_per_second, bytes_per_second : float
        A page that is written twice between two samples counts once: with
        longer intervals the figure gets smaller, as a snapshot does.
    by_source, by_region : mapping of str to int
        Pages in the range of each attached source, and of each region asked for.
        Where ranges overlap, a page counts for each of them.
    exact : bool
        False where a source lost track: the figures are then upper bounds.
    """

    seconds: float
    pages: int
    nbytes: int
    pages_per_second: float
    bytes_per_second: float
    by_source: Mapping[str, int]
    by_region: Mapping[str, int]
    exact: bool


class Peak:
    """The highest rate over windows of one length, out of samples of any length.

    A sample of a few milliseconds says nothing about a second: each window is as
    long as samples that reach `window` together, or, as long as no
    samples do, all there were.

    Parameters
    ----------
    start : float
        When the first sample began, in seconds.
    window : float, default 1.0
        In seconds.
    """

    def __init__(self, start: float, window: float = 1.0) -> None:
        self._window = window
        self._ends: deque[float] = deque([start])
        self._sizes: deque[int] = deque()
        self._highest: float | None = None
        self._first = start
        self._total = 0

    def add(self, end: float, nbytes: int) -> float | None:
        """Count a sample: when it ended, and how much was written in it.

        Returns
        -------
        float or None
            The highest rate of the windows that end with this sample, if there was time enough for one.
        """
        self._total += nbytes
        self._ends.append(end)
        self._sizes.append(nbytes)
        # A timer that comes a little early makes no window twice as long.
        least = 0.9 * self._window
        if end - self._ends[0] < least:
            return None
        inside = sum(self._sizes)
        rate = inside / (end - self._ends[0])
        # Every window that is long enough: the next sample may make one too long, and what it begins with be most.
        while len(self._sizes) > 1 and end - self._ends[1] >= least:
            self._ends.popleft()
            inside -= self._sizes.popleft()
            rate = max(rate, inside / (end - self._ends[0]))
        self._highest = max(self._highest or 0.0, rate)
        return rate

    @property
    def bytes_per_second(self) -> float:
        """The highest rate of a window; over all the time there was, where that is shorter than a window."""
        if self._highest is not None:
            return self._highest
        seconds = self._ends[-1] - self._first
        return self._total / seconds if seconds > 0 else 0.0


class RateMeter:
    """Measure the dirty rate of a log: one more observer.

    Parameters
    ----------
    log : DirtyLog
        What to measure. Every sample harvests its sources, for all observers.
    name : str, default "rate"
        The observer's name.
    window : float, default 60.0
        How far back, in seconds, the working set can be asked for.
    regions : mapping of str to (first, count), optional
        Ranges of the page space, in pages, to count apart.
    clock : callable, optional
        Seconds, never going back; `time.monotonic` by default.

    Raises
    ------
    IndexError
        A region is not within the pages that there can be.
    ValueError
        `window` is not positive, or the log has an observer of that name.

    Notes
    -----
    Measures from its construction on. Keeps the dirty pages of the last `window`
    seconds, one `DirtyPages` a sample. One thread samples; a context manager
    that closes its observer.

    Examples
    --------
    >>> import dirtylog as dl
    >>> guest, log, now = dl.DirtyBitmap(1000), dl.DirtyLog(), iter([0.0, 0.5])
    >>> _ = log.attach(guest, name="guest")
    >>> meter = RateMeter(log, clock=lambda: next(now))
    >>> guest.mark_range(0, 100)
    >>> rate = meter.sample()
    >>> rate.pages_per_second, rate.bytes_per_second, rate.by_source["guest"]
    (200.0, 819200.0, 100)
    >>> meter.forecast(bandwidth=10e6, downtime=0.05).verdict
    'converges'
    """

    def __init__(
        self,
        log: DirtyLog,
        *,
        name: str = "rate",
        window: float = 60.0,
        regions: Mapping[str, tuple[int, int]] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if not (window > 0 and math.isfinite(window)):
            raise ValueError(f"window is {window}; it must be a positive number of seconds")
        self._regions = {name: (index(first), index(count)) for name, (first, count) in (regions or {}).items()}
        for region, (first, count) in self._regions.items():
            if first < 0 or count < 0:
                raise IndexError(f"region {region!r} is {count} pages from page {first} on; neither may be negative")
        self._log = log
        self._window = window
        self._clock = clock
        self._samples: deque[tuple[float, float, DirtyPages]] = deque()
        self._observer = log.observer(name)
        # What was dirty before is nobody's rate; the others find it in their pending all the same.
        self._collect()
        self._last = self._clock()

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()

    def close(self) -> None:
        """Close the observer; what was measured can still be asked for."""
        self._observer.close()

    def _collect(self) -> DirtyPages:
        with self._observer.collect() as epoch:
            return epoch.pages

    def sample(self) -> Rate:
        """Harvest the log, and say what got dirty since the sample before.

        Returns
        -------
        Rate
            Since the sample before, or since the meter was made.

        Raises
        ------
        ValueError
            No time has passed since the sample before.
        Exception
            What :meth:`dirtylog.epochs.Epoch.__enter__` raises.

        Notes
        -----
        O(dirty) beyond the harvests.
        """
        pages = self._collect()
        now = self._clock()
        seconds = now - self._last
        if not seconds > 0:
            self._observer.put_back(pages)
            raise ValueError(f"{seconds} s have passed since the last sample; it takes more than none for a rate")
        self._samples.append((self._last, now, pages))
        self._last = now
        while self._samples[0][1] <= now - self._window:
            self._samples.popleft()
        runs = pages.runs()
        return Rate(
            seconds=seconds,
            pages=pages.count,
            nbytes=pages.nbytes,
            pages_per_second=pages.count / seconds,
            bytes_per_second=pages.nbytes / seconds,
            by_source=MappingProxyType(
                count_ranges(runs, {s.name: (s.first_page, s.npages) for s in self._log.sources})
            ),
            by_region=MappingProxyType(count_ranges(runs, self._regions)),
            exact=pages.exact,
        )

    def curve(self) -> list[tuple[float, int]]:
        """Return how the working set grows with the time looked back.

        Returns
        -------
        list of (float, int)
            Seconds back from the last sample, and how many different pages were
            written in them: one point a sample, shortest first.
        """
        points: list[tuple[float, int]] = []
        union: DirtyPages | None = None
        for start, _, pages in reversed(self._samples):
            union = pages if union is None else unite(union, pages)
            points.append((self._last - start, union.count))
        return points

    def working_set(self, seconds: float) -> int:
        """Return how many different pages were written in the last `seconds`.

        Parameters
        ----------
        seconds : float
            At most the meter's window. A sample that reaches further back counts whole.

        Returns
        -------
        int
            In pages.

        Raises
        ------
        ValueError
            `seconds` is not positive, or more than the window.
        """
        if not 0 < seconds <= self._window:
            raise ValueError(f"seconds is {seconds}; the meter looks back up to {self._window} s")
        found = 0
        reach = 0.0
        for back, pages in self.curve():
            if reach >= seconds:
                break
            found, reach = pages, back
        return found

    def forecast(self, bandwidth: float, downtime: float, max_rounds: int = 30) -> Forecast:
        """Say whether pre-copy would converge, if the program goes on as in the last window.

        Parameters
        ----------
        bandwidth, downtime, max_rounds : float, float, int
            In bytes per second and seconds, as :func:`dirtylog.sinks.forecast.forecast` takes them.

        Returns
        -------
        Forecast
            Verdict ``"unknown"`` before the first sample.

        Notes
        -----
        Uses the measured growth of the working set: straight from nothing to the
        first sample, along the samples, and on at the slope of the last two for
        times longer than were measured, up to all pages.
        """
        curve = [(0.0, 0), *self.curve()]

        def dirtied(_: float, seconds: float) -> float | None:
            return _along(curve, seconds) if len(curve) > 1 else None

        return forecast(
            self._log.npages,
            self._log.page_size,
            dirtied,
            bandwidth=bandwidth,
            downtime=downtime,
            max_rounds=max_rounds,
        )


def unite(a: DirtyPages, b: DirtyPages) -> DirtyPages:
    """Unite pages of before and after the page space grew."""
    if a.npages < b.npages:
        a, b = b, a
    if a.npages > b.npages:
        b = DirtyPages.from_runs(b.runs(), a.npages, a.page_size, exact=b.exact)
    return a | b


def _along(curve: list[tuple[float, int]], seconds: float) -> float:
    """Read a growing curve at `seconds`, going on straight past its end."""
    for (left, low), (right, high) in pairwise(curve):
        if seconds <= right or right == curve[-1][0]:
            return low + (high - low) * (seconds - left) / (right - left)
    raise AssertionError("a curve has two points at least")
