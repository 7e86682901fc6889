# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
# cython: auto_pickle=False, autotestdict=False, freethreading_compatible=True, embedsignature=True
"""What tracking needs below Python: a buffer held in place, and spans of the write-protecting engines."""

from cpython.buffer cimport PyBuffer_FillInfo
from libc.errno cimport errno
from libc.stdint cimport uint32_t, uint64_t, uintptr_t
from libc.string cimport strerror

cimport cython

from dirtylog._bits.bits cimport dl_words_for
from dirtylog._bits.blocks cimport Block, block_new, no_words
from dirtylog._bits.pages cimport DirtyPages, pages_bare, pages_fill
from dirtylog._bits.sets cimport dl_pages_of_unaligned

from dirtylog._bits.flat import flat_array


cdef extern from "sources/memory/_maps.h" nogil:
    struct dl_mapping:
        uint64_t start
        uint64_t end
        char permissions[5]
        uint64_t page_size
        uint64_t inode
        uint32_t major
        uint32_t minor
    ctypedef int dl_mapping_visitor(const dl_mapping *mapping, const char *name, void *context) noexcept nogil
    int dl_maps_walk(uint64_t start, uint64_t end, int with_names, dl_mapping_visitor *visit, void *context)
    int dl_maps_readable(uint64_t start, uint64_t end)


cdef extern from "sources/memory/_spans.h" nogil:
    struct dl_span:
        int huge
    enum dl_step:
        DL_STEP_NONE
        DL_STEP_USERFAULTFD
        DL_STEP_API
        DL_STEP_PAGEMAP
        DL_STEP_REGISTER
        DL_STEP_SCAN
        DL_STEP_SIGACTION
        DL_STEP_PROTECT
    enum:
        DL_CLEAN
        DL_LOST
    struct dl_engine:
        int (*open)(dl_span *span, uint64_t page_size, dl_step *step) noexcept nogil
        void (*close)(dl_span *span) noexcept nogil
        int (*collect)(dl_span *span, uint64_t *words, int take) noexcept nogil
        int (*count)() noexcept nogil
    const dl_engine dl_uffd_engine
    const dl_engine dl_mprotect_engine
    int dl_uffd_probe(dl_step *step)
    int dl_mprotect_probe(dl_step *step)
    void dl_mprotect_allow_splits(uint64_t splits)
    int dl_mprotect_covers(uint64_t first, uint64_t end)
    dl_span *dl_span_new(uint64_t first, uint64_t npages)
    void dl_span_free(dl_span *span)


_STEPS = {
    DL_STEP_NONE: "",
    DL_STEP_USERFAULTFD: "userfaultfd(UFFD_USER_MODE_ONLY)",
    DL_STEP_API: "ioctl(UFFDIO_API) with WP_UNPOPULATED and WP_ASYNC",
    DL_STEP_PAGEMAP: "open(/proc/self/pagemap)",
    DL_STEP_REGISTER: "ioctl(UFFDIO_REGISTER) in mode WP",
    DL_STEP_SCAN: "ioctl(PAGEMAP_SCAN)",
    DL_STEP_SIGACTION: "sigaction(SIGSEGV)",
    DL_STEP_PROTECT: "mprotect(PROT_READ)",
}


cdef const dl_engine *engine_named(str name) except NULL:
    if name == "userfaultfd":
        return &dl_uffd_engine
    if name == "mprotect":
        return &dl_mprotect_engine
    raise ValueError(f"no engine is called {name!r}; there are 'userfaultfd' and 'mprotect'")


cdef str refusal(dl_step step, int error):
    return f"{_STEPS[step]}: {strerror(-error).decode()}"


def probe(str engine not None):
    """Use every call of an engine on a page of its own.

    Parameters
    ----------
    engine : {"userfaultfd", "mprotect"}
        Whose calls to try.

    Returns
    -------
    str
        Empty when all of it works; else the call that refused, and its answer.
    """
    cdef dl_step step = DL_STEP_NONE
    cdef int error
    cdef bint protects = engine_named(engine) == &dl_mprotect_engine

    with nogil:
        error = dl_mprotect_probe(&step) if protects else dl_uffd_probe(&step)
    return refusal(step, error) if error < 0 else ""


