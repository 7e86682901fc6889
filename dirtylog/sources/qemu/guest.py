"""Where in QEMU's own memory its guest's memory is, and at which guest addresses: asked of its monitor."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from dirtylog.errors import DirtyLogError
from dirtylog.sources.qemu.qmp import Qmp

__all__ = ["GuestRange", "guest_memory"]

PAGE_SIZE = os.sysconf("SC_PAGESIZE")
# A line of `info mtree -f`: guest addresses, what is there, its name, from where in that on; then what accelerates it.
_RANGE = re.compile(
    r"\s+([0-9a-f]{16})-([0-9a-f]{16}) \(prio -?\d+, ram\): (\S+)(?: @([0-9a-f]{16}))?(?: \S+)*\s*", re.ASCII
)
_HOST = re.compile(r"Host virtual address for \S+ \((.*)\) is (0x[0-9a-f]+)", re.ASCII)


class GuestRange(NamedTuple):
    """A range of a guest's memory: where it is in QEMU's address space, in bytes, and its first guest page (gfn)."""

    start: int
    end: int
    first_page: int


@dataclass(frozen=True, slots=True)
class _Part:
    """A part of a block: from which offset to which, and at which guest address; in bytes."""

    begin: int
    end: int
    address: int

    @property
    def shift(self) -> int:
        return self.address - self.begin


def guest_memory(qmp: Qmp) -> list[GuestRange]:
    """Ask where the guest's memory is, for :func:`dirtylog.attach` to number its pages as the guest does.

    Parameters
    ----------
    qmp : Qmp
        A monitor of the QEMU. It stays the caller's.

    Returns
    -------
    list of GuestRange
        Every page of the memory backends that the guest has, by ascending page number:
        page ``n`` is at guest-physical address ``n * page_size``. What lies in between
        is no memory: a hole for devices, or ROM.

    Raises
    ------
    DirtyLogError
        QEMU has no memory backend that the guest has, or does not say where one is.
    OSError
        It does not answer.

    Notes
    -----
    Of the memory as it is plugged in now: ask again, and attach again, when more is.
    Memory that the guest's chip set hides behind ROM or a screen, and may show later, has the
    address that its neighbours give it; if something else is there, one after the highest.

    References
    ----------
    ``info mtree -f``, ``gpa2hva`` in QEMU's `hmp-commands-info.hx` and `hmp-commands.hx`;
    ``query-memdev`` in `qapi/machine.json`.
    """
    sizes = {str(each["id"]): int(each["size"]) for each in qmp.execute("query-memdev") if "id" in each}
    seen: dict[str, list[_Part]] = {}
    for first, last, name, offset in _ranges(_told(qmp, "info mtree -f")):
        if (backend := name.rpartition("/")[2]) in sizes:
            seen.setdefault(backend, []).append(_Part(offset, offset + last + 1 - first, first))
    if not seen:
        raise DirtyLogError(
            f"QEMU {qmp.version} tells of no memory that its guest has: none of its memory backends "
            f"({', '.join(sizes) or 'there are none'}) is among its guest addresses"
        )
    hosts = {name: _host(qmp, name, parts) for name, parts in seen.items()}
    shown = {name: _whole_pages(parts) for name, parts in seen.items()}
    taken = [(part.address, part.address + part.end - part.begin) for parts in shown.values() for part in parts]
    after = -(-max(end for _, end in taken) // PAGE_SIZE) * PAGE_SIZE if taken else 0
    found: list[GuestRange] = []
    for name, parts in shown.items():
        for part in [*parts, *_hidden(parts, sizes[name])]:
            length, address = part.end - part.begin, part.address
            if part not in parts:
                if address < 0 or any(low < address + length and address < high for low, high in taken):
                    address, after = after, after + length
                taken.append((address, address + length))
                after = max(after, address + length)
            start = hosts[name] + part.begin
            found.append(GuestRange(start, start + length, address // PAGE_SIZE))
    return _joined(found)


def _told(qmp: Qmp, line: str) -> str:
    """What the monitor for people says to a line."""
    return str(qmp.execute("human-monitor-command", {"command-line": line}))


def _ranges(text: str) -> list[tuple[int, int, str, int]]:
    """First and last address of the ranges of RAM that a CPU sees, their name, and from where in that on."""
    for view in text.split("FlatView #"):
        if re.search(r'^ AS "memory"', view, re.MULTILINE):
            lines = filter(None, map(_RANGE.fullmatch, view.splitlines()))
            return [(int(line[1], 16), int(line[2], 16), line[3], int(line[4] or "0", 16)) for line in lines]
    return []


def _host(qmp: Qmp, name: str, parts: Sequence[_Part]) -> int:
    """Where a block begins in QEMU's address space; asked of each part, for parts of one block lie in one piece."""
    places = set()
    for part in parts:
        said = _told(qmp, f"gpa2hva {part.address:#x}")
        answer = _HOST.match(said)
        if answer is None or answer[1].rpartition("/")[2] != name:
            raise DirtyLogError(
                f"QEMU does not say where the memory at guest address {part.address:#x} is: {said.strip()[:200]!r}"
            )
        places.add(int(answer[2], 16) - part.begin)
    if len(places) != 1 or next(iter(places)) % PAGE_SIZE:
        raise DirtyLogError(f"QEMU says of its memory {name!r} that it begins at {sorted(map(hex, places))}")
    return places.pop()


def _whole_pages(parts: Sequence[_Part]) -> list[_Part]:
    """Leave out what is no whole page, or is seen a second time at another address."""
    whole: list[_Part] = []
    for part in sorted(parts, key=lambda part: (part.address, part.begin)):
        cut = -part.begin % PAGE_SIZE
        begin, end = part.begin + cut, part.end // PAGE_SIZE * PAGE_SIZE
        fits = (part.address - part.begin) % PAGE_SIZE == 0 and begin < end
        if fits and not any(begin < other.end and other.begin < end for other in whole):
            whole.append(_Part(begin, end, part.address + cut))
    return sorted(whole, key=lambda part: part.begin)


def _hidden(parts: Sequence[_Part], size: int) -> list[_Part]:
    """What of a block the guest does not see now: at the addresses that follow what is before it, or precede all."""
    edges = [_Part(0, 0, parts[0].shift if parts else 0), *parts, _Part(size, size, 0)]
    return [
        _Part(before.end, after.begin, before.end + before.shift)
        for before, after in pairwise(edges)
        if before.end < after.begin
    ]


def _joined(ranges: list[GuestRange]) -> list[GuestRange]:
    """Join ranges that go on where others end, at both places."""
    joined: list[GuestRange] = []
    for each in sorted(ranges, key=lambda each: each.first_page):
        last = joined[-1] if joined else None
        if (
            last
            and last.end == each.start
            and last.first_page + (last.end - last.start) // PAGE_SIZE == each.first_page
        ):
            joined[-1] = GuestRange(last.start, each.end, last.first_page)
        else:
            joined.append(each)
    return joined
