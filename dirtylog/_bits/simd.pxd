# The kernels of _bits/simd.h.
from libc.stdint cimport int64_t, uint64_t

from dirtylog._bits.bitmap cimport dl_bitmap, dl_taken


cdef extern from "_bits/simd.h" nogil:
    cdef enum:
        DL_LEAVE, DL_CLEAR, DL_CLEAR_QUIESCENT

    void dl_take_end(int clear)

    cdef struct dl_kernels:
        const char *name
        uint64_t (*popcount)(const uint64_t *words, size_t n) noexcept nogil
        size_t (*next_nonzero)(const uint64_t *words, size_t start, size_t n) noexcept nogil
        size_t (*take_summary)(const dl_bitmap *b, uint64_t first_line, uint64_t end_line, uint64_t *next,
                               dl_taken *taken, size_t room, int clear, uint64_t *nlines) noexcept nogil
        void (*take_dense)(uint64_t *words, size_t n, uint64_t *out, int clear) noexcept nogil
        size_t (*take_sparse)(uint64_t *words, size_t first, size_t end, uint64_t *numbers, uint64_t *masks,
                              int clear) noexcept nogil
        void (*take_lines_dense)(uint64_t *words, const dl_taken *taken, size_t groups, uint64_t *out,
                                 int clear) noexcept nogil
        size_t (*take_lines_sparse)(uint64_t *words, const dl_taken *taken, size_t groups, uint64_t *numbers,
                                    uint64_t *masks, int clear) noexcept nogil
        size_t (*expand)(const uint64_t *words, size_t n, int64_t first, int64_t *out, size_t capacity) noexcept nogil
        size_t (*expand_sparse)(const uint64_t *numbers, const uint64_t *masks, size_t n, int64_t *out,
                                size_t capacity) noexcept nogil

    const dl_kernels *dl_kernels_find(const char *name)
    const dl_kernels *dl_kernels_known(size_t i, const char **missing)
    const dl_kernels *dl_kernels_at(size_t i)
