/* The contents of pages: which differ, which are zero. */
#ifndef DIRTYLOG_CONTENT_H
#define DIRTYLOG_CONTENT_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "dirtylog/bits.h"

static inline size_t dl_page_bytes(size_t nbytes, size_t page_size, size_t page)
{
    size_t left = nbytes - page * page_size;
    return left < page_size ? left : page_size;
}

/* The C library's memcmp chooses its own vector code at run time. `out` is zeroed. */
static inline void dl_compare_pages(const unsigned char *a, const unsigned char *b, size_t nbytes, size_t page_size,
                                    uint64_t *out)
{
    for (size_t page = 0; page * page_size < nbytes; page++)
        if (memcmp(a + page * page_size, b + page * page_size, dl_page_bytes(nbytes, page_size, page)))
            out[page / DL_WORD_PAGES] |= dl_bit(page);
}

/* The pages of `words`, from one memory to the same place in another. */
static inline void dl_copy_pages(unsigned char *target, const unsigned char *source, size_t nbytes, size_t page_size,
                                 const uint64_t *words)
{
    for (size_t page = 0; page * page_size < nbytes; page++)
        if (words[page / DL_WORD_PAGES] & dl_bit(page))
            memcpy(target + page * page_size, source + page * page_size, dl_page_bytes(nbytes, page_size, page));
}

/* A block is zero if its first byte is, and every byte equals the one before. */
static inline int dl_is_zero(const unsigned char *data, size_t nbytes)
{
    return data[0] == 0 && memcmp(data, data + 1, nbytes - 1) == 0;
}

static inline void dl_zero_pages(const unsigned char *a, size_t nbytes, size_t page_size, uint64_t *out)
{
    for (size_t page = 0; page * page_size < nbytes; page++)
        if (dl_is_zero(a + page * page_size, dl_page_bytes(nbytes, page_size, page)))
            out[page / DL_WORD_PAGES] |= dl_bit(page);
}

#endif /* DIRTYLOG_CONTENT_H */
