/* What a harvest takes, and where it puts it: pages, lines and foreign words of a bitmap. */
#ifndef DIRTYLOG_HARVEST_H
#define DIRTYLOG_HARVEST_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "_bits/simd.h"
#include "dirtylog/bitmap.h"

/* How pages [first, end) of a bitmap are taken: cache lines of words whole, by their summary where there is one, and what
 * is left and right of them word by word. An empty range, or one within a line, is all head. */
struct dl_parts {
    uint64_t first, head_end;      /* pages */
    uint64_t first_line, end_line; /* lines */
    uint64_t tail_first, end;      /* pages */
};

static inline struct dl_parts dl_parts_of(uint64_t npages, uint64_t first, uint64_t end)
{
    struct dl_parts parts = {first, end, 0, 0, end, end};
    uint64_t first_line = first / DL_LINE_PAGES + (first % DL_LINE_PAGES != 0);
    /* The last line may be shorter than others, and is whole all the same. */
    uint64_t end_line = end == npages ? dl_lines_for(end) : end / DL_LINE_PAGES;
    if (first_line >= end_line)
        return parts;
    parts.first_line = first_line;
    parts.end_line = end_line;
    parts.head_end = first_line * DL_LINE_PAGES;
    if (end_line * DL_LINE_PAGES < end)
        parts.tail_first = end_line * DL_LINE_PAGES;
    return parts;
}

/* The same for memory that others mark: its lines are whole words. I7: whoever shares the memory may set bits past the
 * last page; they are not ours. */
static inline struct dl_parts dl_foreign_parts_of(uint64_t npages, uint64_t first, uint64_t end)
{
    struct dl_parts parts = dl_parts_of(npages, first, end);
    if (parts.head_end < parts.tail_first)
        parts.tail_first -= parts.tail_first % DL_WORD_PAGES;
    return parts;
}

static inline uint64_t dl_first_group(const struct dl_parts *parts) { return parts->first_line / DL_GROUP_LINES; }
static inline uint64_t dl_end_group(const struct dl_parts *parts)
{
    return parts->end_line / DL_GROUP_LINES + (parts->end_line % DL_GROUP_LINES != 0);
}

/* The first group of [group, end) whose summary is not zero; `end` if there is none. It takes nothing: relaxed loads, a
 * moment's view. What it passes over has been marked since, or another harvest beside this one is taking it (I4).
 *
 * A harvest of a part leaves top bits that have nothing below them any more. `*looks` of the lines of the summary under such
 * bits are looked at, each of which takes one off; with none left it returns where it has come to. */
static inline uint64_t dl_next_group_within(const struct dl_kernels *k, const struct dl_bitmap *b, uint64_t group, uint64_t end,
                                            uint64_t *looks)
{
    if (!b->top)
        return k->next_nonzero(b->summary, group, end);
    while (group < end && *looks) {
        uint64_t span = group / DL_SPAN_GROUPS;
        uint64_t word = k->next_nonzero(b->top, span / DL_WORD_PAGES, dl_top_words_for(b->npages));
        struct dl_part part = dl_part_first(word * DL_WORD_PAGES > span ? word * DL_WORD_PAGES : span, dl_spans_for(b->npages));
        uint64_t spans = part.mask ? dl_load_relaxed(&b->top[word]) & part.mask : 0;
        uint64_t first = spans ? word * DL_WORD_PAGES + dl_ffs(spans) : (word + 1) * DL_WORD_PAGES;
        if (first > span)
            group = first * DL_SPAN_GROUPS;
        uint64_t stop = (first + 1) * DL_SPAN_GROUPS < end ? (first + 1) * DL_SPAN_GROUPS : end;
        if (spans && group < end) {
            if ((group = k->next_nonzero(b->summary, group, stop)) < stop)
                return group;
            --*looks;
        }
    }
    return group < end ? group : end;
}

static inline uint64_t dl_next_group(const struct dl_kernels *k, const struct dl_bitmap *b, uint64_t group, uint64_t end)
{
    uint64_t looks = UINT64_MAX;
    return dl_next_group_within(k, b, group, end, &looks);
}

