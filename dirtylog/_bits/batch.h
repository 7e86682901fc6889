/* Many pages or words of a bitmap at once: mark, merge, clear. */
#ifndef DIRTYLOG_BATCH_H
#define DIRTYLOG_BATCH_H

#include <stddef.h>
#include <stdint.h>

#include "_bits/simd.h"
#include "dirtylog/bitmap.h"

/* Marks ahead that a batch asks for a line; covers a miss in the cache. */
#define DL_AHEAD_MARKS 16u

/* A batch is the caller's array, which other threads may write meanwhile: each number is loaded once. */
static inline uint64_t dl_batch_page(const int64_t *pages, size_t i) { return dl_load_relaxed((const uint64_t *)pages + i); }

/* The place of the first page out of range, n if all are in. */
static inline size_t dl_check_batch(const int64_t *pages, size_t n, uint64_t npages)
{
    for (size_t i = 0; i < n; i++)
        if (dl_batch_page(pages, i) >= npages)
            return i;
    return n;
}

/* Mark pages, those of one word that follow each other at once. Returns n, or the place of one that
 * another thread has changed to be out of range since all were checked. Out of line, where its loop has the registers for
 * itself. */
__attribute__((noinline, unused)) static size_t dl_mark_batch(const struct dl_bitmap *bitmap, const int64_t *pages, size_t n)
{
    const struct dl_bitmap levels = *bitmap; /* in registers, whatever the marks do to memory */
    uint64_t current = 0, mask = 0;
    size_t i = 0;
    dl_batch_begin();
    for (; i < n; i++) {
        if (i + DL_AHEAD_MARKS < n)
            __builtin_prefetch(levels.words + dl_batch_page(pages, i + DL_AHEAD_MARKS) / DL_WORD_PAGES, 1);
        uint64_t page = dl_batch_page(pages, i);
        if (page >= levels.npages)
            break;
        if (page / DL_WORD_PAGES != current && mask) {
            dl_batch_mark(&levels, current, mask);
            mask = 0;
        }
        current = page / DL_WORD_PAGES;
        mask |= dl_bit(page);
    }
    if (mask)
        dl_batch_mark(&levels, current, mask);
    return i;
}

/* Mark the pages of `mask`, whose bit 0 is `page`. */
static inline void dl_merge_word(const struct dl_bitmap *bitmap, uint64_t page, uint64_t mask)
{
    unsigned shift = page % DL_WORD_PAGES;
    if (mask << shift)
        dl_batch_mark(bitmap, page / DL_WORD_PAGES, mask << shift);
    if (shift && mask >> (64 - shift))
        dl_batch_mark(bitmap, page / DL_WORD_PAGES + 1, mask >> (64 - shift));
}

static inline void dl_merge_sparse(const struct dl_bitmap *bitmap, const uint64_t *numbers, const uint64_t *masks,
                                   size_t n, uint64_t first_page)
{
    dl_batch_begin();
    for (size_t i = 0; i < n; i++)
        dl_merge_word(bitmap, first_page + numbers[i] * DL_WORD_PAGES, masks[i]);
}

static inline void dl_merge_dense(const struct dl_kernels *k, const struct dl_bitmap *bitmap, const uint64_t *words,
                                  size_t n, uint64_t first_page)
{
    dl_batch_begin();
    for (size_t i = k->next_nonzero(words, 0, n); i < n; i = k->next_nonzero(words, i + 1, n))
        dl_merge_word(bitmap, first_page + i * DL_WORD_PAGES, words[i]);
}

/* Clear bits; the summary stays set, which costs the next harvest a line and loses nothing (I4). I3: who clears is about
 * to copy, so each function ends as a harvest does. */
static inline void dl_clear_word(const struct dl_bitmap *bitmap, uint64_t word, uint64_t mask)
{
    if (dl_load_relaxed(&bitmap->words[word]) & mask)
        dl_fetch_and(&bitmap->words[word], ~mask);
}

static inline void dl_clear_sparse(const struct dl_bitmap *bitmap, const uint64_t *numbers, const uint64_t *masks, size_t n)
{
    for (size_t i = 0; i < n; i++)
        dl_clear_word(bitmap, numbers[i], masks[i]);
    dl_harvest_end();
}

static inline void dl_clear_dense(const struct dl_bitmap *bitmap, const uint64_t *words)
{
    for (uint64_t i = 0; i < dl_words_for(bitmap->npages); i++)
        dl_clear_word(bitmap, i, words[i]);
    dl_harvest_end();
}

/* `count` of at least 1. */
static inline void dl_clear_range(const struct dl_bitmap *bitmap, uint64_t first, uint64_t count)
{
    for (struct dl_part part = dl_part_first(first, first + count); part.mask; dl_part_next(&part))
        dl_clear_word(bitmap, part.word, part.mask);
    dl_harvest_end();
}

#endif /* DIRTYLOG_BATCH_H */
