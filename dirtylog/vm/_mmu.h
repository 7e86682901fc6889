/* The log itself: harvest, manual protection, dirty rings, and the built-in hook tables. Under slots_lock. */
#ifndef DIRTYLOG_MMU_H
#define DIRTYLOG_MMU_H

#include "vm/_ring.h"
#include "vm/_sync.h"

/* ---- harvest ---------------------------------------------------------------- */

/* Steps one and two of I2; the caller holds slots_lock and flushes next. */
static inline int dl_mmu_harvest(struct dl_mmu *mmu, struct dl_memslot *slot, int protect)
{
    int error = dl_lock_acquire(mmu->mmu_lock);
    if (error)
        return error;
    dl_harvest_take(&slot->log, &slot->table, protect ? &mmu->hooks : NULL);
    dl_lock_release(mmu->mmu_lock);
    return 0;
}

/* Under mmu_lock, when logging is switched on: 2 MiB mappings are divided at once,
 * or protected whole and divided by the first write fault. */
static inline void dl_mmu_protect_region(struct dl_mmu *mmu, struct dl_memslot *slot)
{
    for (uint64_t group = 0; slot->table.huge && group < slot->npages / DL_HUGE_PAGES; group++) {
        if (mmu->huge_split == DL_SPLIT_EAGERLY)
            dl_huge_divide(slot, group);
        else if (dl_load_relaxed(&slot->table.huge[group]) & DL_PTE_WRITABLE)
            dl_pte_protect(&slot->table.huge[group]);
    }
    if (mmu->hooks.protect_region)
        mmu->hooks.protect_region(mmu->hooks.context, &slot->table);
}

/* I1, counted: pages that a store reaches without a fault although their bit is
 * clear. Under mmu_lock, on a slot that logs by write faults into its bitmap. */
static inline uint64_t dl_count_unguarded(const struct dl_memslot *slot)
{
    uint64_t count = 0;
    for (uint64_t page = 0; page < slot->npages; page++) {
        uint64_t large = slot->table.huge ? dl_load_relaxed(&slot->table.huge[page / DL_HUGE_PAGES]) : 0;
        uint64_t entry = large ? large : dl_load_relaxed(&slot->table.ptes[page]);
        int marked = (dl_load_relaxed(&slot->log.marked.words[page / DL_WORD_PAGES]) & dl_bit(page)) != 0;
        count += (entry & DL_PTE_WRITABLE) && !marked;
    }
    return count;
}

/* ---- manual protection: under slots_lock ------------------------------------------ */

/* Initially all set: every page is reported once before any is protected. */
static inline void dl_log_fill(struct dl_memslot *slot) { dl_mark_range(&slot->log.marked, 0, slot->npages); }

/* Copy the log out and remember in the second half what was reported. */
static inline void dl_log_report(struct dl_double_log *log, uint64_t *out)
{
    for (uint64_t word = 0; word < dl_words_for(log->marked.npages); word++) {
        out[word] = dl_load_relaxed(&log->marked.words[word]);
        log->snapshot[word] |= out[word];
    }
}

/* Clear those of `words` that were reported, and write-protect their pages; what
 * was cleared goes to `cleared`. Under mmu_lock: a fault marks before or after
 * the whole of it. Returns whether anything was. */
static inline int dl_log_clear(struct dl_mmu *mmu, struct dl_memslot *slot, uint64_t first_word, uint64_t nwords,
                               const uint64_t *words, uint64_t *cleared, int protect)
{
    uint64_t any = 0;
    for (uint64_t i = 0; i < nwords; i++) {
        uint64_t word = first_word + i, mask = words[i] & slot->log.snapshot[word];
        if (mask)
            mask = dl_fetch_and(&slot->log.marked.words[word], ~mask) & mask;
        cleared[i] = mask;
        slot->log.snapshot[word] &= ~mask;
        any |= mask;
        if (mask)
            dl_protect_word(protect ? &mmu->hooks : NULL, &slot->table, word, mask);
    }
    return any != 0;
}

static inline void dl_log_unclear(struct dl_memslot *slot, uint64_t first_word, uint64_t nwords, const uint64_t *cleared)
{
    for (uint64_t i = 0; i < nwords; i++)
        if (cleared[i]) {
            dl_mark_mask(&slot->log.marked, first_word + i, cleared[i]);
            slot->log.snapshot[first_word + i] |= cleared[i];
        }
}

