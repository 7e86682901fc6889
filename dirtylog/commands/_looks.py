"""What ``dirtylog top`` sees: look by look at some processes, with as much of the past as the longest window needs."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from dirtylog.commands._terminal import printable
from dirtylog.errors import DirtyLogError

if TYPE_CHECKING:
    from dirtylog import DirtyPages, Process
    from dirtylog.sources.process import Region
    from dirtylog.sources.process.naming import Names

__all__ = ["ASCII_BARS", "BARS", "WINDOWS", "Detail", "Look", "Row", "Watcher", "drawn"]

WINDOWS = (1.0, 10.0, 60.0)
# From nothing written to every page written.
BARS = "·▁▂▃▄▅▆▇█"
ASCII_BARS = ".:-=+*#%@"
STRIP = 24


@dataclass(frozen=True, slots=True)
class Row:
    """One region at one look: where it is, and what of it was written in the last interval."""

    name: str
    start: int
    nbytes: int
    bytes_per_second: float
    working_set_bytes: int
    strip: str
    pid: int = 0


@dataclass(frozen=True, slots=True)
class Detail:
    """One region at one look, from near.

    Attributes
    ----------
    row : Row
        The region.
    cell_bytes : int
        What one character of the map stands for, at most.
    lines : tuple of (int, str, str)
        The map: the address at which a line begins, what was written in the last interval,
        and what was in the longest window.
    working_sets : dict of str to int
        Bytes of it that were written in each window.
    rates : tuple of float
        Bytes of it per second at each of the last looks, oldest first.
    """

    row: Row
    cell_bytes: int
    lines: tuple[tuple[int, str, str], ...]
    working_sets: dict[str, int]
    rates: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class _Sight:
    """What one look saw of one process: from when to when, the pages written, and where its regions were."""

    number: int
    begin: float
    end: float
    pages: DirtyPages
    regions: tuple[Region, ...]
    used: int

    @property
    def seconds(self) -> float:
        return self.end - self.begin


@dataclass(frozen=True, slots=True)
class Look:
    """What one look saw; sizes in bytes, times in seconds; `ended` are processes that have ended since the first."""

    seconds: float
    nbytes: int
    bytes_per_second: float
    exact: bool
    working_sets: dict[str, int]
    rows: tuple[Row, ...]
    ended: tuple[int, ...] = ()
    # Of each process, what was seen of it in the longest window; the last of it is this look.
    _past: tuple[tuple[_Sight, ...], ...] = ()
    _bars: str = BARS

    def as_dict(self) -> dict[str, Any]:
        """Return what there is to say of it, for JSON."""
        return {
            "seconds": self.seconds,
            "nbytes": self.nbytes,
            "bytes_per_second": self.bytes_per_second,
            "exact": self.exact,
            "working_sets": self.working_sets,
            "ended": list(self.ended),
            "rows": [asdict(row) for row in self.rows],
        }

    def detail(self, row: Row, lines: int, columns: int) -> Detail:
        """Look at one region from near, in so many lines of so many characters."""
        past, region = next(
            (past, region)
            for past in self._past
            for region in past[-1].regions
            if (region.pid, region.start) == (row.pid, row.start)
        )
        page_size = past[-1].pages.page_size
        now = past[-1].end
        inside = {window: _inside(_written_since(past, now - window), region) for window in WINDOWS}
        shares = [
            _bars_of(pages, self._bars, lines * columns)
            for pages in (_inside(past[-1].pages, region), inside[max(WINDOWS)])
        ]
        cells = len(shares[0])
        return Detail(
            row,
            -(-region.npages // max(cells, 1)) * page_size,
            tuple(
                (
                    region.start + at * region.npages // cells * page_size,
                    shares[0][at : at + columns],
                    shares[1][at : at + columns],
                )
                for at in range(0, cells, columns)
            ),
            {f"{window:g}": pages.nbytes for window, pages in inside.items()},
            tuple(_rate(_inside(sight.pages, region).nbytes, sight.seconds) for sight in past[-columns:]),
        )

    def epochs(self) -> Iterator[tuple[float, DirtyPages]]:
        """Give what was seen as epochs of a trace, one for each look: seconds since the first began, and the pages.

        The page spaces of several processes follow one another.
        """
        import numpy as np

        from dirtylog import DirtyPages

        begin = min(past[0].begin for past in self._past)
        shifts = self._shifts()
        size, npages = self._past[0][-1].pages.page_size, shifts[-1] + self._past[-1][-1].used
        found: dict[int, list[tuple[int, _Sight]]] = {}
        for shift, past in zip(shifts, self._past, strict=True):
            for sight in past:
                found.setdefault(sight.number, []).append((shift, sight))
        for number in sorted(found):
            runs = [np.add(sight.pages.runs(), (shift, 0)) for shift, sight in found[number]]
            exact = all(sight.pages.exact for _, sight in found[number])
            end = max(sight.end for _, sight in found[number])
            yield end - begin, DirtyPages.from_runs(np.concatenate(runs), npages, size, exact=exact)

    def places(self) -> list[tuple[str, int, int, int]]:
        """Return name, address, first page and count of the regions of the trace that `epochs` gives, newest first."""
        found = []
        for shift, past in zip(self._shifts(), self._past, strict=True):
            for regions in dict.fromkeys(sight.regions for sight in reversed(past)):
                for region in regions:
                    name = region.name or region.kind
                    called = f"{region.pid}: {name}" if len(self._past) > 1 else name
                    found.append((called, region.start, shift + region.first_page, region.npages))
        return found

    def _shifts(self) -> list[int]:
        shifts = [0]
        for past in self._past[:-1]:
            shifts.append(shifts[-1] + past[-1].used)
        return shifts


def _rate(nbytes: int, seconds: float) -> float:
    return nbytes / seconds if seconds > 0 else 0.0


def _written_since(past: Sequence[_Sight], moment: float) -> DirtyPages:
    """What was written since a moment; the last look always counts."""
    pages = past[-1].pages
    for sight in past:
        if sight.end > moment:
            pages |= sight.pages
    return pages


def _inside(pages: DirtyPages, region: Region) -> DirtyPages:
    """The pages of one region, numbered from its start."""
    from dirtylog import DirtyPages

    own = pages & DirtyPages.from_runs([[region.first_page, region.npages]], pages.npages, pages.page_size)
    return DirtyPages.from_runs(own.runs() - [region.first_page, 0], region.npages, pages.page_size)


def drawn(shares: Iterable[float], bars: str) -> str:
    """Draw shares of 1; the least of them shows: a page that was written is to be seen in however many."""
    return "".join(bars[-int(-share * (len(bars) - 1) // 1)] for share in shares)


def _bars_of(pages: DirtyPages, bars: str, cells: int) -> str:
    """Draw how dense pages are."""
    from dirtylog._bits.strip import density

    return drawn(density(pages, cells), bars)


class _Watched:
    """One process, and what was seen of it."""

    def __init__(self, process: Process, names: Names, now: float) -> None:
        self.process = process
        self._names = names
        self._last = now
        self.past: deque[_Sight] = deque()

    def look(self, number: int, clock: Callable[[], float]) -> None:
        pages = self.process.harvest()
        now = clock()
        regions = tuple(self._names(self.process.regions))
        if self.past and self.past[-1].regions == regions:
            regions = self.past[-1].regions  # one for all looks that saw the same
        self.past.append(_Sight(number, self._last, now, pages, regions, self.process.used_pages))
        self._last = now
        while self.past[0].end < now - max(WINDOWS):
            self.past.popleft()


class Watcher:
    """Harvests processes, and remembers as much as the longest window needs.

    Parameters
    ----------
    processes : sequence of (Process, Names)
        What to look at, and what names its regions.
    bars : str
        What strips are drawn with, from nothing to everything.
    clock : callable, optional
        Seconds, never going back.
    """

    def __init__(
        self, processes: Sequence[tuple[Process, Names]], bars: str = BARS, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._bars = bars
        self._clock = clock
        self._number = 0
        self._ended: list[int] = []
        self._several = len(processes) > 1
        for process, _ in processes:
            process.harvest()
        self._watched = [_Watched(process, names, clock()) for process, names in processes]

    def look(self) -> Look:
        """Harvest, and say what it means.

        Raises
        ------
        DirtyLogError
            The last of the processes has ended, or one could not be harvested.
        """
        self._number += 1
        for each in list(self._watched):
            try:
                each.look(self._number, self._clock)
            except DirtyLogError:
                if each.process.alive or len(self._watched) == 1:
                    raise
                self._watched.remove(each)
                self._ended.append(each.process.pid)
        latest = [each.past[-1] for each in self._watched]
        sets = [
            {window: _written_since(each.past, each.past[-1].end - window) for window in WINDOWS}
            for each in self._watched
        ]
        return Look(
            max(sight.seconds for sight in latest),
            sum(sight.pages.nbytes for sight in latest),
            sum(_rate(sight.pages.nbytes, sight.seconds) for sight in latest),
            all(sight.pages.exact for sight in latest),
            {f"{window:g}": sum(own[window].nbytes for own in sets) for window in WINDOWS},
            tuple(
                self._row(each, region, sight, own[max(WINDOWS)])
                for each, sight, own in zip(self._watched, latest, sets, strict=True)
                for region in sight.regions
            ),
            tuple(self._ended),
            tuple(tuple(each.past) for each in self._watched),
            self._bars,
        )

    def _row(self, watched: _Watched, region: Region, sight: _Sight, recent: DirtyPages) -> Row:
        own, lately = _inside(sight.pages, region), _inside(recent, region)
        name = printable(region.name or region.kind)
        alone = not self._several and region.pid in (0, watched.process.pid)
        return Row(
            name if alone else f"{region.pid}: {name}",
            region.start,
            region.npages * sight.pages.page_size,
            _rate(own.nbytes, sight.seconds),
            lately.nbytes,
            _bars_of(own, self._bars, STRIP),
            region.pid,
        )
