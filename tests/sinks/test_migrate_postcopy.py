"""A copy that runs before it has everything: what it touches comes first, and whatever breaks it never sees zeros."""

import contextlib
import ctypes
import errno
import mmap
import os
import queue
import re
import select
import socket
import threading
from pathlib import Path

import numpy as np
import pytest

import dirtylog as dl
from dirtylog import DirtyBitmap, DirtyLog, DirtyPages
from dirtylog.sinks.migrate import Control, MigrationError, receive, send, serving, status
from dirtylog.sinks.migrate._frames import ENDED
from dirtylog.sinks.migrate._postcopy import ODD, Faults
from dirtylog.sinks.migrate.payloads import EXTENT, PAGES
from dirtylog.sinks.migrate.wire import Channel, Kind
from dirtylog.sinks.snapshot.space import Space
from dirtylog.sources.memory import probe

from .. import warm
from .test_migrate_control import Clock

PAGE = 4096
NPAGES = 512
# Without the GIL, as whatever runs beside a migration should.
LIBC = ctypes.CDLL(None)
LIBC.memcmp.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
LIBC.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]


def guarded():
    """Say why no memory can be guarded here, or nothing."""
    try:
        Faults([(0, dl.zeros(PAGE, np.uint8))], PAGE, PAGE, np.ones(1, np.uint64), bytes(16)).release()
    except OSError as error:
        return str(error)
    return ""


pytestmark = pytest.mark.skipif(bool(guarded()), reason=guarded())


