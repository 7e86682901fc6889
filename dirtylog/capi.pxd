# dirtylog for Cython extensions: functions on an opaque bitmap.
#
#     from dirtylog cimport capi
#     cdef const capi.dirtylog_bitmap *log = capi.bitmap(obj)      # with the GIL; valid while obj lives
#     with nogil: capi.mark(log, page)
#
# Compile with include_dirs=[dirtylog.get_include()]; where dirtylog is installed with -e, Cython also needs the
# directory that has the package in it, by include_path= of cythonize. What is declared here is only ever added to.
from libc.stdint cimport int64_t, uint64_t


cdef extern from "dirtylog/capi.h" nogil:
    ctypedef struct dirtylog_bitmap:
        pass

# TypeError unless it is a dirtylog.DirtyBitmap.
cdef const dirtylog_bitmap *bitmap(object pages) except NULL

# Any thread, no GIL needed. Mark after the store to the page: a full barrier comes before the mark.
# 0, or -1 with nothing marked where a page is out of range.
cdef uint64_t npages(const dirtylog_bitmap *log) noexcept nogil
cdef int mark(const dirtylog_bitmap *log, uint64_t page) noexcept nogil
cdef int mark_range(const dirtylog_bitmap *log, uint64_t first, uint64_t count) noexcept nogil
cdef int mark_pages(const dirtylog_bitmap *log, const int64_t *pages, size_t n) noexcept nogil

# 1, 0, or -1 where the page is out of range.
cdef int is_dirty(const dirtylog_bitmap *log, uint64_t page) noexcept nogil

# Get and clear into ceil(npages / 64) words; returns how many pages were dirty.
cdef uint64_t harvest(const dirtylog_bitmap *log, uint64_t *out) noexcept nogil

# The same where nobody else marks, clears or harvests from the call to its return.
cdef uint64_t harvest_quiescent(const dirtylog_bitmap *log, uint64_t *out) noexcept nogil

# How many pages are dirty; takes none. A moment's view of each word while others mark; what a harvest beside it is
# looking at may be missing.
cdef uint64_t count(const dirtylog_bitmap *log) noexcept nogil

# Get and clear page numbers, the lowest first, at most `room` of them; returns how many. What finds no room stays
# dirty: call again until fewer than `room` come back. All of `room` may be written. Another harvest beside this one may
# pass over what finds no room here; the next call of either has it.
cdef size_t harvest_pages(const dirtylog_bitmap *log, int64_t *out, size_t room) noexcept nogil
