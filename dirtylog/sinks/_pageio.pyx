# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
# cython: auto_pickle=False, autotestdict=False, freethreading_compatible=True, embedsignature=True
"""Moves extents of pages between memory and files without the GIL.

An extent is a row ``(offset, length)`` in bytes. A *plain* buffer or file holds each extent at its own offset; a
*packed* buffer holds them one after the other.
"""

import os

import numpy as np

cimport cython
from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from libc.errno cimport EINTR, EINVAL, ENODATA, ENXIO, errno
from libc.stdint cimport int64_t
from libc.stdlib cimport free, realloc
from libc.string cimport memcpy, memset
from posix.types cimport off_t

__all__ = ["copy_extents", "data_extents", "gather", "read_extents", "scatter", "write_extents", "zero_extents"]

# Extents that are neighbours in the file go into one system call, as many as this.
cdef enum:
    VECTORS = 64


cdef extern from "sinks/_stream.h" nogil:
    int64_t DL_STREAM_BYTES
    void dl_stream_copy(char *target, const char *source, size_t nbytes, const char *next, size_t next_bytes) noexcept
    void dl_stream_end() noexcept


cdef extern from "<sys/uio.h>" nogil:
    cdef struct iovec:
        void *iov_base
        size_t iov_len
    ssize_t pwritev(int fd, const iovec *iov, int iovcnt, off_t offset)
    ssize_t preadv(int fd, const iovec *iov, int iovcnt, off_t offset)


cdef extern from "<unistd.h>" nogil:
    off_t lseek(int fd, off_t offset, int whence)
    int SEEK_DATA
    int SEEK_HOLE


@cython.final
cdef class HeldBuffer:
    """The memory of a buffer, kept for as long as this object lives."""

    cdef Py_buffer raw
    cdef bint held

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
               bint source_packed) noexcept nogil:
    cdef Py_ssize_t i
    cdef int64_t packed = 0
    cdef int64_t offset, length
    for i in range(n):
        offset = extents[2 * i]
        length = extents[2 * i + 1]
        memcpy(target + (packed if target_packed else offset), source + (packed if source_packed else offset),
               <size_t>length)
        packed += length


