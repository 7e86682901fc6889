/* A vCPU's stores and loads: TLB, page walk, write fault. */
#ifndef DIRTYLOG_STORE_H
#define DIRTYLOG_STORE_H

#include "vm/_flush.h"

enum { DL_STORE_BYTES, DL_STORE_WORD, DL_ADD_BYTE };

struct dl_store {
    int kind;
    const unsigned char *data;
    uint64_t value;
    uint64_t offset; /* within the page, in bytes */
    uint64_t size;
};

static inline void dl_store_apply(unsigned char *host, const struct dl_store *store)
{
    switch (store->kind) {
    case DL_STORE_BYTES:
        memcpy(host + store->offset, store->data, store->size);
        break;
    case DL_STORE_WORD:
        memcpy(host, &store->value, sizeof store->value);
        break;
    default:
        /* vCPUs that touch one page at a time each count. */
        DL_RMW(fetch_add, host, 1, RELAXED);
    }
}

static inline void dl_mark_page_dirty(struct dl_vcpu *vcpu, struct dl_memslot *slot, uint64_t page)
{
    if (!slot->logging)
        return;
    if (vcpu->ring.size)
        dl_ring_push(&vcpu->ring, slot->id, page);
    else
        dl_mark(&slot->log.marked, page);
}

static inline struct dl_tlb_entry *dl_tlb_fill(struct dl_vcpu *vcpu, uint64_t gfn, uint64_t generation,
                                               const struct dl_mmu *mmu, struct dl_memslot *slot)
{
    struct dl_tlb_entry *entry = &vcpu->tlb[gfn % DL_TLB_ENTRIES];
    uint64_t page = gfn - slot->base_gfn;
    entry->tag = gfn + 1;
    entry->generation = generation;
    entry->host = slot->host + (page << mmu->page_shift);
    entry->key = mmu->dirtying == DL_BY_STORAGE_KEY ? &slot->table.ptes[page] : NULL;
    return entry;
}

/* The D bit goes from clear to set, and the hardware notes the gfn: in guest mode,
 * so a drain, which passes the guest lock, finds it before the bit can be
 * cleared by the harvest that the drain belongs to. */
static inline int dl_pml_log(struct dl_vcpu *vcpu, uint64_t *pte, uint64_t gfn)
{
    if (vcpu->pml_count == DL_PML_ENTRIES)
        return DL_EXIT_PML_FULL;
    if (!(dl_fetch_or(pte, DL_PTE_DIRTY) & DL_PTE_DIRTY))
        vcpu->pml[vcpu->pml_count++] = gfn;
    return DL_STORED;
}

/* Mark what one vCPU noted; its guest lock is held. `leaving` is a slot that is
 * no longer in the table and must get its marks all the same. */
static inline void dl_pml_drain(struct dl_mmu *mmu, struct dl_vcpu *vcpu, struct dl_memslot *leaving)
{
    for (uint32_t i = 0; i < vcpu->pml_count; i++) {
        struct dl_memslot *slot = dl_slot_of_gfn(mmu, vcpu->pml[i]);
        if (!slot && leaving && vcpu->pml[i] - leaving->base_gfn < leaving->npages)
            slot = leaving;
        if (slot && slot->logging)
            dl_mark(&slot->log.marked, vcpu->pml[i] - slot->base_gfn);
    }
    vcpu->pml_count = 0;
}

/* A full buffer makes the vCPU leave guest mode and empty it. mmu_lock: the log
 * of a slot may be going away, or the slot on the move. */
static inline int dl_pml_full(struct dl_mmu *mmu, struct dl_vcpu *vcpu)
{
    int error = dl_lock_acquire(mmu->mmu_lock);
    if (error)
        return error;
    pthread_mutex_lock(&vcpu->guest);
    dl_pml_drain(mmu, vcpu, mmu->leaving);
    dl_guest_leave(vcpu);
    dl_lock_release(mmu->mmu_lock);
    return 0;
}