class Source:
    """Memory with a log; after the first round some of it is written again."""

    def __init__(self, npages=NPAGES, page_size=PAGE, cut=0, seed=0):
        rng = np.random.default_rng(seed)
        self.memory = rng.integers(1, 256, npages * page_size - cut, np.uint8)
        self.memory[page_size * (npages // 4) : page_size * (npages // 2)] = 0
        self.page_size, self.npages = page_size, npages
        self.bitmap = DirtyBitmap(npages, page_size)
        log = DirtyLog()
        log.attach(self.bitmap)
        self.observer = log.observer("migration")
        self.paused = False

    def round(self, each):
        if not each.final:
            self.memory[: self.page_size] = 77
            self.memory[self.page_size * (self.npages // 4) :][: self.page_size] += 3
            self.bitmap.mark_pages([0, self.npages // 4])

    def pause(self):
        self.paused = True


class Relay:
    """Connections between two ends that can be held up and cut: after so many bytes forth, or back."""

    def __init__(self):
        self.waiting, self.cuts, self.threads = queue.Queue(), [], []
        # Of each connection after how much; and how much came back over all of them.
        self.backs, self.back = [], 0
        # Whether nothing goes forth from DONE on until `free` is set.
        self.holds = False
        self.held = threading.Event()
        # The word, forth or back, that is lost with its line.
        self.loses = None
        self.free = threading.Event()
        self.free.set()

    def connect(self, breaks=0):
        here, near = socket.socketpair()
        far, there = socket.socketpair()
        for sock in (here, there):
            sock.settimeout(30)
        thread = threading.Thread(target=self.run, args=(near, far))
        thread.start()
        self.threads.append(thread)
        self.waiting.put(there)
        return here

    def accept(self, breaks=0):
        return self.waiting.get(timeout=30)

    def run(self, near, far):
        cut = self.cuts.pop(0) if self.cuts else None
        left = self.backs.pop(0) if self.backs else None
        forth = back = 0
        with near, far, contextlib.suppress(OSError):
            while True:
                ready, _, _ = select.select([near, far], [], [])
                if far in ready:
                    if not (data := far.recv(1 << 16 if left is None else min(1 << 16, left - back))):
                        break
                    if self.loses is not None and data[5:6] == bytes([self.loses]):
                        break
                    if self.holds and data[5:6] == bytes([Kind.DONE]):
                        self.free.clear()
                        self.held.set()
                    near.sendall(data)
                    back += len(data)
                    self.back += len(data)
                    if back == left:
                        break
                if near in ready:
                    most = 1 << 16 if cut is None else min(1 << 16, cut - forth)
                    if not (data := near.recv(most)):
                        break
                    if self.loses is not None and data[5:6] == bytes([self.loses]):
                        break
                    self.free.wait(30)
                    far.sendall(data)
                    forth += len(data)
                    if forth == cut:
                        break

    def join(self):
        for thread in self.threads:
            thread.join()


class Copy(threading.Thread):
    """Receives; `answer` is the memory or the error, `started` the memory as soon as it runs."""

    def __init__(self, sock, use=None, **options):
        super().__init__()
        self.sock, self.use, self.options = sock, use, options
        self.started, self.answer, self.users = queue.Queue(), None, []
        self.start()

    def begin(self, memory):
        self.started.put(memory)
        if self.use is not None:
            user = threading.Thread(target=self.use, args=(memory,), daemon=True)
            user.start()
            self.users.append(user)

    def run(self):
        with self.sock:
            try:
                self.answer = receive(self.sock, start=self.begin, **{"postcopy": True, **self.options})
            except Exception as error:
                self.answer = error
        for user in self.users:
            if not isinstance(self.answer, Exception):
                user.join()


def migrated(source, use=None, relay=None, memory=None, receiver=None, **options):
    relay = relay or Relay()
    options = {"postcopy": 0, "pause": source.pause, "progress": source.round, **options}
    with relay.connect() as here:
        copy = Copy(relay.accept(), use, **(receiver or {}))
        try:
            outcome = send(here, source.memory if memory is None else memory, source.observer, **options)
        except Exception as error:
            outcome = error
    copy.join()
    relay.join()
    return outcome, copy


@pytest.mark.parametrize("postcopy", [0, 1, 2])
@pytest.mark.parametrize(("page_size", "cut"), [(PAGE, 0), (PAGE, 4000), (1 << 16, 100), (1 << 21, 5000)])
def test_a_copy_that_runs_at_once_has_all_of_it_in_the_end(postcopy, page_size, cut):
    source = Source(6 if page_size > 1 << 16 else 64, page_size, cut)
    result, copy = migrated(source, postcopy=postcopy)
    assert (copy.answer == source.memory).all()
    # What is written after the first round has been collected is for the last.
    assert len(result.rounds) == min(postcopy, 1) + 1
    assert result.rounds[-1].final
    assert result.rounds[-1].pages == (source.npages if postcopy == 0 else 2)
    assert source.paused
    assert status(result.session, end="source").stage == "done"
    assert status(result.session, end="copy").stage == "runs"


def test_a_copy_that_lacks_nothing_has_a_last_round_as_well():
    source = Source(64)
    result, copy = migrated(source, postcopy=2, progress=None)
    assert [(each.final, each.pages) for each in result.rounds] == [(False, 64), (True, 0)]
    assert (copy.answer == source.memory).all()


def test_several_channels_and_compression_carry_the_live_rounds():
    source, relay = Source(), Relay()
    live = {"postcopy": 1, "channels": 3, "another": relay.connect, "compress": True}
    result, copy = migrated(source, relay=relay, receiver={"another": relay.accept}, **live)
    assert (copy.answer == source.memory).all()
    assert result.rounds[-1].pages == 2


@pytest.mark.parametrize("ahead", [1, 64, 1 << 15])
def test_pages_that_lie_far_apart_are_found_however_far_is_looked_ahead(monkeypatch, ahead):
    monkeypatch.setattr(serving, "_AHEAD", ahead)
    source, lacking = Source(1024), [0, 40, 700, 1023]

    def writes(each):
        if not each.final:
            source.memory.reshape(-1, PAGE)[lacking] += 1
            source.bitmap.mark_pages(lacking)

    result, copy = migrated(source, postcopy=1, progress=writes)
    assert (copy.answer == source.memory).all()
    assert result.rounds[-1].pages == len(lacking)


def test_arrays_by_name_come_while_they_are_used_with_their_state():
    rng = np.random.default_rng(3)
    arrays = {"a": rng.random(3000), "b": rng.integers(1, 9, 17, np.uint8), "c": rng.random((70, 99)).T}
    npages = sum(-(-each.nbytes // PAGE) for each in arrays.values())
    log = DirtyLog()
    log.attach(DirtyBitmap(npages))
    source, states = Source(), []
    source.observer = log.observer("m")
    _, copy = migrated(source, memory=arrays, state={"rip": 7}, receiver={"state": states.append})
    assert states == [{"rip": 7}]
    assert all((copy.answer[name] == each).all() for name, each in arrays.items())


def test_threads_read_and_write_what_has_not_come():
    source = Source(4096)
    wrong = []

    def use(memory):
        start = memory.ctypes.data
        rng = np.random.default_rng(5)

        def one(first):
            # Each page of its own is read first, or written first: what is written stays.
            for page in rng.permutation(np.arange(first, 4096, 3)):
                at = int(page) * PAGE
                if page % 2:
                    LIBC.memset(start + at, int(page) % 251, PAGE // 2)
                if LIBC.memcmp(start + at + PAGE // 2, source.memory.ctypes.data + at + PAGE // 2, PAGE // 2):
                    wrong.append(page)

        threads = [threading.Thread(target=one, args=(first,)) for first in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    _, copy = migrated(source, use)
    assert not wrong
    pages = copy.answer.reshape(-1, PAGE)
    assert all((pages[page, : PAGE // 2] == page % 251).all() for page in range(1, 4096, 2))
    assert (pages[::2] == source.memory.reshape(-1, PAGE)[::2]).all()


# ---- over a real sender ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cuts", [[300_000, 700_000, None], [100, 150, 400_000, None]])
def test_a_line_that_is_cut_while_the_copy_runs_is_replaced_and_nothing_is_lost(cuts):
    source, relay, wrong = Source(1024), Relay(), []
    relay.cuts = list(cuts)

    def use(memory):
        for page in np.random.default_rng(1).permutation(1024):
            at = int(page) * PAGE
            if LIBC.memcmp(memory.ctypes.data + at, source.memory.ctypes.data + at, PAGE):
                wrong.append(page)
            LIBC.memset(memory.ctypes.data + at, 5, PAGE)

    result, copy = migrated(source, use, relay, reconnect=relay.connect, receiver={"reconnect": relay.accept})
    assert not isinstance(result, Exception), result
    assert result.breaks == len(cuts) - 1
    assert not wrong
    assert (copy.answer == 5).all()


def test_a_line_that_is_lost_for_good_stops_the_copy_and_revives_nobody():
    source, relay, resumed = Source(), Relay(), []
    relay.cuts = [500_000]
    outcome, copy = migrated(source, relay=relay, resume=lambda: resumed.append(1))
    for error in (outcome, copy.answer):
        assert isinstance(error, MigrationError)
        assert not error.uncertain
    assert "the copy runs, and the line to it broke while it lacked" in str(outcome)
    assert "the copy runs, and waits where it lacks" in str(copy.answer)
    assert not resumed
    ends = [status(outcome.session, end=end) for end in ("source", "copy")]
    assert [(end.stage, end.may_run) for end in ends] == [("serves", False), ("faults", True)]


def test_what_is_called_while_the_copy_runs_does_not_end_it():
    source, relay, calls = Source(), Relay(), []
    relay.holds = True

    def fails(*_):
        calls.append(None)
        relay.free.set()
        raise OSError(28, "no space left")

    with relay.connect() as here:
        copy = Copy(relay.accept(), progress=fails)
        result = send(here, source.memory, source.observer, postcopy=0)
    copy.join()
    relay.join()
    assert "no space left" in str(copy.answer)
    assert len(calls) == 1
    assert status(result.session, end="copy").stage == "runs"
    assert (copy.started.get() == source.memory).all()


def test_what_the_copy_waits_for_goes_at_once_and_the_background_keeps_to_the_limit():
    source, relay, control, found = Source(), Relay(), Control(), []
    relay.holds = True

    def use(memory):
        # Nothing has come so far. From here on the background would take days.
        control.bandwidth = 1.0
        relay.held.wait(30)
        relay.free.set()
        for page in (NPAGES - 1, 450, 400):
            at = page * PAGE
            found.append(LIBC.memcmp(memory.ctypes.data + at, source.memory.ctypes.data + at, PAGE))
        control.bandwidth = None

    result, copy = migrated(source, use, relay, control=control)
    assert found == [0, 0, 0]
    assert (copy.answer == source.memory).all()
    # How far it is can be seen from outside.
    assert (control.nbytes, control.round) == (result.nbytes, len(result.rounds))
    assert control.wire_bytes >= result.wire_bytes - 4096


class Poll:
    """A poll that hears nothing, and whose time is a clock's."""

    def __init__(self, clock):
        self.clock = clock

    def poll(self, milliseconds):
        self.clock.now += milliseconds / 1000
        return []


def test_the_background_waits_as_long_as_the_limit_says():
    clock, here = Clock(), socket.socketpair()
    control = Control(1000, clock=clock, sleep=clock.sleep)
    memory = Source(64).memory
    space = Space(memory, PAGE)
    served = serving.Serving(space, PAGE, DirtyPages.from_runs([(0, 64)], 64), control)
    with here[0], here[1]:
        channel = Channel(here[0])
        channel.pace = control._note
        assert not served._hears(channel, Poll(clock))
        assert clock.now == 0
        served._asked(channel, memoryview(EXTENT.pack(63 * PAGE, PAGE)))
        assert not served._hears(channel, Poll(clock))
        assert clock.now * 1000 == pytest.approx(control.wire_bytes)
        assert control.wire_bytes > PAGE


@pytest.mark.parametrize("end", ["source", "copy"])
def test_a_deadline_that_is_over_when_the_copy_runs_ends_neither(end, monkeypatch):
    source, relay = Source(), Relay()
    relay.cuts = [500_000, None]
    send_frame = Channel.send

    def late(channel, kind, *parts, **options):
        send_frame(channel, kind, *parts, **options)
        if kind == (Kind.RUN if end == "source" else Kind.DONE) and channel._deadline is not None:
            channel._deadline = 0

    monkeypatch.setattr(Channel, "send", late)
    deadlines = {"deadline": 1000.0} if end == "source" else {}
    receiver = {"reconnect": relay.accept} | ({"deadline": 1000.0} if end == "copy" else {})
    result, copy = migrated(source, relay=relay, reconnect=relay.connect, receiver=receiver, **deadlines)
    assert not isinstance(result, Exception), result
    assert result.breaks == 1
    assert (copy.answer == source.memory).all()


@pytest.mark.parametrize(
    ("receiver", "message"),
    [
        ({"postcopy": False}, "pass postcopy=True"),
        ({"arrived": print}, "arrived="),
        ({"out": lambda nbytes: dl.zeros(nbytes + PAGE, np.uint8)[16:][:nbytes]}, "whole pages|begin with"),
        ({"out": lambda nbytes: mmap.mmap(-1, nbytes)}, "private anonymous memory"),
    ],
)
def test_a_receiver_that_cannot_let_it_run_says_so_and_the_source_goes_on(receiver, message):
    source = Source(8)
    outcome, copy = migrated(source, receiver=receiver)
    assert isinstance(outcome, MigrationError)
    assert re.search(message, str(outcome))
    assert isinstance(copy.answer, MigrationError)
    assert source.observer.collect().__enter__().pages.count == 8 or not outcome.rounds


def test_memory_of_which_the_system_tells_nothing_is_not_filled_while_it_is_used(monkeypatch):
    monkeypatch.setattr(probe, "mappings_of", lambda *_: [])
    outcome, _ = migrated(Source(8), receiver={"out": dl.zeros(8 * PAGE, np.uint8)})
    assert "private anonymous memory" in str(outcome)


def test_a_sender_that_cannot_says_so_before_anything_is_sent():
    source = Source(8)
    here, there = socket.socketpair()
    with here, there:
        for options, message in (
            ({"postcopy": -1}, "must be a number of live rounds, 0 or more"),
            ({"postcopy": 0, "page": 512}, "postcopy takes 4096 or more"),
        ):
            if options.pop("page", None):
                source = Source(8, 512)
            with pytest.raises(ValueError, match=message):
                send(here, source.memory, source.observer, **options)
        source = Source(8)
        with Other(fileno=here.detach()) as other, pytest.raises(ValueError, match="descriptor tells what has come"):
            send(other, source.memory, source.observer, postcopy=0)


class Other(socket.socket):
    """A socket of somebody's own."""


# ---- the guard by itself ---------------------------------------------------------------------------------------------


class Guarded:
    """Memory that is guarded, with a line of which this is the other end."""

    def __init__(self, npages):
        self.memory = dl.zeros(npages * PAGE, np.uint8)
        self.start = self.memory.ctypes.data
        words = np.zeros(-(-npages // 64), np.uint64)
        DirtyBitmap.from_buffer(words, npages).fill()
        self.faults = Faults([(0, self.memory)], self.memory.nbytes, PAGE, words, b"s" * 16)
        self.faults.start()
        self.line()

    def line(self):
        here, self.there = socket.socketpair()
        here.settimeout(30)
        self.channel = Channel(here)
        self.faults.line(self.there.fileno(), 0, 0, 30.0)

    def hang_up(self):
        self.channel.sock.close()
        while (why := self.faults.wait(30)) == 0:
            pass
        self.there.close()
        return why

    def wanted(self):
        return EXTENT.unpack(self.channel.receive(Kind.WANT, counted=False)[1])

    def give(self, *pages, byte=9):
        for page in pages:
            self.channel.send(Kind.PAGES, PAGES.pack(1, 0), EXTENT.pack(page * PAGE, PAGE), bytes([byte]) * PAGE)

    def touch(self, page):
        """Write to a page in a thread of its own."""
        thread = threading.Thread(target=LIBC.memset, args=(self.start + page * PAGE, 1, 1), daemon=True)
        thread.start()
        return thread

    def end(self):
        assert self.channel.receive(Kind.FILLED, counted=False)[1] == b"s" * 16
        while self.faults.wait(30) == 0:
            pass
        self.faults.release()
        for sock in (self.channel.sock, self.there):
            sock.close()
        return self.memory.reshape(-1, PAGE)


def test_a_page_that_is_touched_is_asked_for_once_and_is_the_programs_when_it_has_come():
    guarded = Guarded(64)
    thread = guarded.touch(40)
    assert guarded.wanted() == (40 * PAGE, PAGE)
    guarded.give(40)
    thread.join()
    # A page that comes twice, say after a line was replaced, is laid once.
    guarded.give(40, byte=7)
    guarded.give(*(page for page in range(64) if page != 40))
    pages = guarded.end()
    assert pages[40, :2].tolist() == [1, 9]
    assert (pages[:, 1:] == 9).all()


def test_what_was_asked_for_on_a_line_that_broke_is_asked_for_again():
    guarded = Guarded(64)
    threads = [guarded.touch(page) for page in (3, 50)]
    assert {guarded.wanted()[0], guarded.wanted()[0]} == {3 * PAGE, 50 * PAGE}
    assert guarded.hang_up() == ENDED
    guarded.line()
    assert {guarded.wanted()[0], guarded.wanted()[0]} == {3 * PAGE, 50 * PAGE}
    guarded.give(*range(64))
    for thread in threads:
        thread.join()
    assert guarded.end()[[3, 50], 0].tolist() == [1, 1]


@pytest.mark.parametrize(
    ("kind", "extent"),
    [
        (Kind.PAGES, (PAGE, 1)),
        (Kind.PAGES, (64 * PAGE, PAGE)),
        (Kind.PAGES, (-PAGE, PAGE)),
        (Kind.PAGES, (0, 1 << 40)),
        (Kind.PAGES, (1, PAGE)),
        (Kind.PAGES, ((1 << 63) - 1, 2)),
        (Kind.DELTAS, (0, PAGE)),
    ],
)
def test_frames_of_somebody_who_lies_end_the_line_and_are_not_laid(kind, extent):
    guarded = Guarded(64)
    guarded.channel.send(kind, PAGES.pack(1, 0), EXTENT.pack(*extent), bytes(PAGE))
    assert guarded.hang_up() == ODD
    assert guarded.faults.left == 64
    guarded.line()
    guarded.give(*range(64))
    assert (guarded.end() == 9).all()


def test_the_kernel_waits_for_pages_as_well_where_it_may():
    guarded = Guarded(64)
    if guarded.faults.user_mode_only:
        guarded.give(*range(64))
        guarded.end()
        pytest.skip("this process may not have a userfaultfd for the kernel's faults")
    here, there = os.pipe()
    with open(here, "rb", buffering=0) as reading, open(there, "wb", buffering=0) as writing:
        writing.write(b"abc")
        thread = threading.Thread(target=reading.readinto, args=(guarded.memory[7 * PAGE : 7 * PAGE + 3],))
        thread.start()
        assert guarded.wanted() == (7 * PAGE, PAGE)
        guarded.give(*range(64))
        thread.join()
    assert bytes(guarded.end()[7, :4]) == b"abc\x09"


# As whoever has no capabilities: read(2) and write(2) of what has not come, then a touch of it.
UNPRIVILEGED = """
import os, sys
sys.path.insert(0, sys.argv[1])
from tests.sinks.test_migrate_postcopy import PAGE, Guarded
if os.geteuid() == 0:
    os.setgid(65534)
    os.setuid(65534)
guarded = Guarded(64)
if not guarded.faults.user_mode_only:
    print("the kernel's faults are covered")
    sys.exit()
here, there = os.pipe()
os.write(there, b"abc")
said = []
for call in (lambda: os.readv(here, [guarded.memory[7 * PAGE :][:3]]), lambda: os.write(there, guarded.memory[:3])):
    try:
        said.append(call())
    except OSError as error:
        said.append(error.errno)
thread = guarded.touch(40)
said.append(guarded.wanted()[0] // PAGE)
guarded.give(*range(64))
thread.join()
guarded.end()
said += [os.readv(here, [guarded.memory[7 * PAGE :][:3]]), bytes(guarded.memory[7 * PAGE :][:4])]
print(*said)
"""


def test_system_calls_answer_efault_where_the_process_may_not_have_the_kernels_faults():
    done = warm.run(UNPRIVILEGED, str(Path(__file__).parents[2]))
    assert done.returncode == 0, done.stderr
    if "covered" in done.stdout:
        pytest.skip("this system lets every process have the kernel's faults (vm.unprivileged_userfaultfd)")
    # Nobody was asked for pages 7 and 0, nothing is lost of what was read, and all is well once it is filled.
    assert done.stdout.split(" ", 3) == [str(errno.EFAULT), str(errno.EFAULT), "40", "3 b'abc\\t'\n"]


def test_a_child_gets_none_of_it_meanwhile():
    guarded = Guarded(64)
    assert "dc" in flags_of(guarded.start)
    guarded.give(*range(64))
    guarded.end()
    assert "dc" not in flags_of(guarded.start)


def flags_of(address):
    """Return the kernel's flags of the mapping that holds an address."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) <= address < int(found[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return line.split()[1:]
    raise AssertionError(hex(address))
