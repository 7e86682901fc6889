# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
# cython: auto_pickle=False, autotestdict=False, freethreading_compatible=True, embedsignature=True
"""Drop-in functions on other people's memory: words that are a bitmap, pages that hold something."""

import numpy as np

from cpython.exc cimport PyErr_CheckSignals
from cpython.number cimport PyNumber_Index
from libc.stdint cimport int64_t, uint64_t
from libc.string cimport memcpy, memset

from dirtylog._bits.batch cimport dl_merge_dense
from dirtylog._bits.bitmap cimport dl_bitmap
from dirtylog._bits.bits cimport dl_ffs, dl_fls, dl_words_for
from dirtylog._bits.blocks cimport (
    Block,
    block_new,
    block_of_buffer,
    kernels,
    new_numbers,
)
from dirtylog._bits.content cimport dl_compare_pages, dl_copy_pages, dl_zero_pages
from dirtylog._bits.pages cimport DirtyPages, pages_from_words_block
from dirtylog._bits.simd cimport DL_CLEAR, DL_CLEAR_QUIESCENT, dl_kernels, dl_take_end

from dirtylog._bits.flat import flat_array
from dirtylog._bits.geometry import of_one_layout
from dirtylog._bits.pages import check_geometry


cdef extern from "_bits/live.h" nogil:
    cdef struct dl_live:
        size_t done
        size_t written
    size_t dl_live_indices(dl_live *live, const dl_kernels *k, const uint64_t *words, size_t n, int64_t *out,
                           size_t room)
    size_t dl_live_count_runs(const dl_kernels *k, const uint64_t *words, size_t n)
    size_t dl_live_runs(dl_live *live, const dl_kernels *k, const uint64_t *words, size_t n, int64_t *out, size_t room)

__all__ = ["compare_pages", "ffs", "fls", "harvest_words", "indices", "popcount", "runs", "zero_pages"]


# Dirty pages per word from which on runs are counted before room is made for them. Below, there is room for a start and
# an end of each page, which is all that scattered pages need, and counting would take another look at every word.
cdef enum:
    DENSE = 16

# ---- foreign words --------------------------------------------------------------------

cdef int check_apart(const uint64_t *a, size_t na, const uint64_t *b, size_t nb) except -1:
    """Refuse an output that overlaps what is being cleared."""
    if a < b + nb and b < a + na:
        raise ValueError("out overlaps the words it is to be harvested from; pass other memory")
    return 0


def harvest_words(words, out=None, *, bint quiescent=False) -> np.ndarray:
    """Get and clear every word of a buffer, atomically, a word or two at a time.

    Parameters
    ----------
    words : buffer of uint64
        Writable, contiguous, aligned to 8 bytes (I8); cleared in place.
    out : buffer of uint64, optional
        Receives the words; as long as `words`, and other memory.
    quiescent : bool, default False
        Your promise that nobody else writes a word from the call to its return, in this process or another: the words
        are then moved by plain vector loads and stores. See :meth:`DirtyBitmap.harvest`.

    Returns
    -------
    numpy.ndarray of uint64
        What the words were, in `out` if it was given.

    Raises
    ------
    TypeError, ValueError
        A buffer cannot be used; nothing has been cleared (I5).
    BaseException
        What a signal handler raised meanwhile; the bits are set again (I5).

    Notes
    -----
    Others may set bits by atomic OR at the same time and lose none, unless you promised that nobody does. Runs
    without the GIL; O(words).

    Examples
    --------
    >>> import dirtylog as dl, numpy as np
    >>> words = np.array([0, 5], np.uint64)
    >>> dl.harvest_words(words).tolist(), words.tolist()
    ([0, 5], [0, 0])
    """
    cdef Block source = block_of_buffer(words, True, "words")
    if out is None:
        out = np.empty(source.nwords, np.uint64)
    cdef Block target = block_of_buffer(out, True, "out")
    if target.nwords != source.nwords:
        raise ValueError(f"out has {target.nwords} words, words {source.nwords}; both must be equally long")
    check_apart(target.words, target.nwords, source.words, source.nwords)
    cdef dl_bitmap bits
    cdef int clear = DL_CLEAR_QUIESCENT if quiescent else DL_CLEAR
    # Made before anything is taken, so that nothing can fail after (I5).
    result = out if isinstance(out, np.ndarray) and out.dtype == np.uint64 else np.frombuffer(out, np.uint64)
    with nogil:
        memset(target.words, 0, target.nwords * 8)
        kernels.take_dense(source.words, source.nwords, target.words, clear)
        dl_take_end(clear)
    try:
        PyErr_CheckSignals()
    except BaseException:
        bits.words = source.words
        bits.summary = NULL
        bits.top = NULL
        bits.npages = 64 * source.nwords
        with nogil:
            dl_merge_dense(kernels, &bits, target.words, target.nwords, 0)
        raise
    return result


