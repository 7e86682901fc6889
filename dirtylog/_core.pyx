# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
# cython: auto_pickle=False, autotestdict=False, freethreading_compatible=True, embedsignature=True
"""The dirty bitmap: mark, harvest, clear, count, while others mark; of our own words or of foreign memory's."""

cimport cython
from cpython.buffer cimport PyBUF_WRITABLE, PyBuffer_Release
from cpython.object cimport PyObject, PyTypeObject
from cpython.weakref cimport PyWeakref_NewRef
from libc.stdint cimport int64_t, uint64_t
from libc.string cimport memcpy, memset

from dirtylog._bits.atomic cimport dl_load_relaxed
from dirtylog._bits.batch cimport (
    dl_check_batch,
    dl_clear_range,
    dl_mark_batch,
    dl_merge_dense,
    dl_merge_sparse,
)
from dirtylog._bits.bitmap cimport (
    dl_groups_for,
    dl_mark,
    dl_mark_range,
    dl_top_words_for,
)
from dirtylog._bits.bits cimport dl_bit, dl_tail_mask, dl_words_for
from dirtylog._bits.blocks cimport (
    FEW,
    Block,
    block_new,
    block_of_buffer,
    export_words,
    kernels,
    no_words,
    numpy_functions,
)
from dirtylog._bits.numbers cimport dl_hold_numbers, dl_numbers_of_items, dl_numpy_look
from dirtylog._bits.pages cimport DirtyPages, pages_bare, pages_fill, pages_given
from dirtylog._bits.sets cimport dl_scatter
from dirtylog._bits.signals cimport dl_raised, dl_signals_raise
from dirtylog._bits.simd cimport DL_CLEAR, DL_CLEAR_QUIESCENT, DL_LEAVE
from dirtylog._bits.taking cimport clear_pages, count_pages, take_pages
from dirtylog._bits.words cimport check_apart

from dirtylog._bits.blocks import simd_missing, simd_path, simd_paths
from dirtylog._bits.pages import check_geometry, integer_array, ndarray
from dirtylog._bits.words import (
    compare_pages,
    ffs,
    fls,
    harvest_words,
    indices,
    popcount,
    runs,
    zero_pages,
)


cdef extern from "Python.h":
    # With NULL for the exception a number past the range is cut to its end, which no page reaches.
    Py_ssize_t PyNumber_AsSsize_t(object number, PyObject *exception) except? -1


cdef enum:
    # From here on a bitmap has a top. Below, the summary is 8 KiB or less and read in a tenth of a microsecond, and
    # each mark would pay for a look at the top.
    TOP_PAGES = 1 << 26


__all__ = [
    "DirtyBitmap", "compare_pages", "ffs", "fls", "harvest_words", "indices", "popcount", "runs", "simd_missing",
    "simd_path", "simd_paths", "zero_pages",
]


