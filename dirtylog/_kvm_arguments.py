"""Arguments that the model and the kernel's machines refuse for the same reasons, with the same errors."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, NoReturn

import numpy as np

from dirtylog._bits.pages import DirtyPages

if TYPE_CHECKING:
    import numpy.typing as npt

__all__ = ["check_dirty", "check_out"]


def check_out(slot: int, out: object, npages: int) -> npt.NDArray[np.uint64]:
    """Return the caller's buffer as words, before a bit is cleared (I5).

    Parameters
    ----------
    slot : int
        Memory slot id, for the message.
    out : object
        What was passed as ``out``.
    npages : int
        Pages of the slot.

    Returns
    -------
    ndarray of uint64, shape (ceil(npages / 64),)
        The buffer's own memory.

    Raises
    ------
    OSError
        EFAULT: no buffer, read-only, scattered, misaligned, or not that many uint64 in one dimension.
    """
    nwords = (npages + 63) // 64
    try:
        view = memoryview(out)  # type: ignore[arg-type]
    except TypeError:
        _fault(slot, f"a {type(out).__name__}, which has no buffer", nwords)
    wrong = None
    if view.readonly:
        wrong = "read-only"
    elif not view.c_contiguous:
        wrong = "not contiguous"
    elif view.itemsize != 8 or view.format not in ("L", "Q", "@L", "@Q", "=Q"):
        wrong = f"of items {view.format!r}, not uint64"
    elif view.shape != (nwords,):
        wrong = f"of shape {view.shape}"
    if wrong:
        _fault(slot, wrong, nwords)
    words = np.asarray(view)
    if not words.flags.aligned:
        _fault(slot, "misaligned", nwords)
    return words


def _fault(slot: int, wrong: str, nwords: int) -> NoReturn:
    why = f"slot {slot}: out is {wrong}; pass a writable, contiguous, aligned uint64 array of {nwords} words"
    raise OSError(errno.EFAULT, f"{why}: {os.strerror(errno.EFAULT)}")


def check_dirty(slot: int, dirty: object, npages: int, page_size: int) -> DirtyPages:
    """Return the pages to clear, before a bit is cleared.

    Parameters
    ----------
    slot : int
        Memory slot id, for the message.
    dirty : object
        What was passed as ``dirty``.
    npages, page_size : int
        Of the slot; the size in bytes.

    Raises
    ------
    TypeError
        No DirtyPages.
    ValueError
        About other pages than the slot's.
    """
    if not isinstance(dirty, DirtyPages):
        raise TypeError(f"dirty is a {type(dirty).__name__}; pass the DirtyPages that get_dirty_log() returned")
    if dirty.npages != npages or dirty.page_size != page_size:
        raise ValueError(
            f"slot {slot} has {npages} pages of {page_size} bytes, dirty is about {dirty.npages} of {dirty.page_size}"
        )
    return dirty
