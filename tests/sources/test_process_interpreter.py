"""Where a program's interpreter is, seen from outside: what it writes as it takes itself down is not the program's."""

import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import ExitStack

import pytest

from dirtylog.errors import BackendUnavailable
from dirtylog.sinks.profile import Sampler
from dirtylog.sources.process.interpreter import Interpreter
from dirtylog.sources.process.launch import MOMENT, Looks, launch

pytestmark = pytest.mark.usefixtures("plain_programs")
# Says where it is, and stops there: in its own code, in what was registered for its end, and in a finalizer that the
# interpreter calls while it takes the modules apart. Each writes some pages of memory that is there from the beginning.
PROGRAM = """
import atexit, mmap, os, sys
memory = mmap.mmap(-1, 4000 * 4096, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
def write(first, count, write=memory.__setitem__, stop=os.read, say=os.write):
    for page in range(first, first + count):
        write(page * 4096, page % 255 + 1)
    say({said}, b"x")
    stop({go}, 1)
class Last:
    def __del__(self, write=write):
        write(1000, 3000)
atexit.register(write, 20, 30)
last = Last()
write(0, 10)
write(10, 10)
"""


class Stepped:
    """A program that stops at each of its writes until it is let go on."""

    def __init__(self, directory):
        script = directory / "program.py"
        go, self._go = os.pipe()
        self._said, said = os.pipe()
        for descriptor in (go, said):
            os.set_inheritable(descriptor, True)
        script.write_text(PROGRAM.format(go=go, said=said))
        try:
            self.program = launch([sys.executable, str(script)], begins=[f"!{script}"])
        except BackendUnavailable as missing:
            pytest.skip(f"watching a program does not work here: {missing}")
        finally:
            os.close(go)
            os.close(said)

    def wait(self):
        assert os.read(self._said, 1) == b"x"

    def go(self):
        os.write(self._go, b"x")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with self.program:
            os.close(self._go)
            os.close(self._said)
            self.program.wait(60)


@pytest.fixture
def stepped(tmp_path):
    with Stepped(tmp_path) as one:
        yield one


def test_the_end_begins_when_the_programs_own_code_is_over(stepped):
    interpreter, memory = Interpreter(), stepped.program.process.memory_of
    if not interpreter.ending(memory) and not _is_known(interpreter, memory):
        pytest.skip("this interpreter does not export what says where it is")
    for ending in (False, False, False, True):
        stepped.wait()
        assert (interpreter.starting(memory), interpreter.ending(memory)) == (False, ending)
        stepped.go()
    assert stepped.program.wait(60)
    assert interpreter.ending(memory), "the memory is kept, and what it says stays true"


def _is_known(interpreter, memory):
    return interpreter._state(memory) is not None


@pytest.mark.parametrize("looked", [True, False])
def test_a_sample_that_falls_into_the_end_of_the_interpreter_is_cut_there(stepped, looked):
    """A regular sample, not the last: what comes before the cut is the program's, the rest is its end."""
    now = [0.0]
    process = stepped.program.process
    looks = Looks(process, lambda: now[0])
    if not _is_known(Interpreter(), process.memory_of):
        pytest.skip("this interpreter does not export what says where it is")
    sampler = Sampler(process, clock=lambda: now[0], on_sample=lambda moment, pages: seen.append((moment, pages.count)))
    seen = []

    def sample(second):
        now[0] = second
        sampler.sample(looks.cut)

    stepped.wait()
    looks.look()
    sample(10.0)
    stepped.go()
    stepped.wait()
    if looked:
        now[0] = 19.0
        looks.look()
    stepped.go()
    stepped.wait()
    sample(20.0)
    stepped.go()
    stepped.wait()
    looks.look()
    sample(20.5)
    stepped.go()
    assert stepped.program.wait(60)
    sample(21.0)
    profile = sampler.profile()
    assert [moment for moment, _ in seen] == [10.0, 20.0, 20.5, 21.0]
    assert profile.dirtied_bytes > 3040 * 4096
    assert profile.ending["seconds"] == 1.0
    assert profile.ending["dirtied_bytes"] > 3000 * 4096
    assert sampler.program == (0.0, 20.0)
    assert profile.bytes_per_second * 20 + profile.ending["dirtied_bytes"] == pytest.approx(profile.dirtied_bytes)
    assert profile.peak_bytes_per_second < 3000 * 4096


def test_a_look_before_the_end_says_what_of_a_sample_was_the_programs(stepped):
    now = [0.0]
    process = stepped.program.process
    looks = Looks(process, lambda: now[0])
    if not _is_known(Interpreter(), process.memory_of):
        pytest.skip("this interpreter does not export what says where it is")
    sampler = Sampler(process, clock=lambda: now[0])
    for moment in (10.0, 20.0, 30.0):
        stepped.wait()
        now[0] = moment
        looks.look()
        stepped.go()
    stepped.wait()
    now[0] = 30.25
    looks.look()
    sampler.sample(looks.cut)
    stepped.go()
    assert stepped.program.wait(60)
    now[0] = 30.5
    sampler.sample(looks.cut)
    profile = sampler.profile()
    assert sampler.program == (0.0, 30.0)
    assert 3000 * 4096 < profile.ending["dirtied_bytes"] < profile.dirtied_bytes - 50 * 4096


def test_a_start_is_over_when_the_program_sleeps_or_has_had_its_time(tmp_path):
    """Whatever the wall clock says: on a busy machine a start lasts longer, and writes no more."""
    go, ours = os.pipe()
    os.set_inheritable(go, True)
    try:
        program = launch([sys.executable, "-c", f"import os; os.read({go}, 1)\nwhile True: pass"])
    except BackendUnavailable as missing:
        pytest.skip(f"watching a program does not work here: {missing}")
    with program, ExitStack() as last:
        # Whatever fails: it would turn for ever.
        last.callback(os.kill, program.pid, signal.SIGKILL)
        looks = program.looks
        while looks.starting():
            os.sched_yield()
        # It sleeps in its read.
        os.write(ours, b"x")
        # What it used before the watch began is not of its start.
        begun = time.clock_gettime(~program.pid << 3 | 2)
        while time.clock_gettime(~program.pid << 3 | 2) < begun + MOMENT:
            os.sched_yield()
        assert not looks.starting()
        last.close()
        program.wait(60)
        assert not looks.starting()
    for descriptor in (go, ours):
        os.close(descriptor)


def test_of_a_program_without_an_interpreter_nothing_is_said(attached_cat):
    interpreter = Interpreter()
    assert not interpreter.starting(attached_cat.pid)
    assert not interpreter.ending(attached_cat.pid)
    attached_cat.send_signal(signal.SIGKILL)
    attached_cat.wait()
    assert not interpreter.ending(attached_cat.pid)


@pytest.fixture
def attached_cat():
    with subprocess.Popen([shutil.which("cat")], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as cat:
        yield cat
