# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
# cython: auto_pickle=False, autotestdict=False, freethreading_compatible=True, embedsignature=True
"""Follows the diffs of a chain by their footers, each read in one go, and says which file has which page.

Nothing here believes a file: what a footer says is checked, and whatever is not what a writer writes is left to a
closer look.
"""

import os
from hashlib import blake2b

import numpy as np

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.exc cimport PyErr_CheckSignals
from libc.stdint cimport INT64_MAX, int64_t
from libc.stdlib cimport free, malloc, realloc
from libc.string cimport memcmp, memcpy
from posix.types cimport off_t
from posix.unistd cimport close

from dirtylog.sinks.snapshot._files cimport DIGEST_AT, DIGEST_BYTES, TRAILER_BYTES, dl_open_regular, dl_read_all

__all__ = ["RunTable", "check_runs", "diff_header", "follow_diffs"]

cdef enum:
    # Where the footer's offset lies in the trailer.
    OFFSET_AT = 16
    SMALL_FOOTER = 4096
    ALIGNMENT = 4096
    # The layouts, see layout.py.
    PLAIN = 2
    PACKED = 3
    # A footer that is read in one go; a longer one is read in blocks.
    MAX_TAIL = 1048576


cdef bytes footer_of(const char *path, Py_ssize_t room):
    """Read a file from where its trailer says that the footer begins; None if that is nowhere, or more than `room`."""
    cdef char small[SMALL_FOOTER]
    cdef off_t size = 0
    cdef int64_t offset = 0
    cdef int fd, error = 0
    cdef Py_ssize_t tail = 0, length
    cdef bytes found
    cdef char *into
    with nogil:
        fd = dl_open_regular(path, &size)
        if fd >= 0:
            tail = min(<Py_ssize_t>size, <Py_ssize_t>SMALL_FOOTER)
            error = dl_read_all(fd, small, <size_t>tail, size - tail)
    if fd < 0:
        return None
    try:
        if error or tail < TRAILER_BYTES:
            return None
        memcpy(&offset, small + tail - TRAILER_BYTES + OFFSET_AT, sizeof(offset))
        if not 0 <= offset <= size - TRAILER_BYTES or size - offset > room:
            return None
        length = <Py_ssize_t>(size - offset)
        if length <= tail:
            # The usual case: all of it is there.
            return PyBytes_FromStringAndSize(small + tail - length, length)
        found = PyBytes_FromStringAndSize(NULL, length)
        into = PyBytes_AS_STRING(found)
        with nogil:
            error = dl_read_all(fd, into, <size_t>length, offset)
        return None if error else found
    finally:
        close(fd)


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


cdef struct Header:
    int64_t count
    int64_t rows
    int64_t state
    const char *parent
    Py_ssize_t parent_bytes
    const char *digest
    const char *holds  # NULL where there is none
    # What the trailer says.
    bint packed
    int64_t footer


cdef bint scan_header(bytes text, Py_ssize_t nbytes, bytes size, bytes regions, Header *found) noexcept:
    """Read the header of a diff that differs from its child's in its own numbers and names alone.

    False: it is anything else than what a writer writes for a plain name, so it needs a closer look.
    """
    cdef Scanner scanner
    if not 16 <= nbytes <= len(text) or nbytes % 16:
        return False
    scanner.at = PyBytes_AS_STRING(text)
    scanner.end = scanner.at + nbytes
    scanner.good = True
    literal(&scanner, b'{"format":"dirtylog-snapshot","id":"', 36)
    word(&scanner, 32, 32, True)
    literal(&scanner, b'","kind":"diff"', 15)
    literal(&scanner, PyBytes_AS_STRING(size), <size_t>len(size))
    literal(&scanner, b',"count":', 9)
    found.count = number(&scanner)
    literal(&scanner, b',"rows":', 8)
    found.rows = number(&scanner)
    literal(&scanner, b',"exact":', 9)
    either(&scanner, b"true", 4, b"false", 5)
    literal(&scanner, b',"parent":"', 11)
    found.parent = word(&scanner, 1, 200, False)
    found.parent_bytes = scanner.at - found.parent
    literal(&scanner, b'","parent_digest":"', 19)
    found.digest = word(&scanner, 32, 32, True)
    found.holds = NULL
    if not either(&scanner, b'","holds":null,"time":', 22, b'","holds":"', 11):
        found.holds = word(&scanner, 32, 32, True)
        literal(&scanner, b'","time":', 9)
    number(&scanner)
    if not either(&scanner, b',"epoch":null,"algorithm":"', 27, b',"epoch":', 9):
        number(&scanner)
        literal(&scanner, b',"algorithm":"', 14)
    either(&scanner, b"xxh3_128", 8, b"blake2b_128", 11)
    literal(&scanner, PyBytes_AS_STRING(regions), <size_t>len(regions))
    literal(&scanner, b',"state":', 9)
    found.state = number(&scanner)
    literal(&scanner, b"}", 1)
    # Filled up with fewer than 16 spaces, and a line feed.
    if scanner.end - scanner.at > 16:
        scanner.good = False
    while scanner.good and scanner.end - scanner.at > 1:
        literal(&scanner, b" ", 1)
    literal(&scanner, b"\n", 1)
    return scanner.good


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
    cdef Header found
    if not scan_header(text, nbytes, size, regions, &found):
        return None
    return (found.count, found.rows, found.parent[:found.parent_bytes].decode(), found.digest[:32].decode(),
            None if found.holds == NULL else found.holds[:32].decode(), found.state)


