# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
# cython: auto_pickle=False, autotestdict=False, freethreading_compatible=True, embedsignature=True
"""Words in memory, ours or foreign, and the vector kernels that find page numbers and runs in them."""

import os

import numpy as np

cimport cython
from cpython.buffer cimport (
    PyBUF_FORMAT,
    PyBUF_ND,
    PyBUF_RECORDS_RO,
    PyBUF_STRIDES,
    PyBUF_WRITABLE,
    PyBuffer_IsContiguous,
    PyBuffer_Release,
    PyObject_CheckBuffer,
    PyObject_GetBuffer,
)
from libc.stdint cimport int64_t, uint64_t

from dirtylog._bits.numbers cimport dl_numpy_new, dl_numpy_open
from dirtylog._bits.runs cimport dl_count_runs, dl_runs
from dirtylog._bits.simd cimport dl_kernels_at, dl_kernels_find, dl_kernels_known


cdef extern from "_bits/memory.h" nogil:
    uint64_t *dl_words_alloc(size_t nwords, bint zero, size_t *mapped_bytes)
    uint64_t *dl_words_alloc_spare(size_t nwords, bint zero, size_t *mapped_bytes)
    void dl_words_free(uint64_t *words, size_t mapped_bytes)
    void dl_words_free_spare(uint64_t *words, size_t mapped_bytes)


__all__: list[str] = []


cdef int open_numpy() except -1:
    core = np._core if hasattr(np, "_core") else np.core
    table, dtype = core._multiarray_umath._ARRAY_API, np.dtype(np.int64)
    return dl_numpy_open(&numpy_functions, table, np.ndarray, dtype.num, dtype, np.arange(3, dtype=dtype))


open_numpy()


# ---- the choice of kernels ---------------------------------------------------------

def simd_paths() -> tuple[str, ...]:
    """Return the names of the kernels that this CPU can run, best first."""
    names = []
    i = 0
    while dl_kernels_at(i) != NULL:
        names.append(dl_kernels_at(i).name.decode())
        i += 1
    return tuple(names)


def simd_missing() -> dict[str, str]:
    """Return what this CPU, or its operating system, lacks for each path that it cannot run."""
    cdef const char *missing = NULL
    found = {}
    i = 0
    while dl_kernels_known(i, &missing) != NULL:
        if missing != NULL:
            found[dl_kernels_known(i, &missing).name.decode()] = missing.decode()
        i += 1
    return found


def simd_path() -> str:
    """Return the name of the kernels in use: ``scalar``, ``avx2``, ``avx512`` or ``neon``."""
    return kernels.name.decode()


cdef int choose_kernels() except -1:
    global kernels
    name = os.environ.get("DIRTYLOG_SIMD", "")
    wanted = name.encode()
    kernels = dl_kernels_find(<const char *>wanted if name else NULL)
    if kernels == NULL:
        why = "".join(f" ({path} needs {what})" for path, what in simd_missing().items() if path == name)
        raise ImportError(
            f"DIRTYLOG_SIMD={name!r}: this CPU runs {', '.join(simd_paths())}{why}; name one of these or unset it"
        )
    return 0


choose_kernels()


# ---- memory ------------------------------------------------------------------------

@cython.final
@cython.freelist(16)
cdef class Block:
    """64-byte aligned words, exported read-only through the buffer protocol."""

    def __getbuffer__(self, Py_buffer *view, int flags):
        if flags & PyBUF_WRITABLE:
            raise BufferError("the words of DirtyPages are read-only; copy them to change them")
        export_words(view, flags, self.words, self.shape, self.stride)
        view.obj = self

    def __dealloc__(self):
        if self.exported:
            PyBuffer_Release(&self.source)
        elif self.short_lived:
            dl_words_free_spare(self.words, self.mapped_bytes)
        elif self.words != NULL:
            dl_words_free(self.words, self.mapped_bytes)


cdef const char *word_format = b"Q"


cdef void export_words(Py_buffer *view, int flags, uint64_t *words, Py_ssize_t *shape, Py_ssize_t *stride) noexcept:
    """Fill in a read-only view of words, all but its owner."""
    view.buf = words
    view.len = shape[0] * 8
    view.readonly = 1
    view.itemsize = 8
    view.format = <char *>word_format if flags & PyBUF_FORMAT else NULL
    view.ndim = 1
    view.shape = shape if flags & PyBUF_ND else NULL
    view.strides = stride if flags & PyBUF_STRIDES == PyBUF_STRIDES else NULL
    view.suboffsets = NULL
    view.internal = NULL


