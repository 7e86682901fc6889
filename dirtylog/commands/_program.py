"""The program that a command watches: started here, as it would be without us, or running already; and how it ends."""

from __future__ import annotations

import argparse
import errno
import os
import platform
import re
import resource
import shlex
import signal
import socket
import stat
import sys
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Literal, Protocol

from dirtylog.commands._monitor import add_guest_argument, guest_at
from dirtylog.commands._numbers import LONGEST, more_than
from dirtylog.commands._refusal import Misunderstood, refusing
from dirtylog.commands._terminal import show_note
from dirtylog.errors import BackendUnavailable, DirtyLogError

if TYPE_CHECKING:
    from dirtylog import DirtyPages, Process
    from dirtylog.sinks.profile import Sampler
    from dirtylog.sources.process.naming import Names

__all__ = [
    "Sampling",
    "add_memory_arguments",
    "add_program_arguments",
    "add_watch_arguments",
    "command_of",
    "machine_text",
    "names_of",
    "record_program",
    "report_file",
    "watch",
    "write_report",
]

WORDS = """\
PROGRAM is one of
  script.py ARGS      a Python script (also a directory or archive with a __main__.py)
  -m MODULE ARGS      a Python module
  -c CODE ARGS        Python code
  -- COMMAND ARGS     any other command
"""
# Seconds to wait for the names of a program's arrays at once; what it says later is there at a later look.
PATIENCE = 0.5
# Bytes that a start writes: CPython's set-up 3 MiB, and 6 with a module of ours; where that is over already, compiling
# a script and its first lines 0.3 MiB, and 2 with a few imports. A program that has written more has written it itself.
SET_UP, FIRST_LINES = 12 << 20, 4 << 20
PYTHON_ENDINGS = (".py", ".pyw", ".pyz", ".pyc")


class Sampling(Protocol):
    """What `watch` asks, sample by sample."""

    def next_sample(self, after: int) -> float:
        """Seconds until a sample is due, after so many."""

    def sample(
        self,
        cut: Callable[[], tuple[float, DirtyPages | None] | None] | None = None,
        *,
        part: Literal["start", "program"] = "program",
        at_most: int | None = None,
    ) -> DirtyPages:
        """Take one; `cut` says where it is to be cut, if the program's own code has ended; `part` what it is of.

        A start that has written more than `at_most` bytes is none.
        """


def add_watch_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare how often to look, and for how long."""
    parser.add_argument(
        "--interval",
        type=more_than(0, float, LONGEST),
        default=1.0,
        metavar="SECONDS",
        help="time between samples (1)",
    )
    parser.add_argument(
        "--duration", type=more_than(0, float, LONGEST), metavar="SECONDS", help="watch no longer than this"
    )


def add_memory_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare how the memory of a process is got at, and what counts of memory that processes share."""
    parser.add_argument(
        "--agent", metavar="SOCKET", help="where the agent of --pid listens: it hands over, and names its arrays"
    )
    parser.add_argument(
        "--trust-shared",
        action="store_true",
        help="watch shared memory through the processes that are watched; otherwise all of it counts as written, "
        "for others may write it",
    )


@contextmanager
def names_of(pid: int, agent: str | None) -> Iterator[Names]:
    """What names the regions of a process: by its arrays too, if it has an agent."""
    from dirtylog.sources.process.handover import Connection
    from dirtylog.sources.process.naming import Names

    if agent is None:
        yield Names(pid)
        return
    with Connection(agent, pid) as connection:
        yield Names(pid, connection.arrays, spent=lambda: connection.spent)


def add_program_arguments(parser: argparse.ArgumentParser, before: str = "", about: str = "") -> None:
    """Declare the program to run, a word before it, or the process to watch, and how often to look at it."""
    add_watch_arguments(parser)
    parser.add_argument("--pid", type=int, help="watch this running process, instead of a program started here")
    add_memory_arguments(parser)
    add_guest_argument(parser)
    parser.add_argument(
        "--arrays", action="store_true", help="name the arrays of a Python program: a thread of ours in it is asked"
    )
    parser.add_argument("-m", dest="module", nargs=argparse.REMAINDER, metavar="MODULE", help=argparse.SUPPRESS)
    parser.add_argument("-c", dest="code", nargs=argparse.REMAINDER, metavar="CODE", help=argparse.SUPPRESS)
    words = f"{before} PROGRAM".lstrip()
    parser.add_argument(
        "program", nargs=argparse.REMAINDER, metavar=words, help=f"{about}the program, and its arguments"
    )
    parser.usage = re.sub(r"\s\.\.\.\s*$", f" {words} ...", parser.format_usage().removeprefix("usage: "))
    parser.description = f"{parser.description}\n{WORDS}"


