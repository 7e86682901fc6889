# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
# cython: auto_pickle=False, autotestdict=False, freethreading_compatible=True, embedsignature=True
"""Taking the pages of a bitmap, all or a range: the summary first, and a result whose size follows what is dirty."""

from libc.stdint cimport int64_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset

from dirtylog._bits.batch cimport dl_clear_dense, dl_clear_sparse
from dirtylog._bits.bitmap cimport (
    DL_GROUP_WORDS,
    DL_LINE_WORDS,
    dl_bitmap,
    dl_harvest_end,
    dl_summary_untake,
    dl_taken,
)
from dirtylog._bits.bits cimport dl_words_for
from dirtylog._bits.blocks cimport FEW, Block, block_for_result, block_new, kernels
from dirtylog._bits.pages cimport DirtyPages, pages_bare, pages_fill
from dirtylog._bits.sets cimport dl_scatter
from dirtylog._bits.simd cimport DL_CLEAR_QUIESCENT, dl_kernels, dl_take_end


cdef extern from "_bits/harvest.h" nogil:
    cdef struct dl_parts:
        uint64_t first, head_end
        uint64_t first_line, end_line
        uint64_t tail_first, end
    cdef struct dl_basket:
        const dl_kernels *k
        uint64_t *numbers
        uint64_t *masks
        size_t entries
        size_t capacity
        uint64_t *out
        bint all
        int clear
    dl_parts dl_parts_of(uint64_t npages, uint64_t first, uint64_t end)
    dl_parts dl_foreign_parts_of(uint64_t npages, uint64_t first, uint64_t end)
    uint64_t dl_first_group(const dl_parts *parts)
    uint64_t dl_end_group(const dl_parts *parts)
    uint64_t dl_next_group(const dl_kernels *k, const dl_bitmap *b, uint64_t group, uint64_t end)
    uint64_t dl_next_group_within(const dl_kernels *k, const dl_bitmap *b, uint64_t group, uint64_t end,
                                  uint64_t *looks)
    uint64_t dl_count_pages(const dl_kernels *k, const dl_bitmap *b)
    void dl_take_part(dl_basket *basket, uint64_t *words, uint64_t first, uint64_t end)
    void dl_take_range(dl_basket *basket, const dl_bitmap *b, const dl_parts *parts, const dl_taken *taken,
                       size_t ntaken)
    uint64_t dl_take_foreign(dl_basket *basket, uint64_t *words, uint64_t start, uint64_t end)
    void dl_put_back(const dl_basket *basket, const dl_bitmap *b)
    uint64_t dl_harvest_by(const dl_kernels *k, const dl_bitmap *b, uint64_t *out, int clear)

cdef extern from "_bits/numbered.h" nogil:
    size_t dl_harvest_pages(const dl_kernels *k, const dl_bitmap *b, int64_t *out, size_t room)

__all__: list[str] = []

cdef enum:
    # Groups of lines that a harvest takes without asking for memory first.
    FEW_GROUPS = 256
    # Words that are scanned without giving up the GIL: as many as take no longer than that does.
    SCANNED = 512
    # Of the summary where a top tells which lines of it are worth a look: a bit for each DL_LINE_WORDS.
    SCANNED_BY_TOP = SCANNED * 64 * DL_LINE_WORDS


cdef uint64_t next_nonzero(const uint64_t *words, uint64_t start, uint64_t end) noexcept:
    """Return the first word in [start, end) that is not zero, or `end`."""
    if end - start <= SCANNED:
        return kernels.next_nonzero(words, start, end)
    with nogil:
        start = kernels.next_nonzero(words, start, end)
    return start


cdef uint64_t next_group(const dl_bitmap *bits, uint64_t group, uint64_t end, bint *stale) noexcept:
    """Return the first group of lines in [group, end) that may be dirty, or `end`; tell of tops set in vain."""
    cdef uint64_t scanned = SCANNED if bits.top == NULL else SCANNED_BY_TOP
    # Of the summary no more words than of the top.
    cdef uint64_t looks = SCANNED // DL_LINE_WORDS
    stale[0] = False
    if end - group <= scanned:
        group = dl_next_group_within(kernels, bits, group, end, &looks)
        stale[0] = looks < SCANNED // DL_LINE_WORDS
        if looks or group >= end:
            return group
    with nogil:
        looks = end
        group = dl_next_group_within(kernels, bits, group, end, &looks)
        stale[0] |= looks < end
    return group


