"""Marks one at a time through the C API, by the thousand million: no store is missed by a harvest."""

import numpy as np
import pytest

import dirtylog as dl

pytestmark = pytest.mark.stress

WRITERS = 3


def own(npages):
    return dl.DirtyBitmap(npages)


def foreign(npages):
    return dl.DirtyBitmap.from_buffer(np.zeros(-(-npages // 64), np.uint64), npages)


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
