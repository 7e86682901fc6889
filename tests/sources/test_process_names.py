"""What regions of a process are called: by the program's arrays, its threads, its allocators, its files."""

import ctypes
import mmap
import os
import re
import socket
import sys
import sysconfig
import threading
from dataclasses import replace

import pytest

import dirtylog as dl
from dirtylog.sources.process import Region, inside, naming
from dirtylog.sources.process.handover import Connection
from dirtylog.sources.process.launch import launch
from dirtylog.sources.process.naming import Names

from .test_process import PAGE, Puppet, attach

MIB = 1 << 20
ARRAYS = """\
import tracemalloc; tracemalloc.start(4)
import numpy as np
class Model: pass
class Slotted: __slots__ = "inner",
weights = np.ones((512, 512))
view = weights[5:]
model = Model(); model.layers = [np.ones(1 << 17), {"bias": np.ones(1 << 17, order="F")}]
model._hidden = Slotted(); model._hidden.inner = np.ones((1 << 9, 1 << 9))[::-1, ::-2]
raw = bytearray(1 << 20)
def work():
    local = np.ones(1 << 17)
    ready.set()
    signal.pause()
def generator():
    kept = np.ones(1 << 17)
    yield
    yield kept
running = [generator()]; next(running[0])
def closed_over():
    inner = np.ones(1 << 17)
    return lambda: inner
function = closed_over()
ready = threading.Event()
threading.Thread(target=work, daemon=True).start()
ready.wait()
"""

# What Python takes small objects from.
ALLOCATOR = "mimalloc" if sysconfig.get_config_var("Py_GIL_DISABLED") else "pymalloc"
THREAD = """\
def named():
    open("/proc/thread-self/comm", "w").write("reader-7")
    held["arenas"] = [bytearray(99_999) for _ in range(40)]
    held["small"] = [object() for _ in range(99_999)]
    allocated.set()
    signal.pause()
allocated = threading.Event()
thread = threading.Thread(target=named, daemon=True)
thread.start()
allocated.wait()
# One that runs does not tell its stack pointer. pause, or ppoll where there is none:
while open(f"/proc/self/task/{thread.native_id}/syscall").read().split()[0] not in ("34", "73"):
    pass
"""


@pytest.fixture(scope="module")
def helper(tmp_path_factory):
    """A puppet whose agent listens, and where."""
    path = str(tmp_path_factory.mktemp("agent") / "socket")
    with Puppet() as puppet:
        puppet.do(f"held.update(a=__import__('dirtylog.agent').agent.listen({path!r}))")
        puppet.do(f"exec({ARRAYS!r}, globals())")
        yield puppet, path


def test_a_program_with_more_than_a_thousand_open_files_answers(many_open, monkeypatch):
    monkeypatch.setattr(inside, "find_arrays", lambda: [("w", 0, MIB)])
    ours, theirs = socket.socketpair()
    with ours:
        assert theirs.fileno() > 1023
        answering = threading.Thread(target=inside.answer, args=(None, [theirs]), daemon=True)
        answering.start()
        assert Connection(ours, os.getpid(), timeout=60).arrays() == [("w", 0, MIB)]
    answering.join()


def test_the_program_names_its_arrays_wherever_they_are_held(helper):
    puppet, path = helper
    with Connection(path, puppet.pid) as connection:
        found = connection.arrays()
        again = connection.arrays()
    names = {name.partition(" (")[0]: end - start for name, start, end in found}
    assert names["weights"] == 512 * 512 * 8
    assert names["model.layers[0]"] == names["model.layers[1]['bias']"] == MIB
    assert names["model.inner"] == 2 * MIB
    assert names["raw"] == MIB
    assert names["work.local"] == MIB
    assert sum(name.startswith("ndarray in a ") for name in names) >= 2  # held by a generator, by a cell
    assert "view" not in names
    assert sorted(again) == sorted(found)
    # By NumPy's domain of tracemalloc.
    assert any(name.startswith("weights (<string>:") for name, _, _ in found)
    address = puppet.do("weights.__array_interface__['data'][0]")
    assert address in {start for _, start, _ in found}


