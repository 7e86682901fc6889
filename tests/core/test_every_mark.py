"""Every mark accounted for: three threads mark, two harvest at once, with the GIL or without it; none lost, none twice.

So many marks that the suite hardly notices them, and with ``-m stress`` as many as ``--stress-marks`` says, of all
kinds of bitmaps together, in the same memory: in each round every page is marked once, and is in one harvest of it.
"""

from itertools import pairwise

import numpy as np
import pytest

import dirtylog as dl

from ..side_by_side import side_by_side
from ..signals import signalled

WRITERS = 3
MARKS = 1_500_000


def own(npages):
    return dl.DirtyBitmap(npages)


def foreign(npages):
    return dl.DirtyBitmap.from_buffer(np.zeros(-(-npages // 64), np.uint64), npages)


def one_by_one(bitmap, pages):
    for page in pages.tolist():
        bitmap.mark(page)


def batch(bitmap, pages):
    bitmap.mark_pages(pages)


def batch_backwards(bitmap, pages):
    bitmap.mark_pages(pages[::-1])


def merge(bitmap, pages):
    bitmap.merge(dl.DirtyPages.from_indices(pages, bitmap.npages))


def span(bitmap, pages):
    bitmap.mark_range(int(pages[0]), int(pages[-1] - pages[0]) + 1)


def interleaved(pages, random):
    """Deal pages out one at a time: every word is everybody's."""
    return [
        list(deal(np.split(mine, cuts_of(mine, 60, random)), (batch, batch_backwards, merge)))
        for mine in (pages[writer::WRITERS].copy() for writer in range(WRITERS))
    ]


def in_pieces(pages, random):
    """Deal out pieces that begin and end within words: neighbours mark the same word at once, and whole ones alone."""
    pieces = np.split(pages, cuts_of(pages, 180, random))
    adjacent = pages[1] == pages[0] + 1
    ways = (span, batch, batch_backwards, merge) if adjacent else (batch, batch_backwards, merge)
    return [list(deal(pieces[writer::WRITERS], ways)) for writer in range(WRITERS)]


def cuts_of(pages, count, random):
    return np.unique(random.integers(1, len(pages), count))


def deal(pieces, ways):
    """The first few pages of each piece one by one, the rest in one of the other ways."""
    for number, piece in enumerate(pieces):
        yield one_by_one, piece[:20]
        if len(piece) > 20:
            yield ways[number % len(ways)], piece[20:]


class Account:
    """How often each page has come, from each of two harvesters."""

    def __init__(self, pages):
        self.first, self.step = int(pages[0]), int(pages[1] - pages[0])
        self.came = np.zeros((2, len(pages)), np.uint32)

    def enter(self, harvester, dirty):
        place = dirty.indices() - self.first
        if self.step > 1:
            place, rest = np.divmod(place, self.step)
            assert not rest.any(), "a page came that nobody marks"
        self.came[harvester, place] += 1

    def close(self, rounds):
        came = self.came.sum(axis=0)
        wrong = np.flatnonzero(came != rounds)
        if wrong.size:
            page = self.first + int(wrong[0]) * self.step
            pytest.fail(f"{wrong.size} pages, the first {page}: {rounds} marks came in {came[wrong[0]]} harvests")


# A summary; one that a top stands over, a page in each of its lines, under stress in each of its words; words that
# others may mark. Stress has larger ones: threads that start beside two that are busy wait long for a CPython without a
# GIL, and a round has five.
GROUNDS = {
    "two levels": (own, np.arange(3 << 16), np.arange(3 << 20)),
    "three levels": (own, np.arange(5, (1 << 26) + 40_000, 512), np.arange(5, (1 << 26) + 40_000, 64)),
    "foreign": (foreign, np.arange(3 << 16), np.arange(3 << 20)),
}


@pytest.mark.thread_unsafe(reason="it has threads of its own, and signals for the main one")
@pytest.mark.parametrize("stressful", [False, pytest.param(True, marks=pytest.mark.stress)], ids=["suite", "stress"])
@pytest.mark.parametrize("ground", GROUNDS)
def test_every_mark_is_in_one_of_the_harvests_of_two_threads(ground, stressful, request):
    make, *sizes = GROUNDS[ground]
    pages = sizes[stressful]
    bitmap = make(int(pages[-1]) + 1)
    marks = int(request.config.getoption("--stress-marks")) // len(GROUNDS) + 1 if stressful else MARKS
    rounds = -(-marks // len(pages))
    random = np.random.default_rng(1)
    hands = [interleaved(pages, random), in_pieces(pages, random)]
    parts = np.unique([0, *random.integers(0, bitmap.npages, 12), bitmap.npages]).tolist()
    account = Account(pages)
    caught = []

    def write(dealt):
        for way, some in dealt:
            way(bitmap, some)

    def harvest_parts(busy):
        while busy():
            for first, end in pairwise(parts):
                account.enter(1, bitmap.harvest(first, end - first))
            account.enter(1, bitmap.harvest())

    with signalled(lambda number, frame: caught.append(number), every=0.001):
        for number in range(1, rounds + 1):
            writers = [lambda dealt=dealt: write(dealt) for dealt in hands[number % 2]]
            with side_by_side(*writers) as busy, side_by_side(lambda busy=busy: harvest_parts(busy)):
                while busy():
                    account.enter(0, bitmap.harvest())
            account.enter(0, bitmap.harvest())
            account.close(number)
    assert not bitmap.peek()
    assert bitmap.count() == 0
    if stressful:
        assert caught
        request.config.stash[request.config.stress_key].append((request.node.name, {"mark_each": rounds * len(pages)}))
