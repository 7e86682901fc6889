"""The stretches of memory that are watched: found, numbered, protected and let go of as mappings come and go."""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dirtylog._bits.pages import DirtyPages
from dirtylog.sources._page_tables import cannot_hold
from dirtylog.sources.process._remote import PAGE_SIZE
from dirtylog.sources.process.contents import RESERVED, blocks_in_use
from dirtylog.sources.process.members import Member, alone
from dirtylog.sources.process.numbering import Numbering
from dirtylog.sources.process.regions import Area, Region, subtract

__all__ = ["Piece", "Stretches", "worth_watching"]

Runs = list[npt.NDArray[np.int64]]


@dataclass(slots=True)
class Piece:
    """A watched stretch: addresses, and where its pages are numbered."""

    start: int
    end: int
    first_page: int
    area: Area
    member: Member
    told: bool = True  # False: nobody can say what was written, it is reported whole each time (I6)

    @property
    def npages(self) -> int:
        """Its size."""
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


def worth_watching(skipped: dict[Area, str], member: Member, start: int, end: int, area: Area) -> list[tuple[int, int]]:
    """Leave out what a program has reserved and not touched: to protect a page takes 8 bytes of page tables.

    What it touches later is new memory then, and reported as such. Where page numbers are given, these are cut out.
    """
    if member.places:
        inside = [(max(start, low), min(end, high)) for low, high, _ in member.places]
        inside = [(low, high) for low, high in inside if low < high]
        if why := cannot_hold(sum(high - low for low, high in inside)):
            skipped[area] = why
            return []
        return inside
    if end - start < RESERVED or not member.sparse or area.shared or area.kind == "file":
        if why := cannot_hold(end - start):
            skipped[area] = why
            return []
        return [(start, end)]
    return blocks_in_use(member.watch, start, end)


