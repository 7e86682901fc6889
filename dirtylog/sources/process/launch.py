"""Starts a program and watches it from outside: it is what it would be without, from its first instruction on."""

from __future__ import annotations

import os
import signal
import socket
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

from dirtylog._bits.pages import DirtyPages
from dirtylog.errors import BackendUnavailable, DirtyLogError, IncompleteLogWarning
from dirtylog.sources._ready import ready
from dirtylog.sources.process import _remote, inside
from dirtylog.sources.process.attaching import adopt, enter, watch_of
from dirtylog.sources.process.handover import receive
from dirtylog.sources.process.interpreter import Interpreter
from dirtylog.sources.process.members import Member, end_keeper
from dirtylog.sources.process.process import Process
from dirtylog.sources.process.regions import Area, Region, choose

__all__ = ["Looks", "Program", "launch", "launch_helping"]

# 8 TiB of pages: a program may reserve more than it ever writes, and each stretch gets pages of its own.
SPARE = 1 << 31


# Seconds of CPU time in which a program is loaded, and most interpreters are set up: CPython takes half of it. Where
# that is over when the watch begins, a script is compiled and its first lines run in as many.
MOMENT = 0.05


class Looks:
    """Looks at a program between harvests: nothing that goes is missed, and where its own code ended is known.

    Parameters
    ----------
    process : Process
        The program.
    clock : callable, optional
        Seconds, never going back.
    spent : float, default 0.0
        CPU seconds that the process had used when the watch began.

    Notes
    -----
    An interpreter that takes itself down writes to most of what it has, which says nothing of the program.
    What was written by the last look before that is the program's own.
    """

    def __init__(self, process: Process, clock: Callable[[], float] = time.monotonic, *, spent: float = 0.0) -> None:
        self._process = process
        self._clock = clock
        self._spent = spent
        self._interpreter = Interpreter()
        self._kept: tuple[float, DirtyPages] | None = None
        # Called with the regions at each look: what is to be known before the program ends.
        self.seen: Callable[[Sequence[Region]], object] | None = None

    def look(self) -> float:
        """Look at what was written, and take nothing: memory and children that are gone by the next harvest are in it.

        Returns
        -------
        float
            Seconds until it is worth looking again: as many as make it a small part of the time.

        Raises
        ------
        DirtyLogError
            The process has ended.
        """
        began = time.thread_time()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", IncompleteLogWarning)  # the harvest says it again
            pages = self._process.peek()
        # Asked after it has looked: all that it saw was written before.
        if not self._interpreter.ending(self._process.memory_of):
            self._kept = self._clock(), pages
        if self.seen is not None:
            self.seen(self._process.regions)
        return max(0.02, 50 * (time.thread_time() - began))

    def starting(self) -> bool:
        """Whether the program still starts: is loaded, set up, compiled. That neither sleeps nor takes long."""
        pid = self._process.pid
        try:
            used = _spent(pid) - self._spent
            state = (
                Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[0]
            )
        except OSError:
            return False
        early = self._interpreter.starting(self._process.memory_of) or used < MOMENT
        return early and state in "RD"

    def cut(self) -> tuple[float, DirtyPages | None] | None:
        """Say where the harvest that was just taken is to be cut; None where all of it is the program's own.

        Returns
        -------
        moment : float
            When it was last looked at before its interpreter began to take itself down.
        pages : DirtyPages or None
            What had been written by then, since the harvest before; None where nobody has looked since.
        """
        kept, self._kept = self._kept, None
        if not self._interpreter.ending(self._process.memory_of):
            return None
        return kept or (float("-inf"), None)


