"""The mprotect back end's own hazards: signals, and mappings that run short."""

import ctypes
import mmap
import platform

import numpy as np
import pytest

import dirtylog as dl
from dirtylog.sources.memory import _tracking

from .. import warm

PAGE = mmap.PAGESIZE
REFUSAL = _tracking.probe("mprotect")
pytestmark = pytest.mark.skipif(bool(REFUSAL), reason=f"mprotect: {REFUSAL}")

FIXED, MAYMOVE = 0x10, 1
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = libc.mremap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
libc.mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def run(code, returncode=0):
    """In a process of its own, which a wrong handler may kill or hang."""
    prelude = """
import ctypes, errno, faulthandler, mmap, os, signal, sys, threading, warnings
import numpy as np
import dirtylog as dl
from dirtylog.sources.memory import _tracking
PAGE = mmap.PAGESIZE
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
signal.alarm(240)
def array_of(npages):
    array = dl.empty((npages, PAGE), np.uint8)
    array[:] = 7
    return array
"""
    done = warm.run(prelude + code)
    assert done.returncode == returncode, (done.returncode, done.stderr)
    return done.stdout


@pytest.fixture
def few_splits():
    yield _tracking.allow_splits
    _tracking.allow_splits(16384)


def test_short_of_mappings_memory_is_opened_in_blocks_and_said_so(few_splits):
    array = dl.empty((4096, PAGE), np.uint8)
    array[:] = 7
    with dl.track(array, "mprotect") as tracker:
        few_splits(20)
        array[:20:2] = 1
        assert tracker.harvest().indices().tolist() == list(range(0, 20, 2))
        array[::2] = 2
        with pytest.warns(dl.IncompleteLogWarning, match="mappings ran short"):
            answer = tracker.harvest()
        assert not answer.exact
        assert set(range(0, 4096, 2)) <= set(answer)
        array[[1, 4095]] = 3
        assert tracker.harvest().indices().tolist() == [1, 4095]


def test_blocks_are_marked_for_every_tracker_they_touch(few_splits):
    array = dl.empty((1024, PAGE), np.uint8)
    array[:] = 7
    with dl.track(array, "mprotect") as whole, dl.track(array[600:], "mprotect") as part:
        few_splits(0)
        array[700] = 1
        for tracker, page in ((whole, 700), (part, 100)):
            with pytest.warns(dl.IncompleteLogWarning):
                answer = tracker.harvest()
            assert page in answer


class Foreign:
    """Memory that Python does not know of, so that it can be replaced under a tracker."""

    def __init__(self, npages):
        self.size = npages * PAGE
        self.address = self.map(None, self.size)
        self.buffer = (ctypes.c_char * self.size).from_address(self.address)

    def map(self, address, size, flags=0):
        mapped = libc.mmap(address, size, 3, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | flags, -1, 0)
        assert mapped != ctypes.c_void_p(-1).value
        return mapped

    def replace(self, first, count):
        self.map(self.address + first * PAGE, count * PAGE, FIXED)

    def remap(self, first, count):
        """Move pages away, and map others where they were."""
        moved = libc.mremap(self.address + first * PAGE, count * PAGE, count * PAGE + PAGE, MAYMOVE)
        assert moved != ctypes.c_void_p(-1).value
        self.replace(first, count)
        assert libc.munmap(moved, count * PAGE + PAGE) == 0

    def unprotect(self, first, count):
        assert libc.mprotect(self.address + first * PAGE, count * PAGE, 3) == 0


@pytest.fixture
def foreign():
    memory = Foreign(200)
    yield memory
    libc.munmap(memory.address, memory.size)


