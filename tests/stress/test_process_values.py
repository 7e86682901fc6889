"""A million writes of another process, each by its value: none is missed, and hardly a page too many is reported.

Threads write while the process is harvested again and again, mappings come, grow, move and go, and children are forked
and execute something. At the end of each round the threads wait: then a copy that was kept right by the harvests alone
is compared with the memory, word by word. Now and then the program executes itself in the middle of a round: who
attached to it is told so, and who started it goes on.
"""

import mmap
import os
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pytest

import dirtylog as dl
from dirtylog.sources.process.launch import launch

from ..sources.test_process import PAGE, attach

pytestmark = pytest.mark.stress
HERE = Path(__file__).parent
PAGES, THREADS, LIVES, ROUNDS, EACH = 4096, 4, 4, 25, 2500


class Talk:
    """A program that writes in rounds: what it is told, what it answers, which pages it says it wrote."""

    def __init__(self, stack, words):
        theirs, self.orders = os.pipe()
        self.answers, theirs_out = os.pipe()
        marks = os.memfd_create("marks")
        os.truncate(marks, PAGES)
        self.marks = stack.enter_context(mmap.mmap(marks, PAGES))
        self.theirs = theirs, theirs_out, marks
        for descriptor in self.theirs:
            os.set_inheritable(descriptor, True)
        # As descriptors 0, 1 and 3, whatever their numbers are here.
        places = f"</proc/self/fd/{theirs} >/proc/self/fd/{theirs_out} 3<>/proc/self/fd/{marks}"
        self.command = ["sh", "-c", f'exec "$@" {places}', "sh", *map(str, words), str(EACH)]
        stack.callback(os.close, self.answers)
        stack.callback(self.end)

    def begun(self):
        for descriptor in self.theirs:
            os.close(descriptor)
        self.theirs = ()

    def end(self):
        self.begun()
        if self.orders >= 0:
            os.close(self.orders)
            self.orders = -1

    def tell(self, order):
        os.write(self.orders, f"{order}\n".encode())

    def answer(self, meanwhile=lambda: None):
        """The next line, and what is done as long as there is none."""
        os.set_blocking(self.answers, False)
        said = b""
        while not said.endswith(b"\n"):
            try:
                part = os.read(self.answers, 100)
                assert part, "the program has ended"
                said += part
            except BlockingIOError:
                meanwhile()
        return said.decode().strip()


@pytest.fixture(params=["c", "python"])
def talk(request, tmp_path):
    """A program that writes in rounds, not started yet."""
    if request.param == "c":
        words = [tmp_path / "writes"]
        subprocess.run(
            [request.getfixturevalue("c_compiler"), "-O2", "-pthread", HERE / "writes.c", "-o", words[0]], check=True
        )
    else:
        words = [sys.executable, "-W", "ignore", HERE / "writes.py"]
    with ExitStack() as stack:
        yield Talk(stack, words)


def anonymous(area):
    return area.kind == "anonymous"


def stand_still(pid):
    """Wait until no thread of it runs any more: an interpreter writes to its own memory also after its answer."""
    before = None
    while True:
        spent = time.clock_gettime(~pid << 3 | 2)
        states = {
            (task / "stat").read_text().rpartition(")")[2].split()[0] for task in Path(f"/proc/{pid}/task").iterdir()
        }
        if states == {"S"} and spent == before:
            return
        before = spent if states == {"S"} else None
        os.sched_yield()


def harvest_for_ever(process):
    while True:
        process.harvest()


class Oracle:
    """A copy of the anonymous memory, kept right by the harvests alone."""

    def __init__(self, process, talk, address):
        self.process, self.talk = process, talk
        first = next(
            region.first_page + (address - region.start) // PAGE
            for region in process.regions
            if region.start <= address < region.end and region.kind == "anonymous"
        )
        self.first = first
        self.steady = dl.DirtyPages.from_runs([[first, PAGES]], process.npages)
        # A program that was started has more numbers than memory could ever hold; the first ones are given out first.
        self.copy = np.zeros((min(process.npages, 1 << 18), PAGE), np.uint8)
        self.over_reported = self.written = self.harvests = 0
        self.begin()
        self.harvest()
        self.take(self.everything())

    def everything(self):
        runs = sorted([each.first_page, each.npages] for each in self.process.regions if each.kind == "anonymous")
        return dl.DirtyPages.from_runs(runs, self.process.npages)

    def take(self, pages):
        self.copy[pages.indices()] = self.process.read(pages)

    def begin(self):
        self.talk.marks[:] = bytes(PAGES)
        self.reported = dl.DirtyPages._empty(self.process.npages)

    def harvest(self):
        dirty = self.process.harvest()
        self.reported |= dirty
        self.harvests += 1
        return dirty

    def take_harvest(self):
        self.take(self.harvest() & self.everything())

    def marked(self):
        """Pages that the program says it wrote, and those of the same mapping that were reported."""
        wrote = np.flatnonzero(np.frombuffer(bytes(self.talk.marks), np.uint8))
        found = (self.reported & self.steady).indices() - self.first
        missed = np.setdiff1d(wrote, found)
        assert not missed.size, f"{missed.size} pages were written and not reported, the first {missed[0]}"
        return wrote, found

    def round(self):
        self.begin()
        self.talk.tell("go")
        assert self.talk.answer(self.take_harvest) == "over"
        stand_still(self.process.pid)
        self.take_harvest()
        everything = self.everything()
        stale = np.flatnonzero((self.copy[everything.indices()] != self.process.read(everything)).any(axis=1))
        assert not stale.size, f"{stale.size} pages are not what the harvests said, the first {stale[0]}"
        wrote, found = self.marked()
        self.over_reported += len(found) - len(wrote)
        self.written += len(wrote)

    def end(self, stress):
        assert self.over_reported <= self.written / 100
        assert self.harvests > ROUNDS
        stress.count("writes of another process", ROUNDS * THREADS * EACH)
        stress.count("harvests meanwhile", self.harvests)


@contextmanager
def ending(talk):
    """Let the program end, whatever failed: it waits for orders, and we for it."""
    try:
        yield
    finally:
        talk.end()


def test_a_million_writes_are_seen_by_their_values(talk, stress):
    with subprocess.Popen(talk.command, pass_fds=talk.theirs) as program, ending(talk):
        talk.begun()
        for _ in range(LIVES):
            address = int(talk.answer())
            with attach(program.pid, select=anonymous, spare=1 << 14) as process:
                oracle = Oracle(process, talk, address)
                for _ in range(ROUNDS):
                    oracle.round()
                talk.tell("exec")
                with pytest.raises(dl.DirtyLogError, match="has executed another program"):
                    harvest_for_ever(process)
            oracle.end(stress)


def test_a_million_writes_of_a_program_that_was_started_are_seen_also_before_each_exec(talk, stress):
    try:
        # Its children write copies of their own, and are not what is compared here.
        program = launch(talk.command, select=anonymous, follow_children=False)
    except dl.BackendUnavailable as missing:
        pytest.skip(str(missing))
    with program, ending(talk):
        talk.begun()
        address = int(talk.answer(program.process.harvest))
        for _ in range(LIVES):
            oracle = Oracle(program.process, talk, address)
            for _ in range(ROUNDS):
                oracle.round()
            oracle.begin()
            talk.tell("exec")
            # What it wrote last is taken with the memory that is gone.
            address = int(talk.answer(oracle.harvest))
            oracle.harvest()
            oracle.marked()
            oracle.end(stress)
        talk.end()
        assert program.wait(60)