def open_spans(str engine not None):
    """Count the spans that an engine tracks in this process.

    Parameters
    ----------
    engine : {"userfaultfd", "mprotect"}
        Whose spans to count.
    """
    cdef const dl_engine *chosen = engine_named(engine)
    cdef int count

    with nogil:
        count = chosen.count()
    return count


def allow_splits(uint64_t splits):
    """Say how many mappings mprotect may split before it opens memory in blocks.

    Parameters
    ----------
    splits : int
        Mappings, for the whole process.
    """
    with nogil:
        dl_mprotect_allow_splits(splits)


def covers(uint64_t start, uint64_t end, uint64_t page_size):
    """Tell whether mprotect spans track every page of a range.

    Parameters
    ----------
    start, end : int
        Addresses in bytes, multiples of `page_size`.
    page_size : int
        Bytes.
    """
    cdef bint answer

    with nogil:
        answer = dl_mprotect_covers(start // page_size, end // page_size)
    return answer


cdef int note_mapping(const dl_mapping *mapping, const char *name, void *context) noexcept with gil:
    # Nothing may be raised into C: what does not fit into memory ends the walk, and the caller sees that.
    try:
        (<list>context).append((mapping.start, mapping.end, mapping.permissions[:4].decode(),
                                mapping.page_size, mapping.major, mapping.minor, mapping.inode,
                                name.decode("utf-8", "surrogateescape")))
    except BaseException:
        return -1
    return 0


def mappings(uint64_t start, uint64_t end):
    """List this process's mappings that have bytes of a range.

    Parameters
    ----------
    start, end : int
        Addresses in bytes.

    Returns
    -------
    list of tuple
        Start and end, permissions such as ``"rw-p"``, bytes of a page (0: the
        kernel does not say), the device's major and minor number, the inode,
        and the name.

    Raises
    ------
    OSError
        The kernel does not tell.
    """
    cdef list found = []
    cdef int error

    error = dl_maps_walk(start, end, True, note_mapping, <void *>found)
    if error == -1:
        raise MemoryError(f"no memory to list the mappings from {start:#x} to {end:#x}")
    if error < 0:
        raise OSError(-error, strerror(-error).decode())
    return found


def check_permissions(uint64_t start, uint64_t end):
    """Refuse memory that may not be read.

    Parameters
    ----------
    start, end : int
        Addresses in bytes, of whole pages.

    Raises
    ------
    OSError
        EACCES: part of it is mapped without that permission, or is a guard.
    """
    cdef int error

    with nogil:
        error = dl_maps_readable(start, end)
    if error < 0:
        raise OSError(-error, strerror(-error).decode())


@cython.final
cdef class PinnedPages:
    """Hold memory in place, and show its bytes, read-only.

    Parameters
    ----------
    memory : object
        Whatever :func:`dirtylog._bits.flat.flat_array` finds memory in.
    page_size : int
        Bytes, a power of two.

    Attributes
    ----------
    address : int
        Of the first byte.
    nbytes : int
        How many there are.
    npages, page_size : int
        Pages of the memory, counted from its first byte (I9), and their size in bytes.
    first, end : int
        Addresses of the whole pages of the address space that it touches.

    Raises
    ------
    TypeError, ValueError
        Those of `flat_array`.
    """

    # Objects that the collector looks through, so that an array may hold its own tracker: an array that is a view of
    # the memory would hide the cycle.
    cdef object owner, lent
    cdef bint holds
    cdef readonly uint64_t address, nbytes, npages, page_size, first, end

    def __cinit__(self, memory, uint64_t page_size):
        flat = flat_array(memory, what="the memory to track")
        self.page_size = page_size
        self.address = flat.ctypes.data
        self.nbytes = flat.nbytes
        self.npages = (self.nbytes + page_size - 1) // page_size
        self.first = self.address & ~(page_size - 1)
        self.end = (self.address + self.nbytes + page_size - 1) & ~(page_size - 1)
        self.owner = memory
        try:
            self.lent = memoryview(memory)
        except (TypeError, ValueError, BufferError):
            self.lent = flat
        self.holds = True

    def __getbuffer__(self, Py_buffer *view, int flags):
        if not self.holds:
            raise ValueError("the pinned memory was released")
        PyBuffer_FillInfo(view, self, <void *><uintptr_t>self.address, <Py_ssize_t>self.nbytes, True, flags)

    def release(self):
        """Let go of the memory; a second call does nothing."""
        self.holds = False
        lent, self.lent = self.lent, None
        self.owner = None
        if type(lent) is memoryview:
            lent.release()


@cython.final
cdef class Span:
    """Memory of this process that an engine watches, from construction to :meth:`close`.

    Parameters
    ----------
    engine : {"userfaultfd", "mprotect"}
        How to find out what was written.
    address : int
        Of the first byte, anywhere in a page.
    nbytes : int
        How many bytes.
    page_size : int
        Bytes, a power of two: the system's own.
    huge : bool, default False
        The kernel's own pages here are larger: one store marks all of one, so
        an answer that names pages is not exact (I6).

    Attributes
    ----------
    npages : int
        Pages from the first byte on (I9), which the answers number.

    Raises
    ------
    OSError
        A call was refused. ``strerror`` names the call.

    Notes
    -----
    Spans of any number may overlap; each reports every write. Calls may come
    from any thread. One lock an engine serialises them.
    """

    cdef dl_span *span
    cdef const dl_engine *engine
    cdef readonly uint64_t npages, page_size
    cdef uint64_t touched   # pages of the address space, which the engine numbers
    cdef bint unaligned     # page 0 begins inside the first of them
    cdef Block spare        # words that a collect found nothing for, all zero

    def __cinit__(self, str engine not None, uint64_t address, uint64_t nbytes, uint64_t page_size, bint huge=False):
        cdef dl_step step = DL_STEP_NONE
        cdef int error
        cdef uint64_t inside

        self.engine = engine_named(engine)
        if nbytes == 0 or page_size == 0:
            raise ValueError(f"{nbytes} bytes from address {address:#x} in pages of {page_size}: "
                             "a span is at least one byte")
        inside = address % page_size
        self.unaligned = inside != 0
        self.npages = (nbytes + page_size - 1) // page_size
        self.touched = (inside + nbytes + page_size - 1) // page_size
        self.page_size = page_size
        self.span = dl_span_new(address // page_size, self.touched)
        if self.span == NULL:
            raise OSError(errno, f"no memory for the log of {self.touched} pages")
        self.span.huge = huge
        with nogil:
            error = self.engine.open(self.span, page_size, &step)
        if error < 0:
            dl_span_free(self.span)
            self.span = NULL
            raise OSError(-error, refusal(step, error))

    def __dealloc__(self):
        if self.span != NULL:
            self.engine.close(self.span)
            dl_span_free(self.span)

    def collect(self, bint take):
        """Report what was written since the last call that took.

        Parameters
        ----------
        take : bool
            Start clean again (harvest); False only looks (peek).

        Returns
        -------
        DirtyPages
            ``exact`` is False when pages are in it that may not have been written.

        Raises
        ------
        OSError
            The memory cannot be tracked any longer.

        Notes
        -----
        The answer and its memory exist before anything is taken (I5); the words
        are kept for the next call when nothing was dirty.
        """
        cdef Block words
        cdef DirtyPages pages
        cdef int answer

        with cython.critical_section(self):
            words = self.spare
            self.spare = None
        if words is None:
            words = block_new(dl_words_for(self.touched), True)
        pages = pages_bare(self.npages, self.page_size, True)
        with nogil:
            answer = self.engine.collect(self.span, words.words, take)
            if self.unaligned and answer > DL_CLEAN:
                dl_pages_of_unaligned(words.words, words.nwords, self.npages)
        if answer == DL_CLEAN:
            # As above: two threads that put theirs back at once would drop one of them twice.
            with cython.critical_section(self):
                self.spare = words
            pages_fill(pages, None, no_words, no_words, 0)
            return pages
        if answer < 0:
            raise OSError(-answer, strerror(-answer).decode())
        # The last page of the address space may begin a word that no page of the buffer has.
        words.nwords = dl_words_for(self.npages)
        words.shape[0] = <Py_ssize_t>words.nwords
        pages.exact = answer != DL_LOST
        pages_fill(pages, words, None, None, 0)
        return pages

    def close(self):
        """Stop watching; a second call does nothing. The pages stay as they are."""
        with nogil:
            self.engine.close(self.span)
