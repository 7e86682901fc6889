"""From pages to what people hold: the rows of an array, and byte ranges."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dirtylog._bits.copying import copy_extents
from dirtylog._bits.flat import flat_array

if TYPE_CHECKING:
    from dirtylog._bits.pages import DirtyPages

__all__ = ["byte_runs", "copy", "row_ranges"]


def check_size(pages: DirtyPages, nbytes: int, what: str) -> None:
    """Refuse memory that these pages cannot be of (I9)."""
    npages = -(-nbytes // pages.page_size)
    if npages != pages.npages:
        raise ValueError(
            f"{what} has {nbytes} bytes, which are {npages} pages of {pages.page_size}; these are pages of a memory "
            f"of {pages.npages}"
        )


def byte_runs(pages: DirtyPages, nbytes: int) -> npt.NDArray[np.int64]:
    """Return offset and length of each run, the last one cut at the end of the memory."""
    extents = pages.runs() * np.int64(pages.page_size)
    if len(extents):
        past = int(extents[-1].sum()) - nbytes
        extents[-1, 1] -= max(past, 0)
    return extents


def copy(pages: DirtyPages, source: Any, target: Any) -> int:
    """Copy what is dirty from one memory to the same place in another; return the bytes copied."""
    read, written = flat_array(source, what="source"), flat_array(target, what="target")
    if read.nbytes != written.nbytes:
        raise ValueError(f"source has {read.nbytes} bytes and target {written.nbytes}; both must be one size")
    check_size(pages, read.nbytes, "source")
    if not written.flags.writeable:
        raise ValueError("target is read-only; pass writable memory")
    if np.may_share_memory(read, written):
        raise ValueError("source and target overlap in memory; pass a target of its own")
    return copy_extents(read, written, byte_runs(pages, read.nbytes))


def row_ranges(pages: DirtyPages, array: Any) -> npt.NDArray[np.int64]:
    """Return first and last row plus one of each stretch of rows that has a byte in a dirty page, ascending."""
    if not isinstance(array, np.ndarray):
        raise TypeError(f"array is {type(array).__name__}; rows are those of a NumPy array")
    if array.ndim == 0:
        raise ValueError("array has no dimensions and so no rows; use pages or byte_runs")
    check_size(pages, array.nbytes, "array")
    if array.nbytes == 0:
        return np.empty((0, 2), np.int64)
    flat_array(array, what="array")
    extents = byte_runs(pages, array.nbytes)
    nrows = len(array)
    if array.flags.c_contiguous:
        size = array.nbytes // nrows
        first, end = extents[:, 0] // size, -(-extents.sum(axis=1) // size)
        return _joined(first, end)
    # Fortran order: the first index runs fastest, so that a run of bytes goes round and round through the rows.
    first, end = extents[:, 0] // array.itemsize, -(-extents.sum(axis=1) // array.itemsize)
    length = np.minimum(end - first, nrows)
    first = first % nrows
    end = first + length
    touched = np.zeros(nrows + 1, np.int64)
    np.add.at(touched, first, 1)
    np.add.at(touched, np.minimum(end, nrows), -1)
    around = end[end > nrows] - nrows
    touched[0] += len(around)
    np.add.at(touched, around, -1)
    steps = np.flatnonzero(np.diff((np.cumsum(touched[:-1]) > 0).astype(np.int8), prepend=0, append=0))
    return steps.reshape(-1, 2)


def _joined(first: npt.NDArray[np.int64], end: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Join ascending ranges that overlap or touch."""
    if not len(first):
        return np.empty((0, 2), np.int64)
    begins = np.flatnonzero(np.append(True, first[1:] > end[:-1]))
    ends = np.append(begins[1:], len(first)) - 1
    return np.stack([first[begins], end[ends]], axis=1)
