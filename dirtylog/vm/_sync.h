/* What the hardware recorded, moved into a slot's log, and memslots that come and go with it. Under slots_lock. */
#ifndef DIRTYLOG_SYNC_H
#define DIRTYLOG_SYNC_H

#include "vm/_store.h"

/* ia64: exchange the slot's words of the machine's log, never copy and then zero
 * them. A slot need not begin at a word, so each of its words comes from two. */
static inline int dl_sync_vm_log(struct dl_mmu *mmu, struct dl_memslot *slot, int discard)
{
    const uint64_t nwords = dl_words_for(slot->npages);
    const unsigned shift = (unsigned)(slot->base_gfn % DL_WORD_PAGES);
    int error = dl_lock_acquire(mmu->dirty_log_lock);
    if (error)
        return error;
    for (uint64_t word = 0; word < nwords; word++) {
        uint64_t mask = word + 1 == nwords ? dl_tail_mask(slot->npages) : DL_ALL_PAGES;
        uint64_t *source = &mmu->vm_log[slot->base_gfn / DL_WORD_PAGES + word], bits;
        bits = dl_harvest_mask(source, mask << shift) >> shift;
        if (shift)
            bits |= dl_harvest_mask(source + 1, mask >> (DL_WORD_PAGES - shift)) << (DL_WORD_PAGES - shift);
        if (bits && !discard)
            dl_mark_mask(&slot->log.marked, word, bits);
    }
    dl_lock_release(mmu->dirty_log_lock);
    return 0;
}

/* The machine's log reaches to `end_gfn`; under slots_lock. */
static inline int dl_vm_log_grow(struct dl_mmu *mmu, uint64_t end_gfn)
{
    uint64_t nwords = dl_words_for(end_gfn) + 1; /* one more: dl_sync_vm_log() reads pairs */
    uint64_t *old = mmu->vm_log, *fresh;
    size_t mapped, old_mapped = mmu->vm_log_mapped;
    int error;
    if (nwords <= mmu->vm_log_words)
        return 0;
    fresh = dl_words_alloc(nwords, 1, &mapped);
    if (!fresh)
        return -ENOMEM;
    error = dl_lock_acquire(mmu->dirty_log_lock);
    if (error) {
        dl_words_free(fresh, mapped);
        return error;
    }
    /* Only what is set: untouched parts of a log that reaches far cost no memory. */
    for (uint64_t word = 0; word < mmu->vm_log_words; word++)
        if (old[word])
            fresh[word] = old[word];
    mmu->vm_log = fresh;
    mmu->vm_log_words = nwords;
    mmu->vm_log_mapped = mapped;
    dl_lock_release(mmu->dirty_log_lock);
    if (old)
        dl_words_free(old, old_mapped);
    return 0;
}

/* powerpc: under the entry's lock bit, drop the translation on every vCPU, then
 * test and clear the change bit. A vCPU that meets the lock bit leaves guest
 * mode and tries again, so the drop never waits for one that waits for it. */
static inline void dl_sync_change_bits(struct dl_mmu *mmu, struct dl_memslot *slot, int discard)
{
    for (uint64_t page = 0; page < slot->npages; page++) {
        uint64_t *pte = &slot->table.ptes[page];
        /* Clear now means no vCPU caches a translation for stores: one that is
         * about to set the bit is reported next time. */
        if (!(dl_load_relaxed(pte) & DL_PTE_DIRTY))
            continue;
        while (dl_fetch_or(pte, DL_PTE_LOCK) & DL_PTE_LOCK)
            sched_yield();
        dl_flush_range(mmu, slot->base_gfn + page, 1);
        if ((dl_fetch_and(pte, ~(DL_PTE_DIRTY | DL_PTE_LOCK)) & DL_PTE_DIRTY) && !discard)
            dl_mark(&slot->log.marked, page);
    }
}

/* s390: test and clear each key in one step. A store whose mark has not come yet
 * is reported next time: its mark comes after it (I3). */
static inline void dl_sync_storage_keys(struct dl_memslot *slot, int discard)
{
    for (uint64_t page = 0; page < slot->npages; page++) {
        uint64_t *key = &slot->table.ptes[page];
        if (!(dl_load_relaxed(key) & DL_PTE_DIRTY))
            continue;
        if ((dl_fetch_and(key, ~DL_PTE_DIRTY) & DL_PTE_DIRTY) && !discard)
            dl_mark(&slot->log.marked, page);
    }
}

