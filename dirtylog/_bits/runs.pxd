# What Cython calls of _bits/runs.h.
from libc.stdint cimport int64_t, uint64_t

from dirtylog._bits.simd cimport dl_kernels


cdef extern from "_bits/runs.h" nogil:
    size_t dl_count_runs(const dl_kernels *k, const uint64_t *words, size_t n)
    size_t dl_runs(const dl_kernels *k, const uint64_t *words, size_t n, int64_t *out, size_t capacity)
    size_t dl_count_runs_sparse(const dl_kernels *k, const uint64_t *numbers, const uint64_t *masks, size_t n)
    size_t dl_runs_sparse(const dl_kernels *k, const uint64_t *numbers, const uint64_t *masks, size_t n, int64_t *out,
                          size_t capacity)
