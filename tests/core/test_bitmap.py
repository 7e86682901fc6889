"""DirtyBitmap: what is marked is harvested, once, and nothing else is."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

import dirtylog as dl
from dirtylog import reference

from .strategies import EDGE_SIZES, page_sets, ranges_of, runs_of, sized_page_sets, sizes, words_of


def own(npages):
    """A bitmap in its own memory, with a summary."""
    return dl.DirtyBitmap(npages)


def foreign(npages):
    """A bitmap over another's memory, without a summary."""
    return dl.DirtyBitmap.from_buffer(np.zeros(-(-npages // 64), np.uint64), npages)


both_kinds = pytest.mark.parametrize("make", [own, foreign])
# Each property is asked of both, and of both once more by the machine at the end: half as many examples each will do.
half = settings(max_examples=settings.default.max_examples // 2 + 1)


def marked(make, npages, pages):
    bitmap = make(npages)
    bitmap.mark_pages(sorted(pages))
    return bitmap


@both_kinds
@pytest.mark.parametrize("npages", EDGE_SIZES)
def test_the_first_and_the_last_page_of_every_edge_size(make, npages):
    bitmap = make(npages)
    bitmap.mark(0)
    bitmap.mark(npages - 1)
    expected = sorted({0, npages - 1})
    assert bitmap.count() == len(expected)
    assert bitmap.peek().indices().tolist() == expected
    assert bitmap.harvest().indices().tolist() == expected
    assert bitmap.count() == 0
    assert not bitmap.harvest()


@both_kinds
@pytest.mark.parametrize("npages", EDGE_SIZES)
def test_fill_marks_every_page_and_no_tail_bit(make, npages):
    bitmap = make(npages)
    bitmap.fill()
    assert bitmap.count() == npages
    assert np.asarray(bitmap).tolist() == words_of(range(npages), npages).tolist()
    assert bitmap.harvest().runs().tolist() == [[0, npages]]
    assert not np.asarray(bitmap).any()


@both_kinds
@half
@given(sized=sized_page_sets())
def test_one_by_one_in_a_batch_in_runs_and_merged_all_mark_the_same(make, sized):
    npages, pages = sized
    one_by_one, batch, runs, merged, merged_words = (make(npages) for _ in range(5))
    for page in pages:
        one_by_one.mark(page)
    batch.mark_pages(sorted(pages, reverse=True))
    for first, count in runs_of(pages):
        runs.mark_range(first, count)
    merged.merge(dl.DirtyPages.from_indices(sorted(pages), npages))
    merged_words.merge(words_of(pages, npages))
    for bitmap in (one_by_one, batch, runs, merged, merged_words):
        assert bitmap.peek().indices().tolist() == sorted(pages)
        assert np.asarray(bitmap).tolist() == words_of(pages, npages).tolist()
        assert bitmap.count() == len(pages)
        assert bitmap.harvest().indices().tolist() == sorted(pages)
        assert not bitmap.harvest()


@both_kinds
@half
@given(data=st.data(), sized=sized_page_sets())
def test_a_harvest_of_a_range_takes_that_range_alone(make, data, sized):
    npages, pages = sized
    first, count = data.draw(ranges_of(npages))
    bitmap = marked(make, npages, pages)
    inside = {page for page in pages if first <= page < first + count}
    assert set(bitmap.peek(first, count)) == inside
    assert bitmap.count() == len(pages)
    taken = bitmap.harvest(first, count)
    assert set(taken) == inside
    assert taken.npages == npages
    assert set(bitmap.harvest()) == pages - inside


@both_kinds
@pytest.mark.parametrize("base", [0, 448, 32768 - 64], ids=["first words", "across a line", "across a group"])
def test_every_range_of_two_words_is_marked_harvested_and_cleared_exactly(make, base):
    npages = base + 128
    everything = list(range(base, npages))
    bitmap = make(npages)
    for first in range(base, npages):
        for count in range(npages - first + 1):
            inside = everything[first - base : first - base + count]
            outside = everything[: first - base] + everything[first - base + count :]
            bitmap.mark_range(first, count)
            assert bitmap.harvest().indices().tolist() == inside
            bitmap.mark_range(base, 128)
            assert bitmap.harvest(first, count).indices().tolist() == inside
            assert bitmap.harvest().indices().tolist() == outside
            bitmap.mark_range(base, 128)
            bitmap.clear_range(first, count)
            assert bitmap.harvest().indices().tolist() == outside


@both_kinds
@half
@given(data=st.data(), sized=sized_page_sets(2))
def test_clear_is_and_not(make, data, sized):
    npages, pages, other = sized
    first, count = data.draw(ranges_of(npages))
    bitmap = marked(make, npages, pages)
    bitmap.clear(dl.DirtyPages.from_indices(sorted(other), npages))
    left = pages - other
    assert set(bitmap.peek()) == left
    bitmap.clear_range(first, count)
    assert set(bitmap.harvest()) == left - set(range(first, first + count))


@both_kinds
@half
@given(data=st.data(), npages=sizes)
def test_merge_shifts_by_the_first_page(make, data, npages):
    first, count = data.draw(ranges_of(npages))
    pages = data.draw(page_sets(count)) if count else set()
    for dirty in (
        dl.DirtyPages.from_indices(sorted(pages), count),
        dl.DirtyPages.from_words(words_of(pages, count), count),
    ):
        bitmap = make(npages)
        bitmap.merge(dirty, first)
        assert bitmap.harvest().indices().tolist() == [page + first for page in sorted(pages)]


@both_kinds
@half
@given(sized=sized_page_sets(2))
def test_merge_keeps_what_was_dirty(make, sized):
    npages, pages, other = sized
    bitmap = marked(make, npages, pages)
    bitmap.merge(dl.DirtyPages.from_indices(sorted(other), npages))
    assert set(bitmap.harvest()) == pages | other


@both_kinds
@half
@given(sized=sized_page_sets())
def test_is_dirty_is_membership(make, sized):
    npages, pages = sized
    bitmap = marked(make, npages, pages)
    probes = sorted({0, npages - 1, npages // 2, *list(pages)[:20]})
    assert [bitmap.is_dirty(page) for page in probes] == [page in pages for page in probes]


@both_kinds
@half
@given(sized=sized_page_sets())
def test_the_harvest_is_that_of_the_reference(make, sized):
    npages, pages = sized
    twin = marked(reference.DirtyBitmap, npages, pages).harvest()
    taken = marked(make, npages, pages).harvest()
    assert taken.words.tolist() == list(twin.words)
    assert taken.runs().tolist() == [list(run) for run in twin.runs()]
    assert taken.to_bytes() == twin.to_bytes()


@both_kinds
@half
@given(data=st.data(), sized=sized_page_sets())
def test_out_receives_every_word_zeros_too(make, data, sized):
    npages, pages = sized
    first, count = data.draw(ranges_of(npages))
    bitmap = marked(make, npages, pages)
    out = np.full(-(-npages // 64), 2**64 - 1, np.uint64)
    inside = {page for page in pages if first <= page < first + count}
    taken = bitmap.harvest(first, count, out=out)
    assert set(taken) == inside
    assert out.tolist() == words_of(inside, npages).tolist()
    assert not np.shares_memory(taken.words, out)
    assert set(bitmap.harvest(out=out)) == pages - inside


@both_kinds
def test_a_page_is_its_bit_of_its_word_whatever_marks_it(make):
    for page in range(200):
        bitmap = make(200)
        bitmap.mark(page)
        assert np.asarray(bitmap).tolist() == [(1 << page) >> (64 * word) & (2**64 - 1) for word in range(4)]


@both_kinds
def test_the_live_words_are_a_view_and_read_only(make):
    bitmap = make(128)
    words = np.asarray(bitmap)
    bitmap.mark(65)
    assert words.tolist() == [0, 2]
    with pytest.raises(ValueError, match="read-only"):
        words[0] = 1
    with pytest.raises(ValueError, match="WRITEABLE"):
        words.flags.writeable = True
    assert np.shares_memory(words, np.asarray(bitmap))


def test_the_live_words_outlive_the_bitmap():
    words = np.asarray(marked(own, 128, [65]))
    assert words.tolist() == [0, 2]


@both_kinds
def test_a_harvest_does_not_change_afterwards(make):
    bitmap = marked(make, 1000, [5, 999])
    for ask in (bitmap.peek, bitmap.harvest):
        before = ask()
        bitmap.mark(6)
        assert list(before) == [5, 999]
        bitmap.clear_range(6, 1)


@both_kinds
def test_a_batch_is_any_integer_array_like(make):
    for pages in (
        [3, 1, 3],
        (3, 1),
        range(1, 4, 2),
        np.array([[3], [1]], np.uint16),
        np.array([1, 3], ">i4"),
        np.array([9, 3, 9, 1])[1::2],
        iter_of_array(3, 1),
    ):
        bitmap = make(100)
        bitmap.mark_pages(pages)
        assert list(bitmap.harvest()) == [1, 3]
    bitmap.mark_pages([])
    bitmap.mark_pages(np.array([], np.int64))
    assert not bitmap.harvest()


FEW = 64  # pages that a call marks at once; more take another way


@both_kinds
@pytest.mark.parametrize("kind", [list, tuple, np.array])
@pytest.mark.parametrize("count", [1, FEW - 1, FEW, FEW + 1, 1000])
def test_every_page_of_a_batch_is_marked_however_long_it_is(make, kind, count):
    pages = [7 * i for i in range(count)]
    bitmap = make(7000)
    bitmap.mark_pages(kind(pages))
    assert list(bitmap.harvest()) == pages


@both_kinds
@pytest.mark.parametrize("kind", [list, tuple, np.array])
@pytest.mark.parametrize("bad", [-1, 7000, 2**62])
@pytest.mark.parametrize("at", [0, FEW - 1, FEW, 900])
def test_a_bad_page_of_a_batch_is_named_and_none_is_marked(make, kind, bad, at):
    pages = [*range(at), bad, *range(5)]
    bitmap = make(7000)
    with pytest.raises(IndexError, match=rf"page {bad} \(element {at}\) is out of range; pages are 0 to 6999"):
        bitmap.mark_pages(kind(pages))
    assert not bitmap.harvest()


@pytest.mark.parametrize(
    ("pages", "error"),
    [
        ([2**63], IndexError),
        ([1, 2**64], IndexError),
        ((1, -(2**70)), IndexError),
        ([1, 2.0], TypeError),
        ([True, False], TypeError),
        (["1"], TypeError),
        ([None], TypeError),
        ([[1, 2], [3]], ValueError),
        (np.array([1.0]), TypeError),
        (np.array([True]), TypeError),
        (np.array(["1"]), TypeError),
        (np.array([1], object), IndexError),
        (np.array([1], "m8[s]"), TypeError),
    ],
)
def test_a_batch_of_anything_else_is_refused_and_none_is_marked(pages, error):
    bitmap = own(100)
    with pytest.raises(error):
        bitmap.mark_pages(pages)
    assert not bitmap.harvest()


def test_a_batch_may_hold_ints_of_every_kind():
    bitmap = own(100)
    bitmap.mark_pages([[1, 2], [3, 4]])
    bitmap.mark_pages([np.int8(5), 6, True])
    bitmap.mark_pages([np.uint64(7)])
    bitmap.mark_pages(np.array([8, 9]).astype(">i8"))
    bitmap.mark_pages(np.array([[10, 11], [12, 13]]).T)
    bitmap.mark_pages(np.array(14))
    assert list(bitmap.harvest()) == list(range(1, 15))


def _misaligned(numbers):
    memory = np.zeros(8 * len(numbers) + 1, np.uint8)
    array = memory[1:].view(np.int64)
    array[:] = numbers
    return array


def _read_only(numbers):
    array = np.array(numbers)
    array.flags.writeable = False
    return array


class _Subclass(np.ndarray):
    pass


@pytest.mark.parametrize(
    "lay",
    [
        np.array,
        _misaligned,
        _read_only,
        lambda numbers: np.array(numbers).view(_Subclass),
        lambda numbers: np.repeat(numbers, 2)[::2],
        lambda numbers: np.array(numbers[::-1])[::-1],
        lambda numbers: np.array([numbers]),
        lambda numbers: np.array(numbers, "q"),
        lambda numbers: np.array(numbers).astype(">i8"),
        lambda numbers: np.array(numbers, np.uint64),
    ],
)
@pytest.mark.parametrize("count", [0, 1, 8, FEW, FEW + 1])
def test_an_array_of_pages_may_lie_in_memory_in_any_way(lay, count):
    bitmap = own(7000)
    numbers = np.arange(0, 7 * count, 7)
    bitmap.mark_pages(lay(numbers))
    assert list(bitmap.harvest()) == numbers.tolist()


@both_kinds
@pytest.mark.parametrize("npages", [1, 64, 512, 2**15, 2**15 + 1, 2**18, 2**25])
def test_harvests_that_find_nothing_hand_out_one_answer(make, npages):
    bitmap = make(npages)
    nothing = bitmap.harvest()
    assert (nothing.npages, nothing.page_size, nothing.exact, nothing.count) == (npages, 4096, True, 0)
    assert nothing == dl.DirtyPages.from_indices([], npages)
    assert nothing.indices().shape == (0,)
    assert nothing.runs().shape == (0, 2)
    assert not nothing.words.any()
    bitmap.mark(npages - 1)
    assert list(bitmap.harvest()) == [npages - 1]
    assert bitmap.harvest() == nothing
    if make is own or npages % 64 == 0:
        assert bitmap.harvest() is nothing
        assert bitmap.peek() is nothing


@both_kinds
@given(npages=st.sampled_from([700, 40_000]), data=st.data())
def test_a_range_that_is_clean_hides_nothing_outside_it(make, npages, data):
    first = data.draw(st.integers(0, npages))
    count = data.draw(st.integers(0, npages - first))
    page = data.draw(st.integers(0, npages - 1))
    bitmap = marked(make, npages, [page])
    found = bitmap.harvest(first, count)
    assert list(found) == [page] * (first <= page < first + count)
    assert len(bitmap.harvest()) + len(found) == 1


def iter_of_array(*pages):
    """An object that only `numpy.asarray` understands."""

    class ArrayLike:
        def __array__(self, dtype=None, copy=None):
            return np.array(pages, dtype)

    return ArrayLike()


def test_a_batch_of_unsigned_numbers_past_int64_is_out_of_range_not_wrapped():
    bitmap = own(100)
    with pytest.raises(IndexError):
        bitmap.mark_pages(np.array([1, 2**64 - 1], np.uint64))
    assert bitmap.count() == 0


@both_kinds
def test_no_pages_at_all_is_a_bitmap_too(make):
    bitmap = make(0)
    bitmap.fill()
    bitmap.mark_pages([])
    bitmap.mark_range(0, 0)
    assert (bitmap.count(), len(bitmap.harvest()), np.asarray(bitmap).size) == (0, 0, 0)


@pytest.mark.parametrize("page_size", [512, 4096, 16384, 65536, 2**21])
def test_the_page_size_goes_with_the_pages(page_size):
    bitmap = dl.DirtyBitmap(10, page_size)
    bitmap.mark(3)
    taken = bitmap.harvest()
    assert (bitmap.page_size, taken.page_size, taken.nbytes) == (page_size, page_size, page_size)


def test_a_summary_of_many_groups_finds_one_page_in_each():
    npages = 2**24 + 5
    bitmap = own(npages)
    pages = sorted({*range(0, npages, 32768 + 513), npages - 1})
    bitmap.mark_pages(pages)
    assert bitmap.count() == len(pages)
    assert bitmap.harvest().indices().tolist() == pages
    assert bitmap.count() == 0


class BitmapAgainstSet(RuleBasedStateMachine):
    """Any sequence of operations on a bitmap and on a set of integers."""

    @initialize(npages=sizes, make=st.sampled_from([own, foreign]))
    def start(self, npages, make):
        self.npages = npages
        self.bitmap = make(npages)
        self.pages = set()

    def some_range(self, data):
        first, count = data.draw(ranges_of(self.npages))
        return first, count, set(range(first, first + count))

    @rule(data=st.data())
    def mark(self, data):
        page = data.draw(st.integers(0, self.npages - 1))
        self.bitmap.mark(page)
        self.pages.add(page)

    @rule(data=st.data())
    def mark_range(self, data):
        first, count, inside = self.some_range(data)
        self.bitmap.mark_range(first, count)
        self.pages |= inside

    @rule(data=st.data())
    def mark_pages(self, data):
        pages = data.draw(page_sets(self.npages))
        self.bitmap.mark_pages(list(pages))
        self.pages |= pages

    @rule(data=st.data())
    def merge(self, data):
        pages = data.draw(page_sets(self.npages))
        self.bitmap.merge(dl.DirtyPages.from_indices(list(pages), self.npages))
        self.pages |= pages

    @rule()
    def fill(self):
        self.bitmap.fill()
        self.pages = set(range(self.npages))

    @rule(data=st.data())
    def clear(self, data):
        pages = data.draw(page_sets(self.npages))
        self.bitmap.clear(dl.DirtyPages.from_indices(list(pages), self.npages))
        self.pages -= pages

    @rule(data=st.data())
    def clear_range(self, data):
        first, count, inside = self.some_range(data)
        self.bitmap.clear_range(first, count)
        self.pages -= inside

    @rule(data=st.data())
    def harvest(self, data):
        first, count, inside = self.some_range(data)
        assert set(self.bitmap.harvest(first, count)) == self.pages & inside
        self.pages -= inside

    @rule()
    def harvest_all(self):
        assert set(self.bitmap.harvest()) == self.pages
        self.pages = set()

    @rule()
    def refused_operations_change_nothing(self):
        for refused in (
            lambda: self.bitmap.mark(self.npages),
            lambda: self.bitmap.mark_range(0, self.npages + 1),
            lambda: self.bitmap.mark_pages([0, self.npages]),
            lambda: self.bitmap.harvest(0, self.npages + 1),
            lambda: self.bitmap.clear_range(1, self.npages),
        ):
            with pytest.raises(IndexError):
                refused()

    @invariant()
    def holds_the_same(self):
        if hasattr(self, "bitmap"):
            assert self.bitmap.count() == len(self.pages)
            assert np.array_equal(np.asarray(self.bitmap), words_of(self.pages, self.npages))


# Hypothesis parses source files for its reports, which CPython 3.11 cannot do in several threads at once.
TestAnySequenceOfOperationsIsThatOfASet = pytest.mark.thread_unsafe(reason="hypothesis parses source files")(
    BitmapAgainstSet.TestCase
)
