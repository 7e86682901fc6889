# Page numbers from and to Python: `_bits/numbers.h`.
from libc.stdint cimport int64_t


cdef extern from "_bits/numbers.h":
    cdef struct dl_numpy:
        pass
    int dl_numpy_open(dl_numpy *numpy, object table, object type_, int int64, object dtype, object example) except -1
    const int64_t *dl_numpy_look(const dl_numpy *numpy, object array, Py_ssize_t *n) noexcept
    object dl_numpy_new(const dl_numpy *numpy, Py_ssize_t rows, Py_ssize_t columns, int64_t **data)
    Py_ssize_t dl_numbers_of_items(object items, int64_t *out, Py_ssize_t room)
    bint dl_hold_numbers(object array, Py_buffer *view)
