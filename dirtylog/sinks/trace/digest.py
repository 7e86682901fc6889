"""Reads a trace once, in bounded memory, and keeps what there is to say about it; the report is drawn from that."""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from dirtylog._bits.ranges import pages_before
from dirtylog.sinks.rate import Peak
from dirtylog.sinks.trace.facts import MAX_COLUMNS, Column, Digest, Integers, Level, Stretch, add_up
from dirtylog.sinks.trace.names import without_address
from dirtylog.sinks.trace.reader import Trace, TraceEpoch
from dirtylog.sinks.trace.runs import Runs

__all__ = ["Digest", "digest"]

# Parts of the page space are joined two by two when so many were written.
MAX_BUCKETS = 4096
# More neighbouring regions than this share one name.
MAX_STRETCHES = 2048
# Pages whose last write is known one by one; of a larger page space, one page in two (four, eight) stands for others.
MAX_UNITS = 1 << 22
# So many page writes are followed one by one before half as many pages have to do.
MAX_WORK = 1 << 25
# So many of them are looked at at once.
AT_ONCE = 1 << 18
# Writes by how many epochs ago the page was written before: never, 1, 2 to 3, 4 to 7, ...
GAPS = 34


def _count_values(values: npt.NDArray[np.uint32], below: int) -> tuple[Integers, Integers]:
    """Return which values there are, all less than `below`, and how often each."""
    if below > len(values):
        some, how_many = np.unique(values, return_counts=True)
        return some.astype(np.int64), how_many.astype(np.int64)
    counts = np.bincount(values).astype(np.int64)
    found = np.flatnonzero(counts).astype(np.int64)
    return found, counts[found]


def _expand(first: Integers, count: Integers) -> Integers:
    """Number what ranges hold, one after the other."""
    total = np.cumsum(count)
    return np.arange(total[-1] if len(total) else 0) + np.repeat(first - total + count, count)


def digest(trace: Trace) -> Digest:
    """Read a trace from its beginning to its end, once.

    Parameters
    ----------
    trace : Trace
        Its harvests are not disturbed.

    Returns
    -------
    Digest
        Its size has a bound, whatever the trace's length and page space.

    Raises
    ------
    TraceError
        The trace is damaged.

    Notes
    -----
    Epochs of one moment count as one. Up to 2**22 pages each page's last write is
    followed; of more, or after very many writes, that of one page in two, four or
    more, which stand for their neighbours. That makes `gaps`, `often` and
    `distinct` estimates; all else is exact.
    """
    reading = _Reading(trace)
    before: TraceEpoch | None = None
    for epoch in trace.epochs():
        if before is not None:
            # Nothing can be said about a stretch of no time: it belongs to its neighbour.
            if epoch.time in (before.time, 0.0) or not before.time:
                epoch = TraceEpoch(
                    epoch.number,
                    epoch.time,
                    before.runs | epoch.runs,
                    epoch.page_size,
                    before.exact and epoch.exact,
                )
            else:
                reading.add(before)
        before = epoch
    if before is not None:
        reading.add(before)
    return reading.result(trace.length)


