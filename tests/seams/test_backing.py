"""What is behind a source may go: a file is cut, a descriptor closed, a process forked unseen."""

import ctypes
import mmap
import os
import platform
from multiprocessing.shared_memory import SharedMemory

import numpy as np
import pytest

import dirtylog as dl

pytestmark = pytest.mark.thread_unsafe(reason="descriptors and forks belong to the process")
PAGE = mmap.PAGESIZE
# The number of clone(2), which runs no handlers, for those who have no wrapper of it.
CLONE = {"x86_64": 56, "aarch64": 220}.get(platform.machine())


@pytest.fixture
def shared_memory():
    memory = SharedMemory(create=True, size=4 * PAGE)
    yield memory
    memory.close()
    memory.unlink()


def test_a_log_in_shared_memory_that_was_cut_raises_instead_of_ending_the_process(shared_memory):
    with dl.SharedLog.open(shared_memory) as log:
        log.mark(5)
        os.truncate(f"/dev/shm/{shared_memory.name}", PAGE)
        for ask in (log.harvest, log.peek, log.count, lambda: log.mark(4 * PAGE * 8 - 1)):
            with pytest.raises(dl.DirtyLogError, match="was cut"):
                ask()


def test_a_log_whose_descriptor_the_program_has_closed_loses_no_mark(tmp_path):
    with dl.SharedLog.create(64, tmp_path / "log") as log:
        log.mark(7)
        os.close(log.fileno())
        assert log.harvest().indices().tolist() == [7]
        with open(os.devnull, "rb") as other:
            os.dup2(other.fileno(), log.fileno())
        log.mark(9)
        assert log.harvest().indices().tolist() == [9]
        os.truncate(tmp_path / "log", 0)
        with pytest.raises(dl.DirtyLogError, match="was cut"):
            log.harvest()


def in_child(fork, child):
    """Fork by a call of C's; return how the child ended."""
    pid = fork()
    if pid == 0:
        try:
            child()
        finally:
            os._exit(0)
    return os.waitpid(pid, 0)[1]


def by_c_library():
    return ctypes.CDLL(None).fork()


def by_system_call():
    if CLONE is None:
        pytest.skip(f"the number of clone(2) on {platform.machine()} is not known here")
    return ctypes.CDLL(None).syscall(CLONE, 17, 0, 0, 0, 0)  # SIGCHLD


@pytest.mark.parametrize("backend", ["userfaultfd", "mprotect", "compare"])
def test_what_a_child_of_a_c_librarys_fork_writes_to_shared_memory_is_reported(backend):
    with mmap.mmap(-1, 8 * PAGE) as memory:
        array = np.frombuffer(memory, "u1")
        address = array.ctypes.data + 5 * PAGE
        try:
            # Named: "auto" compares where other tests have forked before.
            tracker = dl.track(array, backend)
        except dl.BackendUnavailable as missing:
            pytest.skip(str(missing))
        with tracker:
            in_child(by_c_library, lambda: ctypes.memset(address, 9, 1))
            if backend == "compare":
                assert 5 in tracker.harvest()
            else:
                with pytest.warns(dl.IncompleteLogWarning):
                    assert 5 in tracker.harvest()
        del array


@pytest.mark.parametrize("fork", [by_c_library, by_system_call])
@pytest.mark.parametrize("backend", ["userfaultfd", "mprotect", "compare"])
def test_the_child_of_an_unseen_fork_takes_nothing_from_its_parent(fork, backend):
    array = dl.zeros((8, PAGE), "u1")
    try:
        tracker = dl.track(array, backend)
    except dl.BackendUnavailable as missing:
        pytest.skip(str(missing))

    def child():
        try:
            tracker.harvest()
        finally:
            tracker.close()

    with tracker:
        array[3] = 1
        in_child(fork, child)
        array[6] = 1
        assert tracker.harvest().indices().tolist() == [3, 6]