/* The pages in some lines of a group, whose words begin at `start`; those that follow each other at once. */
static inline uint64_t dl_count_lines(const struct dl_kernels *k, const uint64_t *words, uint64_t start, uint64_t lines,
                                      uint64_t nwords)
{
    uint64_t pages = 0;
    while (lines) {
        unsigned first = dl_ffs(lines);
        uint64_t rest = ~(lines >> first), at = start + first * (uint64_t)DL_LINE_WORDS;
        unsigned n = rest ? dl_ffs(rest) : DL_GROUP_LINES;
        uint64_t run = n * (uint64_t)DL_LINE_WORDS;
        pages += k->popcount(words + at, nwords - at < run ? nwords - at : run);
        lines &= ~(dl_mask_below(n) << first);
    }
    return pages;
}

/* The pages that are dirty; a moment's view while others mark. */
static inline uint64_t dl_count_pages(const struct dl_kernels *k, const struct dl_bitmap *b)
{
    uint64_t nwords = dl_words_for(b->npages), groups = dl_groups_for(b->npages), pages = 0;
    if (!b->summary) {
        /* I7: whoever shares the memory may set bits past the last page; they are not ours. */
        uint64_t whole = b->npages / DL_WORD_PAGES;
        pages = k->popcount(b->words, whole);
        if (whole < nwords)
            pages += (uint64_t)__builtin_popcountll(dl_load_relaxed(&b->words[whole]) & dl_tail_mask(b->npages));
        return pages;
    }
    for (uint64_t group = dl_next_group(k, b, 0, groups); group < groups; group = dl_next_group(k, b, group + 1, groups))
        pages += dl_count_lines(k, b->words, group * DL_GROUP_WORDS, dl_load_relaxed(&b->summary[group]), nwords);
    return pages;
}

struct dl_basket {
    const struct dl_kernels *k;
    uint64_t *numbers, *masks; /* sparse: entries, as many as `capacity` */
    size_t entries, capacity;
    uint64_t *out; /* dense if not NULL; zeroed, unless `all` */
    int all;       /* every word of the bitmap is moved: most lines are dirty, and nobody else writes a word */
    int clear;     /* DL_LEAVE, DL_CLEAR, DL_CLEAR_QUIESCENT */
};

/* All words of a bitmap that nobody else writes meanwhile, by parts that stay in the nearest cache from copy to clear. */
static inline void dl_move_all(const struct dl_bitmap *b, uint64_t *out)
{
    uint64_t nwords = dl_words_for(b->npages);
    for (uint64_t at = 0; at < nwords; at += DL_GROUP_WORDS) {
        uint64_t part = nwords - at < DL_GROUP_WORDS ? nwords - at : DL_GROUP_WORDS;
        memcpy(out + at, b->words + at, part * sizeof *out);
        memset(b->words + at, 0, part * sizeof *out);
    }
}

/* Whole words [start, end). */
static inline void dl_take_words(struct dl_basket *basket, uint64_t *words, uint64_t start, uint64_t end)
{
    if (basket->out)
        basket->k->take_dense(words + start, end - start, basket->out + start, basket->clear);
    else
        basket->entries += basket->k->take_sparse(words, start, end, basket->numbers + basket->entries,
                                              basket->masks + basket->entries, basket->clear);
}

/* Pages [first, end) word by word, the first and the last perhaps in part. */
static inline void dl_take_part(struct dl_basket *basket, uint64_t *words, uint64_t first, uint64_t end)
{
    for (struct dl_part part = dl_part_first(first, end); part.mask; dl_part_next(&part)) {
        uint64_t *word = &words[part.word];
        uint64_t bits = basket->clear ? dl_harvest_mask(word, part.mask) : dl_load_relaxed(word) & part.mask;
        if (basket->out) {
            basket->out[part.word] = bits;
        } else if (bits) {
            basket->numbers[basket->entries] = part.word;
            basket->masks[basket->entries++] = bits;
        }
    }
}

/* The words of the lines that the summary named. */
static inline void dl_take_lines(struct dl_basket *basket, uint64_t *words, const struct dl_taken *taken, size_t n)
{
    if (basket->out)
        basket->k->take_lines_dense(words, taken, n, basket->out, basket->clear);
    else
        basket->entries += basket->k->take_lines_sparse(words, taken, n, basket->numbers + basket->entries,
                                                    basket->masks + basket->entries, basket->clear);
}

