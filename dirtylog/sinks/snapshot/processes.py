"""Keeps the memory of a running process as snapshots: read from outside, while it runs or while it is held still.

What is kept is memory, not registers, open files or anything else of the process: it is for looking into, for comparing
and for putting back by who can make the process want it, not for starting the process again. The pages are those of the
writable mappings, numbered as the regions in the snapshot's state say; pages that no region has mean nothing.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dirtylog._bits.copying import gather
from dirtylog._bits.flat import flat_bytes
from dirtylog._bits.pages import DirtyPages
from dirtylog._core import compare_pages, zero_pages
from dirtylog.errors import DirtyLogError
from dirtylog.sinks._bytes.extents import WINDOW, PackedExtents
from dirtylog.sinks.snapshot.chain import Info, Progress, StrPath, checked_path
from dirtylog.sinks.snapshot.footer import Row, SnapshotError, best_digest
from dirtylog.sinks.snapshot.reader import info, restore
from dirtylog.sinks.snapshot.writer import How, parent_link, write
from dirtylog.sources.process import Area, Region
from dirtylog.sources.process._remote import PAGE_SIZE, read_memory
from dirtylog.sources.process.attaching import not_permitted, status_of
from dirtylog.sources.process.contents import held_pages, stretches
from dirtylog.sources.process.freezing import frozen
from dirtylog.sources.process.regions import Select, choose, mappings, places_of, subtract

__all__ = ["Memory", "diff_process", "process_of", "save_process"]

HOLDS = "memory, not registers"
# Pages that may be mapped later, and have numbers in the diffs then: 256 MiB, or as many as there are.
_LEAST_SPARE = 1 << 16


class Memory:
    """Regions of a process, as the page space of a snapshot; nothing of it is kept."""

    named = False
    page_size = PAGE_SIZE

    def __init__(self, pid: int, regions: Sequence[Region], npages: int) -> None:
        self.pid = pid
        self.regions: list[Region] = sorted(regions, key=lambda region: region.first_page)
        self.npages: int = npages
        self.nbytes: int = npages * PAGE_SIZE
        self._firsts = [region.first_page * PAGE_SIZE for region in self.regions]

    def rows(self) -> tuple[Row, ...]:
        """Return what the footer says: bytes."""
        return (("", "|u1", (self.nbytes,), "C", 0, self.nbytes),)

    def gather(self, extents: npt.NDArray[np.int64], packed: memoryview) -> None:
        """Read extents one after the other into `packed`; what is not mapped any more is zeros."""
        np.frombuffer(packed, np.uint8)[:] = 0
        ends = extents.sum(axis=1)
        into = np.cumsum(extents[:, 1]) - extents[:, 1]
        wanted: dict[int, list[npt.NDArray[np.int64]]] = {}
        low = max(bisect.bisect_right(self._firsts, int(extents[0, 0])) - 1, 0)
        high = bisect.bisect_left(self._firsts, int(ends[-1]))
        for region, at in zip(self.regions[low:high], self._firsts[low:high], strict=True):
            begin = np.maximum(extents[:, 0], at)
            end = np.minimum(ends, at + region.npages * PAGE_SIZE)
            some = np.flatnonzero(begin < end)
            part = [begin - at + region.start, end - begin, into + begin - extents[:, 0]]
            wanted.setdefault(region.pid or self.pid, []).append(np.stack([column[some] for column in part], axis=1))
        for pid, parts in wanted.items():
            read_memory(pid, np.ascontiguousarray(np.concatenate(parts)), packed)

    def state(self, paused: str | None) -> dict[str, Any]:
        """Return what the snapshot says beside the memory."""
        return {
            "process": {
                "pid": self.pid,
                "command": _command(self.pid),
                "holds": HOLDS,
                "paused": paused,
                "regions": [
                    [each.start, each.first_page, each.npages, each.kind, each.name, each.pid or self.pid]
                    for each in self.regions
                ],
            }
        }


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text(encoding="utf-8", errors="replace").rstrip("\n")
    except OSError:
        return ""


def process_of(about: Info) -> tuple[dict[str, Any], list[Region]] | None:
    """Return what a snapshot says of the process that it is of, and where its memory was; None for another snapshot.

    Raises
    ------
    SnapshotError
        It says something that cannot be.
    """
    state = about.state
    if not isinstance(state, dict) or not isinstance(state.get("process"), dict):
        return None
    process = state["process"]
    try:
        regions = [
            Region(start, start + npages * PAGE_SIZE, first, npages, str(kind), str(name), pid)
            for start, first, npages, kind, name, pid in process["regions"]
        ]
        sound = all(
            0 <= each.start < 1 << 63 and each.npages > 0 and 0 <= each.first_page <= about.npages - each.npages
            for each in regions
        )
    except (KeyError, TypeError, ValueError) as error:
        raise SnapshotError(f"{about.path}: its regions cannot be used: {error}") from error
    if not sound:
        raise SnapshotError(f"{about.path}: its regions lie outside of its {about.npages} pages")
    return process, regions


def _number(areas: list[tuple[int, int, Area]], before: list[Region], npages: int, pid: int) -> list[Region]:
    """Give stretches of memory page numbers: those that they had before, or numbers that nobody has."""
    numbered: list[Region] = []
    new: list[tuple[int, int, Area]] = []
    old = sorted(before, key=lambda region: region.start)
    starts, ends = [region.start for region in old], [region.end for region in old]
    for start, end, area in areas:
        known = slice(bisect.bisect_right(ends, start), bisect.bisect_left(starts, end))
        for region in old[known]:
            low, high = max(start, region.start), min(end, region.end)
            first = region.first_page + (low - region.start) // PAGE_SIZE
            count = (high - low) // PAGE_SIZE
            numbered.append(Region(low, high, first, count, area.kind, area.name, pid))
        taken = list(zip(starts[known], ends[known], strict=True))
        new += [(low, high, area) for low, high in subtract((start, end), taken)]
    used = sorted((region.first_page, region.first_page + region.npages) for region in numbered)
    # The spare numbers lie at the end: look there first, and through what was given back only when they are used up.
    free = list(subtract((0, npages), used))[::-1]
    for start, end, area in new:
        count = (end - start) // PAGE_SIZE
        for place, (first, last) in enumerate(free):
            if last - first >= count:
                free[place] = (first + count, last)
                numbered.append(Region(start, end, first, count, area.kind, area.name, pid))
                break
        else:
            raise DirtyLogError(
                f"process {pid} has mapped {count} pages more than its snapshot has room for; save a full one again"
            )
    return numbered


def _number_by(places: Sequence[tuple[int, int, int]], areas: Sequence[Area], pid: int) -> list[Region]:
    """Give the parts of mappings that lie in places the numbers that these say."""
    found = [
        Region(
            max(low, area.start),
            min(high, area.end),
            first + (max(low, area.start) - low) // PAGE_SIZE,
            (min(high, area.end) - max(low, area.start)) // PAGE_SIZE,
            area.kind,
            area.name,
            pid,
        )
        for area in areas
        for low, high, first in places
        if low < area.end and area.start < high
    ]
    if not found:
        raise DirtyLogError(f"process {pid} has no memory any more in the {len(places)} places that are selected")
    return found


@contextmanager
def _looked_at(pid: int, select: Select, freeze: str | None) -> Iterator[tuple[list[Area], list[tuple[int, int, int]]]]:
    """Hold a process, and yield what of its memory is chosen, and the places if those were given.

    Where its memory may not be read, the error says what it would take.
    """
    status_of(pid)
    try:
        pick, places = choose(pid, select), places_of(select)
        with frozen(pid, freeze) if freeze else nullcontext():
            yield pick(mappings(pid)), places
    except PermissionError as error:
        if not str(error.filename or "").startswith(f"/proc/{pid}/"):
            raise
        raise not_permitted(pid, error) from error


def save_process(
    path: StrPath,
    pid: int,
    *,
    select: Select = "all",
    freeze: str | None = None,
    epoch: int | None = None,
    sync: bool = True,
    replace: bool = False,
    progress: Progress | None = None,
) -> Info:
    """Write the memory of a process as a full snapshot.

    Parameters
    ----------
    path, epoch, sync, replace, progress
        As for :func:`~dirtylog.sinks.snapshot.save`.
    pid : int
        The process, which needs no preparation.
    select : {"all", "large", "guest"}, callable, or sequence of (int, int, int)
        Which of its memory, as for :func:`dirtylog.attach`; by default all that is writable. With
        places, the snapshot's pages are numbered as they say.
    freeze : {"ptrace", "cgroup"}, optional
        Hold it still meanwhile (:func:`dirtylog.sources.process.freezing.frozen`), so that
        the snapshot is of one moment. Without, it runs on, and the pages are of different
        moments.

    Returns
    -------
    Info
        `state` has ``"process"``: its id and command, that memory and no registers are
        held, how it was paused or None, and its regions: address, first page, pages, kind,
        name, process id.

    Raises
    ------
    OSError
        There is no such process, or it may not be read; or as for `save`.

    Notes
    -----
    O(memory that holds something). Nothing is done to the process without `freeze`, and
    nothing but stopping it with it.
    """
    name = checked_path(path)
    with _looked_at(pid, select, freeze) as (areas, places):
        if places:
            regions = _number_by(places, areas, pid)
            npages = max(region.first_page + region.npages for region in regions)
        else:
            found = stretches(pid, areas)
            pages = sum(end - start for start, end, _ in found) // PAGE_SIZE
            npages = pages + max(pages, _LEAST_SPARE)
            regions = _number(found, [], npages, pid)
        memory = Memory(pid, regions, npages)
        how = How(epoch, best_digest(), sync, replace, None, memory.state(freeze), progress)
        return write(name, memory, held_pages(pid, memory.regions, npages), None, how)


def diff_process(
    path: StrPath,
    pid: int,
    *,
    parent: StrPath,
    select: Select = "all",
    freeze: str | None = None,
    epoch: int | None = None,
    sync: bool = True,
    replace: bool = False,
    search: Sequence[StrPath] = (),
    progress: Progress | None = None,
) -> Info:
    """Write what differs between the memory of a process and a snapshot of it.

    Parameters
    ----------
    path, parent, epoch, sync, replace, search, progress
        As for :func:`~dirtylog.sinks.snapshot.save_diff`.
    pid, select, freeze
        As for :func:`save_process`, with which the parent's chain began.

    Returns
    -------
    Info
        As for :func:`save_process`.

    Raises
    ------
    SnapshotError
        The parent is not of this process, or is damaged.
    DirtyLogError
        It has mapped more than there is room for in the page space.

    Notes
    -----
    Every page that holds something is compared with the parent's: O(memory). What a
    process that runs writes while it is compared may be in this diff or in the next.
    """
    name = checked_path(path)
    above = info(parent)
    known = process_of(above)
    if known is None or known[0].get("pid") != pid or above.page_size != PAGE_SIZE:
        raise SnapshotError(
            f"{above.path}: this is not a snapshot of the memory of process {pid}; begin a chain with a full one"
        )
    there = flat_bytes(restore(parent, search=search))
    filled = DirtyPages._all(above.npages, PAGE_SIZE, exact=True) - zero_pages(there, PAGE_SIZE)
    with _looked_at(pid, select, freeze) as (areas, places):
        if places:
            regions = _number_by(places, areas, pid)
            if max(region.first_page + region.npages for region in regions) > above.npages:
                raise DirtyLogError(
                    f"the places of process {pid} reach past the {above.npages} pages of {above.path}; save a full one "
                    "again"
                )
        else:
            regions = _number(stretches(pid, areas), known[1], above.npages, pid)
        memory = Memory(pid, regions, above.npages)
        how = How(epoch, best_digest(), sync, replace, None, memory.state(freeze), progress)
        link, vouch = parent_link(name, parent, memory, how, search)
        pages = _different(memory, there, filled)
        return write(name, memory, pages, link, how, vouch)


def _different(memory: Memory, there: memoryview, filled: DirtyPages) -> DirtyPages:
    """Compare the pages of all regions that hold something, here or there; `filled` are those there."""
    mine = np.array([(each.first_page, each.npages) for each in memory.regions], np.int64).reshape(-1, 2)
    inside = DirtyPages.from_runs(mine, memory.npages, PAGE_SIZE)
    either = held_pages(memory.pid, memory.regions, memory.npages) | (filled & inside)
    numbers = either.indices()
    packed = PackedExtents(either, memory.nbytes)
    now, before = (memoryview(bytearray(min(WINDOW, packed.total))) for _ in range(2))
    found = [np.empty(0, np.int64)]
    for begin, end, extents in packed.windows():
        memory.gather(extents, now[: end - begin])
        gather(there, extents, before[: end - begin])
        changed = compare_pages(now[: end - begin], before[: end - begin], PAGE_SIZE)
        found.append(numbers[begin // PAGE_SIZE + changed.indices()])
    return DirtyPages.from_indices(np.concatenate(found), memory.npages, PAGE_SIZE)
