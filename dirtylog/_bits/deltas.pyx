# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
# cython: auto_pickle=False, autotestdict=False, freethreading_compatible=True, embedsignature=True
"""Finds what changed inside pages since they were last sent, and lays it over a copy, without the GIL.

The format of a delta is in ``deltas.h``. What is laid comes from others: all of it is checked before the first byte is
written.
"""

import numpy as np

from libc.stdint cimport int64_t

from dirtylog._bits.copying cimport HeldBuffer, check_packed, check_plain, extents_pointer, hold

__all__ = ["DELTA", "WHOLE", "ZERO", "extents_of", "lay_deltas", "sort_pages"]


cdef extern from "_bits/deltas.h" nogil:
    enum:
        DL_PAGE_ZERO
        DL_PAGE_WHOLE
        DL_PAGE_DELTA
    cdef struct dl_copies:
        unsigned char *data
        int64_t *pages
        const int64_t *frames
        int64_t places
        size_t page_size
    size_t dl_sort_pages(const unsigned char *window, size_t nbytes, const int64_t *numbers, dl_copies *copies,
                         int64_t older, size_t most, unsigned char *kinds, unsigned char *out)
    int dl_check_delta(const unsigned char *data, size_t length, size_t *at, size_t nbytes)
    void dl_lay_delta(const unsigned char *data, size_t length, size_t *at, unsigned char *page, size_t nbytes)


ZERO = DL_PAGE_ZERO
WHOLE = DL_PAGE_WHOLE
DELTA = DL_PAGE_DELTA


cdef Py_ssize_t number_pages(const int64_t *extents, Py_ssize_t n, int64_t page_size, int64_t *numbers,
                             Py_ssize_t room) noexcept nogil:
    """Write the numbers of the pages of some extents; how many there are, or -1: more than there is room for."""
    cdef Py_ssize_t count = 0
    cdef Py_ssize_t i
    cdef int64_t first, end
    for i in range(n):
        first = extents[2 * i] // page_size
        end = (extents[2 * i] + extents[2 * i + 1] + page_size - 1) // page_size
        if end - first > room - count:
            return -1
        while first < end:
            numbers[count] = first
            count += 1
            first += 1
    return count


