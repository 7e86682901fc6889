"""The peers behind one interface: mark pages, harvest them as numbers, runs or words, unite, count.

Every contestant's harvest leaves it empty. Only dirtylog and the kernel's loop
are atomic: the others would lose marks made while they harvest.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyroaring
from bitarray import bitarray

import dirtylog as dl
from benchmarks.peers.native import yardsticks
from dirtylog import reference

Pages = npt.NDArray[np.int64]


class Dirtylog:
    """This library."""

    name = "dirtylog"
    works = ("mark", "numbers", "runs", "words", "union", "count")

    def __init__(self, npages: int) -> None:
        self.bitmap = dl.DirtyBitmap(npages)

    def prepare(self, pages: Pages) -> None:
        self.pages = pages
        self.dirty = dl.DirtyPages.from_indices(pages, self.bitmap.npages)
        self.other = dl.DirtyPages.from_indices((pages[::2] + 7) % self.bitmap.npages, self.bitmap.npages)

    def clear(self) -> None:
        self.bitmap.harvest()

    def fill(self) -> None:
        self.bitmap.merge(self.dirty)

    def mark(self) -> None:
        self.bitmap.mark_pages(self.pages)

    def numbers(self) -> object:
        return self.bitmap.harvest().indices()

    def runs(self) -> object:
        return self.bitmap.harvest().runs()

    def words(self) -> object:
        return self.bitmap.harvest().words

    def union(self) -> object:
        return self.dirty | self.other

    def count(self) -> object:
        return self.bitmap.count()


class KernelLoop:
    """``if (!word) continue; xchg; copy`` at -O2: words only."""

    name = "kernel's loop"
    works = ("words",)

    def __init__(self, npages: int) -> None:
        self.npages = npages
        self.bits = np.zeros((npages + 63) // 64, np.uint64)
        self.out = np.empty_like(self.bits)
        self.module = yardsticks()

    def prepare(self, pages: Pages) -> None:
        self.source = dl.DirtyPages.from_indices(pages, self.npages).words

    def clear(self) -> None:
        self.bits[:] = 0

    def fill(self) -> None:
        self.bits[:] = self.source

    def words(self) -> object:
        self.module.harvest(self.bits, self.out)
        return self.out


class Numpy:
    """A bitmap of uint64 words; the better of two ways to page numbers."""

    name = "numpy"
    works: tuple[str, ...] = ("mark", "numbers", "runs", "words", "union", "count")

    def __init__(self, npages: int) -> None:
        self.npages = npages
        self.bits = np.zeros((npages + 63) // 64, np.uint64)

    def prepare(self, pages: Pages) -> None:
        self.pages = pages
        self.source = dl.DirtyPages.from_indices(pages, self.npages).words.copy()
        self.other = dl.DirtyPages.from_indices((pages[::2] + 7) % self.npages, self.npages).words.copy()
        self.few = np.count_nonzero(self.source) * 4 < self.source.size

    def clear(self) -> None:
        self.bits[:] = 0

    def fill(self) -> None:
        self.bits[:] = self.source

    def mark(self) -> None:
        np.bitwise_or.at(self.bits, self.pages >> 6, np.uint64(1) << (self.pages & 63).astype(np.uint64))

    def numbers_of(self, words: npt.NDArray[np.uint64]) -> Pages:
        if not self.few:
            return np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little"))
        rows = np.flatnonzero(words)
        bits = np.unpackbits(words[rows].view(np.uint8).reshape(-1, 8), axis=1, bitorder="little")
        row, column = np.nonzero(bits)
        return rows[row] * 64 + column

    def take(self) -> npt.NDArray[np.uint64]:
        taken = self.bits.copy()
        self.bits[:] = 0
        return taken

    def words(self) -> object:
        return self.take()

    def numbers(self) -> object:
        return self.numbers_of(self.take())

    def runs(self) -> object:
        return self.runs_of(self.take())

    def runs_of(self, words: npt.NDArray[np.uint64]) -> object:
        numbers = self.numbers_of(words)
        breaks = np.flatnonzero(np.diff(numbers) != 1) + 1
        starts = np.concatenate((numbers[:1], numbers[breaks]))
        ends = np.concatenate((breaks, [numbers.size]))
        return starts, np.diff(ends, prepend=0)

    def union(self) -> object:
        return self.source | self.other

    def count(self) -> object:
        return int(np.bitwise_count(self.bits).sum())


class NumpyViews(Numpy):
    """The strongest form of numpy that we know: bits as a view of bools, which it scans by vectors."""

    name = "numpy, bool views"
    works = ("numbers", "runs")

    def numbers_of(self, words: npt.NDArray[np.uint64]) -> Pages:
        if not self.few:
            return np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little").view(bool))
        rows = np.flatnonzero(words != 0)
        found = np.flatnonzero(np.unpackbits(words[rows].view(np.uint8), bitorder="little").view(bool))
        found += ((rows - np.arange(rows.size)) * 64)[found >> 6]
        return found

    def runs_of(self, words: npt.NDArray[np.uint64]) -> object:
        """Find where a page differs from the one before: of those, starts and ends take turns."""
        changes = words << np.uint64(1)
        changes[1:] |= words[:-1] >> np.uint64(63)
        changes ^= words
        edges = self.numbers_of(changes)
        if edges.size % 2:
            edges = np.append(edges, 64 * words.size)
        return edges[::2], edges[1::2] - edges[::2]


class Bitarray:
    """The bitarray package."""

    name = "bitarray"
    works = ("mark", "numbers", "words", "union", "count")

    def __init__(self, npages: int) -> None:
        self.npages = npages
        self.bits = bitarray(npages, endian="little")
        self.one = bitarray("1")

    def prepare(self, pages: Pages) -> None:
        self.pages = pages.tolist()
        self.source = bitarray(endian="little")
        self.source.frombytes(dl.DirtyPages.from_indices(pages, self.npages).to_bytes())
        del self.source[self.npages :]
        self.other = bitarray(endian="little")
        self.other.frombytes(dl.DirtyPages.from_indices((pages[::2] + 7) % self.npages, self.npages).to_bytes())
        del self.other[self.npages :]

    def clear(self) -> None:
        self.bits.setall(0)

    def fill(self) -> None:
        self.bits[:] = self.source

    def mark(self) -> None:
        self.bits[self.pages] = 1

    def numbers(self) -> object:
        found = np.fromiter(self.bits.search(self.one), np.int64, self.bits.count())
        self.bits.setall(0)
        return found

    def words(self) -> object:
        taken = self.bits.copy()
        self.bits.setall(0)
        return taken

    def union(self) -> object:
        return self.source | self.other

    def count(self) -> object:
        return self.bits.count()


class Roaring:
    """pyroaring: compressed, not atomic, 32-bit numbers."""

    name = "pyroaring"
    works = ("mark", "numbers", "union", "count")

    def __init__(self, npages: int) -> None:
        self.npages = npages
        self.bits = pyroaring.BitMap()

    def prepare(self, pages: Pages) -> None:
        self.pages = pages.astype(np.uint32)
        self.source = pyroaring.BitMap(self.pages)
        self.other = pyroaring.BitMap(((pages[::2] + 7) % self.npages).astype(np.uint32))

    def clear(self) -> None:
        self.bits.clear()

    def fill(self) -> None:
        self.bits.clear()
        self.bits |= self.source

    def mark(self) -> None:
        self.bits.update(self.pages)

    def numbers(self) -> object:
        found = np.asarray(self.bits.to_array())
        self.bits.clear()
        return found

    def union(self) -> object:
        return self.source | self.other

    def count(self) -> object:
        return len(self.bits)


class Python:
    """reference.py: plain Python."""

    name = "pure Python"
    works = ("mark", "numbers", "runs", "words", "count")

    def __init__(self, npages: int) -> None:
        self.bitmap = reference.DirtyBitmap(npages)

    def prepare(self, pages: Pages) -> None:
        self.pages = pages.tolist()

    def clear(self) -> None:
        self.bitmap.harvest()

    def fill(self) -> None:
        self.bitmap.mark_pages(self.pages)

    def mark(self) -> None:
        self.bitmap.mark_pages(self.pages)

    def numbers(self) -> object:
        return self.bitmap.harvest().indices()

    def runs(self) -> object:
        return self.bitmap.harvest().runs()

    def words(self) -> object:
        return self.bitmap.harvest().words

    def count(self) -> object:
        return self.bitmap.count()


CONTESTANTS = (Dirtylog, KernelLoop, Numpy, NumpyViews, Bitarray, Roaring, Python)
