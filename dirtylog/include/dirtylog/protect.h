/* Write protection and the memslot harvest: the table of C hooks an architecture may fill.
 *
 * Nothing here takes a lock. A page table and its log are handled under the
 * owner's mmu_lock, and the order of a harvest is I2: per word, exchange it into
 * the second half of the bitmap, then write-protect its pages; the caller
 * flushes the TLBs after the last word and hands the copy out after the flush.
 */
#ifndef DIRTYLOG_PROTECT_H
#define DIRTYLOG_PROTECT_H

#include "dirtylog/atomic.h"
#include "dirtylog/bitmap.h"
#include "dirtylog/bits.h"

#ifdef __cplusplus
extern "C" {
#endif

/* One 64-bit entry a page. DIRTY is x86's D bit, the HPTE's C bit, or the
 * change bit of an s390 storage key; LOCK is the HPTE's lock bit. */
#define DL_PTE_PRESENT UINT64_C(0x1)
#define DL_PTE_WRITABLE UINT64_C(0x2)
#define DL_PTE_DIRTY UINT64_C(0x4)
#define DL_PTE_LOCK UINT64_C(0x8)

#define DL_HUGE_PAGES 512u /* pages a 2 MiB mapping, eight words of the log */

/* The part of a second-stage page table that maps one memslot. */
struct dl_page_table {
    uint64_t *ptes;
    uint64_t *huge; /* one entry for DL_HUGE_PAGES pages, NULL where nothing maps 2 MiB */
    uint64_t npages;
};

struct dl_mmu; /* the machine: opaque to hooks */

/* What an architecture written in C or Cython supplies, as a PyCapsule of this
 * name. NULL stands for "does nothing". Every function is called without the
 * GIL and must not call Python; `context` is handed through. */
#define DL_ARCH_HOOKS_CAPSULE "dirtylog.arch_hooks.1"
struct dl_arch_hooks {
    void *context;
    /* Under mmu_lock: write-protect at least the pages `first_page + b` for
     * every set bit b. `mask` is not zero, `first_page` a multiple of 64. */
    void (*protect_masked)(void *context, const struct dl_page_table *table, uint64_t first_page, uint64_t mask);
    /* Under mmu_lock, when logging is switched on: write-protect them all. */
    void (*protect_region)(void *context, const struct dl_page_table *table);
    /* Under slots_lock, before a harvest: move what the hardware recorded into `log`. */
    void (*sync_dirty_log)(void *context, const struct dl_page_table *table, const struct dl_bitmap *log);
    /* Under slots_lock: after it returns, no store through an entry that was
     * cached before may land. `generic` is the flush used where this is NULL. */
    void (*flush_tlbs)(void *context, struct dl_mmu *mmu, void (*generic)(struct dl_mmu *mmu));
};

/* Relaxed would do for the exclusion, since every reader that stores through
 * the entry is waited for by the flush; the full barrier keeps the snapshot
 * before the protection, as in I2. */
static inline void dl_pte_protect(uint64_t *pte) { dl_fetch_and(pte, ~DL_PTE_WRITABLE); }

static inline void dl_protect_page(const struct dl_page_table *table, uint64_t page)
{
    /* Under mmu_lock nobody else makes an entry writable, so one that is seen
     * protected stays so: no locked instruction for it. */
    if (page < table->npages && (dl_load_relaxed(&table->ptes[page]) & DL_PTE_WRITABLE))
        dl_pte_protect(&table->ptes[page]);
}

/* KVM's form for x86: each set bit. */
static inline void dl_protect_each(void *context, const struct dl_page_table *table, uint64_t first_page, uint64_t mask)
{
    (void)context;
    for (; mask; mask &= mask - 1)
        dl_protect_page(table, first_page + dl_ffs(mask));
}

/* KVM's form for ARM, stage2_wp_range(): from the first set bit to the
 * last. Clean pages between are protected too; they fault and mark once more. */
static inline void dl_protect_range(void *context, const struct dl_page_table *table, uint64_t first_page, uint64_t mask)
{
    uint64_t page = first_page + dl_ffs(mask), end = first_page + dl_fls(mask) + 1;
    (void)context;
    for (; page < end; page++)
        dl_protect_page(table, page);
}

/* x86 with a page-modification log: pages stay writable, the D bit goes, so
 * that the next store through a fresh translation is logged again. */
static inline void dl_protect_dirty_bits(void *context, const struct dl_page_table *table, uint64_t first_page,
                                         uint64_t mask)
{
    (void)context;
    for (; mask; mask &= mask - 1) {
        uint64_t page = first_page + dl_ffs(mask);
        if (page < table->npages && (dl_load_relaxed(&table->ptes[page]) & DL_PTE_DIRTY))
            dl_fetch_and(&table->ptes[page], ~DL_PTE_DIRTY);
    }
}

static inline void dl_protect_all(void *context, const struct dl_page_table *table)
{
    (void)context;
    for (uint64_t page = 0; page < table->npages; page++)
        dl_protect_page(table, page);
}

static inline void dl_protect_all_dirty_bits(void *context, const struct dl_page_table *table)
{
    (void)context;
    for (uint64_t page = 0; page < table->npages; page++)
        if (dl_load_relaxed(&table->ptes[page]) & DL_PTE_DIRTY)
            dl_fetch_and(&table->ptes[page], ~DL_PTE_DIRTY);
}

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

#ifdef __cplusplus
}
#endif

#endif /* DIRTYLOG_PROTECT_H */
