"""From pages to what people hold: the rows of an array, and byte ranges."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dirtylog._bits.copying import copy_extents
from dirtylog._bits.flat import array_of, flat_array

if TYPE_CHECKING:
    from dirtylog._bits.pages import DirtyPages

__all__ = ["byte_runs", "check_size", "copy", "of_one_layout", "row_ranges"]


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
    read, written = of_one_layout(source, target, "source", "target")
    check_size(pages, read.nbytes, "source")
    if not written.flags.writeable:
        raise ValueError("target is read-only; pass writable memory")
    if np.may_share_memory(read, written):
        raise ValueError("source and target overlap in memory; pass a target of its own")
    return copy_extents(read, written, byte_runs(pages, read.nbytes))


def of_one_layout(
    one: Any, other: Any, one_is: str, other_is: str
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """Return the bytes of two memories of one size; arrays of one shape must be in one order too."""
    first, second = array_of(one, one_is), array_of(other, other_is)
    flat = flat_array(first, what=one_is, empty=True), flat_array(second, what=other_is, empty=True)
    if first.nbytes != second.nbytes:
        raise ValueError(f"{one_is} has {first.nbytes} bytes and {other_is} {second.nbytes}; both must be one size")
    strides = [
        [step for step, size in zip(array.strides, array.shape, strict=True) if size > 1] for array in (first, second)
    ]
    if first.nbytes and (first.shape, first.itemsize) == (second.shape, second.itemsize) and strides[0] != strides[1]:
        raise ValueError(
            f"{one_is} and {other_is} have one shape {first.shape} and different orders (strides {first.strides} and "
            f"{second.strides}): a page of one is not the same items of the other; make one by numpy.empty_like() of "
            "the other"
        )
    order = [array.dtype.newbyteorder("=") == array.dtype for array in (first, second)]
    if first.dtype.newbyteorder("=") == second.dtype.newbyteorder("=") and order[0] != order[1]:
        raise ValueError(
            f"{one_is} and {other_is} have items of one kind in different byte orders ({first.dtype.str} and "
            f"{second.dtype.str}): the bytes of one are not the numbers of the other; make one by numpy.empty_like() "
            "of the other"
        )
    return flat


def row_ranges(pages: DirtyPages, array: Any) -> npt.NDArray[np.int64]:
    """Return first and last row plus one of each stretch of rows that has a byte in a dirty page, ascending."""
    array = array_of(array, "array")
    if array.ndim == 0:
        raise ValueError("array has no dimensions and so no rows; pass array.reshape(1), or use bool(pages)")
    check_size(pages, array.nbytes, "array")
    flat_array(array, what="array", empty=True)
    extents = byte_runs(pages, array.nbytes)
    nrows = len(array)
    if len(extents) == 0 or nrows == 1:
        return np.array([[0, 1]] if len(extents) else np.empty((0, 2)), np.int64)
    # Byte b is of row b // stride; where other axes are outside the first, of that modulo the number of rows: a run
    # of bytes may go round from the last row to the first, and round again.
    stride = array.strides[0]
    first = extents[:, 0] // stride
    end = (extents.sum(axis=1) - 1) // stride + 1
    if stride * nrows == array.nbytes:
        return _joined(first, end)
    if (end - first >= nrows).any():
        return np.array([[0, nrows]], np.int64)
    end -= first // nrows * nrows
    first %= nrows
    around = end > nrows
    first = np.append(first, np.zeros(int(around.sum()), np.int64))
    end = np.append(np.minimum(end, nrows), end[around] - nrows)
    order = np.argsort(first, kind="stable")
    return _joined(first[order], np.maximum.accumulate(end[order]))


def _joined(first: npt.NDArray[np.int64], end: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Join ascending ranges that overlap or touch."""
    if not len(first):
        return np.empty((0, 2), np.int64)
    begins = np.flatnonzero(np.append(True, first[1:] > end[:-1]))
    ends = np.append(begins[1:], len(first)) - 1
    return np.stack([first[begins], end[ends]], axis=1)
