"""Says which file of a chain has which page, from the footers alone: what is mapped and read in parts goes by it.

Most files of a chain are diffs whose headers differ from their child's in a few numbers. Those are opened, read in one
system call, compared with the child's header and followed in C: a thousand files take about ten milliseconds. Whatever
does not match is read and judged by :class:`~dirtylog.sinks.snapshot.chain.Layer`. Which file has which page is worked
out when it is first asked for.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from dirtylog.sinks._bytes.extents import WINDOW
from dirtylog.sinks.snapshot import footer as footers
from dirtylog.sinks.snapshot._footers import RunTable, follow_diffs
from dirtylog.sinks.snapshot.chain import MAX_CHAIN, ChainMovedError, Info, Layer, Link, describe, find, still_there
from dirtylog.sinks.snapshot.footer import Footer, SnapshotError
from dirtylog.sinks.snapshot.layout import Layout

__all__ = ["MAX_ROWS", "Index", "index", "overlap"]

# Runs that are composed: for a moment that takes 400 bytes each, and no file may make a reader take more than 32 MiB. A
# chain with more of them is laid file by file.
MAX_ROWS = 100_000


@dataclass(frozen=True)
class Index:
    """A chain as it was when it was looked through.

    Parameters
    ----------
    files : list of tuple
        Path, digest and where the footer begins, of each file, base first.
    footer : Footer
        That of the snapshot itself.
    info : Info
        What the snapshot is.
    identity : str
        What its children note of it: the same memory has the same.
    table : RunTable
        The runs of pages that each file holds.
    """

    files: list[tuple[str, str, int]]
    footer: Footer
    info: Info
    identity: str
    table: RunTable

    @cached_property
    def rows(self) -> npt.NDArray[np.int64] | None:
        """Say which file has which page, of those that a diff holds; the base has the others.

        Returns
        -------
        int64 array of shape (n, 4), or None
            First page, number of pages, number of the file in `files`, and where in it the first page lies, in pages:
            ascending, each page once. None: there are more than :data:`MAX_ROWS`.
        """
        if self.table.full:
            return None
        rows: npt.NDArray[np.int64] = self.table.composed()
        # Numbered from the tip on, below zero, before it was known how many there are.
        rows[:, 2] += len(self.files)
        return rows

    @cached_property
    def _cover(self) -> tuple[npt.NDArray[np.int64], ...]:
        """Say which bytes each file gives: first, the one after the last, the file's number, and by how much further on
        than in the memory they lie in the file; no byte is left out.
        """
        rows = self.rows
        assert rows is not None
        # I9: page i is bytes [i * page_size, (i + 1) * page_size) of the page space.
        size, nbytes = self.footer.page_size, self.footer.nbytes
        starts, stops = rows[:, 0] * size, np.minimum((rows[:, 0] + rows[:, 1]) * size, nbytes)
        shifts = (rows[:, 3] - rows[:, 0]) * size
        # Of the base is what no diff holds. It is plain: no diff is a base.
        before, after = np.append(0, stops), np.append(starts, nbytes)
        gaps = before < after
        starts, stops = np.append(starts, before[gaps]), np.append(stops, after[gaps])
        numbers = np.append(rows[:, 2], np.zeros(np.count_nonzero(gaps), np.int64))
        shifts = np.append(shifts, np.zeros(np.count_nonzero(gaps), np.int64))
        order = np.argsort(starts, kind="stable")
        return starts[order], stops[order], numbers[order], shifts[order]

    def pieces(self, wanted: npt.NDArray[np.int64]) -> list[tuple[int, npt.NDArray[np.int64]]]:
        """Say which bytes of each file make the bytes that are wanted.

        Parameters
        ----------
        wanted : int64 array of shape (n, 2)
            Offsets and lengths in the memory, ascending and apart.

        Returns
        -------
        list of tuple
            Number of the file, and its pieces: offset in the memory, length, offset in the file. Ascending, each byte
            once.

        Notes
        -----
        O(wanted * log runs + what is found), once the runs are composed.
        """
        starts, stops, numbers, shifts = self._cover
        at, found = overlap(starts, stops, wanted)
        found = np.column_stack([found, found[:, 0] + shifts[at]])
        order = np.argsort(numbers[at], kind="stable")
        numbers, found = numbers[at][order], found[order]
        cuts = np.flatnonzero(np.diff(numbers)) + 1
        parts = zip(np.append(0, cuts), np.split(found, cuts), strict=True)
        return [(int(numbers[first]), own) for first, own in parts if len(own)]


def overlap(
    starts: npt.NDArray[np.int64], stops: npt.NDArray[np.int64], wanted: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return what ranges and extents have in common: the number of the range, and the common extent.

    Both ascending and apart, and so is the answer.
    """
    ends = wanted.sum(axis=1)
    low = np.searchsorted(stops, wanted[:, 0], "right")
    counts = np.maximum(np.searchsorted(starts, ends, "left") - low, 0)
    which = np.repeat(np.arange(len(wanted)), counts)
    at = np.arange(len(which)) + np.repeat(low - (np.cumsum(counts) - counts), counts)
    begin = np.maximum(starts[at], wanted[which, 0])
    length = np.minimum(stops[at], ends[which]) - begin
    some = length > 0
    return at[some], np.stack([begin, length], axis=1)[some]


