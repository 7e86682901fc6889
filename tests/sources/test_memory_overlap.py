"""Several trackers of the same memory: each sees every write."""

import mmap
import random
import sys
import threading

import numpy as np
import pytest

import dirtylog as dl
from dirtylog.sources.memory import BACKENDS, _tracking

PAGE = mmap.PAGESIZE


def pages(npages):
    array = dl.empty((npages, PAGE), np.uint8)
    array[:] = 7
    return array


def dirty(tracker):
    return tracker.harvest().indices().tolist()


def test_each_of_two_trackers_of_one_array_sees_a_write(backend):
    array = pages(8)
    with dl.track(array, backend) as one, dl.track(array, backend) as two:
        array[3] = 1
        assert two.peek().indices().tolist() == [3]
        assert dirty(one) == [3]
        assert two.peek().indices().tolist() == [3]
        assert dirty(two) == [3]
        assert (dirty(one), dirty(two)) == ([], [])


def test_a_second_tracker_starts_clean_without_cleaning_the_first(backend):
    array = pages(8)
    with dl.track(array, backend) as one:
        array[2] = 1
        with dl.track(array, backend) as two:
            array[5] = 1
            assert dirty(two) == [5]
        assert dirty(one) == [2, 5]


def test_closing_one_tracker_leaves_the_other_tracking(backend):
    array = pages(200)
    left, right = dl.track(array[:128], backend), dl.track(array[64:], backend)
    with right:
        array[[10, 70]] = 1
        left.close()
        array[[11, 71, 130]] = 1
        assert dirty(right) == [6, 7, 66]
        array[[64, 199]] = 2
        assert dirty(right) == [0, 135]


def test_trackers_that_overlap_in_part_number_pages_each_from_its_own_start(backend):
    array = pages(300)
    spans = [(0, 300), (0, 64), (63, 66), (100, 230), (299, 300)]
    trackers = [dl.track(array[first:end], backend) for first, end in spans]
    written = [0, 63, 64, 65, 128, 229, 230, 299]
    array[written] = 1
    for tracker, (first, end) in zip(trackers, spans, strict=True):
        assert dirty(tracker) == [page - first for page in written if first <= page < end]
        assert dirty(tracker) == []
        tracker.close()


def test_trackers_of_different_back_ends_do_not_disturb_one_another():
    for name in ("userfaultfd", "mprotect"):
        if refusal := _tracking.probe(name):
            pytest.skip(f"{name}: {refusal}")
    array = pages(20)
    trackers = [dl.track(array, name) for name in BACKENDS]
    for page in (3, 4, 19):
        array[page] += 1
        assert [dirty(tracker) for tracker in trackers] == [[page]] * 3
    for tracker in trackers:
        tracker.close()


def test_random_trackers_writes_and_harvests_agree_with_sets(backend):
    """The oracle: a set of pages a tracker, and every written page added to each."""
    choose = random.Random(20260)
    array = pages(150)
    trackers = []
    for step in range(400):
        action = choose.random()
        if action < 0.1 and len(trackers) < 6:
            first = choose.randrange(150)
            end = choose.randrange(first + 1, 151)
            trackers.append((dl.track(array[first:end], backend), first, end, set()))
        elif action < 0.15 and trackers:
            trackers.pop(choose.randrange(len(trackers)))[0].close()
        elif action < 0.4 and trackers:
            tracker, first, _, expected = choose.choice(trackers)
            assert {first + page for page in tracker.peek()} == expected
            assert {first + page for page in tracker.harvest()} == expected
            expected.clear()
        else:
            first = choose.randrange(150)
            count = choose.choice([1, 1, 1, 3, 70])
            array[first : first + count] = step % 251 + 1 if array[first, 0] != step % 251 + 1 else 0
            if backend == "compare":
                array[first : first + count, choose.randrange(PAGE)] ^= 255
            for _, start, end, expected in trackers:
                expected.update(page for page in range(first, min(first + count, 150)) if start <= page < end)
    for tracker, first, _, expected in trackers:
        found = {first + page for page in tracker.harvest()}
        # Compare is blind to content that came back; it may not invent any.
        assert found <= expected if backend == "compare" else found == expected
        tracker.close()


@pytest.fixture
def eager_threads():
    """Threads change hands often, so that harvests really run beside one another."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("eager_threads")
def test_harvests_of_two_trackers_at_once_lose_nothing_for_either(backend):
    if backend == "compare":
        pytest.skip("each compare tracker has a copy of its own and shares nothing")
    npages = 256
    array = dl.zeros((npages, PAGE // 8), np.uint64)
    written = [0]
    late = []

    def consume(tracker):
        """What was written before a harvest began is in the tracker's copy after it, or newer."""
        seen = np.zeros(npages, np.uint64)
        for _ in range(400):
            floor = written[0]
            found = tracker.harvest().indices()
            seen[found] = array[found, 0]
            if int(seen[floor % npages]) < floor:
                late.append((floor, int(seen[floor % npages])))

    with dl.track(array, backend) as one, dl.track(array, backend) as two:
        threads = [threading.Thread(target=consume, args=(tracker,)) for tracker in (one, two)]
        for thread in threads:
            thread.start()
        number = 0
        while any(thread.is_alive() for thread in threads):
            number += 1
            array[number % npages, 0] = number
            written[0] = number
        for thread in threads:
            thread.join()
    assert late == []
