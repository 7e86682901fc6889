"""Writers that the page tables do not show: compared by "auto", refused, or told to `Tracker.mark`."""

import ctypes
import mmap
import os
import signal
import struct
import subprocess
import sys
import threading
import warnings

import numpy as np
import pytest

import dirtylog as dl
from dirtylog.sources.memory import BACKENDS, _tracking, arrays, compare, probe, tracker

PAGE = mmap.PAGESIZE
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long


@pytest.fixture(params=BACKENDS)
def backend(request):
    if request.param != "compare" and (refusal := _tracking.probe(request.param)):
        pytest.skip(f"{request.param}: {refusal}")
    return request.param


def filled(npages):
    array = dl.zeros((npages, PAGE), np.uint8)
    array[:] = 1
    return array


def test_marked_bytes_are_in_every_peek_and_in_the_next_harvest(backend):
    array = filled(70)
    with dl.track(array.reshape(-1)[100:], backend) as t:
        t.mark(PAGE - 1, 2)
        t.mark(65 * PAGE, 1)
        t.mark(5, 0)
        assert set(t.peek()) == set(t.peek()) == {0, 1, 65}
        answer = t.harvest()
        assert (set(answer), answer.exact) == ({0, 1, 65}, True)
        assert t.harvest().count == 0
        t.mark(0, array.size - 100)
        assert t.harvest().count == t.npages


@pytest.mark.parametrize(("first", "nbytes"), [(-1, 2), (0, -1), (0, 2 * PAGE + 1), (2 * PAGE, 1), (1, 1 << 70)])
def test_bytes_outside_the_buffer_are_refused_and_mark_nothing(backend, first, nbytes):
    with dl.track(filled(2), backend) as t:
        with pytest.raises(IndexError, match="do not lie in the buffer of 8192"):
            t.mark(first, nbytes)
        assert t.harvest().count == 0
    with pytest.raises(ValueError, match="closed"):
        t.mark(0, 1)


def test_marks_survive_a_harvest_that_could_not_hand_out_its_answer(backend, monkeypatch):
    """I5."""
    with dl.track(filled(8), backend) as t:
        t.mark(3 * PAGE, 1)
        doubtful = dl.DirtyPages._all(8, PAGE, exact=False)
        with monkeypatch.context() as patch:
            patch.setattr(t, "_engine", type("Doubtful", (), {"collect": staticmethod(lambda take: doubtful)}))
            warnings.simplefilter("error")
            with pytest.raises(dl.IncompleteLogWarning):
                t.harvest()
        assert 3 in t.harvest()
        assert t.harvest().count == 0


def test_a_direct_read_that_harvests_overtook_is_told_and_reported(tmp_path):
    path = tmp_path / "data"
    path.write_bytes(b"\x05" * (16 * PAGE))
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError as error:
        pytest.skip(f"O_DIRECT: {error}")
    array = filled(16)
    try:
        with dl.track(array) as t:
            done = threading.Event()

            def read():
                os.preadv(descriptor, [memoryview(array).cast("B")], 0)
                done.set()

            thread = threading.Thread(target=read)
            replica = array.copy()
            thread.start()
            while not done.is_set():
                t.harvest().copy(array, replica)
            thread.join()
            t.mark(0, array.nbytes)
            t.harvest().copy(array, replica)
            assert (replica == 5).all()
            assert t.harvest().count == 0
    finally:
        os.close(descriptor)


class Ring:
    """As much of io_uring as one request at a time needs."""

    def __init__(self):
        params = bytearray(120)
        self.fd = libc.syscall(425, 8, (ctypes.c_char * 120).from_buffer(params))
        if self.fd < 0:
            pytest.skip(f"io_uring_setup: {os.strerror(ctypes.get_errno())}")
        sq_entries, cq_entries = struct.unpack_from("II", params, 0)
        self.sq, self.cq = struct.unpack_from("10I", params, 40), struct.unpack_from("10I", params, 80)
        self.rings = mmap.mmap(self.fd, max(self.sq[6] + 4 * sq_entries, self.cq[5] + 16 * cq_entries))
        self.requests = mmap.mmap(self.fd, 64 * sq_entries, offset=0x10000000)

    def register(self, address, nbytes):
        if libc.syscall(427, self.fd, 0, (ctypes.c_uint64 * 2)(address, nbytes), 1) < 0:
            pytest.skip(f"io_uring_register: {os.strerror(ctypes.get_errno())}")

    def read_fixed(self, descriptor, address, nbytes):
        struct.pack_into("BBHiQQIIQHHi2Q", self.requests, 0, 4, 0, 0, descriptor, 0, address, nbytes, *[0] * 7)
        struct.pack_into("I", self.rings, self.sq[6], 0)
        struct.pack_into("I", self.rings, self.sq[1], 1)
        assert libc.syscall(426, self.fd, 1, 0, 0, None, 0) == 1

    def wait(self):
        libc.syscall(426, self.fd, 0, 1, 1, None, 0)
        return struct.unpack_from("Qi", self.rings, self.cq[5])[1]