# ---- which file of a chain has which page ---------------------------------------------------------------------------

# A row is first page, number of pages, number of the file, and where in it the first page lies, in pages.
cdef struct Row:
    int64_t first
    int64_t count
    int64_t file
    int64_t place


cdef inline Row placed(const int64_t *run, int64_t file, int64_t before, bint packed) noexcept nogil:
    """Say where a run of pages lies in a file that holds so many pages before it: what layout.py says of bytes."""
    return Row(run[0], run[1], file, before if packed else run[0])


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
        out[made].place = older[j].place + (begin - older[j].first)
        made += 1
        if stop == older[j].first + older[j].count:
            j += 1
            if j < m:
                begin = older[j].first
        else:
            begin = stop
    return made


cdef bint ascending(const int64_t *runs, Py_ssize_t rows, int64_t npages, int64_t *count, int64_t *past) noexcept nogil:
    """Say whether runs are in bounds, ascending and apart; how many pages they have, and which is after the last.

    `past` is the page after the run before, or -1.
    """
    cdef int64_t first, length
    cdef Py_ssize_t i
    count[0] = 0
    for i in range(rows):
        first = runs[2 * i]
        length = runs[2 * i + 1]
        if first <= past[0] or length <= 0 or first > npages or length > npages - first:
            return False
        past[0] = first + length
        count[0] += length
    return True


