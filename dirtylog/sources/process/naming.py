"""Calls the regions of a process what people call them: their arrays, threads, allocators, files, a guest's memory."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np

from dirtylog.sources.process._remote import PAGE_SIZE, read_memory
from dirtylog.sources.process.handover import Found
from dirtylog.sources.process.regions import THREAD_STACK, Region, guest_areas, mappings

__all__ = ["Names"]

_MIB = 1 << 20
# HEAP_MAX_SIZE of glibc's malloc/arena.c with default parameters.
_GLIBC_HEAP = 64 * _MIB
# POOL_SIZE of CPython's Objects/obmalloc.c, with radix tree and before.
_POOLS = (16384, 4096)
# MI_SEGMENT_SIZE of mimalloc's include/mimalloc/types.h, 64-bit.
_MI_SEGMENT = 32 * _MIB
# At most this part of the time is spent looking through a program's objects, beyond half a second at its start.
_SHARE = 50
_FREE = 0.5
_MOST_ARRAYS = 200


class Names:
    """Names regions; the hook that :class:`~dirtylog.sinks.profile.Sampler` and ``dirtylog top`` call.

    Parameters
    ----------
    pid : int
        The process that `arrays` is about.
    arrays : callable, optional
        Returns the arrays that a program says it has, as
        :func:`dirtylog.sources.process.handover.Connection.arrays` does; asked now and then.
    clock : callable, optional
        Seconds, never going back.
    spent : callable, optional
        Seconds of CPU time that the program's answers took it so far, as
        :attr:`dirtylog.sources.process.handover.Connection.spent` says; by default, what they took here.
    memory_of : callable, optional
        Returns the process in whose ``/proc`` the memory of `pid` is, as
        :attr:`dirtylog.Process.memory_of` says: one that keeps it after the end, say. By default `pid`.

    Notes
    -----
    Memory that is new is looked at once, a few hundred bytes of it, to tell the arenas of glibc,
    pymalloc and mimalloc. A program is asked for its arrays when memory of a MiB has come: looking
    through its objects writes to the pages where they are counted. For one thread.
    """

    def __init__(
        self,
        pid: int,
        arrays: Callable[[], Sequence[Found]] | None = None,
        clock: Callable[[], float] = time.monotonic,
        spent: Callable[[], float] | None = None,
        memory_of: Callable[[], int] | None = None,
    ) -> None:
        self._pid = pid
        self._ask = arrays
        self._clock = clock
        self._again = self._began = clock()
        self._waited = 0.0
        self._spent = spent or (lambda: self._waited)
        self._memory_of = memory_of or (lambda: pid)
        self._asking = True
        self._arrays: list[Found] = []
        self._looked_at: dict[tuple[int, int, int], str] = {}
        self._stacks: dict[tuple[int, int], str] = {}

    def __call__(self, regions: Sequence[Region]) -> list[Region]:
        """Return the regions by their names, those cut into pieces that hold arrays."""
        self.look(regions)
        named: list[Region] = []
        for region in regions:
            called = replace(region, name=self._name(region))
            named += _cut(called, self._arrays) if region.pid in (0, self._pid) else [called]
        return named

    def look(self, regions: Sequence[Region]) -> None:
        """Find out what is new among the regions; the program may have ended when their names are asked for."""
        now = self._clock()
        unknown = [region for region in regions if self._key(region) not in self._looked_at]
        # Looking through its objects writes to the pages where they are counted: only where there is more than before.
        self._asking |= any(region.npages * PAGE_SIZE >= _MIB for region in unknown)
        if self._ask is not None and self._asking and now >= self._again:
            self._asking = False
            try:
                self._arrays = sorted(self._ask(), key=lambda found: found[1])
                self._waited += self._clock() - now
            except TimeoutError:
                self._asking = True  # it is looking, or busy: what it says is there at a later look
            except OSError:
                self._ask = None  # the program has ended, what it had is known
            # By the program's own time: a busy machine makes an answer late, and not dear.
            self._again = max(self._clock() + 1.0, self._began + _SHARE * (self._spent() - _FREE))
        for pid in {region.pid or self._pid for region in unknown}:
            self._look_at([region for region in regions if (region.pid or self._pid) == pid], pid)

    def _key(self, region: Region) -> tuple[int, int, int]:
        return region.pid, region.start, region.end

    def _name(self, region: Region) -> str:
        return self._looked_at.get(self._key(region)) or _plain(region)

    def _look_at(self, regions: Sequence[Region], pid: int) -> None:
        """Tell what regions of one process are: the new ones, and once more what others hold by now."""
        memory = self._memory_of() if pid == self._pid else pid
        try:
            areas = mappings(memory)
            guest = {(area.start, area.end) for area in guest_areas(pid, areas)}
        except OSError:
            areas, guest = [], set()
        if any(region.kind == "stack" for region in regions):
            self._find_stacks(pid, regions)
        gaps = {area.start: area.end for area in areas if not area.writable}
        for region in regions:
            name = _plain(region)
            if not any(area.start <= region.start < area.end for area in areas):
                # It is gone, or its process is: what it was known as is all that can be said.
                self._looked_at.setdefault(self._key(region), name)
                continue
            if any(start <= region.start < end for start, end in guest):
                name = f"guest RAM ({name})" if region.name else "guest RAM"
            elif region.kind == "stack":
                name = self._stacks.get((region.pid, region.start), name)
            elif region.kind == "anonymous" and not region.name:
                name = _allocator(memory, region, gaps) or name
            self._looked_at[self._key(region)] = name

    def _find_stacks(self, pid: int, regions: Sequence[Region]) -> None:
        """A thread that waits tells its stack pointer; which it is, is remembered while its stack stays."""
        for tid, pointer in _stack_pointers(pid):
            for region in regions:
                if region.kind == "stack" and region.start <= pointer < region.end:
                    self._stacks[region.pid, region.start] = f"stack of {_text(f'/proc/{pid}/task/{tid}/comm')}"


def _text(path: str) -> str:
    try:
        text = Path(path).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return "?"
    return "".join(each if each.isprintable() else "?" for each in text)


def _stack_pointers(pid: int) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    try:
        tasks = os.listdir(f"/proc/{pid}/task")
    except OSError:
        return []
    for tid in tasks:
        words = _text(f"/proc/{pid}/task/{tid}/syscall").split()
        if len(words) >= 3:  # "running", where it does
            found.append((int(tid), int(words[-2], 16)))
    return found


def _plain(region: Region) -> str:
    """Call a region by what the kernel says."""
    given = re.fullmatch(r"\[anon(?:_shmem)?:\s*(.*)\]", region.name)
    if given:
        return given[1]
    if region.name == THREAD_STACK:
        return "stack of a thread"
    if region.name == "[heap]":
        return "heap"
    if region.name.startswith("/memfd:"):
        return region.name.removesuffix(" (deleted)").removeprefix("/")
    return os.path.basename(region.name) or region.kind


def _words(pid: int, address: int, count: int) -> list[int]:
    """Read 64-bit words of a process; zeros where there are none."""
    out = np.zeros(count, np.uint64)
    with suppress(OSError):  # what cannot be read has no name of ours
        read_memory(pid, np.array([[address, 8 * count, 0]], np.int64), out.view(np.uint8))
    found: list[int] = out.tolist()
    return found


def _allocator(pid: int, region: Region, gaps: dict[int, int]) -> str:
    """Tell whose arena a private anonymous mapping is, by what allocators write at its beginning; or return nothing."""
    if _is_glibc_arena(pid, region, gaps):
        return "glibc arena"
    if _is_pymalloc(pid, region):
        return "pymalloc"
    first = -(-region.start // _MI_SEGMENT) * _MI_SEGMENT
    # Its size is among the first words of a segment.
    if first < region.end and _MI_SEGMENT in _words(pid, first, 8):
        return "mimalloc"
    return ""


def _is_glibc_arena(pid: int, region: Region, gaps: dict[int, int]) -> bool:
    """At multiples of its largest size there is a heap: its arena, the heap before, its size, and how it may grow."""
    for start in range(-(-region.start // _GLIBC_HEAP) * _GLIBC_HEAP, region.end, _GLIBC_HEAP):
        arena, _, size, mapped = _words(pid, start, 4)
        pointer = arena and arena % 16 == 0 and arena % _GLIBC_HEAP < PAGE_SIZE
        sizes = 0 < size <= mapped <= _GLIBC_HEAP and size % PAGE_SIZE == mapped % PAGE_SIZE == 0
        if pointer and sizes and (start + size <= region.end or gaps.get(region.end, 0) > region.end):
            return True
    return False


def _is_pymalloc(pid: int, region: Region) -> bool:
    """Pools say their size class, and the last place for a block, which is the pool's size less one block."""
    for size in _POOLS:
        first = -(-region.start // size) * size
        pools = range(first, min(region.end, first + 64 * size), size)
        matching = 0
        for start in pools:
            words = _words(pid, start, 6)
            block = ((words[4] >> 32) + 1) * 16
            if block <= 512 and words[5] >> 32 == size - block and 48 <= words[5] & 0xFFFFFFFF <= size + 512:
                matching += 1
                if matching == 3:
                    return True
    return False


def _cut(region: Region, arrays: Sequence[Found]) -> list[Region]:
    """Cut a region where arrays begin and end, in whole pages; a page that two have is the first one's."""
    inside = [found for found in arrays if found[1] < region.end and region.start < found[2]]
    if not inside:
        return [region]
    largest = sorted(inside, key=lambda found: found[1] - found[2])[:_MOST_ARRAYS]
    pieces: list[Region] = []

    def add(start: int, end: int, name: str) -> None:
        if start < end:
            first = region.first_page + (start - region.start) // PAGE_SIZE
            count = (end - start) // PAGE_SIZE
            pieces.append(replace(region, start=start, end=end, first_page=first, npages=count, name=name))

    at = region.start
    for name, start, end in sorted(largest, key=lambda found: found[1:]):
        low = max(at, start // PAGE_SIZE * PAGE_SIZE)
        high = min(region.end, -(-end // PAGE_SIZE) * PAGE_SIZE)
        if low < high:
            add(at, low, region.name)
            add(low, high, name)
            at = high
    add(at, region.end, region.name)
    return pieces
