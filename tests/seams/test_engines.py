"""What a program does behind the engines' backs: descriptors, mappings, signals and jumps that are not theirs."""

import ctypes
import mmap
import os
import signal

import numpy as np
import pytest

import dirtylog as dl
from dirtylog.sources.memory import _tracking

from .. import warm

PAGE = mmap.PAGESIZE
MAYMOVE, FIXED, DONTUNMAP = 1, 2, 4
needs_userfaultfd = pytest.mark.skipif(
    bool(_tracking.probe("userfaultfd")), reason=f"userfaultfd: {_tracking.probe('userfaultfd')}"
)
needs_mprotect = pytest.mark.skipif(
    bool(_tracking.probe("mprotect")), reason=f"mprotect: {_tracking.probe('mprotect')}"
)
libc = ctypes.CDLL(None, use_errno=True)
libc.mremap.restype = ctypes.c_void_p
libc.mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]


def run(code, returncode=0):
    """In a process of its own, which the mistake would end, or leave spinning."""
    prelude = """
import ctypes, mmap, os, signal, sys, threading, warnings
import numpy as np
import dirtylog as dl
from dirtylog.sources.memory import _tracking
PAGE = mmap.PAGESIZE
signal.alarm(60)
"""
    done = warm.run(prelude + code)
    assert done.returncode == returncode, (done.returncode, done.stdout, done.stderr)
    return done.stdout


CLOSED = """
warnings.simplefilter("ignore", dl.IncompleteLogWarning)
arrays = [dl.zeros((8, PAGE), np.uint8) for _ in range(3)]
trackers = [dl.track(array, "userfaultfd") for array in arrays]
arrays[0][3] = 1
os.closerange(3, 256)
"""


@needs_userfaultfd
def test_trackers_whose_descriptors_were_closed_report_all_and_track_on():
    """I6: with its last descriptor the kernel drops every registration."""
    assert (
        run(
            CLOSED
            + """
for tracker, array in zip(trackers, arrays):
    peeked, answer = tracker.peek(), tracker.harvest()
    print(peeked.count, peeked.exact, answer.count, answer.exact, end="; ")
    array[5] = 2
    print(tracker.harvest().indices().tolist())
    tracker.close()
print(_tracking.open_spans("userfaultfd"))
"""
        )
        == 3 * "8 False 8 False; [5]\n" + "0\n"
    )


@needs_userfaultfd
@pytest.mark.parametrize("impostor", ["/dev/null", "/proc/self/pagemap"])
def test_closing_trackers_leaves_descriptors_alone_that_are_the_programs_by_now(impostor):
    assert (
        run(
            CLOSED
            + f"""
mine = [os.open({impostor!r}, os.O_RDONLY) for _ in range(8)]
for tracker in trackers:
    tracker.close()
for descriptor in mine:
    os.fstat(descriptor)
print(len(mine), _tracking.open_spans("userfaultfd"))
"""
        )
        == "8 0\n"
    )


@needs_userfaultfd
def test_a_tracker_opened_after_descriptors_were_closed_does_not_hide_it_from_the_others():
    assert (
        run(
            CLOSED
            + """
late = dl.track(arrays[1], "userfaultfd")
print([tracker.harvest().exact for tracker in trackers], late.harvest().count)
"""
        )
        == "[False, False, False] 0\n"
    )