/* ---- dirty rings: under slots_lock -------------------------------------------------- */

static inline int dl_rings_init(struct dl_mmu *mmu, uint64_t size)
{
    for (uint32_t i = 0; i < mmu->nvcpus; i++) {
        mmu->vcpus[i].ring.entries = calloc(size, sizeof(struct dl_vcpu_ring_entry));
        if (!mmu->vcpus[i].ring.entries)
            return -ENOMEM;
        mmu->vcpus[i].ring.size = size;
    }
    return 0;
}

/* Fetch; returns the number of entries fetched and not released yet. */
static inline size_t dl_rings_fetch(struct dl_mmu *mmu)
{
    size_t n = 0;
    for (uint32_t i = 0; i < mmu->nvcpus; i++)
        n += dl_ring_fetch(&mmu->vcpus[i].ring);
    return n;
}

static inline void dl_rings_entries(const struct dl_mmu *mmu, uint64_t *slots, uint64_t *offsets)
{
    size_t n = 0;
    for (uint32_t i = 0; i < mmu->nvcpus; i++)
        n += dl_ring_entries(&mmu->vcpus[i].ring, slots + n, offsets + n);
}

static inline size_t dl_rings_masks(struct dl_mmu *mmu, struct dl_ring_mask *masks)
{
    size_t n = 0;
    for (uint32_t i = 0; i < mmu->nvcpus; i++)
        n += dl_ring_masks(&mmu->vcpus[i].ring, masks + n);
    return n;
}

static inline void dl_rings_forget(struct dl_mmu *mmu, uint32_t slot)
{
    for (uint32_t i = 0; i < mmu->nvcpus; i++)
        dl_ring_forget(&mmu->vcpus[i].ring, slot);
}

/* A mask may begin at any page: at most two aligned words of the page table. */
static inline int dl_rings_protect(struct dl_mmu *mmu, const struct dl_ring_mask *masks, size_t n)
{
    int error = dl_lock_acquire(mmu->mmu_lock);
    if (error)
        return error;
    for (size_t i = 0; i < n; i++) {
        struct dl_memslot *slot = dl_slot_of_id(mmu, (uint32_t)masks[i].slot);
        uint64_t word = masks[i].offset / DL_WORD_PAGES;
        unsigned shift = (unsigned)(masks[i].offset % DL_WORD_PAGES);
        /* The slot may have been deleted since, or be a smaller one of the same id. */
        if (!slot || masks[i].offset + dl_fls(masks[i].mask) >= slot->npages)
            continue;
        if (masks[i].mask << shift)
            dl_protect_word(&mmu->hooks, &slot->table, word, masks[i].mask << shift);
        if (shift && masks[i].mask >> (DL_WORD_PAGES - shift))
            dl_protect_word(&mmu->hooks, &slot->table, word + 1, masks[i].mask >> (DL_WORD_PAGES - shift));
    }
    dl_lock_release(mmu->mmu_lock);
    return 0;
}

/* Room again, once the pages are protected and the TLBs flushed. */
static inline void dl_rings_release(struct dl_mmu *mmu)
{
    for (uint32_t i = 0; i < mmu->nvcpus; i++)
        dl_ring_release(&mmu->vcpus[i].ring);
}

/* ---- the built-in hook tables ------------------------------------------------ */

static inline void dl_hook_flush_generation(void *context, struct dl_mmu *mmu, void (*generic)(struct dl_mmu *))
{
    (void)context, (void)generic;
    dl_flush_generation(mmu);
}

static const struct dl_arch_hooks dl_hooks_none = {0};
static const struct dl_arch_hooks dl_hooks_each = {
    .protect_masked = dl_protect_each,
    .protect_region = dl_protect_all,
};
static const struct dl_arch_hooks dl_hooks_dirty_bits = {
    .protect_masked = dl_protect_dirty_bits,
    .protect_region = dl_protect_all_dirty_bits,
};
static const struct dl_arch_hooks dl_hooks_range = {
    .protect_masked = dl_protect_range,
    .protect_region = dl_protect_all,
};
static const struct dl_arch_hooks dl_hooks_range_vmid = {
    .protect_masked = dl_protect_range,
    .protect_region = dl_protect_all,
    .flush_tlbs = dl_hook_flush_generation,
};

#endif /* DIRTYLOG_MMU_H */