def sort_pages(window, const int64_t[:, ::1] extents, copies, int64_t[::1] held, const int64_t[::1] frames,
               Py_ssize_t page_size, *, int64_t older, out) -> tuple:
    """Say of each page of a window whether it is zero, has changed a little, or goes whole; and what changed.

    Parameters
    ----------
    window : buffer
        Pages one after the other; the last one may be cut.
    extents : int64 array of shape (n, 2)
        Where they lie in the memory: offset and length in bytes, ascending, of whole pages.
    copies : buffer
        What was last sent, of as many pages as `held` has places: page ``g`` at place ``g % len(held)``.
    held : int64 array
        Which page each place holds, or -1.
    frames : int64 array
        In which frame the page of each place went last.
    page_size : int
        In bytes, below 2**28.
    older : int
        Pages that have no place take theirs if it is empty, or if what it holds went before this frame; with -1 none.
    out : buffer
        At least as large as `window`; its first bytes are the deltas afterwards.

    Returns
    -------
    numbers : int64 array
        The number of each page, from 0.
    kinds : uint8 array
        `ZERO`, `WHOLE` or `DELTA` for each page.
    used : int
        Bytes of `out`: at most three quarters of the pages' that are deltas.

    Notes
    -----
    Without the GIL, O(bytes). `copies` is what the other end has once it has been sent all of this.
    """
    cdef HeldBuffer read = hold(window, False, "window")
    cdef HeldBuffer kept = hold(copies, True, "copies")
    cdef HeldBuffer written = hold(out, True, "out")
    cdef const int64_t *rows = extents_pointer(extents)
    if not 0 < page_size < 1 << 28:
        raise ValueError(f"page_size is {page_size}; it must be 1 to {(1 << 28) - 1}")
    check_plain(rows, extents.shape[0], <int64_t>1 << 62, "memory")
    check_packed(rows, extents.shape[0], read.raw.len)
    cdef Py_ssize_t n = (read.raw.len + page_size - 1) // page_size
    numbers = np.empty(n, np.int64)
    cdef int64_t[::1] numbers_view = numbers
    if n and number_pages(rows, extents.shape[0], page_size, &numbers_view[0], n) != n:
        raise ValueError(f"the extents of {read.raw.len} bytes are not of whole pages of {page_size} bytes")
    cdef Py_ssize_t places = held.shape[0]
    if kept.raw.len < places * page_size or frames.shape[0] < places or written.raw.len < read.raw.len:
        raise ValueError(f"copies has {kept.raw.len} bytes, frames {frames.shape[0]}, out {written.raw.len}: too few")
    kinds = np.empty(n, np.uint8)
    cdef unsigned char[::1] kinds_view = kinds
    cdef dl_copies last
    last.data = <unsigned char *>kept.start()
    last.pages = &held[0] if held.shape[0] else NULL
    last.frames = &frames[0] if held.shape[0] else NULL
    last.places = held.shape[0]
    last.page_size = <size_t>page_size
    cdef const unsigned char *pages = <const unsigned char *>read.start()
    cdef unsigned char *changes = <unsigned char *>written.start()
    cdef size_t used = 0
    if n:
        with nogil:
            used = dl_sort_pages(pages, <size_t>read.raw.len, &numbers_view[0], &last, older,
                                 <size_t>(page_size - page_size // 4), &kinds_view[0], changes)
    return numbers, kinds, used


def extents_of(const int64_t[::1] numbers, const unsigned char[::1] kinds, int kind, int64_t page_size,
               int64_t end) -> np.ndarray:
    """Return the pages of one kind as extents, neighbours joined, nothing past `end`.

    Parameters
    ----------
    numbers : int64 array
        Ascending.
    kinds : uint8 array
        One for each.
    kind : int
        Which.
    page_size, end : int
        In bytes.

    Returns
    -------
    int64 array of shape (n, 2)
        Offset and length in bytes.
    """
    cdef Py_ssize_t n = numbers.shape[0]
    if kinds.shape[0] != n:
        raise ValueError(f"there are {kinds.shape[0]} kinds for {n} pages")
    found = np.empty((n, 2), np.int64)
    cdef int64_t[:, ::1] rows = found
    cdef Py_ssize_t count = 0
    cdef Py_ssize_t i
    for i in range(n):
        if kinds[i] != kind:
            continue
        if count and rows[count - 1, 0] + rows[count - 1, 1] == numbers[i] * page_size:
            rows[count - 1, 1] += page_size
        else:
            rows[count, 0] = numbers[i] * page_size
            rows[count, 1] = page_size
            count += 1
    if count and rows[count - 1, 0] + rows[count - 1, 1] > end:
        rows[count - 1, 1] = end - rows[count - 1, 0]
    return found[:count]


cdef int walk(const unsigned char *data, size_t length, unsigned char *memory, const int64_t *extents, Py_ssize_t n,
              int64_t page_size, bint lay) noexcept nogil:
    """Go through the pages of some extents; whether their deltas are what `data` is. With `lay` it is known to be."""
    cdef size_t at = 0
    cdef Py_ssize_t i
    cdef int64_t done, part
    for i in range(n):
        done = 0
        while done < extents[2 * i + 1]:
            part = min(page_size, extents[2 * i + 1] - done)
            if lay:
                dl_lay_delta(data, length, &at, memory + extents[2 * i] + done, <size_t>part)
            elif not dl_check_delta(data, length, &at, <size_t>part):
                return 0
            done += part
    return at == length


def lay_deltas(data, const int64_t[:, ::1] extents, Py_ssize_t page_size, target) -> None:
    """Lay deltas over pages of a plain buffer, one after the other.

    Parameters
    ----------
    data : buffer
        The deltas, and nothing else.
    extents : int64 array of shape (n, 2)
        Offset and length in bytes of the pages; the last page of each may be cut.
    page_size : int
        In bytes.
    target : buffer
        Writable.

    Raises
    ------
    ValueError
        `data` is not the deltas of these pages; nothing has been written.
    IndexError
        An extent reaches past `target`; nothing has been written.

    Notes
    -----
    Without the GIL, O(bytes of `data` + pages).
    """
    cdef HeldBuffer read = hold(data, False, "data")
    cdef HeldBuffer written = hold(target, True, "target")
    cdef const int64_t *rows = extents_pointer(extents)
    cdef Py_ssize_t n = extents.shape[0]
    if page_size < 1:
        raise ValueError(f"page_size is {page_size}; it must be 1 or more")
    check_plain(rows, n, written.raw.len, "target")
    cdef const unsigned char *start = <const unsigned char *>read.start()
    cdef unsigned char *memory = <unsigned char *>written.start()
    cdef bint sound
    with nogil:
        sound = walk(start, <size_t>read.raw.len, memory, rows, n, page_size, False)
        if sound:
            walk(start, <size_t>read.raw.len, memory, rows, n, page_size, True)
    if not sound:
        raise ValueError(f"the {read.raw.len} bytes are not the deltas of these pages")
