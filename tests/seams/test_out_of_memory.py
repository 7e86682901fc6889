"""I5: where memory ends in the middle of a harvest, its pages are in that answer or in the next one."""

import contextlib
import functools
import gc
import operator
import warnings

import pytest

import dirtylog as dl
from dirtylog._bits.owed import Owed, take_all

_testcapi = pytest.importorskip("_testcapi", reason="this Python has no way to let allocations fail")

pytestmark = pytest.mark.thread_unsafe(reason="allocations fail for every thread")
PAGE = 4096
NPAGES = 6400
# So many answers in a row, and no allocation was left to fail: some failures cost the answer nothing.
IN_A_ROW = 8


def pages(*numbers, npages=NPAGES):
    return dl.DirtyPages.from_indices(numbers, npages)


@contextlib.contextmanager
def failing(n):
    """Let the n-th allocation of Python objects fail, and no other."""
    _testcapi.set_nomemory(n, n + 1)
    try:
        yield
    finally:
        _testcapi.remove_mem_hooks()


@pytest.fixture(autouse=True)
def _nothing_to_reuse():
    """Hold what free lists keep for the next answer, or an answer would need no allocation."""
    # Nor may an allocation here collect the garbage of other tests: memory would end in their finalizers.
    # First, because what they held goes into the free lists.
    gc.collect()
    gc.disable()
    bitmap = dl.DirtyBitmap(NPAGES)
    held = []
    for _ in range(64):
        bitmap.mark(0)  # what found nothing is one object for all
        held.append(bitmap.harvest())
    yield
    gc.enable()
    held.clear()


def check(mark, take, numbers):
    """Fail each allocation of `take` in turn: what `mark` has marked is in this answer or in the next."""
    failed = answered = n = 0
    kept = []
    while answered < IN_A_ROW:
        mark()
        first = None
        with contextlib.suppress(MemoryError), failing(n):
            first = take()
        failed += first is None
        answered = 0 if first is None else answered + 1
        n += 1
        second, third = take(), take()
        kept += [first, second, third]  # or the next answer would be made of what these were
        assert (second if first is None else first | second).indices().tolist() == numbers, n
        assert not third
    assert failed


@pytest.mark.parametrize("npages", [64, NPAGES, 1 << 20])
def test_in_a_harvest_of_a_bitmap(npages):
    bitmap = dl.DirtyBitmap(npages)
    check(functools.partial(bitmap.mark_pages, [0, 5, npages - 1]), bitmap.harvest, [0, 5, npages - 1])


@pytest.mark.parametrize("count", [3, NPAGES])
def test_in_a_harvest_of_a_shared_log(count):
    with dl.SharedLog.create(NPAGES) as log:
        check(functools.partial(log.mark_range, 0, count), log.harvest, list(range(count)))


@pytest.mark.parametrize("backend", ["userfaultfd", "mprotect", "compare"])
@pytest.mark.parametrize("owed", [(), (2,)])
def test_in_a_harvest_of_a_tracker(backend, owed):
    array = dl.zeros(3 * PAGE, "uint8")
    with dl.track(array, backend) as tracker:

        def mark():
            array[PAGE] += 1
            if owed:
                tracker._owed.owe(pages(*owed, npages=3))

        check(mark, tracker.harvest, [1, *owed])


def test_where_what_is_owed_is_joined():
    bitmap, owed = dl.DirtyBitmap(NPAGES), Owed(NPAGES)

    def mark():
        bitmap.mark(5)
        owed.owe(pages(3))

    check(mark, functools.partial(owed.take, bitmap.harvest), [3, 5])


def test_where_several_sources_are_taken():
    bitmaps = [dl.DirtyBitmap(NPAGES) for _ in range(3)]
    requests = [(key, Owed(NPAGES), bitmap.harvest) for key, bitmap in enumerate(bitmaps)]

    def mark():
        for key, bitmap in enumerate(bitmaps):
            bitmap.mark(key)

    answered = n = 0
    while answered < IN_A_ROW:
        mark()
        answers = {}
        with contextlib.suppress(MemoryError), failing(n):
            answers = take_all(requests)
        answered = answered + 1 if answers else 0
        n += 1
        got = [*answers.values(), *take_all(requests).values()]
        assert functools.reduce(operator.or_, got).indices().tolist() == [0, 1, 2], n


def test_in_a_collect_of_a_log():
    array = dl.zeros(3 * PAGE, "uint8")
    bitmap, log = dl.DirtyBitmap(NPAGES), dl.DirtyLog()
    with dl.track(array) as tracker, warnings.catch_warnings():
        # Of a source whose harvest failed everything is reported, with a warning.
        warnings.simplefilter("ignore", dl.IncompleteLogWarning)
        log.attach(bitmap)
        log.attach(tracker, NPAGES)
        observer = log.observer("backup")
        answered = n = 0
        while answered < IN_A_ROW:
            bitmap.mark_pages([3, 6399])
            array[PAGE] += 1
            first, answered, n = None, answered + 1, n + 1
            try:
                epoch = observer.collect()
                with failing(n - 1), epoch:
                    first = epoch.pages
            except MemoryError:
                answered = 0
                # The block may have begun, and is rolled back then; or it has ended.
                # Or it was to begin next, and the way out is the one that the observer's error names.
                if observer.epoch is not None:
                    observer.epoch.rollback()
            with observer.collect() as epoch:
                got = epoch.pages if first is None else first | epoch.pages
            assert not pages(3, 6399, NPAGES + 1, npages=NPAGES + 3) - got, n