cdef Block block_bare(size_t nwords):
    cdef Block block = Block.__new__(Block)
    block.nwords = nwords
    block.shape[0] = <Py_ssize_t>nwords
    block.stride[0] = 8
    return block


cdef Block block_checked(Block block):
    if block.words == NULL:
        raise MemoryError(f"no memory for {block.nwords} words ({block.nwords * 8} bytes)")
    return block


cdef Block block_new(size_t nwords, bint zero):
    """Return fresh words; large blocks are mapped and huge pages advised."""
    cdef Block block = block_bare(nwords)
    with nogil:
        block.words = dl_words_alloc(nwords, zero, &block.mapped_bytes)
    return block_checked(block)


cdef Block block_for_result(size_t nwords, bint zero=True):
    """Return words that are written all over and freed soon, perhaps those of the last such block; zeroed if `zero`."""
    cdef Block block = block_bare(nwords)
    block.short_lived = True
    with nogil:
        block.words = dl_words_alloc_spare(nwords, zero, &block.mapped_bytes)
    return block_checked(block)


cdef bint is_words(const Py_buffer *view) noexcept:
    """Whether the items are bytes or unsigned 64-bit words in this machine's order."""
    cdef const char *format_ = view.format
    if format_ == NULL:
        return True
    if view.itemsize == 8 and format_[0] in b"@=<":
        format_ += 1
    return format_[0] in (b"QLN" if view.itemsize == 8 else b"Bbc") and format_[1] == 0


cdef Block block_of_buffer(object buffer, bint writable, str what):
    """Return a live view of a buffer's words, which keeps its memory, after all checks (I8).

    Raises
    ------
    TypeError
        It is not a buffer, or one of other items than bytes or unsigned 64-bit words.
    ValueError
        It is read-only where it is to be written, not contiguous, not whole words, not aligned.
    """
    cdef Block block = block_bare(0)
    if not PyObject_CheckBuffer(buffer):
        raise TypeError(f"{what} is {type(buffer).__name__}; a buffer of uint64 is needed")
    PyObject_GetBuffer(buffer, &block.source, PyBUF_RECORDS_RO)
    block.exported = True
    cdef Py_buffer *view = &block.source
    if not is_words(view):
        raise TypeError(f"{what} has items of format {view.format.decode()!r}; uint64 or bytes are needed")
    if writable and view.readonly:
        raise ValueError(f"{what} is read-only; pass writable memory")
    if view.ndim != 1 or not PyBuffer_IsContiguous(view, b"C"):
        raise ValueError(f"{what} is not contiguous in one dimension; pass a contiguous slice")
    if view.len % 8:
        raise ValueError(f"{what} has {view.len} bytes; whole words of 8 are needed")
    if <size_t>view.buf % 8:
        raise ValueError(f"{what} begins at address {<size_t>view.buf:#x}; a multiple of 8 is needed")
    block.words = <uint64_t *>view.buf
    block.nwords = view.len // 8
    block.shape[0] = view.len // 8
    return block


cdef Block no_words = block_new(0, False)


# ---- extraction ------------------------------------------------------------------------

cdef object new_numbers(size_t n, int64_t **data):
    """Return a new int64 array and the address of its numbers, which hold as long as the array does."""
    return dl_numpy_new(&numpy_functions, n, 0, data)


cdef object new_runs(size_t n, int64_t **data):
    """The same for an array of shape (n, 2)."""
    return dl_numpy_new(&numpy_functions, n, 2, data)


cdef object expand_words(const uint64_t *words, size_t n):
    """Return the numbers of the set bits of `n` words."""
    cdef size_t count, written
    cdef int64_t *out
    with nogil:
        count = kernels.popcount(words, n)
    result = new_numbers(count, &out)
    with nogil:
        written = kernels.expand(words, n, 0, out, count)
    return result if written == count else result[:written]


cdef object runs_of_words(const uint64_t *words, size_t n):
    """Return the (first, count) pairs of the runs of set bits of `n` words."""
    cdef size_t count, written
    cdef int64_t *out
    with nogil:
        count = dl_count_runs(kernels, words, n)
    result = new_runs(count, &out)
    with nogil:
        written = dl_runs(kernels, words, n, out, count)
    return result if written == count else result[:written]