def report_file(name: str | None) -> IO[str] | None:
    """Open a file to write a report into at the end, so that a name that cannot be written is refused before.

    What is in it stays until then; a program that changes its directory does not change where it is.
    """
    if name is None:
        return None
    descriptor = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
    return os.fdopen(descriptor, "w", encoding="utf-8")


def write_report(text: str, output: IO[str] | None) -> None:
    """Write a report into its file, in the place of what was there, or to the error stream."""
    if output is not None and stat.S_ISREG(os.fstat(output.fileno()).st_mode):
        output.truncate()
    print(text, file=output or sys.stderr, flush=True)


def _words(args: argparse.Namespace) -> tuple[list[str], list[str]]:
    """Return the interpreter of a Python program, with its options, or nothing; and the words of the program."""
    words = list(args.program)
    for option, rest in (("-m", args.module), ("-c", args.code)):
        if rest is not None:
            words = [option, *rest, *words]
    named = words[:1] == ["--"]
    words = words[named:]
    if not words or (words[0] in ("-m", "-c") and len(words) < 2):
        raise Misunderstood("there is no program to watch: name one after the options, or a running process by --pid")
    if not named and words[0].startswith("-") and words[0] not in ("-m", "-c"):
        raise Misunderstood(
            f"{words[0]!r} stands where the program is to be named: options come before it, and before a trace's name; "
            f"if the program is called so, write -- {words[0]}"
        )
    if words[0] not in ("-m", "-c") and (named or not _is_python(words[0])):
        return [], words
    return [sys.executable, *_own_options()], words


def _own_options() -> list[str]:
    """The interpreter's options that this one was started with: ``python -O -m dirtylog`` runs programs with -O."""
    found: list[str] = []
    for word in sys.orig_argv[1:]:
        if found and found[-1] in ("-W", "-X"):
            found.append(word)
        elif not word.startswith("-") or word[:2] in ("-m", "-c", "-"):
            break
        else:
            found.append(word)
    return found


def _is_python(name: str) -> bool:
    path = Path(name)
    if name.endswith(PYTHON_ENDINGS) or path.is_dir():
        return True
    # Without the right to be executed it can only be a script for this interpreter.
    return path.is_file() and not os.access(path, os.X_OK)


def _begins(words: list[str], naming: list[str]) -> list[str]:
    """Paths that Python reads when its own start is over: the script, or what -m finds; nothing for -c alone."""
    if words[0] == "-c":
        return [f"!{name}" for name in naming[:1]]
    if words[0] != "-m":
        absolute = os.path.abspath(words[0])
        # Python looks at its script before it reads it; where a module of ours runs it, that module is Python's script.
        if not naming and os.path.isfile(absolute) and not zipfile.is_zipfile(absolute):
            return [f"!{words[0]}", f"!{absolute}"]
        return [words[0], absolute, f"*{absolute}/"]
    *packages, leaf = words[1].split(".")
    folder = "/".join(["", *packages])
    cached = f"__pycache__/{leaf}."
    main = (f"*{folder}/{leaf}/__main__.", f"*{folder}/{leaf}/__pycache__/__main__.")
    top = [f"*/{part}/{name}" for part in packages[:1] for name in ("__init__.py", "__pycache__/__init__.")]
    return [f"*{folder}/{leaf}.py", f"*{folder}/{cached}", *main, *top]


def watch(
    args: argparse.Namespace,
    begin: Callable[[Process, Names], Sampling],
    done: Callable[[str | None], None],
) -> int:
    """Watch what the command line says until it ends, or until we are told to stop.

    Parameters
    ----------
    args : Namespace
        With what :func:`add_program_arguments` declares.
    begin : callable
        Given the process, before it goes on, and what names its regions; returns what samples it.
    done : callable
        Called once at the end, when `begin` was: with what was missed, or None.

    Returns
    -------
    int
        The exit code: that of a program that was started here. One that a signal
        has ended ends us in the same way.

    Raises
    ------
    DirtyLogError, OSError
        It cannot be started or attached to, or there is none, or two.
    """
    given = bool(args.program or args.module is not None or args.code is not None)
    if args.pid is not None:
        if given:
            raise Misunderstood(f"--pid {args.pid} and a program were given; watch one of them")
        return _watch_running(args, begin, done)
    if args.agent is not None:
        raise Misunderstood("--agent is about a running process; name one by --pid")
    if args.qmp is not None:
        raise Misunderstood("--qmp is about a QEMU that runs; name its process by --pid")
    return _watch_started(args, begin, done)


