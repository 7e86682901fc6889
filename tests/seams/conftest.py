"""Interrupts that land where a test wants them: inside a C call, or before any one bytecode of the library."""

import contextlib
import ctypes
import dis
import functools
import signal
import sys
import threading
from pathlib import Path

import pytest

import dirtylog as dl

from ..tracing import traced

PACKAGE = str(Path(dl.__file__).parent)


class SignalsOnIndex:
    """The number 0, to whom `__index__` is a C call that sends this process a signal.

    No bytecode runs in between, so Python's handler is still to be called when the C function that
    converts its argument goes on: the place at which a result used to be thrown away.
    """

    __index__ = __int__ = staticmethod(functools.partial(ctypes.CDLL(None)["raise"], int(signal.SIGUSR2)))


@pytest.fixture
def raising_signal():
    """The number 0, which sends a signal when it is asked for; the handler raises KeyboardInterrupt."""
    if threading.current_thread() is not threading.main_thread():
        pytest.skip("signal handlers run in the main thread")

    def handler(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGUSR2, handler)
    yield SignalsOnIndex()
    signal.signal(signal.SIGUSR2, before)


def only_on_311():
    """Skip where single bytecodes are traced in another way than these tests know."""
    if sys.version_info[:2] != (3, 11):
        pytest.skip("an interrupt is placed at a single bytecode by the way in which CPython 3.11 traces them")


@pytest.fixture
def interrupted_at():
    """Call something with an exception before its n-th bytecode."""
    only_on_311()
    return _interrupted_at


def _interrupted_at(n, call, files=("",)):
    """Call, raising KeyboardInterrupt before the n-th bytecode of the library's files; return whether there was one."""
    left = [n]

    def trace(frame, event, argument):
        name = frame.f_code.co_filename
        if not (name.startswith(PACKAGE) and name.endswith(files)):
            return None
        frame.f_trace_opcodes = True
        frame.f_trace_lines = False
        if event == "opcode":
            left[0] -= 1
            if left[0] < 0:
                sys.settrace(None)
                raise KeyboardInterrupt
        return trace

    try:
        with traced(trace):
            call()
    except KeyboardInterrupt:
        return True
    return False


# CPython looks for signals at the entry of a function, after a call, and when a loop goes back.
LOOKS_AFTER = ("CALL", "RESUME", "JUMP_BACKWARD")


class Interrupt:
    """A trace function that raises KeyboardInterrupt at the `at`-th place inside some files; 0 counts the places."""

    def __init__(self, at, *files):
        self.at, self.files = at, files
        self.places, self.where, self.last = 0, "", None

    def __call__(self, frame, event, argument):
        if not frame.f_code.co_filename.endswith(self.files):
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            before, self.last = self.last, (frame, dis.opname[frame.f_code.co_code[frame.f_lasti]])
            if before is None or before[0] is not frame or not before[1].startswith(LOOKS_AFTER):
                return self
            self.places += 1
            if self.places == self.at:
                self.where = f"{frame.f_code.co_filename.rsplit('/', 1)[1]}:{frame.f_lineno}"
                raise KeyboardInterrupt
        return self

    @contextlib.contextmanager
    def active(self):
        """Trace the block, and nothing after it."""
        sys.settrace(self)
        try:
            yield
        finally:
            sys.settrace(None)
            self.last = None


@pytest.fixture(name="interrupt_class")
def _interrupt_class():
    """The class: fixtures are what a conftest shares."""
    only_on_311()
    return Interrupt