cdef DirtyPages take_pages(const dl_bitmap *bits, uint64_t page_size, uint64_t first, uint64_t end, int clear,
                           DirtyPages nothing):
    """Get pages [first, end), which lie in the bitmap, and clear as `clear` says; as of one moment for each word."""
    cdef uint64_t nwords = dl_words_for(bits.npages)
    cdef dl_basket basket
    cdef Block dense
    cdef Block numbers, masks
    cdef dl_taken few[FEW_GROUPS]
    cdef dl_taken *taken = few
    cdef size_t ntaken = 0
    cdef size_t room
    cdef uint64_t nlines = 0
    cdef dl_parts parts
    cdef DirtyPages pages
    if bits.summary == NULL:
        return take_scan(bits, page_size, first, end, clear, nothing)
    parts = dl_parts_of(bits.npages, first, end)
    cdef uint64_t group = dl_first_group(&parts)
    cdef uint64_t groups = dl_end_group(&parts)
    cdef bint whole = parts.head_end == first and parts.tail_first == end
    cdef bint stale = False
    cdef uint64_t found
    if whole:
        found = next_group(bits, group, groups, &stale)
        # Top bits that harvests of a part have left are taken by one of everything, or each would look below them.
        if not (stale and clear and first == 0 and end == bits.npages):
            group = found
            if group >= groups and nothing is not None:
                dl_harvest_end()
                return nothing
    # I5: made before anything is taken, so that nothing can fail after.
    pages = pages_bare(bits.npages, page_size, True)
    basket = basket_new(clear)
    try:
        # I4: the summary first. I5: it is put back if what follows finds no memory.
        if groups - group <= SCANNED:
            ntaken = kernels.take_summary(bits, parts.first_line, parts.end_line, &group, few, FEW_GROUPS, clear,
                                          &nlines)
        else:
            with nogil:
                ntaken = kernels.take_summary(bits, parts.first_line, parts.end_line, &group, few, FEW_GROUPS, clear,
                                              &nlines)
        if group < groups:
            room = ntaken + (groups - group) + DL_LINE_WORDS
            taken = <dl_taken *>malloc(room * sizeof(dl_taken))
            if taken == NULL:
                taken = few
                raise MemoryError(f"no memory to note {room} groups of dirty lines")
            with nogil:
                memcpy(taken, few, ntaken * sizeof(dl_taken))
                ntaken += kernels.take_summary(bits, parts.first_line, parts.end_line, &group, taken + ntaken,
                                               room - ntaken, clear, &nlines)
        basket.all = clear == DL_CLEAR_QUIESCENT and first == 0 and end == bits.npages
        numbers, masks, dense = basket_open(&basket, nlines + 2, nwords)
        if whole and nlines <= FEW // DL_LINE_WORDS:
            dl_take_range(&basket, bits, &parts, taken, ntaken)
        else:
            with nogil:
                dl_take_range(&basket, bits, &parts, taken, ntaken)
    except MemoryError:
        if clear:
            dl_summary_untake(bits, taken, ntaken)
        raise
    finally:
        if taken != few:
            free(taken)
    if dense is None and basket.entries == 0 and nothing is not None:
        return nothing
    pages_fill(pages, dense, numbers, masks, basket.entries)
    return pages


cdef uint64_t count_pages(const dl_bitmap *bits) noexcept nogil:
    """Return how many pages are dirty, and take none."""
    return dl_count_pages(kernels, bits)


cdef uint64_t take_words(const dl_bitmap *bits, uint64_t *out, int clear) noexcept nogil:
    """Get and clear everything into words of somebody else's, all of which are written; return the pages."""
    return dl_harvest_by(kernels, bits, out, clear)


