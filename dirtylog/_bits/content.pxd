# What Cython calls of _bits/content.h.
from libc.stdint cimport uint64_t


cdef extern from "_bits/content.h" nogil:
    void dl_copy_pages(unsigned char *target, const unsigned char *source, size_t nbytes, size_t page_size,
                       const uint64_t *words)
    void dl_compare_pages(const unsigned char *a, const unsigned char *b, size_t nbytes, size_t page_size,
                          uint64_t *out)
    void dl_zero_pages(const unsigned char *a, size_t nbytes, size_t page_size, uint64_t *out)
