"""What is measured: each operation of the core, beside the same in `dirtylog.reference` and in numpy."""

from collections.abc import Callable
from typing import Any

import numpy as np

import dirtylog as dl
from dirtylog import reference

SIZES = (1 << 18, 1 << 24)
DENSITIES = (0, 0.0001, 0.01, 0.1, 0.5, 1)
OPERATIONS = ("mark", "range", "batch", "harvest", "harvest to numbers", "indices", "runs")
BATCH = 1_000_000

Step = Callable[[], Any]
Contestants = dict[str, tuple[Step, Step]]  # name: (prepare, not timed; work)

Pages = np.ndarray[Any, np.dtype[np.int64]]


def random_pages(npages: int, density: float) -> Pages:
    """Draw distinct pages, the same ones in every run, in no order."""
    count = round(npages * density)
    if count == npages:
        return np.arange(npages)
    return np.random.default_rng(count).permutation(npages)[:count]


def nothing() -> None:
    """Prepare nothing."""


def numpy_batch(words: np.ndarray[Any, np.dtype[np.uint64]], pages: Pages) -> None:
    np.bitwise_or.at(words, pages >> 6, np.uint64(1) << (pages & 63).astype(np.uint64))


def numpy_indices(words: np.ndarray[Any, np.dtype[np.uint64]]) -> Any:
    return np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little"))


def numpy_runs(words: np.ndarray[Any, np.dtype[np.uint64]]) -> Any:
    bits = np.unpackbits(words.view(np.uint8), bitorder="little")
    edges = np.flatnonzero(np.diff(bits, prepend=0, append=0))
    return np.column_stack((edges[::2], edges[1::2] - edges[::2]))


def numpy_harvest(words: np.ndarray[Any, np.dtype[np.uint64]]) -> Any:
    found = numpy_indices(words)
    words.fill(0)
    return found


def numpy_range(words: np.ndarray[Any, np.dtype[np.uint64]], first: int, count: int) -> None:
    bits = np.zeros(len(words) * 64, np.uint8)
    bits[first : first + count] = 1
    words |= np.packbits(bits, bitorder="little").view(np.uint64)


def mark_each(bitmap: Any, pages: list[int]) -> None:
    for page in pages:
        bitmap.mark(page)


def contestants(operation: str, npages: int, density: float) -> Contestants:
    """Set up one operation on `npages` pages of which `density` are dirty, for each contestant.

    Every contestant is given the same pages, and its result is numpy arrays or
    lists of page numbers, whichever is its own.
    """
    pages = random_pages(npages, density)
    words = dl.DirtyPages.from_indices(pages, npages).words
    fast, slow, plain = dl.DirtyBitmap(npages), reference.DirtyBitmap(npages), np.zeros_like(words)
    word_list: list[int] = words.tolist()

    def refill(target: Any, source: Any) -> Step:
        def copy() -> None:
            target[:] = source

        return copy

    if operation == "mark":
        few: list[int] = pages[:1000].tolist()
        return {
            "dirtylog": (nothing, lambda: mark_each(fast, few)),
            "reference": (nothing, lambda: mark_each(slow, few)),
            "numpy": (nothing, lambda: [numpy_batch(plain, np.array([page])) for page in few]),
        }
    if operation == "range":
        first, count = npages // 7 if density < 0.5 else 0, len(pages)
        return {
            "dirtylog": (nothing, lambda: fast.mark_range(first, count)),
            "reference": (nothing, lambda: slow.mark_range(first, count)),
            "numpy": (nothing, lambda: numpy_range(plain, first, count)),
        }
    if operation == "batch":
        listed: list[int] = pages.tolist()
        return {
            "dirtylog": (fast.harvest, lambda: fast.mark_pages(pages)),
            "reference": (refill(slow.words, [0] * len(words)), lambda: slow.mark_pages(listed)),
            "numpy": (refill(plain, 0), lambda: numpy_batch(plain, pages)),
        }
    if operation.startswith("harvest"):
        # numpy has no other form for the pages than their numbers.
        dirty = dl.DirtyPages.from_words(words, npages)
        listing = operation == "harvest to numbers"
        return {
            "dirtylog": (lambda: fast.merge(dirty), lambda: fast.harvest().indices() if listing else fast.harvest()),
            "reference": (
                refill(slow.words, word_list),
                lambda: slow.harvest().indices() if listing else slow.harvest(),
            ),
            "numpy": (refill(plain, words), lambda: numpy_harvest(plain)),
        }
    if operation == "indices":
        return {
            "dirtylog": (nothing, lambda: dl.indices(words)),
            "reference": (nothing, lambda: reference.indices(word_list)),
            "numpy": (nothing, lambda: numpy_indices(words)),
        }
    if operation == "runs":
        return {
            "dirtylog": (nothing, lambda: dl.runs(words)),
            "reference": (nothing, lambda: reference.runs(word_list)),
            "numpy": (nothing, lambda: numpy_runs(words)),
        }
    raise ValueError(f"there is no operation {operation!r}: {', '.join(OPERATIONS)}")
