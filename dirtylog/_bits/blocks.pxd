# Words in memory and the kernels that scan them, for the other extension modules.
from libc.stdint cimport int64_t, uint64_t


cdef extern from "dirtylog/bitmap.h" nogil:
    cdef struct dl_bitmap:
        uint64_t *words
        uint64_t *summary
        uint64_t npages

    cdef struct dl_taken:
        uint64_t group
        uint64_t lines


cdef extern from "_bits/simd.h" nogil:
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


# The kernels chosen when the package was imported; never changes after.
cdef const dl_kernels *kernels

cdef class Block:
    cdef uint64_t *words
    cdef size_t nwords
    cdef size_t mapped_bytes        # 0: from malloc
    cdef bint short_lived           # kept for the next one of its size when it is freed
    cdef Py_buffer source           # memory that is not ours, if `exported`
    cdef bint exported
    cdef Py_ssize_t shape[1]
    cdef Py_ssize_t stride[1]

cdef void export_words(Py_buffer *view, int flags, uint64_t *words, Py_ssize_t *shape, Py_ssize_t *stride) noexcept
cdef Block no_words
cdef Block block_new(size_t nwords, bint zero)
cdef Block block_for_result(size_t nwords)
# TypeError, ValueError: the reason is in the message.
cdef Block block_of_buffer(object buffer, bint writable, str what)
cdef object new_numbers(object shape, int64_t **data)
cdef object expand_words(const uint64_t *words, size_t n)
cdef object runs_of_words(const uint64_t *words, size_t n)