/* Give the 512 pages of a 2 MiB mapping entries of their own that permit what it
 * permitted. Under mmu_lock. The entries first: a walk that finds the large
 * entry gone finds them; one that still found it is waited for by the flush. */
static inline void dl_huge_divide(struct dl_memslot *slot, uint64_t group)
{
    uint64_t entry = dl_load_relaxed(&slot->table.huge[group]);
    if (!entry)
        return;
    for (uint64_t page = group * DL_HUGE_PAGES; page < (group + 1) * DL_HUGE_PAGES; page++)
        dl_store_release(&slot->table.ptes[page], entry);
    dl_exchange(&slot->table.huge[group], 0);
}

/* Map the faulting page, or the 512 pages about it where that needs no log. */
static inline void dl_map_writable(struct dl_mmu *mmu, struct dl_memslot *slot, uint64_t page)
{
    uint64_t group = page / DL_HUGE_PAGES;
    if (slot->table.huge && (group + 1) * DL_HUGE_PAGES <= slot->npages) {
        if (!slot->logging) {
            dl_fetch_or(&slot->table.huge[group], DL_PTE_PRESENT | DL_PTE_WRITABLE);
            return;
        }
        dl_huge_divide(slot, group);
    }
    dl_fetch_or(&slot->table.ptes[page], DL_PTE_PRESENT | DL_PTE_WRITABLE | (mmu->pml ? DL_PTE_DIRTY : 0));
}

/* The hardware's page walk for a store, in guest mode, without mmu_lock. What it
 * reads may be protected right after: the harvester's flush then waits for the
 * guest lock, so the store lands before the flush is over, and the page is in
 * the snapshot, since its bit was set when its entry was writable (I1). */
static inline int dl_walk(const struct dl_mmu *mmu, struct dl_vcpu *vcpu, struct dl_memslot *slot, uint64_t page)
{
    uint64_t *pte = &slot->table.ptes[page], seen;
    switch (mmu->dirtying) {
    case DL_BY_FAULT:
        if (slot->table.huge) {
            seen = dl_load_acquire(&slot->table.huge[page / DL_HUGE_PAGES]);
            if (seen)
                return seen & DL_PTE_WRITABLE ? DL_STORED : DL_EXIT_FAULT;
        }
        seen = dl_load_acquire(pte);
        if (mmu->pml && (seen & DL_PTE_WRITABLE) && !(seen & DL_PTE_DIRTY))
            return dl_pml_log(vcpu, pte, slot->base_gfn + page);
        return seen & DL_PTE_WRITABLE ? DL_STORED : DL_EXIT_FAULT;
    case DL_BY_SHADOW:
        return slot->shadow[vcpu->index * slot->npages + page] & DL_PTE_WRITABLE ? DL_STORED : DL_EXIT_FAULT;
    case DL_BY_CHANGE_BIT:
        /* The change bit is set and the store made in one stay in guest mode;
         * dl_sync_change_bits() drops the translation, hence passes the guest
         * lock, before it reads the bit. */
        seen = dl_load_acquire(pte);
        do {
            if (seen & DL_PTE_LOCK)
                return DL_EXIT_RETRY;
        } while (!DL_COMPARE_EXCHANGE(pte, &seen, seen | DL_PTE_PRESENT | DL_PTE_DIRTY, SEQ_CST, ACQUIRE));
        return DL_STORED;
    case DL_BY_STORAGE_KEY:
        return DL_STORED;
    default:
        return DL_EXIT_FAULT; /* DL_BY_FILL, DL_BY_VM_LOG: software refills the TLB */
    }
}

static inline void dl_store_through(const struct dl_tlb_entry *entry, const struct dl_store *store)
{
    dl_store_apply(entry->host, store);
    /* I3: after the store, a full barrier, and never skipped: nothing stops this
     * vCPU while its key is tested and cleared. */
    if (entry->key)
        dl_fetch_or(entry->key, DL_PTE_DIRTY);
}