cdef void stream(char *target, const char *source, const int64_t *extents, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i, after
    for i in range(n):
        after = min(i + 1, n - 1)
        dl_stream_copy(target + extents[2 * i], source + extents[2 * i], <size_t>extents[2 * i + 1],
                       source + extents[2 * after], <size_t>extents[2 * after + 1])
    dl_stream_end()


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
        if total >= DL_STREAM_BYTES:
            stream(to, origin, rows, n)
        else:
            move(to, origin, rows, n, False, False)
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
        move(to, origin, rows, n, True, False)


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
        move(to, origin, rows, n, False, True)


def zero_extents(target, const int64_t[:, ::1] extents) -> None:
    """Set extents of a plain buffer to zero."""
    cdef HeldBuffer written = hold(target, True, "target")
    cdef const int64_t *rows = extents_pointer(extents)
    cdef Py_ssize_t n = extents.shape[0]
    check_plain(rows, n, written.raw.len, "target")
    cdef char *start = written.start()
    cdef Py_ssize_t i
    with nogil:
        for i in range(n):
            memset(start + rows[2 * i], 0, <size_t>rows[2 * i + 1])


# ---- memory and files -----------------------------------------------------------------------------------------------

cdef int transfer(int fd, iovec *vectors, int count, off_t offset, bint write) noexcept nogil:
    """Move all of `vectors`, which is used up: 0 or -errno. Short transfers go on; the end of the file is ENODATA."""
    cdef ssize_t moved
    cdef int first = 0
    while first < count:
        moved = (pwritev if write else preadv)(fd, vectors + first, count - first, offset)
        if moved < 0:
            if errno == EINTR:
                continue
            return -errno
        if moved == 0 and vectors[first].iov_len:
            return -ENODATA
        offset += moved
        while first < count and moved >= <ssize_t>vectors[first].iov_len:
            moved -= vectors[first].iov_len
            first += 1
        if first < count:
            vectors[first].iov_base = <char *>vectors[first].iov_base + moved
            vectors[first].iov_len -= moved
    return 0


cdef int transfer_extents(int fd, char *memory, const int64_t *extents, Py_ssize_t n, bint packed,
                          bint write) noexcept nogil:
    cdef iovec vectors[VECTORS]
    cdef Py_ssize_t i = 0
    cdef int count, error
    cdef int64_t position = 0
    cdef int64_t offset, next_offset
    while i < n:
        offset = next_offset = extents[2 * i]
        count = 0
        # Neighbours in the file, wherever they are in memory, are one call.
        while i < n and count < VECTORS and extents[2 * i] == next_offset:
            vectors[count].iov_base = memory + (position if packed else next_offset)
            vectors[count].iov_len = <size_t>extents[2 * i + 1]
            position += extents[2 * i + 1]
            next_offset += extents[2 * i + 1]
            count += 1
            i += 1
        error = transfer(fd, vectors, count, offset, write)
        if error:
            return error
    return 0


cdef int raise_errno(int error, object name) except -1:
    raise OSError(-error, os.strerror(-error), name)


def write_extents(int fd, buffer, const int64_t[:, ::1] extents, *, bint packed, name) -> None:
    """Write extents of memory to a file, each at its own offset.

    Parameters
    ----------
    fd : int
        File open for writing; its position is left alone.
    buffer : buffer
        C-contiguous memory, plain or packed.
    extents : int64 array of shape (n, 2)
        Offset in the file and length, in bytes.
    packed : bool
        True: `buffer` holds the extents one after the other. False: each at its own offset.
    name : str
        File name for the error.

    Raises
    ------
    OSError
        What ``pwritev`` answered (ENOSPC, EFBIG, ...), with `name`. Some extents may have been written.
    IndexError, ValueError
        The extents do not fit `buffer`; nothing has been written.

    Notes
    -----
    Without the GIL; one ``pwritev`` for extents that are neighbours in the file.
    """
    cdef HeldBuffer memory = hold(buffer, False, "buffer")
    cdef const int64_t *rows = extents_pointer(extents)
    cdef Py_ssize_t n = extents.shape[0]
    check_plain(rows, n, (<int64_t>1 << 62) if packed else memory.raw.len, "buffer")
    if packed:
        check_packed(rows, n, memory.raw.len)
    cdef char *start = memory.start()
    cdef int error
    with nogil:
        error = transfer_extents(fd, start, rows, n, packed, True)
    if error:
        raise_errno(error, name)


def read_extents(int fd, buffer, const int64_t[:, ::1] extents, *, bint packed, name) -> None:
    """Read extents of a file into memory: the reverse of :func:`write_extents`.

    Raises
    ------
    OSError
        What ``preadv`` answered; ENODATA where the file ends before an extent does. `buffer` may be partly filled.
    """
    cdef HeldBuffer memory = hold(buffer, True, "buffer")
    cdef const int64_t *rows = extents_pointer(extents)
    cdef Py_ssize_t n = extents.shape[0]
    check_plain(rows, n, (<int64_t>1 << 62) if packed else memory.raw.len, "buffer")
    if packed:
        check_packed(rows, n, memory.raw.len)
    cdef char *start = memory.start()
    cdef int error
    with nogil:
        error = transfer_extents(fd, start, rows, n, packed, False)
    if error:
        raise_errno(error, name)


cdef struct Found:
    int64_t *rows
    size_t used
    size_t capacity


cdef int found_add(Found *found, int64_t offset, int64_t length) noexcept nogil:
    cdef int64_t *larger
    if found.used == found.capacity:
        larger = <int64_t *>realloc(found.rows, 2 * (found.capacity * 2 + 64) * sizeof(int64_t))
        if larger == NULL:
            return -1
        found.rows = larger
        found.capacity = found.capacity * 2 + 64
    found.rows[2 * found.used] = offset
    found.rows[2 * found.used + 1] = length
    found.used += 1
    return 0


cdef int find_data(int fd, off_t position, off_t end, Found *found) noexcept nogil:
    """0, -errno, or 1 when memory ran out."""
    cdef off_t data, hole
    while position < end:
        data = lseek(fd, position, SEEK_DATA)
        if data < 0 and errno == ENXIO:
            return 0
        if data < 0 and errno == EINVAL:
            # A file system without holes: everything is data, which is never wrong.
            return 1 if found_add(found, position, end - position) else 0
        if data < 0:
            return -errno
        if data >= end:
            return 0
        hole = lseek(fd, data, SEEK_HOLE)
        if hole < 0:
            return -errno
        hole = min(hole, end)
        if hole <= data:
            return 0
        if found_add(found, data, hole - data):
            return 1
        position = hole
    return 0


def data_extents(int fd, int64_t end, *, name) -> np.ndarray:
    """List where a file holds data rather than holes, by SEEK_DATA and SEEK_HOLE.

    Parameters
    ----------
    fd : int
        Open file; its position is moved.
    end : int
        Where to stop, in bytes.
    name : str
        File name for the error.

    Returns
    -------
    int64 array of shape (n, 2)
        Offset and length in bytes, ascending.

    Notes
    -----
    The answer is in the file system's blocks, which may be coarser than a page, and a file system may report data
    where there are zeros, never a hole where there is something else.
    """
    cdef Found found
    found.rows = NULL
    found.used = found.capacity = 0
    cdef int error
    with nogil:
        error = find_data(fd, 0, end, &found)
    try:
        if error < 0:
            raise_errno(error, name)
        if error:
            raise MemoryError
        if found.used == 0:
            return np.empty((0, 2), np.int64)
        return np.array(<int64_t[:found.used, :2]>found.rows)
    finally:
        free(found.rows)
