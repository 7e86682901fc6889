/* The machine's state and its vCPUs' stores: page tables, TLBs, flushes. No Python in here.
 *
 * Locks, outermost first:
 *   slots_lock      memslots and whole harvests
 *   mmu_lock        page tables and marks made by faults
 *   dirty_log_lock  ia64's log of the whole machine, in mmu_lock's place
 *   guest           one a vCPU: held while the vCPU is "in guest mode", over
 *                   translation and store together
 * Whoever waits for one holds no GIL, so a thread that runs without the GIL is
 * excluded as well as one that holds it.
 *
 * The guest lock is the shoot-down: a flush asks every vCPU to drop its
 * entries, then passes through every guest lock. A store that used an old
 * entry has landed when the flush returns. The same passage is the grace
 * period after which a removed memslot may be freed.
 */
#ifndef DIRTYLOG_MMU_H
#define DIRTYLOG_MMU_H

#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>

#include "_memory.h"
#include "dirtylog/protect.h"
#include "vm/_ring.h"

/* How an architecture learns that a page was written. */
enum dl_dirtying {
    DL_BY_FAULT,       /* a write fault marks; the page-table entry becomes writable */
    DL_BY_FILL,        /* every TLB refill for a store marks; no page table of ours */
    DL_BY_VM_LOG,      /* the same into one log of the whole machine, under dirty_log_lock */
    DL_BY_SHADOW,      /* a write fault marks; each vCPU has a page table of its own */
    DL_BY_CHANGE_BIT,  /* the walk sets a change bit in the page table; no faults */
    DL_BY_STORAGE_KEY, /* every store sets the change bit of the page's key; no faults */
};

#define DL_TLB_ENTRIES 256u
#define DL_TLB_BURST 64u /* stores for one stay in guest mode */

#define DL_REQUEST_TLB_FLUSH UINT64_C(1)

/* Why a vCPU left guest mode before its store; negative values are errnos. */
enum { DL_STORED = 0, DL_EXIT_FAULT = 1, DL_EXIT_RETRY = 2, DL_EXIT_PML_FULL = 3, DL_EXIT_RING_FULL = 4 };

#define DL_PML_ENTRIES 512u

/* Whether 512 pages may be mapped in one piece, and when logging splits it. */
enum dl_huge_split { DL_NO_HUGE_PAGES, DL_SPLIT_EAGERLY, DL_SPLIT_ON_WRITE };

/* A mutex that knows its owner: a second acquisition by the owner is an error, not a hang. */
struct dl_lock {
    pthread_mutex_t mutex;
    uint64_t owner; /* pthread_self() of the holder, 0: free */
};

struct dl_memslot {
    uint32_t id;
    int logging;
    uint64_t base_gfn;
    uint64_t npages;
    unsigned char *host;
    struct dl_page_table table;
    size_t table_mapped, huge_mapped, shadow_mapped, words_mapped, summary_mapped;
    uint64_t *shadow; /* DL_BY_SHADOW: npages entries for each vCPU, each part under its vCPU's guest lock */
    struct dl_double_log log;
};

/* Sorted by base_gfn. Replaced as a whole, under mmu_lock; read under mmu_lock or any guest lock. */
struct dl_slot_table {
    size_t count;
    struct dl_memslot *slots[];
};

struct dl_tlb_entry {
    uint64_t tag; /* gfn + 1, 0: empty */
    uint64_t generation;
    unsigned char *host;
    uint64_t *key; /* DL_BY_STORAGE_KEY */
};

struct dl_vcpu {
    pthread_mutex_t guest;
    uint64_t kickers;  /* threads that wait for the guest lock: the vCPU lets them in first */
    uint64_t requests;
    uint64_t faults;
    uint64_t flushes;
    uint32_t index;
    uint32_t pml_count;
    uint64_t pml[DL_PML_ENTRIES]; /* gfns whose D bit this vCPU set; under its guest lock */
    struct dl_ring ring;
    struct dl_tlb_entry tlb[DL_TLB_ENTRIES];
};

struct dl_mmu {
    struct dl_lock *slots_lock, *mmu_lock, *dirty_log_lock;
    struct dl_slot_table *table;
    struct dl_vcpu *vcpus;
    uint32_t nvcpus;
    unsigned page_shift;
    int dirtying;
    uint64_t generation; /* ARM's flush by VMID: entries of an older generation do not match */
    uint64_t flushes;
    uint64_t *vm_log; /* DL_BY_VM_LOG: one bit a gfn */
    uint64_t vm_log_words;
    size_t vm_log_mapped;
    struct dl_arch_hooks hooks;
    int pml;
    int huge_split;
};

/* ---- locks ---------------------------------------------------------------- */

