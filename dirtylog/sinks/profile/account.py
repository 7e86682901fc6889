"""What a profile says, and how it is added up sample by sample: the same from inside a program and from outside."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

from dirtylog._bits.pages import DirtyPages
from dirtylog._bits.ranges import count_ranges
from dirtylog.sinks.rate import Peak, unite

__all__ = ["Account", "Hot", "Part", "Profile", "Snapshots"]

# Of what runs: it is loaded and its interpreter set up, it runs, the interpreter takes itself down.
Part = Literal["start", "program", "end"]


@dataclass(frozen=True, slots=True)
class Snapshots:
    """What an incremental snapshot every `every` seconds would hold, in bytes; `count` of them were complete."""

    every: float
    count: int
    mean_bytes: float
    max_bytes: int


@dataclass(frozen=True, slots=True)
class Hot:
    """One mapping, by what it was last called: what was written in it, sample by sample, and its largest size."""

    name: str
    address: int
    size: int
    dirtied_bytes: int
    share: float


@dataclass(frozen=True, slots=True)
class Profile:
    """What a profiled program did to its memory.

    Attributes
    ----------
    seconds, samples, page_size : float, int, int
        How long it was watched, in how many samples, in pages of so many bytes.
    dirtied_bytes : int
        Different pages of each sample, added up: a page that is written again
        within one sample counts once, as in a snapshot.
    bytes_per_second, peak_bytes_per_second : float
        Over all the time, and in the worst second: over windows of one length,
        a second or an interval if that is longer.
    snapshots : list of Snapshots
        What each rhythm would have to store.
    mappings : list of Hot
        Hottest first.
    exact : bool
        False where a tracker lost track, which makes the figures upper bounds.
    overhead : dict of str to float
        Seconds of CPU time that sampling took; seconds that the program's first
        writes to its pages took (estimated from a measured price); the share of
        the time watched that this cost the program itself, which from outside is
        its first writes alone.
    starting, ending : dict of str to float
        `seconds` in which the program was loaded and its interpreter set up, and in which the
        interpreter took itself down, and the `dirtied_bytes` of these: an interpreter
        writes to most of what it has then. They are in `dirtied_bytes` and `seconds` above,
        and not in the mean and the peak.
    """

    seconds: float
    samples: int
    page_size: int
    dirtied_bytes: int
    bytes_per_second: float
    peak_bytes_per_second: float
    exact: bool
    snapshots: list[Snapshots] = field(default_factory=list)
    mappings: list[Hot] = field(default_factory=list)
    overhead: dict[str, float] = field(default_factory=dict)
    starting: dict[str, float] = field(default_factory=dict)
    ending: dict[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain dicts and lists, for JSON."""
        return asdict(self)


class _Rhythm:
    """Snapshots at one interval: the pages since the last, and the sizes of those that are complete."""

    def __init__(self, every: float) -> None:
        self.every = every
        self.sizes: list[int] = []
        self._pending: DirtyPages | None = None

    def add(self, pages: DirtyPages, due: bool) -> None:
        self._pending = pages if self._pending is None else unite(self._pending, pages)
        if due:
            self.sizes.append(self._pending.nbytes)
            self._pending = None

    def summary(self) -> Snapshots:
        mean = float(np.mean(self.sizes)) if self.sizes else 0.0
        return Snapshots(self.every, len(self.sizes), mean, max(self.sizes, default=0))


