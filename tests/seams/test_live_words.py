"""Words that others write while page numbers and runs are read from them, and batches that are not aligned."""

import threading

import numpy as np
import pytest

import dirtylog as dl


def misaligned(values, dtype):
    raw = np.zeros(8 * len(values) + 1, np.uint8)
    array = raw[1:].view(dtype)
    array[:] = values
    assert not array.flags.aligned
    return array


@pytest.mark.parametrize("density", [0.0, 0.01, 0.5, 1.0])
@pytest.mark.parametrize("nwords", [0, 1, 511, 512, 513, 5000])
def test_page_numbers_and_runs_of_foreign_words_are_those_of_a_set(nwords, density):
    random = np.random.default_rng(nwords)
    bits = random.random(64 * nwords) < density
    words = np.packbits(bits, bitorder="little").view(np.uint64)
    pages = dl.DirtyPages.from_words(words, 64 * nwords)
    assert np.array_equal(dl.indices(words), np.flatnonzero(bits))
    assert np.array_equal(dl.runs(words), pages.runs())
    assert dl.runs(words).shape == pages.runs().shape


@pytest.mark.parametrize("density", [0.2, 0.3, 0.5, 0.7, 0.99, 1.0])
def test_runs_keep_no_memory_that_they_do_not_need(density):
    """Half of all pages, at random, need just what a guess by the word gives, and as often as not a little more."""
    for seed in range(8):
        bits = np.random.default_rng(seed).random(64 * 4096) < density
        runs = dl.runs(np.packbits(bits, bitorder="little").view(np.uint64))
        memory = runs
        while memory.base is not None:
            memory = memory.base
        assert memory.nbytes < 1.4 * runs.nbytes


def test_a_page_that_is_set_all_the_time_is_never_missed_while_others_come_and_go():
    npages = 1 << 18
    bitmap = dl.DirtyBitmap(npages)
    bitmap.mark(npages - 1)
    live = np.asarray(bitmap)
    early = np.arange(0, npages // 4, 64)
    stop = threading.Event()

    def come_and_go():
        while not stop.is_set():
            bitmap.mark_pages(early)
            bitmap.clear_range(0, npages // 4)

    thread = threading.Thread(target=come_and_go)
    thread.start()
    try:
        for _ in range(300):
            indices, runs = dl.indices(live), dl.runs(live)
            assert indices[-1] == npages - 1
            assert runs[-1].tolist() == [npages - 1, 1]
            # No two pages that are ever set are neighbours, whatever moment each word was read at.
            assert (runs[:, 1] == 1).all()
            assert (np.diff(indices) > 0).all()
    finally:
        stop.set()
        thread.join()


@pytest.mark.parametrize("take", ["mark_pages", "from_indices", "from_runs"])
def test_page_numbers_that_are_not_aligned_are_copied_first(take):
    """I8: each is loaded atomically."""
    if take == "from_runs":
        runs = misaligned([5, 2], np.int64).reshape(1, 2)
        assert dl.DirtyPages.from_runs(runs, 64).indices().tolist() == [5, 6]
        return
    numbers = misaligned([3, 9], np.int64)
    if take == "from_indices":
        assert dl.DirtyPages.from_indices(numbers, 64).indices().tolist() == [3, 9]
        return
    bitmap = dl.DirtyBitmap(64)
    bitmap.mark_pages(numbers)
    assert bitmap.harvest().indices().tolist() == [3, 9]


def test_an_aligned_array_is_not_copied_and_a_misaligned_one_is():
    from dirtylog._bits.pages import integer_array

    aligned = np.arange(4)
    assert integer_array(aligned, "pages") is aligned
    assert integer_array(misaligned([1, 2], np.int64), "pages").flags.aligned
