"""Bitmaps over memory that others own: mmap, shared memory, numpy; and what is refused (I7, I8)."""

import gc
import mmap
import weakref
from multiprocessing import shared_memory

import numpy as np
import pytest

import dirtylog as dl

NPAGES = 130
NWORDS = 3


def assert_is_live_view(bitmap, read):
    """A mark shows in the memory; what others write there is harvested."""
    bitmap.mark(129)
    assert read() == [0, 0, 2]
    assert bitmap.harvest().indices().tolist() == [129]
    assert read() == [0, 0, 0]


@pytest.mark.parametrize("npages", [NPAGES, 192, 191])
def test_a_bytearray_is_a_bitmap(npages):
    memory = bytearray(NWORDS * 8)
    bitmap = dl.DirtyBitmap.from_buffer(memory, npages)
    assert bitmap.npages == npages
    assert_is_live_view(bitmap, lambda: np.frombuffer(memory, "<u8").tolist())
    memory[0] |= 5
    memory[16] |= 1
    assert bitmap.harvest().indices().tolist() == [0, 2, 128]


def test_anonymous_shared_mapping_is_a_bitmap():
    with mmap.mmap(-1, 4096) as memory:
        bitmap = dl.DirtyBitmap.from_buffer(memory)
        assert bitmap.npages == 4096 * 8
        bitmap.mark(32767)
        assert memory[4095] == 0x80
        assert list(bitmap.harvest()) == [32767]
        with pytest.raises(BufferError):
            memory.close()
        del bitmap


def test_shared_memory_is_a_bitmap_for_two():
    memory = shared_memory.SharedMemory(create=True, size=4096)
    try:
        other = shared_memory.SharedMemory(memory.name)
        marker, harvester = dl.DirtyBitmap.from_buffer(memory.buf), dl.DirtyBitmap.from_buffer(other.buf)
        marker.mark_range(60, 10)
        assert harvester.harvest().runs().tolist() == [[60, 10]]
        assert marker.count() == 0
        del marker, harvester
        gc.collect()
        other.close()
    finally:
        memory.close()
        memory.unlink()


def test_a_numpy_array_is_a_bitmap_and_a_slice_of_one():
    words = np.zeros(10, np.uint64)
    bitmap = dl.DirtyBitmap.from_buffer(words[4:7], NPAGES)
    assert_is_live_view(bitmap, lambda: words[4:7].tolist())
    bitmap.fill()
    assert words.tolist() == [0] * 4 + [2**64 - 1, 2**64 - 1, 3] + [0] * 3


def test_the_bits_that_are_there_already_are_dirty():
    words = np.array([1, 0, 2], np.uint64)
    assert list(dl.DirtyBitmap.from_buffer(words, NPAGES).harvest()) == [0, 129]


def test_the_memory_is_kept_alive_and_let_go():
    words = np.zeros(NWORDS, np.uint64)
    gone = weakref.ref(words)
    bitmap = dl.DirtyBitmap.from_buffer(words, NPAGES)
    del words
    gc.collect()
    bitmap.mark(1)
    assert list(bitmap.harvest()) == [1]
    del bitmap
    gc.collect()
    assert gone() is None


def test_a_bytearray_cannot_be_resized_under_its_bitmap():
    memory = bytearray(NWORDS * 8)
    bitmap = dl.DirtyBitmap.from_buffer(memory)
    with pytest.raises(BufferError):
        memory.extend(b"more")
    assert bitmap.count() == 0


def misaligned():
    return np.zeros(NWORDS * 8 + 8, np.uint8)[1 : NWORDS * 8 + 1]


def read_only():
    words = np.zeros(NWORDS, np.uint64)
    words.flags.writeable = False
    return words


@pytest.mark.parametrize(
    ("buffer", "reason"),
    [
        (misaligned, "multiple of 8"),
        (read_only, "read-only"),
        (lambda: bytes(NWORDS * 8), "read-only"),
        (lambda: np.zeros(NWORDS - 1, np.uint64), "24"),
        (lambda: np.zeros(NWORDS + 1, np.uint64), "24"),
        (lambda: bytearray(NWORDS * 8 - 1), "8"),
        (lambda: np.array([0, 0, 4], np.uint64), "130|129"),
        (lambda: np.array([0, 0, 2**63], np.uint64), "130|129"),
        (lambda: np.zeros(NWORDS * 2, np.uint64)[::2], "contiguous"),
    ],
    ids=[
        "misaligned",
        "read-only array",
        "bytes",
        "too small",
        "too large",
        "not words",
        "bit 130",
        "bit 191",
        "strided",
    ],
)
def test_memory_that_cannot_be_a_bitmap_is_refused_with_the_reason(buffer, reason):
    with pytest.raises(ValueError, match=reason):
        dl.DirtyBitmap.from_buffer(buffer(), NPAGES)


@pytest.mark.parametrize(
    "buffer",
    [np.zeros(NWORDS, np.float64), np.zeros(NWORDS, np.int64), [0, 0, 0], None, 3, "words"],
    ids=["float64", "int64", "list", "None", "int", "str"],
)
def test_what_is_no_buffer_of_words_is_a_wrong_type(buffer):
    with pytest.raises(TypeError):
        dl.DirtyBitmap.from_buffer(buffer, NPAGES)


