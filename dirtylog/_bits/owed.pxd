# What a source owes, for extension modules that take pages and may fail to hand them out.
from libc.stdint cimport uint64_t

from dirtylog._bits.bitmap cimport dl_bitmap
from dirtylog._bits.blocks cimport Block
from dirtylog._bits.pages cimport DirtyPages


cdef class Owed:
    cdef dl_bitmap bits             # the pages; all memory that owing needs is here from the start
    cdef Block words
    cdef Block summary
    cdef uint64_t page_size
    cdef uint64_t state             # what there is besides them; changed by atomic operations alone
    cdef object __weakref__
    cdef object myself              # a weak reference, for the answers
    cdef int check(self, DirtyPages pages) except -1
    cdef void note(self, DirtyPages pages, uint64_t said) noexcept
    cdef DirtyPages settled(self, DirtyPages pages, uint64_t state, warn)
    cdef DirtyPages given(self, DirtyPages pages)
    cdef DirtyPages joined(self, DirtyPages pages, uint64_t state)
