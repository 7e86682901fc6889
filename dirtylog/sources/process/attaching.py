"""Attaching to a process that runs: who may, what is refused, and how its memory is got at."""

from __future__ import annotations

import errno
import os
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from operator import index
from pathlib import Path
from typing import TYPE_CHECKING

from dirtylog.errors import BackendUnavailable, DirtyLogError
from dirtylog.sources._ready import ready
from dirtylog.sources.process import _remote
from dirtylog.sources.process._remote import Watch, inject
from dirtylog.sources.process.handover import receive
from dirtylog.sources.process.members import Member, end_keeper, tracers
from dirtylog.sources.process.process import Process
from dirtylog.sources.process.regions import Select, choose, places_of

if TYPE_CHECKING:
    import socket

__all__ = ["adopt", "attach", "enter", "not_permitted", "status_of", "watch_of"]


def _status(pid: int) -> dict[str, str]:
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8", errors="replace").splitlines()
    except (FileNotFoundError, ProcessLookupError) as error:
        raise ProcessLookupError(errno.ESRCH, f"there is no process {pid}") from error
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def status_of(pid: int) -> dict[str, str]:
    """Return what the kernel says of a process; refuse what is none, or has no memory.

    Raises
    ------
    OSError
        ESRCH: there is no such process, or it has ended.
    ValueError
        `pid` is no process id, a thread, or a thread of the kernel.
    """
    if pid < 1:
        raise ValueError(f"pid is {pid}; process ids are 1 and more")
    status = _status(pid)
    if status.get("Tgid", str(pid)) != str(pid):
        raise ValueError(f"{pid} is a thread of process {status['Tgid']}; pass the process's id")
    if status.get("State", "").startswith(("Z", "X")):
        raise ProcessLookupError(errno.ESRCH, f"process {pid} has ended already")
    if "VmSize" not in status:
        raise ValueError(f"{pid} is a thread of the kernel: it has no memory of its own")
    return status


def _check_target(status: dict[str, str], pid: int, force: bool) -> None:
    """Refuse a target that attaching would harm, before anything is done to it."""
    if pid == os.getpid():
        raise ValueError(f"{pid} is this process itself; dirtylog.track follows its own memory")
    tracer = status.get("TracerPid", "0")
    if tracer != "0":
        raise DirtyLogError(
            f"process {pid} is traced by process {tracer}, a debugger or strace, and a process has one tracer; "
            "detach that first, or let the process hand over (python -m dirtylog.agent)"
        )
    if status.get("Seccomp", "0") != "0" and not force:
        raise DirtyLogError(
            f"process {pid} has a seccomp filter (mode {status['Seccomp']}), which may end it for calling "
            "userfaultfd; pass force=True if its filter allows that call, or let it hand over before it filters"
        )


def not_permitted(pid: int, error: OSError) -> PermissionError:
    """Return the error that says what it would take to trace a process, or to read its memory, which takes the same."""
    try:
        scope = Path("/proc/sys/kernel/yama/ptrace_scope").read_text(encoding="utf-8").strip()
    except OSError:
        scope = "absent"
    return PermissionError(
        errno.EPERM,
        f"process {pid} may not be traced ({error.strerror}); kernel.yama.ptrace_scope is {scope}. "
        "Same user and ptrace_scope 0, or an own child and ptrace_scope 1, or CAP_SYS_PTRACE (in a container: "
        "--cap-add SYS_PTRACE) is needed; or let the process hand over (python -m dirtylog.agent)",
    )


def _threads(pid: int) -> list[int]:
    """The threads of a process, those first that can be stopped at once: its main thread, if that lives."""
    found = []
    for tid in sorted(map(int, os.listdir(f"/proc/{pid}/task"))):
        try:
            state = Path(f"/proc/{pid}/task/{tid}/stat").read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue
        letter = state.rpartition(")")[2].split()[0]
        if letter not in "ZX":
            found.append((letter == "D", tid))
    return [tid for _, tid in sorted(found)]


def _descriptor_by(pid: int, tid: int, patience: float, in_process: bool) -> tuple[int, float]:
    """Get a userfaultfd by one thread of the process."""

    def work() -> tuple[int, float]:
        descriptor, stopped, _ = inject(pid, tid, patience_ms=int(patience * 1000), in_process=in_process)
        return descriptor, stopped

    if not in_process:
        return work()
    # By a thread that ends: only then does the kernel let go of a thread that was told to stop and has not yet.
    with ThreadPoolExecutor(1, "dirtylog attach") as tracer:
        return tracer.submit(work).result()


