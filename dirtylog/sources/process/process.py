"""Another process's memory as a source: its mappings as they come and go, in one page space."""

from __future__ import annotations

import errno
import os
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dirtylog._bits.pages import DirtyPages
from dirtylog.errors import BackendUnavailable, DirtyLogError, IncompleteLogWarning
from dirtylog.sources._page_tables import cannot_hold
from dirtylog.sources._resource import Resource
from dirtylog.sources.process._remote import PAGE_SIZE, Watch, inject, read_memory
from dirtylog.sources.process.handover import receive
from dirtylog.sources.process.regions import Area, Region, choose, mappings, subtract

if TYPE_CHECKING:
    import socket

__all__ = ["Process", "attach"]

_LEAST_SPARE = 1 << 16  # pages: 256 MiB that may be mapped later


@dataclass(slots=True)
class _Piece:
    """A watched stretch: addresses, and where its pages are numbered."""

    start: int
    end: int
    first_page: int
    area: Area
    told: bool = True  # False: nobody can say what was written, it is reported whole each time (I6)

    @property
    def npages(self) -> int:
        return (self.end - self.start) // PAGE_SIZE


def _swapped_out() -> int:
    """How many pages the system has swapped out, to a disk or into compressed memory, since it started."""
    try:
        lines = Path("/proc/vmstat").read_text(encoding="utf-8").splitlines()
    except OSError:
        return next(_never_twice)
    counts = dict(line.split() for line in lines)
    return int(counts.get("pswpout", 0)) + int(counts.get("zswpout", 0))


_never_twice = count()


