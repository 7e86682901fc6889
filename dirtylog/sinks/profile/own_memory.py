"""What a profiler sees of its own process: the large private mappings, what is in them, and what they are called."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from dirtylog._bits.pages import DirtyPages

__all__ = ["Area", "label", "large_areas", "populated", "price_of_a_first_write", "track_area"]

MIN_BYTES = 1 << 20
# Of a /proc/self/pagemap entry. Bit 62, swapped out, is no use: it is set for the markers, too, that
# write protection leaves where there is no page yet.
_PRESENT = np.uint64(1 << 63)


@dataclass(frozen=True, slots=True)
class Area:
    """A writable private anonymous mapping: addresses in bytes, and the kernel's name for it."""

    start: int
    end: int
    kind: str


def large_areas(min_bytes: int = MIN_BYTES) -> list[Area]:
    """List the writable, private, anonymous mappings of this process that are at least so large.

    What is too large to be write-protected is left out: address space that was
    reserved by the terabyte, of which little is ever touched.

    References
    ----------
    ``proc_pid_maps(5)``.
    """
    from dirtylog.sources._page_tables import cannot_hold
    from dirtylog.sources.memory.probe import mappings_of

    return [
        Area(mapping.start, mapping.end, mapping.path)
        for mapping in mappings_of(0, 1 << 64)
        if mapping.permissions == "rw-p"
        and (mapping.path in ("", "[heap]") or mapping.path.startswith("[anon:"))
        and mapping.end - mapping.start >= min_bytes
        and not cannot_hold(mapping.end - mapping.start)
    ]


def track_area(area: Area) -> Any:
    """Track an area by userfaultfd: the one back end that the program cannot notice.

    Raises
    ------
    BackendUnavailable
        userfaultfd does not work here.
    """
    from dirtylog.sources.memory import track

    buffer = (ctypes.c_ubyte * (area.end - area.start)).from_address(area.start)
    return track(buffer, backend="userfaultfd")


def populated(area: Area, page_size: int) -> DirtyPages:
    """Return the pages of an area that are in memory.

    References
    ----------
    Linux ``Documentation/admin-guide/mm/pagemap.rst``.
    """
    npages = (area.end - area.start) // page_size
    descriptor = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    try:
        raw = os.pread(descriptor, npages * 8, area.start // page_size * 8)
    finally:
        os.close(descriptor)
    entries = np.frombuffer(raw[: len(raw) // 8 * 8], np.uint64)
    return DirtyPages.from_indices(np.flatnonzero(entries & _PRESENT), npages, page_size)


def label(area: Area) -> str:
    """Name an area by the NumPy arrays of ``__main__`` that lie in it, or else by its kind."""
    names = [name for name, start, end in _arrays() if area.start < end and start < area.end]
    kind = area.kind or "anonymous"
    return f"{', '.join(names[:3])}{' ...' if len(names) > 3 else ''} ({kind})" if names else kind


def _arrays() -> list[tuple[str, int, int]]:
    main = sys.modules.get("__main__")
    if not isinstance(main, ModuleType):
        return []
    found = []
    for name, value in list(vars(main).items()):
        if type(value) is np.ndarray and value.nbytes >= MIN_BYTES and value.flags.c_contiguous:
            start = value.__array_interface__["data"][0]
            found.append((name, start, start + value.nbytes))
    return found


def price_of_a_first_write(track: Callable[[Area], Any]) -> float:
    """Measure what the first write to a tracked page costs more than a write to another, in seconds.

    Raises
    ------
    BackendUnavailable
        What `track` raises: this is also the probe whether it works here.
    """
    npages = 256
    with mmap.mmap(-1, npages * mmap.PAGESIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        pages = np.frombuffer(memory, np.uint8)[:: mmap.PAGESIZE]
        try:
            pages += 1
            start = pages.__array_interface__["data"][0]
            times = []
            tracker = track(Area(start, start + len(memory), ""))
            try:
                for armed in (False, True, False, True, False, True):
                    if not armed:
                        pages += 1
                    else:
                        tracker.harvest()
                    began = time.perf_counter()
                    pages += 1
                    times.append(time.perf_counter() - began)
            finally:
                tracker.close()
        finally:
            del pages
    return max(0.0, min(times[1::2]) - min(times[::2])) / npages
