"""What a bitmap costs: at most 1.1 bits a page, and results in proportion to what is dirty."""

import subprocess
import sys

import numpy as np
import pytest

import dirtylog as dl


@pytest.mark.parametrize("npages", [2**20, 2**24, 2**24 + 1, 2**28])
def test_a_bitmap_says_that_it_costs_at_most_1_1_bits_a_page(npages):
    assert npages <= dl.DirtyBitmap(npages).__sizeof__() * 8 <= 1.1 * npages


# In a process of its own: what another test's garbage unmaps meanwhile is not the bitmap's.
MAPPED = """
import resource, sys
import dirtylog as dl

def mapped_bytes():
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[0]) * resource.getpagesize()

before = mapped_bytes()
bitmap = dl.DirtyBitmap(int(sys.argv[1]))
print((mapped_bytes() - before) * 8, bitmap.count())
"""


def test_a_bitmap_maps_at_most_1_1_bits_a_page():
    npages = 2**30
    done = subprocess.run([sys.executable, "-c", MAPPED, str(npages)], capture_output=True, text=True, check=True)
    cost, count = map(int, done.stdout.split())
    assert count == 0
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
