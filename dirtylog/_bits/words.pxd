# For the other extension modules.
from libc.stdint cimport uint64_t

cdef int check_apart(const uint64_t *a, size_t na, const uint64_t *b, size_t nb) except -1
