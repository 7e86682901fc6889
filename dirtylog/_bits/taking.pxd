# Taking pages out of a bitmap, for whoever has one.
from libc.stdint cimport int64_t, uint64_t

from dirtylog._bits.bitmap cimport dl_bitmap
from dirtylog._bits.pages cimport DirtyPages

# MemoryError: nothing has been taken (I5). Where there is no page to take, the answer is `nothing`, if it is not None.
cdef DirtyPages take_pages(const dl_bitmap *bits, uint64_t page_size, uint64_t first, uint64_t end, int clear,
                           DirtyPages nothing)
# Clear the bits of pages, as many as `bits` has. Needs no memory, so it cannot fail.
cdef void clear_pages(const dl_bitmap *bits, DirtyPages pages) noexcept
cdef uint64_t count_pages(const dl_bitmap *bits) noexcept nogil
cdef uint64_t take_words(const dl_bitmap *bits, uint64_t *out, int clear) noexcept nogil
cdef size_t take_numbers(const dl_bitmap *bits, int64_t *out, size_t room) noexcept nogil