def _descriptor_of(pid: int, patience: float) -> tuple[int, float]:
    """Get a userfaultfd of the process by ptrace: by a helper, or by us where only a parent may trace."""
    refused: OSError | None = None
    for tid in _threads(pid)[:8]:
        for in_process in (False, True):
            try:
                return _descriptor_by(pid, tid, patience, in_process)
            except OSError as error:
                refused = error
                if error.errno != errno.EPERM or "SEIZE" not in (error.strerror or ""):
                    break
        if refused is None or refused.errno != errno.ETIMEDOUT:
            break
    if refused is None or refused.errno == errno.ESRCH:
        raise ProcessLookupError(errno.ESRCH, f"process {pid} has ended")
    if refused.errno in (errno.EPERM, errno.EACCES) and "userfaultfd" not in (refused.strerror or ""):
        raise not_permitted(pid, refused)
    if refused.errno == errno.ETIMEDOUT:
        raise DirtyLogError(
            f"no thread of process {pid} stopped within {patience:g} s: they are in uninterruptible sleep; "
            "try again, or with more patience"
        )
    raise BackendUnavailable(
        "attaching", refused.strerror or str(refused), "let the process hand over: python -m dirtylog.agent"
    )


def attach(
    pid: int,
    select: Select = "large",
    *,
    handover: str | os.PathLike[str] | socket.socket | None = None,
    spare: int | None = None,
    trust_shared: bool = False,
    follow_children: bool = False,
    patience: float = 1.0,
    force: bool = False,
) -> Process:
    """Watch which pages of its memory another process writes, from now on.

    The process needs no preparation. One of its threads is stopped for about a
    millisecond and makes one system call, ``userfaultfd``, whose descriptor is
    taken over; it keeps nothing. What was written before this returns is not
    reported.

    Parameters
    ----------
    pid : int
        The process.
    select : {"large", "all", "guest"}, callable, or sequence of (int, int, int)
        Which of its memory: ``"large"``, writable mappings of at least 1 MiB but
        the stacks; ``"all"``, every writable mapping; ``"guest"``, the RAM
        of the virtual machine that it runs; a function of an area (`start`,
        `end`, `kind`, `name`) that says whether to watch it; or places, each with
        start and end, addresses in bytes, and the page number that the first of its
        pages has, such as :func:`dirtylog.sources.qemu.guest_memory` returns.
    handover : path or socket, optional
        A Unix socket where the process listens (:mod:`dirtylog.agent`), or a
        connected one: it then hands its descriptor over by itself, and is
        neither stopped nor traced.
    spare : int, optional
        Pages to set aside for what is mapped later; by default as many as are
        watched now, and at least 256 MiB.
    trust_shared : bool
        Watch shared memory through this process's mapping alone. Without it,
        such memory is reported whole each time, because what other processes
        write to it cannot be seen (I6).
    follow_children : bool
        Watch the children too, those that there are and those that it forks: their
        memory is more regions of the same page space (`Region.pid` says whose).
        A child is found at a harvest or at :meth:`Process.follow`; what it wrote
        by then is reported, as far as the kernel can tell it from what its parent
        wrote, which is reported as well. One that comes and goes in between is
        not seen. One that cannot be attached to is named in `Process.missed`,
        with an `IncompleteLogWarning`, and nothing is ``exact`` from then on.
    patience : float
        Seconds that a thread may take to stop.
    force : bool
        Attach although a seccomp filter may end the process.

    Returns
    -------
    Process
        A source and a context manager.

    Raises
    ------
    OSError
        ESRCH: no such process. EPERM: it may not be traced; the message says
        what would help.
    DirtyLogError
        It is being traced, filters system calls, or does not stop; or it has no
        memory where `select` names some.
    BackendUnavailable
        The kernel or the architecture lacks what is needed.
    ValueError, TypeError
        `pid` is this process, a thread, or a thread of the kernel; or not a number.

    Notes
    -----
    The tracer is a helper process, which finishes its millisecond even when
    this process is killed meanwhile. Where only a parent may trace its children
    (``ptrace_scope`` 1), this process traces itself, and being killed in that
    millisecond would leave the target with wrong registers.

    Signals that arrive meanwhile are handled afterwards; a system call that the
    thread was waiting in goes on waiting; a stopped process stays stopped.

    References
    ----------
    ``ptrace(2)``, ``userfaultfd(2)``, ``pidfd_getfd(2)``.

    Examples
    --------
    >>> import subprocess, sys
    >>> import dirtylog as dl
    >>> program = "a = bytearray(8 << 20); print(flush=True); input(); a[5 << 20] = 1; print(flush=True); input()"
    >>> other = subprocess.Popen(
    ...     [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ... )
    >>> _ = other.stdout.readline()
    >>> with dl.attach(other.pid) as process:  # doctest: +SKIP
    ...     _ = other.stdin.write("go\\n"), other.stdin.flush(), other.stdout.readline()
    ...     dirty = process.harvest()
    ...     memory = process.read(dirty)
    >>> _ = other.communicate("end")
    """
    pid = index(pid)
    if follow_children and places_of(select):
        raise ValueError("the places of select are of one process, and so are their page numbers: follow no children")

    def child(pid: int) -> Member:
        return enter(pid, select, patience=patience, force=force)[0]

    member, stopped = enter(pid, select, handover=handover, patience=patience, force=force)
    try:
        return Process(
            member,
            stopped=stopped,
            spare=spare,
            trust_shared=trust_shared,
            enter=child if follow_children else None,
        )
    except BaseException:
        member.close()
        raise


