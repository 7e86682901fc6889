"""The mappings of a process: read from its maps file, named for what they are, chosen."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from operator import index
from pathlib import Path

from dirtylog.errors import DirtyLogError

__all__ = ["Area", "Region", "Select", "choose", "guest_areas", "mappings", "parsed", "places_of"]

LARGE = 1 << 20
THREAD_STACK = "[thread stack]"
# The most that lies unmapped or unreadable below a stack, for it to be one.
_MOST_GUARD = 64 << 10
# What the kernel maps for itself, and what cannot be watched.
_SPECIAL = frozenset({"[vdso]", "[vvar]", "[vvar_vclock]", "[vsyscall]", "[uprobes]"})
_GUEST_NAMES = ("/memfd:memory-backend", "/memfd:guest_mem", "/memfd:ch_ram", "/memfd:pc.ram", "/memfd:ram")


@dataclass(frozen=True, slots=True)
class Area:
    """Adjacent mappings of one kind in a process's address space.

    Attributes
    ----------
    start, end : int
        Addresses, in bytes.
    writable, shared : bool
        As mapped now.
    name : str
        What the kernel calls it: a path, ``[heap]``, ``[anon:...]`` or nothing;
        or ``[thread stack]``.
    """

    start: int
    end: int
    writable: bool
    shared: bool
    name: str

    @property
    def kind(self) -> str:
        """What it is: ``"heap"``, ``"stack"``, ``"anonymous"``, ``"file"`` (a private mapping) or ``"shared"``."""
        if self.shared:
            return "shared"
        if self.name in ("[heap]", "[stack]"):
            return self.name[1:-1]
        if self.name == THREAD_STACK:
            return "stack"
        return "file" if self.name.startswith("/") else "anonymous"


@dataclass(frozen=True, slots=True)
class Region:
    """A stretch of a process's memory, and where its pages are numbered.

    Attributes
    ----------
    start, end : int
        Addresses in the process, in bytes.
    first_page, npages : int
        Pages of the source.
    kind : str
        ``"heap"``, ``"stack"``, ``"anonymous"``, ``"file"`` (private mapping of
        a file) or ``"shared"``.
    name : str
        The path, ``[heap]``, ``[anon:...]``, or an empty string.
    pid : int
        The process: the one that was attached to, or a child of it.
    """

    start: int
    end: int
    first_page: int
    npages: int
    kind: str
    name: str
    pid: int = 0


def mappings(pid: int) -> list[Area]:
    """Read the mappings of a process, adjacent ones of one kind joined, stacks of threads told apart.

    Registering and protecting split mappings that are one to the program, so
    lines that differ in nothing that is kept here are one area.

    Raises
    ------
    OSError
        There is no such process, or it may not be looked at.

    References
    ----------
    ``proc_pid_maps(5)``.
    """
    return parsed(pid, Path(f"/proc/{pid}/maps").read_bytes())


def parsed(pid: int, text: bytes) -> list[Area]:
    """Return the mappings that a process's maps file says, as :func:`mappings` does."""
    found: list[Area] = []
    guarded = 0  # where a guard of a few pages has just ended
    stack_bytes: int | None = None
    for line in text.decode("utf-8", "surrogateescape").split("\n")[:-1]:
        span, permissions, _, _, _, *name = line.split(maxsplit=5)
        start, _, end = span.partition("-")
        path = name[0] if name else ""
        if path in _SPECIAL:
            continue
        area = Area(int(start, 16), int(end, 16), permissions[1] == "w", permissions[3] == "s", path)
        if guarded == area.start and permissions == "rw-p" and not path and area.end - area.start >= LARGE:
            stack_bytes = stack_bytes or _stack_bytes(pid)
            if area.end - area.start == stack_bytes:
                area = Area(area.start, area.end, True, False, THREAD_STACK)
        guarded = area.end if permissions == "---p" and area.end - area.start <= _MOST_GUARD else 0
        last = found[-1] if found else None
        if last and last.end == area.start and _alike(last, area):
            found[-1] = Area(last.start, area.end, area.writable, area.shared, area.name)
        else:
            found.append(area)
    return found


def _stack_bytes(pid: int) -> int:
    """The size that glibc gives a thread's stack by default: the soft limit, or 2 MiB where there is none."""
    try:
        lines = Path(f"/proc/{pid}/limits").read_text(encoding="ascii").splitlines()
    except OSError:
        return -1
    words = next((line.split() for line in lines if line.startswith("Max stack size")), [])
    return int(words[3]) if len(words) > 3 and words[3].isdigit() else 2 << 20


def _alike(a: Area, b: Area) -> bool:
    return (a.writable, a.shared, a.name) == (b.writable, b.shared, b.name)


# Which memory of a process: by a word, by a function of an area, or by addresses and the page numbers they get.
Select = str | Callable[[Area], bool] | Sequence[tuple[int, int, int]]


