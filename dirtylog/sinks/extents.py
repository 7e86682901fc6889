"""Dirty pages as byte extents, and the windows in which a sink works through them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dirtylog._bits.pages import DirtyPages

if TYPE_CHECKING:
    from dirtylog._typing import Memory

__all__ = ["WINDOW", "PackedExtents", "flat_bytes"]

# What a sink gathers, digests and writes at once, in bytes: small enough to stay in a core's own cache, large
# enough that a system call and a digest cost nothing beside it. Part of the snapshot format (one digest a window).
WINDOW = 1 << 20


def flat_bytes(memory: Memory, *, writable: bool = False, what: str = "memory") -> memoryview:
    """Return memory as a flat view of bytes.

    Raises
    ------
    TypeError
        It is not a buffer.
    ValueError
        It is not C-contiguous, empty, or read-only where it is to be written.
    """
    buffer: Any = memory  # an array is one, whatever a type checker sees on Python 3.11
    try:
        view = memoryview(buffer)
    except TypeError:
        raise TypeError(f"{what} is {type(memory).__name__}; a buffer is needed") from None
    if not view.c_contiguous:
        raise ValueError(f"{what} is not C-contiguous; pass numpy.ascontiguousarray() of it, or a contiguous part")
    if writable and view.readonly:
        raise ValueError(f"{what} is read-only; pass writable memory")
    if view.nbytes == 0:
        raise ValueError(f"{what} is empty; at least one byte is needed")
    # By way of numpy: memoryview.cast() refuses structured items.
    flat: Any = np.frombuffer(buffer, np.uint8)
    return memoryview(flat)


class PackedExtents:
    """The bytes of some pages, seen as one packed stream cut into windows.

    Parameters
    ----------
    pages : DirtyPages
        Which pages.
    nbytes : int
        Size of the memory in bytes; the last page may reach past it and is cut.

    Notes
    -----
    O(runs) to make, O(log runs + runs in the window) a window. Immutable: safe in any number of threads.
    """

    def __init__(self, pages: DirtyPages, nbytes: int) -> None:
        # I9: page i is bytes [i * page_size, (i + 1) * page_size) of the memory.
        extents = pages.runs() * np.int64(pages.page_size)
        if len(extents):
            past = int(extents[-1].sum()) - nbytes
            extents[-1, 1] -= max(past, 0)
        self.extents: npt.NDArray[np.int64] = extents
        self.ends: npt.NDArray[np.int64] = np.cumsum(extents[:, 1])
        self.total: int = int(self.ends[-1]) if len(extents) else 0

    def window(self, begin: int, end: int) -> npt.NDArray[np.int64]:
        """Return the extents of bytes `begin` to `end` of the packed stream, cut where the window cuts them."""
        first = int(np.searchsorted(self.ends, begin, side="right"))
        last = int(np.searchsorted(self.ends, end, side="left"))
        part = self.extents[first : last + 1].copy()
        if len(part):
            part[-1, 1] -= int(self.ends[first + len(part) - 1]) - min(end, self.total)
            skipped = begin - (int(self.ends[first]) - int(self.extents[first, 1]))
            part[0] += (skipped, -skipped)
        return part

    def windows(self, size: int = WINDOW) -> Iterator[tuple[int, int, npt.NDArray[np.int64]]]:
        """Go through the stream: ``(begin, end, extents)`` for each window of `size` bytes, the last one shorter."""
        for begin in range(0, self.total, size):
            end = min(begin + size, self.total)
            yield begin, end, self.window(begin, end)
