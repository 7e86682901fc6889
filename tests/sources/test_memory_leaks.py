"""A thousand rounds of open and close leave nothing behind."""

import mmap
import os
import threading
from pathlib import Path

import numpy as np
import pytest

import dirtylog as dl
from dirtylog.sources.memory import _tracking

PAGE = mmap.PAGESIZE


def resources():
    """Descriptors, mappings, threads and resident pages of this process."""
    try:
        descriptors = len(os.listdir("/proc/self/fd"))
        mappings = len(Path("/proc/self/maps").read_bytes().splitlines())
        resident = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError as error:
        pytest.skip(f"/proc/self: {error}")
    return descriptors, mappings, threading.active_count(), resident


def test_a_thousand_trackers_leave_no_descriptor_mapping_thread_or_memory(backend, sanitized):
    array = dl.empty((64, PAGE), np.uint8)
    array[:] = 7

    def rounds(count):
        for number in range(count):
            with dl.track(array, backend) as one, dl.track(array[10:], backend) as two:
                array[number % 64] = number % 250
                one.harvest()
                two.peek()

    rounds(50)
    before = resources()
    rounds(1000)
    after = resources()
    assert after[0] == before[0]
    # The allocator may take or give back an arena; a mapping a round would be a thousand.
    assert after[1] <= before[1] + 5
    assert after[2] == before[2]
    # Pages: one a round would be a thousand; the kernel may make one huge page of 512 meanwhile.
    # A sanitizer keeps what was freed, to see it used; it reports what was not freed.
    if not sanitized:
        assert after[3] < before[3] + 1000


def test_the_last_tracker_takes_the_process_wide_descriptors_along():
    if refusal := _tracking.probe("userfaultfd"):
        pytest.skip(f"userfaultfd: {refusal}")
    array = dl.zeros(PAGE, "u1")
    before = set(os.listdir("/proc/self/fd"))
    with dl.track(array, "userfaultfd"), dl.track(array, "userfaultfd"):
        assert len(set(os.listdir("/proc/self/fd")) - before) == 2
        assert _tracking.open_spans("userfaultfd") == 2
    assert set(os.listdir("/proc/self/fd")) == before


def test_a_thousand_arrays_leave_no_mapping():
    before = resources()
    for _ in range(1000):
        dl.zeros(3 << 20, "u1")[0] = 1
    after = resources()
    assert after[1] <= before[1] + 5
    assert after[3] <= before[3] + 2048


def test_a_thousand_failed_trackers_leave_nothing(backend):
    if backend == "compare":
        pytest.skip("compare cannot be refused by the system")
    with mmap.mmap(-1, PAGE) as memory:
        reading = memoryview(memory).toreadonly()
        before = resources()
        for _ in range(1000):
            with pytest.raises(OSError, match=r"mprotect|UFFDIO_REGISTER"):
                _tracking.Span(backend, 1 << 46, 4, PAGE)
        assert resources()[:3] == before[:3]
        assert _tracking.open_spans(backend) == 0
        reading.release()
