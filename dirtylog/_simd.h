/* The kernels that exist once for each instruction set, and the choice of one. */
#ifndef DIRTYLOG_SIMD_H
#define DIRTYLOG_SIMD_H

#include <stddef.h>
#include <stdint.h>

#include "dirtylog/bitmap.h"

/* All lengths in words unless said otherwise. Kernels read words that others
 * may be marking only to decide which words to exchange; the exchange itself
 * is one locked instruction a word on every path (I8). */
struct dl_kernels {
    const char *name;

    uint64_t (*popcount)(const uint64_t *words, size_t n);

    /* The first word in [from, n) that is not zero; n if there is none. */
    size_t (*next_nonzero)(const uint64_t *words, size_t from, size_t n);

    /* Get what is not zero, and clear it if `clear`: the words of [0, n), or of
     * the lines that `taken` names among them. Dense: into the same places of
     * `out`, which is zeroed. Sparse: as (word number, word) entries, `base`
     * added to the number; returns how many. */
    void (*take_dense)(uint64_t *words, size_t n, uint64_t *out, int clear);
    size_t (*take_sparse)(uint64_t *words, size_t n, uint64_t base, uint64_t *numbers, uint64_t *masks, int clear);
    void (*take_lines_dense)(uint64_t *words, size_t n, const struct dl_taken *taken, size_t groups, uint64_t *out,
                             int clear);
    size_t (*take_lines_sparse)(uint64_t *words, size_t n, const struct dl_taken *taken, size_t groups, uint64_t *numbers,
                                uint64_t *masks, int clear);

    /* The numbers of the set bits, ascending, at most `capacity`; returns how
     * many were written. `first` is the number of bit 0 of words[0]. */
    size_t (*expand)(const uint64_t *words, size_t n, int64_t first, int64_t *out, size_t capacity);
    size_t (*expand_sparse)(const uint64_t *numbers, const uint64_t *masks, size_t n, int64_t *out, size_t capacity);
};

/* The kernels of that name, or the best ones for NULL; NULL if the name is not
 * known or this CPU cannot run them. */
const struct dl_kernels *dl_kernels_find(const char *name);

/* The i-th kernels, best first, that this CPU can run; NULL past the end. */
const struct dl_kernels *dl_kernels_at(size_t i);

#endif /* DIRTYLOG_SIMD_H */
