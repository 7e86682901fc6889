# What Cython calls of dirtylog/atomic.h.
from libc.stdint cimport uint64_t


cdef extern from "dirtylog/atomic.h" nogil:
    uint64_t dl_load_relaxed(const uint64_t *word)
    void dl_store_relaxed(uint64_t *word, uint64_t value)
    uint64_t dl_load_acquire(const uint64_t *word)
    uint64_t dl_fetch_or(uint64_t *word, uint64_t bits)
    uint64_t dl_fetch_add(uint64_t *word, uint64_t more)
    uint64_t dl_exchange(uint64_t *word, uint64_t value)