def check_runs(bytes block not None, int64_t npages, int64_t past):
    """Check runs of pages, as pairs of int64 in a footer.

    Parameters
    ----------
    block : bytes
        Some of them.
    npages : int
        Pages of the memory.
    past : int
        The page after the run before; -1 where there is none.

    Returns
    -------
    tuple of int, or None
        How many pages, and the page after the last; None if they are not in bounds, ascending and apart.
    """
    cdef int64_t count = 0
    if not ascending(<const int64_t *>PyBytes_AS_STRING(block), len(block) // 16, npages, &count, &past):
        return None
    return count, past


@cython.final
cdef class RunTable:
    """The runs of pages that the files of a chain hold, newest file first; composed, they say who has which page.

    Parameters
    ----------
    most : int
        How many runs are kept. A chain with more of them is not composed: memory stays bounded.

    Notes
    -----
    Not thread-safe. 32 bytes per run, and while it composes 128 more.
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

    cdef int append(self, const int64_t *runs, Py_ssize_t rows, int64_t file, bint packed) except -1:
        """Add the runs of a file, which were checked."""
        cdef int64_t before = 0
        if self.reserve(<size_t>rows):
            self.place(runs, rows, file, &before, packed)
            self.ends.append(self.used)
        return 0

    cdef void place(self, const int64_t *runs, Py_ssize_t rows, int64_t file, int64_t *before,
                    bint packed) noexcept nogil:
        """Add runs, for which there is room; `before` is how many pages of the file were added before them."""
        cdef Py_ssize_t i
        for i in range(rows):
            self.rows[self.used] = placed(runs + 2 * i, file, before[0], packed)
            self.used += 1
            before[0] += runs[2 * i + 1]

    def take(self, bytes text not None, Py_ssize_t at, Py_ssize_t rows, int64_t npages, int64_t file,
             bint packed=False):
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
        packed : bool
            Whether its pages lie one after the other.

        Returns
        -------
        tuple of int, or None
            How many pages, and the page after the last; None if they are not in bounds, ascending and apart.
        """
        cdef int64_t count, past = -1
        if at < 0 or rows < 0 or at % 8 or rows > (len(text) - at) // 16:
            return None
        if not ascending(<const int64_t *>(PyBytes_AS_STRING(text) + at), rows, npages, &count, &past):
            return None
        self.append(<const int64_t *>(PyBytes_AS_STRING(text) + at), rows, file, packed)
        return count, past

    def add(self, blocks, int64_t file, bint packed=False):
        """Add the runs of a file from blocks of them, which were checked."""
        cdef const int64_t[:, ::1] runs
        cdef int64_t before = 0
        for block in blocks:
            runs = block
            if not self.reserve(<size_t>runs.shape[0]):
                return
            if runs.shape[0]:
                self.place(&runs[0, 0], runs.shape[0], file, &before, packed)
        if not self.full:
            self.ends.append(self.used)

    def composed(self):
        """Say which file has which page: the newest that holds it.

        Returns
        -------
        int64 array of shape (n, 4)
            First page, number of pages, the file, and where in it the first page lies, in pages. Ascending; pages that
            no file holds are not in it.

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
            result = np.empty((made, 4), np.int64)
            if made:
                view = result
                memcpy(&view[0, 0], source, made * sizeof(Row))
            return result
        finally:
            free(starts)
            free(source)
            free(target)


# What is alike in all files of a chain.
cdef struct Space:
    int64_t footer  # where the footer of a plain file begins
    int64_t npages
    int64_t page_size
    int64_t short  # by so much the last page is short of a whole one
    int64_t window  # bytes for which there is one digest


cdef Py_ssize_t judge(bytes text, bytes size, bytes regions, const Space *space, Header *found) noexcept:
    """Check all of a footer but its digest; return the length of its header, or 0 if it needs a closer look."""
    cdef const char *start = PyBytes_AS_STRING(text)
    cdef int64_t length = len(text) - TRAILER_BYTES
    # Layout, footer, header and length; on a machine that has the other byte order all footers need a closer look.
    cdef int64_t[4] numbers
    cdef int64_t count, past = -1, held, digests
    memcpy(numbers, start + length + 8, sizeof(numbers))
    if memcmp(start + length, b"dirtylog", 8) or memcmp(start + length + 56, b"SNAPEND\n", 8):
        return 0
    if numbers[0] not in (PLAIN, PACKED) or numbers[3] != length:
        return 0
    if not 0 < numbers[2] <= length or not scan_header(text, <Py_ssize_t>numbers[2], size, regions, found):
        return 0
    # In words of a bitmap where those are shorter than the runs.
    if found.rows > length or found.state > length or 16 * found.rows > 8 * ((space.npages + 63) // 64):
        return 0
    if numbers[2] + 16 * found.rows > length:
        return 0
    if not ascending(<const int64_t *>(start + numbers[2]), <Py_ssize_t>found.rows, space.npages, &count, &past):
        return 0
    held = count * space.page_size - (space.short if past == space.npages else 0)
    digests = DIGEST_BYTES * ((held + space.window - 1) // space.window)
    if count != found.count or numbers[2] + 16 * found.rows + digests + found.state != length:
        return 0
    found.packed = numbers[0] == PACKED
    found.footer = numbers[1]
    if found.footer != ((held + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT if found.packed else space.footer):
        return 0
    return <Py_ssize_t>numbers[2]


def follow_diffs(RunTable table not None, str directory not None, parent, geometry, alike, list files not None,
                 set digests not None, set identities not None, Py_ssize_t most):
    """Go up a chain for as long as its files are diffs that differ from their children in numbers and names alone.

    Parameters
    ----------
    table : RunTable
        Gets the runs of each.
    directory : str
        Where the files are.
    parent : tuple of str
        Name of the first, and what its child noted of it.
    geometry : tuple of int
        Where the footer of a plain file begins, pages, bytes per page, bytes by which the last page is short, bytes per
        digest.
    alike : tuple of bytes
        What stands in all their headers, see :func:`diff_header`.
    files, digests, identities : list, set, set
        What was found: path, digest and where the footer begins, of each; all digests; and what children note of them.
    most : int
        How many files there may be.

    Returns
    -------
    tuple of str
        The first that needs a closer look, as `parent`.

    Notes
    -----
    Four system calls and a digest per file.
    """
    cdef Space space
    cdef Header found
    cdef bytes text, size, regions, trailer
    cdef Py_ssize_t header
    cdef str name, noted, number, holds
    cdef bytes folder = os.fsencode(directory) + b"/"
    cdef bytes path
    space.footer, space.npages, space.page_size, space.short, space.window = geometry
    size, regions = alike
    name, noted = parent
    path = folder + os.fsencode(name)
    while len(files) < most:
        PyErr_CheckSignals()
        text = footer_of(path, MAX_TAIL)
        if text is None:
            break
        header = judge(text, size, regions, &space, &found)
        if header == 0:
            break
        trailer = text[-TRAILER_BYTES:]
        digest = blake2b(trailer[:DIGEST_AT], digest_size=DIGEST_BYTES)
        digest.update(text[:-TRAILER_BYTES])
        expected = trailer[DIGEST_AT : DIGEST_AT + DIGEST_BYTES]
        if digest.digest() != expected:
            break
        number = expected.hex()
        holds = number if found.holds == NULL else found.holds[:32].decode("ascii")
        if noted not in (number, holds) or number in digests:
            break
        digests.add(number)
        identities.add(number)
        identities.add(holds)
        files.append((f"{directory}/{name}", number, found.footer))
        table.append(<const int64_t *>(PyBytes_AS_STRING(text) + header), <Py_ssize_t>found.rows, -len(files),
                     found.packed)
        path = folder + found.parent[:found.parent_bytes]
        name = found.parent[:found.parent_bytes].decode("ascii")
        noted = found.digest[:32].decode("ascii")
    return name, noted