class Account:
    """Adds samples up to a `Profile`.

    Parameters
    ----------
    interval : float
        Seconds from one sample to the next.
    every : sequence of float
        Rhythms of the snapshots to size, in seconds.

    Raises
    ------
    ValueError
        `interval` or a rhythm is not positive.
    """

    def __init__(self, interval: float, every: Sequence[float]) -> None:
        if not interval > 0 or not all(seconds > 0 for seconds in every):
            raise ValueError(f"interval is {interval} and every {list(every)}; they are positive numbers of seconds")
        self.interval: float = interval
        self._rhythms = [_Rhythm(seconds) for seconds in every if seconds >= interval]
        self._dirtied: dict[Hashable, int] = defaultdict(int)
        self._seen = self._samples = 0
        self._exact = True
        self.busy: float = 0.0
        self.price: float = 0.0
        self.start: float = 0.0
        self.last: float = 0.0
        self.begin(0.0)

    def begin(self, now: float) -> None:
        """Count from this moment on."""
        self.start = self.last = now
        self._peak = Peak(now, max(1.0, self.interval))
        self._started, self._started_bytes = now, 0
        # Samples of the end: start, end and bytes.
        self._ending: list[tuple[float, float, int]] = []

    def add(self, now: float, pages: DirtyPages, places: Mapping[Any, tuple[int, int]], part: Part = "program") -> None:
        """Count one sample: its pages, and where things lie, each by a key of its own as (first, count) of pages."""
        self._samples += 1
        self._seen += pages.nbytes
        self._exact = self._exact and pages.exact
        if part == "start":
            self._peak = Peak(now, max(1.0, self.interval))
            self._started, self._started_bytes = now, self._started_bytes + pages.nbytes
        elif part == "end":
            self._ending.append((self.last, now, pages.nbytes))
        else:
            self._peak.add(now, pages.nbytes)
        for key, count in count_ranges(pages.runs(), places).items():
            if count:
                self._dirtied[key] += count * pages.page_size
        for rhythm in self._rhythms if part != "start" else ():
            # Half an interval of grace: a sample that comes a little early belongs to its rhythm.
            rhythm.add(pages, now - self.start + self.interval / 2 >= rhythm.every * (len(rhythm.sizes) + 1))
        self.last = now

    @property
    def program(self) -> tuple[float, float]:
        """From when to when the program's own code ran, in seconds since the beginning."""
        return self._started - self.start, self.last - self.start - self._split_off_the_end()[0]

    def _split_off_the_end(self) -> tuple[float, int]:
        """Tell the end of a program, which is no part of how it was while it ran: seconds and bytes."""
        seconds = sum(end - start for start, end, _ in self._ending)
        # It begins at the last look before it, which was some time before: of a program that ran no longer than that,
        # nobody knows what was the end.
        if seconds > (self.last - self.start) / 3:
            for _, end, nbytes in self._ending:
                self._peak.add(end, nbytes)
            self._ending.clear()
            return 0.0, 0
        return seconds, sum(nbytes for _, _, nbytes in self._ending)

    def sum_up(self, page_size: int, about: Callable[[Any], tuple[str, int, int]], *, inside: bool) -> Profile:
        """Return the profile; `about` gives a key's name, address and size; `inside`: sampling cost the program too."""
        seconds = max(self.last - self.start, 1e-9)
        ending, ending_bytes = self._split_off_the_end()
        starting = self._started - self.start
        running = max(seconds - starting - ending, 1e-9)
        faults = self._seen / (page_size or 1) * self.price
        hot = sorted(self._dirtied.items(), key=lambda item: -item[1])
        return Profile(
            seconds=seconds,
            samples=self._samples,
            page_size=page_size,
            dirtied_bytes=self._seen,
            bytes_per_second=(self._seen - self._started_bytes - ending_bytes) / running,
            peak_bytes_per_second=self._peak.bytes_per_second,
            exact=self._exact,
            snapshots=[rhythm.summary() for rhythm in self._rhythms],
            starting={"seconds": starting, "dirtied_bytes": self._started_bytes},
            ending={"seconds": ending, "dirtied_bytes": ending_bytes},
            mappings=[Hot(*about(key), dirtied, dirtied / (self._seen or 1)) for key, dirtied in hot],
            overhead={
                "sampling_seconds": self.busy,
                "first_writes_seconds": faults,
                "share": ((self.busy if inside else 0.0) + faults) / seconds,
            },
        )
