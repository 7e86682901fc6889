"""Another process's memory as a source: its mappings as they come and go, in one page space."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from dirtylog._bits.owed import Owed
from dirtylog._bits.pages import DirtyPages
from dirtylog.errors import DirtyLogError, IncompleteLogWarning
from dirtylog.sources._resource import Resource
from dirtylog.sources.process._remote import PAGE_SIZE
from dirtylog.sources.process.members import Member, children, pages_of_children
from dirtylog.sources.process.numbering import Numbering
from dirtylog.sources.process.reading import make_room, read_pages
from dirtylog.sources.process.regions import Area, Region
from dirtylog.sources.process.stretches import Stretches, worth_watching

__all__ = ["Process"]

_LEAST_SPARE = 1 << 16  # pages: 256 MiB that may be mapped later


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
        userfaultfd holds, for example.
    missed : dict of int to str
        Children that were to be followed and could not be attached to, and why.

    Notes
    -----
    Any thread may call; one lock serialises the calls. The kernel does the
    watching: a first write to a page after a harvest costs the process about a
    microsecond. When the watcher closes or ends, also by SIGKILL, the kernel
    drops the registration and the process runs on as before.

    Every harvest compares the mappings with what they were. Memory that was
    mapped since is watched from then on, and what it holds is reported; memory
    that was moved or replaced is reported whole; memory that is gone is not
    reported, and reads as zeros. A child that the process forks is watched if
    `attach` was told to follow children, from the next harvest on.

    References
    ----------
    ``PAGEMAP_SCAN`` in Linux ``Documentation/admin-guide/mm/pagemap.rst``.
    """

    __module__ = "dirtylog"

    def __init__(
        self,
        first: Member,
        *,
        stopped: float,
        spare: int | None,
        trust_shared: bool,
        enter: Callable[[int], Member] | None = None,
        enter_again: Callable[[int], Member] | None = None,
    ) -> None:
        super().__init__()
        self._first = first
        self._members = [first]
        # How to attach to a child, if children are followed; and to what the process executes, if that is.
        self._enter, self._enter_again = enter, enter_again
        # It has ended, and nobody kept its memory; and what was owed by then was handed out.
        self._over = self._ended = False
        self._lock = threading.RLock()
        self._busy = False
        self.pid: int = first.pid
        self.page_size: int = PAGE_SIZE
        self.stopped: float = stopped
        self.missed: dict[int, str] = {}
        chosen = first.pick(first.mappings())
        # Why some cannot be watched is said again when it is tried.
        spans = (span for area in chosen for span in worth_watching({}, first, area.start, area.end, area))
        pages = sum(end - start for start, end in spans) // PAGE_SIZE
        if enter is not None:
            pages += pages_of_children(first)  # what is there already takes no room of what may come
        room = max(pages, _LEAST_SPARE) if spare is None else spare
        if first.places:  # what is given has all its numbers
            pages = max(number + (end - start) // PAGE_SIZE for start, end, number in first.places)
            room = spare or 0
        if room < 0:
            raise ValueError(f"spare is {spare}; it must be 0 pages or more")
        self.npages: int = pages + room
        self._numbers = Numbering(self.npages, self.pid)
        self._stretches = Stretches(self._numbers, trust_shared=trust_shared, ended=self._check_end)
        self.skipped: dict[Area, str] = self._stretches.skipped
        # Found and not handed out yet (I5), and whether something taken may have been lost on the way to there.
        self._owed: Owed = Owed(self.npages, PAGE_SIZE)
        self._nothing = DirtyPages._empty(self.npages, PAGE_SIZE)
        self._in_doubt = self._unsaid_doubt = False
        self._said_shared = False
        self._said_missed: set[int] = set()
        self._stretches.follow(first, at_start=True)
        self._closed = False
        if enter is not None:
            for _ in range(100):
                new = self._new_children()
                for pid, parent in new:
                    self._attach_to_child(pid, parent, at_start=True)
                if not new:
                    break

    # ---- children, and programs that are executed -----------------------------------------------------

    def _drop(self, member: Member) -> None:
        """Let go of a process that has ended, or of memory that its program has left."""
        self._stretches.drop(member)
        self._members = [other for other in self._members if other is not member]
        member.close()

    def _join(self, enter: Callable[[int], Member], pid: int, at_start: bool, parent: int = 0) -> Any:
        """Watch one more process; return it, or None if it has ended or cannot be watched, and what it holds."""
        member = None
        try:
            member = enter(pid)
            # One that has children of its own shares with them what it wrote before: then all that it holds counts.
            member.forked = bool(parent) and not at_start and member.is_copy_of(parent) and not children(pid)
            self._members.append(member)
            report = self._stretches.follow(member, at_start)
        except (OSError, DirtyLogError, ValueError) as error:
            if member is not None:
                self._drop(member)
            if os.path.exists(f"/proc/{pid}/exe"):
                self.missed[pid] = str(error)
            return None, []
        member.forked = False  # what it maps from here on is its own
        return member, report

    def _attach_to_child(self, pid: int, parent: int, at_start: bool = False) -> list[npt.NDArray[np.int64]]:
        """Watch a child too; return what it has written by now."""
        assert self._enter is not None
        report: list[npt.NDArray[np.int64]] = self._join(self._enter, pid, at_start, parent)[1]
        return report

    def _new_children(self) -> list[tuple[int, int]]:
        """The children that are not watched yet, each with its parent; not those that still share its memory."""
        if self._enter is None:
            return []
        found = []
        alive = {member.pid for member in self._members}
        for member in self._members:
            for pid in children(member.pid):
                if pid not in alive and pid not in self.missed and not member.shares_with(pid):
                    found.append((pid, member.pid))
        return found

    def _must_live(self, member: Member) -> bool:
        """Whether its end is an error: of what was attached to. A program that was started here may end."""
        return member is self._first and self._enter_again is None

    def _check_end(self, member: Member) -> None:
        """Raise where the end of a process, whose memory is gone, is an error."""
        if self._must_live(member):
            raise self._gone()

    def _has_changed(self) -> bool:
        return any(member.left() for member in self._members) or bool(self._new_children())

    def _follow(self, left: list[Member], take: bool) -> list[npt.NDArray[np.int64]]:
        """After a scan: let go of what has ended, attach to what was executed or forked; return what that holds."""
        report: list[npt.NDArray[np.int64]] = []
        for member in left:
            runs = os.path.exists(f"/proc/{member.pid}/exe")
            if member is self._first and member.keeper and not runs:
                self._ended = take  # what it wrote last is taken now, and can be read until this is closed
                continue
            again = self._enter_again if member is self._first else self._enter
            self._drop(member)
            joined, held = self._join(again, member.pid, False) if again is not None and runs else (None, [])
            report += held
            if member is self._first:
                self._first, self._over = joined or member, joined is None
                if joined is None:
                    ended = "it executed a program that ended before its memory could be kept"
                    self.missed.setdefault(member.pid, ended)
        for _ in range(100):  # children of children; each harvest goes on where this one ends
            new = self._new_children()
            for pid, parent in new:
                report += self._attach_to_child(pid, parent)
            if not new:
                break
        return report

    def follow(self) -> None:
        """Look for children, and for another program, now and not only at the next harvest.

        What they hold is reported by the next harvest. Cheap when nothing has
        changed: call it as often as children may come and go.

        Raises
        ------
        DirtyLogError
            The process has ended.
        ValueError
            It is closed.
        """
        with self._lock:
            self._check_open()
            changed = not self._ended and self._has_changed()
        if changed:
            self.peek()

    # ---- what people ask for ------------------------------------------------------------------------

    @property
    def regions(self) -> tuple[Region, ...]:
        """The stretches that are watched, in the order of their pages, as of the last harvest."""
        with self._lock:
            return self._stretches.regions

    @property
    def left_regions(self) -> tuple[Region, ...]:
        """The stretches that were let go of on the way to the last harvest, which may report pages of theirs."""
        with self._lock:
            return tuple(self._stretches.leaving[: self._stretches.left])

    @property
    def memory_of(self) -> int:
        """The process in whose ``/proc`` the memory is: this one, or one that keeps it to the last harvest."""
        with self._lock:
            return self._first.watch.pid

    @property
    def used_pages(self) -> int:
        """How much of the page space was ever given to memory: pages from here on are nobody's yet."""
        with self._lock:
            return self._numbers.used

    @property
    def alive(self) -> bool:
        """Whether the process still runs the program that was attached to."""
        with self._lock:
            return not self._closed and not self._ended and not self._over and not self._first.left()

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
        self._collect(True)
        # I5: all that was found is owed by now. The lock is free: a signal handler may have raised on the way here.
        return self._owed.hand_out(self._nothing, self._warn)

    def peek(self) -> DirtyPages:
        """Look at what the next harvest would report; the harvest reports it again.

        Returns, Raises and Notes are those of :meth:`harvest`.
        """
        self._collect(False)
        return self._owed.peek(self._nothing, self._warn)

    def _collect(self, take: bool) -> None:
        """Look what was written, and owe it."""
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
                self._gather(take)
            finally:
                self._busy = False

    def _gather(self, take: bool) -> None:
        doubtful, self._in_doubt = self._in_doubt, True
        if self._ended and not doubtful and not self._owed:
            self._in_doubt = False  # nothing was taken
            raise self._gone()
        if take and not self._owed:  # the last harvest has handed out what it found
            self._stretches.leaving = self._stretches.leaving[self._stretches.left :]
            self._stretches.left = 0
        # Known before the scan, so that the scan is of all that they wrote. Only a keeper still has their memory.
        left = [member for member in self._members if member.left()]
        lost = [member for member in left if not member.keeper]
        if self._first in lost:
            self._check_end(self._first)
        report: list[npt.NDArray[np.int64]] = []
        for member in self._members:
            if member in lost:
                continue
            try:
                report += self._stretches.follow(member)
                report += self._stretches.scan(member, take)
            except ProcessLookupError as error:
                if self._must_live(member):
                    # It ended, or executed another program, since it was looked at.
                    raise self._gone() from error
                # A child that has ended meanwhile, and its memory with it.
        untold = self._stretches.untold
        report += [np.array([[piece.first_page, piece.npages]], np.int64) for piece in untold]
        if doubtful:
            report += [np.array([[piece.first_page, piece.npages]], np.int64) for piece in self._stretches.pieces]
        if not self._over and self._first not in left and self._first.left() and not self._first.keeper:
            # The scan may have been of memory that was gone by then, which answers "nothing".
            self._check_end(self._first)
            left.append(self._first)
        report += self._follow(left, take)
        exact = not untold and not doubtful and not self.missed
        every = np.concatenate(report) if report else np.empty((0, 2), np.int64)
        # What was taken is owed from here on, until the last step of a harvest hands it out (I5).
        self._owed.owe(DirtyPages.from_runs(every, self.npages, PAGE_SIZE, exact=exact))
        self._unsaid_doubt = self._unsaid_doubt or doubtful
        self._in_doubt = False
        if take:
            self._stretches.left = len(self._stretches.leaving)
            self._ended = self._ended or self._over

    def _warn(self, pages: DirtyPages) -> None:
        """Say why an answer is not exact: each reason once."""
        if self._unsaid_doubt:
            self._unsaid_doubt = False
            warnings.warn(
                f"an earlier harvest of process {self.pid} failed half-way: all that is watched is reported",
                IncompleteLogWarning,
                stacklevel=3,
            )
        unsaid = {pid: why for pid, why in self.missed.items() if pid not in self._said_missed}
        if unsaid:
            self._said_missed.update(unsaid)
            reasons = "; ".join(f"{pid}: {why}" for pid, why in unsaid.items())
            warnings.warn(
                f"some of what process {self.pid} has started or become is not watched, and what that writes is "
                f"missing: {reasons}",
                IncompleteLogWarning,
                stacklevel=3,
            )
        if not self._said_shared and (untold := self._stretches.untold):
            self._said_shared = True
            names = sorted({piece.area.name or "anonymous" for piece in untold})
            warnings.warn(
                f"process {self.pid} shares memory that others may write through mappings of their own "
                f"({', '.join(names[:5])}): it is reported whole each time; attach with trust_shared=True if "
                "this process alone writes it",
                IncompleteLogWarning,
                stacklevel=3,
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
        room = make_room(pages, self.npages, out)
        with self._lock:
            self._check_open()
            read_pages(self._stretches.pieces, pages, room, self._check_reading)
        return room

    def _check_reading(self, pid: int) -> None:
        if pid == self._first.watch.pid:
            raise self._gone()

    def _gone(self) -> DirtyLogError:
        return DirtyLogError(
            f"process {self.pid} has ended, or has executed another program: its memory is gone, and what it wrote "
            "last with it; close this Process, and attach to what runs now"
        )

    def _release(self) -> None:
        for member in self._members:
            member.close()

    def __repr__(self) -> str:
        """Name the process and the size."""
        state = "closed " if self.closed else ""
        count = len(self._stretches.pieces)
        return f"<{state}Process {self.pid}: {count} regions in {self.npages} pages of {PAGE_SIZE} bytes>"
