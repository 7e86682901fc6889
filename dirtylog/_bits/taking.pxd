# Taking pages out of a bitmap, for whoever has one.
from libc.stdint cimport uint64_t

from dirtylog._bits.bitmap cimport dl_bitmap
from dirtylog._bits.pages cimport DirtyPages

# MemoryError: nothing has been taken (I5). Where there is no page to take, the answer is `nothing`, if it is not None.
cdef DirtyPages take_pages(const dl_bitmap *bits, uint64_t page_size, uint64_t first, uint64_t end, bint clear,
                           DirtyPages nothing)
cdef uint64_t take_words(const dl_bitmap *bits, uint64_t *out) noexcept nogil
