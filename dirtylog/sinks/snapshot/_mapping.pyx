# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
# cython: auto_pickle=False, autotestdict=False, freethreading_compatible=True, embedsignature=True
"""Maps the files of a chain over each other: footers read in one go, runs of pages composed, memory laid out.

Nothing here believes a file: what a footer says is checked by the caller, extents are checked against the memory, and
a file against its size and digest each time it is opened, before any of it is mapped.
"""

import os

import numpy as np

cimport cython
from cpython.buffer cimport PyBuffer_FillInfo
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.errno cimport EINTR, ENODATA, ENOENT, errno
from libc.stdint cimport INT64_MAX, int64_t, uintptr_t
from libc.stdlib cimport free, malloc, realloc
from libc.string cimport memcmp, memcpy
from posix.types cimport mode_t, off_t

from dirtylog._bits.copying cimport HeldBuffer, check_plain, extents_pointer, hold

__all__ = ["Memory", "RunTable", "diff_header", "read_footer", "read_parts"]

# What stands at the end of a file, and where its digest lies there.
cdef enum:
    TRAILER_BYTES = 64
    SMALL_FOOTER = 4096
    DIGEST_AT = 40
    DIGEST_BYTES = 16


cdef extern from "<fcntl.h>" nogil:
    int open(const char *path, int flags, ...)
    int O_RDONLY
    int O_CLOEXEC
    int O_NONBLOCK


cdef extern from "<sys/stat.h>" nogil:
    cdef struct stat:
        mode_t st_mode
        off_t st_size
    int fstat(int fd, stat *status)
    bint S_ISREG(mode_t mode)