static inline int dl_lock_init(struct dl_lock *lock)
{
    pthread_mutexattr_t attributes;
    int error;
    lock->owner = 0;
    pthread_mutexattr_init(&attributes);
    pthread_mutexattr_settype(&attributes, PTHREAD_MUTEX_ERRORCHECK);
    error = pthread_mutex_init(&lock->mutex, &attributes);
    pthread_mutexattr_destroy(&attributes);
    return -error;
}

static inline void dl_lock_destroy(struct dl_lock *lock) { pthread_mutex_destroy(&lock->mutex); }

static inline int dl_lock_acquire(struct dl_lock *lock)
{
    int error = pthread_mutex_lock(&lock->mutex);
    if (!error)
        dl_store_relaxed(&lock->owner, (uint64_t)pthread_self());
    return -error;
}

static inline int dl_lock_held(const struct dl_lock *lock)
{
    return dl_load_relaxed(&lock->owner) == (uint64_t)pthread_self();
}

static inline int dl_lock_release(struct dl_lock *lock)
{
    if (!dl_lock_held(lock))
        return -EPERM;
    dl_store_relaxed(&lock->owner, 0);
    return -pthread_mutex_unlock(&lock->mutex);
}

/* ---- memslots ------------------------------------------------------------- */

static inline struct dl_slot_table *dl_table(const struct dl_mmu *mmu)
{
    /* Pairs with the release in dl_table_publish(). */
    return __atomic_load_n(&mmu->table, __ATOMIC_ACQUIRE);
}

static inline struct dl_memslot *dl_slot_of_gfn(const struct dl_mmu *mmu, uint64_t gfn)
{
    const struct dl_slot_table *table = dl_table(mmu);
    size_t low = 0, high = table->count;
    while (low < high) {
        size_t middle = (low + high) / 2;
        if (table->slots[middle]->base_gfn + table->slots[middle]->npages <= gfn)
            low = middle + 1;
        else
            high = middle;
    }
    return low < table->count && table->slots[low]->base_gfn <= gfn ? table->slots[low] : NULL;
}

static inline struct dl_memslot *dl_slot_of_id(const struct dl_mmu *mmu, uint32_t id)
{
    const struct dl_slot_table *table = dl_table(mmu);
    for (size_t i = 0; i < table->count; i++)
        if (table->slots[i]->id == id)
            return table->slots[i];
    return NULL;
}

static inline void dl_log_free(struct dl_memslot *slot)
{
    if (slot->log.marked.words)
        dl_words_free(slot->log.marked.words, slot->words_mapped);
    if (slot->log.marked.summary)
        dl_words_free(slot->log.marked.summary, slot->summary_mapped);
    memset(&slot->log, 0, sizeof slot->log);
}

/* The seed's bitmap of double length, each half padded to whole lines. */
static inline int dl_log_alloc(struct dl_memslot *slot)
{
    uint64_t half = dl_lines_for(slot->npages) * DL_LINE_WORDS, groups = dl_groups_for(slot->npages);
    slot->log.marked.npages = slot->npages;
    slot->log.marked.words = dl_words_alloc(2 * half, 1, &slot->words_mapped);
    slot->log.marked.summary = dl_words_alloc(2 * groups, 1, &slot->summary_mapped);
    if (!slot->log.marked.words || !slot->log.marked.summary) {
        dl_log_free(slot);
        return -ENOMEM;
    }
    slot->log.snapshot = slot->log.marked.words + half;
    slot->log.snapshot_summary = slot->log.marked.summary + groups;
    return 0;
}

static inline void dl_slot_free(struct dl_memslot *slot)
{
    if (!slot)
        return;
    dl_log_free(slot);
    if (slot->table.ptes)
        dl_words_free(slot->table.ptes, slot->table_mapped);
    if (slot->table.huge)
        dl_words_free(slot->table.huge, slot->huge_mapped);
    if (slot->shadow)
        dl_words_free(slot->shadow, slot->shadow_mapped);
    free(slot);
}

static inline struct dl_memslot *dl_slot_new(const struct dl_mmu *mmu, uint32_t id, uint64_t base_gfn, uint64_t npages,
                                             unsigned char *host)
{
    struct dl_memslot *slot = calloc(1, sizeof *slot);
    if (!slot)
        return NULL;
    slot->id = id;
    slot->base_gfn = base_gfn;
    slot->npages = npages;
    slot->host = host;
    slot->table.npages = npages;
    slot->table.ptes = dl_words_alloc(npages, 1, &slot->table_mapped);
    if (mmu->dirtying == DL_BY_SHADOW)
        slot->shadow = dl_words_alloc(npages * mmu->nvcpus, 1, &slot->shadow_mapped);
    if (mmu->huge_split != DL_NO_HUGE_PAGES && base_gfn % DL_HUGE_PAGES == 0)
        slot->table.huge = dl_words_alloc(npages / DL_HUGE_PAGES + 1, 1, &slot->huge_mapped);
    if (!slot->table.ptes || (mmu->dirtying == DL_BY_SHADOW && !slot->shadow)) {
        dl_slot_free(slot);
        return NULL;
    }
    return slot;
}

