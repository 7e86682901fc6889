/* Runs of adjacent pages, found as the places where a bitmap changes.
 *
 * A word XOR itself shifted up by one page, with the last page of the word
 * before shifted in, has a bit where a run starts and one where a run has
 * ended. Their numbers, expanded like any page numbers, are start, end, start,
 * end, ...: one subtraction a pair makes runs of them.
 */
#ifndef DIRTYLOG_RUNS_H
#define DIRTYLOG_RUNS_H

#include "_bits/simd.h"
#include "dirtylog/atomic.h"
#include "dirtylog/bits.h"

#define DL_RUNS_BLOCK 512 /* words: 4 KiB of changes stay in the first-level cache */

struct dl_changes {
    uint64_t carry; /* 1: the last page seen is dirty */
    uint64_t next;  /* sparse form: the word number that would follow the last one */
};

static inline uint64_t dl_change_word(uint64_t word, uint64_t *carry)
{
    uint64_t changes = word ^ (word << 1 | *carry);
    *carry = word >> 63;
    return changes;
}

/* Of words that nobody writes, since each is read more than once; words that others write go through live.h. */
static inline void dl_changes_dense(struct dl_changes *state, const uint64_t *words, size_t n, uint64_t *changes)
{
    if (n == 0)
        return;
    changes[0] = dl_change_word(words[0], &state->carry);
    for (size_t i = 1; i < n; i++)
        changes[i] = words[i] ^ (words[i] << 1 | words[i - 1] >> 63);
    state->carry = words[n - 1] >> 63;
}

/* A gap after a dirty last page ends a run in a word of its own. At most two
 * entries for each one read; returns how many. */
static inline size_t dl_changes_sparse(struct dl_changes *state, const uint64_t *numbers, const uint64_t *masks, size_t n,
                                       uint64_t *change_numbers, uint64_t *changes)
{
    size_t count = 0;
    for (size_t i = 0; i < n; i++) {
        if (state->carry && numbers[i] != state->next) {
            change_numbers[count] = state->next;
            changes[count++] = 1;
            state->carry = 0;
        }
        uint64_t word = dl_change_word(masks[i], &state->carry);
        change_numbers[count] = numbers[i];
        changes[count] = word;
        count += word != 0;
        state->next = numbers[i] + 1;
    }
    return count;
}

static inline size_t dl_runs_finish(const struct dl_changes *state, int64_t *out, size_t written, size_t room)
{
    if (state->carry && written < room)
        out[written++] = (int64_t)(state->next * DL_WORD_PAGES);
    for (size_t i = 0; i + 1 < written; i += 2)
        out[i + 1] -= out[i];
    return written / 2;
}

static inline size_t dl_count_runs(const struct dl_kernels *k, const uint64_t *words, size_t n)
{
    uint64_t changes[DL_RUNS_BLOCK];
    struct dl_changes state = {0, n};
    uint64_t total = 0;
    for (size_t i = 0; i < n; i += DL_RUNS_BLOCK) {
        size_t part = n - i < DL_RUNS_BLOCK ? n - i : DL_RUNS_BLOCK;
        dl_changes_dense(&state, words + i, part, changes);
        total += k->popcount(changes, part);
    }
    return (size_t)((total + state.carry) / 2);
}

/* `out`: (first, count) pairs, at most `capacity` of them; returns how many. */
static inline size_t dl_runs(const struct dl_kernels *k, const uint64_t *words, size_t n, int64_t *out, size_t capacity)
{
    uint64_t changes[DL_RUNS_BLOCK];
    struct dl_changes state = {0, n};
    size_t written = 0, room = 2 * capacity;
    for (size_t i = 0; i < n; i += DL_RUNS_BLOCK) {
        size_t part = n - i < DL_RUNS_BLOCK ? n - i : DL_RUNS_BLOCK;
        dl_changes_dense(&state, words + i, part, changes);
        written += k->expand(changes, part, (int64_t)(i * DL_WORD_PAGES), out + written, room - written);
    }
    return dl_runs_finish(&state, out, written, room);
}

static inline size_t dl_count_runs_sparse(const struct dl_kernels *k, const uint64_t *numbers, const uint64_t *masks,
                                          size_t n)
{
    uint64_t change_numbers[2 * DL_RUNS_BLOCK], changes[2 * DL_RUNS_BLOCK];
    struct dl_changes state = {0, 0};
    uint64_t total = 0;
    for (size_t i = 0; i < n; i += DL_RUNS_BLOCK) {
        size_t part = n - i < DL_RUNS_BLOCK ? n - i : DL_RUNS_BLOCK;
        total += k->popcount(changes, dl_changes_sparse(&state, numbers + i, masks + i, part, change_numbers, changes));
    }
    return (size_t)((total + state.carry) / 2);
}

static inline size_t dl_runs_sparse(const struct dl_kernels *k, const uint64_t *numbers, const uint64_t *masks, size_t n,
                                    int64_t *out, size_t capacity)
{
    uint64_t change_numbers[2 * DL_RUNS_BLOCK], changes[2 * DL_RUNS_BLOCK];
    struct dl_changes state = {0, 0};
    size_t written = 0, room = 2 * capacity;
    for (size_t i = 0; i < n; i += DL_RUNS_BLOCK) {
        size_t part = n - i < DL_RUNS_BLOCK ? n - i : DL_RUNS_BLOCK;
        size_t found = dl_changes_sparse(&state, numbers + i, masks + i, part, change_numbers, changes);
        written += k->expand_sparse(change_numbers, changes, found, out + written, room - written);
    }
    return dl_runs_finish(&state, out, written, room);
}

#endif /* DIRTYLOG_RUNS_H */