/* The lines noted, and word by word the pages left and right of them. */
static inline void dl_take_range(struct dl_basket *basket, const struct dl_bitmap *b, const struct dl_parts *parts,
                                 const struct dl_taken *taken, size_t ntaken)
{
    /* I4: no word is read before the summary is seen to be taken. On x86 the exchange orders that by
     * itself; elsewhere its store may still be under way when the loads that follow it are done. */
    dl_fence_seq_cst();
    dl_take_part(basket, b->words, parts->first, parts->head_end);
    if (basket->all)
        dl_move_all(b, basket->out);
    else
        dl_take_lines(basket, b->words, taken, ntaken);
    dl_take_part(basket, b->words, parts->tail_first, parts->end);
    dl_take_end(basket->clear);
}

/* Scan words [start, end), which no summary describes; returns where the basket was full. */
static inline uint64_t dl_take_foreign(struct dl_basket *basket, uint64_t *words, uint64_t start, uint64_t end)
{
    while ((start = basket->k->next_nonzero(words, start, end)) < end) {
        uint64_t chunk = end - start < DL_GROUP_WORDS ? end - start : DL_GROUP_WORDS;
        if (!basket->out && basket->capacity - basket->entries < chunk)
            break;
        dl_take_words(basket, words, start, start + chunk);
        start += chunk;
    }
    return start;
}

/* I5: entries that were taken, and that there is no memory to hand out, are marked again. */
static inline void dl_put_back(const struct dl_basket *basket, const struct dl_bitmap *b)
{
    for (size_t i = 0; basket->clear && i < basket->entries; i++)
        dl_mark_mask(b, basket->numbers[i], basket->masks[i]);
}

/* ---- everything, into words of somebody else's ---- */

enum { DL_GROUPS_AT_ONCE = 16 };

/* dl_harvest() by vector code, or dl_harvest_quiescent(): writes all of dl_words_for(npages) words; returns the pages. */
static inline uint64_t dl_harvest_by(const struct dl_kernels *k, const struct dl_bitmap *b, uint64_t *out, int clear)
{
    uint64_t nwords = dl_words_for(b->npages), pages = 0, group = 0, zeroed = 0;
    struct dl_taken taken[DL_GROUPS_AT_ONCE];
    if (!b->summary) {
        memset(out, 0, nwords * sizeof *out);
        /* I7: whoever shares the memory may set bits past the last page; they are not ours. */
        uint64_t whole = b->npages / DL_WORD_PAGES;
        k->take_dense(b->words, whole, out, clear);
        if (whole < nwords)
            out[whole] = dl_harvest_mask(&b->words[whole], dl_tail_mask(b->npages));
        dl_take_end(clear);
        return k->popcount(out, nwords);
    }
    while (group < dl_groups_for(b->npages)) {
        uint64_t nlines = 0;
        size_t n = k->take_summary(b, 0, dl_lines_for(b->npages), &group, taken, DL_GROUPS_AT_ONCE, 1, &nlines);
        if (n == 0)
            continue;
        dl_fence_seq_cst(); /* I4, as in dl_take_range() */
        for (size_t i = 0; i < n; i++) {
            /* Zeroed up to the end of the group, which is in the nearest cache when its words come. */
            uint64_t end = (taken[i].group + 1) * DL_GROUP_WORDS;
            end = end < nwords ? end : nwords;
            memset(out + zeroed, 0, (end - zeroed) * sizeof *out);
            zeroed = end;
            /* Of a last line that is shorter no word past the end is dirty (I7), so none is written. */
            k->take_lines_dense(b->words, &taken[i], 1, out, clear);
            pages += dl_count_lines(k, out, taken[i].group * DL_GROUP_WORDS, taken[i].lines, nwords);
        }
    }
    memset(out + zeroed, 0, (nwords - zeroed) * sizeof *out);
    dl_take_end(clear);
    return pages;
}

#endif /* DIRTYLOG_HARVEST_H */