@pytest.mark.parametrize("event", ["replace", "remap", "unprotect"])
@pytest.mark.parametrize(("first", "count"), [(0, 1), (63, 2), (130, 70), (0, 200)])
def test_memory_that_is_no_longer_as_the_tracker_left_it_is_reported_whole_and_tracked_again(
    foreign, event, first, count
):
    """I6: stores to it raise no fault."""
    with dl.track(foreign.buffer, "mprotect") as tracker, dl.track(foreign.buffer, "mprotect") as other:
        getattr(foreign, event)(first, count)
        foreign.buffer[first * PAGE] = b"x"
        with pytest.warns(dl.IncompleteLogWarning, match="reports 200: the memory was remapped"):
            assert tracker.peek().count == 200
        with pytest.warns(dl.IncompleteLogWarning):
            answer = tracker.harvest()
        assert (answer.count, answer.exact) == (200, False)
        foreign.buffer[150 * PAGE] = b"x"
        assert tracker.harvest().indices().tolist() == [150]
        with pytest.warns(dl.IncompleteLogWarning):
            assert other.harvest().count == 200
        foreign.buffer[first * PAGE] = b"y"
        assert other.harvest().indices().tolist() == [first]
        assert tracker.harvest().indices().tolist() == [first]


def test_a_tracker_opened_on_replaced_memory_does_not_hide_it_from_another(foreign):
    with dl.track(foreign.buffer, "mprotect") as tracker:
        foreign.replace(7, 1)
        foreign.buffer[7 * PAGE] = b"x"
        with dl.track(foreign.buffer, "mprotect") as late:
            assert late.harvest().count == 0
            with pytest.warns(dl.IncompleteLogWarning):
                assert tracker.harvest().count == 200


def test_pages_that_are_open_because_they_were_written_are_trusted(foreign):
    with dl.track(foreign.buffer, "mprotect") as tracker:
        for first, end in [(0, 64), (63, 66), (128, 200), (0, 200), (199, 200)]:
            for page in range(first, end):
                foreign.buffer[page * PAGE] = b"x"
            assert tracker.peek().exact
            answer = tracker.harvest()
            assert (answer.indices().tolist(), answer.exact) == (list(range(first, end)), True)


def test_without_a_list_of_mappings_every_page_is_reported():
    """I6: a process without a free descriptor cannot read the list."""
    answer = run("""
import resource
array = array_of(8)
tracker = dl.track(array, "mprotect")
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    answer = tracker.harvest()
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    print(answer.count, answer.exact, len(caught))
array[3] = 1
print(tracker.harvest().indices().tolist())
tracker.close()
""")
    assert answer == "8 False 1\n[3]\n"


USE_UP_MAPPINGS = """
limit = int(open("/proc/sys/vm/max_map_count").read())
def use_up_mappings():
    spare = libc.mmap(None, 2 * limit * PAGE, 0, PRIVATE | 0x4000, -1, 0)
    split = []
    for page in range(0, 2 * limit, 2):
        if libc.mprotect(spare + page * PAGE, PAGE, 1):
            return spare, split
        split.append(page)
    sys.exit("mappings without end")
"""


def test_when_the_system_has_no_mapping_left_nothing_spins_and_nothing_is_lost(sanitized):
    if sanitized:
        pytest.skip("a sanitizer that is refused a mapping of its own ends the process")
    answer = run(
        USE_UP_MAPPINGS
        + """
array = array_of(2000)
tracker = dl.track(array, "mprotect")
_tracking.allow_splits(10**9)
use_up_mappings()
array[::2] = 1
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    answer = tracker.harvest()
    print(set(range(0, 2000, 2)) <= set(answer), answer.exact, len(caught))
    array[5] = 2
    print(5 in tracker.harvest(), bool((array[::2][3:] == 1).all()))
tracker.close()
"""
    )
    assert answer == "True False 1\nTrue True\n"


def test_a_fault_that_is_not_ours_goes_to_the_handler_that_was_there():
    code = """
faulthandler.enable()
array = array_of(4)
tracker = dl.track(array, "mprotect")
array[1] = 1
print(tracker.harvest().indices().tolist(), flush=True)
ctypes.memset(libc.mmap(None, PAGE, 1, PRIVATE, -1, 0), 1, 1)
"""
    assert run(code, returncode=-11) == "[1]\n"


def test_without_an_earlier_handler_a_foreign_fault_ends_the_process_as_ever():
    for address in ("0", "libc.mmap(None, PAGE, 1, PRIVATE, -1, 0)"):
        code = f"""
tracker = dl.track(array_of(4), "mprotect")
ctypes.memset({address}, 1, 1)
"""
        assert run(code, returncode=-11) == ""