def record_program(
    args: argparse.Namespace, path: str | os.PathLike[str], report: Callable[[Sampler, str | None], None]
) -> int:
    """Watch as :func:`watch` does, into a trace; `report` is told what was sampled, and what was missed."""
    import mmap

    from dirtylog.sinks.profile import Sampler
    from dirtylog.sinks.trace import Recorder

    recorder = Recorder(path, 0, mmap.PAGESIZE)
    samplers: list[Sampler] = []

    def begin(process: Process, names: Names) -> Sampler:
        recorder.about.update(about(args, process.pid))
        recorder.about["watched"] = (
            "a guest's memory, by guest address"
            if args.qmp is not None
            else "private memory that can be written, without stacks"
            if args.pid is None
            else "private memory that can be written, from 1 MiB on, without stacks"
        )
        samplers.append(Sampler(process, interval=args.interval, names=names, on_sample=recorder.write))
        return samplers[0]

    def done(missed: str | None) -> None:
        if missed:
            recorder.about["missed"] = missed
        recorder.regions.update(samplers[0].regions)
        recorder.program = samplers[0].program
        recorder.close()
        report(samplers[0], missed)

    try:
        return watch(args, begin, done)
    finally:
        if not recorder.closed:
            recorder.abort()


def about(args: argparse.Namespace, pid: int) -> dict[str, str]:
    """Say what is recorded, when, and on what kind of machine; its name is nobody's business."""
    if args.pid is None:
        python, words = _words(args)
        command = _shown([*(["python"] if python else []), *words])
    else:
        command = command_of(pid)
    return {"command": command, "started": time.strftime("%Y-%m-%d %H:%M:%S %z"), "machine": machine_text()}