/* One store in guest mode. */
static inline int dl_guest_store(struct dl_mmu *mmu, struct dl_vcpu *vcpu, uint64_t gfn, const struct dl_store *store)
{
    /* Before the walk: see dl_flush_generation(). */
    uint64_t generation = dl_load_acquire(&mmu->generation);
    struct dl_tlb_entry *entry = &vcpu->tlb[gfn % DL_TLB_ENTRIES];
    if (entry->tag != gfn + 1 || entry->generation != generation) {
        struct dl_memslot *slot = dl_slot_of_gfn(mmu, gfn);
        int exit = slot ? dl_walk(mmu, vcpu, slot, gfn - slot->base_gfn) : -EFAULT;
        if (exit)
            return exit;
        entry = dl_tlb_fill(vcpu, gfn, generation, mmu, slot);
    }
    dl_store_through(entry, store);
    return DL_STORED;
}

/* The write fault. Store, mark, make writable, cache: all of it under mmu_lock
 * (ia64: dirty_log_lock) and in guest mode. KVM marks, lets the guest run on and
 * has it store again; the mark may then be harvested before the store has come,
 * and the page is reported twice. Completing the store here keeps the log
 * exact and a vCPU that faults always gets on.
 *
 * I1: when the lock is free again the entry is writable and the bit is set.
 * I3: the mark follows the store. The entry is cached before the lock is free: a
 * refill after a harvest's flush would be an entry no flush removes. */
static inline int dl_fault(struct dl_mmu *mmu, struct dl_vcpu *vcpu, uint64_t gfn, const struct dl_store *store)
{
    struct dl_lock *lock = mmu->dirtying == DL_BY_VM_LOG ? mmu->dirty_log_lock : mmu->mmu_lock;
    struct dl_memslot *slot;
    uint64_t generation, page;
    int error = dl_lock_acquire(lock);
    if (error)
        return error;
    pthread_mutex_lock(&vcpu->guest);
    dl_vcpu_requests(vcpu);
    dl_store_relaxed(&vcpu->faults, vcpu->faults + 1); /* read beside this, by no lock */
    generation = dl_load_acquire(&mmu->generation);
    slot = dl_slot_of_gfn(mmu, gfn);
    if (!slot) {
        error = -EFAULT;
    } else {
        page = gfn - slot->base_gfn;
        dl_store_apply(slot->host + (page << mmu->page_shift), store);
        if (mmu->dirtying == DL_BY_VM_LOG)
            dl_fetch_or(&mmu->vm_log[gfn / DL_WORD_PAGES], dl_bit(gfn));
        else
            dl_mark_page_dirty(vcpu, slot, page);
        if (mmu->dirtying == DL_BY_FAULT)
            dl_map_writable(mmu, slot, page);
        else if (mmu->dirtying == DL_BY_SHADOW)
            slot->shadow[vcpu->index * slot->npages + page] = DL_PTE_PRESENT | DL_PTE_WRITABLE;
        dl_tlb_fill(vcpu, gfn, generation, mmu, slot);
    }
    dl_guest_leave(vcpu);
    dl_lock_release(lock);
    return error;
}

/* A gfn without a slot may belong to one that is being moved: wait until the
 * update is over and look again. A thread that is itself the updater has its
 * answer at once. */
static inline int dl_backed_after_update(struct dl_mmu *mmu, uint64_t gfn)
{
    int backed, error = dl_lock_acquire(mmu->slots_lock);
    if (error)
        return 0;
    backed = dl_slot_of_gfn(mmu, gfn) != NULL;
    dl_lock_release(mmu->slots_lock);
    return backed;
}

