# Memory that is copied from and to, for the extension module that moves it to files.
from libc.stdint cimport int64_t


cdef class HeldBuffer:
    cdef Py_buffer raw
    cdef bint held
    cdef char *start(self) noexcept

cdef HeldBuffer hold(object buffer, bint writable, str what)
cdef const int64_t *extents_pointer(const int64_t[:, ::1] extents) except? NULL
cdef int check_plain(const int64_t *extents, Py_ssize_t n, int64_t limit, str what) except -1
cdef int check_packed(const int64_t *extents, Py_ssize_t n, Py_ssize_t nbytes) except -1
