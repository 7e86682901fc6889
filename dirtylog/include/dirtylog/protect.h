/* Write protection: the table of C hooks an architecture may fill, and the protections they are made of.
 *
 * Nothing here takes a lock: a page table is handled under its owner's mmu_lock.
 * When a harvest calls what is in I2.
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

#ifdef __cplusplus
}
#endif

#endif /* DIRTYLOG_PROTECT_H */