/* Store once into each page; `*done` counts the pages, also when it fails. */
static inline int dl_vcpu_store(struct dl_mmu *mmu, struct dl_vcpu *vcpu, const uint64_t *gfns, size_t n,
                                const struct dl_store *store, size_t *done)
{
    size_t i = 0;
    int exit = DL_STORED;
    while (i < n && exit >= 0) {
        size_t burst_end = i + DL_TLB_BURST < n ? i + DL_TLB_BURST : n;
        dl_guest_enter(vcpu);
        do {
            /* Before the store: what it may push has its place. */
            exit = dl_ring_full(&vcpu->ring) ? DL_EXIT_RING_FULL : dl_guest_store(mmu, vcpu, gfns[i], store);
        } while (exit == DL_STORED && ++i < burst_end);
        dl_guest_leave(vcpu);
        if (exit == DL_EXIT_FAULT) {
            exit = dl_fault(mmu, vcpu, gfns[i], store);
            i += exit == DL_STORED;
        }
        if (exit == DL_EXIT_PML_FULL)
            exit = dl_pml_full(mmu, vcpu);
        if (exit == DL_EXIT_RING_FULL)
            exit = -ENOBUFS;
        if (exit == DL_EXIT_RETRY)
            sched_yield();
        if (exit == -EFAULT && dl_backed_after_update(mmu, gfns[i]))
            exit = DL_EXIT_RETRY;
    }
    *done = i;
    return exit < 0 ? exit : 0;
}

/* The first page of the list that no slot backs, n where all are backed. */
static inline size_t dl_vcpu_unbacked(struct dl_mmu *mmu, struct dl_vcpu *vcpu, const uint64_t *gfns, size_t n)
{
    size_t i = 0;
    do {
        dl_guest_enter(vcpu);
        for (; i < n && dl_slot_of_gfn(mmu, gfns[i]); i++)
            ;
        dl_guest_leave(vcpu);
    } while (i < n && dl_backed_after_update(mmu, gfns[i]));
    return i;
}

/* Bytes at any address, page by page; 0 or -errno, `*bad_gfn` for -EFAULT.
 * Nothing is stored unless every page is backed when it begins. */
static inline int dl_vcpu_write(struct dl_mmu *mmu, struct dl_vcpu *vcpu, uint64_t gpa, const unsigned char *data,
                                uint64_t size, uint64_t *written, uint64_t *bad_gfn)
{
    const uint64_t page_size = UINT64_C(1) << mmu->page_shift;
    struct dl_store store = {.kind = DL_STORE_BYTES};
    size_t done;
    *written = 0;
    if (!size)
        return 0;
    for (*bad_gfn = gpa >> mmu->page_shift; *bad_gfn <= (gpa + size - 1) >> mmu->page_shift; ++*bad_gfn)
        if (dl_vcpu_unbacked(mmu, vcpu, bad_gfn, 1) == 0)
            return -EFAULT;
    for (; size; gpa += store.size, data += store.size, size -= store.size) {
        int error;
        store.data = data;
        store.offset = gpa & (page_size - 1);
        store.size = page_size - store.offset < size ? page_size - store.offset : size;
        *bad_gfn = gpa >> mmu->page_shift;
        error = dl_vcpu_store(mmu, vcpu, bad_gfn, 1, &store, &done);
        if (error)
            return error;
        *written += store.size;
    }
    return 0;
}

/* Loads use no TLB: nothing about a load concerns the log. */
static inline int dl_vcpu_read(struct dl_mmu *mmu, struct dl_vcpu *vcpu, uint64_t gpa, unsigned char *out,
                               uint64_t size, uint64_t *bad_gfn)
{
    const uint64_t page_size = UINT64_C(1) << mmu->page_shift;
    while (size) {
        uint64_t offset = gpa & (page_size - 1), part = page_size - offset < size ? page_size - offset : size;
        const struct dl_memslot *slot;
        *bad_gfn = gpa >> mmu->page_shift;
        dl_guest_enter(vcpu);
        slot = dl_slot_of_gfn(mmu, *bad_gfn);
        if (slot) {
            memcpy(out, slot->host + (gpa - (slot->base_gfn << mmu->page_shift)), part);
            gpa += part, out += part, size -= part;
        }
        dl_guest_leave(vcpu);
        if (!slot && !dl_backed_after_update(mmu, *bad_gfn))
            return -EFAULT;
    }
    return 0;
}

#endif /* DIRTYLOG_STORE_H */
