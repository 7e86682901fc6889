"""Bitmaps so large that a top bit stands for each line of their summary: every operation, above and below its spans."""

import ctypes
import random
import sys
from pathlib import Path

import numpy as np
import pytest

import dirtylog as dl

SPAN = 1 << 18  # pages of a line of the summary
# From here on a bitmap has a top; a span that is not full, whose last line is not either.
LARGE = (1 << 26) + SPAN // 2 + 5


def test_no_write_is_lost_and_none_is_late_whatever_comes_between_two_accesses(c_program):
    assert c_program(Path(__file__).with_name("interleaved.c")) == (0, "")


def test_a_bitmap_has_a_top_where_its_summary_is_large():
    words = (1 << 26) // 64
    assert sys.getsizeof(dl.DirtyBitmap(1 << 26)) - sys.getsizeof(dl.DirtyBitmap(0)) == 8 * (words + words // 512 + 4)
    words -= 8
    assert sys.getsizeof(dl.DirtyBitmap((1 << 26) - 512)) - sys.getsizeof(dl.DirtyBitmap(0)) == 8 * (words + 2048)


def edges():
    """Pages at the edges of spans, of words of the top (64 spans), of the bitmap."""
    near = {SPAN * n + step for n in (0, 1, 2, 63, 64, 65, 128, 200, 256) for step in (-513, -1, 0, 1, 512)}
    return sorted({page for page in near if 0 <= page < LARGE} | {LARGE - 1, LARGE - 6, LARGE - 513})


def test_a_page_at_any_edge_is_counted_seen_and_harvested_once():
    bitmap = dl.DirtyBitmap(LARGE)
    for page in edges():
        bitmap.mark(page)
        assert bitmap.count() == 1
        assert bitmap.peek().indices().tolist() == [page]
        assert bitmap.harvest().indices().tolist() == [page]
        assert (bitmap.count(), bitmap.harvest().count) == (0, 0)


def test_a_range_over_spans_is_harvested_whole():
    bitmap = dl.DirtyBitmap(LARGE)
    for first, end in ((SPAN - 1, SPAN + 1), (0, LARGE), (SPAN * 63 + 70, SPAN * 65), (LARGE - SPAN, LARGE)):
        bitmap.mark_range(first, end - first)
        assert bitmap.count() == end - first
        assert bitmap.harvest().runs().tolist() == [[first, end - first]]
        assert not bitmap.harvest()


@pytest.mark.parametrize(
    ("first", "end"),
    [
        (0, 512),
        (SPAN, 2 * SPAN),
        (SPAN, 2 * SPAN + 512),
        (SPAN - 512, 2 * SPAN),
        (70, LARGE),
        (SPAN * 62 + 512, SPAN * 130),
        (SPAN * 64, LARGE),
        (0, LARGE - 6),
        (SPAN * 256, LARGE),
        (SPAN * 256 + 1024, LARGE),
    ],
)
def test_a_harvest_of_a_part_leaves_the_rest_to_the_next_one(first, end):
    bitmap = dl.DirtyBitmap(LARGE)
    pages = np.array(edges())
    for take in (bitmap.harvest, bitmap.peek):
        bitmap.mark_pages(pages)
        inside = (pages >= first) & (pages < end)
        assert take(first, end - first).indices().tolist() == pages[inside].tolist()
        left = pages[~inside] if take == bitmap.harvest else pages
        assert bitmap.count() == left.size
        assert bitmap.harvest().indices().tolist() == left.tolist()


def harvest_span_by_span(bitmap):
    """By halves, none of which may take the top bit of its span: harvests of parts, which leave all of them."""
    for first in range(0, LARGE, SPAN // 2):
        bitmap.harvest(first, min(SPAN // 2, LARGE - first))


@pytest.mark.parametrize("page", [None, 0, SPAN * 70 + 1, LARGE - 1])
def test_a_harvest_of_everything_after_many_of_parts_finds_what_there_is_and_no_more(page):
    """The top bits of all spans are left; more of them than are looked below while holding the GIL."""
    bitmap = dl.DirtyBitmap(LARGE)
    nothing = bitmap.harvest()
    bitmap.mark_pages(np.arange(0, LARGE, SPAN // 2))
    harvest_span_by_span(bitmap)
    assert bitmap.count() == 0
    assert bitmap.peek().count == 0
    if page is not None:
        bitmap.mark(page)
        assert bitmap.peek().indices().tolist() == [page]
        assert bitmap.harvest().indices().tolist() == [page]
    assert bitmap.harvest() is nothing
    assert bitmap.harvest() is nothing


class Levels(ctypes.Structure):
    """``struct dl_bitmap``, from inside: nothing else tells what a harvest has to read."""

    _fields_ = (
        ("words", ctypes.c_void_p),
        ("summary", ctypes.c_void_p),
        ("npages", ctypes.c_uint64),
        ("top", ctypes.POINTER(ctypes.c_uint64)),
    )


class Api(ctypes.Structure):
    """As far as this needs it, ``struct dirtylog_api``."""

    _fields_ = (
        ("version", ctypes.c_uint32),
        ("size", ctypes.c_uint32),
        ("bitmap", ctypes.PYFUNCTYPE(ctypes.POINTER(Levels), ctypes.py_object)),
    )


def top_bits(bitmap):
    """Count the lines of the summary that the next harvest looks at."""
    pointer = ctypes.PYFUNCTYPE(ctypes.POINTER(Api), ctypes.py_object, ctypes.c_char_p)
    api = pointer(("PyCapsule_GetPointer", ctypes.pythonapi))(dl._C_API, b"dirtylog._C_API")
    levels = api.contents.bitmap(bitmap).contents
    assert levels.npages == bitmap.npages
    return sum(word.bit_count() for word in levels.top[: -(-bitmap.npages // (64 * SPAN))])


HARVESTS = {
    "pages": lambda bitmap: bitmap.harvest(),
    "by range": lambda bitmap: bitmap.harvest(0, LARGE),
    "words": lambda bitmap: bitmap.harvest(out=np.zeros(-(-LARGE // 64), np.uint64)),
    "quiescent": lambda bitmap: bitmap.harvest(quiescent=True),
}


@pytest.mark.parametrize("harvest", HARVESTS)
@pytest.mark.parametrize("page", [None, SPAN * 70 + 1])
def test_top_bits_that_harvests_of_parts_have_left_are_taken_by_the_next_of_everything(harvest, page):
    """Those that follow read the top alone again, and nothing of the summary."""
    bitmap = dl.DirtyBitmap(LARGE)
    bitmap.mark_pages(np.arange(0, LARGE, SPAN // 2))
    spans = -(-LARGE // SPAN)
    assert top_bits(bitmap) == spans
    harvest_span_by_span(bitmap)
    assert bitmap.count() == bitmap.peek().count == 0
    assert top_bits(bitmap) == spans
    if page is not None:
        bitmap.mark(page)
    assert HARVESTS[harvest](bitmap).count == (page is not None)
    assert top_bits(bitmap) == 0


def test_more_groups_than_are_taken_without_asking_for_memory():
    bitmap = dl.DirtyBitmap(LARGE)
    pages = np.arange(0, LARGE, 1 << 15)  # one in each group: as many as there are
    for first, end in ((0, LARGE), (SPAN * 3, LARGE), (513, LARGE - 513)):
        bitmap.mark_pages(pages)
        inside = (pages >= first) & (pages < end)
        assert np.array_equal(bitmap.harvest(first, end - first).indices(), pages[inside])
        assert np.array_equal(bitmap.harvest().indices(), pages[~inside])


@pytest.mark.parametrize("seed", range(4))
def test_any_sequence_of_operations_does_what_a_set_of_pages_does(seed):
    draw = random.Random(seed)
    bitmap, dirty = dl.DirtyBitmap(LARGE), set()
    near = edges()

    def some_page():
        return draw.choice(near) if draw.random() < 0.7 else draw.randrange(LARGE)

    def some_range():
        first, end = sorted((some_page(), some_page() + draw.choice((0, 1, 512))))
        return first, min(end, LARGE)

    for _ in range(300):
        kind = draw.randrange(8)
        first, end = some_range()
        inside = {page for page in dirty if first <= page < end}
        if kind < 2:
            pages = [some_page() for _ in range(draw.choice((1, 3, 40)))]
            bitmap.mark_pages(pages)
            dirty.update(pages)
        elif kind == 2:
            bitmap.mark(some := some_page())
            dirty.add(some)
        elif kind == 3:
            end = min(first + draw.choice((1, 64, 700)), LARGE)
            bitmap.mark_range(first, end - first)
            dirty.update(range(first, end))
        elif kind == 4:
            assert bitmap.peek(first, end - first).indices().tolist() == sorted(inside)
        elif kind == 5:
            assert bitmap.harvest(first, end - first).indices().tolist() == sorted(inside)
            dirty -= inside
        elif kind == 6:
            bitmap.clear_range(first, end - first)
            dirty -= inside
        else:
            assert bitmap.harvest(quiescent=draw.random() < 0.5).indices().tolist() == sorted(dirty)
            dirty.clear()
        assert bitmap.count() == len(dirty)
    assert bitmap.harvest().indices().tolist() == sorted(dirty)
