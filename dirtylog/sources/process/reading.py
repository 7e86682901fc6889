"""Reads pages of processes that run, by their numbers: from each process what is its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from dirtylog._bits.pages import DirtyPages
from dirtylog.sources.process._remote import PAGE_SIZE, read_memory
from dirtylog.sources.process.stretches import Piece

__all__ = ["make_room", "read_pages"]


def make_room(pages: Any, npages: int, out: Any) -> npt.NDArray[np.uint8]:
    """Check what is asked for, and return where it goes: `out`, all zeros, or a new array.

    Raises
    ------
    TypeError, ValueError
        `pages` is something else, or of another page space than one of `npages`; or `out` is of another shape.
    """
    if not isinstance(pages, DirtyPages):
        raise TypeError(f"pages is {type(pages).__name__}; DirtyPages are needed")
    if (pages.npages, pages.page_size) != (npages, PAGE_SIZE):
        raise ValueError(
            f"pages has {pages.npages} pages of {pages.page_size} bytes; this process's page space has "
            f"{npages} of {PAGE_SIZE}"
        )
    shape = (pages.count, PAGE_SIZE)
    if out is None:
        out = np.zeros(shape, np.uint8)
    elif out.shape != shape or out.dtype != np.uint8 or not out.flags.c_contiguous:
        raise ValueError(f"out has shape {out.shape} and dtype {out.dtype}; C-contiguous uint8 of {shape} is needed")
    else:
        out[:] = 0
    return out  # type: ignore[no-any-return]


def read_pages(
    pieces: Sequence[Piece],
    pages: DirtyPages,
    out: npt.NDArray[np.uint8],
    ended: Callable[[int], None],
) -> None:
    """Read pages into an array of zeros, in the order of their numbers.

    Parameters
    ----------
    pieces : sequence of Piece
        Where the pages are.
    pages : DirtyPages
        Which.
    out : ndarray of uint8, shape (count, page_size)
        What is not mapped (any more) stays as it is.
    ended : callable
        Called with the process whose memory is gone; raises where that is an error.
    """
    runs = pages.runs()
    offsets = np.cumsum(runs[:, 1]) - runs[:, 1]
    extents: dict[int, list[npt.NDArray[np.int64]]] = {}
    for piece in pieces:
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
        except ProcessLookupError:
            ended(pid)
