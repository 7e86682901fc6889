"""A harvest while nobody marks gives what an ordinary one gives, in every form, and loses as little when it fails."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import dirtylog as dl

from .strategies import EDGE_SIZES, ranges_of, sized_page_sets

KINDS = ["own", "foreign"]


def pair(kind, npages, pages):
    """Two bitmaps with the same marks."""
    made = []
    for _ in range(2):
        words = np.zeros(-(-npages // 64), np.uint64)
        bitmap = dl.DirtyBitmap(npages) if kind == "own" else dl.DirtyBitmap.from_buffer(words, npages)
        bitmap.merge(pages)
        made.append(bitmap)
    return made


def check_equal(kind, npages, pages, *span):
    """Harvest both ways, and compare all that can be asked of an answer, and what is left."""
    ordinary, quiescent = pair(kind, npages, pages)
    outs = np.full((2, -(-npages // 64)), 7, np.uint64)
    expected, found = ordinary.harvest(*span, out=outs[0]), quiescent.harvest(*span, out=outs[1], quiescent=True)
    assert found == expected
    assert found.exact
    assert (found.count, len(found), bool(found)) == (expected.count, len(expected), bool(expected))
    assert np.array_equal(found.indices(), expected.indices())
    assert np.array_equal(found.runs(), expected.runs())
    assert np.array_equal(found.words, expected.words)
    assert found.to_bytes() == expected.to_bytes()
    assert np.array_equal(*outs)
    assert np.array_equal(quiescent, ordinary)
    assert quiescent.harvest(quiescent=True) == ordinary.harvest()
    # Nothing is left behind under a summary that has been taken, and what is marked next is found.
    assert not np.asarray(quiescent).any()
    quiescent.mark(npages - 1)
    assert quiescent.harvest(quiescent=True).indices().tolist() == [npages - 1]
    assert not quiescent.harvest(quiescent=True)


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data(), sized=sized_page_sets())
def test_any_pages_and_any_range(kind, data, sized):
    npages, pages = sized
    check_equal(kind, npages, dl.DirtyPages.from_indices(sorted(pages), npages))
    check_equal(kind, npages, dl.DirtyPages.from_indices(sorted(pages), npages), *data.draw(ranges_of(npages)))


# Lines that are dirty all over, in part, in one word; a part of the lines, and all of them.
PATTERNS = {
    "all": lambda page: page >= 0,
    "every other page": lambda page: page % 2 == 0,
    "three words of each line": lambda page: page % 512 < 192,
    "every other line": lambda page: page // 512 % 2 == 0,
    "one line in four": lambda page: page // 512 % 4 == 3,
    "one page of a group": lambda page: page % 32768 == 77,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("npages", [*EDGE_SIZES, 3 * 32768 + 4097])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_density_in_every_size(kind, npages, pattern):
    pages = dl.DirtyPages.from_indices(np.flatnonzero(PATTERNS[pattern](np.arange(npages))), npages)
    check_equal(kind, npages, pages)
    check_equal(kind, npages, pages, npages // 3, npages // 2)
    check_equal(kind, npages, pages, npages // 1024 * 512)


def test_words_of_somebody_else():
    for words in (np.zeros(19, np.uint64), np.full(19, 2**64 - 1, np.uint64), np.arange(19, dtype=np.uint64) % 3):
        expected, out = words.copy(), np.full(19, 7, np.uint64)
        assert dl.harvest_words(words, out, quiescent=True) is out
        assert np.array_equal(out, expected)
        assert not words.any()


def test_a_shared_log():
    with dl.SharedLog.create(1000) as log:
        log.mark_range(3, 900)
        assert log.harvest(10, quiescent=True).runs().tolist() == [[10, 893]]
        assert log.harvest(quiescent=True).runs().tolist() == [[3, 7]]


def test_a_bad_output_is_refused_before_a_bit_is_cleared():
    bitmap = dl.DirtyBitmap(100)
    bitmap.fill()
    with pytest.raises(ValueError, match="3 words"):
        bitmap.harvest(out=np.zeros(3, np.uint64), quiescent=True)
    with pytest.raises(TypeError):
        bitmap.harvest(0, None, None, True)
    assert bitmap.harvest().count == 100


def test_the_promise_is_not_about_those_who_look():
    bitmap = dl.DirtyBitmap(4096)
    bitmap.fill()
    view = np.asarray(bitmap)
    assert bitmap.harvest(quiescent=True).count == 4096
    assert not view.any()
    bitmap.mark(65)
    assert view[1] == 2
