# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
# cython: auto_pickle=False, autotestdict=False, freethreading_compatible=True, embedsignature=True
"""Moves extents of pages between memory and files without the GIL, and gives files names that a power cut leaves them.

An extent is a row ``(offset, length)`` in bytes. A *plain* buffer or file holds each extent at its own offset; a
*packed* buffer holds them one after the other.
"""

import errno as errors
import os

import numpy as np

from libc.errno cimport EINTR, EINVAL, ENODATA, ENXIO, errno
from libc.stdint cimport int64_t
from libc.stdlib cimport free, realloc
from posix.types cimport off_t

from dirtylog._bits.copying cimport HeldBuffer, check_packed, check_plain, extents_pointer, hold

__all__ = ["UNSUPPORTED", "data_extents", "read_extents", "rename_noreplace", "sync_directory", "write_extents"]

# What a file system answers to what it cannot do at all.
UNSUPPORTED = (errors.EINVAL, errors.ENOSYS, errors.ENOTSUP, errors.EOPNOTSUPP, errors.ENOLCK)

# Extents that are neighbours in the file go into one system call, as many as this.
cdef enum:
    VECTORS = 64


cdef extern from "<sys/uio.h>" nogil:
    cdef struct iovec:
        void *iov_base
        size_t iov_len
    ssize_t pwritev(int fd, const iovec *iov, int iovcnt, off_t offset)
    ssize_t preadv(int fd, const iovec *iov, int iovcnt, off_t offset)


# renameat2() is younger than the oldest libc this builds with; the system call is not.
cdef extern from *:
    """
    #include <errno.h>
    #include <fcntl.h>
    #include <sys/syscall.h>
    #include <unistd.h>

    static int dl_rename_noreplace(const char *source, const char *target)
    {
    #ifdef SYS_renameat2
        return (int)syscall(SYS_renameat2, AT_FDCWD, source, AT_FDCWD, target, 1);
    #else
        (void)source;
        (void)target;
        errno = ENOSYS;
        return -1;
    #endif
    }
    """
    int dl_rename_noreplace(const char *source, const char *target) nogil


cdef extern from "<unistd.h>" nogil:
    off_t lseek(int fd, off_t offset, int whence)
    int SEEK_DATA
    int SEEK_HOLE


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


def rename_noreplace(source, target) -> None:
    """Rename a file to a name that no file has, in one step.

    Raises
    ------
    FileExistsError
        There is a file of that name; nothing has changed.
    OSError
        What ``renameat2`` answered; EINVAL or ENOSYS where the file system or the kernel cannot.
    """
    cdef bytes old = os.fsencode(source)
    cdef bytes new = os.fsencode(target)
    cdef const char *from_name = old
    cdef const char *to_name = new
    cdef int error = 0
    with nogil:
        if dl_rename_noreplace(from_name, to_name):
            error = errno
    if error:
        raise OSError(error, os.strerror(error), target)


def sync_directory(directory) -> None:
    """Make what was renamed and removed in a directory survive a power cut.

    Parameters
    ----------
    directory : str or path
        Empty is the current one.

    Raises
    ------
    OSError
        There is no such directory, or the disk failed.

    Notes
    -----
    Some file systems (some network and FUSE ones) cannot sync a directory; then all that is not written yet is synced.
    """
    descriptor = os.open(directory or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        os.sync()
    finally:
        os.close(descriptor)


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