/* A copy of the table without `removed` and with `added`, either NULL. */
static inline struct dl_slot_table *dl_table_with(const struct dl_slot_table *old, const struct dl_memslot *removed,
                                                  struct dl_memslot *added)
{
    struct dl_slot_table *table = malloc(sizeof *table + (old->count + 1) * sizeof table->slots[0]);
    if (!table)
        return NULL;
    table->count = 0;
    for (size_t i = 0; i < old->count; i++) {
        if (added && added->base_gfn < old->slots[i]->base_gfn) {
            table->slots[table->count++] = added;
            added = NULL;
        }
        if (old->slots[i] != removed)
            table->slots[table->count++] = old->slots[i];
    }
    if (added)
        table->slots[table->count++] = added;
    return table;
}

/* ---- guest mode and flushes ----------------------------------------------- */

static inline void dl_vcpu_requests(struct dl_vcpu *vcpu)
{
    if (!dl_load_relaxed(&vcpu->requests))
        return;
    if (dl_exchange(&vcpu->requests, 0) & DL_REQUEST_TLB_FLUSH) {
        for (unsigned i = 0; i < DL_TLB_ENTRIES; i++)
            vcpu->tlb[i].tag = 0;
        vcpu->flushes++;
    }
}

static inline void dl_guest_enter(struct dl_vcpu *vcpu)
{
    /* A mutex is not fair: without this a vCPU that stores in a loop could keep
     * a flush waiting. Only politeness rests on it. */
    while (dl_load_relaxed(&vcpu->kickers))
        sched_yield();
    pthread_mutex_lock(&vcpu->guest);
    dl_vcpu_requests(vcpu);
}

static inline void dl_guest_leave(struct dl_vcpu *vcpu) { pthread_mutex_unlock(&vcpu->guest); }

/* Bring a vCPU out of guest mode and keep it out until dl_guest_leave(). */
static inline void dl_guest_kick(struct dl_vcpu *vcpu)
{
    __atomic_fetch_add(&vcpu->kickers, 1, __ATOMIC_RELAXED);
    pthread_mutex_lock(&vcpu->guest);
    __atomic_fetch_sub(&vcpu->kickers, 1, __ATOMIC_RELAXED);
}

static inline void dl_kick_all(struct dl_mmu *mmu)
{
    for (uint32_t i = 0; i < mmu->nvcpus; i++) {
        dl_guest_kick(&mmu->vcpus[i]);
        dl_guest_leave(&mmu->vcpus[i]);
    }
}

/* The generic flush: ask every vCPU, then wait until each has been out of guest
 * mode. The request is read when guest mode is entered again. */
static inline void dl_flush_generic(struct dl_mmu *mmu)
{
    for (uint32_t i = 0; i < mmu->nvcpus; i++)
        dl_fetch_or(&mmu->vcpus[i].requests, DL_REQUEST_TLB_FLUSH);
    dl_kick_all(mmu);
    mmu->flushes++;
}

/* ARM's flush of everything under the machine's VMID: entries of the old
 * generation match no more. A vCPU reads the generation before the page table,
 * so an entry it tags with the new one saw the protection that came before. */
static inline void dl_flush_generation(struct dl_mmu *mmu)
{
    __atomic_fetch_add(&mmu->generation, 1, __ATOMIC_SEQ_CST);
    dl_kick_all(mmu);
    mmu->flushes++;
}

static inline void dl_tlb_drop(struct dl_vcpu *vcpu, uint64_t first_gfn, uint64_t count)
{
    if (count < DL_TLB_ENTRIES) {
        for (uint64_t gfn = first_gfn; gfn < first_gfn + count; gfn++)
            if (vcpu->tlb[gfn % DL_TLB_ENTRIES].tag == gfn + 1)
                vcpu->tlb[gfn % DL_TLB_ENTRIES].tag = 0;
        return;
    }
    for (unsigned i = 0; i < DL_TLB_ENTRIES; i++)
        if (vcpu->tlb[i].tag - 1 - first_gfn < count)
            vcpu->tlb[i].tag = 0;
}

static inline void dl_flush_range(struct dl_mmu *mmu, uint64_t first_gfn, uint64_t count)
{
    for (uint32_t i = 0; i < mmu->nvcpus; i++) {
        dl_guest_kick(&mmu->vcpus[i]);
        dl_tlb_drop(&mmu->vcpus[i], first_gfn, count);
        dl_guest_leave(&mmu->vcpus[i]);
    }
    mmu->flushes++;
}

