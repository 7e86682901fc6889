# The dirty bitmap, for extension modules that mark and harvest without the GIL.
from libc.stdint cimport int64_t, uint64_t

from dirtylog._bits.bitmap cimport dl_bitmap, dl_mark, dl_mark_mask, dl_mark_range
from dirtylog._bits.blocks cimport Block
from dirtylog._bits.pages cimport DirtyPages


cdef class DirtyBitmap:
    cdef dl_bitmap bits             # valid as long as the object lives; never changes
    cdef readonly uint64_t page_size
    cdef Block word_block           # what bits.words, bits.summary and bits.top point into
    cdef Block summary_block
    cdef Block top_block
    cdef DirtyPages nothing         # the answer of a harvest that finds nothing: one for all of them
    cdef object __weakref__
    cdef object myself              # a weak reference, for the answers
    cdef uint64_t page(self, object page) except? <uint64_t>-1
    cdef int span(self, object first, object count, uint64_t *first_page, uint64_t *end_page,
                  bint open_end) except -1
    cdef DirtyPages pages_argument(self, object pages)
    cdef bint mark_array(self, object array) except -1
    cdef int mark_numbers(self, const int64_t *pages, size_t n) except -1
    cdef void put(self, DirtyPages pages, uint64_t start) noexcept
    cdef DirtyPages take(self, uint64_t first, uint64_t end, int clear)
