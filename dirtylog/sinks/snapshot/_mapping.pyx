# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
# cython: auto_pickle=False, autotestdict=False, freethreading_compatible=True, embedsignature=True
"""Maps the files of a chain over each other as one memory, and reads parts of them.

A piece is a row ``(offset in the memory, length, offset in the file)`` in bytes.

Nothing here believes a file: pieces are checked against the memory and the file's data, and a file against its size and
digest each time it is opened, before any of it is mapped.
"""

import os

cimport cython
from cpython.buffer cimport PyBuffer_FillInfo
from libc.errno cimport ENODATA, ENOENT, errno
from libc.stdint cimport int64_t, uintptr_t
from libc.string cimport memcmp
from posix.types cimport off_t
from posix.unistd cimport close

from dirtylog._bits.copying cimport HeldBuffer, check_plain, extents_pointer, hold
from dirtylog.sinks.snapshot._files cimport DIGEST_AT, DIGEST_BYTES, TRAILER_BYTES, dl_open_regular, dl_read_all

__all__ = ["Memory", "holes_take_room", "read_parts"]


cdef extern from *:
    """
    #include <sys/mman.h>

    /* Address space is reserved, not memory: a sparse memory may be larger than the machine. */
    #ifdef MAP_NORESERVE
    #define DL_RESERVE MAP_NORESERVE
    #else
    #define DL_RESERVE 0
    #endif

    static void *dl_map_nothing(size_t nbytes)
    {
        return mmap(NULL, nbytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | DL_RESERVE, -1, 0);
    }

    #ifdef __linux__
    #include <sys/vfs.h>
    #endif

    /* tmpfs gives a hole a page when it is read through a mapping. */
    static int dl_holes_take_room(const char *path)
    {
    #ifdef __linux__
        struct statfs about;
        return statfs(path, &about) == 0 && about.f_type == 0x01021994;
    #else
        return 0;
    #endif
    }

    static int dl_map_over(void *address, size_t nbytes, int fd, off_t offset)
    {
        return mmap(address, nbytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_FIXED | DL_RESERVE, fd, offset)
               == MAP_FAILED ? -1 : 0;
    }
    """
    void *MAP_FAILED
    int MADV_DONTNEED
    int dl_holes_take_room(const char *path) nogil
    void *dl_map_nothing(size_t nbytes) nogil
    int dl_map_over(void *address, size_t nbytes, int fd, off_t offset) nogil
    int munmap(void *address, size_t nbytes) nogil
    int madvise(void *address, size_t nbytes, int advice) nogil


cdef int open_checked(const char *path, const char *digest, off_t footer, int *fd) noexcept nogil:
    """Open a file if it is the one that it was: 0; 1 if it is not; -errno. `fd` is to be closed if it is not below 0.

    By its size and its digest of now: mapped past its end, a file that was cut would end the process.
    """
    cdef char trailer[TRAILER_BYTES]
    cdef off_t size = 0
    cdef int error
    fd[0] = dl_open_regular(path, &size)
    if fd[0] < 0:
        return 1 if fd[0] in (-ENOENT, -ENODATA) else fd[0]
    if size < footer + TRAILER_BYTES:
        return 1
    error = dl_read_all(fd[0], trailer, TRAILER_BYTES, size - TRAILER_BYTES)
    if error:
        return error
    return memcmp(trailer + DIGEST_AT, digest, DIGEST_BYTES) != 0


cdef const int64_t *pieces_pointer(const int64_t[:, ::1] pieces) except? NULL:
    if pieces.shape[1] != 3:
        raise ValueError(f"pieces have {pieces.shape[1]} columns; 3 are needed: offset in the memory, length, offset "
                         "in the file, all in bytes")
    return &pieces[0, 0] if pieces.shape[0] else NULL


cdef int check_pieces(const int64_t *pieces, Py_ssize_t n, int64_t begin, int64_t end, int64_t data) except -1:
    """Refuse pieces that do not lie in the memory from `begin` to `end`, or not in so many bytes of the file."""
    cdef Py_ssize_t i
    cdef int64_t offset, length, place
    for i in range(n):
        offset, length, place = pieces[3 * i], pieces[3 * i + 1], pieces[3 * i + 2]
        if length < 0 or offset < begin or offset > end - length or place < 0 or place > data - length:
            raise IndexError(f"piece {i} is {length} bytes at {offset} of the memory and {place} of the file; the "
                             f"memory is bytes {begin} to {end}, and the data of the file has {data}")
    return 0


cdef int copy_parts(int fd, char *target, const int64_t *pieces, Py_ssize_t n, int64_t begin) noexcept nogil:
    """Read pieces of a file to where they belong in memory that begins at `begin`."""
    cdef Py_ssize_t i
    cdef int error
    for i in range(n):
        error = dl_read_all(fd, target + (pieces[3 * i] - begin), <size_t>pieces[3 * i + 1], pieces[3 * i + 2])
        if error:
            return error
    return 0


def holes_take_room(path):
    """Say whether the file system of a file makes room for a hole that is read through a mapping.

    Where there is none left, as in a tmpfs that is full, the reader is ended by SIGBUS.
    """
    cdef bytes name = os.fsencode(path)
    cdef const char *text = name
    cdef bint answer
    with nogil:
        answer = dl_holes_take_room(text)
    return answer