cdef size_t take_numbers(const dl_bitmap *bits, int64_t *out, size_t room) noexcept nogil:
    """Get and clear pages into numbers of somebody else's, as many as there is room for; return how many."""
    return dl_harvest_pages(kernels, bits, out, room)


cdef DirtyPages take_scan(const dl_bitmap *bits, uint64_t page_size, uint64_t first, uint64_t end, int clear,
                          DirtyPages nothing):
    """Take from foreign memory: few words as entries, and dense from where they become many."""
    cdef uint64_t nwords = dl_words_for(bits.npages)
    cdef dl_parts parts = dl_foreign_parts_of(bits.npages, first, end)
    cdef uint64_t stop = parts.tail_first // 64
    cdef uint64_t start = next_nonzero(bits.words, parts.head_end // 64, stop)
    cdef uint64_t reached
    cdef Block numbers, masks
    cdef Block dense = None
    cdef dl_basket basket = basket_new(clear)
    if start == stop and parts.head_end == first and parts.tail_first == end and nothing is not None:
        dl_harvest_end()
        return nothing
    # I5: made before anything is taken, so that nothing can fail after.
    cdef DirtyPages pages = pages_bare(bits.npages, page_size, True)
    # The scan may fill what it is told of; the words right of it, a line at most, need room of their own.
    basket.capacity = nwords // 16 + DL_GROUP_WORDS + 4 * DL_LINE_WORDS
    numbers = block_new(basket.capacity + DL_LINE_WORDS, False)
    masks = block_new(basket.capacity + DL_LINE_WORDS, False)
    basket.numbers = numbers.words
    basket.masks = masks.words
    with nogil:
        dl_take_part(&basket, bits.words, first, parts.head_end)
        reached = dl_take_foreign(&basket, bits.words, start, stop)
    if reached < stop:
        try:
            dense = block_for_result(nwords)
        except MemoryError:
            dl_put_back(&basket, bits)  # I5
            raise
        with nogil:
            dl_scatter(basket.numbers, basket.masks, basket.entries, dense.words)
            basket.out = dense.words
            dl_take_foreign(&basket, bits.words, reached, stop)
    with nogil:
        dl_take_part(&basket, bits.words, parts.tail_first, end)
        dl_take_end(clear)
    if dense is not None:
        pages_fill(pages, dense, None, None, 0)
    else:
        pages_fill(pages, None, trimmed(numbers, basket.entries), trimmed(masks, basket.entries), basket.entries)
    return pages


# ---- the form of a result -------------------------------------------------------

cdef dl_basket basket_new(int clear) noexcept:
    cdef dl_basket basket
    memset(&basket, 0, sizeof(basket))
    basket.k = kernels
    basket.clear = clear
    return basket


cdef tuple basket_open(dl_basket *basket, uint64_t lines, uint64_t nwords):
    """Choose the form of the result by the lines it may touch, and give it memory."""
    cdef Block numbers, masks, dense
    if lines * 2 * DL_LINE_WORDS > nwords:
        dense = block_for_result(nwords, not basket.all)
        basket.out = dense.words
        return None, None, dense
    basket.all = False
    numbers = block_new(lines * DL_LINE_WORDS, False)
    masks = block_new(lines * DL_LINE_WORDS, False)
    basket.numbers = numbers.words
    basket.masks = masks.words
    return numbers, masks, None


cdef Block trimmed(Block block, size_t n):
    """Return a block of the first `n` words where the rest would be much."""
    cdef Block smaller
    if n * 4 >= block.nwords:
        return block
    try:
        smaller = block_new(n, False)
    except MemoryError:
        return block  # I5: what has been taken is handed out all the same
    memcpy(smaller.words, block.words, n * 8)
    return smaller


cdef void clear_pages(const dl_bitmap *bits, DirtyPages pages) noexcept:
    with nogil:
        if pages.numbers is not None:
            dl_clear_sparse(bits, pages.numbers.words, pages.masks.words, pages.entries)
        else:
            dl_clear_dense(bits, pages.dense.words)
