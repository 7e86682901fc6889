# What Cython calls of _bits/batch.h.
from libc.stdint cimport int64_t, uint64_t

from dirtylog._bits.bitmap cimport dl_bitmap
from dirtylog._bits.simd cimport dl_kernels


cdef extern from "_bits/batch.h" nogil:
    size_t dl_check_batch(const int64_t *pages, size_t n, uint64_t npages)
    size_t dl_mark_batch(const dl_bitmap *bitmap, const int64_t *pages, size_t n)
    void dl_merge_sparse(const dl_bitmap *bitmap, const uint64_t *numbers, const uint64_t *masks, size_t n,
                         uint64_t first_page)
    void dl_merge_dense(const dl_kernels *k, const dl_bitmap *bitmap, const uint64_t *words, size_t n,
                        uint64_t first_page)
    void dl_clear_sparse(const dl_bitmap *bitmap, const uint64_t *numbers, const uint64_t *masks, size_t n)
    void dl_clear_dense(const dl_bitmap *bitmap, const uint64_t *words)
    void dl_clear_range(const dl_bitmap *bitmap, uint64_t first, uint64_t count)
