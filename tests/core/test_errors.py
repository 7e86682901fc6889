"""What the core refuses: the right exception, a message with value and bound, and nothing half-done."""

import contextlib
import pickle
import subprocess
import sys

import numpy as np
import pytest

import dirtylog as dl

NPAGES = 100
HUGE = 2**70


def bitmap_with(*pages):
    bitmap = dl.DirtyBitmap(NPAGES)
    bitmap.mark_pages(list(pages))
    return bitmap


@pytest.mark.parametrize("page", [NPAGES, -1, -NPAGES, HUGE, -HUGE, np.int64(NPAGES), np.uint64(2**64 - 1)])
@pytest.mark.parametrize("method", ["mark", "is_dirty"])
def test_a_page_out_of_range_is_an_index_error_and_negative_numbers_do_not_wrap(method, page):
    bitmap = bitmap_with(7)
    with pytest.raises(IndexError) as caught:
        getattr(bitmap, method)(page)
    assert str(int(page)) in str(caught.value)
    assert str(NPAGES - 1) in str(caught.value)
    assert list(bitmap.harvest()) == [7]


@pytest.mark.parametrize("page", [1.0, "1", None, [1], np.float64(1)])
@pytest.mark.parametrize("method", ["mark", "is_dirty"])
def test_a_page_that_is_no_integer_is_a_type_error(method, page):
    bitmap = bitmap_with(7)
    with pytest.raises(TypeError):
        getattr(bitmap, method)(page)
    assert list(bitmap.harvest()) == [7]


@pytest.mark.parametrize("method", ["mark_range", "clear_range", "harvest", "peek"])
@pytest.mark.parametrize(
    ("first", "count", "error"),
    [
        (NPAGES, 1, IndexError),
        (NPAGES + 1, 0, IndexError),
        (0, NPAGES + 1, IndexError),
        (NPAGES - 1, 2, IndexError),
        (-1, 1, IndexError),
        (-1, 0, IndexError),
        (0, HUGE, IndexError),
        (HUGE, 1, IndexError),
        (1, 2**63 - 1, IndexError),
        (1, 2**64 - 1, IndexError),
        (5, -1, ValueError),
        (1.0, 1, TypeError),
        (1, 1.0, TypeError),
        ("1", 1, TypeError),
        (None, 1, TypeError),
    ],
)
def test_a_range_that_reaches_out_is_refused_whole(method, first, count, error):
    bitmap = bitmap_with(0, 99)
    with pytest.raises(error):
        getattr(bitmap, method)(first, count)
    assert list(bitmap.harvest()) == [0, 99]


@pytest.mark.parametrize(
    ("pages", "error"),
    [
        ([1, 2, NPAGES], IndexError),
        ([1, 2, -1], IndexError),
        ([1, HUGE], IndexError),
        (np.array([1, NPAGES], np.uint8), IndexError),
        (np.array([1, 2**64 - 1], np.uint64), IndexError),
        ([1.0, 2.0], TypeError),
        (np.array([1.0]), TypeError),
        ([True, False], TypeError),
        (np.ones(NPAGES, bool), TypeError),
        (["1"], TypeError),
        ("12", TypeError),
        (None, TypeError),
        ([1, None], TypeError),
        ({1, 2}, TypeError),
        ([1, 2j], TypeError),
        (np.array(["2024-01-01"], "datetime64[D]"), TypeError),
        (np.array([1], "timedelta64[s]"), TypeError),
    ],
    ids=str,
)
def test_a_bad_batch_marks_no_page_of_it(pages, error):
    bitmap = bitmap_with(50)
    with pytest.raises(error):
        bitmap.mark_pages(pages)
    assert list(bitmap.harvest()) == [50]


def test_a_ragged_batch_is_refused():
    bitmap = bitmap_with(50)
    with pytest.raises((TypeError, ValueError)):
        bitmap.mark_pages([[1], [2, 3]])
    assert list(bitmap.harvest()) == [50]


def test_the_message_of_a_bad_batch_names_the_page_and_the_bound():
    with pytest.raises(IndexError, match=r"-5.*99"):
        bitmap_with().mark_pages([1, -5])


@pytest.mark.parametrize("npages", [-1, 2**53, 2**63, HUGE])
def test_a_size_out_of_bounds_is_a_value_error(npages):
    with pytest.raises(ValueError, match="npages"):
        dl.DirtyBitmap(npages)


@pytest.mark.parametrize("page_size", [0, -4096, 3, 4095, 12288, HUGE + 1])
def test_a_page_size_that_is_no_power_of_two_is_a_value_error(page_size):
    for make in (
        lambda: dl.DirtyBitmap(NPAGES, page_size),
        lambda: dl.DirtyBitmap.from_buffer(bytearray(16), 100, page_size),
        lambda: dl.DirtyPages.from_indices([1], NPAGES, page_size),
        lambda: dl.DirtyPages.from_words(np.zeros(2, np.uint64), NPAGES, page_size),
        lambda: dl.DirtyPages.from_runs([(1, 1)], NPAGES, page_size),
        lambda: dl.DirtyPages.from_bytes(bytes(16), NPAGES, page_size),
    ):
        with pytest.raises(ValueError, match="page_size"):
            make()


