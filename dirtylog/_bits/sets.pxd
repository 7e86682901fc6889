# What Cython calls of _bits/sets.h.
from libc.stdint cimport int64_t, uint64_t


cdef extern from "_bits/sets.h" nogil:
    cdef enum:
        DL_OR, DL_AND, DL_SUB, DL_XOR
    void dl_combine_dense(int op, const uint64_t *a, const uint64_t *b, uint64_t *out, size_t n)
    size_t dl_combine_sparse(int op, const uint64_t *na, const uint64_t *ma, size_t a, const uint64_t *nb,
                             const uint64_t *mb, size_t b, uint64_t *numbers, uint64_t *masks)
    size_t dl_select_sparse(int op, const uint64_t *na, const uint64_t *ma, size_t a, const uint64_t *dense,
                            uint64_t *numbers, uint64_t *masks)
    void dl_scatter(const uint64_t *numbers, const uint64_t *masks, size_t n, uint64_t *out)
    uint64_t dl_hash_dense(const uint64_t *words, size_t n)
    uint64_t dl_hash_sparse(const uint64_t *numbers, const uint64_t *masks, size_t n)
    size_t dl_words_of_indices(const int64_t *pages, size_t n)
    void dl_sparse_of_indices(const int64_t *pages, size_t n, uint64_t *numbers, uint64_t *masks)
    void dl_dense_of_indices(const int64_t *pages, size_t n, uint64_t *out)
    size_t dl_check_runs(const int64_t *runs, size_t n, uint64_t npages)
    size_t dl_words_of_runs(const int64_t *runs, size_t n)
    size_t dl_sparse_of_runs(const int64_t *runs, size_t n, uint64_t *numbers, uint64_t *masks)
    void dl_dense_of_runs(const int64_t *runs, size_t n, uint64_t *out)
    void dl_pages_of_unaligned(uint64_t *words, size_t n, uint64_t npages)
