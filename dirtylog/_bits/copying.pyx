# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
# cython: auto_pickle=False, autotestdict=False, freethreading_compatible=True, embedsignature=True
"""Copies extents of pages from memory to memory without the GIL.

An extent is a row ``(offset, length)`` in bytes; those of one call do not overlap, and are copied in any order. A
*plain* buffer holds each extent at its own offset; a *packed* one holds them one after the other.
"""

cimport cython
from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from libc.stdint cimport int64_t

__all__ = ["copy_extents", "gather", "scatter"]


cdef extern from "_bits/stream.h" nogil:
    int64_t DL_STREAM_BYTES
    Py_ssize_t DL_PAGES_AHEAD
    struct dl_copier:
        int streaming, held
    void dl_fetch_far(const char *page, int64_t from_the_one_before) noexcept
    void dl_copier_copy(dl_copier *copier, char *target, const char *source, size_t nbytes) noexcept
    void dl_copier_end(dl_copier *copier) noexcept


@cython.final
cdef class HeldBuffer:
    """The memory of a buffer, kept for as long as this object lives."""

    def __dealloc__(self):
        if self.held:
            PyBuffer_Release(&self.raw)

    cdef char *start(self) noexcept:
        return <char *>self.raw.buf


cdef HeldBuffer hold(object buffer, bint writable, str what):
    cdef HeldBuffer memory = HeldBuffer.__new__(HeldBuffer)
    try:
        PyObject_GetBuffer(buffer, &memory.raw, PyBUF_WRITABLE if writable else PyBUF_SIMPLE)
    except TypeError:
        raise TypeError(f"{what} is {type(buffer).__name__}; a buffer of bytes is needed") from None
    except (BufferError, ValueError) as error:
        need = "writable, C-contiguous" if writable else "C-contiguous"
        raise ValueError(f"{what} cannot be used ({error}); pass {need} memory") from None
    memory.held = True
    return memory


# ---- checks: everything is refused before the first byte moves ----------------------------------------------------

cdef Py_ssize_t first_bad(const int64_t *extents, Py_ssize_t n, int64_t limit) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(n):
        if extents[2 * i] < 0 or extents[2 * i + 1] < 0 or extents[2 * i] > limit - extents[2 * i + 1]:
            return i
    return -1


cdef int64_t total_length(const int64_t *extents, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i
    cdef int64_t total = 0
    for i in range(n):
        total += extents[2 * i + 1]
    return total


cdef const int64_t *extents_pointer(const int64_t[:, ::1] extents) except? NULL:
    if extents.shape[1] != 2:
        raise ValueError(f"extents have {extents.shape[1]} columns; 2 are needed: offset and length in bytes")
    return &extents[0, 0] if extents.shape[0] else NULL


cdef int check_plain(const int64_t *extents, Py_ssize_t n, int64_t limit, str what) except -1:
    cdef Py_ssize_t bad = first_bad(extents, n, limit)
    if bad >= 0:
        raise IndexError(f"extent {bad} is offset {extents[2 * bad]}, length {extents[2 * bad + 1]}; "
                         f"{what} has {limit} bytes")
    return 0


cdef int check_packed(const int64_t *extents, Py_ssize_t n, Py_ssize_t nbytes) except -1:
    # The extents have been checked against a limit one by one, but their sum could still run over.
    cdef Py_ssize_t i
    cdef int64_t left = nbytes
    for i in range(n):
        left -= extents[2 * i + 1]
        if left < 0:
            break
    if left != 0:
        raise ValueError(f"the packed buffer has {nbytes} bytes; the extents do not add up to that")
    return 0


# ---- memory to memory -----------------------------------------------------------------------------------------------

cdef void move(char *target, const char *source, const int64_t *extents, Py_ssize_t n, bint target_packed,
               bint source_packed, bint streaming) noexcept nogil:
    cdef Py_ssize_t i, later
    cdef int64_t packed = 0
    cdef int64_t offset, length
    cdef dl_copier copier
    copier.streaming = streaming
    copier.held = 0
    for i in range(n):
        offset = extents[2 * i]
        length = extents[2 * i + 1]
        if not source_packed and i + DL_PAGES_AHEAD < n:
            later = i + DL_PAGES_AHEAD
            dl_fetch_far(source + extents[2 * later], extents[2 * later] - extents[2 * later - 2])
        dl_copier_copy(&copier, target + (packed if target_packed else offset),
                       source + (packed if source_packed else offset), <size_t>length)
        packed += length
    dl_copier_end(&copier)


def copy_extents(source, target, const int64_t[:, ::1] extents) -> int:
    """Copy extents from one plain buffer to the same offsets of another.

    Parameters
    ----------
    source, target : buffer
        C-contiguous memory that does not overlap.
    extents : int64 array of shape (n, 2)
        Offset and length in bytes.

    Returns
    -------
    int
        Bytes copied.

    Raises
    ------
    IndexError
        An extent reaches past the shorter of the two; nothing has been copied.

    Notes
    -----
    Without the GIL, O(bytes copied). Plain stores: a writer running at the same time may be seen half-done, and is
    seen again if it marks after its store (I3) and the pages were collected before this copy.
    """
    cdef HeldBuffer read = hold(source, False, "source")
    cdef HeldBuffer written = hold(target, True, "target")
    cdef const int64_t *rows = extents_pointer(extents)
    cdef Py_ssize_t n = extents.shape[0]
    check_plain(rows, n, min(read.raw.len, written.raw.len), "the shorter buffer")
    cdef char *to = written.start()
    cdef const char *origin = read.start()
    cdef int64_t total
    with nogil:
        total = total_length(rows, n)
        # Past the caches where the copy would displace everything else.
        move(to, origin, rows, n, False, False, total >= DL_STREAM_BYTES)
    return total


def gather(source, const int64_t[:, ::1] extents, packed) -> None:
    """Copy extents of a plain buffer one after the other into `packed`, which they fill exactly."""
    cdef HeldBuffer read = hold(source, False, "source")
    cdef HeldBuffer written = hold(packed, True, "packed")
    cdef const int64_t *rows = extents_pointer(extents)
    cdef Py_ssize_t n = extents.shape[0]
    check_plain(rows, n, read.raw.len, "source")
    check_packed(rows, n, written.raw.len)
    cdef char *to = written.start()
    cdef const char *origin = read.start()
    with nogil:
        move(to, origin, rows, n, True, False, False)


def scatter(packed, const int64_t[:, ::1] extents, target) -> None:
    """Copy a packed buffer to the extents of a plain one: the reverse of :func:`gather`."""
    cdef HeldBuffer read = hold(packed, False, "packed")
    cdef HeldBuffer written = hold(target, True, "target")
    cdef const int64_t *rows = extents_pointer(extents)
    cdef Py_ssize_t n = extents.shape[0]
    check_plain(rows, n, written.raw.len, "target")
    check_packed(rows, n, read.raw.len)
    cdef char *to = written.start()
    cdef const char *origin = read.start()
    with nogil:
        move(to, origin, rows, n, False, True, False)
