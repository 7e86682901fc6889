"""DirtyPages: an immutable set of pages, whatever form it is kept in."""

import copy
import pickle
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import dirtylog as dl
from dirtylog import reference

from .strategies import EDGE_SIZES, page_sets, runs_of, sized_page_sets, sizes, words_of


def forms(pages, npages, page_size=4096):
    """The same pages in each form that the core keeps them in: sparse, dense, and dense made from sparse."""
    sparse = dl.DirtyPages.from_indices(sorted(pages), npages, page_size)
    dense = dl.DirtyPages.from_words(words_of(pages, npages), npages, page_size)
    both = dl.DirtyPages.from_indices(sorted(pages), npages, page_size)
    assert both.words is not None
    return sparse, dense, both


@given(sized_page_sets())
def test_every_form_answers_alike(sized):
    npages, pages = sized
    for d in forms(pages, npages):
        assert d.indices().tolist() == sorted(pages)
        assert d.runs().tolist() == runs_of(pages)
        assert (d.count, len(d), d.nbytes, bool(d)) == (len(pages), len(pages), len(pages) * 4096, bool(pages))
        assert list(d) == sorted(pages)
        assert d.words.tolist() == words_of(pages, npages).tolist()
        assert d.to_bytes() == reference.DirtyPages.from_indices(pages, npages).to_bytes()
        assert (d.npages, d.page_size, d.exact) == (npages, 4096, True)


@given(sized_page_sets(2))
def test_set_operations_are_those_of_sets(sized):
    npages, one, other = sized
    for a in forms(one, npages):
        for b in forms(other, npages):
            assert list(a | b) == sorted(one | other)
            assert list(a & b) == sorted(one & other)
            assert list(a - b) == sorted(one - other)
            assert list(a ^ b) == sorted(one ^ other)
            assert (a == b) == (one == other)
            assert (a != b) == (one != other)


@given(sized_page_sets())
def test_equal_pages_hash_alike_in_every_form(sized):
    npages, pages = sized
    made = forms(pages, npages)
    assert len(set(made)) == 1
    assert made[0] == made[1] == made[2]


@given(st.data(), sizes)
def test_membership_is_that_of_the_set(data, npages):
    pages = data.draw(page_sets(npages))
    probes = data.draw(st.lists(st.integers(0, npages - 1), max_size=20))
    for d in forms(pages, npages):
        assert [page in d for page in probes] == [page in pages for page in probes]
        assert npages not in d
        assert -1 not in d
        assert 2**70 not in d


@given(sized_page_sets())
def test_pickle_and_copy_give_equal_pages(sized):
    npages, pages = sized
    for d in forms(pages, npages, 16384):
        for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
            again = pickle.loads(pickle.dumps(d, protocol))
            assert again == d
            assert (again.npages, again.page_size, again.exact) == (npages, 16384, True)
        assert copy.copy(d) == d
        assert copy.deepcopy(d) == d


def test_a_pickle_of_few_pages_is_small():
    d = dl.DirtyPages.from_indices([5, 10**9], 2**30)
    assert len(pickle.dumps(d)) < 1000


@given(sized_page_sets())
def test_bytes_are_little_endian_words_and_come_back(sized):
    npages, pages = sized
    for d in forms(pages, npages):
        data = d.to_bytes()
        assert int.from_bytes(data, "little") == sum(1 << page for page in pages)
        assert dl.DirtyPages.from_bytes(data, npages) == d


@given(sized_page_sets())
def test_runs_come_back_in_any_order_and_overlapping(sized):
    npages, pages = sized
    runs = runs_of(pages)
    assert dl.DirtyPages.from_runs(runs, npages) == dl.DirtyPages.from_indices(sorted(pages), npages)
    halves = [(first, count - count // 2) for first, count in runs] + [tuple(run) for run in reversed(runs)]
    assert dl.DirtyPages.from_runs(halves, npages).runs().tolist() == runs


@given(sized_page_sets(), st.randoms(use_true_random=False))
def test_indices_come_in_any_order_and_more_than_once(sized, random):
    npages, pages = sized
    shuffled = [*pages, *pages]
    random.shuffle(shuffled)
    assert list(dl.DirtyPages.from_indices(shuffled, npages)) == sorted(pages)


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint16, np.uint32, np.uint64])
def test_any_integer_type_numbers_pages(dtype):
    assert dl.DirtyPages.from_indices(np.array([3, 1, 2], dtype=dtype), 100).indices().tolist() == [1, 2, 3]


