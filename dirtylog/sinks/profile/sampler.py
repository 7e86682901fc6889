"""Samples another process's memory from outside, and says what its profile is."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

from dirtylog._bits.pages import DirtyPages
from dirtylog.errors import BackendUnavailable, IncompleteLogWarning
from dirtylog.sinks.profile import own_memory
from dirtylog.sinks.profile.account import Account, Part, Profile
from dirtylog.sinks.trace.names import placed_names

if TYPE_CHECKING:
    from dirtylog.sources.process import Process, Region

__all__ = ["Sampler"]

_Key = tuple[int, str, int, int]


class Sampler:
    """Sample a process from outside: one that was attached to, or started to be watched.

    Parameters
    ----------
    process : Process
        What to sample. Its harvests are the sampler's from here on.
    interval : float, default 1.0
        Seconds from one sample to the next, which the caller keeps.
    every : sequence of float, default (1, 10, 60)
        Rhythms, in seconds, of the snapshots to size.
    names : callable, optional
        Given regions, returns them by the names that people know them by, cut where
        one holds several things. By default a
        :class:`~dirtylog.sources.process.naming.Names` of the process. Called with each sample.
    clock : callable, optional
        Seconds, never going back.
    on_sample : callable, optional
        Called with the seconds since the start and the pages of each sample,
        whose page space ends with the pages that were ever used.

    Raises
    ------
    ValueError
        `interval` or a rhythm is not positive.

    Notes
    -----
    Nothing runs in the process itself: one that sleeps writes nothing. For one
    thread.
    """

    def __init__(
        self,
        process: Process,
        *,
        interval: float = 1.0,
        every: Sequence[float] = (1.0, 10.0, 60.0),
        names: Callable[[Sequence[Region]], Sequence[Region]] | None = None,
        clock: Callable[[], float] = time.monotonic,
        on_sample: Callable[[float, DirtyPages], object] | None = None,
    ) -> None:
        self._account = Account(interval, every)
        self._process = process
        self._clock = clock
        self._on_sample = on_sample
        if names is None:
            from dirtylog.sources.process.naming import Names

            names = Names(process.pid, memory_of=lambda: process.memory_of)
        self._names = names
        # Where each stretch was, what it was called last, and in which sample; also after it is gone.
        self._places: dict[_Key, tuple[int, int]] = {}
        self._called: dict[_Key, str] = {}
        self._seen: dict[_Key, int] = {}
        self._samples = 0
        try:
            self._account.price = own_memory.price_of_a_first_write(own_memory.track_area)
        except BackendUnavailable:
            self._account.price = 0.0  # what watches the process works, whatever a tracker here needs
        self._account.begin(clock())

    @property
    def regions(self) -> dict[str, tuple[int, int]]:
        """The named ranges of the page space: (first, count), in pages; none holds a page of another.

        Where pages had several names, as memory was named better or mapped again, the last counts.
        """
        latest = sorted(self._places, key=lambda key: -self._seen[key])
        return placed_names((self._called[key], key[2], *self._places[key]) for key in latest)

    @property
    def seconds(self) -> float:
        """Seconds from the start to the last sample."""
        return self._account.last - self._account.start

    @property
    def program(self) -> tuple[float, float]:
        """From when to when the program's own code ran, in seconds since the start."""
        return self._account.program

    def next_sample(self, after: int) -> float:
        """Return the seconds until a sample is due, `after` so many. Counted from the start: delays do not add up."""
        return max(0.0, self._account.start + (after + 1) * self._account.interval - self._clock())

    def sample(
        self,
        cut: Callable[[], tuple[float, DirtyPages | None] | None] | None = None,
        *,
        part: Literal["start", "program"] = "program",
        at_most: int | None = None,
    ) -> DirtyPages:
        """Harvest, and count what was written since the last sample.

        Parameters
        ----------
        cut : callable, optional
            Asked after the harvest whether the program's own code has ended: returns
            None, or a moment by `clock` shortly before, and what had been written by then. What came
            after is a sample of its own, the program's end: in the total, and in neither the
            mean nor the peak.
        part : {"start", "program"}
            ``"start"``: until now the program was loaded and its interpreter set up, which
            counts like the end.
        at_most : int, optional
            What a start writes, in bytes. Where more was written, the program itself has
            written it, and the sample counts as ``"program"``.

        Returns
        -------
        DirtyPages
            All that was written since the last sample.

        Raises
        ------
        DirtyLogError
            The process has ended, or executed another program.
        """
        began = time.thread_time()
        with warnings.catch_warnings():
            # That something is inexact is part of the answer here.
            warnings.simplefilter("ignore", IncompleteLogWarning)
            pages = self._process.harvest()
        # What has ended or moved since the last sample is still in this one.
        regions = self._names((*self._process.left_regions, *self._process.regions))
        used = self._process.used_pages
        pages = DirtyPages.from_runs(pages.runs(), used, pages.page_size, exact=pages.exact)
        now = self._clock()
        if at_most is not None and pages.nbytes > at_most:
            part = "program"
        parts: list[tuple[float, DirtyPages, Part]] = [(now, pages, part)]
        if cut is not None and (seen := cut()) is not None:
            parts = [(now, pages, "end")]
            if seen[1] is not None and seen[0] > self._account.last:
                before = DirtyPages.from_runs(seen[1].runs(), used, pages.page_size, exact=pages.exact) & pages
                parts = [(seen[0], before, part), (now, pages - before, "end")]
        places = {self._key(region): (region.first_page, region.npages) for region in regions}
        self._called.update((self._key(region), region.name) for region in regions)
        self._seen.update(dict.fromkeys(places, self._samples))
        self._places.update(places)
        self._samples += 1
        for moment, some, of in parts:
            self._account.add(moment, some, places, of)
            if self._on_sample is not None:
                self._on_sample(moment - self._account.start, some)
        self._account.busy += time.thread_time() - began
        return pages

    @staticmethod
    def _key(region: Region) -> _Key:
        # The same addresses may be mapped more than once, and then have pages of their own each time.
        return region.pid, region.kind, region.start, region.first_page

    def profile(self) -> Profile:
        """Sum up what was sampled."""
        size = self._process.page_size
        return self._account.sum_up(
            size, lambda key: (self._called[key], key[2], self._places[key][1] * size), inside=False
        )
