"""What a bitmap costs: at most 1.1 bits a page, and results in proportion to what is dirty."""

from pathlib import Path

import numpy as np
import pytest

import dirtylog as dl

PAGE = 4096


def mapped_bytes():
    return int(Path("/proc/self/statm").read_text().split()[0]) * PAGE


@pytest.mark.parametrize("npages", [2**20, 2**24, 2**24 + 1, 2**28])
def test_a_bitmap_says_that_it_costs_at_most_1_1_bits_a_page(npages):
    assert npages <= dl.DirtyBitmap(npages).__sizeof__() * 8 <= 1.1 * npages


@pytest.mark.thread_unsafe(reason="it measures what the whole process maps")
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc/self/statm to measure with")
def test_a_bitmap_maps_at_most_1_1_bits_a_page():
    npages = 2**30
    before = mapped_bytes()
    bitmap = dl.DirtyBitmap(npages)
    cost = (mapped_bytes() - before) * 8
    assert bitmap.count() == 0
    assert npages <= cost <= 1.1 * npages


def test_a_view_of_foreign_memory_costs_none_of_its_own():
    assert dl.DirtyBitmap.from_buffer(np.zeros(2**14, np.uint64)).__sizeof__() < 1000


def test_a_harvest_of_few_pages_is_small_until_words_are_asked_for():
    bitmap = dl.DirtyBitmap(2**24)
    bitmap.mark_pages([5, 2**23])
    dirty = bitmap.harvest()
    assert dirty.__sizeof__() < 4096
    assert dirty.words.nbytes == 2**24 // 8
    assert dirty.__sizeof__() > 2**24 // 8