def test_a_read_into_a_registered_buffer_is_told_and_reported(backend):
    """The pages were pinned before they were tracked: no store, no fault."""
    array, ring = filled(16), Ring()
    ring.register(array.ctypes.data, array.nbytes)
    reading, writing = os.pipe()
    try:
        with dl.track(array, backend) as t:
            ring.read_fixed(reading, array.ctypes.data + 5 * PAGE, 100)  # waits: the pipe is empty
            assert t.harvest().count == 0
            os.write(writing, b"z" * 100)
            if ring.wait() != 100:
                pytest.skip("this kernel has no fixed read from a pipe")
            assert array[5, 0] == ord("z")
            t.mark(5 * PAGE, 100)
            assert t.harvest().indices().tolist() == [5]
    finally:
        for descriptor in (reading, writing, ring.fd):
            os.close(descriptor)


@pytest.mark.parametrize("wanted", ["auto", *BACKENDS])
def test_a_hole_that_is_punched_is_compared_or_told_and_reported(wanted):
    descriptor = os.memfd_create("guest")
    try:
        os.ftruncate(descriptor, 16 * PAGE)
        memory = mmap.mmap(descriptor, 16 * PAGE)
        array = np.frombuffer(memory, np.uint8).reshape(16, PAGE)
        array[:] = 7
        try:
            t = dl.track(array, wanted)
        except dl.BackendUnavailable as refusal:
            pytest.skip(str(refusal))
        with t:
            memory.madvise(mmap.MADV_REMOVE, 4 * PAGE, 3 * PAGE)
            if t.backend != "compare":
                t.mark(4 * PAGE, 3 * PAGE)
            assert t.harvest().indices().tolist() == [4, 5, 6]
            assert t.harvest().count == 0
    finally:
        os.close(descriptor)


def test_a_write_that_asks_for_no_permission_is_seen_or_told_and_reported(backend):
    array = filled(8)
    with dl.track(array, backend) as t, open("/proc/self/mem", "r+b", buffering=0) as memory:
        memory.seek(array.ctypes.data + 5 * PAGE)
        assert memory.write(b"debugger") == 8
        if backend == "mprotect":
            t.mark(5 * PAGE, 8)
        assert t.harvest().indices().tolist() == [5]


def test_a_system_call_that_protected_memory_refuses_goes_through_after_a_store():
    if refusal := _tracking.probe("mprotect"):
        pytest.skip(refusal)
    array = filled(8)
    with dl.track(array, "mprotect") as t, open("/dev/zero", "rb", buffering=0) as file:
        with pytest.raises(OSError, match="Bad address"):
            file.readinto(memoryview(array[4:6]).cast("B"))
        assert t.harvest().count == 0
        assert (array == 1).all()
        array[4:6, 0] = 1
        assert file.readinto(memoryview(array[4:6]).cast("B")) == 2 * PAGE
        assert t.harvest().indices().tolist() == [4, 5]


def test_a_thread_that_leaves_the_signal_of_faults_open_may_block_all_others(backend):
    array, blocked = filled(8), []

    def work():
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals() - {signal.SIGSEGV})
        # Others may: pyarrow's allocator has a thread that blocks all.
        blocked.append(probe.blocks_faults() == threading.get_native_id())
        array[5, 0] = 2

    with dl.track(array, backend) as t:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert t.harvest().indices().tolist() == [5]
    assert blocked == [False]


def test_where_a_thread_blocks_the_signal_of_faults_memory_is_not_protected(monkeypatch):
    monkeypatch.setattr(tracker, "BACKENDS", ("mprotect", "compare"))
    monkeypatch.setattr(tracker, "blocks_faults", lambda: 4711)
    with dl.track(filled(8)) as t:
        assert t.backend == "compare"
        assert "thread 4711 blocks SIGSEGV" in t.refused["mprotect"]


def test_what_others_write_to_a_privately_mapped_file_is_reported(tmp_path):
    path = tmp_path / "image"
    path.write_bytes(b"\x01" * (16 * PAGE))
    array = np.memmap(path, np.uint8, mode="c")
    assert int(array.sum()) == array.size
    with dl.track(array) as t:
        assert t.backend == "compare"
        assert "pages not yet copied show what others write" in t.refused["userfaultfd"]
        with path.open("r+b") as file:
            file.seek(7 * PAGE)
            file.write(b"\x05")
        array[3 * PAGE] = 9
        assert t.harvest().indices().tolist() == [3, 7]