@pytest.mark.parametrize(
    ("out", "error"),
    [
        (lambda: np.zeros(NWORDS - 1, np.uint64), ValueError),
        (lambda: np.zeros(NWORDS + 1, np.uint64), ValueError),
        (lambda: np.zeros(NWORDS * 2, np.uint64)[::2], ValueError),
        (misaligned, (TypeError, ValueError)),
        (read_only, ValueError),
        (lambda: np.zeros(NWORDS, np.float64), TypeError),
        (lambda: np.zeros(NWORDS, np.int32), TypeError),
        (lambda: [0, 0, 0], TypeError),
        (lambda: 7, TypeError),
    ],
    ids=["short", "long", "strided", "misaligned", "read-only", "float64", "int32", "list", "int"],
)
@pytest.mark.parametrize(
    "make",
    [dl.DirtyBitmap, lambda n: dl.DirtyBitmap.from_buffer(np.zeros(NWORDS, np.uint64), n)],
    ids=["own", "foreign"],
)
def test_a_bad_output_is_refused_before_a_bit_is_cleared(make, out, error):
    bitmap = make(NPAGES)
    bitmap.mark_pages([0, 64, 129])
    with pytest.raises(error):
        bitmap.harvest(out=out())
    assert list(bitmap.harvest()) == [0, 64, 129]


def test_the_bitmaps_own_words_are_no_output():
    words = np.zeros(NWORDS, np.uint64)
    bitmap = dl.DirtyBitmap.from_buffer(words, NPAGES)
    bitmap.mark(5)
    with pytest.raises(ValueError, match="out"):
        bitmap.harvest(out=words)
    assert list(bitmap.harvest()) == [5]


@pytest.mark.parametrize(
    ("out", "error"),
    [
        (lambda words: np.zeros(2, np.uint64), ValueError),
        (lambda words: np.zeros(3, np.float64), TypeError),
        (lambda words: read_only(), ValueError),
        (lambda words: words, ValueError),
        (lambda words: [0, 0, 0], TypeError),
    ],
    ids=["short", "float64", "read-only", "the words themselves", "list"],
)
def test_harvest_words_refuses_a_bad_output_before_a_word_is_cleared(out, error):
    words = np.array([1, 2, 3], np.uint64)
    with pytest.raises(error):
        dl.harvest_words(words, out=out(words))
    assert words.tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (read_only(), ValueError),
        (misaligned(), (TypeError, ValueError)),
        ([1, 2], TypeError),
        (np.zeros(6, np.uint64)[::2], ValueError),
        (None, TypeError),
    ],
    ids=["read-only", "misaligned", "list", "strided", "None"],
)
def test_harvest_words_refuses_words_that_cannot_be_exchanged(words, error):
    with pytest.raises(error):
        dl.harvest_words(words)


@pytest.mark.parametrize("function", [dl.indices, dl.runs, dl.popcount])
def test_reading_functions_take_read_only_words(function):
    words = read_only()
    function(words)


@pytest.mark.parametrize("function", [dl.indices, dl.runs, dl.popcount])
@pytest.mark.parametrize(
    "words", [np.zeros(3), np.zeros(3, np.int32), "abc", None, 5], ids=["float64", "int32", "str", "None", "int"]
)
def test_reading_functions_refuse_what_is_no_words(function, words):
    with pytest.raises(TypeError):
        function(words)


@pytest.mark.parametrize("take", ["harvest", "peek"])
def test_a_scan_that_fills_its_entries_to_the_last_has_room_for_the_part_of_a_line_after_them(take):
    """The scan keeps entries for one word in 16 and a group; the tail of the range comes on top."""
    words = np.zeros(2048, np.uint64)
    scattered = 2048 // 16 + 32
    words[:scattered] = 1
    words[512:1024] = 1
    words[-8:] = 1
    pages = np.flatnonzero(words) * 64
    bitmap = dl.DirtyBitmap.from_buffer(words)
    for _ in range(50):  # an entry written past its block is noticed when the allocator next looks there
        words[pages // 64] = 1
        assert np.array_equal(getattr(bitmap, take)(0, 64 * words.size - 1).indices(), pages)


def test_bits_that_others_set_past_the_last_page_are_not_counted():
    words = np.zeros(2, np.uint64)
    bitmap = dl.DirtyBitmap.from_buffer(words, 70)
    words[:] = [3, 1 << 63 | 1]
    assert bitmap.count() == bitmap.peek().count == 3


def test_pages_harvested_with_a_buffer_are_their_own_and_outlive_what_becomes_of_it():
    bitmap, out = dl.DirtyBitmap(70), np.zeros(2, np.uint64)
    bitmap.mark(69)
    pages = bitmap.harvest(out=out)
    assert dl.indices(out).tolist() == [69]
    out[:] = 2**64 - 1
    assert pages.indices().tolist() == [69]
    merged = dl.DirtyBitmap(70)
    merged.merge(pages)
    assert merged.harvest() == pages


@pytest.mark.parametrize("call", ["mark_range", "clear_range"])
def test_a_range_without_a_count_is_refused(call):
    bitmap = dl.DirtyBitmap(70)
    bitmap.mark(3)
    with pytest.raises(TypeError):
        getattr(bitmap, call)(0, None)
    assert bitmap.harvest().indices().tolist() == [3]
