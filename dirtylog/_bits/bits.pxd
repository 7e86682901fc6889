# What Cython calls of dirtylog/bits.h.
from libc.stdint cimport uint64_t


cdef extern from "dirtylog/bits.h" nogil:
    unsigned dl_ffs(uint64_t mask)
    unsigned dl_fls(uint64_t mask)
    uint64_t dl_bit(uint64_t page)
    uint64_t dl_words_for(uint64_t npages)
    uint64_t dl_tail_mask(uint64_t npages)
