/* The kernels that exist once for each instruction set, and the choice of one. */
#ifndef DIRTYLOG_SIMD_H
#define DIRTYLOG_SIMD_H

#include <stddef.h>
#include <stdint.h>

#include "dirtylog/bitmap.h"

/* What a kernel does with the words that it gets: leave them, clear each by an atomic exchange, or clear them by plain
 * loads and stores, since whoever asked for it has promised that nobody else writes a word meanwhile. */
enum { DL_LEAVE, DL_CLEAR, DL_CLEAR_QUIESCENT };

/* The last step of every harvest. */
static inline void dl_take_end(int clear)
{
    if (clear == DL_CLEAR_QUIESCENT)
        dl_move_end();
    else
        dl_harvest_end();
}

/* The lowest `n` bits of `bits`. */
static inline uint64_t dl_lowest_bits(uint64_t bits, size_t n)
{
    uint64_t rest = bits;
    for (; rest && n; n--)
        rest &= rest - 1;
    return bits ^ rest;
}

/* All lengths in words unless said otherwise. On every path a word is taken by a locked
 * instruction, one for each word (I8), or for two that are aligned to 16 bytes: see "Memory orders"
 * in docs/explanation. What kernels read of words that others may be marking decides which
 * words to take, or is a moment's view of each: a count, a peek. */
struct dl_kernels {
    const char *name;

    uint64_t (*popcount)(const uint64_t *words, size_t n);

    /* The first word in [from, n) that is not zero; n if there is none. */
    size_t (*next_nonzero)(const uint64_t *words, size_t from, size_t n);

    /* Note the dirty lines of [first_line, end_line), by groups from `*next` on, and
     * clear them in the summary if `clear`; returns how many groups are in `taken`.
     * Adds their lines to `*nlines`. Ends when `*next` is past the last group, or
     * there are fewer than eight places left of `room`. */
    size_t (*take_summary)(const struct dl_bitmap *b, uint64_t first_line, uint64_t end_line, uint64_t *next,
                           struct dl_taken *taken, size_t room, int clear, uint64_t *nlines);

    /* Get what is not zero, and clear it as `clear` says: the words of [0, n) or
     * [first, end), or of the lines that `taken` names, all of which are whole. Dense:
     * into the same places of `out`, which is zeroed. Sparse: as entries (word number,
     * word), for which there is room for every word of those lines; returns how many. */
    void (*take_dense)(uint64_t *words, size_t n, uint64_t *out, int clear);
    size_t (*take_sparse)(uint64_t *words, size_t first, size_t end, uint64_t *numbers, uint64_t *masks, int clear);
    void (*take_lines_dense)(uint64_t *words, const struct dl_taken *taken, size_t groups, uint64_t *out, int clear);
    size_t (*take_lines_sparse)(uint64_t *words, const struct dl_taken *taken, size_t groups, uint64_t *numbers,
                                uint64_t *masks, int clear);

    /* The numbers of the set bits, ascending, at most `capacity`; returns how
     * many were written. `first` is the number of bit 0 of words[0]. */
    size_t (*expand)(const uint64_t *words, size_t n, int64_t first, int64_t *out, size_t capacity);
    size_t (*expand_sparse)(const uint64_t *numbers, const uint64_t *masks, size_t n, int64_t *out, size_t capacity);
};

/* The kernels of that name, or the best ones for NULL; NULL if the name is not
 * known or this CPU cannot run them. */
const struct dl_kernels *dl_kernels_find(const char *name);

/* The i-th kernels that were compiled, best first; NULL past the end. `*missing` is what this CPU or its operating
 * system lacks to run them, NULL if nothing. */
const struct dl_kernels *dl_kernels_known(size_t i, const char **missing);

/* The i-th kernels, best first, that this CPU can run; NULL past the end. */
const struct dl_kernels *dl_kernels_at(size_t i);

#endif /* DIRTYLOG_SIMD_H */
