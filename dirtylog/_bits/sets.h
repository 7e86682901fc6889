/* Sets of pages in two forms, dense words or ascending (word number, mask)
 * entries: building them, combining them, hashing them. */
#ifndef DIRTYLOG_SETS_H
#define DIRTYLOG_SETS_H

#include <stddef.h>
#include <stdint.h>

#include "dirtylog/bits.h"
#include "dirtylog/bitmap.h"

enum dl_operation { DL_OR, DL_AND, DL_SUB, DL_XOR };

static inline uint64_t dl_combine_word(int op, uint64_t a, uint64_t b)
{
    switch (op) {
    case DL_OR:
        return a | b;
    case DL_AND:
        return a & b;
    case DL_SUB:
        return a & ~b;
    default:
        return a ^ b;
    }
}

static inline void dl_combine_dense(int op, const uint64_t *restrict a, const uint64_t *restrict b, uint64_t *restrict out,
                                    size_t n)
{
    for (size_t i = 0; i < n; i++)
        out[i] = dl_combine_word(op, a[i], b[i]);
}

/* The entry is kept if its mask is not zero. */
static inline size_t dl_put_entry(uint64_t *numbers, uint64_t *masks, size_t count, uint64_t number, uint64_t mask)
{
    numbers[count] = number;
    masks[count] = mask;
    return count + (mask != 0);
}

/* Merge two ascending lists; room for all that the operation may keep. */
static inline size_t dl_combine_sparse(int op, const uint64_t *na, const uint64_t *ma, size_t a, const uint64_t *nb,
                                       const uint64_t *mb, size_t b, uint64_t *numbers, uint64_t *masks)
{
    size_t i = 0, j = 0, count = 0;
    while (i < a || j < b) {
        uint64_t number, left = 0, right = 0;
        int take_left = j == b || (i < a && na[i] <= nb[j]);
        int take_right = i == a || (j < b && nb[j] <= na[i]);
        number = take_left ? na[i] : nb[j];
        if (take_left)
            left = ma[i++];
        if (take_right)
            right = mb[j++];
        uint64_t mask = dl_combine_word(op, left, right);
        if (mask)
            count = dl_put_entry(numbers, masks, count, number, mask);
    }
    return count;
}

static inline size_t dl_select_sparse(int op, const uint64_t *na, const uint64_t *ma, size_t a, const uint64_t *dense,
                                      uint64_t *numbers, uint64_t *masks)
{
    size_t count = 0;
    for (size_t i = 0; i < a; i++) {
        uint64_t mask = dl_combine_word(op, ma[i], dense[na[i]]);
        if (mask)
            count = dl_put_entry(numbers, masks, count, na[i], mask);
    }
    return count;
}

static inline void dl_scatter(const uint64_t *numbers, const uint64_t *masks, size_t n, uint64_t *out)
{
    for (size_t i = 0; i < n; i++)
        out[numbers[i]] |= masks[i];
}

/* Both forms of one set hash alike: only nonzero words count. */
static inline uint64_t dl_hash_entry(uint64_t hash, uint64_t number, uint64_t mask)
{
    hash = (hash ^ mask) * UINT64_C(0x9e3779b97f4a7c15);
    hash = (hash ^ hash >> 29 ^ number) * UINT64_C(0xbf58476d1ce4e5b9);
    return hash ^ hash >> 32;
}

static inline uint64_t dl_hash_sparse(const uint64_t *numbers, const uint64_t *masks, size_t n)
{
    uint64_t hash = 0;
    for (size_t i = 0; i < n; i++)
        hash = dl_hash_entry(hash, numbers[i], masks[i]);
    return hash;
}

static inline uint64_t dl_hash_dense(const uint64_t *words, size_t n)
{
    uint64_t hash = 0;
    for (size_t i = 0; i < n; i++)
        if (words[i])
            hash = dl_hash_entry(hash, i, words[i]);
    return hash;
}

/* ---- from ascending page numbers, repeats allowed ---- */

static inline size_t dl_words_of_indices(const int64_t *pages, size_t n)
{
    size_t count = n != 0;
    for (size_t i = 1; i < n; i++)
        count += (pages[i] / 64) != (pages[i - 1] / 64);
    return count;
}

