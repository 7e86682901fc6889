"""A thousand rounds of open and close leave nothing behind."""

import mmap

import numpy as np
import pytest

import dirtylog as dl
from dirtylog.sources.memory import _tracking

from ..leaks import assert_nothing_leaks, descriptors

PAGE = mmap.PAGESIZE


def track_and_close(count, backend):
    array = dl.empty((64, PAGE), np.uint8)
    array[:] = 7
    for number in range(count):
        with dl.track(array, backend) as one, dl.track(array[10:], backend) as two:
            array[number % 64] = number % 250
            one.harvest()
            two.peek()


def test_a_thousand_trackers_leave_no_descriptor_mapping_thread_or_memory(backend, sanitized):
    assert_nothing_leaks(track_and_close, backend, memory=not sanitized)


def test_the_last_tracker_takes_the_process_wide_descriptors_along():
    if refusal := _tracking.probe("userfaultfd"):
        pytest.skip(f"userfaultfd: {refusal}")
    array = dl.zeros(PAGE, "u1")
    before = descriptors()
    with dl.track(array, "userfaultfd"), dl.track(array, "userfaultfd"):
        assert (descriptors() - before).total() == 2
        assert _tracking.open_spans("userfaultfd") == 2
    assert not descriptors() - before


def make_and_forget(count):
    for _ in range(count):
        dl.zeros(3 << 20, "u1")[0] = 1


def test_a_thousand_arrays_leave_no_mapping(sanitized):
    assert_nothing_leaks(make_and_forget, memory=not sanitized)


def fail_to_track(count, backend):
    with mmap.mmap(-1, PAGE) as memory:
        reading = memoryview(memory).toreadonly()
        for _ in range(count):
            with pytest.raises(OSError, match=r"mprotect|UFFDIO_REGISTER"):
                _tracking.Span(backend, 1 << 46, 4, PAGE)
        reading.release()
    assert _tracking.open_spans(backend) == 0


def test_a_thousand_failed_trackers_leave_nothing(backend, sanitized):
    if backend == "compare":
        pytest.skip("compare cannot be refused by the system")
    assert_nothing_leaks(fail_to_track, backend, memory=not sanitized)