def enter(
    pid: int,
    select: Select,
    *,
    handover: str | os.PathLike[str] | socket.socket | None = None,
    patience: float = 1.0,
    force: bool = False,
) -> tuple[Member, float]:
    """Get at the memory of one process; return it, and the seconds for which a thread of it stood still."""
    status = status_of(pid)
    if handover is None:
        _check_target(status, pid, force)
    try:
        pick = choose(pid, select)
    except PermissionError as error:
        raise not_permitted(pid, error) from error
    if handover is None:
        descriptor, stopped = _descriptor_of(pid, patience)
        pagemap = -1
    else:
        descriptor, pagemap = receive(handover, pid)
        stopped = 0.0
    watch = watch_of(pid, descriptor, pagemap)
    return Member(pid, watch, pick, sparse=select in ("large", "all"), places=places_of(select)), stopped


def adopt(pid: int, patience: float = 1.0) -> tuple[int, int]:
    """Get a userfaultfd of a child of ours, and a process that keeps its memory.

    Parameters
    ----------
    pid : int
        Started by this process.
    patience : float
        Seconds that it may take to stop.

    Returns
    -------
    descriptor, keeper : int
        Ours. The keeper is a child of ours that never runs: end and wait for it.

    Raises
    ------
    OSError
        ``strerror`` names the step and its answer. The child goes on as before.

    Notes
    -----
    By a thread of its own, which ends with the keeper that it traces, or when nothing came of it: the kernel then lets
    go of a child that was told to stop, and has not yet.
    """
    answer: Future[tuple[int, int]] = Future()

    def trace() -> None:
        try:
            found = _remote.adopt(pid, patience_ms=int(patience * 1000))
            try:
                alive = os.pidfd_open(found[1])
            except BaseException:
                _give_back(*found)
                raise
        except BaseException as error:  # handed to who waits for it
            answer.set_exception(error)
            return
        tracers[found[1]] = threading.current_thread()
        answer.set_result(found)
        ready([alive])
        os.close(alive)

    def drop(late: Future[tuple[int, int]]) -> None:
        if late.exception() is None:
            _give_back(*late.result())

    tracer = threading.Thread(target=trace, name="dirtylog keeper", daemon=True)
    tracer.start()
    try:
        return answer.result()
    except BaseException:
        if answer.done():
            tracer.join()
        answer.add_done_callback(drop)  # where a signal handler raised, and nobody is there to take it
        raise


def _give_back(descriptor: int, keeper: int) -> None:
    os.close(descriptor)
    end_keeper(keeper)


def watch_of(pid: int, descriptor: int, pagemap: int = -1) -> Watch:
    """Make a watch of a userfaultfd, which it owns."""
    try:
        return Watch(pid, descriptor, pagemap)
    except OSError as error:
        raise BackendUnavailable("attaching", error.strerror or str(error), "it needs Linux 6.7") from error