@pytest.mark.parametrize("npages", EDGE_SIZES)
def test_all_pages_of_an_edge_size(npages):
    d = dl.DirtyPages.from_runs([(0, npages)], npages)
    assert d.count == npages
    assert d.runs().tolist() == [[0, npages]]
    assert len(d.words) == -(-npages // 64)


def test_no_pages_at_all_is_a_set_too():
    empty = dl.DirtyPages.from_indices([], 0)
    assert (len(empty), list(empty), empty.words.size, empty.runs().shape) == (0, [], 0, (0, 2))
    assert empty == dl.DirtyPages.from_bytes(b"", 0)
    assert empty | empty == empty


def test_words_cannot_be_written_nor_made_writable():
    for d in forms({1, 70}, 128):
        with pytest.raises(ValueError, match="read-only"):
            d.words[0] = 7
        with pytest.raises(ValueError, match="WRITEABLE"):
            d.words.flags.writeable = True
        assert memoryview(d.words).readonly


def test_attributes_cannot_be_set():
    d = dl.DirtyPages.from_indices([1], 10)
    for name in ("npages", "page_size", "exact", "count", "nbytes", "words"):
        with pytest.raises(AttributeError):
            setattr(d, name, 1)
    with pytest.raises(AttributeError):
        d.something_new = 1


def test_source_words_and_indices_may_change_afterwards():
    words, pages = np.array([5], np.uint64), np.array([1, 3])
    from_words, from_indices = dl.DirtyPages.from_words(words, 64), dl.DirtyPages.from_indices(pages, 64)
    words[0], pages[0] = 2, 50
    assert list(from_words) == [0, 2]
    assert list(from_indices) == [1, 3]


def test_what_indices_and_runs_return_is_the_callers_own():
    for d in forms({1, 70}, 128):
        d.indices()[:] = 9
        d.runs()[:] = 9
        assert list(d) == [1, 70]


def test_the_words_outlive_their_pages():
    words = dl.DirtyPages.from_indices([1, 70], 128).words
    assert words.tolist() == [2, 64]


def test_exactness_is_that_of_both_operands_and_no_part_of_equality():
    exact = dl.DirtyPages.from_indices([1], 64)
    vague = dl.DirtyPages.from_words(np.array([2], np.uint64), 64, exact=False)
    assert exact == vague
    assert hash(exact) == hash(vague)
    assert not (exact | vague).exact
    assert not (vague & exact).exact
    assert (exact ^ exact).exact
    assert not pickle.loads(pickle.dumps(vague)).exact


def test_sets_over_different_pages_do_not_combine():
    d = dl.DirtyPages.from_indices([1], 64)
    for other in (dl.DirtyPages.from_indices([1], 65), dl.DirtyPages.from_indices([1], 64, page_size=8192)):
        assert d != other
        for combine in (lambda a, b: a | b, lambda a, b: a & b, lambda a, b: a - b, lambda a, b: a ^ b):
            with pytest.raises(ValueError, match="64"):
                combine(d, other)


def test_only_dirty_pages_combine_with_dirty_pages():
    d = dl.DirtyPages.from_indices([1], 64)
    assert d != {1}
    for other in ({1}, np.array([1], np.uint64), 1, None):
        with pytest.raises(TypeError):
            d | other


def test_pages_say_what_they_are():
    assert repr(dl.DirtyPages.from_indices([1, 2], 64)).count("2 of 64 pages") == 1


def test_many_threads_ask_for_words_of_one_set_at_once():
    pages = set(range(0, 32768, 7))
    for _ in range(20):
        d = dl.DirtyPages.from_indices(sorted(pages), 10**6)
        ready = threading.Barrier(4)
        answers = []

        def ask(d=d, ready=ready, answers=answers):
            ready.wait()
            answers.append((d.words.tobytes(), d.count, d.indices().tobytes()))

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(set(answers)) == 1
        assert answers[0][1] == len(pages)


@pytest.mark.parametrize("shape", ["indices", "runs"])
def test_numbers_that_another_thread_changes_meanwhile_are_refused_or_taken_but_never_trusted(shape):
    """A memoryview is read without a copy by numpy: what was checked must be what is used."""
    npages, n = 1 << 20, 1 << 17
    good = np.arange(n) if shape == "indices" else np.stack([np.arange(n), np.ones(n, np.int64)], axis=1)
    owner = good.copy()
    view = memoryview(owner)
    make = getattr(dl.DirtyPages, f"from_{shape}")
    stop = threading.Event()

    def change():
        while not stop.is_set():
            owner[n // 2 :] = 1 << 40
            owner[n // 2 :] = good[n // 2 :]

    thread = threading.Thread(target=change)
    thread.start()
    try:
        for _ in range(30):
            try:
                pages = make(view, npages)
            except IndexError:
                continue
            assert pages.indices().max() < npages
    finally:
        stop.set()
        thread.join()
