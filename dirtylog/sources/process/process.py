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
from typing import Any

import numpy as np
import numpy.typing as npt

from dirtylog._bits.owed import Owed
from dirtylog._bits.pages import DirtyPages
from dirtylog.errors import DirtyLogError, IncompleteLogWarning
from dirtylog.sources._page_tables import cannot_hold
from dirtylog.sources._resource import Resource
from dirtylog.sources.process._remote import PAGE_SIZE, read_memory
from dirtylog.sources.process.contents import RESERVED, blocks_in_use
from dirtylog.sources.process.members import Member, alone, children
from dirtylog.sources.process.regions import Area, Region, mappings, subtract

__all__ = ["Process"]

_LEAST_SPARE = 1 << 16  # pages: 256 MiB that may be mapped later


@dataclass(slots=True)
class _Piece:
    """A watched stretch: addresses, and where its pages are numbered."""

    start: int
    end: int
    first_page: int
    area: Area
    member: Member
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
        self._trust_shared = trust_shared
        self._lock = threading.RLock()
        self._busy = False
        self.pid: int = first.pid
        self.page_size: int = PAGE_SIZE
        self.stopped: float = stopped
        self.skipped: dict[Area, str] = {}
        self.missed: dict[int, str] = {}
        self._pieces: list[_Piece] = []
        # What was let go of, and how many of these on the way to the last harvest, which may report pages of theirs.
        self._leaving: list[Region] = []
        self._left = 0
        self._free: list[tuple[int, int]] = []
        self._fresh = 0  # pages from here on were never anybody's: a sink has zeros for them
        chosen = first.pick(mappings(first.watch.pid))
        spans = (span for area in chosen for span in self._worth_watching(first, area.start, area.end, area))
        pages = sum(end - start for start, end in spans) // PAGE_SIZE
        room = max(pages, _LEAST_SPARE) if spare is None else spare
        if room < 0:
            raise ValueError(f"spare is {spare}; it must be 0 pages or more")
        self.npages: int = pages + room
        # Found and not handed out yet (I5), and whether something taken may have been lost on the way to there.
        self._owed: Owed = Owed(self.npages, PAGE_SIZE)
        self._nothing = DirtyPages._empty(self.npages, PAGE_SIZE)
        self._in_doubt = self._unsaid_doubt = False
        self._said_shared = False
        self._said_missed: set[int] = set()
        self._follow_mappings(first, at_start=True)
        self._closed = False
        if enter is not None:
            for _ in range(100):
                new = self._new_children()
                for pid, parent in new:
                    self._attach_to_child(pid, parent, at_start=True)
                if not new:
                    break

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

    def _watch_range(self, member: Member, start: int, end: int, area: Area) -> bool:
        """Register and arm a range; False, and the reason noted, when the kernel refuses it."""
        try:
            member.watch.register(start, end)
            member.watch.scan(np.array([[start, end, 0]], np.int64), True)
        except OSError as error:
            if error.errno == errno.ESRCH:
                if self._must_live(member):
                    raise self._gone() from error
                return False  # a child that has ended: its memory is gone, and nothing is to be said of it
            self.skipped[area] = error.strerror or str(error)
            return False
        return True

    def _add(self, member: Member, start: int, end: int, area: Area, at_start: bool) -> list[npt.NDArray[np.int64]]:
        """Watch a new stretch; return what of it is to be reported."""
        told = not area.shared or self._trust_shared
        where = np.array([[start, end, 0]], np.int64)
        zero_if_untouched = area.kind in ("anonymous", "heap", "stack") and not at_start
        swapped_out = _swapped_out() if zero_if_untouched else -1
        own = alone(member, start, end, True) if member.forked and told else None
        held = [member.watch.populated(where, True)] if zero_if_untouched and own is None else []
        if told and not self._watch_range(member, start, end, area):
            return []
        before = next(
            (
                piece
                for piece in self._pieces
                if piece.end == start and piece.member is member and piece.area.kind == area.kind
            ),
            None,
        )
        npages = (end - start) // PAGE_SIZE
        first, used = self._allocate(npages, before.first_page + before.npages if before else None)
        if before and before.first_page + before.npages == first and before.told == told:
            before.end = end
        else:
            self._pieces.append(_Piece(start, end, first, area, member, told))
        if at_start:
            return []
        if own is not None and not used:
            # What the child has written since the fork is its alone; looked at once more after it was protected.
            return [np.add(runs, (first, 0)) for runs in (own, alone(member, start, end, False))]
        if zero_if_untouched and not used:
            # A page that was never touched is zero, and so is a page of this number that nobody has had yet. What was
            # touched before it was protected is in memory now, or was swapped out before the first look or after it.
            held.append(member.watch.populated(where, False))
            if _swapped_out() == swapped_out:
                return [np.add(runs, (first, 0)) for runs in held]
        return [np.array([[first, npages]], np.int64)]

    def _forget(self, member: Member, gone: tuple[int, int]) -> None:
        """Let go of a range that is not mapped any more."""
        kept: list[_Piece] = []
        for piece in self._pieces:
            if piece.member is not member:
                kept.append(piece)
                continue
            start, end = max(piece.start, gone[0]), min(piece.end, gone[1])
            if start >= end:
                kept.append(piece)
                continue
            first = piece.first_page + (start - piece.start) // PAGE_SIZE
            npages = (end - start) // PAGE_SIZE
            self._leaving.append(Region(start, end, first, npages, piece.area.kind, piece.area.name, member.pid))
            self._release_pages(first, npages)
            if piece.start < start:
                kept.append(_Piece(piece.start, start, piece.first_page, piece.area, member, piece.told))
            if end < piece.end:
                rest = first + (end - start) // PAGE_SIZE
                kept.append(_Piece(end, piece.end, rest, piece.area, member, piece.told))
        self._pieces = kept

    def _worth_watching(self, member: Member, start: int, end: int, area: Area) -> list[tuple[int, int]]:
        """Leave out what a program has reserved and not touched: to protect a page takes 8 bytes of page tables.

        What it touches later is new memory then, and reported as such.
        """
        if end - start < RESERVED or not member.sparse or area.shared or area.kind == "file":
            if why := cannot_hold(end - start):
                self.skipped[area] = why
                return []
            return [(start, end)]
        return blocks_in_use(member.watch, start, end)

    def _follow_mappings(self, member: Member, at_start: bool = False) -> list[npt.NDArray[np.int64]]:
        """Compare a process's mappings with what is watched; return the runs of what is new."""
        try:
            now = mappings(member.watch.pid)
        except OSError as error:
            if self._must_live(member):
                raise self._gone() from error
            now = []
        there = [(area.start, area.end) for area in now]
        for piece in [piece for piece in self._pieces if piece.member is member]:
            for gone in subtract((piece.start, piece.end), there):
                self._forget(member, gone)
        taken = sorted((piece.start, piece.end) for piece in self._pieces if piece.member is member)
        report: list[npt.NDArray[np.int64]] = []
        for area in member.pick(now):
            for start, end in subtract((area.start, area.end), taken):
                if area not in self.skipped:
                    for first, last in self._worth_watching(member, start, end, area):
                        report += self._add(member, first, last, area, at_start)
        self._pieces.sort(key=lambda piece: piece.first_page)
        return report

    # ---- children, and programs that are executed -----------------------------------------------------

    def _drop(self, member: Member) -> None:
        """Let go of a process that has ended, or of memory that its program has left."""
        for piece in [piece for piece in self._pieces if piece.member is member]:
            self._forget(member, (piece.start, piece.end))
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
            report = self._follow_mappings(member, at_start)
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
            return tuple(
                Region(p.start, p.end, p.first_page, p.npages, p.area.kind, p.area.name, p.member.pid)
                for p in self._pieces
            )

    @property
    def left_regions(self) -> tuple[Region, ...]:
        """The stretches that were let go of on the way to the last harvest, which may report pages of theirs."""
        with self._lock:
            return tuple(self._leaving[: self._left])

    @property
    def memory_of(self) -> int:
        """The process in whose ``/proc`` the memory is: this one, or one that keeps it to the last harvest."""
        with self._lock:
            return self._first.watch.pid

    @property
    def used_pages(self) -> int:
        """How much of the page space was ever given to memory: pages from here on are nobody's yet."""
        with self._lock:
            return self._fresh

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
            self._leaving = self._leaving[self._left :]
            self._left = 0
        # Known before the scan, so that the scan is of all that they wrote. Only a keeper still has their memory.
        left = [member for member in self._members if member.left()]
        lost = [member for member in left if not member.keeper]
        if self._first in lost and self._must_live(self._first):
            raise self._gone()
        report: list[npt.NDArray[np.int64]] = []
        for member in self._members:
            if member in lost:
                continue
            try:
                report += self._follow_mappings(member)
                report += self._scan(member, take)
            except ProcessLookupError:
                if self._must_live(member):
                    raise
                # A child that has ended meanwhile, and its memory with it.
        untold = self._untold()
        report += [np.array([[piece.first_page, piece.npages]], np.int64) for piece in untold]
        if doubtful:
            report += [np.array([[piece.first_page, piece.npages]], np.int64) for piece in self._pieces]
        if not self._over and self._first not in left and self._first.left() and not self._first.keeper:
            # The scan may have been of memory that was gone by then, which answers "nothing".
            if self._must_live(self._first):
                raise self._gone()
            left.append(self._first)
        report += self._follow(left, take)
        exact = not untold and not doubtful and not self.missed
        every = np.concatenate(report) if report else np.empty((0, 2), np.int64)
        # What was taken is owed from here on, until the last step of a harvest hands it out (I5).
        self._owed.owe(DirtyPages.from_runs(every, self.npages, PAGE_SIZE, exact=exact))
        self._unsaid_doubt = self._unsaid_doubt or doubtful
        self._in_doubt = False
        if take:
            self._left = len(self._leaving)
            self._ended = self._ended or self._over

    def _untold(self) -> list[_Piece]:
        return [piece for piece in self._pieces if not piece.told]

    def _scan(self, member: Member, take: bool) -> list[npt.NDArray[np.int64]]:
        told = [piece for piece in self._pieces if piece.told and piece.member is member]
        areas = np.array([(p.start, p.end, p.first_page) for p in told], np.int64).reshape(-1, 3)
        runs, lost = member.watch.scan(areas, take)
        report = [runs]
        for i in lost:
            # Replaced between two harvests, mapped again at the same address: nothing of it is what it was.
            piece = told[i]
            if not self._watch_range(member, piece.start, piece.end, piece.area):
                piece.told = False
            report.append(np.array([[piece.first_page, piece.npages]], np.int64))
        return report

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
        if not self._said_shared and (untold := self._untold()):
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
        extents: dict[int, list[npt.NDArray[np.int64]]] = {}
        with self._lock:
            self._check_open()
            for piece in self._pieces:
                first = np.maximum(runs[:, 0], piece.first_page)
                end = np.minimum(runs.sum(axis=1), piece.first_page + piece.npages)
                some = np.flatnonzero(first < end)
                begin = piece.start + (first[some] - piece.first_page) * PAGE_SIZE
                into = (offsets[some] + first[some] - runs[some, 0]) * PAGE_SIZE
                which = np.stack([begin, (end - first)[some] * PAGE_SIZE, into], axis=1)
                extents.setdefault(piece.member.watch.pid, []).append(which)
            for pid, parts in extents.items() if pages.count else ():
                try:
                    read_memory(pid, np.ascontiguousarray(np.concatenate(parts)), out.reshape(-1))
                except ProcessLookupError as error:
                    if pid == self._first.watch.pid:
                        raise self._gone() from error
        return out  # type: ignore[no-any-return]

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
        return f"<{state}Process {self.pid}: {len(self._pieces)} regions in {self.npages} pages of {PAGE_SIZE} bytes>"
