# cython: language_level=3, freethreading_compatible=True
"""A Cython extension of another package that marks and harvests through dirtylog.capi."""

from libc.stdint cimport int64_t, uint64_t

from dirtylog cimport capi


def mark_many(pages, uint64_t first, uint64_t count):
    """Mark page by page without the GIL; returns how many were refused."""
    cdef const capi.dirtylog_bitmap *log = capi.bitmap(pages)
    cdef uint64_t page
    cdef uint64_t refused = 0
    with nogil:
        for page in range(first, first + count):
            refused += capi.mark(log, page) != 0
    return refused


def harvest(pages, uint64_t[::1] out, bint quiescent):
    """Harvest into `out` without the GIL."""
    cdef const capi.dirtylog_bitmap *log = capi.bitmap(pages)
    cdef uint64_t count
    with nogil:
        count = capi.harvest_quiescent(log, &out[0]) if quiescent else capi.harvest(log, &out[0])
    return count


def harvest_pages(pages, int64_t[::1] out, size_t room):
    """Harvest page numbers into `out` without the GIL."""
    cdef const capi.dirtylog_bitmap *log = capi.bitmap(pages)
    cdef size_t count
    with nogil:
        count = capi.harvest_pages(log, &out[0], room)
    return count


def count(pages):
    """Count without the GIL."""
    cdef const capi.dirtylog_bitmap *log = capi.bitmap(pages)
    cdef uint64_t count
    with nogil:
        count = capi.count(log)
    return count