def _alike(footer: Footer) -> tuple[bytes, bytes]:
    """Return what stands in the header of every diff of the same memory: its size, and its regions."""
    text = footers.header_text(footer)
    # A quote inside a string is written with a backslash before it, so these stand where they seem to.
    size = text[text.index(b',"page_size":') : text.index(b',"count":')]
    return size, b'"' + text[text.index(b',"named":') : text.rindex(b',"state":')]


class _Walk:
    """Goes from a snapshot to its base, newest file first."""

    def __init__(self, path: str, search: Sequence[str]) -> None:
        self.search = search
        self.path = path
        self.files: list[tuple[str, str, int]] = []
        self.digests: set[str] = set()
        self.identities: set[str] = set()
        self.table = RunTable(MAX_ROWS)
        with Layer(path) as layer:
            self.tip: Footer = layer.footer
            self.info: Info = describe(path, layer.footer, layer.place.digest, layer.allocated, layer.state())
            self.identity: str = layer.identity
            self.parent: tuple[str, str] | None = None
            self._judged(path, layer)
        npages, page_size = self.tip.npages, self.tip.page_size
        self.geometry: tuple[int, int, int, int, int] = (
            footers.footer_offset(self.tip.nbytes), npages, page_size, npages * page_size - self.tip.nbytes, WINDOW,
        )  # fmt: skip
        self.alike: tuple[bytes, bytes] = _alike(self.tip)

    def _note(self, path: str, layer: Layer) -> None:
        digest = layer.place.digest
        if digest in self.digests or len(self.files) >= MAX_CHAIN:
            raise SnapshotError(f"{self.path}: its chain comes back to {path}, or is longer than {MAX_CHAIN} files")
        self.digests.add(digest)
        self.identities.update((digest, layer.identity))
        self.files.append((path, digest, layer.place.offset))

    def _judged(self, path: str, layer: Layer) -> None:
        footer = layer.footer
        if (footer.nbytes, footer.page_size) != (self.tip.nbytes, self.tip.page_size):
            raise SnapshotError(f"{self.files[-1][0]}: its parent {path} is of another size")
        self._note(path, layer)
        self.parent = None
        # What the base holds is not needed: the rest is zero in it.
        if footer.parent is not None and footer.parent_digest is not None:
            self.parent = footer.parent, footer.parent_digest
            if not self.table.full:
                self.table.add(layer.blocks(), -len(self.files), layer.place.layout is Layout.PACKED)

    def step(self) -> bool:
        """Go to the parent; False at the base."""
        if self.parent is None:
            return False
        directory = os.path.dirname(self.files[-1][0])
        name, noted = follow_diffs(
            self.table, directory, self.parent, self.geometry, self.alike,
            self.files, self.digests, self.identities, MAX_CHAIN,
        )  # fmt: skip
        path, layer, reason = find(name, noted, self.identities, [directory, *self.search])
        if layer is None:
            raise SnapshotError(f"{self.files[-1][0]}: {reason}")
        with layer:
            self._judged(path, layer)
        return True

    def finish(self) -> Index:
        """Say what was found."""
        return Index(self.files[::-1], self.tip, self.info, self.identity, self.table)


def index(path: str, search: Sequence[str] = ()) -> Index:
    """Look through a chain, from a snapshot to its base, one file open at a time.

    Parameters
    ----------
    path : str
        Absolute path of the snapshot.
    search : sequence of str
        Directories to look for parents in, after the child's own.

    Raises
    ------
    SnapshotError
        A file is missing, damaged, or not the one its child was taken over.
    ChainMovedError
        A writer replaced a file meanwhile.

    Notes
    -----
    O(chain + runs). 32 bytes per run, at most :data:`MAX_ROWS` of them, and two digests per file.
    """
    walk = _Walk(path, search)
    try:
        while walk.step():
            pass
    except SnapshotError:
        # Upkeep replaces a child, then removes its old parents: a reader that has the old child looks again.
        if not still_there([Link(path, digest, digest, 0, None) for path, digest, _ in walk.files]):
            raise ChainMovedError(path) from None
        raise
    return walk.finish()