/* Every vCPU's own page-table entries of the slot, and what its TLB holds of them. */
static inline void dl_flush_shadow(struct dl_mmu *mmu, struct dl_memslot *slot)
{
    for (uint32_t i = 0; i < mmu->nvcpus; i++) {
        dl_guest_kick(&mmu->vcpus[i]);
        memset(slot->shadow + i * slot->npages, 0, slot->npages * sizeof *slot->shadow);
        dl_tlb_drop(&mmu->vcpus[i], slot->base_gfn, slot->npages);
        dl_guest_leave(&mmu->vcpus[i]);
    }
    mmu->flushes++;
}

static inline void dl_flush(struct dl_mmu *mmu)
{
    if (mmu->hooks.flush_tlbs)
        mmu->hooks.flush_tlbs(mmu->hooks.context, mmu, dl_flush_generic);
    else
        dl_flush_generic(mmu);
}

/* Under slots_lock. The new table is published under mmu_lock, so that a fault
 * sees either the old one until it is done, or the new one; vCPUs in guest mode
 * are waited for. Then nobody uses `removed`, and the caller frees it. */
static inline int dl_table_publish(struct dl_mmu *mmu, struct dl_slot_table *table)
{
    struct dl_slot_table *old = mmu->table;
    int error = dl_lock_acquire(mmu->mmu_lock);
    if (error)
        return error;
    __atomic_store_n(&mmu->table, table, __ATOMIC_RELEASE);
    dl_lock_release(mmu->mmu_lock);
    dl_flush_generic(mmu);
    free(old);
    return 0;
}

/* ---- stores ---------------------------------------------------------------- */

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
        __atomic_fetch_add(host, 1, __ATOMIC_RELAXED);
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
 * no longer in the table and still wants its marks. */
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
 * of a slot may be going away. */
static inline int dl_pml_full(struct dl_mmu *mmu, struct dl_vcpu *vcpu)
{
    int error = dl_lock_acquire(mmu->mmu_lock);
    if (error)
        return error;
    pthread_mutex_lock(&vcpu->guest);
    dl_pml_drain(mmu, vcpu, NULL);
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
        } while (!__atomic_compare_exchange_n(pte, &seen, seen | DL_PTE_PRESENT | DL_PTE_DIRTY, 0, __ATOMIC_SEQ_CST,
                                              __ATOMIC_ACQUIRE));
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
    vcpu->faults++;
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

/* ---- what the hardware recorded, moved into the slot's log under slots_lock --- */

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
    if (old)
        memcpy(fresh, old, mmu->vm_log_words * sizeof *old);
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

/* The slot leaves its place, what the hardware knows about it is collected, and
 * it comes back elsewhere with the same log. A vCPU that meets the gap waits
 * for slots_lock: see dl_backed_after_update(). */
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
        error = dl_table_change(mmu, slot, NULL);
    if (error) {
        free(table);
        dl_slot_free(moved);
        return error;
    }
    dl_sync(mmu, slot, !slot->logging);
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
        if (mask && protect)
            dl_protect_word(&mmu->hooks, &slot->table, word, mask);
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
        mmu->vcpus[i].ring.entries = calloc(size, sizeof(struct dl_ring_entry));
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

/* ---- birth and death ---------------------------------------------------------- */

static inline void dl_mmu_destroy(struct dl_mmu *mmu)
{
    if (mmu->table)
        for (size_t i = 0; i < mmu->table->count; i++)
            dl_slot_free(mmu->table->slots[i]);
    free(mmu->table);
    for (uint32_t i = 0; mmu->vcpus && i < mmu->nvcpus; i++)
        pthread_mutex_destroy(&mmu->vcpus[i].guest), free(mmu->vcpus[i].ring.entries);
    free(mmu->vcpus);
    if (mmu->vm_log)
        dl_words_free(mmu->vm_log, mmu->vm_log_mapped);
}

static inline int dl_mmu_init(struct dl_mmu *mmu, uint32_t vcpus)
{
    mmu->table = calloc(1, sizeof *mmu->table);
    mmu->vcpus = calloc(vcpus, sizeof *mmu->vcpus);
    mmu->nvcpus = vcpus;
    if (!mmu->table || !mmu->vcpus) {
        free(mmu->vcpus);
        mmu->vcpus = NULL;
        return -ENOMEM;
    }
    for (uint32_t i = 0; i < vcpus; i++) {
        mmu->vcpus[i].index = i;
        pthread_mutex_init(&mmu->vcpus[i].guest, NULL);
    }
    return 0;
}

#endif /* DIRTYLOG_MMU_H */