cdef object expand_live(Block block, bint as_runs):
    """Return the page numbers, or the runs one after the other, of words that others may be writing.

    Each word is read once, into a copy of its block, which is counted and expanded. How much room the
    answer needs is an estimate: whoever marks meanwhile makes it larger.
    """
    cdef dl_live live
    cdef int64_t *out
    cdef int64_t *more
    cdef size_t room, needed
    memset(&live, 0, sizeof(live))
    with nogil:
        room = kernels.popcount(block.words, block.nwords)
        if as_runs and room > DENSE * block.nwords:
            room = dl_live_count_runs(kernels, block.words, block.nwords)
        elif as_runs:
            room *= 2
    result = new_numbers(room, &out)
    while True:
        with nogil:
            if as_runs:
                needed = dl_live_runs(&live, kernels, block.words, block.nwords, out, room)
            else:
                needed = dl_live_indices(&live, kernels, block.words, block.nwords, out, room)
        if not needed:
            break
        room = needed + room // 2
        larger = new_numbers(room, &more)
        memcpy(more, out, live.written * 8)
        result, out = larger, more
    if live.written == room:
        return result
    result = result[: live.written]
    return result if 2 * live.written >= room else result.copy()


def indices(words) -> np.ndarray:
    """Return the numbers of the set bits of a buffer of uint64, ascending, as int64.

    Notes
    -----
    Others may write the words meanwhile: each word is read once.

    Examples
    --------
    >>> import dirtylog as dl, numpy as np
    >>> dl.indices(np.array([5, 1], np.uint64)).tolist()
    [0, 2, 64]
    """
    cdef Block block = block_of_buffer(words, False, "words")
    return expand_live(block, False)


def runs(words) -> np.ndarray:
    """Return the runs of set bits of a buffer of uint64 as an int64 array of shape (n, 2): first, count.

    Notes
    -----
    As for `indices`: each word is read once, so the runs are those of some moment of each word.

    Examples
    --------
    >>> import dirtylog as dl, numpy as np
    >>> dl.runs(np.array([1 << 63, 3], np.uint64)).tolist()
    [[63, 3]]
    """
    cdef Block block = block_of_buffer(words, False, "words")
    return expand_live(block, True).reshape(-1, 2)


def popcount(words) -> int:
    """Return how many bits of a buffer of uint64 are set."""
    cdef Block block = block_of_buffer(words, False, "words")
    cdef uint64_t total
    with nogil:
        total = kernels.popcount(block.words, block.nwords)
    return total


cdef uint64_t mask_argument(mask) except? 0:
    value = PyNumber_Index(mask)
    if not 0 < value < 1 << 64:
        raise ValueError(f"mask is {value}; it must be a nonzero word, 1 to 2**64 - 1")
    return value


def ffs(mask) -> int:
    """Return the number of the lowest set bit, 0-based: KVM's ``__ffs``; ValueError on 0."""
    return dl_ffs(mask_argument(mask))


def fls(mask) -> int:
    """Return the number of the highest set bit, 0-based: KVM's ``__fls``; ValueError on 0."""
    return dl_fls(mask_argument(mask))


# ---- page contents ---------------------------------------------------------------------

def compare_pages(a, b, page_size=4096) -> DirtyPages:
    """Return the pages in which two buffers of equal length differ.

    Parameters
    ----------
    a, b : buffer
        Memory of any kind that :func:`dirtylog.track` accepts, equally long in bytes; the last page may be a part of
        one.
    page_size : int, default 4096
        Bytes per page, a power of two.

    Raises
    ------
    ValueError
        The lengths differ; or the shapes are equal, and the orders are not.
    """
    one, other = of_one_layout(a, b, "a", "b")
    _, page_size = check_geometry(0, page_size)
    return differing_pages(one, other, page_size)


def differing_pages(const unsigned char[::1] left not None, const unsigned char[::1] right not None, size_t page_size):
    """As `compare_pages`, of flat memory that is known to be of one length; without its checks."""
    cdef size_t nbytes = left.shape[0]
    cdef uint64_t npages = (nbytes + page_size - 1) // page_size
    cdef Block words = block_new(dl_words_for(npages), True)
    if nbytes:
        with nogil:
            dl_compare_pages(&left[0], &right[0], nbytes, page_size, words.words)
    return pages_from_words_block(words, npages, page_size, True)


def copy_differing(const unsigned char[::1] source not None, unsigned char[::1] target not None,
                   DirtyPages pages not None):
    """Copy what `differing_pages` has found from one of the two to the other."""
    cdef size_t nbytes = source.shape[0]
    cdef size_t size = pages.page_size
    if target.shape[0] != source.shape[0] or pages.npages != (nbytes + size - 1) // size or pages.dense is None:
        raise ValueError(f"{source.shape[0]} bytes, {target.shape[0]} and {pages} are not of one memory")
    if nbytes:
        with nogil:
            dl_copy_pages(&target[0], &source[0], nbytes, size, pages.dense.words)


def zero_pages(data, page_size=4096) -> DirtyPages:
    """Return the pages of a buffer that hold only zeros; arguments as for `compare_pages`."""
    cdef const unsigned char[::1] view = flat_array(data, what="data", empty=True)
    _, page_size = check_geometry(0, page_size)
    cdef size_t nbytes = view.shape[0]
    cdef size_t size = page_size
    cdef uint64_t npages = (nbytes + size - 1) // size
    cdef Block words = block_new(dl_words_for(npages), True)
    if nbytes:
        with nogil:
            dl_zero_pages(&view[0], nbytes, size, words.words)
    return pages_from_words_block(words, npages, size, True)