/* Move, or with `discard` forget, what the hardware recorded about the slot. */
static inline int dl_sync(struct dl_mmu *mmu, struct dl_memslot *slot, int discard)
{
    switch (mmu->dirtying) {
    case DL_BY_VM_LOG:
        return dl_sync_vm_log(mmu, slot, discard);
    case DL_BY_CHANGE_BIT:
        dl_sync_change_bits(mmu, slot, discard);
        return 0;
    case DL_BY_STORAGE_KEY:
        dl_sync_storage_keys(slot, discard);
        return 0;
    default:
        for (uint32_t i = 0; mmu->pml && i < mmu->nvcpus; i++) {
            dl_guest_kick(&mmu->vcpus[i]);
            dl_pml_drain(mmu, &mmu->vcpus[i], slot);
            dl_guest_leave(&mmu->vcpus[i]);
        }
        if (mmu->hooks.sync_dirty_log && !discard)
            mmu->hooks.sync_dirty_log(mmu->hooks.context, &slot->table, &slot->log.marked);
        return 0;
    }
}

/* ---- memslots come and go: under slots_lock ----------------------------------- */

static inline int dl_table_change(struct dl_mmu *mmu, struct dl_memslot *removed, struct dl_memslot *added)
{
    struct dl_slot_table *table = dl_table_with(mmu->table, removed, added);
    int error = table ? dl_table_publish(mmu, table) : -ENOMEM;
    if (error)
        free(table);
    return error;
}

static inline int dl_mmu_add(struct dl_mmu *mmu, struct dl_memslot *slot)
{
    int error = 0;
    if (mmu->dirtying == DL_BY_VM_LOG) {
        error = dl_vm_log_grow(mmu, slot->base_gfn + slot->npages);
        /* What a slot that was deleted left behind is nobody's. */
        if (!error)
            error = dl_sync(mmu, slot, 1);
    }
    return error ? error : dl_table_change(mmu, NULL, slot);
}

static inline int dl_mmu_remove(struct dl_mmu *mmu, struct dl_memslot *slot)
{
    int error = dl_table_change(mmu, slot, NULL);
    if (!error)
        dl_slot_free(slot);
    return error;
}

/* Which slot is on the move, for a vCPU whose buffer fills up meanwhile. */
static inline int dl_set_leaving(struct dl_mmu *mmu, struct dl_memslot *slot)
{
    int error = dl_lock_acquire(mmu->mmu_lock);
    if (error)
        return error;
    mmu->leaving = slot;
    dl_lock_release(mmu->mmu_lock);
    return 0;
}

/* The slot leaves its place, what the hardware knows about it is collected, and
 * it comes back elsewhere with the same log. A vCPU that meets the gap waits
 * for slots_lock: see dl_backed_after_update(). What it noted of the slot before
 * may be marked in the gap, by itself: see dl_pml_full(). */
static inline int dl_mmu_move(struct dl_mmu *mmu, struct dl_memslot *slot, uint64_t base_gfn)
{
    struct dl_memslot *moved = dl_slot_new(mmu, slot->id, base_gfn, slot->npages, slot->host);
    struct dl_slot_table *table = NULL;
    int error;
    if (!moved || !(table = dl_table_with(mmu->table, slot, moved))) {
        dl_slot_free(moved);
        return -ENOMEM;
    }
    error = mmu->dirtying == DL_BY_VM_LOG ? dl_vm_log_grow(mmu, base_gfn + slot->npages) : 0;
    if (!error)
        error = dl_set_leaving(mmu, slot);
    if (!error) {
        error = dl_table_change(mmu, slot, NULL);
        if (error)
            dl_set_leaving(mmu, NULL);
    }
    if (error) {
        free(table);
        dl_slot_free(moved);
        return error;
    }
    dl_sync(mmu, slot, !slot->logging);
    /* Every buffer has been emptied since the slot left the table, and nothing of it comes into one any more. */
    dl_set_leaving(mmu, NULL);
    moved->log = slot->log;
    moved->words_mapped = slot->words_mapped;
    moved->summary_mapped = slot->summary_mapped;
    moved->logging = slot->logging;
    memset(&slot->log, 0, sizeof slot->log);
    if (mmu->dirtying == DL_BY_VM_LOG)
        dl_sync(mmu, moved, 1);
    error = dl_table_publish(mmu, table);
    dl_slot_free(slot);
    return error;
}

#endif /* DIRTYLOG_SYNC_H */
