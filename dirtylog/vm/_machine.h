/* The machine's state: locks, memslots, page tables, TLBs. No Python in here.
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
#ifndef DIRTYLOG_MACHINE_H
#define DIRTYLOG_MACHINE_H

#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>

#include "_bits/memory.h"
#include "vm/_harvest.h"
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
    struct dl_vcpu_ring ring;
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
    struct dl_memslot *leaving; /* on the move: in no table, and its marks are still to come; under mmu_lock */
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

/* As a number, which a thread's name is a pointer to on some systems. */
static inline uint64_t dl_this_thread(void) { return (uint64_t)(uintptr_t)pthread_self(); }

static inline int dl_lock_acquire(struct dl_lock *lock)
{
    int error = pthread_mutex_lock(&lock->mutex);
    if (!error)
        dl_store_relaxed(&lock->owner, dl_this_thread());
    return -error;
}

static inline int dl_lock_held(const struct dl_lock *lock)
{
    return dl_load_relaxed(&lock->owner) == dl_this_thread();
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
    return DL_LOAD(&mmu->table, ACQUIRE);
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

/* KVM's bitmap of double length, each half padded to whole lines. It has no top: an architecture of another package
 * marks it too, compiled with whatever header there was. */
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

#endif /* DIRTYLOG_MACHINE_H */
