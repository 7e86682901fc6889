"""The drop-in functions on words, against `dirtylog.reference` and numpy."""

import array

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import dirtylog as dl
from dirtylog import reference

from .strategies import EDGE_SIZES, runs_of, sized_page_sets, words_of

word_lists = st.lists(st.one_of(st.just(0), st.just(2**64 - 1), st.integers(0, 2**64 - 1)), max_size=80)


@given(word_lists)
def test_extraction_is_that_of_the_reference(words):
    array_of_words = np.array(words, dtype=np.uint64)
    assert dl.indices(array_of_words).tolist() == reference.indices(words)
    assert dl.runs(array_of_words).tolist() == [list(run) for run in reference.runs(words)]
    assert dl.popcount(array_of_words) == reference.popcount(words)


@given(word_lists)
def test_harvested_words_are_returned_and_left_zero(words):
    array_of_words = np.array(words, dtype=np.uint64)
    taken = dl.harvest_words(array_of_words)
    assert taken.dtype == np.uint64
    assert taken.tolist() == words
    assert not array_of_words.any()


@pytest.mark.parametrize("npages", EDGE_SIZES)
def test_every_page_of_an_edge_size_is_found(npages):
    everything = words_of(range(npages), npages)
    assert dl.indices(everything).tolist() == list(range(npages))
    assert dl.runs(everything).tolist() == [[0, npages]]
    assert dl.popcount(everything) == npages


def test_results_have_the_documented_shapes_and_types():
    for words in (np.zeros(0, np.uint64), np.zeros(5, np.uint64), np.full(5, 3, np.uint64)):
        assert dl.indices(words).dtype == np.int64
        assert dl.indices(words).ndim == 1
        assert dl.runs(words).dtype == np.int64
        assert dl.runs(words).shape[1:] == (2,)


@pytest.mark.parametrize("offset", range(64))
def test_one_bit_anywhere_in_three_words_is_found(offset):
    for word in range(3):
        words = np.zeros(3, np.uint64)
        words[word] = 1 << offset
        page = 64 * word + offset
        assert dl.indices(words).tolist() == [page]
        assert dl.runs(words).tolist() == [[page, 1]]


def test_a_run_of_every_length_at_every_offset_of_two_words_is_one_run():
    for first in range(128):
        for count in range(1, 129 - first):
            words = words_of(range(first, first + count), 128)
            assert dl.runs(words).tolist() == [[first, count]]
            assert dl.indices(words).tolist() == list(range(first, first + count))


@given(sized_page_sets())
def test_runs_cross_words_and_cache_lines(sized):
    npages, pages = sized
    assert dl.runs(words_of(pages, npages)).tolist() == runs_of(pages)


def test_the_output_array_is_filled_and_returned():
    words = np.array([1, 0, 7], dtype=np.uint64)
    out = np.full(3, 99, dtype=np.uint64)
    assert dl.harvest_words(words, out=out) is out
    assert out.tolist() == [1, 0, 7]
    assert words.tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    "make",
    [
        lambda words: array.array("Q", words),
        lambda words: bytearray(np.array(words, np.uint64).tobytes()),
        lambda words: memoryview(bytearray(np.array(words, np.uint64).tobytes())).cast("Q"),
    ],
    ids=["array", "bytearray", "memoryview"],
)
def test_words_may_come_from_any_buffer_of_64_bit_words_or_their_bytes(make):
    words = make([5, 0, 2**63])
    assert dl.harvest_words(words).tolist() == [5, 0, 2**63]
    assert not any(memoryview(words).cast("B"))


@pytest.mark.parametrize("function", [dl.ffs, dl.fls])
def test_ffs_and_fls_of_every_single_bit_is_its_number(function):
    assert [function(1 << bit) for bit in range(64)] == list(range(64))


@given(st.integers(1, 2**64 - 1))
def test_ffs_and_fls_are_those_of_the_reference(mask):
    assert (dl.ffs(mask), dl.fls(mask)) == (reference.ffs(mask), reference.fls(mask))


@pytest.mark.parametrize("function", [dl.ffs, dl.fls])
@pytest.mark.parametrize("mask", [0, np.uint64(0)])
def test_ffs_and_fls_refuse_zero(function, mask):
    with pytest.raises(ValueError, match="0"):
        function(mask)


@pytest.mark.parametrize("function", [dl.ffs, dl.fls])
@pytest.mark.parametrize(
    ("mask", "error"),
    [(-1, (ValueError, OverflowError)), (2**64, (ValueError, OverflowError)), (1.0, TypeError), ("1", TypeError)],
)
def test_ffs_and_fls_refuse_what_is_no_64_bit_mask(function, mask, error):
    with pytest.raises(error):
        function(mask)