class Piece:
    """Memory that Python does not manage, to be moved; the mapping is left to the process's end where it is lost."""

    def __init__(self, value):
        self.memory = mmap.mmap(-1, 16 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.array = np.frombuffer(self.memory, np.uint8).reshape(16, PAGE)
        self.array[:] = value
        self.address = self.array.ctypes.data

    def move(self, first, count, to=None, flags=0):
        answer = libc.mremap(self.address + first * PAGE, count * PAGE, count * PAGE, MAYMOVE | flags, to)
        assert answer not in (None, ctypes.c_void_p(-1).value), os.strerror(ctypes.get_errno())
        return answer


@needs_mprotect
@pytest.mark.skipif(bool(_tracking.probe("userfaultfd")), reason="a page that lost its contents needs PAGEMAP_SCAN")
@pytest.mark.parametrize("how", ["MREMAP_DONTUNMAP", "MADV_DONTNEED", "MADV_DONTNEED, then read"])
def test_mprotect_sees_private_pages_that_lost_their_contents_without_a_store(how):
    piece = Piece(1)
    with dl.track(piece.array, "mprotect") as tracker, dl.track(piece.array[4:], "mprotect") as other:
        piece.array[7] = 2
        assert tracker.harvest().indices().tolist() == [7]
        if how == "MREMAP_DONTUNMAP":
            libc.munmap(ctypes.c_void_p(piece.move(6, 3, flags=DONTUNMAP)), ctypes.c_size_t(3 * PAGE))
        else:
            piece.memory.madvise(mmap.MADV_DONTNEED, 6 * PAGE, 3 * PAGE)
            if how.endswith("read"):
                assert piece.array[6:9].sum() == 0
        assert tracker.peek().indices().tolist() == [6, 7, 8]
        answer = tracker.harvest()
        assert (answer.indices().tolist(), answer.exact) == ([6, 7, 8], True)
        assert tracker.harvest().count == 0
        assert other.harvest().indices().tolist() == [2, 3, 4]
        piece.array[8] = 3
        assert tracker.harvest().indices().tolist() == [8]
        piece.memory.madvise(mmap.MADV_DONTNEED, 8 * PAGE, PAGE)
        assert tracker.harvest().indices().tolist() == [8]


@needs_mprotect
def test_mprotect_takes_pages_that_were_never_filled_for_what_they_are():
    array = dl.zeros((300, PAGE), np.uint8)
    array[::3] = 1
    with dl.track(array, "mprotect") as tracker:
        assert array.sum() == 100 * PAGE  # reads put the system's page of zeros there
        assert tracker.harvest().count == 0
        array[200] = 5
        assert tracker.harvest().indices().tolist() == [200]
        assert tracker.harvest().count == 0


@needs_mprotect
@pytest.mark.parametrize(("first", "count", "onto"), [(0, 16, 0), (4, 3, 9)])
def test_tracked_memory_that_is_moved_onto_other_tracked_memory_is_reported(first, count, onto):
    """It is mapped read-only there, as if it were what was tracked."""
    print_and_exit = f"""
class Piece:
    def __init__(self, value):
        self.memory = mmap.mmap(-1, 16 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.array = np.frombuffer(self.memory, np.uint8).reshape(16, PAGE)
        self.array[:] = value
libc = ctypes.CDLL(None)
libc.mremap.restype = ctypes.c_void_p
a, b = Piece(1), Piece(2)
one, two = dl.track(a.array, "mprotect"), dl.track(b.array, "mprotect")
warnings.simplefilter("ignore", dl.IncompleteLogWarning)
libc.mremap(ctypes.c_void_p(b.array.ctypes.data + {first} * PAGE), ctypes.c_size_t({count} * PAGE),
            ctypes.c_size_t({count} * PAGE), {MAYMOVE | FIXED}, ctypes.c_void_p(a.array.ctypes.data + {onto} * PAGE))
answer = one.harvest()
print(answer.count, answer.exact)
try:
    two.harvest()
except dl.DirtyLogError as error:
    print("unmapped" in str(error))
a.array[11] = 5
print(one.harvest().indices().tolist(), flush=True)
os._exit(0)
"""
    assert run(print_and_exit) == "16 False\nTrue\n[11]\n"


@needs_mprotect
@pytest.mark.parametrize("written", [False, True])
def test_a_jump_into_tracked_memory_ends_the_process_as_it_would_have_untracked(written):
    """Opened again and again, it would spin for ever, deaf to Ctrl-C."""
    run(
        f"""
array = dl.zeros(8 * PAGE, np.uint8)
array[:] = 0xC3
tracker = dl.track(array, "mprotect")
array[0 if {written} else PAGE] = 0xC3
ctypes.CFUNCTYPE(None)(array.ctypes.data)()
""",
        -signal.SIGSEGV,
    )


@pytest.mark.parametrize(
    "engine", [pytest.param("userfaultfd", marks=needs_userfaultfd), pytest.param("mprotect", marks=needs_mprotect)]
)
def test_a_tracker_whose_memory_is_gone_leaves_the_others_alone_when_it_is_closed(engine):
    """Not tracked any longer is not closed: freed and still in the index, it would be used after."""
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    address = libc.mmap(None, 4 * PAGE, 3, 0x22, -1, 0)
    before = _tracking.open_spans(engine)
    tracker = dl.track((ctypes.c_char * (4 * PAGE)).from_address(address), engine)
    libc.munmap(address, 4 * PAGE)
    with pytest.raises(dl.DirtyLogError, match="unmapped"):
        tracker.harvest()
    assert _tracking.open_spans(engine) == before + 1
    tracker.close()
    assert _tracking.open_spans(engine) == before


@needs_mprotect
def test_an_open_page_that_the_program_made_read_only_is_opened_once_more():
    """As after a race with another thread that opened it: only a fault that comes back at once is nobody's store."""
    assert (
        run(
            """
array = dl.zeros(8 * PAGE, np.uint8)
tracker = dl.track(array, "mprotect")
array[0] = 1
libc = ctypes.CDLL(None)
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.mprotect(array.ctypes.data, PAGE, 4 | 1)
array[0] = 2
print(tracker.peek().indices().tolist())
"""
        )
        == "[0]\n"
    )


@needs_mprotect
def test_probing_in_a_thread_that_blocks_the_signal_of_faults_leaves_the_process_alive():
    assert (
        run(
            """
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGSEGV])
print(repr(_tracking.probe("mprotect")), signal.SIGSEGV in signal.pthread_sigmask(signal.SIG_BLOCK, []))
"""
        )
        == "'' True\n"
    )


@pytest.mark.parametrize("engine", ["userfaultfd", "mprotect"])
def test_spans_that_nest_cross_and_repeat_each_report_every_write_whatever_is_closed(engine):
    """The index by address, against a plain list of what each span covers."""
    if refusal := _tracking.probe(engine):
        pytest.skip(f"{engine}: {refusal}")
    array = dl.zeros((400, PAGE), np.uint8)
    array[:] = 1
    base, rng = array.ctypes.data, np.random.default_rng(7)
    spans, owed = {}, {}
    for step in range(300):
        if spans and rng.integers(3) == 0:
            name = list(spans)[rng.integers(len(spans))]
            spans.pop(name)[0].close()
            del owed[name]
        else:
            first = int(rng.integers(399))
            count = int(rng.integers(1, min(200, 400 - first) + 1))
            spans[step] = _tracking.Span(engine, base + first * PAGE, count * PAGE, PAGE), first, count
            owed[step] = set()
        for page in rng.integers(0, 400, 3).tolist():
            array[page] = step % 251
            for name, (_, first, count) in spans.items():
                if first <= page < first + count:
                    owed[name].add(page - first)
        if spans:
            name = list(spans)[rng.integers(len(spans))]
            assert set(spans[name][0].collect(True)) == owed[name]
            owed[name] = set()
    for span, _, _ in spans.values():
        span.close()
    array[:] = 3
    assert _tracking.open_spans(engine) == 0


@needs_mprotect
@pytest.mark.thread_unsafe(reason="it writes behind the engine's back")
def test_what_the_program_opened_is_not_hidden_by_another_trackers_harvest():
    """One tracker has the page already, and owes it: its harvest must not protect what the other one has to look at."""
    array = dl.zeros((8, PAGE), "u1")
    with dl.track(array, "mprotect") as first, dl.track(array, "mprotect") as second:
        array[5] = 1
        assert second.harvest().indices().tolist() == [5]
        libc.mprotect(
            ctypes.c_void_p(array.ctypes.data + 5 * PAGE), ctypes.c_size_t(PAGE), mmap.PROT_READ | mmap.PROT_WRITE
        )
        array[5] = 2
        for tracker in (first, second):
            with pytest.warns(dl.IncompleteLogWarning):
                assert 5 in tracker.harvest()
        assert second.harvest().count == 0
