# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
# cython: auto_pickle=False, autotestdict=False, freethreading_compatible=True, embedsignature=True
"""What C, C++ and Cython extensions of other packages call: see capi.pxd and dirtylog/capi.h."""

from cpython.object cimport PyObject
from cpython.pycapsule cimport PyCapsule_New
from libc.stdint cimport int64_t, uint32_t, uint64_t

from dirtylog._bits.atomic cimport dl_load_relaxed
from dirtylog._bits.batch cimport dl_check_batch, dl_mark_batch
from dirtylog._bits.bitmap cimport dl_bitmap, dl_mark, dl_mark_range
from dirtylog._bits.bits cimport dl_bit
from dirtylog._bits.simd cimport DL_CLEAR, DL_CLEAR_QUIESCENT
from dirtylog._bits.taking cimport count_pages, take_numbers, take_words
from dirtylog._core cimport DirtyBitmap


cdef extern from "dirtylog/capi.h" nogil:
    cdef enum:
        DIRTYLOG_API_VERSION
    const char *DIRTYLOG_API_CAPSULE
    cdef struct dirtylog_api:
        uint32_t version
        uint32_t size
        const dirtylog_bitmap *(*bitmap)(void *object) except NULL
        uint64_t (*npages)(const dirtylog_bitmap *bitmap) noexcept nogil
        int (*mark)(const dirtylog_bitmap *bitmap, uint64_t page) noexcept nogil
        int (*mark_range)(const dirtylog_bitmap *bitmap, uint64_t first, uint64_t count) noexcept nogil
        int (*mark_pages)(const dirtylog_bitmap *bitmap, const int64_t *pages, size_t n) noexcept nogil
        int (*is_dirty)(const dirtylog_bitmap *bitmap, uint64_t page) noexcept nogil
        uint64_t (*harvest)(const dirtylog_bitmap *bitmap, uint64_t *out) noexcept nogil
        uint64_t (*harvest_quiescent)(const dirtylog_bitmap *bitmap, uint64_t *out) noexcept nogil
        uint64_t (*count)(const dirtylog_bitmap *bitmap) noexcept nogil
        size_t (*harvest_pages)(const dirtylog_bitmap *bitmap, int64_t *out, size_t room) noexcept nogil


__all__: list[str] = []


cdef const dirtylog_bitmap *bitmap(object pages) except NULL:
    if not isinstance(pages, DirtyBitmap):
        raise TypeError(f"a dirtylog.DirtyBitmap is needed, not {type(pages).__name__}")
    return <const dirtylog_bitmap *>&(<DirtyBitmap>pages).bits


cdef uint64_t npages(const dirtylog_bitmap *log) noexcept nogil:
    return (<const dl_bitmap *>log).npages


cdef int mark(const dirtylog_bitmap *log, uint64_t page) noexcept nogil:
    cdef const dl_bitmap *bits = <const dl_bitmap *>log
    if page >= bits.npages:
        return -1
    dl_mark(bits, page)
    return 0


cdef int mark_range(const dirtylog_bitmap *log, uint64_t first, uint64_t count) noexcept nogil:
    cdef const dl_bitmap *bits = <const dl_bitmap *>log
    if first > bits.npages or count > bits.npages - first:
        return -1
    if count:
        dl_mark_range(bits, first, count)
    return 0


cdef int mark_pages(const dirtylog_bitmap *log, const int64_t *pages, size_t n) noexcept nogil:
    cdef const dl_bitmap *bits = <const dl_bitmap *>log
    if n == 0:
        return 0
    if dl_check_batch(pages, n, bits.npages) < n or dl_mark_batch(bits, pages, n) < n:
        return -1
    return 0


cdef int is_dirty(const dirtylog_bitmap *log, uint64_t page) noexcept nogil:
    cdef const dl_bitmap *bits = <const dl_bitmap *>log
    if page >= bits.npages:
        return -1
    return (dl_load_relaxed(bits.words + page // 64) & dl_bit(page)) != 0


cdef uint64_t harvest(const dirtylog_bitmap *log, uint64_t *out) noexcept nogil:
    return take_words(<const dl_bitmap *>log, out, DL_CLEAR)


cdef uint64_t harvest_quiescent(const dirtylog_bitmap *log, uint64_t *out) noexcept nogil:
    return take_words(<const dl_bitmap *>log, out, DL_CLEAR_QUIESCENT)


cdef uint64_t count(const dirtylog_bitmap *log) noexcept nogil:
    return count_pages(<const dl_bitmap *>log)


cdef size_t harvest_pages(const dirtylog_bitmap *log, int64_t *out, size_t room) noexcept nogil:
    return take_numbers(<const dl_bitmap *>log, out, room)


cdef const dirtylog_bitmap *bitmap_for_c(void *object_) except NULL:
    return bitmap(<object><PyObject *>object_)


cdef dirtylog_api table
table.version = DIRTYLOG_API_VERSION
table.size = sizeof(dirtylog_api)
table.bitmap = bitmap_for_c
table.npages = npages
table.mark = mark
table.mark_range = mark_range
table.mark_pages = mark_pages
table.is_dirty = is_dirty
table.harvest = harvest
table.harvest_quiescent = harvest_quiescent
table.count = count
table.harvest_pages = harvest_pages

_C_API = PyCapsule_New(<void *>&table, DIRTYLOG_API_CAPSULE, NULL)
