# What Cython calls of dirtylog/bitmap.h.
from libc.stdint cimport uint64_t


cdef extern from "dirtylog/bitmap.h" nogil:
    cdef enum:
        DL_LINE_WORDS, DL_GROUP_WORDS

    cdef struct dl_bitmap:
        uint64_t *words
        uint64_t *summary
        uint64_t npages
        uint64_t *top

    cdef struct dl_taken:
        uint64_t group
        uint64_t lines

    uint64_t dl_groups_for(uint64_t npages)
    uint64_t dl_top_words_for(uint64_t npages)
    void dl_mark(const dl_bitmap *bitmap, uint64_t page)
    void dl_mark_mask(const dl_bitmap *bitmap, uint64_t word, uint64_t mask)
    void dl_mark_range(const dl_bitmap *bitmap, uint64_t first, uint64_t count)
    void dl_harvest_end()
    void dl_summary_untake(const dl_bitmap *bitmap, const dl_taken *taken, size_t n)