class _Reading:
    """Takes epochs in."""

    def __init__(self, trace: Trace) -> None:
        self.npages, self.page_size = trace.npages, trace.page_size
        self.stretches = stretches(trace.regions, trace.npages)
        named = [stretch.npages for stretch in self.stretches if stretch.name]
        self.memory = sum(named) if named else self.npages
        self.edges = np.array([stretch.first for stretch in self.stretches] + [self.npages])
        self.shift = 0
        self.bases = self._bases()
        self.touched = np.zeros(0, np.int64)
        self.columns: list[Column] = []
        self.together = 1  # epochs per column
        self.open: Column | None = None
        self.epochs = 0
        # Unions of 2**j epochs that wait for their other half, and the sizes of those that are complete.
        self.halves: list[Runs | None] = []
        self.sums: list[list[int]] = []
        self.stride = 1
        while self.npages // self.stride > MAX_UNITS:
            self.stride *= 2
        units = -(-self.npages // self.stride)
        # Page writes by the column of the write before (row 0: never), and by their own.
        self.before = np.zeros((MAX_COLUMNS + 1, MAX_COLUMNS), np.int64)
        self.peak = Peak(0.0)
        self.last = np.zeros(units, np.uint32)
        self.often = np.zeros(units, np.uint32)
        self.work = 0

    def _bases(self) -> Integers:
        sizes = [-(-stretch.npages >> self.shift) for stretch in self.stretches]
        return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)[: len(sizes)]

    # ---- where ----

    def _coarser(self) -> None:
        """Join parts of the page space two by two."""
        old = self.bases
        self.shift += 1
        self.bases = self._bases()

        def moved(ids: Integers) -> Integers:
            owners = np.searchsorted(old, ids, side="right") - 1
            result: Integers = self.bases[owners] + ((ids - old[owners]) >> 1)
            return result

        self.touched = np.unique(moved(self.touched))
        for column in [*self.columns, *([self.open] if self.open else [])]:
            column.ids, column.counts = add_up(moved(column.ids), column.counts)

    def _buckets(self, runs: Integers) -> tuple[Integers, Integers]:
        """Count the pages of runs in the parts of the page space that they touch."""
        first, end = runs[:, 0], runs[:, 0] + runs[:, 1]
        # Cut where stretches meet.
        low = np.searchsorted(self.edges, first, side="right") - 1
        high = np.searchsorted(self.edges, end, side="left") - 1
        owner = _expand(low, high - low + 1)
        pieces = np.repeat(np.arange(len(runs)), high - low + 1)
        first = np.maximum(first[pieces], self.edges[owner])
        end = np.minimum(end[pieces], self.edges[owner + 1])
        while True:
            begins = self.bases[owner] + ((first - self.edges[owner]) >> self.shift)
            ends = self.bases[owner] + ((end - 1 - self.edges[owner]) >> self.shift)
            if int((ends - begins).sum()) <= 4 * MAX_BUCKETS:
                # Runs ascend, and so do these: equal ones are neighbours.
                ids = _expand(begins, ends - begins + 1)
                ids = ids[np.diff(ids, prepend=-1) > 0]
                place = np.searchsorted(self.touched, ids)
                known = np.zeros(len(ids), bool)
                inside = place < len(self.touched)
                known[inside] = self.touched[place[inside]] == ids[inside]
                if len(self.touched) + int((~known).sum()) <= MAX_BUCKETS or self.shift >= 62:
                    self.touched = np.sort(np.concatenate([self.touched, ids[~known]]))
                    break
            self._coarser()
        of = np.searchsorted(self.bases, ids, side="right") - 1
        start = self.edges[of] + ((ids - self.bases[of]) << self.shift)
        stop = np.minimum(start + (1 << self.shift), self.edges[of + 1])
        before = pages_before(runs, np.concatenate([start, stop]))
        return ids, before[len(ids) :] - before[: len(ids)]

    # ---- how often ----

    def _follow(self, runs: Integers) -> Integers:
        """Note the epoch of each page; return the writes by how long ago the one before was."""
        gaps, stride = np.zeros(GAPS, np.int64), self.stride
        before = np.zeros(MAX_COLUMNS + 1, np.int64)
        first = -(-runs[:, 0] // self.stride)
        count = np.maximum(-(-(runs[:, 0] + runs[:, 1]) // self.stride) - first, 0)
        ends = np.cumsum(count)
        starts, total = ends - count, int(ends[-1]) if len(ends) else 0
        for low in range(0, total, AT_ONCE):
            high = min(low + AT_ONCE, total)
            some = slice(int(np.searchsorted(ends, low, side="right")), int(np.searchsorted(ends, high)) + 1)
            begins, stops = np.maximum(starts[some], low), np.minimum(ends[some], high)
            first_units = first[some] + begins - starts[some]
            units = (
                _expand(first_units, stops - begins)
                if len(first_units) > 1
                else slice(int(first_units[0]), int(first_units[0]) + high - low)
            )
            when, how_many = _count_values(self.last[units], self.epochs)
            before += np.bincount((when + (self.together - 1)) // self.together, how_many, MAX_COLUMNS + 1).astype(int)
            known = when > 0
            # The logarithm of a power of two is exact.
            binned = np.where(known, np.log2(np.where(known, self.epochs - when, 1)).astype(np.int64) + 1, 0)
            gaps += np.bincount(binned, how_many, GAPS).astype(int)
            self.last[units] = self.epochs
            self.often[units] += 1
        self.before[:, len(self.columns)] += before * self.stride
        self.work += total
        if self.work > MAX_WORK and self.stride < self.npages:
            self.stride *= 2
            self.last, self.often = self.last[::2].copy(), self.often[::2].copy()
            self.work = 0
        return gaps * stride

    def _unite(self, runs: Runs) -> None:
        """Add an epoch to the unions of 2, 4, 8, ... epochs, as a counter in binary adds one."""
        level = 0
        while True:
            if level == len(self.sums):
                self.sums.append([])
                self.halves.append(None)
            self._count(level, runs.count)
            half = self.halves[level]
            if half is None:
                self.halves[level] = runs
                return
            self.halves[level] = None
            runs = half | runs
            level += 1

    def _count(self, level: int, pages: int) -> None:
        """Add a union to its cell: of one column, or of several if it is longer than a column."""
        groups = max(1, self.together >> level)
        cell = ((self.epochs >> level) - 1) // groups
        sums = self.sums[level]
        if cell == len(sums):
            sums.append(0)
        sums[cell] += pages

    # ---- when ----

    def add(self, epoch: TraceEpoch) -> None:
        """Take one epoch in."""
        self.epochs += 1
        runs = epoch.runs.runs()
        runs = runs[runs[:, 1] > 0]
        ids, counts = self._buckets(runs)
        pages = int(runs[:, 1].sum())
        peak = self.peak.add(epoch.time, pages)
        column = Column(
            epoch.time,
            1,
            int(not epoch.exact),
            pages,
            np.nan if peak is None else peak,
            ids,
            counts,
            self._follow(runs),
        )
        self._unite(epoch.runs)
        self.open = column if self.open is None else self.open.join(column)
        if self.open.epochs < self.together:
            return
        self.columns.append(self.open)
        self.open = None
        if len(self.columns) == MAX_COLUMNS:
            self.columns = [a.join(b) for a, b in zip(self.columns[::2], self.columns[1::2], strict=True)]
            half = MAX_COLUMNS // 2
            joined = self.before[:, ::2] + self.before[:, 1::2]
            self.before = np.zeros_like(self.before)
            self.before[0, :half] = joined[0]
            self.before[1 : half + 1, :half] = joined[1::2] + joined[2::2]
            for level, sums in enumerate(self.sums):
                if self.together >> level:
                    self.sums[level] = [sum(sums[i : i + 2]) for i in range(0, len(sums), 2)]
            self.together *= 2

    def result(self, epochs: int) -> Digest:
        """Return what is known at the end."""
        columns = [*self.columns, *([self.open] if self.open else [])]
        levels = []
        for level, sums in enumerate(self.sums):
            span, groups = max(1, (1 << level) // self.together), max(1, self.together >> level)
            # What is not complete is left out.
            levels.append(Level(span, groups, np.array(sums[: len(self.columns) // span], np.int64)))
        written = self.often[self.often > 0]
        n = len(columns)
        names = [without_address(stretch.name) for stretch in self.stretches]
        regions = list(dict.fromkeys(names))
        places = {name: i for i, name in enumerate(regions)}
        return Digest(
            npages=self.npages,
            page_size=self.page_size,
            epochs=epochs,
            seconds=columns[-1].end if columns else 0.0,
            inexact=sum(column.inexact for column in columns),
            memory=self.memory,
            distinct=min(len(written) * self.stride, self.npages),
            stretches=self.stretches,
            regions=regions,
            region_of=np.array([places[name] for name in names], np.int64),
            edges=np.array([0.0, *(column.end for column in columns)]),
            column_epochs=np.array([column.epochs for column in columns], np.int64),
            column_inexact=np.array([column.inexact for column in columns], np.int64),
            column_pages=np.array([column.pages for column in columns], np.int64),
            column_peaks=np.array([column.peak for column in columns], np.float64),
            peak=self.peak.bytes_per_second,
            before=self.before[: n + 1, :n].copy(),
            gaps=np.array([column.gaps for column in columns], np.int64).reshape(-1, GAPS),
            often=np.bincount(np.log2(written).astype(np.int64), minlength=1) * self.stride,
            levels=[level for level in levels if len(level.pages)],
            sampled=self.stride > 1,
            _columns=columns,
            _bases=self.bases,
            _shift=self.shift,
        )


def stretches(regions: Mapping[str, tuple[int, int]], npages: int) -> list[Stretch]:
    """Divide the page space by region: where regions lie in each other, a page belongs to the smallest."""
    places = sorted((first, first + count, name) for name, (first, count) in regions.items() if count)
    cuts = sorted({0, npages, *(place[0] for place in places), *(place[1] for place in places)})
    found: list[Stretch] = []
    waiting: list[tuple[int, int, str]] = []
    nearest = 0
    for low, high in pairwise(cuts):
        while nearest < len(places) and places[nearest][0] == low:
            first, end, name = places[nearest]
            heapq.heappush(waiting, (end - first, end, name))
            nearest += 1
        while waiting and waiting[0][1] <= low:
            heapq.heappop(waiting)
        name = waiting[0][2] if waiting else ""
        if found and found[-1].name == name:
            found[-1] = Stretch(name, found[-1].first, high - found[-1].first)
        else:
            found.append(Stretch(name, low, high - low))
    if len(found) > MAX_STRETCHES:
        n = -(-len(found) // MAX_STRETCHES)
        groups = [found[i : i + n] for i in range(0, len(found), n)]
        found = [
            Stretch(
                f"{group[0].name or 'no name'} to {group[-1].name or 'no name'}",
                group[0].first,
                sum(stretch.npages for stretch in group),
            )
            for group in groups
        ]
    return found
