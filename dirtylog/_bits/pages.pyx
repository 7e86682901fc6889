# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
# cython: auto_pickle=False, autotestdict=False, freethreading_compatible=True, embedsignature=True
"""DirtyPages, the answer to "which pages were written": immutable, sparse until someone asks for words."""

from collections.abc import Iterator
from copyreg import __newobj__ as newobj

import numpy as np

from dirtylog._bits import geometry

cimport cython
from cpython.number cimport PyNumber_Index
from cpython.object cimport PyObject, PyTypeObject
from libc.stdint cimport int64_t, uint64_t
from libc.string cimport memcmp, memcpy

from dirtylog._bits.atomic cimport dl_load_relaxed, dl_store_relaxed
from dirtylog._bits.bits cimport dl_bit, dl_tail_mask, dl_words_for
from dirtylog._bits.blocks cimport (
    FEW,
    Block,
    block_for_result,
    block_new,
    block_of_buffer,
    expand_words,
    kernels,
    new_numbers,
    new_runs,
    no_words,
    runs_of_words,
)
from dirtylog._bits.numbers cimport dl_numbers_of_items
from dirtylog._bits.runs cimport dl_count_runs_sparse, dl_runs_sparse
from dirtylog._bits.sets cimport (
    DL_AND,
    DL_OR,
    DL_SUB,
    DL_XOR,
    dl_check_runs,
    dl_combine_dense,
    dl_combine_sparse,
    dl_dense_of_indices,
    dl_dense_of_runs,
    dl_hash_dense,
    dl_hash_sparse,
    dl_scatter,
    dl_select_sparse,
    dl_sparse_of_indices,
    dl_sparse_of_runs,
    dl_words_of_indices,
    dl_words_of_runs,
)
from dirtylog._bits.thrown cimport dl_dealloc, dl_dealloc_by, dl_giver_end, dl_giver_set, dl_take_back

__all__ = ["DirtyPages"]

ndarray = np.ndarray
INT64 = np.dtype(np.int64)

# Pages are counted in int64 (indices), and their bytes must fit too.
MAX_PAGES = 1 << 52


cdef DirtyPages pages_bare(uint64_t npages, uint64_t page_size, bint exact):
    cdef DirtyPages pages = DirtyPages.__new__(DirtyPages)
    pages.npages = npages
    pages.page_size = page_size
    pages.exact = exact
    pages.known_count = -1
    return pages


cdef void pages_fill(DirtyPages pages, Block dense, Block numbers, Block masks, size_t entries) noexcept:
    """Give bare pages what they hold, in one of the two forms."""
    pages.dense = dense
    pages.numbers = numbers
    pages.masks = masks
    pages.entries = entries


cdef void pages_given(DirtyPages pages, object giver, dl_take_back *take_back) noexcept:
    """Note who takes pages back that an exception throws away, by a weak reference; of none, nobody."""
    if pages.numbers is None or pages.entries:
        dl_giver_set(&pages.giver, <PyObject *>giver, take_back)


cdef DirtyPages pages_from_words_block(Block words, uint64_t npages, uint64_t page_size, bint exact):
    cdef DirtyPages pages = pages_bare(npages, page_size, exact)
    pages_fill(pages, words, None, None, 0)
    return pages


cdef DirtyPages pages_from_sparse_blocks(Block numbers, Block masks, size_t n, uint64_t npages, uint64_t page_size,
                                         bint exact):
    cdef DirtyPages pages = pages_bare(npages, page_size, exact)
    pages_fill(pages, None, numbers, masks, n)
    return pages


# ---- arguments -----------------------------------------------------------------------