def test_an_earlier_handler_in_python_is_called_for_a_signal_that_was_sent():
    code = """
got = []
signal.signal(signal.SIGSEGV, lambda number, frame: got.append(number))
tracker = dl.track(array_of(4), "mprotect")
os.kill(os.getpid(), signal.SIGSEGV)
tracker.close()
os.kill(os.getpid(), signal.SIGSEGV)
print(got == [signal.SIGSEGV] * 2)
"""
    assert run(code) == "True\n"


def test_an_earlier_handler_that_wants_the_details_gets_them():
    code = """
class Action(ctypes.Structure):
    _fields_ = [("handler", ctypes.c_void_p), ("mask", ctypes.c_char * 128), ("flags", ctypes.c_int),
                ("restorer", ctypes.c_void_p)]
got = []
@ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.POINTER(ctypes.c_int), ctypes.c_void_p)
def handler(number, info, context):
    got.append((number, info[0], bool(context)))
SA_SIGINFO = 4
action = Action(ctypes.cast(handler, ctypes.c_void_p).value, b"", SA_SIGINFO, None)
assert libc.sigaction(signal.SIGSEGV, ctypes.byref(action), None) == 0
with dl.track(array_of(4), "mprotect"):
    os.kill(os.getpid(), signal.SIGSEGV)
print(got == [(signal.SIGSEGV, signal.SIGSEGV, True)])
"""
    assert run(code) == "True\n"


def test_under_a_handler_that_was_installed_later_no_new_tracker_is_opened():
    """Over it once more, the two handlers would call each other for ever."""
    code = """
tracker = dl.track(array_of(4), "mprotect")
faulthandler.enable()
try:
    dl.track(array_of(4), "mprotect")
except dl.BackendUnavailable as error:
    print(error.probed)
faulthandler.disable()
libc.signal(signal.SIGSEGV, 0)
array = array_of(4)
with dl.track(array, "mprotect") as another:
    array[3] = 1
    print(another.harvest().indices().tolist(), flush=True)
    ctypes.memset(0, 1, 1)
"""
    assert run(code, returncode=-11) == "sigaction(SIGSEGV): Device or resource busy\n[3]\n"


def test_a_fault_on_memory_that_was_closed_since_is_tried_again_once_a_close():
    """The signal of such a fault is sent by hand: the same number, code and address, with no store behind it."""
    call = {"x86_64": 297, "aarch64": 240}.get(platform.machine())
    if call is None:
        pytest.skip(f"the number of rt_tgsigqueueinfo on {platform.machine()} is not known here")
    code = f"""
import struct
got = []
signal.signal(signal.SIGSEGV, lambda number, frame: got.append(number))
array = array_of(4)
def close_one():
    dl.track(array, "mprotect").close()
def fault():
    info = struct.pack("iiiiQ104x", signal.SIGSEGV, 0, 2, 0, array.ctypes.data)
    assert libc.syscall({call}, os.getpid(), threading.get_native_id(), signal.SIGSEGV, info) == 0
    return len(got)
close_one()
print(fault(), fault(), fault())
close_one()
print(fault(), fault())
with dl.track(array, "mprotect"):
    print(fault())
"""
    assert run(code) == "0 1 2\n2 3\n3\n"


def test_a_fault_that_races_with_close_is_not_taken_for_a_crash():
    code = """
array = array_of(64)
stop = threading.Event()
def write():
    while not stop.is_set():
        array[:] = 1
threads = [threading.Thread(target=write) for _ in range(3)]
for thread in threads:
    thread.start()
for _ in range(300):
    dl.track(array, "mprotect").close()
stop.set()
for thread in threads:
    thread.join()
print("alive")
"""
    assert run(code) == "alive\n"


def test_a_store_to_the_handlers_own_books_cannot_fault():
    """The log of a tracker lies in pages of its own: tracking every small buffer there is does no harm."""
    code = """
import gc
buffers = [bytearray(3000) for _ in range(400)]
trackers = [dl.track(buffer, "mprotect") for buffer in buffers]
for buffer, tracker in zip(buffers, trackers):
    buffer[0] = buffer[2999] = 1
    assert 0 in tracker.harvest()
for tracker in trackers:
    tracker.close()
print("alive")
"""
    assert run(code) == "alive\n"