@cython.final
cdef class DirtyBitmap:
    """One bit per page, marked by many threads at once while others harvest.

    Parameters
    ----------
    npages : int
        Pages to keep track of.
    page_size : int, default 4096
        Bytes per page, a power of two.

    Attributes
    ----------
    npages : int
        Pages in all.
    page_size : int
        Bytes per page.

    Raises
    ------
    ValueError
        `npages` or `page_size` is out of its bounds.
    MemoryError
        There is no memory for the words.

    Notes
    -----
    Thread safety: every method may be called from any number of threads at
    once, and no mark is lost. A mark that was made before a harvest began is
    in that harvest (or in one that ran beside it); a mark made during a
    harvest is in that one or in the next, never in both. No method holds a
    lock; work of more than a few words runs without the GIL.

    Marking is a full memory barrier (I3): mark after the store to the page.
    A summary bitmap, one bit for each 512 pages, makes a harvest cost what is
    dirty (I4); memory is 1.002 bits per page. From 2^26 pages on there is one
    more level, a bit for each 2^18 pages.

    References
    ----------
    ``kvm_get_dirty_log_protect`` in Linux ``virt/kvm/kvm_main.c``; ``util/hbitmap.c`` in QEMU.

    Examples
    --------
    >>> import dirtylog as dl
    >>> bitmap = dl.DirtyBitmap(1024)
    >>> bitmap.mark_pages([3, 4, 5, 900])
    >>> bitmap.harvest().runs().tolist()
    [[3, 3], [900, 1]]
    >>> bitmap.count()
    0
    """

    def __cinit__(self):
        self.word_block = no_words  # no page, and safe to ask, whoever calls __new__
        self.bits.words = no_words.words
        self.myself = PyWeakref_NewRef(self, None)

    def __init__(self, npages, page_size=4096):
        if self.word_block is not no_words:
            raise TypeError("a DirtyBitmap is made once; make another one")
        npages, page_size = check_geometry(npages, page_size)
        cdef Block words = block_new(dl_words_for(npages), True)
        cdef Block summary = block_new(dl_groups_for(npages), True)
        cdef Block top = block_new(dl_top_words_for(npages), True) if npages >= TOP_PAGES else no_words
        self.page_size = page_size
        self.bits.npages = npages
        self.bits.words = words.words
        self.bits.summary = summary.words
        if npages >= TOP_PAGES:
            self.bits.top = top.words
        self.nothing = pages_of_nothing(npages, page_size)
        self.word_block = words
        self.summary_block = summary
        self.top_block = top

    @staticmethod
    def from_buffer(buffer, npages=None, page_size=4096) -> DirtyBitmap:
        """Return a bitmap that is a live view of foreign memory.

        Whoever shares the memory marks by an atomic OR on naturally aligned
        64-bit words (or on bytes of them, little-endian) and is harvested here.

        Parameters
        ----------
        buffer : buffer
            Writable, C-contiguous bytes or 64-bit unsigned words: mmap, shared memory,
            numpy. Kept alive by the bitmap.
        npages : int, optional
            Pages in all; by default as many as the words hold.
        page_size : int, default 4096
            Bytes per page, a power of two.

        Raises
        ------
        TypeError
            `buffer` is not a buffer of bytes or of unsigned 64-bit words.
        ValueError
            It is read-only, not aligned to 8 bytes (I8), not ``8 * ceil(npages / 64)``
            bytes long, or has bits past `npages` (I7).

        Notes
        -----
        There is no summary over memory that others mark without one: a
        harvest scans every word, with vector instructions.
        """
        cdef Block block = block_of_buffer(buffer, True, "buffer")
        cdef size_t nwords = block.nwords
        npages, page_size = check_geometry(64 * nwords if npages is None else npages, page_size)
        if dl_words_for(npages) != nwords:
            raise ValueError(
                f"buffer has {8 * nwords} bytes; {npages} pages take {8 * dl_words_for(npages)}: "
                "slice it, or leave npages out"
            )
        cdef DirtyBitmap bitmap = DirtyBitmap.__new__(DirtyBitmap)
        if nwords and dl_load_relaxed(block.words + nwords - 1) & ~dl_tail_mask(npages):
            raise ValueError(f"buffer has bits set past page {npages - 1}; clear them or pass a larger npages")
        bitmap.page_size = page_size
        bitmap.bits.npages = npages
        bitmap.bits.words = block.words
        bitmap.nothing = pages_of_nothing(npages, page_size)
        bitmap.word_block = block
        return bitmap

    @property
    def npages(self) -> int:
        """Pages in all."""
        return self.bits.npages

    # ---- arguments

    cdef inline uint64_t page(self, object page) except? <uint64_t>-1:
        """Check a page number."""
        cdef Py_ssize_t number = PyNumber_AsSsize_t(page, NULL)
        if number < 0 or <uint64_t>number >= self.bits.npages:
            raise IndexError(f"page {page} is out of range; pages are 0 to {<int64_t>self.bits.npages - 1}")
        return <uint64_t>number

    cdef int span(self, object first, object count, uint64_t *first_page, uint64_t *end_page,
                  bint open_end) except -1:
        """Check a range of pages; with `open_end`, a `count` of None reaches to the end."""
        cdef Py_ssize_t start = PyNumber_AsSsize_t(first, NULL)
        cdef Py_ssize_t npages = <Py_ssize_t>self.bits.npages
        cdef Py_ssize_t n
        if start < 0 or start > npages:
            raise IndexError(f"first page {first} is out of range; pages are 0 to {npages - 1}")
        n = npages - start if open_end and count is None else PyNumber_AsSsize_t(count, NULL)
        if n < 0:
            raise ValueError(f"count is {count}; it must not be negative")
        if n > npages - start:
            raise IndexError(f"{count} pages from page {start} on reach past the last page, {npages - 1}")
        first_page[0] = <uint64_t>start
        end_page[0] = <uint64_t>(start + n)
        return 0

    # ---- marking

    def mark(self, page) -> None:
        """Set a page's bit.

        Parameters
        ----------
        page : int
            Page number in ``[0, npages)``.

        Raises
        ------
        IndexError
            `page` is out of range; negative numbers do not wrap around.

        Notes
        -----
        Mark after the store to the page: a full memory barrier orders the two (I3). O(1).

        References
        ----------
        ``mark_page_dirty_in_slot`` in Linux ``virt/kvm/kvm_main.c``.
        """
        dl_mark(&self.bits, self.page(page))

    def mark_range(self, first, count) -> None:
        """Set the bits of `count` pages from `first` on.

        Raises
        ------
        IndexError
            The range reaches out of ``[0, npages)``.
        ValueError
            `count` is negative.

        Notes
        -----
        One store a word and one barrier for all (I3); O(count / 64).
        """
        cdef uint64_t start, end
        self.span(first, count, &start, &end, False)
        if end - start > 64 * FEW:
            with nogil:
                dl_mark_range(&self.bits, start, end - start)
        elif start < end:
            dl_mark_range(&self.bits, start, end - start)

    def mark_pages(self, pages) -> None:
        """Set the bits of many pages.

        Parameters
        ----------
        pages : array_like of int
            Page numbers, in any order; repeated ones are fine. All are checked before any bit is set.

        Raises
        ------
        IndexError
            A page is out of range; negative numbers do not wrap around.
        TypeError
            `pages` is not an array-like of integers; for a mask of bools use ``np.flatnonzero``.

        Notes
        -----
        One full barrier for the whole batch, then a test before each set (I3).
        """
        cdef int64_t few[FEW]
        cdef Py_ssize_t n = 0
        cdef const int64_t *numbers
        if type(pages) is list or type(pages) is tuple:
            n = dl_numbers_of_items(pages, few, FEW)
            if n >= 0:
                self.mark_numbers(few, n)
                return
        else:
            # To hold few numbers by the buffer protocol takes longer than to mark them.
            numbers = dl_numpy_look(&numpy_functions, pages, &n)
            if numbers != NULL and n <= FEW:
                self.mark_numbers(numbers, n)
                return
            if type(pages) is ndarray and self.mark_array(pages):
                return
        self.mark_array(integer_array(pages, "pages").ravel())

    cdef bint mark_array(self, object array) except -1:
        """Mark the pages of an array, unless it has to be converted first."""
        cdef Py_buffer view
        if not dl_hold_numbers(array, &view):
            return False
        try:
            self.mark_numbers(<const int64_t *>view.buf, view.shape[0])
        finally:
            PyBuffer_Release(&view)
        return True

    cdef int mark_numbers(self, const int64_t *pages, size_t n) except -1:
        """Mark pages, after all have been checked."""
        cdef size_t bad
        if n <= FEW:
            bad = dl_check_batch(pages, n, self.bits.npages)
            if bad == n:
                bad = dl_mark_batch(&self.bits, pages, n)
        else:
            with nogil:
                bad = dl_check_batch(pages, n, self.bits.npages)
                if bad == n:
                    bad = dl_mark_batch(&self.bits, pages, n)
        if bad < n:
            raise IndexError(
                f"page {pages[bad]} (element {bad}) is out of range; pages are 0 to {<int64_t>self.bits.npages - 1}"
            )
        return 0

    def merge(self, pages, first_page=0) -> None:
        """Set the bits of all pages in `pages`.

        Parameters
        ----------
        pages : DirtyPages or array_like of uint64, shape (ceil(npages / 64),)
            What was dirty elsewhere.
        first_page : int, default 0
            Where page 0 of `pages` lies here; only for DirtyPages.

        Raises
        ------
        IndexError
            `pages` reaches past the last page.
        TypeError
            `pages` is neither DirtyPages nor uint64.
        ValueError
            The page sizes differ, the array has another length or bits past `npages` (I7).

        Notes
        -----
        One full barrier, then a test before each set (I3); O(dirty words).
        """
        cdef DirtyPages other = self.pages_argument(pages)
        cdef uint64_t start, end
        self.span(first_page, other.npages, &start, &end, False)
        self.put(other, start)

    def fill(self) -> None:
        """Set every page's bit: KVM's initially-all-set."""
        self.mark_range(0, self.bits.npages)

    cdef DirtyPages pages_argument(self, object pages):
        """Return `pages` as DirtyPages of this page size."""
        if not isinstance(pages, DirtyPages):
            return DirtyPages.from_words(pages, self.bits.npages, self.page_size)
        if (<DirtyPages>pages).page_size != self.page_size:
            raise ValueError(f"pages are of {pages.page_size} bytes, the bitmap's of {self.page_size}")
        return pages

    # ---- asking

    def is_dirty(self, page) -> bool:
        """Return whether a page's bit is set.

        Raises
        ------
        IndexError
            `page` is out of range.
        """
        cdef uint64_t number = self.page(page)
        return (dl_load_relaxed(self.bits.words + number // 64) & dl_bit(number)) != 0

    def count(self) -> int:
        """Return how many pages are dirty; a moment's view while others mark."""
        cdef uint64_t total
        with nogil:
            total = count_pages(&self.bits)
        return total

    # ---- harvest

    def harvest(self, first=0, count=None, out=None, *, bint quiescent=False) -> DirtyPages:
        """Get and clear, atomically a word at a time.

        Parameters
        ----------
        first : int, default 0
            First page of the range.
        count : int, optional
            Pages in the range; by default up to the last one.
        out : buffer of uint64, length ceil(npages / 64), optional
            Receives the words as well, zeros outside the range.
        quiescent : bool, default False
            Your promise that nothing else marks, clears or harvests this bitmap from the call to its return, neither a
            thread nor, where the memory is shared, another process: a guest is paused, say, and its devices with it.
            The words of what is dirty all over are then moved by plain vector loads and stores, several times faster
            than by locked instructions. Nothing is checked: what is marked meanwhile all the same may be lost.

        Returns
        -------
        DirtyPages
            What was dirty in the range, by the bitmap's own page numbers.

        Raises
        ------
        IndexError
            The range reaches out of ``[0, npages)``.
        TypeError, ValueError
            `out` is not a writable buffer of that many words; nothing has been cleared (I5).
        MemoryError
            There is no memory for the result; nothing has been cleared (I5).
        BaseException
            What a signal handler raised meanwhile; the pages are marked again (I5), and `out` means nothing. So they
            are if an exception throws the answer away before you have stored it.

        Notes
        -----
        The order is I4's: the summary first, then the words it names. O(dirty), plus one bit
        for each 512 pages of the range, of large bitmaps for each 2^18; O(npages) over foreign memory.

        Thread safety with `quiescent`: whoever has paused the others must have heard from them that they stand still
        (a join, a lock, an answer), so that their marks are seen here. They may go on when the call has returned.
        Others may look meanwhile, by :meth:`count`, :meth:`peek` and :meth:`is_dirty`. The answer is the same, and what
        interrupts the call loses as little (I5).

        References
        ----------
        ``kvm_get_dirty_log_protect`` in Linux ``virt/kvm/kvm_main.c``.
        """
        cdef uint64_t start, end
        cdef Block target = None
        cdef DirtyPages pages
        self.span(first, count, &start, &end, True)
        if out is not None:
            target = block_of_buffer(out, True, "out")
            if target.nwords != self.word_block.nwords:
                raise ValueError(
                    f"out has {target.nwords} words; {self.bits.npages} pages take {self.word_block.nwords}"
                )
            check_apart(target.words, target.nwords, self.bits.words, target.nwords)
        pages = self.take(start, end, DL_CLEAR_QUIESCENT if quiescent else DL_CLEAR)
        if pages is self.nothing and target is None:
            return pages  # I5: nothing has been taken, so that no handler can have it lost
        if target is not None:
            with nogil:
                pages_write(pages, target.words, target.nwords)
        # I5: Python would run its signal handlers after this call, and throw the answer away if one raises.
        if dl_signals_raise():
            self.put(pages, 0)
            dl_raised()
        pages_given(pages, self.myself, mark_again)
        return pages

    def peek(self, first=0, count=None) -> DirtyPages:
        """Return what is dirty and clear nothing; as :meth:`harvest` otherwise."""
        cdef uint64_t start, end
        self.span(first, count, &start, &end, True)
        return self.take(start, end, DL_LEAVE)

    cdef void put(self, DirtyPages pages, uint64_t start) noexcept:
        """Mark pages that lie in the bitmap, their page 0 at `start`. Needs no memory and calls no Python."""
        with nogil:
            if pages.numbers is not None:
                dl_merge_sparse(&self.bits, pages.numbers.words, pages.masks.words, pages.entries, start)
            else:
                dl_merge_dense(kernels, &self.bits, pages.dense.words, dl_words_for(pages.npages), start)

    cdef DirtyPages take(self, uint64_t first, uint64_t end, int clear):
        return take_pages(&self.bits, self.page_size, first, end, clear, self.nothing)

    # ---- clearing

    def clear(self, pages) -> None:
        """Clear the bits of all pages in `pages`; others stay.

        Parameters
        ----------
        pages : DirtyPages or array_like of uint64, shape (ceil(npages / 64),)
            What is no longer dirty.

        Raises
        ------
        ValueError
            `pages` describes other pages than the bitmap does.

        Notes
        -----
        Clear before you copy: a write during the copy is then seen next time. O(dirty words).
        """
        cdef DirtyPages other = self.pages_argument(pages)
        if other.npages != self.bits.npages:
            raise ValueError(f"pages describe {other.npages} pages, the bitmap {self.bits.npages}")
        clear_pages(&self.bits, other)

    def clear_range(self, first, count) -> None:
        """Clear the bits of `count` pages from `first` on.

        Raises
        ------
        IndexError
            The range reaches out of ``[0, npages)``.
        ValueError
            `count` is negative.
        """
        cdef uint64_t start, end
        self.span(first, count, &start, &end, False)
        if start < end:
            with nogil:
                dl_clear_range(&self.bits, start, end - start)

    # ---- as a buffer and as an object

    def __getbuffer__(self, Py_buffer *view, int flags):
        if flags & PyBUF_WRITABLE:
            raise BufferError("the live words are read-only from Python; mark and clear change them")
        export_words(view, flags, self.bits.words, self.word_block.shape, self.word_block.stride)
        view.obj = self

    def __reduce__(self):
        raise TypeError("a DirtyBitmap is live and has no pickle; pickle its peek() or harvest()")

    def __sizeof__(self):
        size = object.__sizeof__(self)
        if self.bits.summary != NULL:
            size += (self.word_block.nwords + self.summary_block.nwords + self.top_block.nwords) * 8
        return size

    def __repr__(self):
        return f"<DirtyBitmap: {self.count()} of {self.npages} pages of {self.page_size} bytes dirty>"


# ---- the form of a result -------------------------------------------------------

cdef DirtyPages pages_of_nothing(uint64_t npages, uint64_t page_size):
    """Return no pages of so many: what never changes can be handed out again and again."""
    cdef DirtyPages pages = pages_bare(npages, page_size, True)
    pages_fill(pages, None, no_words, no_words, 0)
    pages.known_count = 0
    return pages


cdef void pages_write(DirtyPages pages, uint64_t *out, size_t nwords) noexcept nogil:
    """Copy fresh pages into words of somebody else's."""
    if pages.numbers is None:
        memcpy(out, pages.dense.words, nwords * 8)
    else:
        memset(out, 0, nwords * 8)
        dl_scatter(pages.numbers.words, pages.masks.words, pages.entries, out)


cdef void mark_again(PyObject *bitmap, PyObject *pages) noexcept:
    (<DirtyBitmap>bitmap).put(<DirtyPages>pages, 0)


# The module that people know it by, in tracebacks and help().
(<PyTypeObject *>DirtyBitmap).tp_name = "dirtylog.DirtyBitmap"
