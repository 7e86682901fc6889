# Words in memory and the kernels that scan them, for the other extension modules.
from libc.stdint cimport int64_t, uint64_t

from dirtylog._bits.numbers cimport dl_numpy
from dirtylog._bits.simd cimport dl_kernels


cdef enum:
    # Words and pages that are worked on without giving up the GIL, which costs as much as some fifty of them.
    FEW = 64

# The kernels chosen when the package was imported; never changes after.
cdef const dl_kernels *kernels

# What arrays of page numbers are made of and read by; as the kernels.
cdef dl_numpy numpy_functions

cdef class Block:
    cdef uint64_t *words
    cdef size_t nwords
    cdef size_t mapped_bytes        # 0: from malloc
    cdef bint short_lived           # kept for the next one of its size when it is freed
    cdef Py_buffer source           # memory that is not ours, if `exported`
    cdef bint exported
    cdef Py_ssize_t shape[1]
    cdef Py_ssize_t stride[1]

cdef void export_words(Py_buffer *view, int flags, uint64_t *words, Py_ssize_t *shape, Py_ssize_t *stride) noexcept
cdef Block no_words
cdef Block block_new(size_t nwords, bint zero)
cdef Block block_for_result(size_t nwords, bint zero=*)
# TypeError, ValueError: the reason is in the message.
cdef Block block_of_buffer(object buffer, bint writable, str what)
cdef object new_numbers(size_t n, int64_t **data)
cdef object new_runs(size_t n, int64_t **data)
cdef object expand_words(const uint64_t *words, size_t n)
cdef object runs_of_words(const uint64_t *words, size_t n)