cdef extern from "<unistd.h>" nogil:
    int close(int fd)
    ssize_t pread(int fd, void *buffer, size_t nbytes, off_t offset)


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

    static int dl_map_over(void *address, size_t nbytes, int fd, off_t offset)
    {
        return mmap(address, nbytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_FIXED | DL_RESERVE, fd, offset)
               == MAP_FAILED ? -1 : 0;
    }
    """
    void *MAP_FAILED
    int MADV_DONTNEED
    void *dl_map_nothing(size_t nbytes) nogil
    int dl_map_over(void *address, size_t nbytes, int fd, off_t offset) nogil
    int munmap(void *address, size_t nbytes) nogil
    int madvise(void *address, size_t nbytes, int advice) nogil


cdef int open_regular(const char *path, off_t *size) noexcept nogil:
    """Open a regular file for reading and say how long it is; -errno, and -ENODATA for what is not one."""
    cdef stat status
    # Not blocking: a name in a directory that somebody else fills may be a pipe.
    cdef int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK)
    if fd < 0:
        return -errno
    if fstat(fd, &status) or not S_ISREG(status.st_mode):
        close(fd)
        return -ENODATA
    size[0] = status.st_size
    return fd


cdef int read_all(int fd, char *target, size_t nbytes, off_t offset) noexcept nogil:
    cdef ssize_t done
    while nbytes:
        done = pread(fd, target, nbytes, offset)
        if done < 0 and errno == EINTR:
            continue
        if done <= 0:
            return -errno if done < 0 else -ENODATA
        target += done
        offset += done
        nbytes -= <size_t>done
    return 0


cdef int open_checked(const char *path, const char *digest, off_t footer, int *fd) noexcept nogil:
    """Open a file if it is the one that it was: 0; 1 if it is not; -errno. `fd` is to be closed if it is not below 0.

    By its size and its digest of now: mapped past its end, a file that was cut would end the process.
    """
    cdef char trailer[TRAILER_BYTES]
    cdef off_t size = 0
    cdef int error
    fd[0] = open_regular(path, &size)
    if fd[0] < 0:
        return 1 if fd[0] in (-ENOENT, -ENODATA) else fd[0]
    if size < footer + TRAILER_BYTES:
        return 1
    error = read_all(fd[0], trailer, TRAILER_BYTES, size - TRAILER_BYTES)
    if error:
        return error
    return memcmp(trailer + DIGEST_AT, digest, DIGEST_BYTES) != 0


cdef int copy_parts(int fd, char *target, const int64_t *extents, Py_ssize_t n, int64_t begin) noexcept nogil:
    """Read extents of a file to where they belong in memory that begins at `begin`."""
    cdef Py_ssize_t i
    cdef int error
    for i in range(n):
        error = read_all(fd, target + (extents[2 * i] - begin), <size_t>extents[2 * i + 1], extents[2 * i])
        if error:
            return error
    return 0


def read_footer(path, int64_t offset, Py_ssize_t room):
    """Read a file from `offset` to its end.

    Parameters
    ----------
    path : str
        The file.
    offset : int
        Where its footer begins if it is of the size that is expected.
    room : int
        How many bytes there may be.

    Returns
    -------
    bytes or None
        None: there is no such file, or what it is needs a closer look.
    """
    cdef bytes name = os.fsencode(path)
    cdef const char *text = name
    cdef char small[SMALL_FOOTER]
    cdef off_t size = 0
    cdef ssize_t done
    cdef int fd, error
    cdef bytes found
    cdef char *into
    with nogil:
        # Not blocking: a name in a directory that somebody else fills may be a pipe.
        fd = open(text, O_RDONLY | O_CLOEXEC | O_NONBLOCK)
        done = pread(fd, small, SMALL_FOOTER, offset) if fd >= 0 else -1
        if fd >= 0 and done < SMALL_FOOTER:
            # The usual case, and all of it: a read that is short has met the end of the file.
            close(fd)
            fd = -1
    if fd < 0:
        return PyBytes_FromStringAndSize(small, done) if done >= TRAILER_BYTES and done <= room else None
    close(fd)
    with nogil:
        fd = open_regular(text, &size)
    if fd < 0:
        return None
    if not TRAILER_BYTES <= size - offset <= room:
        close(fd)
        return None
    try:
        found = PyBytes_FromStringAndSize(NULL, size - offset)
        into = PyBytes_AS_STRING(found)
        with nogil:
            error = read_all(fd, into, <size_t>(size - offset), offset)
    finally:
        close(fd)
    return None if error else found


# ---- the header of a diff, as it is nearly always --------------------------------------------------------------------

cdef struct Scanner:
    const char *at
    const char *end
    bint good


cdef void literal(Scanner *scanner, const char *text, size_t n) noexcept nogil:
    if scanner.good and <size_t>(scanner.end - scanner.at) >= n and memcmp(scanner.at, text, n) == 0:
        scanner.at += n
    else:
        scanner.good = False


cdef int64_t number(Scanner *scanner) noexcept nogil:
    """A number as JSON writes it, below 2**63."""
    cdef const char *start = scanner.at
    cdef int64_t value = 0
    while scanner.at < scanner.end and 48 <= scanner.at[0] <= 57:
        if value > (INT64_MAX - (scanner.at[0] - 48)) // 10:
            scanner.good = False
            return 0
        value = 10 * value + (scanner.at[0] - 48)
        scanner.at += 1
    if scanner.at == start or (start[0] == 48 and scanner.at - start > 1):
        scanner.good = False
    return value


cdef const char *word(Scanner *scanner, size_t least, size_t most, bint hexadecimal) noexcept nogil:
    """Characters of a plain name, or hexadecimal digits."""
    cdef const char *start = scanner.at
    cdef char c
    while scanner.at < scanner.end:
        c = scanner.at[0]
        if not (48 <= c <= 57 or 97 <= c <= 102):
            if hexadecimal or not (65 <= c <= 90 or 97 <= c <= 122 or c == 95 or c == 45 or
                                   (c == 46 and scanner.at > start)):
                break
        scanner.at += 1
    if not least <= <size_t>(scanner.at - start) <= most:
        scanner.good = False
    return start


cdef bint either(Scanner *scanner, const char *one, size_t n, const char *other, size_t m) noexcept nogil:
    """Whether it goes on with `one`; no good if with neither."""
    if scanner.good and <size_t>(scanner.end - scanner.at) >= n and memcmp(scanner.at, one, n) == 0:
        scanner.at += n
        return True
    literal(scanner, other, m)
    return False


def diff_header(bytes text not None, Py_ssize_t nbytes, bytes size not None, bytes regions not None):
    """Read the header of a diff that differs from its child's in its own numbers and names alone.

    Parameters
    ----------
    text : bytes
        A footer, which begins with the header.
    nbytes : int
        Length of the header.
    size, regions : bytes
        What stands between kind and count, and between algorithm and state.

    Returns
    -------
    tuple or None
        Pages, runs, the parent's name and digest, what the file holds (or None), and bytes of state. None: it is
        anything else than what a writer writes for a plain name, so it needs a closer look.
    """
    cdef Scanner scanner
    cdef const char *parent
    cdef const char *digest
    cdef const char *holds = NULL
    cdef Py_ssize_t parent_bytes
    cdef int64_t count, rows, state
    if not 16 <= nbytes <= len(text) or nbytes % 16:
        return None
    scanner.at = PyBytes_AS_STRING(text)
    scanner.end = scanner.at + nbytes
    scanner.good = True
    literal(&scanner, b'{"format":"dirtylog-snapshot","id":"', 36)
    word(&scanner, 32, 32, True)
    literal(&scanner, b'","kind":"diff"', 15)
    literal(&scanner, PyBytes_AS_STRING(size), <size_t>len(size))
    literal(&scanner, b',"count":', 9)
    count = number(&scanner)
    literal(&scanner, b',"rows":', 8)
    rows = number(&scanner)
    literal(&scanner, b',"exact":', 9)
    either(&scanner, b"true", 4, b"false", 5)
    literal(&scanner, b',"parent":"', 11)
    parent = word(&scanner, 1, 200, False)
    parent_bytes = scanner.at - parent
    literal(&scanner, b'","parent_digest":"', 19)
    digest = word(&scanner, 32, 32, True)
    if not either(&scanner, b'","holds":null,"time":', 22, b'","holds":"', 11):
        holds = word(&scanner, 32, 32, True)
        literal(&scanner, b'","time":', 9)
    number(&scanner)
    if not either(&scanner, b',"epoch":null,"algorithm":"', 27, b',"epoch":', 9):
        number(&scanner)
        literal(&scanner, b',"algorithm":"', 14)
    either(&scanner, b"xxh3_128", 8, b"blake2b_128", 11)
    literal(&scanner, PyBytes_AS_STRING(regions), <size_t>len(regions))
    literal(&scanner, b',"state":', 9)
    state = number(&scanner)
    literal(&scanner, b"}", 1)
    # Filled up with fewer than 16 spaces, and a line feed.
    if scanner.end - scanner.at > 16:
        scanner.good = False
    while scanner.good and scanner.end - scanner.at > 1:
        literal(&scanner, b" ", 1)
    literal(&scanner, b"\n", 1)
    if not scanner.good:
        return None
    return (count, rows, parent[:parent_bytes].decode(), digest[:32].decode(),
            None if holds == NULL else holds[:32].decode(), state)


# ---- which file of a chain has which page ---------------------------------------------------------------------------

# A row is first page, number of pages, number of the file.
cdef struct Row:
    int64_t first
    int64_t count
    int64_t file


cdef size_t merge(const Row *newer, size_t n, const Row *older, size_t m, Row *out) noexcept nogil:
    """Lay rows over older ones, both ascending and apart; return how many rows that makes: at most 2 n + m."""
    cdef size_t i = 0, j = 0, made = 0
    cdef int64_t begin = older[0].first if m else 0
    cdef int64_t end, stop
    while i < n or j < m:
        if j == m or (i < n and newer[i].first <= begin):
            out[made] = newer[i]
            made += 1
            end = newer[i].first + newer[i].count
            i += 1
            while j < m and older[j].first + older[j].count <= end:
                j += 1
                if j < m:
                    begin = older[j].first
            if j < m and begin < end:
                begin = end
            continue
        stop = older[j].first + older[j].count
        if i < n and newer[i].first < stop:
            stop = newer[i].first
        out[made].first = begin
        out[made].count = stop - begin
        out[made].file = older[j].file
        made += 1
        if stop == older[j].first + older[j].count:
            j += 1
            if j < m:
                begin = older[j].first
        else:
            begin = stop
    return made


@cython.final
cdef class RunTable:
    """The runs of pages that the files of a chain hold, newest file first; composed, they say who has which page.

    Parameters
    ----------
    most : int
        How many runs are kept. A chain with more of them is not composed: memory stays bounded.

    Notes
    -----
    Not thread-safe. 24 bytes per run, and while it composes 96 more.
    """

    cdef Row *rows
    cdef size_t used, capacity, most
    cdef list ends
    cdef readonly bint full

    def __cinit__(self, size_t most):
        self.most = most
        self.ends = []

    def __dealloc__(self):
        free(self.rows)

    cdef int reserve(self, size_t more) except -1:
        cdef size_t capacity
        cdef Row *larger
        if self.full or more > self.most - self.used:
            self.full = True
            return 0
        if self.used + more > self.capacity:
            capacity = max(self.used + more, min(2 * self.capacity + 64, self.most))
            larger = <Row *>realloc(self.rows, capacity * sizeof(Row))
            if larger == NULL:
                raise MemoryError(f"no memory for {capacity} runs of pages")
            self.rows = larger
            self.capacity = capacity
        return 1

    def take(self, bytes text not None, Py_ssize_t at, Py_ssize_t rows, int64_t npages, int64_t file):
        """Add the runs of a file, as pairs of int64 in its footer, checked.

        Parameters
        ----------
        text : bytes
            The footer.
        at, rows : int
            Where the runs begin there, and how many there are.
        npages : int
            Pages of the memory.
        file : int
            What to call the file.

        Returns
        -------
        tuple of int, or None
            How many pages, and the page after the last; None if they are not in bounds, ascending and apart.
        """
        cdef const int64_t *runs
        cdef int64_t past = -1, count = 0, first, length
        cdef Py_ssize_t i
        if at < 0 or rows < 0 or at % 8 or rows > (len(text) - at) // 16:
            return None
        runs = <const int64_t *>(PyBytes_AS_STRING(text) + at)
        for i in range(rows):
            first = runs[2 * i]
            length = runs[2 * i + 1]
            if first <= past or length <= 0 or first > npages or length > npages - first:
                return None
            past = first + length
            count += length
        if self.reserve(<size_t>rows):
            for i in range(rows):
                self.rows[self.used] = Row(runs[2 * i], runs[2 * i + 1], file)
                self.used += 1
            self.ends.append(self.used)
        return count, past

    def add(self, blocks, int64_t file):
        """Add the runs of a file from blocks of them, which were checked."""
        cdef const int64_t[:, ::1] runs
        cdef Py_ssize_t i
        for block in blocks:
            runs = block
            if not self.reserve(<size_t>runs.shape[0]):
                return
            for i in range(runs.shape[0]):
                self.rows[self.used] = Row(runs[i, 0], runs[i, 1], file)
                self.used += 1
        if not self.full:
            self.ends.append(self.used)

    def composed(self):
        """Say which file has which page: the newest that holds it.

        Returns
        -------
        int64 array of shape (n, 3)
            First page, number of pages, and the file, ascending; pages that no file holds are not in it.

        Notes
        -----
        O(runs * log files), without the GIL.
        """
        cdef Py_ssize_t n = len(self.ends), i, kept
        cdef size_t begin, middle, end, made
        cdef size_t *starts = <size_t *>malloc(<size_t>(n + 1) * sizeof(size_t))
        # Each run that is laid over others adds at most one piece, so no step makes more than twice as many.
        cdef Row *source = <Row *>malloc((2 * self.used + 1) * sizeof(Row))
        cdef Row *target = <Row *>malloc((2 * self.used + 1) * sizeof(Row))
        cdef int64_t[:, ::1] view
        try:
            if starts == NULL or source == NULL or target == NULL:
                raise MemoryError(f"no memory for {4 * self.used} runs of pages")
            starts[0] = 0
            for i in range(n):
                starts[i + 1] = self.ends[i]
            with nogil:
                if self.used:
                    memcpy(source, self.rows, self.used * sizeof(Row))
                # Neighbours in pairs, newer over older, until one is left.
                while n > 1:
                    made = 0
                    kept = 0
                    for i in range(0, n, 2):
                        begin = starts[i]
                        middle = starts[i + 1]
                        end = starts[min(i + 2, n)]
                        starts[kept] = made
                        kept += 1
                        made += merge(source + begin, middle - begin, source + middle, end - middle, target + made)
                    starts[kept] = made
                    n = kept
                    source, target = target, source
            made = starts[n] if n else 0
            result = np.empty((made, 3), np.int64)
            if made:
                view = result
                memcpy(&view[0, 0], source, made * sizeof(Row))
            return result
        finally:
            free(starts)
            free(source)
            free(target)


# ---- reading and mapping --------------------------------------------------------------------------------------------

def read_parts(path, bytes digest not None, int64_t footer, buffer, int64_t begin, const int64_t[:, ::1] extents):
    """Read extents of a file into a buffer that holds the memory from `begin` on.

    Parameters
    ----------
    path, digest, footer
        As for :meth:`Memory.lay`.
    buffer : buffer
        Writable.
    begin : int
        Where it begins in the memory, in bytes.
    extents : int64 array of shape (n, 2)
        Offset and length in bytes.

    Returns
    -------
    bool
        False: the file is not there, or is another one; nothing was read.

    Raises
    ------
    OSError
        The file cannot be read.
    IndexError
        An extent does not lie in the buffer and in the file; nothing was read.
    """
    cdef HeldBuffer memory = hold(buffer, True, "buffer")
    cdef bytes name = os.fsencode(path)
    cdef const char *text = name
    cdef const char *expected = digest
    cdef const int64_t *rows = extents_pointer(extents)
    cdef Py_ssize_t n = extents.shape[0], i
    cdef char *target = memory.start()
    cdef int fd = -1, answer
    if len(digest) != DIGEST_BYTES:
        raise ValueError(f"a digest has {DIGEST_BYTES} bytes, not {len(digest)}")
    check_plain(rows, n, min(begin + <int64_t>memory.raw.len, footer), "the buffer, or the data of the file,")
    for i in range(n):
        if rows[2 * i] < begin:
            raise IndexError(f"extent {i} begins at {rows[2 * i]}; the buffer begins at {begin}")
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
        whole : int64 array of shape (n, 2)
            Extents to map: offset and length in bytes, in whole pages of the system.
        parts : int64 array of shape (n, 2)
            Extents to copy.

        Returns
        -------
        bool
            False: the file is not there, or is another one; nothing was laid.

        Raises
        ------
        OSError
            The file cannot be read; ENOMEM: there are too many mappings. What is mapped is then unknown.
        IndexError
            An extent does not lie in the memory and in the file; nothing was laid.
        """
        cdef bytes name = os.fsencode(path)
        cdef const char *text = name
        cdef const char *expected = digest
        cdef const int64_t *map_rows = extents_pointer(whole)
        cdef const int64_t *copy_rows = extents_pointer(parts)
        cdef Py_ssize_t n = whole.shape[0], m = parts.shape[0], i
        cdef int fd = -1, answer
        if len(digest) != DIGEST_BYTES:
            raise ValueError(f"a digest has {DIGEST_BYTES} bytes, not {len(digest)}")
        check_plain(map_rows, n, min(<int64_t>self.length, footer), "the memory, or the data of the file,")
        check_plain(copy_rows, m, min(<int64_t>self.nbytes, footer), "the memory, or the data of the file,")
        with nogil:
            answer = open_checked(text, expected, footer, &fd)
            if answer == 0:
                for i in range(n):
                    if dl_map_over(self.start + map_rows[2 * i], <size_t>map_rows[2 * i + 1], fd, map_rows[2 * i]):
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