static inline void dl_sparse_of_indices(const int64_t *pages, size_t n, uint64_t *numbers, uint64_t *masks)
{
    size_t count = 0;
    for (size_t i = 0; i < n; i++) {
        uint64_t page = (uint64_t)pages[i], number = page / DL_WORD_PAGES;
        if (count && numbers[count - 1] == number) {
            masks[count - 1] |= dl_bit(page);
            continue;
        }
        count = dl_put_entry(numbers, masks, count, number, dl_bit(page));
    }
}

static inline void dl_dense_of_indices(const int64_t *pages, size_t n, uint64_t *out)
{
    for (size_t i = 0; i < n; i++)
        out[(uint64_t)pages[i] / DL_WORD_PAGES] |= dl_bit((uint64_t)pages[i]);
}

/* ---- from (first, count) runs, ascending by first, overlaps allowed ---- */

/* The first run that is negative or reaches past npages; n if none does. */
static inline size_t dl_check_runs(const int64_t *runs, size_t n, uint64_t npages)
{
    for (size_t i = 0; i < n; i++) {
        int64_t first = runs[2 * i], count = runs[2 * i + 1];
        if (first < 0 || count < 0 || (uint64_t)first > npages || (uint64_t)count > npages - (uint64_t)first)
            return i;
    }
    return n;
}

/* What run i adds to the runs before it, which end at `end`: pages [*first, past); returns past,
 * not above *first if it adds nothing. */
static inline int64_t dl_run_rest(const int64_t *runs, size_t i, int64_t end, int64_t *first)
{
    *first = runs[2 * i] > end ? runs[2 * i] : end;
    return runs[2 * i] + runs[2 * i + 1];
}

/* Words that the runs touch, those that two runs share counted for each. */
static inline size_t dl_words_of_runs(const int64_t *runs, size_t n)
{
    size_t words = 0;
    int64_t end = 0;
    for (size_t i = 0; i < n; i++) {
        int64_t first, past = dl_run_rest(runs, i, end, &first);
        if (past <= first)
            continue;
        words += (size_t)((past - 1) / 64 - first / 64 + 1);
        end = past;
    }
    return words;
}

static inline size_t dl_sparse_of_runs(const int64_t *runs, size_t n, uint64_t *numbers, uint64_t *masks)
{
    size_t count = 0;
    int64_t end = 0;
    for (size_t i = 0; i < n; i++) {
        int64_t first, past = dl_run_rest(runs, i, end, &first);
        if (past <= first)
            continue;
        end = past;
        struct dl_part part = dl_part_first((uint64_t)first, (uint64_t)past);
        for (; part.mask; dl_part_next(&part)) {
            if (count && numbers[count - 1] == part.word)
                masks[count - 1] |= part.mask;
            else
                count = dl_put_entry(numbers, masks, count, part.word, part.mask);
        }
    }
    return count;
}

static inline void dl_dense_of_runs(const int64_t *runs, size_t n, uint64_t *out)
{
    for (size_t i = 0; i < n; i++) {
        uint64_t first = (uint64_t)runs[2 * i], count = (uint64_t)runs[2 * i + 1];
        for (struct dl_part part = dl_part_first(first, first + count); part.mask; dl_part_next(&part))
            out[part.word] |= part.mask;
    }
}

/* I9: `words` has a bit for each page of the address space that memory of `npages` pages touches, and the
 * memory begins inside the first of them. So page i of the address space lies in pages i - 1 and i of the
 * memory, which may have one fewer: mark both, in place. A line of clean words is read and never written:
 * it may be fresh memory that has no page behind it yet. */
static inline void dl_pages_of_unaligned(uint64_t *words, size_t n, uint64_t npages)
{
    for (size_t at = 0; at < n; at += DL_LINE_WORDS) {
        size_t end = n - at < DL_LINE_WORDS ? n : at + DL_LINE_WORDS;
        uint64_t next = end < n ? words[end] << 63 : 0, any = next;
        for (size_t i = at; i < end; i++)
            any |= words[i];
        if (!any)
            continue;
        for (size_t i = at; i + 1 < end; i++)
            words[i] |= words[i] >> 1 | words[i + 1] << 63;
        words[end - 1] |= words[end - 1] >> 1 | next;
    }
    /* I7: the last page of the address space may be past the last one of the memory. */
    size_t last = (size_t)dl_words_for(npages) - 1;
    words[last] &= dl_tail_mask(npages);
    if (last + 1 < n)
        words[last + 1] = 0;
}

#endif /* DIRTYLOG_SETS_H */
