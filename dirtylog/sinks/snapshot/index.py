"""Says which file of a chain has which page, from the footers alone: what is mapped and read in parts goes by it.

Most files of a chain are diffs whose headers differ from their child's in a few numbers. Those are read in one system
call, compared with the child's header, and their runs are composed in C: a thousand files take some
ten milliseconds. Whatever does not match is read and judged by :class:`~dirtylog.sinks.snapshot.chain.Layer`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dirtylog.sinks.extents import WINDOW
from dirtylog.sinks.snapshot import footer as footers
from dirtylog.sinks.snapshot._mapping import RunTable, diff_header, read_footer
from dirtylog.sinks.snapshot.chain import MAX_CHAIN, ChainMovedError, Info, Layer, Link, describe, find, still_there
from dirtylog.sinks.snapshot.footer import Footer, SnapshotError

__all__ = ["MAX_ROWS", "Index", "index"]

# Runs that are composed: 24 bytes each, and 96 for a moment. A chain with more of them is laid file by file.
MAX_ROWS = 200_000
# A footer that is read in one go; a longer one is read in blocks.
MAX_TAIL = 1 << 20


@dataclass(frozen=True, slots=True)
class Index:
    """A chain as it was when it was looked through.

    Parameters
    ----------
    files : list of tuple
        Path and digest of each file, base first.
    footer : Footer
        That of the snapshot itself.
    info : Info
        What the snapshot is.
    identity : str
        What its children note of it: the same memory has the same.
    rows : int64 array of shape (n, 3), or None
        First page, number of pages, and number of the file in `files`, for every page that a diff holds: ascending,
        each page once. The base has the others. None: there are more than :data:`MAX_ROWS`.
    """

    files: list[tuple[str, str]]
    footer: Footer
    info: Info
    identity: str
    rows: npt.NDArray[np.int64] | None

    def extents(self, begin: int, end: int) -> list[tuple[int, npt.NDArray[np.int64]]]:
        """Say which bytes of each file make bytes `begin` to `end` of the memory.

        Returns
        -------
        list of tuple
            Number of the file, and its extents (offset, length), ascending; each byte once.
        """
        assert self.rows is not None
        # I9: page i is bytes [i * page_size, (i + 1) * page_size) of the page space.
        size = self.footer.page_size
        ends = (self.rows[:, 0] + self.rows[:, 1]) * size
        part = slice(int(np.searchsorted(ends, begin, "right")), int(np.searchsorted(self.rows[:, 0] * size, end)))
        rows, stops = self.rows[part], np.minimum(ends[part], end)
        starts = np.maximum(rows[:, 0] * size, begin)
        gaps = np.stack([np.append(begin, stops), np.append(starts, end)], axis=1)
        gaps = gaps[gaps[:, 0] < gaps[:, 1]]
        found = [(0, np.stack([gaps[:, 0], gaps[:, 1] - gaps[:, 0]], axis=1))] if len(gaps) else []
        order = np.argsort(rows[:, 2], kind="stable")
        numbers = rows[order, 2]
        extents = np.stack([starts, stops - starts], axis=1)[order]
        cuts = np.flatnonzero(np.diff(numbers)) + 1
        for first, own in zip(np.append(0, cuts), np.split(extents, cuts), strict=True):
            if len(own):
                found.append((int(numbers[first]), own))
        return found


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
        self.files: list[tuple[str, str]] = []
        self.digests: set[str] = set()
        self.identities: set[str] = set()
        self.table = RunTable(MAX_ROWS)
        with Layer(path) as layer:
            self.tip: Footer = layer.footer
            self.info: Info = describe(path, layer.footer, layer.place.digest, layer.allocated, layer.state())
            self.identity: str = layer.identity
            self.parent: tuple[str, str] | None = None
            self._judged(path, layer)
        self.offset: int = footers.footer_offset(self.tip.nbytes)
        self.page_size: int = self.tip.page_size
        self.npages: int = self.tip.npages
        # By so much the last page is short of a whole one.
        self.short: int = self.npages * self.page_size - self.tip.nbytes
        self.alike: tuple[bytes, bytes] = _alike(self.tip)

    def _note(self, path: str, digest: str, identity: str) -> None:
        if digest in self.digests or len(self.files) >= MAX_CHAIN:
            raise SnapshotError(f"{self.path}: its chain comes back to {path}, or is longer than {MAX_CHAIN} files")
        self.digests.add(digest)
        self.identities.update((digest, identity))
        self.files.append((path, digest))

    def _judged(self, path: str, layer: Layer) -> None:
        footer = layer.footer
        if (footer.nbytes, footer.page_size) != (self.tip.nbytes, self.tip.page_size):
            raise SnapshotError(f"{self.files[-1][0]}: its parent {path} is of another size")
        self._note(path, layer.place.digest, layer.identity)
        self.parent = None
        # What the base holds is not needed: the rest is zero in it.
        if footer.parent is not None and footer.parent_digest is not None:
            self.parent = footer.parent, footer.parent_digest
            if not self.table.full:
                self.table.add(layer.blocks(), -len(self.files))

    def _glanced(self, path: str, noted: str) -> bool:
        """Take a diff that is like its child in all but numbers; False: it needs a closer look."""
        text = read_footer(path, self.offset, MAX_TAIL)
        if text is None:
            return False
        magic, version, offset, header, length, expected, end = footers.TRAILER.unpack_from(text, len(text) - 64)
        if (magic, version, offset, end) != (footers.MAGIC, footers.VERSION, self.offset, footers.END):
            return False
        if length + 64 != len(text):
            return False
        found = diff_header(text, header, *self.alike) if header <= length else None
        if found is None:
            return False
        digest = hashlib.blake2b(text[-64:-24], digest_size=footers.DIGEST_BYTES)
        digest.update(text[:-64])
        if digest.digest() != expected:
            return False
        count, runs, parent, parent_digest, holds, state = found
        number, npages = expected.hex(), self.npages
        if noted not in (number, holds) or 16 * runs > 8 * -(-npages // 64) or state > footers.MAX_STATE_BYTES:
            return False
        taken = self.table.take(text, header, runs, npages, -len(self.files) - 1)
        if taken is None:
            return False
        held = taken[0] * self.page_size - (self.short if taken[1] == npages else 0)
        if taken[0] != count or header + 16 * runs + footers.DIGEST_BYTES * -(-held // WINDOW) + state != length:
            raise SnapshotError(f"{path}: the footer cannot be used: the sections do not add up")
        self._note(path, number, holds or number)
        self.parent = parent, parent_digest
        return True

    def step(self) -> bool:
        """Go to the parent; False at the base."""
        if self.parent is None:
            return False
        name, noted = self.parent
        directory = os.path.dirname(self.files[-1][0])
        path = f"{directory}/{name}"
        if self._glanced(path, noted):
            return True
        path, layer, reason = find(name, noted, self.identities, [directory, *self.search])
        if layer is None:
            raise SnapshotError(f"{self.files[-1][0]}: {reason}")
        with layer:
            self._judged(path, layer)
        return True

    def finish(self) -> Index:
        """Say what was found."""
        count = len(self.files)
        rows: Any = None
        if not self.table.full:
            rows = self.table.composed()
            # Numbered from the tip on, below zero, before it was known how many there are.
            rows[:, 2] += count
        return Index(self.files[::-1], self.tip, self.info, self.identity, rows)


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
    O(chain + runs). 24 bytes per run, at most :data:`MAX_ROWS` of them, and two digests per file.
    """
    walk = _Walk(path, search)
    try:
        while walk.step():
            pass
    except SnapshotError:
        # Upkeep replaces a child, then removes its old parents: a reader that has the old child looks again.
        if not still_there([Link(*file, file[1], 0, None) for file in walk.files]):
            raise ChainMovedError(path) from None
        raise
    return walk.finish()
