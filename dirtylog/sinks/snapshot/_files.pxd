# What stands at the end of a snapshot's file, and what Cython calls of _files.h.
from posix.types cimport off_t


cdef enum:
    TRAILER_BYTES = 64
    # Where the digest lies in the trailer.
    DIGEST_AT = 40
    DIGEST_BYTES = 16

cdef extern from "sinks/snapshot/_files.h" nogil:
    int dl_open_regular(const char *path, off_t *size)
    int dl_read_all(int fd, char *target, size_t nbytes, off_t offset)
