# DirtyPages, for the other extension modules.
from libc.stdint cimport int64_t, uint64_t

from dirtylog._bits.blocks cimport Block
from dirtylog._bits.thrown cimport dl_giver, dl_take_back


cdef class DirtyPages:
    cdef readonly uint64_t npages
    cdef readonly uint64_t page_size
    cdef readonly bint exact
    cdef Block dense                # ceil(npages / 64) words, or None
    cdef Block numbers              # ascending word numbers, or None: at least one of the forms is there
    cdef Block masks                # their masks, none of them zero
    cdef size_t entries             # used in numbers and masks
    cdef int64_t known_count        # -1: not counted yet
    cdef dl_giver giver             # whose pages these are again if an exception throws them away
    cdef int64_t counted(self) noexcept
    cdef Block dense_block(self)
    cdef DirtyPages combined(self, int op, other)

cdef DirtyPages pages_bare(uint64_t npages, uint64_t page_size, bint exact)
cdef void pages_fill(DirtyPages pages, Block dense, Block numbers, Block masks, size_t entries) noexcept
cdef void pages_given(DirtyPages pages, object giver, dl_take_back *take_back) noexcept
cdef DirtyPages pages_from_words_block(Block words, uint64_t npages, uint64_t page_size, bint exact)
cdef DirtyPages pages_from_sparse_blocks(Block numbers, Block masks, size_t n, uint64_t npages, uint64_t page_size,
                                         bint exact)
