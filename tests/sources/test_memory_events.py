"""What the kernel reports as written, event by event, through userfaultfd."""

import ctypes
import errno
import mmap
import os
import subprocess
import sys

import numpy as np
import pytest

import dirtylog as dl
from dirtylog.sources.memory import _tracking

PAGE = mmap.PAGESIZE
HUGE = 2 << 20
REFUSAL = _tracking.probe("userfaultfd")
pytestmark = pytest.mark.skipif(bool(REFUSAL), reason=f"userfaultfd: {REFUSAL}")

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = libc.mremap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
libc.mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
READ, WRITE, FIXED, MAYMOVE = 1, 2, 0x10, 1


def check(result):
    if result in (-1, ctypes.c_void_p(-1).value):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


@pytest.fixture
def array():
    array = dl.empty((8, PAGE), np.uint8)
    array[:] = 7
    return array


@pytest.fixture
def tracker(array):
    with dl.track(array, "userfaultfd") as tracker:
        yield tracker


def address(array, page=0):
    return array.ctypes.data + page * PAGE


def dirty(tracker):
    return tracker.harvest().indices().tolist()


class Foreign:
    """Memory that Python does not know of, so that it can be moved under a tracker."""

    def __init__(self, npages):
        self.size = npages * PAGE
        self.address = check(libc.mmap(None, self.size, READ | WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0))
        self.buffer = (ctypes.c_char * self.size).from_address(self.address)


@pytest.fixture
def foreign():
    memory = Foreign(8)
    yield memory
    libc.munmap(memory.address, memory.size)


def test_a_read_fault_is_clean():
    array = dl.zeros((8, PAGE), np.uint8)
    with dl.track(array, "userfaultfd") as tracker:
        assert int(array[:, 0].sum()) == 0
        assert dirty(tracker) == []
        array[3, 0] = 1
        assert dirty(tracker) == [3]


def test_the_same_value_written_again_is_written(array, tracker):
    array[2, 5] = array[2, 5]
    assert dirty(tracker) == [2]


def test_a_read_system_call_into_it_is_written(array, tracker):
    with open("/dev/zero", "rb", buffering=0) as zero:
        assert zero.readinto(memoryview(array[4:6]).cast("B")) == 2 * PAGE
    assert dirty(tracker) == [4, 5]


def test_a_write_from_another_process_is_written(array, tracker):
    code = f"""
import ctypes
class Piece(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("size", ctypes.c_size_t)]
libc = ctypes.CDLL(None, use_errno=True)
data = ctypes.create_string_buffer(b"!", 1)
here, there = Piece(ctypes.addressof(data), 1), Piece({address(array, 6)}, 1)
done = libc.process_vm_writev({os.getpid()}, ctypes.byref(here), 1, ctypes.byref(there), 1, 0)
print(0 if done == 1 else ctypes.get_errno())
"""
    answer = int(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout)
    if answer in (errno.EPERM, errno.ENOSYS):
        pytest.skip(f"process_vm_writev: {os.strerror(answer)}")
    assert answer == 0
    assert array[6, 0] == ord("!")
    assert dirty(tracker) == [6]


def test_memory_given_back_to_the_system_is_written(array, tracker):
    check(libc.madvise(address(array, 1), 2 * PAGE, mmap.MADV_DONTNEED))
    assert dirty(tracker) == [1, 2]
    assert int(array[1:3].sum()) == 0
    assert dirty(tracker) == []


def test_read_only_and_back_is_clean(array, tracker):
    check(libc.mprotect(address(array), array.nbytes, READ))
    check(libc.mprotect(address(array), array.nbytes, READ | WRITE))
    assert dirty(tracker) == []
    array[7, 0] = 1
    assert dirty(tracker) == [7]


def test_memory_that_was_unmapped_fails_closed(foreign):
    with dl.track(foreign.buffer, "userfaultfd") as tracker:
        check(libc.munmap(foreign.address + 3 * PAGE, PAGE))
        for call in (tracker.harvest, tracker.peek, tracker.harvest):
            with pytest.raises(dl.DirtyLogError, match="can no longer be tracked by userfaultfd"):
                call()


def test_memory_that_was_moved_away_fails_closed(foreign):
    with dl.track(foreign.buffer, "userfaultfd") as tracker:
        moved = check(libc.mremap(foreign.address, foreign.size, 4 * foreign.size, MAYMOVE, None))
        try:
            assert moved != foreign.address
            with pytest.raises(dl.DirtyLogError, match="unmapped, moved or replaced"):
                tracker.harvest()
        finally:
            check(libc.munmap(moved, 4 * foreign.size))


def test_memory_that_was_replaced_is_reported_whole_and_tracked_again(foreign):
    with dl.track(foreign.buffer, "userfaultfd") as tracker, dl.track(foreign.buffer, "userfaultfd") as other:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | FIXED
        check(libc.mmap(foreign.address + 2 * PAGE, PAGE, READ | WRITE, flags, -1, 0))
        with pytest.warns(dl.IncompleteLogWarning, match="reports 8: the memory was remapped"):
            assert tracker.peek().count == 8
        with pytest.warns(dl.IncompleteLogWarning):
            answer = tracker.harvest()
        assert (answer.count, answer.exact) == (8, False)
        foreign.buffer[2 * PAGE] = b"x"
        assert dirty(tracker) == [2]
        with pytest.warns(dl.IncompleteLogWarning):
            assert other.harvest().count == 8
        foreign.buffer[5 * PAGE] = b"x"
        assert dirty(other) == [5]
        assert dirty(tracker) == [5]


def huge_bytes(array):
    """Bytes of the mapping at the array's start that huge pages hold."""
    inside = False
    with open("/proc/self/smaps", encoding="ascii", errors="replace") as smaps:
        for line in smaps:
            head = line.split(maxsplit=1)[0]
            if "-" in head and not head.endswith(":"):
                start, end = (int(bound, 16) for bound in head.split("-"))
                inside = start <= array.ctypes.data < end
            elif inside and head == "AnonHugePages:":
                return int(line.split()[1]) * 1024
    return 0


def test_huge_pages_are_used_and_kept_and_pages_stay_small():
    array = dl.empty((16, HUGE), np.uint8)
    array[:] = 1
    if huge_bytes(array) == 0:
        pytest.skip("the system hands out no huge pages on advice (transparent_hugepage/enabled)")
    with dl.track(array, "userfaultfd") as tracker:
        assert dirty(tracker) == []
        assert huge_bytes(array) >= 15 * HUGE
        array[3, 5 * PAGE] = 2
        assert dirty(tracker) == [3 * (HUGE // PAGE) + 5]
        array[3, 9 * PAGE] = 2
        array[11, :] = 2
        per_huge = HUGE // PAGE
        assert dirty(tracker) == [3 * per_huge + 9, *range(11 * per_huge, 12 * per_huge)]
        assert huge_bytes(array) >= 13 * HUGE


def test_a_mapping_that_may_not_be_written_says_so_and_is_compared(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(2 * PAGE))
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as reading:
        with pytest.raises(dl.BackendUnavailable, match=r"UFFDIO_REGISTER.*Operation not permitted"):
            dl.track(reading, "userfaultfd")
        with pytest.raises(dl.BackendUnavailable, match="mapped r--s"):
            dl.track(reading, "mprotect")
        with dl.track(reading) as tracker:
            assert tracker.backend == "compare"
            with path.open("r+b") as writing:
                writing.seek(PAGE)
                writing.write(b"x")
            assert dirty(tracker) == [1]