def read_parts(path, bytes digest not None, int64_t footer, buffer, int64_t begin,
               const int64_t[:, ::1] pieces):
    """Read pieces of a file into a buffer that holds the memory from `begin` on.

    Parameters
    ----------
    path, digest, footer
        As for :meth:`Memory.lay`.
    buffer : buffer
        Writable.
    begin : int
        Where it begins in the memory, in bytes.
    pieces : int64 array of shape (n, 3)
        Offset in the memory, length, and offset in the file, in bytes.

    Returns
    -------
    bool
        False: the file is not there, or is another one; nothing was read.

    Raises
    ------
    OSError
        The file cannot be read.
    IndexError
        A piece does not lie in the buffer and in the file; nothing was read.
    """
    cdef HeldBuffer memory = hold(buffer, True, "buffer")
    cdef bytes name = os.fsencode(path)
    cdef const char *text = name
    cdef const char *expected = digest
    cdef const int64_t *rows = pieces_pointer(pieces)
    cdef Py_ssize_t n = pieces.shape[0]
    cdef char *target = memory.start()
    cdef int fd = -1, answer
    if len(digest) != DIGEST_BYTES:
        raise ValueError(f"a digest has {DIGEST_BYTES} bytes, not {len(digest)}")
    check_pieces(rows, n, begin, begin + <int64_t>memory.raw.len, footer)
    with nogil:
        answer = open_checked(text, expected, footer, &fd)
        if answer == 0:
            answer = copy_parts(fd, target, rows, n, begin)
        if fd >= 0:
            close(fd)
    if answer < 0:
        raise OSError(-answer, os.strerror(-answer), path)
    return answer == 0


@cython.final
cdef class Memory:
    """Private memory that files are mapped into; unmapped when the last array over it is gone.

    Parameters
    ----------
    nbytes : int
        How many bytes it lends.

    Attributes
    ----------
    address, nbytes, mapped : int
        Where it begins, how many bytes it lends, and how many are mapped: whole pages of the system.

    Raises
    ------
    MemoryError
        There is no room in the address space.

    Notes
    -----
    The child of a fork has a copy of its own, as of any private memory.
    """

    cdef char *start
    cdef size_t length
    cdef readonly Py_ssize_t nbytes
    cdef object __weakref__

    def __cinit__(self, Py_ssize_t nbytes, Py_ssize_t page_bytes):
        cdef void *found
        if nbytes <= 0 or nbytes > <int64_t>1 << 62:
            raise ValueError(f"{nbytes} bytes cannot be mapped")
        self.length = <size_t>((nbytes + page_bytes - 1) // page_bytes * page_bytes)
        with nogil:
            found = dl_map_nothing(self.length)
        if found == MAP_FAILED:
            raise MemoryError(f"no room to map {nbytes} bytes")
        self.start = <char *>found
        self.nbytes = nbytes

    def __dealloc__(self):
        if self.start != NULL:
            munmap(self.start, self.length)

    def __getbuffer__(self, Py_buffer *view, int flags):
        PyBuffer_FillInfo(view, self, self.start, self.nbytes, False, flags)

    @property
    def address(self):
        return <uintptr_t>self.start

    @property
    def mapped(self):
        return self.length

    def lay(self, path, bytes digest not None, int64_t footer, const int64_t[:, ::1] whole,
            const int64_t[:, ::1] parts):
        """Lay a file over the memory.

        Parameters
        ----------
        path : str
            The file.
        digest : bytes
            What its trailer says.
        footer : int
            Where its footer begins.
        whole : int64 array of shape (n, 3)
            Pieces to map, in whole pages of the system: offset in the memory, length, and offset in the file, in bytes.
        parts : int64 array of shape (n, 3)
            Pieces to copy.

        Returns
        -------
        bool
            False: the file is not there, or is another one; nothing was laid.

        Raises
        ------
        OSError
            The file cannot be read; ENOMEM: there are too many mappings. What is mapped is then unknown.
        IndexError
            A piece does not lie in the memory and in the file; nothing was laid.
        """
        cdef bytes name = os.fsencode(path)
        cdef const char *text = name
        cdef const char *expected = digest
        cdef const int64_t *map_rows = pieces_pointer(whole)
        cdef const int64_t *copy_rows = pieces_pointer(parts)
        cdef Py_ssize_t n = whole.shape[0], m = parts.shape[0], i
        cdef int fd = -1, answer
        if len(digest) != DIGEST_BYTES:
            raise ValueError(f"a digest has {DIGEST_BYTES} bytes, not {len(digest)}")
        check_pieces(map_rows, n, 0, <int64_t>self.length, footer)
        check_pieces(copy_rows, m, 0, <int64_t>self.nbytes, footer)
        with nogil:
            answer = open_checked(text, expected, footer, &fd)
            if answer == 0:
                for i in range(n):
                    if dl_map_over(self.start + map_rows[3 * i], <size_t>map_rows[3 * i + 1], fd, map_rows[3 * i + 2]):
                        answer = -errno
                        break
            if answer == 0:
                answer = copy_parts(fd, self.start, copy_rows, m, 0)
            if fd >= 0:
                close(fd)
        if answer < 0:
            raise OSError(-answer, os.strerror(-answer), path)
        return answer == 0

    def forget(self, const int64_t[:, ::1] extents):
        """Drop this process's copies of mapped pages: the next access reads the file's again.

        Parameters
        ----------
        extents : int64 array of shape (n, 2)
            Offset and length in bytes, in whole pages of the system.

        Raises
        ------
        OSError
            What ``madvise`` answered: EINVAL where pages are locked or not whole.
        """
        cdef const int64_t *rows = extents_pointer(extents)
        cdef Py_ssize_t n = extents.shape[0], i
        cdef int error = 0
        check_plain(rows, n, <int64_t>self.length, "the memory")
        with nogil:
            for i in range(n):
                if madvise(self.start + rows[2 * i], <size_t>rows[2 * i + 1], MADV_DONTNEED):
                    error = errno
                    break
        if error:
            raise OSError(error, f"pages cannot be given back: {os.strerror(error)}")