class Stretches:
    """What of which process is watched, and where its pages are numbered.

    Parameters
    ----------
    numbers : Numbering
        The page space.
    trust_shared : bool
        Watch shared memory through the processes' own mappings alone.
    ended : callable
        Called with a member whose memory is gone: raises where that is an error.

    Notes
    -----
    Holds no lock: its caller does. What a method returns is to be reported, as runs of pages.
    """

    def __init__(self, numbers: Numbering, *, trust_shared: bool, ended: Callable[[Member], None]) -> None:
        self.pieces: list[Piece] = []
        self.skipped: dict[Area, str] = {}
        # What was let go of, and how many of these on the way to the last harvest, which may report pages of theirs.
        self.leaving: list[Region] = []
        self.left: int = 0
        # Pages of files of which a process had copies of its own at the last look that took.
        self._copied: dict[Member, DirtyPages] = {}
        self._numbers = numbers
        self._trust_shared = trust_shared
        self._ended = ended

    @property
    def regions(self) -> tuple[Region, ...]:
        """The stretches, in the order of their pages."""
        return tuple(
            Region(p.start, p.end, p.first_page, p.npages, p.area.kind, p.area.name, p.member.pid) for p in self.pieces
        )

    @property
    def untold(self) -> list[Piece]:
        """Those of which nobody can say what was written."""
        return [piece for piece in self.pieces if not piece.told]

    def of(self, member: Member) -> list[Piece]:
        """Those of one process."""
        return [piece for piece in self.pieces if piece.member is member]

    def follow(self, member: Member, at_start: bool = False) -> Runs:
        """Compare a process's mappings with what is watched; return the runs of what is new."""
        try:
            now = member.mappings()
        except OSError:
            self._ended(member)
            now = []
        there = [(area.start, area.end) for area in now]
        for piece in self.of(member):
            for gone in subtract((piece.start, piece.end), there):
                self._forget(member, gone)
        taken = sorted((piece.start, piece.end) for piece in self.of(member))
        report: Runs = []
        for area in member.pick(now):
            for start, end in subtract((area.start, area.end), taken):
                if area not in self.skipped:
                    for first, last in worth_watching(self.skipped, member, start, end, area):
                        report += self._add(member, first, last, area, at_start)
        self.pieces.sort(key=lambda piece: piece.first_page)
        return report

    def scan(self, member: Member, take: bool) -> Runs:
        """Return what a process has written, and take it or look only."""
        told = [piece for piece in self.of(member) if piece.told]
        areas = np.array([(p.start, p.end, p.first_page) for p in told], np.int64).reshape(-1, 3)
        runs, lost = member.watch.scan(areas, take)
        report = [runs]
        for i in lost:
            # Replaced between two harvests, mapped again at the same address: nothing of it is what it was.
            piece = told[i]
            if not self._watch_range(member, piece.start, piece.end, piece.area):
                piece.told = False
            report.append(np.array([[piece.first_page, piece.npages]], np.int64))
        return report + self._taken_away(member, [piece for piece in told if piece.area.kind == "file"], take)

    def _taken_away(self, member: Member, files: list[Piece], take: bool) -> Runs:
        """Report pages that were copies and are none: the file shows again (MADV_DONTNEED), and no scan says so.

        A copy that was swapped out looks like that too, and is reported once for it.
        """
        if not files:
            return []
        areas = np.array([(p.start, p.end, p.first_page) for p in files], np.int64)
        now = self._pages(member.watch.copies(areas))
        gone = self._copied.get(member, self._pages()) - now
        if take:
            self._copied[member] = now
        return [(gone & self._pages([(p.first_page, p.npages) for p in files])).runs()]

    def _pages(self, runs: npt.ArrayLike = ()) -> DirtyPages:
        return DirtyPages.from_runs(np.asarray(runs, np.int64).reshape(-1, 2), self._numbers.npages, PAGE_SIZE)

    def drop(self, member: Member) -> None:
        """Let go of all that is a process's."""
        for piece in self.of(member):
            self._forget(member, (piece.start, piece.end))
        self._copied.pop(member, None)

    def _watch_range(self, member: Member, start: int, end: int, area: Area) -> bool:
        """Register and arm a range; False, and the reason noted, when the kernel refuses it."""
        try:
            member.watch.register(start, end)
            member.watch.scan(np.array([[start, end, 0]], np.int64), True)
        except OSError as error:
            if error.errno == errno.ESRCH:
                self._ended(member)
                return False  # a child that has ended: its memory is gone, and nothing is to be said of it
            self.skipped[area] = error.strerror or str(error)
            return False
        return True

    def _add(self, member: Member, start: int, end: int, area: Area, at_start: bool) -> Runs:
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
                for piece in self.pieces
                if piece.end == start and piece.member is member and piece.area.kind == area.kind
            ),
            None,
        )
        npages = (end - start) // PAGE_SIZE
        given = member.number_at(start)
        if given is None:
            first, used = self._numbers.allocate(npages)
        else:
            self._numbers.place(given, npages)
            first, used = given, True  # what is mapped there anew is under the numbers of what was there
        if before and before.first_page + before.npages == first and before.told == told:
            before.end = end
        else:
            self.pieces.append(Piece(start, end, first, area, member, told))
        if told and area.kind == "file":
            copies = self._pages(member.watch.copies(where) + np.array([[first, 0]]))
            self._copied[member] = self._copied.get(member, self._pages()) | copies
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
        kept: list[Piece] = []
        for piece in self.pieces:
            if piece.member is not member:
                kept.append(piece)
                continue
            start, end = max(piece.start, gone[0]), min(piece.end, gone[1])
            if start >= end:
                kept.append(piece)
                continue
            first = piece.first_page + (start - piece.start) // PAGE_SIZE
            npages = (end - start) // PAGE_SIZE
            self.leaving.append(Region(start, end, first, npages, piece.area.kind, piece.area.name, member.pid))
            self._numbers.release(first, npages)
            if piece.start < start:
                kept.append(Piece(piece.start, start, piece.first_page, piece.area, member, piece.told))
            if end < piece.end:
                rest = first + (end - start) // PAGE_SIZE
                kept.append(Piece(end, piece.end, rest, piece.area, member, piece.told))
        self.pieces = kept