def test_regions_are_cut_where_the_programs_arrays_begin(helper):
    puppet, path = helper
    with dl.attach(puppet.pid, handover=path) as process, Connection(path, puppet.pid) as connection:
        names = Names(process.pid, connection.arrays)
        regions = process.regions  # the harvest below finds what the process maps meanwhile
        named = names(regions)
        weights = next(region for region in named if region.name.startswith("weights"))
        assert weights.npages == 513
        puppet.do("weights.__setitem__((0, 0), 3)")
        dirty = process.harvest()
        first = dl.DirtyPages.from_runs([[weights.first_page, 1]], dirty.npages)
        assert (dirty & first).count == 1
        assert sum(region.npages for region in named) == sum(region.npages for region in regions)
        puppet.do("globals().__delitem__('weights')")
        assert any(region.name.startswith("weights") for region in names(process.regions)), "asked only now and then"


def test_a_program_that_does_not_answer_is_not_asked_again():
    asked = []

    def arrays():
        asked.append(1)
        raise ConnectionResetError

    names = Names(os.getpid(), arrays)
    region = Region(PAGE, 3 * PAGE, 0, 2, "anonymous", "")
    assert names([region]) == names([region]) == [replace(region, name="anonymous")]
    assert asked == [1]


def test_an_answer_that_comes_late_is_taken_at_a_later_look():
    """One time-out is no refusal: on a busy machine the program answers when it comes to run."""
    import socket

    ours, theirs = socket.socketpair()
    now = [0.0]
    region = Region(PAGE, 3 * PAGE, 0, 2, "anonymous", "")
    with ours, theirs:
        names = Names(os.getpid(), Connection(ours, 1, timeout=0.01).arrays, lambda: now[0])
        text = b'[[["late", 4096, 8192]], 0.01]'
        answer = inside.LENGTH.pack(len(text)) + text
        for part in (b"", answer[:3], answer[3:9]):
            theirs.sendall(part)
            assert [each.name for each in names([region])] == ["anonymous"]
            now[0] += 1.0
        theirs.sendall(answer[9:])
        assert [each.name for each in names([region])] == ["late", "anonymous"]
        assert theirs.recv(100) == inside.NAMES, "it was asked once"


def test_an_answer_that_came_late_and_cost_little_is_no_reason_to_wait_long():
    """By the program's own time: on a busy machine, what was allocated since had no names for ten seconds."""
    now, asked, spent, price = [0.0], [], [0.0], [0.02]

    def arrays():
        asked.append(now[0])
        now[0] += 0.25
        spent[0] += price[0]
        return []

    names = Names(os.getpid(), arrays, lambda: now[0], spent=lambda: spent[0])

    def allocate(second):
        now[0] = float(second)
        names([Region(second * MIB, (second + 1) * MIB, 0, 256, "anonymous", "")])

    for second in range(0, 20, 2):
        allocate(second)
    assert asked == list(range(0, 20, 2))
    # Beyond half a second, no more than a fiftieth of the time.
    price[0] = 1.3
    for second in range(20, 60, 2):
        allocate(second)
    assert asked[10:] == [20, 50]


def test_objects_that_change_while_they_are_looked_through_are_looked_at_again(monkeypatch):
    import socket

    def changed():
        raise RuntimeError("dictionary changed size during iteration")

    ours, theirs = socket.socketpair()
    with ours, theirs:
        connection = Connection(ours, 1, timeout=5.0)
        monkeypatch.setattr(inside, "find_arrays", changed)
        ours.sendall(inside.NAMES)
        connection._asked = True
        assert inside._reply(theirs)
        with pytest.raises(TimeoutError, match="this time"):
            connection.arrays()
        monkeypatch.setattr(inside, "find_arrays", lambda: [("a", 1, 2)])
        ours.sendall(inside.NAMES)
        connection._asked = True
        assert inside._reply(theirs)
        assert connection.arrays() == [("a", 1, 2)]


@pytest.mark.parametrize(
    ("kind", "name", "called"),
    [
        ("heap", "[heap]", "heap"),
        ("anonymous", "", "anonymous"),
        ("anonymous", "[anon:v8 heap]", "v8 heap"),
        ("shared", "[anon_shmem:ring]", "ring"),
        ("file", "/usr/lib/libc.so.6", "libc.so.6"),
        ("shared", "/memfd:guest_mem (deleted)", "memfd:guest_mem"),
        ("stack", "[thread stack]", "stack of a thread"),
    ],
)
def test_what_the_kernel_calls_a_mapping_is_put_plainly(kind, name, called):
    assert naming._plain(Region(PAGE, 2 * PAGE, 0, 1, kind, name)) == called


