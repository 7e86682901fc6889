# An answer that an exception throws away: _bits/thrown.h.
from cpython.object cimport PyObject


cdef extern from "_bits/thrown.h":
    ctypedef void dl_take_back(PyObject *source, PyObject *pages) noexcept
    ctypedef void (*dl_dealloc "destructor")(PyObject *pages) noexcept
    struct dl_giver:
        pass
    void dl_giver_set(dl_giver *giver, PyObject *source, dl_take_back *take_back)
    void dl_giver_end(dl_giver *giver, PyObject *pages)
    dl_dealloc dl_dealloc_by(PyObject *type, dl_dealloc mine)
