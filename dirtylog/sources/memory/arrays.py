"""Arrays that own whole pages: nothing else is reported for them, and huge pages are advised."""

from __future__ import annotations

import contextlib
import math
import mmap
import operator
from collections.abc import Sequence
from typing import Any, SupportsIndex

import numpy as np
from numpy.typing import DTypeLike

__all__ = ["empty", "zeros"]

HUGE_PAGE = 2 << 20


def _shape(shape: SupportsIndex | Sequence[SupportsIndex]) -> tuple[int, ...]:
    try:
        sizes: tuple[int, ...] = (operator.index(shape),)  # type: ignore[arg-type]
    except TypeError:
        sizes = tuple(map(operator.index, shape))  # type: ignore[arg-type]
    if any(size < 0 for size in sizes):
        raise ValueError(f"negative dimensions are not allowed, and the shape is {sizes}")
    return sizes


def shape_and_dtype(
    shape: SupportsIndex | Sequence[SupportsIndex], dtype: DTypeLike
) -> tuple[tuple[int, ...], np.dtype[Any], int]:
    """Return the shape, the dtype and the bytes of an array of ours; ValueError where there can be none."""
    sizes = _shape(shape)
    kind = np.dtype(dtype)
    if kind.hasobject:
        raise ValueError(f"dtype {kind} holds Python objects, which mean nothing as bytes; use numpy.empty for them")
    return sizes, kind, math.prod(sizes) * kind.itemsize


def empty(shape: SupportsIndex | Sequence[SupportsIndex], dtype: DTypeLike = float) -> np.ndarray[Any, Any]:
    """Make an array whose memory starts on a page of its own.

    Parameters
    ----------
    shape : int or sequence of int
        As for `numpy.empty`.
    dtype : dtype, default float
        Any but those that hold Python objects.

    Returns
    -------
    ndarray
        C-contiguous. Its pages are private to this process and read as zero
        until written. The memory goes when the last view of it goes.

    Raises
    ------
    ValueError
        A negative size, or a dtype that holds objects.
    MemoryError
        The system refused.

    Notes
    -----
    From 2 MiB on the memory starts on a 2 MiB boundary and huge pages are
    advised. The system hands a huge page out at the first write to it, and only
    while the memory is not tracked by userfaultfd: fill an array before tracking
    it, and its huge pages are kept until they are written again.

    Examples
    --------
    >>> import dirtylog as dl
    >>> a = dl.empty((1024, 1024))
    >>> a.ctypes.data % 4096, a.flags.c_contiguous
    (0, True)
    """
    sizes, kind, nbytes = shape_and_dtype(shape, dtype)
    if nbytes == 0:
        return np.empty(sizes, kind)
    huge = nbytes >= HUGE_PAGE and hasattr(mmap, "MADV_HUGEPAGE")
    # Room to start on a huge page's boundary wherever the mapping lands; what is skipped is never touched.
    room = nbytes + (HUGE_PAGE if huge else 0)
    try:
        memory = _private(room)
    except (OSError, OverflowError) as error:
        raise MemoryError(f"no room for an array of shape {sizes} and dtype {kind}: {nbytes} bytes") from error
    start = np.frombuffer(memory, np.uint8, 1).ctypes.data
    offset = -start % HUGE_PAGE if huge else 0
    if huge:
        # Advice: a kernel built without transparent huge pages answers EINVAL.
        with contextlib.suppress(OSError):
            memory.madvise(mmap.MADV_HUGEPAGE)
    return np.ndarray(sizes, kind, buffer=memory, offset=offset)


def zeros(shape: SupportsIndex | Sequence[SupportsIndex], dtype: DTypeLike = float) -> np.ndarray[Any, Any]:
    """Make an array of zeros whose memory starts on a page of its own.

    Parameters and Notes are those of `dirtylog.empty`, whose memory is zero
    already: nothing is touched until it is written.

    Examples
    --------
    >>> import dirtylog as dl
    >>> dl.zeros(3, "int32")
    array([0, 0, 0], dtype=int32)
    """
    # A fresh mapping is zero, and so is every numpy dtype made of zero bytes.
    return empty(shape, dtype)


def _private(nbytes: int) -> mmap.mmap:
    if hasattr(mmap, "MAP_PRIVATE"):
        return mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return mmap.mmap(-1, nbytes)