def command_of(pid: int) -> str:
    """Return the command line of a process that runs, as much of it as people want to see."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[:-1]
    except FileNotFoundError:
        raise ProcessLookupError(errno.ESRCH, f"process {pid} has ended") from None
    return _shown([os.fsdecode(word) for word in words])


def _shown(words: Sequence[str]) -> str:
    return shlex.join(words).encode(errors="replace").decode()[:500]


def machine_text() -> str:
    """Say what kind of machine this is."""
    system = platform.uname()
    return f"{system.system} {system.release}, {system.machine}, {os.cpu_count()} CPUs"


def _watch_running(
    args: argparse.Namespace, begin: Callable[[Process, Names], Sampling], done: Callable[[str | None], None]
) -> int:
    from dirtylog import attach
    from dirtylog.sources.process.launch import Looks

    with ExitStack() as stack:
        with refusing():
            select = guest_at(args.qmp) if args.qmp is not None else "large"
            process = stack.enter_context(
                attach(
                    args.pid,
                    select,
                    handover=args.agent,
                    follow_children=args.qmp is None,
                    trust_shared=args.trust_shared,
                )
            )
            names = stack.enter_context(names_of(args.pid, args.agent))
        sampling = begin(process, names)
        looks = Looks(process)
        missed = None
        started = last = time.monotonic()
        try:
            for count in _counted(args.duration, started):
                until = time.monotonic() + sampling.next_sample(count)
                if args.duration is not None:
                    until = min(until, started + args.duration)
                while (left := until - time.monotonic()) > 0:
                    time.sleep(min(left, looks.look()))
                sampling.sample(looks.cut)
                last = time.monotonic()
        except KeyboardInterrupt:
            missed = _sampled_last(process, sampling, last)
        except DirtyLogError as error:
            missed = _ended(process, error, last)
        done(_missed(process, missed))
    return 0


def _sampled_last(process: Process, sampling: Sampling, last: float) -> str | None:
    """Take one sample more; return what is missed if there is none: who interrupts us may end the process as well."""
    try:
        sampling.sample()
    except DirtyLogError as error:
        return _ended(process, error, last)
    return None


def _ended(process: Process | None, error: DirtyLogError, last: float) -> str:
    """Return what is missed of a process that has ended; raise the error if it has not."""
    if process is None or process.alive:
        raise error
    return f"{error}: the last {time.monotonic() - last:.2f} s are not in it"


def _counted(duration: float | None, started: float) -> Iterator[int]:
    """Count samples until the time is over."""
    count = 0
    while duration is None or time.monotonic() - started < duration:
        yield count
        count += 1


def _watch_started(
    args: argparse.Namespace, begin: Callable[[Process, Names], Sampling], done: Callable[[str | None], None]
) -> int:
    from dirtylog.sources.process import _remote, inside
    from dirtylog.sources.process.handover import Connection
    from dirtylog.sources.process.launch import launch, launch_helping
    from dirtylog.sources.process.naming import Names

    python, words = _words(args)
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    if args.arrays and not python:
        raise Misunderstood("--arrays is about a Python program; for another leave it out")
    sampling: list[Sampling] = []
    names: list[Names] = []

    with ExitStack() as stack:
        stack.callback(_remote.pass_signals, 0)
        asking, theirs = (stack.enter_context(each) for each in socket.socketpair()) if args.arrays else (None, None)
        naming = []
        if theirs is not None:
            theirs.set_inheritable(True)
            naming = [inside.__file__, "--name", str(theirs.fileno()), "--"]

        def before(process: Process) -> None:
            # From its first step on: it may say that it is ready before `launch` returns.
            _remote.pass_signals(process.pid)
            if asking is None:
                names.append(Names(process.pid, memory_of=lambda: process.memory_of))
            else:
                connection = Connection(asking, process.pid, PATIENCE)
                names.append(
                    Names(
                        process.pid,
                        connection.arrays,
                        spent=lambda: connection.spent,
                        memory_of=lambda: process.memory_of,
                    )
                )
            sampling.append(begin(process, names[0]))

        begins = _begins(words, naming) if python else []
        # Unless nothing says where the program's own code begins, or a module of ours begins first.
        at_most = FIRST_LINES if begins and not naming else SET_UP
        try:
            program = launch([*python, *naming, *words], begins=begins, before=before, trust_shared=args.trust_shared)
        except BackendUnavailable as error:
            if not python:
                raise BackendUnavailable(
                    error.facility, error.probed, "only a Python program can be watched without ptrace: it hands over"
                ) from error
            show_note(f"dirtylog: {error.probed}; so the program hands its memory over by itself")
            at_most = FIRST_LINES
            program = launch_helping(
                python,
                words,
                naming=naming[1:-1],
                before=before,
                why=error.probed,
                trust_shared=args.trust_shared,
            )
        if theirs is not None:
            theirs.close()  # so that its end is seen by who asks
        stack.enter_context(program)
        process, looks = program.process, program.looks
        missed = None
        started = last = time.monotonic()
        if looks is not None and args.arrays:
            looks.seen = names[0].look
        if looks is not None:
            try:
                while looks.starting() and not program.wait(0.02):
                    pass
                if program.poll() is None:
                    sampling[0].sample(part="start", at_most=at_most)
            except DirtyLogError as error:
                missed = _ended(process, error, last)
        for count in _counted(args.duration, started) if process is not None and missed is None else ():
            left = sampling[0].next_sample(count)
            if args.duration is not None:
                left = min(left, max(0.0, started + args.duration - time.monotonic()))
            ended = program.wait(left)
            try:
                sampling[0].sample(looks.cut if looks is not None else None)
            except DirtyLogError as error:
                missed = _ended(process, error, last)
                break
            last = time.monotonic()
            if ended:
                break
        if process is not None:
            missed = _missed(process, missed)
            program.let_end()
            done(missed)
        else:
            show_note("dirtylog: the program ended before its own code began, and nothing was watched")
        while not program.wait(LONGEST):
            pass
    status = program.poll()
    assert status is not None
    return _end_as(status)


def _missed(process: Process, why: str | None) -> str | None:
    parts = [why] if why else []
    parts += [f"process {pid} was not watched: {reason}" for pid, reason in process.missed.items()]
    return "; ".join(parts) or None


def _end_as(status: int) -> int:
    """Return a program's exit code, or end by the signal that has ended it."""
    if not os.WIFSIGNALED(status):
        return os.waitstatus_to_exitcode(status)
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    # The program has left its core already, if any.
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    number = os.WTERMSIG(status)
    if number not in (signal.SIGKILL, signal.SIGSTOP):
        signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})
    return 128 + number