class Program:
    """A program that :func:`launch` has started.

    Attributes
    ----------
    pid : int
        Its process.
    process : Process or None
        What it writes: a source. None if it ended before the watch began.
    looks : Looks or None
        What looks at it while :meth:`wait` waits.

    Notes
    -----
    For one thread, that which launched it. A context manager: leaving it lets the
    program run on, unwatched.
    """

    def __init__(
        self,
        pid: int,
        process: Process | None,
        status: int | None,
        telling: socket.socket | None = None,
        spent: float = 0.0,
    ) -> None:
        # Where a program that helps says that its code has ended, and then waits for us.
        self._telling = telling
        self.pid: int = pid
        self.process: Process | None = process
        self._status = status
        self._watching = os.pidfd_open(pid) if status is None else -1
        self.looks: Looks | None = Looks(process, spent=spent) if process is not None else None

    def __enter__(self) -> Program:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Stop watching."""
        self.let_end()
        if self._watching >= 0:
            os.close(self._watching)
            self._watching = -1

    def let_end(self) -> None:
        """Stop watching; a program that helps, and waited for the last look, ends."""
        if self.process is not None:
            self.process.close()
        if self._telling is not None:
            self._telling.close()
            self._telling = None

    def poll(self) -> int | None:
        """Return how it ended, as `os.waitpid` does, or None while it runs."""
        if self._status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self._status = status
        return self._status

    def wait(self, seconds: float) -> bool:
        """Wait until it has ended, at most so long; return whether it has. Looks at its memory meanwhile.

        A program that helps has ended when its code has; it waits for :meth:`let_end`.
        """
        until = time.monotonic() + seconds
        nap = 0.0
        while self.poll() is None:
            left = until - time.monotonic()
            if left <= 0:
                return False
            if self.process is not None and self.looks is not None and not self.process.closed:
                try:
                    nap = self.looks.look()
                except DirtyLogError:
                    if self.process.alive:
                        raise
                    return True  # killed, or another program by now, with nobody to keep its memory
                left = min(left, nap)
            telling = [self._telling.fileno()] if self._telling is not None else []
            if not ready([self._watching, *telling], left).isdisjoint(telling):
                return True
        return True


def launch(
    words: Sequence[str],
    select: str | Callable[[Area], bool] | None = None,
    *,
    begins: Sequence[str] = (),
    before: Callable[[Process], object] | None = None,
    follow_children: bool = True,
    trust_shared: bool = False,
) -> Program:
    """Start a program as a child of this process, and watch its memory.

    Parameters
    ----------
    words : sequence of str
        The program, found on PATH, and its arguments.
    select, trust_shared : str or callable, bool
        As for :func:`dirtylog.attach`; by default all writable memory but stacks.
        From a program's start on, no mapping is too small: it grows later.
    begins : sequence of str
        Paths, as the program will name them, or parts of paths after ``*``: the
        watch begins when it has opened, read and closed one; after ``!``, one that it
        opened without O_CLOEXEC. At its very start by default.
    before : callable, optional
        Called with the process when it is watched and still stopped.
    follow_children : bool
        Watch its children too.

    Returns
    -------
    Program
        Running, or ended already.

    Raises
    ------
    OSError
        It cannot be executed.
    BackendUnavailable
        It cannot be watched here.

    Notes
    -----
    Its memory outlives it, in a process that shares it and never runs, until the
    last harvest: what it wrote before it ended or executed another program is
    reported, however it ended. Children of it have no such keeper.
    """

    chosen = select or _all_but_stacks

    def child(pid: int) -> Member:
        return enter(pid, chosen)[0]

    def again(pid: int) -> Member:
        try:
            descriptor, keeper = adopt(pid)
        except OSError:
            return child(pid)
        return _member(pid, descriptor, keeper, chosen)

    try:
        pid, descriptor, keeper, status = _remote.launch(
            [os.fsencode(word) for word in words], [os.fsencode(part) for part in begins]
        )
    except OSError as error:
        if error.filename is not None:
            raise
        raise BackendUnavailable("watching a program", error.strerror or str(error)) from error
    if descriptor < 0:
        return Program(pid, None, status)
    try:
        member = _member(pid, descriptor, keeper, chosen)
        try:
            process = Process(
                member,
                stopped=0.0,
                spare=SPARE,
                trust_shared=trust_shared,
                enter=child if follow_children else None,
                enter_again=again,
            )
        except BaseException:
            member.close()
            raise
        try:
            if before is not None:
                before(process)
            spent = _spent(pid) if begins else 0.0
            _remote.go(pid)
        except BaseException:
            process.close()
            raise
    except BaseException:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise
    return Program(pid, process, None, spent=spent)


def launch_helping(
    python: Sequence[str],
    words: Sequence[str],
    select: str | Callable[[Area], bool] | None = None,
    *,
    before: Callable[[Process], object] | None = None,
    follow_children: bool = True,
    trust_shared: bool = False,
    naming: Sequence[str] = (),
    why: str = "",
) -> Program:
    """Start a Python program that hands its memory over by itself: where nobody may trace.

    Parameters
    ----------
    python : sequence of str
        The interpreter, and its options.
    words : sequence of str
        The script, or ``-m`` and a module, or ``-c`` and code; and arguments.
    select, before, follow_children, trust_shared
        As for :func:`launch`.
    naming : sequence of str
        More options of :mod:`dirtylog.sources.process.inside`.
    why : str
        Why it is not traced, for the error.

    Returns
    -------
    Program
        The watch begins where the program's code begins.

    Raises
    ------
    OSError
        It cannot be executed.
    BackendUnavailable
        It cannot be watched in this way either.

    Notes
    -----
    One module of ours runs in it, :mod:`dirtylog.sources.process.inside`. Its memory ends with
    it: of a program that is killed, that calls ``os._exit`` or that executes another, what it wrote
    after the last look is not known.
    """
    chosen = select or _all_but_stacks
    ours, theirs = socket.socketpair()
    with ExitStack() as stack:
        stack.callback(ours.close)
        with theirs:
            theirs.set_inheritable(True)
            command = [*python, inside.__file__, "--give", str(theirs.fileno()), *naming, "--", *words]
            # Python ignores these two; a program expects what its shell would have given it.
            pid = os.posix_spawnp(command[0], command, os.environ, setsigdef=[signal.SIGPIPE, signal.SIGXFSZ])
        stack.callback(os.waitpid, pid, 0)
        stack.callback(_kill, pid)
        try:
            descriptor, pagemap = receive(ours, pid)
        except BackendUnavailable as error:
            raise BackendUnavailable("watching a program", "; ".join(filter(None, [why, str(error)]))) from error
        watch = watch_of(pid, descriptor, pagemap)
        stack.callback(watch.close)
        process = Process(
            Member(pid, watch, choose(pid, chosen), sparse=True),
            stopped=0.0,
            spare=SPARE,
            trust_shared=trust_shared,
            enter=(lambda child: enter(child, chosen)[0]) if follow_children else None,
        )
        if before is not None:
            before(process)
        ours.setblocking(True)
        spent = _spent(pid)
        ours.sendall(inside.GO)
        stack.pop_all()
    return Program(pid, process, None, ours, spent)


def _spent(pid: int) -> float:
    """CPU seconds of a process, by its own clock: time that a busy machine gave to others does not count."""
    return time.clock_gettime(~pid << 3 | 2)


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _all_but_stacks(area: Area) -> bool:
    return area.kind != "stack"


def _member(pid: int, descriptor: int, keeper: int, select: str | Callable[[Area], bool]) -> Member:
    watch = watch_of(keeper, descriptor)
    try:
        return Member(pid, watch, choose(keeper, select), sparse=True, keeper=keeper)
    except BaseException:
        watch.close()
        end_keeper(keeper)
        raise
