"""What there is to say about a trace that was read once: by place and time, by region, and as questions about it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from dirtylog.sinks.forecast import Forecast, forecast

__all__ = ["Block", "Column", "Digest", "Level", "Map", "Stretch", "add_up"]

Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

# Columns are joined two by two when there are this many.
MAX_COLUMNS = 384


@dataclass(frozen=True, slots=True)
class Stretch:
    """Pages that belong to one region, or to none (no name)."""

    name: str
    first: int
    npages: int


@dataclass(frozen=True, slots=True)
class Level:
    """What harvests at a longer interval would have found: `groups` unions in each cell of `span` columns, added up."""

    span: int
    groups: int
    pages: Integers


@dataclass(frozen=True, slots=True)
class Block:
    """Rows `start` to `end` of a map, which show one region, or all the small ones together."""

    name: str
    start: int
    end: int
    npages: int
    written: int


@dataclass(frozen=True)
class Map:
    """Page writes by place and time: only what was ever written has rows.

    Attributes
    ----------
    blocks : list of Block
        From the first row to the last, without gaps.
    first, last, npages : array of int64
        Of each row: its first and last page, and how many pages it stands for.
    cells : array of int64, shape (rows, columns)
        Page writes: a page counts once in each epoch that reports it.
    edges : array of float64
        Where each row is drawn, from 0 to 1: a region of few rows has room for its
        name.
    """

    blocks: list[Block]
    first: Integers
    last: Integers
    npages: Integers
    cells: Integers

    @cached_property
    def edges(self) -> Floats:
        """Where each row is drawn, from 0 to 1: a region of few rows has room for its name."""
        heights = np.zeros(len(self.first))
        for block in self.blocks:
            n = block.end - block.start
            heights[block.start : block.end] = 0.45 / len(self.blocks) / n + 0.55 / len(self.first)
        return np.concatenate([[0.0], np.cumsum(heights)])


@dataclass(slots=True)
class Column:
    """Some adjacent epochs together."""

    end: float
    epochs: int
    inexact: int
    pages: int
    peak: float
    ids: Integers
    counts: Integers
    gaps: Integers

    def join(self, other: Column) -> Column:
        """Return this column and the next one as one."""
        ids, counts = add_up(np.concatenate([self.ids, other.ids]), np.concatenate([self.counts, other.counts]))
        return Column(
            other.end,
            self.epochs + other.epochs,
            self.inexact + other.inexact,
            self.pages + other.pages,
            float(np.fmax(self.peak, other.peak)),
            ids,
            counts,
            self.gaps + other.gaps,
        )


def add_up(ids: Integers, counts: Integers) -> tuple[Integers, Integers]:
    """Add the counts of equal ids, which come out ascending."""
    unique, place = np.unique(ids, return_inverse=True)
    sums = np.zeros(len(unique), np.int64)
    np.add.at(sums, place, counts)
    return unique, sums


@dataclass(frozen=True)
class Digest:
    """A trace, read once.

    Attributes
    ----------
    npages, page_size, epochs, inexact : int
        As in the trace; `inexact` counts the epochs of sources that lost track.
    seconds : float
        Time of the last epoch.
    memory : int
        Pages that regions cover; of a trace without regions, all.
    distinct : int
        Pages that were written at all.
    stretches : list of Stretch
        The page space from its beginning to its end.
    regions : list of str
        What stretches belong to, by name: parts of one heap, or of one file, are
        one region wherever they lie.
    region_of : array of int64
        Of each stretch: the place of its region in `regions`.
    edges : array of float64
        Seconds: each column is from one to the next.
    column_epochs, column_inexact, column_pages : array of int64
        Of each column: epochs, inexact ones, and page writes.
    column_peaks : array of float64
        Of each column: the most pages per second in a window of a second (or an
        epoch, if that is longer) that ends in it; NaN where none does.
    peak : float
        The most pages per second in any of these windows; over all the time
        there was, if that is shorter than one.
    before : array of int64, shape (columns + 1, columns)
        Page writes by when the same page was written before: never (row 0), or
        in which column (rows 1 on); by when they are now, in columns.
    gaps : array of int64, shape (columns, 34)
        Page writes by how many epochs ago that page was written last: never in
        this trace, 1, 2 to 3, 4 to 7, and so on.
    often : array of int64
        Pages by the number of epochs that wrote them: 1, 2 to 3, 4 to 7, ...
    levels : list of Level
        Unions of 1, 2, 4, ... epochs.
    sampled : bool
        Whether one page stands for several in `gaps`, `often`, `before` and
        `distinct`.
    """

    npages: int
    page_size: int
    epochs: int
    seconds: float
    inexact: int
    memory: int
    distinct: int
    stretches: list[Stretch]
    regions: list[str]
    region_of: Integers
    edges: Floats
    column_epochs: Integers
    column_inexact: Integers
    column_pages: Integers
    column_peaks: Floats
    peak: float
    before: Integers
    gaps: Integers
    often: Integers
    levels: list[Level]
    sampled: bool
    _columns: list[Column]
    _bases: Integers
    _shift: int

    def _owners(self, ids: Integers) -> Integers:
        owners: Integers = np.searchsorted(self._bases, ids, side="right") - 1
        return owners

    @cached_property
    def unions(self) -> Integers:
        """Different pages written from the beginning of one column to the beginning of another: ``unions[i, j]``.

        A page counts where it is written for the first time since column `i` began:
        so each union of the columns' pages is known, and none has to be made.
        """
        n = len(self.column_pages)
        unions = np.zeros((n + 1, n + 1), np.int64)
        new = np.cumsum(self.before, axis=0)
        for i in range(n):
            unions[i, i + 1 :] = np.cumsum(new[i, i:])
        return unions

    def dirtied(self, start: float, seconds: float) -> float | None:
        """Count the different pages of the `seconds` after `start`, or return None where the trace ends before.

        A column that lies in that time in part gives its share, as an epoch does in
        :func:`dirtylog.sinks.trace.what_if`.
        """
        return self._between(start, start + seconds)

    def _between(self, start: float, end: float) -> float | None:
        n = len(self.column_pages)
        column = int(np.searchsorted(self.edges[1:], start))
        first, partly = column, 0.0
        while column < n:
            began, ended = float(self.edges[column]), float(self.edges[column + 1])
            share = (min(end, ended) - max(start, began)) / (ended - began)
            if share < 1:
                partly += share * float(self.unions[first, column + 1] - self.unions[first, column])
                if ended < end:
                    first = column + 1
            elif ended >= end:
                return float(self.unions[first, column + 1]) + partly
            if ended >= end:
                return float(self.unions[first, column]) + partly
            column += 1
        return None

    def what_if(self, bandwidth: float, downtime: float, *, start: float = 0.0, max_rounds: int = 30) -> Forecast:
        """Estimate how a migration would have gone: :func:`dirtylog.sinks.trace.what_if` of the columns.

        The same, digit for digit, where each column is one epoch and no page stands for others.
        """
        now = [start]

        def dirtied(_: float, seconds: float) -> float | None:
            found = self.dirtied(now[0], seconds)
            now[0] += seconds
            return found

        return forecast(
            self.npages, self.page_size, dirtied, bandwidth=bandwidth, downtime=downtime, max_rounds=max_rounds
        )

    def snapshot(self, every: float, start: float = 0.0, end: float | None = None) -> float | None:
        """Return how many pages snapshots at this interval hold on average, or None where there is no time for one."""
        until = self.seconds if end is None else end
        sizes: list[float] = []
        # Half a thousandth of grace: a sum of intervals may end a little late.
        while start + (len(sizes) + 1) * every <= until + every / 2000:
            found = self._between(start + len(sizes) * every, min(start + (len(sizes) + 1) * every, until))
            if found is None:
                break
            sizes.append(found)
        return sum(sizes) / len(sizes) if sizes else None

    def written(self) -> dict[int, int]:
        """Return the page writes of each region that was written, by its place in `regions`, most first."""
        sums = np.zeros(len(self.regions), np.int64)
        for column in self._columns:
            np.add.at(sums, self.region_of[self._owners(column.ids)], column.counts)
        return {int(i): int(sums[i]) for i in np.argsort(-sums, kind="stable") if sums[i]}

    def by_region(self, places: list[int]) -> Integers:
        """Return the page writes of some regions in each column, and in the last row those of all others."""
        rows = np.full(len(self.regions), len(places))
        rows[places] = np.arange(len(places))
        sums = np.zeros((len(places) + 1, len(self._columns)), np.int64)
        for i, column in enumerate(self._columns):
            np.add.at(sums[:, i], rows[self.region_of[self._owners(column.ids)]], column.counts)
        return sums

    def sizes(self) -> Integers:
        """Return the pages of each region."""
        sums = np.zeros(len(self.regions), np.int64)
        np.add.at(sums, self.region_of, [stretch.npages for stretch in self.stretches])
        return sums

    def windows(self, values: npt.NDArray[np.generic], most: int = MAX_COLUMNS) -> tuple[Floats, Floats]:
        """Share values of the columns out to windows of one length: their edges, and what falls into each.

        Windows are as long as a column of the middle; what a column holds is taken
        as even over its time. So a last harvest after a few milliseconds makes no peak.
        """
        lengths = np.diff(self.edges)
        if not len(lengths) or not self.seconds > 0:
            return np.zeros(1), np.zeros((*values.shape[:-1], 0))
        n = int(np.clip(round(self.seconds / float(np.median(lengths))), 1, most))
        edges = np.linspace(0, self.seconds, n + 1)
        sums = np.concatenate([np.zeros((*values.shape[:-1], 1)), np.cumsum(values, axis=-1)], axis=-1)
        flat = [np.diff(np.interp(edges, self.edges, row)) for row in sums.reshape(-1, sums.shape[-1])]
        return edges, np.array(flat).reshape(*values.shape[:-1], n)

    def map(self, rows: int = 160, regions: int = 14) -> Map:
        """Lay out what was written in so many rows, with room for so many regions by name.

        The regions that were written most have rows in proportion to the square
        root of the pages written in them; the others, and those of less than a
        thousandth of all writes, share a few rows at the end.
        """
        touched = np.unique(np.concatenate([column.ids for column in self._columns] or [np.zeros(0, np.int64)]))
        owners = self._owners(touched)
        region_of, sizes = self.region_of[owners], self.sizes()
        written = self.written()
        # A region of less than a thousandth of all writes would be seen by its name alone.
        least = sum(written.values()) // 1000
        shown = sorted([i for i, found in written.items() if found > least][:regions])
        if len(written) == len(shown) + 1:
            shown = sorted(written)
        groups = [(self.regions[i], np.flatnonzero(region_of == i), [i]) for i in shown]
        rest = sorted(set(written) - set(shown))
        if rest:
            groups.append((f"{len(rest)} other regions", np.flatnonzero(np.isin(region_of, rest)), rest))
        weights = np.sqrt([len(buckets) for _, buckets, _ in groups])
        # Where each row begins among the written parts.
        blocks, starts, used = [], [], 0
        order: list[Integers] = []
        for (name, buckets, places), weight in zip(groups, weights, strict=True):
            n = min(len(buckets), max(2, int(rows * weight / weights.sum())))
            starts.append(np.arange(n) * len(buckets) // n + sum(map(len, order)))
            order.append(buckets)
            pages = int(sizes[places].sum())
            blocks.append(Block(name, used, used + n, pages, sum(written[i] for i in places)))
            used += n
        if not blocks:
            empty = np.zeros(0, np.int64)
            return Map([], empty, empty, empty, np.zeros((0, len(self._columns)), np.int64))
        permuted, begins = np.concatenate(order), np.concatenate(starts)
        row_of = np.empty(len(touched), np.int64)
        row_of[permuted] = np.repeat(np.arange(used), np.diff([*begins.tolist(), len(permuted)]))
        stretch_first = np.array([stretch.first for stretch in self.stretches])
        stretch_end = stretch_first + np.array([stretch.npages for stretch in self.stretches])
        first = stretch_first[owners] + ((touched - self._bases[owners]) << self._shift)
        end = np.minimum(first + (1 << self._shift), stretch_end[owners])
        cells = np.zeros((used, len(self._columns)), np.int64)
        for i, column in enumerate(self._columns):
            np.add.at(cells[:, i], row_of[np.searchsorted(touched, column.ids)], column.counts)
        return Map(
            blocks,
            np.minimum.reduceat(first[permuted], begins),
            np.maximum.reduceat(end[permuted], begins) - 1,
            np.add.reduceat((end - first)[permuted], begins),
            cells,
        )
