"""The pure-Python twin against sets of integers: an oracle must be right itself."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dirtylog import reference

from .core.strategies import EDGE_SIZES, ranges_of, runs_of, sized_page_sets


@given(sized_page_sets())
def test_words_give_back_the_pages_that_were_marked(sized):
    npages, pages = sized
    words = [0] * reference.words_for(npages)
    for page in pages:
        reference.mark(words, page)
    assert reference.indices(words) == sorted(pages)
    assert reference.popcount(words) == len(pages)
    assert [list(run) for run in reference.runs(words)] == runs_of(pages)
    snapshot = list(words)
    assert reference.harvest_words(words) == snapshot
    assert not any(words)


@pytest.mark.parametrize("first", range(128))
def test_a_range_is_each_of_its_pages(first):
    for count in range(129 - first):
        words = [0, 0]
        reference.mark_range(words, first, count)
        assert reference.indices(words) == list(range(first, first + count))
        full = [reference.ALL_PAGES] * 2
        reference.clear_range(full, first, count)
        assert reference.indices(full) == [page for page in range(128) if not first <= page < first + count]


@pytest.mark.parametrize("npages", EDGE_SIZES)
def test_the_tail_mask_has_a_bit_for_each_page_of_the_last_word(npages):
    last_word = range((npages - 1) // 64 * 64, npages)
    assert reference.tail_mask(npages).bit_count() == len(last_word)
    assert reference.tail_mask(npages) & 1


@given(st.integers(1, 2**64 - 1))
def test_ffs_and_fls_find_the_ends_of_the_mask(mask):
    assert 1 << reference.ffs(mask) == mask & -mask
    assert 2 << reference.fls(mask) > mask >= 1 << reference.fls(mask)


@given(st.integers(0, 1000), st.integers(1, 2**64 - 1))
def test_arm_write_protects_from_the_first_to_the_last_page_that_x86_does(word, mask):
    pages = reference.write_protect_pages(word, mask)
    assert reference.write_protect_range(word, mask) == (pages[0], pages[-1] + 1)
    assert [page // 64 for page in pages] == [word] * mask.bit_count()


@given(st.data(), sized_page_sets())
def test_a_harvest_of_a_range_takes_that_range_alone(data, sized):
    npages, pages = sized
    first, count = data.draw(ranges_of(npages))
    bitmap = reference.DirtyBitmap(npages)
    bitmap.mark_pages(pages)
    inside = {page for page in pages if first <= page < first + count}
    assert set(bitmap.peek(first, count)) == inside
    assert set(bitmap.harvest(first, count)) == inside
    assert set(bitmap.peek()) == pages - inside


@given(sized_page_sets(2))
def test_set_operations_are_those_of_sets(sized):
    npages, one, other = sized
    a, b = (reference.DirtyPages.from_indices(pages, npages) for pages in (one, other))
    assert [set(x) for x in (a | b, a & b, a - b, a ^ b)] == [one | other, one & other, one - other, one ^ other]
    assert (a == b) == (one == other)
    assert reference.DirtyPages.from_runs(a.runs(), npages) == a
    assert reference.DirtyPages.from_bytes(a.to_bytes(), npages) == a
