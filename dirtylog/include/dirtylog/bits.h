/* Arithmetic on one word and its 64 pages: page 64*i + b is bit b of word i. */
#ifndef DIRTYLOG_BITS_H
#define DIRTYLOG_BITS_H

#include <stdint.h>

#define DL_WORD_PAGES 64u     /* pages a word */
#define DL_LINE_WORDS 8u      /* words a cache line */
#define DL_LINE_PAGES 512u    /* pages a cache line of words */
#define DL_ALL_PAGES UINT64_MAX

/* KVM's __ffs and __fls: 0-based, undefined on 0. */
static inline unsigned dl_ffs(uint64_t mask) { return (unsigned)__builtin_ctzll(mask); }
static inline unsigned dl_fls(uint64_t mask) { return 63u - (unsigned)__builtin_clzll(mask); }

static inline uint64_t dl_bit(uint64_t page) { return UINT64_C(1) << (page % DL_WORD_PAGES); }

/* Bits [first, DL_WORD_PAGES) and [0, end); `first` below 64, `end` in 1..64. */
static inline uint64_t dl_mask_from(unsigned first) { return DL_ALL_PAGES << first; }
static inline uint64_t dl_mask_below(unsigned end) { return DL_ALL_PAGES >> (DL_WORD_PAGES - end); }

static inline uint64_t dl_words_for(uint64_t npages) { return npages / DL_WORD_PAGES + (npages % DL_WORD_PAGES != 0); }

/* A range of pages as its part in each word, from the first to the last:
 *
 *     for (struct dl_part part = dl_part_first(first, end); part.mask; dl_part_next(&part))
 *         words[part.word] |= part.mask;
 */
struct dl_part {
    uint64_t word, mask; /* which word, and the range's bits in it; 0 behind the last one */
    uint64_t last_word, last_mask;
};

/* Of [first, end): no part if that is empty. */
static inline struct dl_part dl_part_first(uint64_t first, uint64_t end)
{
    struct dl_part part = {first / DL_WORD_PAGES, 0, 0, 0};
    if (first >= end)
        return part;
    part.last_word = (end - 1) / DL_WORD_PAGES;
    part.last_mask = dl_mask_below((unsigned)((end - 1) % DL_WORD_PAGES) + 1);
    part.mask = dl_mask_from((unsigned)(first % DL_WORD_PAGES));
    if (part.word == part.last_word)
        part.mask &= part.last_mask;
    return part;
}

static inline void dl_part_next(struct dl_part *part)
{
    uint64_t word = part->word + 1;
    part->mask = word < part->last_word ? DL_ALL_PAGES : word == part->last_word ? part->last_mask : 0;
    part->word = word;
}

/* I7: the bits of the last word that stand for pages; all ones when it is full. */
static inline uint64_t dl_tail_mask(uint64_t npages)
{
    unsigned used = (unsigned)(npages % DL_WORD_PAGES);
    return used ? dl_mask_below(used) : DL_ALL_PAGES;
}

#endif /* DIRTYLOG_BITS_H */
