"""The profiler: tracks a process's own large mappings as they come and go, and says how fast they get dirty."""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Protocol

from dirtylog._bits.pages import DirtyPages
from dirtylog.errors import DirtyLogError, IncompleteLogWarning
from dirtylog.log import DirtyLog, Source
from dirtylog.sinks.profile import own_memory
from dirtylog.sinks.profile.account import Account, Profile

__all__ = ["Profiler"]


class Tracking(Source, Protocol):
    """A source that holds something until it is closed: a `dirtylog.Tracker`."""

    def close(self) -> None:
        """Stop tracking."""


class _Tracked:
    """A mapping as a source: what its tracker reported last waits here for the log.

    The tracker is asked before the mappings are compared with those of last
    time, so that memory which was replaced is noticed and its successor counted
    in the same sample.
    """

    def __init__(self, area: own_memory.Area, tracker: Tracking) -> None:
        self.area, self.tracker = area, tracker
        self.npages, self.page_size = tracker.npages, tracker.page_size
        self.gone = False
        self._waiting = DirtyPages._empty(self.npages, self.page_size)

    def fetch(self) -> None:
        try:
            pages = self.tracker.harvest()
        except (DirtyLogError, OSError, ValueError, Warning):
            self.gone = True
            return
        # All pages, inexactly: other memory lies at this address now. What was here is
        # freed and in no snapshot; what is here counts as new memory does.
        self.gone = not pages.exact
        if pages.exact:
            self._waiting |= pages

    def add(self, pages: DirtyPages) -> None:
        self._waiting |= pages

    def harvest(self) -> DirtyPages:
        pages, self._waiting = self._waiting, DirtyPages._empty(self.npages, self.page_size)
        return pages

    def close(self) -> None:
        # Its memory may be gone: then there is nothing to undo.
        with suppress(DirtyLogError, OSError):
            self.tracker.close()


class Profiler:
    """Sample the large writable private mappings of this process, from a thread of its own.

    Parameters
    ----------
    interval : float, default 1.0
        Seconds from one sample to the next.
    every : sequence of float, default (1, 10, 60)
        Rhythms, in seconds, of the snapshots to size.
    find : callable, optional
        Lists the areas there are; :func:`own_memory.large_areas` by default.
    track : callable, optional
        Starts to track an area; by default with userfaultfd.
    populated : callable, optional
        Says which pages of a new area hold something already.
    label : callable, optional
        Gives an area a name.
    clock : callable, optional
        Seconds, never going back.
    on_sample : callable, optional
        Called with the seconds since the start and the pages of each sample.

    Raises
    ------
    ValueError
        `interval` or a rhythm is not positive.

    Notes
    -----
    An area that appears counts with all pages that hold something by then: they
    were written since the last sample. Memory that comes and goes between two
    samples is not seen, nor what was written in the last interval of an area
    that is gone: take shorter intervals for programs that allocate at a high
    rate. Start and stop from one thread.
    """

    def __init__(
        self,
        *,
        interval: float = 1.0,
        every: Sequence[float] = (1.0, 10.0, 60.0),
        find: Callable[[], list[own_memory.Area]] = own_memory.large_areas,
        track: Callable[[own_memory.Area], Tracking] = own_memory.track_area,
        populated: Callable[[own_memory.Area, int], DirtyPages] = own_memory.populated,
        label: Callable[[own_memory.Area], str] = own_memory.label,
        clock: Callable[[], float] = time.monotonic,
        on_sample: Callable[[float, DirtyPages], object] | None = None,
    ) -> None:
        self._account = Account(interval, every)
        self._interval = interval
        self._find, self._track, self._populated, self._label = find, track, populated, label
        self._clock = clock
        self._on_sample = on_sample
        self.log: DirtyLog = DirtyLog()
        self._main = self.log.observer("profile")
        self._tracked: dict[tuple[int, int], _Tracked] = {}
        # Where each range of addresses lies in the page space, also after it is gone: one that comes back
        # takes its old place, so that the page space does not grow with every allocation.
        self._places: dict[tuple[int, int], int] = {}
        self._names: dict[tuple[int, int], str] = {}
        self._page_size = 0
        self._thread: threading.Thread | None = None
        self._stopping = threading.Event()

    @property
    def regions(self) -> dict[str, tuple[int, int]]:
        """The named ranges of the page space: (first, count), in pages."""
        size = self._page_size or 1
        return {
            f"{self._names[key]} at {key[0]:#x}": (first, (key[1] - key[0]) // size)
            for key, first in self._places.items()
        }

    def start(self, *, thread: bool = True) -> None:
        """Track what there is, and begin.

        Parameters
        ----------
        thread : bool, default True
            Sample from a thread; otherwise the caller calls :meth:`sample`.

        Raises
        ------
        BackendUnavailable
            Tracking does not work here: with what was probed.
        """
        # Names the reason while nothing has begun yet.
        self._account.price = own_memory.price_of_a_first_write(self._track)
        self._follow(new_is_dirty=False)
        self._account.begin(self._clock())
        if thread:
            self._thread = threading.Thread(target=self._run, name="dirtylog profile", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        # A warning of a tracker is an answer here, and the program's stderr is its own.
        warnings.filterwarnings("ignore", category=IncompleteLogWarning, module=r"dirtylog\.sinks\.profile")
        ticks = 0
        while True:
            ticks += 1
            if self._stopping.wait(max(0.0, self._account.start + ticks * self._interval - self._clock())):
                return
            self.sample()

    def stop(self) -> Profile:
        """Take a last sample, close all trackers, and sum up.

        Returns
        -------
        Profile
            What was seen.
        """
        self._stopping.set()
        if self._thread is not None:
            self._thread.join()
        self.sample()
        for tracked in self._tracked.values():
            tracked.close()
        return self._sum_up()

    def sample(self) -> None:
        """Ask every tracker, follow the mappings, and hand the pages to each rhythm."""
        began = time.thread_time()
        for tracked in self._tracked.values():
            tracked.fetch()
        self._follow(new_is_dirty=True)
        with self._main.collect() as epoch:
            pages = epoch.pages
        now = self._clock()
        size = self._page_size or 1
        places = {key: (first, (key[1] - key[0]) // size) for key, first in self._places.items()}
        self._account.add(now, pages, places)
        if self._on_sample is not None:
            self._on_sample(now - self._account.start, pages)
        self._account.busy += time.thread_time() - began

    def _follow(self, new_is_dirty: bool) -> None:
        """Let go of areas that are gone or replaced, and track those that are new."""
        areas = {(area.start, area.end): area for area in self._find()}
        for key, tracked in list(self._tracked.items()):
            if tracked.gone or key not in areas:
                self.log.detach(tracked)
                tracked.close()
                del self._tracked[key]
        for key, area in areas.items():
            if key in self._tracked:
                continue
            try:
                tracked = _Tracked(area, self._track(area))
            except (DirtyLogError, OSError, ValueError):
                # Unmapped between the list and now, or special memory that cannot be tracked.
                continue
            self._page_size = tracked.page_size
            if new_is_dirty:
                # After it is armed: what is written in between counts now, and perhaps again next time.
                tracked.add(self._populated(area, tracked.page_size))
            self._tracked[key] = tracked
            self._names[key] = self._label(area)
            self.log.attach(tracked, self._places.setdefault(key, self.log.npages))

    def _sum_up(self) -> Profile:
        for key, tracked in self._tracked.items():
            self._names[key] = self._label(tracked.area)
        return self._account.sum_up(
            self._page_size, lambda key: (self._names[key], key[0], key[1] - key[0]), inside=True
        )
