/* Page numbers and runs of words that others write meanwhile: each word is read once, into a copy of its block. */
#ifndef DIRTYLOG_LIVE_H
#define DIRTYLOG_LIVE_H

#include "_bits/runs.h"

/* How far an expansion has come; it goes on when there is more room. All zero at the start. */
struct dl_live {
    size_t done;    /* words */
    size_t written; /* numbers */
    uint64_t carry; /* runs: 1 if the last page seen is dirty */
};

static inline void dl_live_copy(uint64_t *copy, const uint64_t *words, size_t n)
{
    for (size_t i = 0; i < n; i++)
        copy[i] = dl_load_relaxed(&words[i]);
}

/* Returns 0 when all is written, else how many numbers there must be room for. What has been copied and did not
 * fit is read again: it is the same moment's view, a little later, and nothing of it has been written. */
static inline size_t dl_live_expand(struct dl_live *live, const struct dl_kernels *k, const uint64_t *words, size_t n,
                                    int64_t *out, size_t room, int runs)
{
    uint64_t copy[DL_RUNS_BLOCK], changes[DL_RUNS_BLOCK];
    while (live->done < n) {
        size_t part = n - live->done < DL_RUNS_BLOCK ? n - live->done : DL_RUNS_BLOCK;
        const uint64_t *bits = copy;
        struct dl_changes state = {live->carry, 0};
        dl_live_copy(copy, words + live->done, part);
        if (runs) {
            dl_changes_dense(&state, copy, part, changes);
            bits = changes;
        }
        size_t count = (size_t)k->popcount(bits, part);
        if (count > room - live->written)
            return live->written + count + 1;
        live->written +=
            k->expand(bits, part, (int64_t)(live->done * DL_WORD_PAGES), out + live->written, room - live->written);
        live->carry = state.carry;
        live->done += part;
    }
    return 0;
}

/* How many numbers the runs take if nobody marks meanwhile. */
static inline size_t dl_live_count_runs(const struct dl_kernels *k, const uint64_t *words, size_t n)
{
    uint64_t copy[DL_RUNS_BLOCK], changes[DL_RUNS_BLOCK];
    struct dl_changes state = {0, 0};
    size_t total = 0;
    for (size_t i = 0; i < n; i += DL_RUNS_BLOCK) {
        size_t part = n - i < DL_RUNS_BLOCK ? n - i : DL_RUNS_BLOCK;
        dl_live_copy(copy, words + i, part);
        dl_changes_dense(&state, copy, part, changes);
        total += (size_t)k->popcount(changes, part);
    }
    return total + state.carry;
}

static inline size_t dl_live_indices(struct dl_live *live, const struct dl_kernels *k, const uint64_t *words, size_t n,
                                     int64_t *out, size_t room)
{
    return dl_live_expand(live, k, words, n, out, room, 0);
}

/* The numbers are first, count, first, count, ... */
static inline size_t dl_live_runs(struct dl_live *live, const struct dl_kernels *k, const uint64_t *words, size_t n,
                                  int64_t *out, size_t room)
{
    size_t needed = dl_live_expand(live, k, words, n, out, room, 1);
    if (needed)
        return needed;
    if (live->carry && live->written == room)
        return live->written + 1;
    struct dl_changes state = {live->carry, n};
    live->written = 2 * dl_runs_finish(&state, out, live->written, room);
    return 0;
}

#endif /* DIRTYLOG_LIVE_H */
