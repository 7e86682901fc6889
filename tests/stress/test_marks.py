"""Marks by the thousand million against harvests: each is in one harvest, none is lost, none comes twice."""

import numpy as np
import pytest

import dirtylog as dl

pytestmark = pytest.mark.stress

WRITERS = 3
NPAGES = (1 << 22) + 37


def own(npages):
    return dl.DirtyBitmap(npages)


def foreign(npages):
    return dl.DirtyBitmap.from_buffer(np.zeros(-(-npages // 64), np.uint64), npages)


def mark_range(bitmap, first, count):
    bitmap.mark_range(first, count)


def mark_pages(bitmap, first, count):
    bitmap.mark_pages(np.arange(first, first + count))


def mark_pages_backwards(bitmap, first, count):
    bitmap.mark_pages(np.arange(first + count - 1, first - 1, -1))


def merge(bitmap, first, count):
    bitmap.merge(dl.DirtyPages.from_runs([[0, count]], count), first)


WAYS = (mark_range, mark_pages, mark_pages_backwards, merge)


@pytest.mark.parametrize("make", [own, foreign])
def test_every_mark_of_a_round_is_in_one_harvest(stress, make):
    """Pieces that begin and end within words are dealt to the writers: neighbours set bits of the same word at once."""
    bitmap = make(NPAGES)
    random = np.random.default_rng(1)
    with stress.signal_storm() as caught:
        for _ in stress.rounds(until=lambda: stress.total() >= stress.least):
            ledger = stress.ledger(NPAGES)
            cuts = [0, *np.unique(random.integers(1, NPAGES, 200)).tolist(), NPAGES]
            pieces = [(cuts[i], cuts[i + 1] - cuts[i], WAYS[random.integers(len(WAYS))]) for i in range(len(cuts) - 1)]
            hands = [pieces[writer::WRITERS] for writer in range(WRITERS)]

            def write(hand):
                for first, count, way in hand:
                    way(bitmap, first, count)

            parts = [lambda hand=hand: write(hand) for hand in hands]
            ranges = random.integers(0, NPAGES, 64).tolist()

            def harvest_ranges(ledger=ledger, ranges=ranges):
                for first in ranges:
                    ledger.enter(bitmap.harvest(first, min(NPAGES - first, 100_000)))

            with stress.side_by_side(*parts, harvest_ranges) as busy:
                while busy():
                    ledger.enter(bitmap.harvest())
            ledger.enter(bitmap.harvest())
            ledger.close()
            for _, count, way in pieces:
                stress.count(way.__name__, count)
    assert caught[0] > 0
    assert not bitmap.peek()


@pytest.mark.parametrize("make", [own, foreign])
@pytest.mark.parametrize("npages", [100, 40_000, 1 << 20])
def test_no_store_is_missed_by_marks_one_at_a_time_through_the_c_api(stress, stores, replica, make, npages):
    """Every thread stores to its own pages of words that all share, again and again, and marks after each store."""
    bitmap = make(npages)
    copy = replica(np.zeros(npages, np.uint64))
    turns = -(-(1 << 21) // npages)
    value = 1
    made, harvested = [], 0
    for _ in stress.rounds():

        def write(writer, value=value):
            made.append(stores.store_and_mark(bitmap, copy.values, writer, WRITERS, value, turns))

        with stress.side_by_side(*(lambda w=w: write(w) for w in range(WRITERS))) as busy:
            while busy():
                harvested += copy.take(bitmap.harvest())
        harvested += copy.take(bitmap.harvest())
        copy.check()
        value += turns
        assert (copy.copy == value - 1).all()
    assert sum(made) == (value - 1) * npages
    assert npages <= harvested <= sum(made)
    stress.count("dirtylog_api.mark", sum(made))