def test_pages_that_cannot_be_protected_again_stay_marked():
    """I1 and I6: no mapping is left to protect with, so the pages are reported until there is."""
    answer = run(
        USE_UP_MAPPINGS
        + """
array = array_of(64)
inner = array[10:20]
tracker = dl.track(inner, "mprotect")
_tracking.allow_splits(10**9)
inner[:] = 1
spare, split = use_up_mappings()
for _ in range(2):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        answer = tracker.harvest()
    print(answer.count, answer.exact, [warning.category.__name__ for warning in caught])
for page in split[:100]:
    libc.mprotect(spare + page * PAGE, PAGE, 0)
print(tracker.harvest().count, tracker.harvest().count)
tracker.close()
"""
    )
    assert answer == 2 * "10 False ['IncompleteLogWarning']\n" + "10 0\n"


def test_a_close_between_two_chunks_of_a_harvest_leaves_no_page_protected():
    """The harvest's first store to its answer faults, outside the lock, and the handler closes the tracker there."""
    code = """
from dirtylog.sources.memory.probe import mappings_of
array = dl.zeros((32768, PAGE), np.uint8)
# The engine itself, so that the words of the answer lie where this test wants them.
class Engine(ctypes.Structure):
    span = ctypes.c_void_p
    _fields_ = [
        ("open", ctypes.CFUNCTYPE(ctypes.c_int, span, ctypes.c_uint64, ctypes.POINTER(ctypes.c_int))),
        ("close", ctypes.CFUNCTYPE(None, span)),
        ("collect", ctypes.CFUNCTYPE(ctypes.c_int, span, ctypes.c_void_p, ctypes.c_int)),
    ]
engines = ctypes.CDLL(_tracking.__file__)
engine = Engine.in_dll(engines, "dl_mprotect_engine")
engines.dl_span_new.restype = ctypes.c_void_p
engines.dl_span_new.argtypes = [ctypes.c_uint64, ctypes.c_uint64]
span = engines.dl_span_new(array.ctypes.data // PAGE, 32768)
words = np.frombuffer(mmap.mmap(-1, PAGE), np.uint64)
@ctypes.CFUNCTYPE(None, ctypes.c_int)
def close(number):
    libc.mprotect(words.ctypes.data, PAGE, mmap.PROT_READ | mmap.PROT_WRITE)
    engine.close(span)
libc.signal(signal.SIGSEGV, close)
assert engine.open(span, PAGE, ctypes.byref(ctypes.c_int())) == 0
array[[5, 32767]] = 1
libc.mprotect(words.ctypes.data, PAGE, mmap.PROT_READ)
print(engine.collect(span, words.ctypes.data, True) == -errno.EBADF)
print([mapping for mapping in mappings_of(array.ctypes.data, array.nbytes) if "w" not in mapping.permissions])
libc.signal(signal.SIGSEGV, 0)
array[[5, 32767]] = 2
"""
    assert run(code) == "True\n[]\n"


@pytest.mark.parametrize("call", ["peek", "harvest"])
@pytest.mark.parametrize("change", ["faulthandler.disable()", "libc.signal(signal.SIGSEGV, 0)"])
def test_a_harvest_that_finds_the_handler_gone_opens_the_memory_and_says_so(change, call):
    code = f"""
faulthandler.enable()
array = array_of(4)
tracker = dl.track(array, "mprotect")
{change}
try:
    tracker.{call}()
except dl.DirtyLogError as error:
    print("handler was replaced" in str(error), flush=True)
array[:] = 1
tracker.close()
with dl.track(array, "mprotect") as again:
    array[3] = 1
    print(again.harvest().indices().tolist())
"""
    assert run(code) == "True\n[3]\n"


def test_when_the_handler_is_back_every_page_is_reported():
    code = """
array = array_of(4)
tracker = dl.track(array, "mprotect")
faulthandler.enable()
try:
    tracker.harvest()
except dl.DirtyLogError:
    array[1] = 1
faulthandler.disable()
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    answer = tracker.harvest()
print(answer.count, answer.exact, len(caught))
array[2] = 1
print(tracker.harvest().indices().tolist())
tracker.close()
"""
    assert run(code) == "4 False 1\n[2]\n"