class Process(Resource):
    """The memory of a running process, watched from outside; made by :func:`attach`.

    A source: it can be attached to a `DirtyLog`, and so feeds rates, traces and
    snapshots. What was written before `attach` returned is not reported.

    Attributes
    ----------
    pid : int
        The process.
    npages : int
        Size of the page space: what is watched, and room for what is mapped later.
    page_size : int
        The system's own, in bytes.
    stopped : float
        Seconds for which one thread of the process stood still while attaching.
    skipped : dict of Area to str
        What could not be watched, and why: ranges that the process's own
        userfaultfd holds, or that it reserved by the terabyte, for example.

    Notes
    -----
    Any thread may call; one lock serialises the calls. The kernel does the
    watching: a first write to a page after a harvest costs the process about a
    microsecond. When the watcher closes or ends, also by SIGKILL, the kernel
    drops the registration and the process runs on as before.

    Every harvest compares the mappings with what they were. Memory that was
    mapped since is watched from then on, and what it holds is reported; memory
    that was moved or replaced is reported whole; memory that is gone is not
    reported, and reads as zeros. A child that the process forks is not watched.

    References
    ----------
    ``PAGEMAP_SCAN`` in Linux ``Documentation/admin-guide/mm/pagemap.rst``.
    """

    __module__ = "dirtylog"

    def __init__(
        self,
        watch: Watch,
        pick: Callable[[list[Area]], list[Area]],
        *,
        stopped: float,
        spare: int | None,
        trust_shared: bool,
    ) -> None:
        super().__init__()
        self._watch = watch
        self._select = pick
        self._trust_shared = trust_shared
        self._lock = threading.RLock()
        self._busy = False
        self.pid: int = watch.pid
        self.page_size: int = PAGE_SIZE
        self.stopped: float = stopped
        self.skipped: dict[Area, str] = {}
        self._pieces: list[_Piece] = []
        self._free: list[tuple[int, int]] = []
        self._fresh = 0  # pages from here on were never anybody's: a sink has zeros for them
        chosen = self._pick(mappings(self.pid))
        pages = sum(area.end - area.start for area in chosen) // PAGE_SIZE
        room = max(pages, _LEAST_SPARE) if spare is None else spare
        if room < 0:
            raise ValueError(f"spare is {spare}; it must be 0 pages or more")
        self.npages: int = pages + room
        # Taken and not handed out yet (I5), and whether something taken may have been lost on the way.
        self._owed = DirtyPages._empty(self.npages, PAGE_SIZE)
        self._in_doubt = False
        self._said_shared = False
        self._follow_mappings(at_start=True)
        self._closed = False

    def _pick(self, areas: list[Area]) -> list[Area]:
        """Pick the areas to watch; note why those that are too large to be armed are not among them."""
        picked = []
        for area in self._select(areas):
            if why := cannot_hold(area.end - area.start):
                self.skipped[area] = why
            else:
                picked.append(area)
        return picked

    # ---- the page space ---------------------------------------------------------------------------

    def _allocate(self, npages: int, after: int | None) -> tuple[int, bool]:
        """Find pages for a new stretch, at page `after` if they are free; say whether they were used before."""
        if after is not None and after == self._fresh and self._fresh + npages <= self.npages:
            self._fresh += npages
            return after, False
        if self._fresh + npages <= self.npages:
            first = self._fresh
            self._fresh += npages
            return first, False
        for i, (first, room) in enumerate(self._free):
            if room >= npages:
                rest = (first + npages, room - npages)
                self._free[i : i + 1] = [rest] if rest[1] else []
                return first, True
        raise DirtyLogError(
            f"process {self.pid} has mapped {npages} pages more than the {self.npages} that were set aside for it; "
            f"attach again, with spare={2 * (self.npages + npages)}"
        )

    def _release_pages(self, first: int, npages: int) -> None:
        self._free.append((first, npages))
        self._free.sort()
        merged: list[tuple[int, int]] = []
        for start, length in self._free:
            if merged and merged[-1][0] + merged[-1][1] == start:
                merged[-1] = (merged[-1][0], merged[-1][1] + length)
            else:
                merged.append((start, length))
        self._free = merged

    def _watch_range(self, start: int, end: int, area: Area) -> bool:
        """Register and arm a range; False, and the reason noted, when the kernel refuses it."""
        try:
            self._watch.register(start, end)
            self._watch.scan(np.array([[start, end, 0]], np.int64), True)
        except OSError as error:
            if error.errno == errno.ESRCH:
                raise self._gone() from error
            self.skipped[area] = error.strerror or str(error)
            return False
        return True

    def _add(self, start: int, end: int, area: Area, at_start: bool) -> list[npt.NDArray[np.int64]]:
        """Watch a new stretch; return what of it is to be reported."""
        told = not area.shared or self._trust_shared
        where = np.array([[start, end, 0]], np.int64)
        zero_if_untouched = area.kind in ("anonymous", "heap", "stack") and not at_start
        swapped_out = _swapped_out() if zero_if_untouched else -1
        held = [self._watch.populated(where, True)] if zero_if_untouched else []
        if told and not self._watch_range(start, end, area):
            return []
        before = next((piece for piece in self._pieces if piece.end == start and piece.area.kind == area.kind), None)
        npages = (end - start) // PAGE_SIZE
        first, used = self._allocate(npages, before.first_page + before.npages if before else None)
        if before and before.first_page + before.npages == first and before.told == told:
            before.end = end
        else:
            self._pieces.append(_Piece(start, end, first, area, told))
        if at_start:
            return []
        if zero_if_untouched and not used:
            # A page that was never touched is zero, and so is a page of this number that nobody has had yet. What was
            # touched before it was protected is in memory now, or was swapped out before the first look or after it.
            held.append(self._watch.populated(where, False))
            if _swapped_out() == swapped_out:
                return [np.add(runs, (first, 0)) for runs in held]
        return [np.array([[first, npages]], np.int64)]

    def _forget(self, gone: tuple[int, int]) -> None:
        """Let go of a range that is not mapped any more."""
        kept: list[_Piece] = []
        for piece in self._pieces:
            start, end = max(piece.start, gone[0]), min(piece.end, gone[1])
            if start >= end:
                kept.append(piece)
                continue
            first = piece.first_page + (start - piece.start) // PAGE_SIZE
            self._release_pages(first, (end - start) // PAGE_SIZE)
            if piece.start < start:
                kept.append(_Piece(piece.start, start, piece.first_page, piece.area, piece.told))
            if end < piece.end:
                kept.append(_Piece(end, piece.end, first + (end - start) // PAGE_SIZE, piece.area, piece.told))
        self._pieces = kept

    def _follow_mappings(self, at_start: bool = False) -> list[npt.NDArray[np.int64]]:
        """Compare the mappings with what is watched; return the runs of what is new."""
        try:
            now = mappings(self.pid)
        except OSError as error:
            raise self._gone() from error
        there = [(area.start, area.end) for area in now]
        for piece in list(self._pieces):
            for gone in subtract((piece.start, piece.end), there):
                self._forget(gone)
        taken = sorted((piece.start, piece.end) for piece in self._pieces)
        report: list[npt.NDArray[np.int64]] = []
        for area in self._pick(now):
            for start, end in subtract((area.start, area.end), taken):
                if area not in self.skipped:
                    report += self._add(start, end, area, at_start)
        self._pieces.sort(key=lambda piece: piece.first_page)
        return report

    # ---- what people ask for ------------------------------------------------------------------------

    @property
    def regions(self) -> tuple[Region, ...]:
        """The stretches that are watched, in the order of their pages, as of the last harvest."""
        with self._lock:
            return tuple(Region(p.start, p.end, p.first_page, p.npages, p.area.kind, p.area.name) for p in self._pieces)

    @property
    def alive(self) -> bool:
        """Whether the process still runs the program that was attached to."""
        with self._lock:
            return not self._closed and self._watch.alive()

    def harvest(self) -> DirtyPages:
        """Take the pages that the process wrote since the last harvest.

        Returns
        -------
        DirtyPages
            Numbered in the page space: see :attr:`regions`. ``exact`` is False
            when some of it cannot be vouched for: memory that other processes
            may write through mappings of their own is reported whole.

        Raises
        ------
        DirtyLogError
            The process has ended or has executed another program; or it has
            mapped more than there is room for in the page space.
        ValueError
            It is closed.

        Notes
        -----
        One PAGEMAP_SCAN per region and 8192 runs, and one reading of
        ``/proc/PID/maps``. A failure in between loses nothing: what may have
        been taken is reported by the next harvest, whole, with ``exact=False``
        and an `IncompleteLogWarning` (I6).
        """
        return self._collect(True)

    def peek(self) -> DirtyPages:
        """Look at what the next harvest would report; the harvest reports it again.

        Returns, Raises and Notes are those of :meth:`harvest`.
        """
        return self._collect(False)

    def _collect(self, take: bool) -> DirtyPages:
        with self._lock:
            self._check_open()
            if self._inherited:
                raise DirtyLogError("this Process was attached by the parent: close it here, and attach again")
            if self._busy:
                raise DirtyLogError(
                    f"a harvest of process {self.pid} is going on in this thread, and a signal handler began another; "
                    "set a flag in the handler, and harvest when the first one has returned"
                )
            self._busy = True
            try:
                return self._gather(take)
            finally:
                self._busy = False

    def _gather(self, take: bool) -> DirtyPages:
        doubtful, self._in_doubt = self._in_doubt, True
        if not self._watch.alive():
            raise self._gone()
        report = self._follow_mappings()
        told = [piece for piece in self._pieces if piece.told]
        areas = np.array([(p.start, p.end, p.first_page) for p in told], np.int64).reshape(-1, 3)
        runs, lost = self._watch.scan(areas, take)
        report.append(runs)
        for i in lost:
            # Replaced between two harvests, mapped again at the same address: nothing of it is what it was.
            piece = told[i]
            if not self._watch_range(piece.start, piece.end, piece.area):
                piece.told = False
            report.append(np.array([[piece.first_page, piece.npages]], np.int64))
        untold = [piece for piece in self._pieces if not piece.told]
        report += [np.array([[piece.first_page, piece.npages]], np.int64) for piece in untold]
        exact = not untold and not doubtful
        if doubtful:
            report += [np.array([[piece.first_page, piece.npages]], np.int64) for piece in self._pieces]
        found = DirtyPages.from_runs(np.concatenate(report), self.npages, PAGE_SIZE, exact=exact)
        # What was taken is owed from here on, until the last step hands it out (I5).
        self._owed = self._owed | found
        self._in_doubt = False
        if not self._watch.alive():
            # The scan may have been of memory that was gone by then, which answers "nothing".
            raise self._gone()
        answer = self._owed
        self._warn(doubtful, untold)
        if take:
            self._owed = DirtyPages._empty(self.npages, PAGE_SIZE)
        return answer

    def _warn(self, doubtful: bool, untold: list[_Piece]) -> None:
        if doubtful:
            warnings.warn(
                f"an earlier harvest of process {self.pid} failed half-way: all that is watched is reported",
                IncompleteLogWarning,
                stacklevel=5,
            )
        if untold and not self._said_shared:
            self._said_shared = True
            names = sorted({piece.area.name or "anonymous" for piece in untold})
            warnings.warn(
                f"process {self.pid} shares memory that others may write through mappings of their own "
                f"({', '.join(names[:5])}): it is reported whole each time; attach with trust_shared=True if "
                "this process alone writes it",
                IncompleteLogWarning,
                stacklevel=5,
            )

    def read(self, pages: DirtyPages, out: Any = None) -> npt.NDArray[np.uint8]:
        """Read pages of the process's memory while it runs.

        Parameters
        ----------
        pages : DirtyPages
            Which pages; of this source's page space.
        out : ndarray of uint8, shape (count, page_size), optional
            Where they go, C-contiguous; a new array by default.

        Returns
        -------
        ndarray of uint8, shape (count, page_size)
            In the order of the page numbers. Pages that are not mapped (any
            more) are zeros.

        Raises
        ------
        DirtyLogError
            The process has ended.
        ValueError
            `pages` is of another page space, or `out` of another shape.

        Notes
        -----
        Read after the harvest that reported the pages (I3). A page that is
        written meanwhile may be read half old and half new; the next harvest
        reports it again.

        References
        ----------
        ``process_vm_readv(2)``.
        """
        if not isinstance(pages, DirtyPages):
            raise TypeError(f"pages is {type(pages).__name__}; DirtyPages are needed")
        if (pages.npages, pages.page_size) != (self.npages, PAGE_SIZE):
            raise ValueError(
                f"pages has {pages.npages} pages of {pages.page_size} bytes; this process's page space has "
                f"{self.npages} of {PAGE_SIZE}"
            )
        shape = (pages.count, PAGE_SIZE)
        if out is None:
            out = np.zeros(shape, np.uint8)
        elif out.shape != shape or out.dtype != np.uint8 or not out.flags.c_contiguous:
            raise ValueError(
                f"out has shape {out.shape} and dtype {out.dtype}; C-contiguous uint8 of {shape} is needed"
            )
        else:
            out[:] = 0
        runs = pages.runs()
        offsets = np.cumsum(runs[:, 1]) - runs[:, 1]
        extents = []
        with self._lock:
            self._check_open()
            for piece in self._pieces:
                first = np.maximum(runs[:, 0], piece.first_page)
                end = np.minimum(runs.sum(axis=1), piece.first_page + piece.npages)
                some = np.flatnonzero(first < end)
                begin = piece.start + (first[some] - piece.first_page) * PAGE_SIZE
                into = (offsets[some] + first[some] - runs[some, 0]) * PAGE_SIZE
                extents.append(np.stack([begin, (end - first)[some] * PAGE_SIZE, into], axis=1))
            if extents and pages.count:
                try:
                    read_memory(self.pid, np.ascontiguousarray(np.concatenate(extents)), out.reshape(-1))
                except ProcessLookupError as error:
                    raise self._gone() from error
        return out  # type: ignore[no-any-return]

    def _gone(self) -> DirtyLogError:
        return DirtyLogError(
            f"process {self.pid} has ended, or has executed another program: its memory is gone, and what it wrote "
            "last with it; close this Process, and attach to what runs now"
        )

    def _release(self) -> None:
        self._watch.close()

    def __repr__(self) -> str:
        """Name the process and the size."""
        state = "closed " if self.closed else ""
        return f"<{state}Process {self.pid}: {len(self._pieces)} regions in {self.npages} pages of {PAGE_SIZE} bytes>"


# ---- attaching --------------------------------------------------------------------------------------


def _status(pid: int) -> dict[str, str]:
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise ProcessLookupError(errno.ESRCH, f"there is no process {pid}") from error
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def _check_target(status: dict[str, str], pid: int, force: bool) -> None:
    """Refuse a target that attaching would harm, before anything is done to it."""
    if status.get("Tgid", str(pid)) != str(pid):
        raise ValueError(f"{pid} is a thread of process {status['Tgid']}; pass the process's id")
    if pid == os.getpid():
        raise ValueError(f"{pid} is this process itself; dirtylog.track follows its own memory")
    if status.get("State", "").startswith(("Z", "X")):
        raise ProcessLookupError(errno.ESRCH, f"process {pid} has ended already")
    if "VmSize" not in status:
        raise ValueError(f"{pid} is a thread of the kernel: it has no memory of its own")
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


def _not_permitted(pid: int, error: OSError) -> PermissionError:
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


def _descriptor_of(pid: int, patience: float) -> tuple[int, float]:
    """Get a userfaultfd of the process by ptrace: by a helper, or by this thread where only a parent may trace."""
    refused: OSError | None = None
    for tid in _threads(pid)[:8]:
        for in_process in (False, True):
            try:
                descriptor, stopped, _ = inject(pid, tid, patience_ms=int(patience * 1000), in_process=in_process)
                return descriptor, stopped
            except OSError as error:
                refused = error
                if error.errno != errno.EPERM or "SEIZE" not in (error.strerror or ""):
                    break
        if refused is None or refused.errno != errno.ETIMEDOUT:
            break
    if refused is None or refused.errno == errno.ESRCH:
        raise ProcessLookupError(errno.ESRCH, f"process {pid} has ended")
    if refused.errno in (errno.EPERM, errno.EACCES) and "userfaultfd" not in (refused.strerror or ""):
        raise _not_permitted(pid, refused)
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
    select: str | Callable[[Area], bool] = "large",
    *,
    handover: str | os.PathLike[str] | socket.socket | None = None,
    spare: int | None = None,
    trust_shared: bool = False,
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
    select : {"large", "all", "guest"} or callable
        Which of its memory: ``"large"``, writable mappings of at least 1 MiB but
        the main stack; ``"all"``, every writable mapping; ``"guest"``, the RAM
        of the virtual machine that it runs; or a function of an area (`start`,
        `end`, `kind`, `name`) that says whether to watch it.
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
        It is being traced, filters system calls, or does not stop.
    BackendUnavailable
        The kernel or the architecture lacks what is needed.
    ValueError
        `pid` is this process, a thread, or a thread of the kernel.

    Notes
    -----
    The tracer is a helper process, which finishes its millisecond even when
    this process is killed meanwhile. Where only a parent may trace its children
    (``ptrace_scope`` 1), this thread traces itself, and being killed in that
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
    pid = int(pid)
    if pid < 1:
        raise ValueError(f"pid is {pid}; process ids are 1 and more")
    status = _status(pid)
    if handover is None:
        _check_target(status, pid, force)
    try:
        pick = choose(pid, select)
    except PermissionError as error:
        raise _not_permitted(pid, error) from error
    if handover is None:
        descriptor, stopped = _descriptor_of(pid, patience)
        pagemap = -1
    else:
        descriptor, pagemap = receive(handover, pid)
        stopped = 0.0
    try:
        watch = Watch(pid, descriptor, pagemap)
    except OSError as error:
        raise BackendUnavailable("attaching", error.strerror or str(error), "it needs Linux 6.7") from error
    try:
        return Process(watch, pick, stopped=stopped, spare=spare, trust_shared=trust_shared)
    except BaseException:
        watch.close()
        raise