def test_threads_and_allocators_are_named(helper):
    puppet, path = helper
    puppet.do(f"exec({THREAD!r}, globals())")
    with dl.attach(puppet.pid, "all", handover=path) as process:
        called = {region.name: region for region in Names(process.pid)(process.regions)}
    assert "glibc arena" in called
    assert ALLOCATOR in called
    assert "stack of reader-7" in called


def test_a_segment_of_mimalloc_is_told_by_its_size():
    with mmap.mmap(-1, 128 * MIB, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        region = Region(start, start + 128 * MIB, 0, 128 * MIB // PAGE, "anonymous", "")
        assert naming._allocator(os.getpid(), region, {}) == ""
        segment = -(-start // (32 * MIB)) * 32 * MIB
        memory[segment - start + 32 : segment - start + 40] = (32 * MIB).to_bytes(8, "little")
        assert naming._allocator(os.getpid(), region, {}) == "mimalloc"


def test_what_a_region_was_called_is_kept_when_its_process_has_ended():
    """Also if the last look brings regions that are new: all of them are looked at again then, and nothing is there."""
    with Puppet() as puppet:
        puppet.do(f"exec({THREAD!r}, globals())")
        names = Names(puppet.pid)
        with attach(puppet.pid, select="all") as process:
            regions = process.regions
            before = names(regions)
        puppet.process.kill()
        puppet.process.wait()
        new = Region(1 << 40, (1 << 40) + PAGE, 1, 1, "anonymous", "", puppet.pid)
        assert {"glibc arena", ALLOCATOR} <= {region.name for region in before}
        assert names([*regions, new]) == [*before, replace(new, name="anonymous")]


def test_a_program_that_ended_before_the_first_look_is_read_through_what_keeps_its_memory():
    code = "kept = [object() for _ in range(99_999)]; import os; os._exit(0)"
    try:
        program = launch([sys.executable, "-c", code])
    except dl.BackendUnavailable as missing:
        pytest.skip(str(missing))
    with program:
        while program.poll() is None:
            program.wait(60)
        program.process.harvest()
        names = Names(program.pid, memory_of=lambda: program.process.memory_of)
        assert ALLOCATOR in {region.name for region in names(program.process.regions)}


def test_pieces_cover_a_region_once_and_a_page_of_two_arrays_is_the_firsts():
    region = Region(10 * PAGE, 20 * PAGE, 100, 10, "anonymous", "rest", 7)
    arrays = [("a", 12 * PAGE + 5, 14 * PAGE + 5), ("b", 14 * PAGE + 5, 16 * PAGE), ("c", 19 * PAGE, 25 * PAGE)]
    pieces = naming._cut(region, arrays)
    assert [(each.name, each.start // PAGE, each.first_page, each.npages) for each in pieces] == [
        ("rest", 10, 100, 2),
        ("a", 12, 102, 3),
        ("b", 15, 105, 1),
        ("rest", 16, 106, 3),
        ("c", 19, 109, 1),
    ]
    assert naming._cut(region, [("elsewhere", 0, PAGE)]) == [region]


def test_what_a_program_says_is_not_believed_blindly(tmp_path):
    import socket

    for said in (
        b"\xff\xff\xff\xff",
        inside.LENGTH.pack(3) + b"[1]",
        inside.LENGTH.pack(8) + b"[[1], 2]",
        inside.LENGTH.pack(9) + b"[",
        b"",
    ):
        ours, theirs = socket.socketpair()
        with ours, theirs:
            theirs.sendall(said)
            theirs.shutdown(socket.SHUT_WR)
            with pytest.raises(OSError, match=r"read|used|hung up"):
                Connection(ours, 1).arrays()


def test_where_no_agent_listens_is_named(tmp_path):
    nowhere = str(tmp_path / "nobody")
    for ask in (lambda: dl.attach(os.getppid(), handover=nowhere), lambda: Connection(nowhere, os.getpid())):
        with pytest.raises(FileNotFoundError, match=re.escape(nowhere)):
            ask()