@pytest.mark.parametrize("wrong", [3.0, "3", None, [3]])
def test_a_size_that_is_no_integer_is_a_type_error(wrong):
    for make in (
        lambda: dl.DirtyBitmap(wrong),
        lambda: dl.DirtyBitmap(NPAGES, wrong),
        lambda: dl.DirtyPages.from_indices([1], wrong),
        lambda: dl.DirtyPages.from_words(np.zeros(2, np.uint64), wrong),
        lambda: dl.DirtyPages.from_bytes(bytes(16), wrong),
    ):
        with pytest.raises(TypeError):
            make()


def test_memory_that_cannot_be_had_is_a_memory_error():
    with pytest.raises(MemoryError, match="bytes"):
        dl.DirtyBitmap(2**52)


OUT_OF_MEMORY = """
import resource, sys
import numpy as np
import dirtylog as dl

npages = 2**28
if sys.argv[1] == "own":
    bitmap = dl.DirtyBitmap(npages)
else:
    bitmap = dl.DirtyBitmap.from_buffer(np.zeros(npages // 64, np.uint64))
bitmap.fill()
with open("/proc/self/statm") as statm:
    used = int(statm.read().split()[0]) * resource.getpagesize()
before = resource.getrlimit(resource.RLIMIT_AS)
# Enough for the entries of a sparse result (4 MiB), and not for the words of a dense one (32 MiB).
resource.setrlimit(resource.RLIMIT_AS, (used + (8 << 20), before[1]))
try:
    bitmap.harvest(quiescent=sys.argv[2] == "quiescent")
except MemoryError:
    resource.setrlimit(resource.RLIMIT_AS, before)
    print(bitmap.harvest().count == npages)
"""


@pytest.mark.parametrize(("memory", "how"), [("own", "ordinary"), ("own", "quiescent"), ("foreign", "ordinary")])
@pytest.mark.usefixtures("bounded")
def test_a_harvest_that_finds_no_memory_for_its_answer_has_taken_nothing(memory, how):
    done = subprocess.run(
        [sys.executable, "-c", OUT_OF_MEMORY, memory, how], capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.stdout, done.stderr) == ("True\n", "")


@pytest.mark.parametrize(
    ("dirty", "error"),
    [
        (dl.DirtyPages.from_indices([1], NPAGES + 1), (IndexError, ValueError)),
        (dl.DirtyPages.from_indices([1], NPAGES, 8192), ValueError),
        (np.zeros(1, np.uint64), ValueError),
        (np.zeros(3, np.uint64), ValueError),
        (np.array([0, 1 << 36], np.uint64), ValueError),
        (np.zeros(2, np.int64), TypeError),
        (np.zeros(2), TypeError),
        ([0, 0], TypeError),
        ("words", TypeError),
        (None, TypeError),
        (3, (TypeError, ValueError)),
    ],
    ids=["too many pages", "page size", "short", "long", "bit 100", "int64", "float", "list", "str", "None", "int"],
)
@pytest.mark.parametrize("method", ["merge", "clear"])
def test_pages_of_another_shape_are_neither_merged_nor_cleared(method, dirty, error):
    bitmap = bitmap_with(1, 99)
    with pytest.raises(error):
        getattr(bitmap, method)(dirty)
    assert list(bitmap.harvest()) == [1, 99]


@pytest.mark.parametrize("first_page", [-1, 1, HUGE])
def test_a_merge_that_reaches_out_is_refused_whole(first_page):
    bitmap = bitmap_with(7)
    with pytest.raises(IndexError):
        bitmap.merge(dl.DirtyPages.from_indices([0], NPAGES), first_page)
    assert list(bitmap.harvest()) == [7]


@pytest.mark.parametrize(
    ("words", "npages", "error"),
    [
        (np.zeros(1, np.uint64), 100, ValueError),
        (np.zeros(3, np.uint64), 100, ValueError),
        (np.array([0, 1 << 36], np.uint64), 100, ValueError),
        (np.zeros((2, 1), np.uint64), 100, ValueError),
        (np.zeros(2, np.int64), 100, TypeError),
        (np.zeros(2), 100, TypeError),
        (None, 100, TypeError),
    ],
    ids=["short", "long", "bit 100", "two-dimensional", "int64", "float", "None"],
)
def test_words_that_are_no_bitmap_of_these_pages_are_refused(words, npages, error):
    with pytest.raises(error):
        dl.DirtyPages.from_words(words, npages)