def test_shared_memory_inherited_from_before_the_import_is_compared():
    code = """
import mmap, os
memory = mmap.mmap(-1, 8 * mmap.PAGESIZE)
go, ready = os.pipe(), os.pipe()
if os.fork() == 0:
    os.read(go[0], 1)
    memory[3 * mmap.PAGESIZE] = 7
    os.write(ready[1], b"x")
    os._exit(0)
import dirtylog as dl
dl.track(bytearray(1), "compare").close()
young = mmap.mmap(-1, 8 * mmap.PAGESIZE)
with dl.track(memory) as tracker, dl.track(young) as alone:
    os.write(go[1], b"x")
    os.read(ready[0], 1)
    print(tracker.backend, tracker.harvest().indices().tolist(), "userfaultfd" in alone.refused)
os.wait()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    unavailable = bool(_tracking.probe("userfaultfd"))
    assert done.stdout == f"compare [3] {unavailable}\n", done.stderr


def test_where_nothing_is_known_of_mappings_memory_is_compared(monkeypatch):
    monkeypatch.setattr(tracker, "mappings_of", lambda *_: [])
    with dl.track(filled(2)) as t:
        assert t.backend == "compare"
        assert "does not tell" in t.refused["userfaultfd"]


def test_a_compared_file_that_was_cut_raises_instead_of_ending_the_process(tmp_path):
    path = tmp_path / "image"
    path.write_bytes(b"\x01" * (8 * PAGE))
    array = np.memmap(path, np.uint8, mode="r+")
    with dl.track(array) as t:
        os.truncate(path, PAGE)
        for ask in (t.peek, t.harvest):
            with pytest.raises(dl.DirtyLogError, match="the file behind these 8 pages was cut"):
                ask()
        os.truncate(path, 8 * PAGE)
        assert t.harvest().indices().tolist() == list(range(1, 8))


def test_compared_memory_that_was_unmapped_raises_instead_of_ending_the_process():
    libc.mmap.restype = ctypes.c_void_p
    address = libc.mmap(None, ctypes.c_size_t(4 * PAGE), 3, 0x22, -1, ctypes.c_long(0))
    memory = (ctypes.c_char * (4 * PAGE)).from_address(address)
    with dl.track(memory, "compare") as t:
        assert libc.munmap(ctypes.c_void_p(address + PAGE), ctypes.c_size_t(PAGE)) == 0
        with pytest.raises(dl.DirtyLogError, match="unmapped"):
            t.harvest()
        libc.munmap(ctypes.c_void_p(address), ctypes.c_size_t(4 * PAGE))


@pytest.mark.parametrize("then", ["", "read", "written"])
def test_a_private_page_of_a_file_whose_copy_is_taken_away_is_reported(backend, tmp_path, then):
    path = tmp_path / "image"
    path.write_bytes(bytes(range(256)) * 16 * 32)
    with path.open("rb") as file:
        memory = mmap.mmap(file.fileno(), 32 * PAGE, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    array = np.frombuffer(memory, np.uint8)
    array[20 * PAGE] = 99  # a copy from before
    with dl.track(array, backend) as t, dl.track(array[4 * PAGE :], backend) as other:
        array[7 * PAGE] = array[9 * PAGE] = 99
        assert t.harvest().indices().tolist() == [7, 9]
        assert array[30 * PAGE] == 0  # a page of the file's own
        memory.madvise(mmap.MADV_DONTNEED, 6 * PAGE, 3 * PAGE)
        memory.madvise(mmap.MADV_DONTNEED, 20 * PAGE, PAGE)
        memory.madvise(mmap.MADV_DONTNEED, 30 * PAGE, PAGE)
        if then == "read":
            assert array[7 * PAGE] == array[20 * PAGE] == 0
        elif then == "written":
            array[7 * PAGE] = array[20 * PAGE] = 98
        with warnings.catch_warnings():
            # Copies that were swapped out look like these to userfaultfd: it does not vouch for the answer.
            warnings.simplefilter("ignore", dl.IncompleteLogWarning)
            for call in (t.peek, t.harvest):
                assert call().indices().tolist() == [7, 20]
            seen = set(other.harvest().indices().tolist())
            # Its page 3 has been written and is what it was before: to compare that is nothing.
            assert ({16} if backend == "compare" else {3, 16}) <= seen <= {3, 5, 16}
        assert t.harvest().count == other.harvest().count == 0
        array[7 * PAGE] = 97
        assert t.harvest().indices().tolist() == [7]


GUARD_INSTALL, GUARD_REMOVE = 102, 103


@pytest.mark.parametrize("how", ["mprotect", "guard"])
@pytest.mark.parametrize("shared", [False, True])
def test_compared_memory_that_may_not_be_read_for_a_while_raises_and_loses_nothing(how, shared):
    memory = mmap.mmap(-1, 8 * PAGE, flags=mmap.MAP_ANONYMOUS | (mmap.MAP_SHARED if shared else mmap.MAP_PRIVATE))
    array = np.frombuffer(memory, np.uint8)
    array[:] = 1
    middle = ctypes.c_void_p(array.ctypes.data + 3 * PAGE), ctypes.c_size_t(2 * PAGE)
    with dl.track(array, "compare") as t:
        array[3 * PAGE] = array[7 * PAGE] = 2
        if how == "mprotect":
            assert libc.mprotect(*middle, 0) == 0
        elif tuple(map(int, os.uname().release.split(".")[:2])) < (6, 15) or libc.madvise(*middle, GUARD_INSTALL):
            pytest.skip("the kernel has no guards in memory, or does not tell where they are")
        for call in (t.harvest, t.peek):
            with pytest.raises(dl.DirtyLogError, match="may not be read now"):
                call()
        if how == "mprotect":
            assert libc.mprotect(*middle, 3) == 0
            assert t.harvest().indices().tolist() == [3, 7]
        else:
            assert libc.madvise(*middle, GUARD_REMOVE) == 0
            # A guard takes what was there: private memory is zero now, and shared memory what it was.
            assert t.harvest().indices().tolist() == ([3, 7] if shared else [3, 4, 7])


@pytest.mark.parametrize("what", ["harvest", "close"])
def test_a_signal_handler_may_collect_or_close_the_tracker_that_it_interrupts(monkeypatch, what):
    """Its lock is held by the thread that the handler runs in."""
    array, inner = filled(8), []
    t = dl.track(array, "compare")
    real = compare.differing_pages

    def interrupted(*arguments):
        pages = real(*arguments)
        if not inner:
            inner.append(None)
            signal.raise_signal(signal.SIGUSR1)
        return pages

    monkeypatch.setattr(compare, "differing_pages", interrupted)
    before = signal.signal(signal.SIGUSR1, lambda *_: inner.append(getattr(t, what)()))
    try:
        array[4] = 2
        if what == "harvest":
            assert t.harvest().indices().tolist() == [4]
            assert inner[1].indices().tolist() == [4]
            assert t.harvest().count == 0
        else:
            with pytest.raises(ValueError, match="closed"):
                t.harvest()
    finally:
        signal.signal(signal.SIGUSR1, before)
        t.close()


def test_hugetlb_memory_is_refused_by_mprotect_and_never_exact_by_userfaultfd(monkeypatch):
    array = filled(8)
    address = array.ctypes.data
    huge = [probe.Mapping(address, address + array.nbytes, "rw-p", 2 << 20, "/anon_hugepage (deleted)", (0, 1, 9))]
    monkeypatch.setattr(tracker, "mappings_of", lambda *_: huge)
    with pytest.raises(dl.BackendUnavailable, match="hugetlb pages of 2097152 bytes"):
        dl.track(array, "mprotect")
    if refusal := _tracking.probe("userfaultfd"):
        pytest.skip(f"userfaultfd: {refusal}")
    with dl.track(array, "userfaultfd") as t:
        assert t.harvest().exact
        array[2] = 5
        with pytest.warns(dl.IncompleteLogWarning):
            assert not t.harvest().exact


def test_a_thread_that_blocks_the_signal_of_faults_is_found():
    go, blocked = threading.Event(), threading.Event()

    def work():
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGSEGV])
        blocked.set()
        go.wait()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        blocked.wait()
        assert probe.blocks_faults()
    finally:
        go.set()
        thread.join()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGSEGV])
    try:
        with pytest.raises(dl.BackendUnavailable, match="this thread blocks SIGSEGV"):
            dl.track(filled(1), "mprotect")
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def test_kernels_without_huge_pages_make_arrays_all_the_same(monkeypatch):
    class Plain(mmap.mmap):
        def madvise(self, *_):
            raise OSError(22, "Invalid argument")

    monkeypatch.setattr(arrays, "_private", lambda nbytes: Plain(-1, nbytes))
    assert dl.zeros(4 << 20, "u1").sum() == 0
