"""Which pages of a process's memory may hold something: told from its page tables and files, without touching a page.

To read a page that was never written gives it a place in the page tables, or a page of its own in a shared file: a
process that has reserved terabytes must not be made to have them.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from contextlib import closing

import numpy as np

from dirtylog._bits.pages import DirtyPages
from dirtylog.sources.process._remote import PAGE_SIZE, Watch
from dirtylog.sources.process.regions import Area, Region

__all__ = ["RESERVED", "blocks_in_use", "held_pages", "is_reserve", "stretches"]

# Mappings of so many bytes count where they hold something, in blocks of so many.
RESERVED = 4 << 30
BLOCK = 32 << 20


def blocks_in_use(watch: Watch, start: int, end: int) -> list[tuple[int, int]]:
    """Return the blocks of a private mapping that hold something: start and end, ascending."""
    runs = watch.populated(np.array([[start, end, 0]], np.int64), True)
    found: list[tuple[int, int]] = []
    for first, npages in runs.tolist():
        low = max(start, (start + first * PAGE_SIZE) // BLOCK * BLOCK)
        high = min(end, -(-(start + (first + npages) * PAGE_SIZE) // BLOCK) * BLOCK)
        if found and low <= found[-1][1]:
            found[-1] = (found[-1][0], max(high, found[-1][1]))
        else:
            found.append((low, high))
    return found


def is_reserve(area: Area) -> bool:
    """Whether a mapping is so large that most of it can only be reserved."""
    return area.end - area.start >= RESERVED and not area.shared and area.kind != "file"


def stretches(pid: int, areas: Sequence[Area]) -> list[tuple[int, int, Area]]:
    """Return the stretches of mappings that are worth a page number: without what is only reserved."""
    found: list[tuple[int, int, Area]] = []
    with closing(_looking(pid)) as watch:
        for area in areas:
            spans = blocks_in_use(watch, area.start, area.end) if is_reserve(area) else [(area.start, area.end)]
            found += [(start, end, area) for start, end in spans]
    return found


def held_pages(pid: int, regions: Sequence[Region], npages: int) -> DirtyPages:
    """Return the pages of regions that may hold something else than zeros."""
    private = [each for each in regions if each.kind in ("anonymous", "heap", "stack")]
    areas = np.array([(each.start, each.end, each.first_page) for each in private], np.int64).reshape(-1, 3)
    with closing(_looking(pid)) as watch:
        runs = [watch.populated(areas, True)]
    shared = _shared_data(pid) if any(each.kind == "shared" for each in regions) else []
    for each in regions:
        if each.kind == "shared":
            parts = [(max(each.start, low), min(each.end, high)) for low, high in shared]
            held = [
                (each.first_page + (low - each.start) // PAGE_SIZE, (high - low) // PAGE_SIZE)
                for low, high in parts
                if low < high
            ]
            runs.append(np.array(held, np.int64).reshape(-1, 2))
        elif each.kind == "file":
            runs.append(np.array([[each.first_page, each.npages]], np.int64))
    return DirtyPages.from_runs(np.concatenate(runs), npages, PAGE_SIZE)


def _looking(pid: int) -> Watch:
    try:
        return Watch(pid, -1)
    except PermissionError as error:
        raise PermissionError(error.errno, f"the memory of process {pid} may not be read: {error.strerror}") from error


def _shared_data(pid: int) -> list[tuple[int, int]]:
    """Where shared mappings of a process have data in their files: addresses, in whole pages."""
    found: list[tuple[int, int]] = []
    with open(f"/proc/{pid}/maps", encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            span, permissions, offset, *_ = line.split(maxsplit=5)
            if permissions[3] == "s":
                start, end = (int(part, 16) for part in span.split("-"))
                found += _data_in(f"/proc/{pid}/map_files/{span}", start, end, int(offset, 16))
    return found


def _data_in(file: str, start: int, end: int, offset: int) -> list[tuple[int, int]]:
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return [(start, end)]  # it takes more rights than reading the memory does
    found: list[tuple[int, int]] = []
    try:
        at = offset
        last = offset + end - start
        while at < last:
            low = os.lseek(descriptor, at, os.SEEK_DATA)
            if low >= last:
                break
            at = min(os.lseek(descriptor, low, os.SEEK_HOLE), last)
            found.append(
                (start + low // PAGE_SIZE * PAGE_SIZE - offset, start - (-at // PAGE_SIZE * PAGE_SIZE) - offset)
            )
    except OSError as error:
        if error.errno != errno.ENXIO:  # no data from there on
            return [(start, end)]
    finally:
        os.close(descriptor)
    return found