def check_geometry(npages, page_size) -> tuple[int, int]:
    """Return `npages` and `page_size` as ints, or say what is wrong with them."""
    npages = PyNumber_Index(npages)
    page_size = PyNumber_Index(page_size)
    if not 0 <= npages <= MAX_PAGES:
        raise ValueError(f"npages is {npages}; it must be between 0 and {MAX_PAGES}")
    if page_size < 1 or page_size & (page_size - 1) or page_size > 1 << 30:
        raise ValueError(f"page_size is {page_size}; it must be a power of two of at most 2**30 bytes")
    return npages, page_size


def integer_array(values, what) -> np.ndarray:
    """Return an integer array-like as a C-contiguous, aligned (I8) int64 array, unchanged where it is one.

    Numbers past int64 become negative or raise IndexError: no page has them.
    """
    if type(values) is ndarray and values.dtype is INT64:
        flags = values.flags
        if flags.c_contiguous and flags.aligned:
            return values
    cdef int64_t *numbers
    if type(values) is list or type(values) is tuple:
        array = new_numbers(len(values), &numbers)
        if dl_numbers_of_items(values, numbers, array.size) == array.size:
            return array
    array = np.asarray(values)
    if array.size == 0 and not isinstance(values, np.ndarray):
        return np.empty(array.shape, np.int64)
    if array.dtype.kind == "O" and all(isinstance(v, int) and not isinstance(v, bool) for v in array.flat):
        raise IndexError(f"{what} hold a number past 64 bits; page numbers are below npages")
    if array.dtype.kind not in "iu":
        raise TypeError(f"{what} must be integers, not {array.dtype}; convert them, or np.flatnonzero() a mask")
    if array.dtype.kind == "u" and array.dtype.itemsize == 8:
        if array.size and int(array.max()) >= 1 << 63:
            raise IndexError(f"{what} hold {int(array.max())}; page numbers are below npages")
    return np.require(array, np.int64, ["C", "A"])


cdef object words_array(words, uint64_t npages):
    array = np.asarray(words)
    if array.dtype != np.uint64:
        raise TypeError(f"words must be uint64, not {array.dtype}; use .view(np.uint64) on bytes")
    if array.ndim != 1 or array.shape[0] != dl_words_for(npages):
        raise ValueError(f"words have shape {array.shape}; {npages} pages take ({dl_words_for(npages)},)")
    return np.ascontiguousarray(array)


cdef int check_tail(const uint64_t *words, uint64_t npages) except -1:
    """I7: refuse words with bits past the last page."""
    cdef uint64_t n = dl_words_for(npages)
    if n and words[n - 1] & ~dl_tail_mask(npages):
        raise ValueError(f"the last word has bits set past page {npages - 1}; clear them or pass a larger npages")
    return 0


def pages_of_state(npages, page_size, exact, numbers, masks, words) -> DirtyPages:
    """Make DirtyPages from what a pickle holds, which is checked like any foreign data."""
    if words is not None:
        return DirtyPages.from_words(np.frombuffer(words, np.uint64), npages, page_size, exact=exact)
    return pages_of_sparse_bytes(numbers, masks, npages, page_size, exact)


cdef DirtyPages pages_of_sparse_bytes(const unsigned char[::1] numbers, const unsigned char[::1] masks, npages,
                                      page_size, exact):
    npages, page_size = check_geometry(npages, page_size)
    cdef size_t number_bytes = numbers.shape[0]
    cdef size_t mask_bytes = masks.shape[0]
    cdef size_t n = number_bytes // 8
    cdef size_t i
    cdef Block number_block = block_new(n, False)
    cdef Block mask_block = block_new(n, False)
    if number_bytes != 8 * n or mask_bytes != 8 * n:
        raise ValueError(f"{number_bytes} bytes of word numbers and {mask_bytes} of masks; both take 8 an entry")
    if n:
        memcpy(number_block.words, &numbers[0], 8 * n)
        memcpy(mask_block.words, &masks[0], 8 * n)
    cdef uint64_t nwords = dl_words_for(npages)
    for i in range(n):
        if mask_block.words[i] == 0 or number_block.words[i] >= nwords or (
            i and number_block.words[i] <= number_block.words[i - 1]
        ):
            raise ValueError(f"entry {i} is not an ascending word number below {nwords} with a nonzero mask")
    if n and number_block.words[n - 1] == nwords - 1 and mask_block.words[n - 1] & ~dl_tail_mask(npages):
        raise ValueError(f"the last word has bits set past page {npages - 1}")
    return pages_from_sparse_blocks(number_block, mask_block, n, npages, page_size, exact)


