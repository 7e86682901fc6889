"""What regions of a trace are called: each by its place, and where there is little room by less."""

from __future__ import annotations

import bisect
import re
from collections import Counter
from collections.abc import Iterable, Sequence

__all__ = ["placed_names", "short_names", "size_text", "without_address"]

# Regions of these names have nothing in common but that.
NAMELESS = ("", "anonymous")
_PLACED = re.compile(r"(.*?) at 0x([0-9a-f]+)(?:, page \d+)?", re.DOTALL)


def placed_names(places: Iterable[tuple[str, int, int, int]]) -> dict[str, tuple[int, int]]:
    """Name ranges of pages for a trace, none of which holds a page of another.

    Parameters
    ----------
    places : iterable of (str, int, int, int)
        Name, address in bytes, first page, and count. Where two have pages in common, the first one counts.

    Examples
    --------
    >>> placed_names([("heap", 0x5000, 0, 4), ("heap", 0x9000, 2, 4), ("heap", 0x9000, 4, 2)])
    {'heap at 0x5000': (0, 4), 'heap at 0x9000': (4, 2)}
    """
    taken: list[tuple[int, int]] = []
    named: dict[str, tuple[int, int]] = {}
    for name, address, first, npages in places:
        at = bisect.bisect(taken, (first, first))
        before = taken[at - 1][1] if at else 0
        if before <= first and (at == len(taken) or first + npages <= taken[at][0]):
            taken.insert(at, (first, first + npages))
            placed = f"{name} at {address:#x}"
            named[placed if placed not in named else f"{placed}, page {first}"] = first, npages
    return named


def without_address(name: str) -> str:
    """Return what a region is called, wherever it lies; what has no name of its own keeps its address."""
    found = _PLACED.fullmatch(name)
    return name if found is None or found[1] in NAMELESS else found[1]


def short_names(names: Sequence[str], sizes: Sequence[int], *, brief: bool = False) -> list[str]:
    """Shorten the names of regions, and keep them apart: by size in bytes what has no name, then by address."""
    longest = 17 if brief else 26
    parts = [_PLACED.fullmatch(name) for name in names]
    bases = []
    for name, size, part in zip(names, sizes, parts, strict=True):
        base = part[1] if part else name
        if part and base in NAMELESS:
            base = size_text(size) if brief else f"{base} {size_text(size)}"
        bases.append(base)
    often = Counter(bases)
    # An address ends in three zeros.
    tails = [f" …{part[2][-7:-3]}" if part and often[base] > 1 else "" for base, part in zip(bases, parts, strict=True)]
    short = [
        (base if len(base) + len(tail) <= longest else f"{base[: longest - len(tail) - 7]}…{base[-6:]}") + tail
        for base, tail in zip(bases, tails, strict=True)
    ]
    # What still has one name, of one size at one address after the other, is counted.
    seen: Counter[str] = Counter()
    for i, name in enumerate(short):
        seen[name] += 1
        if seen[name] > 1:
            short[i] = f"{name} ({seen[name]})"
    return short


def size_text(nbytes: float) -> str:
    """Write a number of bytes in the unit that suits it."""
    units = ["bytes", "KiB", "MiB", "GiB", "TiB"]
    while nbytes >= 1024 and len(units) > 1:
        nbytes /= 1024
        units.pop(0)
    return f"{nbytes:.3g} {units[0]}" if nbytes < 1000 else f"{nbytes:.0f} {units[0]}"