def places_of(select: Select) -> list[tuple[int, int, int]]:
    """Return the places of a selection by addresses, ascending; none of another.

    Raises
    ------
    ValueError
        A place is empty or not whole pages, or two have addresses or page numbers in common.
    TypeError
        They are not triples of numbers.
    """
    if isinstance(select, str) or callable(select):
        return []
    size = os.sysconf("SC_PAGESIZE")
    places = sorted((index(start), index(end), index(first)) for start, end, first in select)
    if not places:
        raise ValueError("select is an empty sequence of places; there is nothing to watch")
    for start, end, first in places:
        if not 0 <= start < end or start % size or end % size or first < 0:
            raise ValueError(
                f"place ({start:#x}, {end:#x}, {first}) is not one or more whole pages of {size} bytes, with a number "
                "of 0 or more"
            )
    numbers = sorted((first, first + (end - start) // size) for start, end, first in places)
    for spans in ([place[:2] for place in places], numbers):
        for (low, high), (after, _) in pairwise(spans):
            if after < high:
                raise ValueError(f"two places of select overlap, at {max(low, after):#x}: each page has one number")
    return places


def _at_places(pid: int, places: list[tuple[int, int, int]]) -> Callable[[list[Area]], list[Area]]:
    """Pick what holds places, all of which must be there: the addresses of another process would find nothing."""

    def pick(areas: list[Area]) -> list[Area]:
        return [
            area
            for area in areas
            if area.writable and any(start < area.end and area.start < end for start, end, _ in places)
        ]

    there = [(area.start, area.end) for area in pick(mappings(pid))]
    for start, end, _ in places:
        for low, high in subtract((start, end), there):
            raise DirtyLogError(
                f"process {pid} has no writable memory from {low:#x} to {high:#x}, which select names; are these the "
                "addresses of another process?"
            )
    return pick


def choose(pid: int, select: Select) -> Callable[[list[Area]], list[Area]]:
    """Return the function that picks the areas to watch out of a process's mappings.

    Parameters
    ----------
    pid : int
        The process.
    select : {"large", "all", "guest"}, callable, or sequence of (int, int, int)
        ``"large"``: writable memory of at least 1 MiB but the stacks;
        ``"all"``: every writable mapping; ``"guest"``: a virtual machine's RAM;
        a function of an area that says whether to watch it; or places: start and end,
        addresses in bytes, and the number of the first page.

    Raises
    ------
    ValueError
        No such selection.
    DirtyLogError
        ``"guest"``, and there is nothing that looks like one; or a place is not there.
    """
    if places := places_of(select):
        return _at_places(pid, places)
    if callable(select):
        return lambda areas: [area for area in areas if area.writable and select(area)]
    if select == "large":
        return lambda areas: [
            area for area in areas if area.writable and area.end - area.start >= LARGE and area.kind != "stack"
        ]
    if select == "all":
        return lambda areas: [area for area in areas if area.writable]
    if select == "guest":
        guest = guest_areas(pid, mappings(pid))
        if not guest:
            raise DirtyLogError(
                f"process {pid} has no mapping that looks like a guest's RAM (a memory backend by name, or one "
                "of the size that -m says); pass select=function, which is shown each area"
            )
        spans = {(area.start, area.end) for area in guest}
        return lambda areas: [
            area
            for area in areas
            if area.writable
            and any(start <= area.start < end or area.start <= start < area.end for start, end in spans)
        ]
    raise ValueError(f"select is {select!r}; choose 'large', 'all', 'guest', a function of an area, or places")


def guest_areas(pid: int, areas: list[Area]) -> list[Area]:
    """Pick what looks like the RAM of a virtual machine: memory backends by name, else what has the size of ``-m``."""
    named = [area for area in areas if area.writable and area.name.startswith(_GUEST_NAMES)]
    if named:
        return named
    size = _ram_size(pid)
    if not size:
        return []
    return [area for area in areas if area.writable and area.kind != "stack" and _holds(area, size)]


def _holds(area: Area, size: int) -> bool:
    """Whether an area is a RAM block of that size; QEMU aligns blocks to huge pages and may map neighbours."""
    return size <= area.end - area.start < size + (4 << 20)


def _ram_size(pid: int) -> int:
    """The bytes that ``-m`` of a VMM's command line says; 0 where it says nothing."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return 0
    if "qemu" not in os.path.basename(words[0]) and not any("qemu" in word for word in words[:1]):
        return 0
    text = words[words.index("-m") + 1] if "-m" in words[:-1] else "128M"
    found = re.match(r"(?:size=)?(\d+)([kKmMgGtT]?)", text)
    if not found:
        return 0
    return int(found[1]) << {"": 20, "k": 10, "m": 20, "g": 30, "t": 40}[found[2].lower()]


def subtract(area: tuple[int, int], taken: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Yield the parts of a range that none of some ascending, disjoint ranges covers."""
    start, end = area
    for first, last in taken:
        if last <= start:
            continue
        if first >= end:
            break
        if first > start:
            yield start, first
        start = max(start, last)
    if start < end:
        yield start, end