@pytest.mark.parametrize(
    ("pages", "error"),
    [
        ([100], IndexError),
        ([-1], IndexError),
        ([HUGE], IndexError),
        ([1.5], TypeError),
        (np.ones(3, bool), TypeError),
        ("7", TypeError),
    ],
    ids=str,
)
def test_indices_that_are_no_pages_are_refused(pages, error):
    with pytest.raises(error):
        dl.DirtyPages.from_indices(pages, 100)


@pytest.mark.parametrize(
    ("runs", "error"),
    [
        ([(99, 2)], IndexError),
        ([(-1, 2)], IndexError),
        ([(0, 2**63 - 1)], IndexError),
        ([(2**63 - 1, 2**63 - 1)], IndexError),
        ([(5, -1)], ValueError),
        ([(1, 2, 3)], ValueError),
        ([1, 2], ValueError),
        ([(1.0, 2.0)], TypeError),
    ],
    ids=str,
)
def test_runs_that_are_no_ranges_of_pages_are_refused(runs, error):
    with pytest.raises(error):
        dl.DirtyPages.from_runs(runs, 100)


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (bytes(8), ValueError),
        (bytes(24), ValueError),
        (bytes(15), ValueError),
        (bytes(15) + b"\x80", ValueError),
        ("text", TypeError),
        (None, TypeError),
        (16, TypeError),
    ],
    ids=["short", "long", "no words", "bit 127", "str", "None", "int"],
)
def test_bytes_that_are_no_bitmap_of_these_pages_are_refused(data, error):
    with pytest.raises(error):
        dl.DirtyPages.from_bytes(data, 100)


@pytest.mark.parametrize("page", ["x", 1.5, None, [1]])
def test_what_is_no_integer_is_never_a_dirty_page(page):
    with pytest.raises(TypeError):
        dl.DirtyPages.from_indices([1], 100).__contains__(page)


def test_dirty_pages_have_no_constructor_and_no_subclasses():
    with pytest.raises(TypeError, match="from_words"):
        dl.DirtyPages()
    with pytest.raises(TypeError):
        type("Mine", (dl.DirtyPages,), {})
    with pytest.raises(TypeError):
        type("Mine", (dl.DirtyBitmap,), {})


def test_a_bitmap_that_was_never_made_is_refused_not_crashed():
    bare = dl.DirtyBitmap.__new__(dl.DirtyBitmap)
    for use in (lambda: bare.mark(0), bare.harvest, bare.peek, bare.count, bare.fill, lambda: np.asarray(bare)):
        with contextlib.suppress(IndexError, TypeError, ValueError, RuntimeError, BufferError):
            use()


def test_dirty_pages_that_were_never_made_hold_nothing_or_are_refused():
    bare = dl.DirtyPages.__new__(dl.DirtyPages)
    for use in (bare.indices, bare.runs, bare.to_bytes, lambda: bare.words, lambda: len(bare), lambda: bare | bare):
        with contextlib.suppress(TypeError, ValueError, AttributeError, RuntimeError):
            assert len(use()) == 0


def test_a_live_bitmap_is_neither_pickled_nor_hashed_by_its_bits():
    bitmap = bitmap_with(1)
    with pytest.raises(TypeError):
        pickle.dumps(bitmap)
    assert hash(bitmap) == hash(bitmap)


def test_a_forged_pickle_is_checked_like_any_foreign_data():
    *_, (npages, page_size, exact, *_) = dl.DirtyPages.from_indices([1], 100).__reduce__()
    word = (1 << 40).to_bytes(8, "little")
    for numbers, masks, words in (
        ((5).to_bytes(8, "little"), word, None),
        ((1).to_bytes(8, "little"), word, None),
        (bytes(8), bytes(8), None),
        (bytes(16), word + word, None),
        (bytes(8), word[:4], None),
        (None, None, word + word),
        (None, None, word),
    ):
        with pytest.raises((ValueError, TypeError)):
            dl.DirtyPages.__new__(dl.DirtyPages).__setstate__((npages, page_size, exact, numbers, masks, words))


def test_setstate_does_not_change_pages_that_are_there():
    pages = dl.DirtyPages.from_indices([1], 100)
    *_, state = dl.DirtyPages.from_indices([2], 100).__reduce__()
    with pytest.raises(TypeError, match="never change"):
        pages.__setstate__(state)
    assert pages.indices().tolist() == [1]


def test_backend_unavailable_says_what_was_probed_and_survives_a_pickle():
    error = dl.BackendUnavailable("userfaultfd", "ioctl(UFFDIO_API): EINVAL", "use backend='compare'")
    assert str(error) == "userfaultfd is not available here: ioctl(UFFDIO_API): EINVAL; use backend='compare'"
    assert isinstance(error, dl.DirtyLogError)
    again = pickle.loads(pickle.dumps(error))
    assert (again.facility, again.probed, again.instead) == (error.facility, error.probed, error.instead)
    assert str(dl.BackendUnavailable("x", "y")) == "x is not available here: y"