@cython.final
@cython.freelist(16)
cdef class DirtyPages:
    """The pages that were written, as a set of page numbers that never changes.

    Made by a source's ``harvest()`` or ``peek()``, or by :meth:`from_words`,
    :meth:`from_indices`, :meth:`from_runs` and :meth:`from_bytes`. What few
    pages there are is kept as word numbers and masks, in proportion to them;
    :attr:`words` is made when it is first asked for.

    Attributes
    ----------
    npages : int
        Pages that the source has; every page number is below it.
    page_size : int
        Bytes per page.
    exact : bool
        False when the source lost track and reported every page (I6).
    count : int
        Number of dirty pages, also ``len()``.
    nbytes : int
        Bytes that the dirty pages hold: ``count * page_size``.
    words : numpy.ndarray of uint64
        Read-only, ``ceil(npages / 64)`` long; page ``64 * i + b`` is bit ``b`` of word ``i``.

    Notes
    -----
    Set algebra (``|``, ``&``, ``-``, ``^``) requires operands of equal `npages` and
    `page_size`; the result is exact if both are. Equality and hash look at the
    pages, not at `exact`. Immutable, so any number of threads may share one.

    Examples
    --------
    >>> import dirtylog as dl
    >>> pages = dl.DirtyPages.from_indices([1, 2, 3, 70], npages=128)
    >>> pages.runs().tolist()
    [[1, 3], [70, 1]]
    >>> 70 in pages, len(pages), pages.nbytes
    (True, 4, 16384)
    """

    def __cinit__(self):
        self.dense = no_words  # safe to ask, whoever calls __new__

    def __init__(self, *args, **kwargs):
        raise TypeError("DirtyPages has no constructor; use from_words, from_indices, from_runs or from_bytes")

    # ---- ways to make one

    @staticmethod
    def from_words(words, npages, page_size=4096, *, bint exact=True) -> DirtyPages:
        """Make from a bitmap, which is copied.

        Parameters
        ----------
        words : array_like of uint64, shape (ceil(npages / 64),)
            Page ``64 * i + b`` is bit ``b`` of word ``i``.
        npages : int
            Pages in all.
        page_size : int, default 4096
            Bytes per page, a power of two.
        exact : bool, default True
            False marks an answer of a source that lost track.

        Raises
        ------
        TypeError
            `words` is not uint64.
        ValueError
            `words` has another length, or bits past `npages` (I7).
        """
        return DirtyPages._adopt_words(np.array(words), npages, page_size, exact)

    @staticmethod
    def _adopt_words(words, npages, page_size=4096, bint exact=True) -> DirtyPages:
        """Keep `words` without a copy; the caller promises never to change them again."""
        npages, page_size = check_geometry(npages, page_size)
        words = words_array(words, npages)
        if npages == 0:
            return pages_from_words_block(block_new(0, False), 0, page_size, exact)
        cdef Block block = block_of_buffer(words, False, "words")
        check_tail(block.words, npages)
        return pages_from_words_block(block, npages, page_size, exact)

    @staticmethod
    def from_indices(pages, npages, page_size=4096, *, bint exact=True) -> DirtyPages:
        """Make from page numbers, in any order; repeated ones count once.

        Parameters
        ----------
        pages : array_like of int
            Page numbers in ``[0, npages)``.
        npages, page_size, exact
            As for :meth:`from_words`.

        Raises
        ------
        IndexError
            A page is out of range; negative numbers do not wrap around.
        TypeError
            `pages` is not an array-like of integers.
        """
        npages, page_size = check_geometry(npages, page_size)
        # A copy before anything is checked: what was checked is what is read, whatever others do to theirs.
        array = integer_array(pages, "pages").flatten()
        if array.size and not (array[1:] > array[: array.size - 1]).all():
            array.sort()
        cdef int64_t[::1] numbers = array
        cdef size_t n = array.size
        if n and (numbers[0] < 0 or numbers[n - 1] >= <int64_t>npages):
            bad = numbers[0] if numbers[0] < 0 else numbers[n - 1]
            raise IndexError(f"page {bad} is out of range; pages are 0 to {npages - 1}")
        cdef size_t nwords = dl_words_for(npages)
        cdef size_t entries = 0
        cdef Block first, second
        if n:
            with nogil:
                entries = dl_words_of_indices(&numbers[0], n)
        if entries * 2 > nwords:
            first = block_new(nwords, True)
            with nogil:
                dl_dense_of_indices(&numbers[0], n, first.words)
            return pages_from_words_block(first, npages, page_size, exact)
        first = block_new(entries, False)
        second = block_new(entries, False)
        if n:
            with nogil:
                dl_sparse_of_indices(&numbers[0], n, first.words, second.words)
        return pages_from_sparse_blocks(first, second, entries, npages, page_size, exact)

    @staticmethod
    def from_runs(runs, npages, page_size=4096, *, bint exact=True) -> DirtyPages:
        """Make from runs of adjacent pages, in any order; they may overlap.

        Parameters
        ----------
        runs : array_like of int, shape (n, 2)
            First page and number of pages of each run.
        npages, page_size, exact
            As for :meth:`from_words`.

        Raises
        ------
        IndexError
            A run reaches out of ``[0, npages)``.
        TypeError
            `runs` is not an array-like of integers.
        ValueError
            `runs` has another shape, or a run a negative count.
        """
        npages, page_size = check_geometry(npages, page_size)
        array = integer_array(runs, "runs")
        if array.ndim == 1 and array.size == 0:
            array = array.reshape(0, 2)
        if array.ndim != 2 or array.shape[1] != 2:
            raise ValueError(f"runs have shape {array.shape}; they take (n, 2): first, count")
        array = array.copy()  # as in from_indices
        if array.shape[0] > 1 and not (array[1:, 0] >= array[: array.shape[0] - 1, 0]).all():
            array = np.ascontiguousarray(array[np.argsort(array[:, 0], kind="stable")])
        cdef int64_t[:, ::1] table = array
        cdef size_t n = table.shape[0]
        cdef size_t bad = n
        cdef uint64_t limit = npages
        if n:
            with nogil:
                bad = dl_check_runs(&table[0, 0], n, limit)
        if bad < n:
            if table[bad, 1] < 0:
                raise ValueError(f"run ({table[bad, 0]}, {table[bad, 1]}) has a negative count")
            raise IndexError(
                f"run ({table[bad, 0]}, {table[bad, 1]}) reaches out of range; pages are 0 to {npages - 1}"
            )
        cdef size_t nwords = dl_words_for(npages)
        cdef size_t entries = 0
        cdef Block first, second
        if n:
            with nogil:
                entries = dl_words_of_runs(&table[0, 0], n)
        if entries * 2 > nwords:
            first = block_new(nwords, True)
            with nogil:
                dl_dense_of_runs(&table[0, 0], n, first.words)
            return pages_from_words_block(first, npages, page_size, exact)
        first = block_new(entries, False)
        second = block_new(entries, False)
        if n:
            with nogil:
                entries = dl_sparse_of_runs(&table[0, 0], n, first.words, second.words)
        return pages_from_sparse_blocks(first, second, entries, npages, page_size, exact)

    @staticmethod
    def from_bytes(data, npages, page_size=4096) -> DirtyPages:
        """Make from little-endian words, as :meth:`to_bytes` gives them.

        Raises
        ------
        ValueError
            `data` is not ``8 * ceil(npages / 64)`` bytes, or has bits past `npages` (I7).
        """
        npages, page_size = check_geometry(npages, page_size)
        view = memoryview(data).cast("B")
        need = 8 * dl_words_for(npages)
        if view.nbytes != need:
            raise ValueError(f"data has {view.nbytes} bytes; {npages} pages take {need}")
        words = np.frombuffer(view, np.uint64) if need else np.empty(0, np.uint64)
        return DirtyPages.from_words(words, npages, page_size)

    @staticmethod
    def _empty(npages, page_size=4096) -> DirtyPages:
        """No page."""
        npages, page_size = check_geometry(npages, page_size)
        return pages_from_sparse_blocks(no_words, no_words, 0, npages, page_size, True)

    @staticmethod
    def _all(npages, page_size=4096, bint exact=False) -> DirtyPages:
        """Every page: what a source that lost track reports (I6)."""
        return DirtyPages.from_runs([(0, npages)], npages, page_size, exact=exact)

    # ---- what it holds

    cdef int64_t counted(self) noexcept:
        # Two threads may count at once and come to the same number.
        cdef int64_t count = <int64_t>dl_load_relaxed(<uint64_t *>&self.known_count)
        if count < 0 and self.numbers is not None and self.entries <= FEW:
            count = <int64_t>kernels.popcount(self.masks.words, self.entries)
            dl_store_relaxed(<uint64_t *>&self.known_count, <uint64_t>count)
        elif count < 0:
            with nogil:
                if self.numbers is not None:
                    count = <int64_t>kernels.popcount(self.masks.words, self.entries)
                else:
                    count = <int64_t>kernels.popcount(self.dense.words, dl_words_for(self.npages))
            dl_store_relaxed(<uint64_t *>&self.known_count, <uint64_t>count)
        return count

    cdef Block dense_block(self):
        # Made once: whoever works without the GIL gives up the critical section too, so two threads may
        # both make one, and the first stays. Others may be reading it.
        cdef Block block
        cdef size_t nwords
        with cython.critical_section(self):
            if self.dense is None:
                # Few words touch little of fresh memory, which is zero as it comes; many touch all of it, and
                # then memory that is there already is zeroed faster.
                nwords = dl_words_for(self.npages)
                block = block_for_result(nwords) if self.entries > nwords // 512 else block_new(nwords, True)
                with nogil:
                    dl_scatter(self.numbers.words, self.masks.words, self.entries, block.words)
                if self.dense is None:
                    self.dense = block
            block = self.dense
        return block

    @property
    def count(self) -> int:
        """Number of dirty pages."""
        return self.counted()

    @property
    def nbytes(self) -> int:
        """Bytes that the dirty pages hold."""
        return self.counted() * <object>self.page_size

    @property
    def words(self) -> np.ndarray:
        """The bitmap, read-only; made at the first call where the pages are few."""
        return np.asarray(self.dense_block())

    def indices(self) -> np.ndarray:
        """Return the page numbers, ascending, as a new int64 array; O(dirty)."""
        if self.numbers is None:
            return expand_words(self.dense.words, dl_words_for(self.npages))
        cdef int64_t *out
        cdef size_t count = self.counted()
        result = new_numbers(count, &out)
        if self.entries <= FEW:
            kernels.expand_sparse(self.numbers.words, self.masks.words, self.entries, out, count)
        else:
            with nogil:
                kernels.expand_sparse(self.numbers.words, self.masks.words, self.entries, out, count)
        return result

    def runs(self) -> np.ndarray:
        """Return the runs of adjacent pages as a new int64 array of shape (n, 2): first, count."""
        if self.numbers is None:
            return runs_of_words(self.dense.words, dl_words_for(self.npages))
        cdef size_t n
        cdef int64_t *out
        if self.entries <= FEW:
            n = dl_count_runs_sparse(kernels, self.numbers.words, self.masks.words, self.entries)
            result = new_runs(n, &out)
            dl_runs_sparse(kernels, self.numbers.words, self.masks.words, self.entries, out, n)
            return result
        with nogil:
            n = dl_count_runs_sparse(kernels, self.numbers.words, self.masks.words, self.entries)
        result = new_runs(n, &out)
        with nogil:
            dl_runs_sparse(kernels, self.numbers.words, self.masks.words, self.entries, out, n)
        return result

    def to_bytes(self) -> bytes:
        """Return the words as little-endian bytes, ``8 * ceil(npages / 64)`` long."""
        return self.words.tobytes()

    # ---- a set of page numbers

    def __len__(self):
        return self.counted()

    def __bool__(self):
        if self.numbers is not None:
            return self.entries != 0
        cdef size_t n = dl_words_for(self.npages)
        return kernels.next_nonzero(self.dense.words, 0, n) < n

    def __contains__(self, page):
        page = PyNumber_Index(page)
        if not 0 <= page < self.npages:
            return False
        cdef uint64_t at = page
        cdef uint64_t word = at // 64
        cdef size_t low = 0, high = self.entries, middle
        if self.numbers is None:
            return (self.dense.words[word] & dl_bit(at)) != 0
        while low < high:
            middle = (low + high) // 2
            if self.numbers.words[middle] < word:
                low = middle + 1
            else:
                high = middle
        return low < self.entries and self.numbers.words[low] == word and (self.masks.words[low] & dl_bit(at)) != 0

    def __iter__(self) -> Iterator[int]:
        return iterate(self.indices())

    cdef DirtyPages combined(self, int op, other):
        if not isinstance(other, DirtyPages):
            return None
        cdef DirtyPages b = other
        if self.npages != b.npages or self.page_size != b.page_size:
            raise ValueError(
                f"{self.npages} pages of {self.page_size} bytes and {b.npages} pages of {b.page_size} bytes "
                "do not combine; both must describe the same pages"
            )
        cdef bint exact = self.exact and b.exact
        cdef size_t nwords = dl_words_for(self.npages)
        cdef size_t room
        cdef Block first, second, x, y
        if self.numbers is not None and (b.numbers is not None or op == DL_AND or op == DL_SUB):
            room = self.entries + (b.entries if op == DL_OR or op == DL_XOR else 0)
            if room * 2 <= nwords or op == DL_AND or op == DL_SUB:
                first = block_new(room, False)
                second = block_new(room, False)
                with nogil:
                    if b.numbers is not None:
                        room = dl_combine_sparse(op, self.numbers.words, self.masks.words, self.entries,
                                                 b.numbers.words, b.masks.words, b.entries, first.words, second.words)
                    else:
                        room = dl_select_sparse(op, self.numbers.words, self.masks.words, self.entries, b.dense.words,
                                                first.words, second.words)
                return pages_from_sparse_blocks(first, second, room, self.npages, self.page_size, exact)
        if op == DL_AND and b.numbers is not None:
            return b.combined(op, self)
        x = self.dense_block()
        y = b.dense_block()
        first = block_new(nwords, False)
        with nogil:
            dl_combine_dense(op, x.words, y.words, first.words, nwords)
        return pages_from_words_block(first, self.npages, self.page_size, exact)

    def __or__(self, other):
        result = self.combined(DL_OR, other)
        return NotImplemented if result is None else result

    def __and__(self, other):
        result = self.combined(DL_AND, other)
        return NotImplemented if result is None else result

    def __sub__(self, other):
        result = self.combined(DL_SUB, other)
        return NotImplemented if result is None else result

    def __xor__(self, other):
        result = self.combined(DL_XOR, other)
        return NotImplemented if result is None else result

    def __eq__(self, other):
        if not isinstance(other, DirtyPages):
            return NotImplemented
        cdef DirtyPages b = other
        if self is b:
            return True
        if self.npages != b.npages or self.page_size != b.page_size:
            return False
        cdef size_t bytes_
        cdef bint equal
        cdef Block x, y
        if self.numbers is not None and b.numbers is not None:
            bytes_ = self.entries * 8
            with nogil:
                equal = (self.entries == b.entries
                         and memcmp(self.numbers.words, b.numbers.words, bytes_) == 0
                         and memcmp(self.masks.words, b.masks.words, bytes_) == 0)
            return equal
        x = self.dense_block()
        y = b.dense_block()
        bytes_ = dl_words_for(self.npages) * 8
        with nogil:
            equal = memcmp(x.words, y.words, bytes_) == 0
        return equal

    def __hash__(self):
        cdef uint64_t value
        with nogil:
            if self.numbers is not None:
                value = dl_hash_sparse(self.numbers.words, self.masks.words, self.entries)
            else:
                value = dl_hash_dense(self.dense.words, dl_words_for(self.npages))
        return hash((self.npages, self.page_size, value))

    # ---- what people hold

    def byte_runs(self, nbytes) -> np.ndarray:
        """Return the dirty pages as byte ranges of the memory they are pages of.

        Parameters
        ----------
        nbytes : int
            Size of the memory in bytes. Its last page may be a part of one.

        Returns
        -------
        numpy.ndarray of int64, shape (n, 2)
            Offset and length in bytes, ascending, the last one cut at `nbytes`.

        Raises
        ------
        ValueError
            A memory of that size does not have `npages` pages.

        Examples
        --------
        >>> import dirtylog as dl
        >>> dl.DirtyPages.from_indices([0, 4], 5).byte_runs(20_000).tolist()
        [[0, 4096], [16384, 3616]]
        """
        nbytes = PyNumber_Index(nbytes)
        geometry.check_size(self, nbytes, "the memory")
        return geometry.byte_runs(self, nbytes)

    def rows(self, array) -> np.ndarray:
        """Return the rows of an array that have a byte in a dirty page.

        Parameters
        ----------
        array : array of shape (n, ...)
            The array that was tracked, or one of the same shape, dtype and order:
            of any of them without gaps; a tensor or a table of one dtype as well.
            Its content is not looked at.

        Returns
        -------
        numpy.ndarray of int64
            Indices along the first axis, ascending.

        Raises
        ------
        TypeError, ValueError
            It has no memory or no rows, is not contiguous, or is not of the size
            that these pages are of.

        Notes
        -----
        A row that shares a page with one that was written is there as well. In
        Fortran order a page touches many rows; copy by :meth:`copy` there.
        O(runs log runs) and what is returned.

        Examples
        --------
        >>> import numpy as np
        >>> import dirtylog as dl
        >>> array = np.zeros((1000, 100))  # rows of 800 bytes
        >>> dl.DirtyPages.from_indices([1], 196).rows(array)
        array([ 5,  6,  7,  8,  9, 10])
        """
        ranges = geometry.row_ranges(self, array)
        counts = ranges[:, 1] - ranges[:, 0]
        before = np.cumsum(counts) - counts
        return np.repeat(ranges[:, 0] - before, counts) + np.arange(counts.sum())

    def row_runs(self, array) -> list:
        """Return the rows of an array that have a byte in a dirty page, as slices.

        Parameters, Raises and Notes are those of :meth:`rows`.

        Returns
        -------
        list of slice
            Ascending, none touching the next.

        Examples
        --------
        >>> import numpy as np
        >>> import dirtylog as dl
        >>> dl.DirtyPages.from_indices([1, 9], 196).row_runs(np.zeros((1000, 100)))
        [slice(5, 11, None), slice(46, 52, None)]
        """
        return [slice(first, end) for first, end in geometry.row_ranges(self, array).tolist()]

    def copy(self, source, target) -> int:
        """Copy the dirty pages from one memory to the same place in another.

        Parameters
        ----------
        source, target : array or buffer
            Memory of one size, of every kind that :func:`dirtylog.track` accepts:
            page `i` is bytes ``[i * page_size, (i + 1) * page_size)`` of it (I9),
            whatever its dtype, shape and order; arrays of one shape must be in one
            order too. They do not overlap.

        Returns
        -------
        int
            Bytes copied.

        Raises
        ------
        TypeError
            One of them has no memory.
        ValueError
            They differ in size or order, overlap, are not contiguous, `target` is
            read-only, or the size is not that of these pages. Nothing was copied.

        Notes
        -----
        Without the GIL, at the speed of memory. What is written to `source`
        meanwhile may be copied half old and half new: it is in the next harvest
        (I3).

        Examples
        --------
        >>> import numpy as np
        >>> import dirtylog as dl
        >>> array = np.ones(20_000)
        >>> replica = array.copy()
        >>> with dl.track(array) as tracker:
        ...     array[12_345] = 7
        ...     copied = tracker.harvest().copy(array, replica)
        >>> bool((replica == array).all())
        True
        """
        return geometry.copy(self, source, target)

    # Sets of pages combine with sets of pages; numpy would combine arrays of their numbers.
    __array_ufunc__ = None

    def __array__(self, dtype=None, copy=None):
        if copy is False:
            raise ValueError("the page numbers are made when they are asked for; they cannot be had without a copy")
        numbers = self.indices()
        return numbers if dtype is None else numbers.astype(dtype)

    def __copy__(self):
        return self

    def __deepcopy__(self, memo):
        return self

    def __reduce__(self):
        # A pickle names the public class and nothing else, so that it loads after this file has moved.
        numbers = masks = words = None
        if self.numbers is None:
            words = self.to_bytes()
        else:
            numbers = np.asarray(self.numbers)[: self.entries].tobytes()
            masks = np.asarray(self.masks)[: self.entries].tobytes()
        return newobj, (DirtyPages,), (self.npages, self.page_size, self.exact, numbers, masks, words)

    def __setstate__(self, state):
        # Immutable: only what __new__ has left blank can be filled. No valid page size is 0.
        if self.page_size:
            raise TypeError("DirtyPages never change; __setstate__ is for unpickling alone")
        cdef DirtyPages made = pages_of_state(*state)
        pages_fill(self, made.dense, made.numbers, made.masks, made.entries)
        self.known_count = made.known_count
        self.npages = made.npages
        self.exact = made.exact
        self.page_size = made.page_size

    def __sizeof__(self):
        blocks = [block for block in (self.dense, self.numbers, self.masks) if block is not None]
        return object.__sizeof__(self) + sum((<Block>block).nwords * 8 for block in blocks)

    def _repr_html_(self):
        """Show the pages as a strip in a notebook."""
        from dirtylog._bits.strip import strip_html

        return strip_html(self)

    def __repr__(self):
        exact = "" if self.exact else ", exact=False"
        return f"<DirtyPages: {self.count} of {self.npages} pages of {self.page_size} bytes{exact}>"


def iterate(indices):
    """Yield page numbers as ints, a few thousand at a time, so that no list of all of them is made."""
    for start in range(0, indices.size, 4096):
        yield from indices[start : start + 4096].tolist()


# The module that people know it by, in tracebacks, help() and pickles.
(<PyTypeObject *>DirtyPages).tp_name = "dirtylog.DirtyPages"


cdef dl_dealloc rest_of_dealloc

cdef void dealloc_pages(PyObject *pages) noexcept:
    """Give pages back that an exception throws away, before Cython's own deallocation, which hides the exception."""
    dl_giver_end(&(<DirtyPages>pages).giver, pages)
    rest_of_dealloc(pages)


rest_of_dealloc = dl_dealloc_by(<PyObject *>DirtyPages, dealloc_pages)
