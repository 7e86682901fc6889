"""Holds a process still while its memory is read: by ptrace, or by the freezer of its control group."""

from __future__ import annotations

import errno
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dirtylog.errors import DirtyLogError
from dirtylog.sources.process._remote import hold, let_run

__all__ = ["HOW", "frozen"]

HOW = ("ptrace", "cgroup")
CGROUPS = Path("/sys/fs/cgroup")
# Puts the freezer back when its standard input ends: when we say so, or when we are gone, also by SIGKILL.
_GUARD = 'trap \'\' HUP INT TERM; read _; printf %s "$1" > "$2"'


@contextmanager
def frozen(pid: int, how: str = "ptrace", *, patience: float = 1.0) -> Iterator[None]:
    """Hold all threads of a process still for a ``with`` block.

    Parameters
    ----------
    pid : int
        The process.
    how : {"ptrace", "cgroup"}
        ``"ptrace"`` stops the threads of this process alone. ``"cgroup"`` freezes
        the control group that it is in, with all other processes of it: those of a
        container, which may write memory that they share.
    patience : float
        Seconds that a thread, or the group, may take to stop.

    Raises
    ------
    OSError
        ESRCH: no such process. EPERM, EACCES: it may not be traced, or its group may not
        be frozen.
    DirtyLogError
        It did not stop in time, or its group is one that this process is in. It
        runs on.
    ValueError
        No such way.

    Notes
    -----
    A system call that a thread waits in goes on waiting afterwards; signals are
    handled afterwards; what was stopped or frozen before still is. If this process is
    killed meanwhile, the process runs on. For one thread.

    References
    ----------
    ``PTRACE_SEIZE`` in ``ptrace(2)``; ``cgroup.freeze`` in Linux
    ``Documentation/admin-guide/cgroup-v2.rst``; ``cgroup-v1/freezer-subsystem.rst``.
    """
    if how not in HOW:
        raise ValueError(f"how is {how!r}; it must be one of {', '.join(map(repr, HOW))}")
    with _by_ptrace(pid, patience) if how == "ptrace" else _by_cgroup(pid, patience):
        yield


@contextmanager
def _by_ptrace(pid: int, patience: float) -> Iterator[None]:
    # A thread of its own: the kernel lets go of what it holds when it ends, also of what has not stopped yet.
    done, ready = threading.Event(), threading.Event()
    failed: list[BaseException] = []

    def work() -> None:
        held: list[int] = []
        try:
            _hold_all(pid, held, patience)
            ready.set()
            done.wait()
        except BaseException as error:  # handed to who waits for it
            failed.append(error)
        finally:
            for tid in held:
                with suppress(OSError):
                    let_run(tid)
            ready.set()

    holder = threading.Thread(target=work, name="dirtylog freeze", daemon=True)
    holder.start()
    try:
        ready.wait()
        if failed:
            raise failed[0]
        yield
    finally:
        done.set()
        holder.join()


def _hold_all(pid: int, held: list[int], patience: float) -> None:
    """Stop every thread of a process, those that it makes meanwhile too, and note them."""
    while True:
        try:
            new = [tid for tid in map(int, os.listdir(f"/proc/{pid}/task")) if tid not in held]
        except FileNotFoundError:
            new = []
            held.clear()
        if not new:
            break
        for tid in new:
            try:
                hold(tid, int(patience * 1000))
            except ProcessLookupError:
                continue  # it has ended, and is not listed any more, or is a zombie that writes nothing
            except TimeoutError as error:
                raise DirtyLogError(
                    f"thread {tid} of process {pid} did not stop within {patience:g} s: it is in uninterruptible "
                    "sleep; try again, with more patience, or without freezing"
                ) from error
            finally:
                held.append(tid)
    if not os.path.exists(f"/proc/{pid}/exe"):
        raise ProcessLookupError(errno.ESRCH, f"process {pid} has ended")


def _group_of(pid: int | str) -> tuple[Path, str, str]:
    """Return a process's freezer: its directory, the file that freezes, and what is written to it for that."""
    try:
        lines = Path(f"/proc/{pid}/cgroup").read_text(encoding="utf-8").splitlines()
    except FileNotFoundError as error:
        raise ProcessLookupError(errno.ESRCH, f"there is no process {pid}") from error
    found = {kinds: path.lstrip("/") for _, kinds, path in (line.split(":", 2) for line in lines)}
    places = [(CGROUPS / where / found.get("", ""), "cgroup.freeze", "1") for where in ("", "unified")]
    # The root of the second version cannot be frozen and has no such file.
    places.append((CGROUPS / "freezer" / found.get("freezer", ""), "freezer.state", "FROZEN"))
    for place in places:
        if (place[0] / place[1]).exists():
            return place
    raise DirtyLogError(
        f"process {pid} is in no control group that can be frozen ({found}, below {CGROUPS}); freeze it by ptrace"
    )


def _own_group_within(group: Path) -> bool:
    try:
        own = _group_of("self")[0]
    except DirtyLogError:
        return False
    return own == group or group in own.parents


@contextmanager
def _by_cgroup(pid: int, patience: float) -> Iterator[None]:
    place = _group_of(pid)
    group, name, freeze = place
    if _own_group_within(group):
        raise DirtyLogError(f"process {pid} is in the control group {group}, and so is this one: freeze it by ptrace")
    file = group / name
    before = file.read_text(encoding="ascii").strip()
    if before == freeze:
        yield  # frozen by somebody else, who thaws it
        return
    # The process must not stay frozen when we are killed.
    guard = subprocess.Popen(
        ["/bin/sh", "-c", _GUARD, "sh", before, str(file)], stdin=subprocess.PIPE, start_new_session=True
    )
    assert guard.stdin is not None
    try:
        file.write_text(freeze, encoding="ascii")
        _until_frozen(place, patience)
        yield
    finally:
        guard.stdin.close()
        guard.wait()


def _until_frozen(place: tuple[Path, str, str], patience: float) -> None:
    group, name, freeze = place
    until = time.monotonic() + patience
    while True:
        if name == "freezer.state":
            done = (group / name).read_text(encoding="ascii").strip() == freeze
        else:
            done = "frozen 1" in (group / "cgroup.events").read_text(encoding="ascii").splitlines()
        if done:
            return
        if time.monotonic() > until:
            raise DirtyLogError(f"the control group {group} did not freeze within {patience:g} s; try again")
        time.sleep(0.001)
