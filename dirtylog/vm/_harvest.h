/* The memslot harvest: a log of double length, and what is protected while it is taken.
 *
 * Nothing here takes a lock. A page table and its log are handled under the
 * owner's mmu_lock, and the order of a harvest is I2: per word, exchange it into
 * the second half of the bitmap, then write-protect its pages; the caller
 * flushes the TLBs after the last word and hands the copy out after the flush.
 */
#ifndef DIRTYLOG_VM_HARVEST_H
#define DIRTYLOG_VM_HARVEST_H

#include "dirtylog/protect.h"

/* A 2 MiB mapping is the core's business, not the hook's: the eight words below
 * it share one entry. */
static inline void dl_protect_huge(const struct dl_page_table *table, uint64_t word)
{
    uint64_t group = word / DL_LINE_WORDS;
    if (table->huge && (dl_load_relaxed(&table->huge[group]) & DL_PTE_WRITABLE))
        dl_pte_protect(&table->huge[group]);
}

/* Protect the pages of one word. `hooks` NULL leaves all but 2 MiB mappings to
 * the caller. */
static inline void dl_protect_word(const struct dl_arch_hooks *hooks, const struct dl_page_table *table, uint64_t word,
                                   uint64_t mask)
{
    dl_protect_huge(table, word);
    if (hooks && hooks->protect_masked)
        hooks->protect_masked(hooks->context, table, word * DL_WORD_PAGES, mask);
}

/* The batch form: the same for word numbers and masks in arrays. */
static inline void dl_protect_words(const struct dl_arch_hooks *hooks, const struct dl_page_table *table,
                                    const uint64_t *numbers, const uint64_t *masks, size_t count)
{
    for (size_t i = 0; i < count; i++)
        if (masks[i])
            dl_protect_word(hooks, table, numbers[i], masks[i]);
}

/* A memslot's log of double length: vCPUs mark the first half, a harvest fills
 * the second and allocates nothing. The summary has two halves as well. */
struct dl_double_log {
    struct dl_bitmap marked;    /* first half */
    uint64_t *snapshot;         /* second half: zero between harvests */
    uint64_t *snapshot_summary; /* the summary words that were taken with it */
    uint64_t taken;             /* nonzero words in the snapshot */
};

/* Steps one and two of I2 under mmu_lock: for every nonzero word exchange it
 * into the second half and write-protect its pages. `hooks` NULL leaves the
 * second step to the caller (batch form, or no write protection). Returns the
 * number of nonzero words.
 *
 * Exchange, never read and zero: a mark between the two would be wiped out. */
static inline uint64_t dl_harvest_take(struct dl_double_log *log, const struct dl_page_table *table,
                                       const struct dl_arch_hooks *hooks)
{
    const uint64_t nwords = dl_words_for(log->marked.npages);
    for (uint64_t group = 0; group < dl_groups_for(log->marked.npages); group++) {
        uint64_t lines;
        /* What this load misses was marked during the harvest: next time. */
        if (!dl_load_relaxed(&log->marked.summary[group]))
            continue;
        /* I4: the summary first, the leaves after it. */
        lines = dl_summary_take(&log->marked, group, DL_ALL_PAGES);
        dl_fence_seq_cst(); /* see there */
        log->snapshot_summary[group] |= lines;
        for (; lines; lines &= lines - 1) {
            uint64_t word = (group * DL_GROUP_LINES + dl_ffs(lines)) * DL_LINE_WORDS;
            uint64_t line_end = word + DL_LINE_WORDS < nwords ? word + DL_LINE_WORDS : nwords;
            for (; word < line_end; word++) {
                uint64_t mask = dl_harvest_word(&log->marked.words[word]);
                if (!mask)
                    continue;
                /* OR: what an earlier harvest took and nobody handed out is still in there. */
                log->taken += !log->snapshot[word];
                log->snapshot[word] |= mask;
                dl_protect_word(hooks, table, word, mask);
            }
        }
    }
    return log->taken;
}

/* Step four, under slots_lock: the nonzero words of the second half as numbers
 * and masks, `taken` of each. Clears nothing. */
static inline void dl_snapshot_words(const struct dl_double_log *log, uint64_t *numbers, uint64_t *masks)
{
    const uint64_t nwords = dl_words_for(log->marked.npages);
    size_t n = 0;
    for (uint64_t group = 0; group < dl_groups_for(log->marked.npages); group++)
        for (uint64_t lines = log->snapshot_summary[group]; lines; lines &= lines - 1) {
            uint64_t word = (group * DL_GROUP_LINES + dl_ffs(lines)) * DL_LINE_WORDS;
            uint64_t line_end = word + DL_LINE_WORDS < nwords ? word + DL_LINE_WORDS : nwords;
            for (; word < line_end; word++)
                if (log->snapshot[word]) {
                    numbers[n] = word;
                    masks[n++] = log->snapshot[word];
                }
        }
}

/* The first half as it is now; clears nothing. */
static inline void dl_log_copy(const struct dl_double_log *log, uint64_t *out)
{
    for (uint64_t word = 0; word < dl_words_for(log->marked.npages); word++)
        out[word] = dl_load_relaxed(&log->marked.words[word]);
}

/* Empty the second half; `put_back` marks what it held once more (I5). */
static inline void dl_snapshot_drop(struct dl_double_log *log, int put_back)
{
    for (uint64_t group = 0; group < dl_groups_for(log->marked.npages); group++) {
        for (uint64_t lines = log->snapshot_summary[group]; lines; lines &= lines - 1) {
            uint64_t word = (group * DL_GROUP_LINES + dl_ffs(lines)) * DL_LINE_WORDS;
            /* Both halves are padded to whole lines. */
            for (uint64_t end = word + DL_LINE_WORDS; word < end; word++) {
                if (put_back && log->snapshot[word])
                    dl_mark_mask(&log->marked, word, log->snapshot[word]);
                log->snapshot[word] = 0;
            }
        }
        log->snapshot_summary[group] = 0;
    }
    log->taken = 0;
}

#endif /* DIRTYLOG_VM_HARVEST_H */
