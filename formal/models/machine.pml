/* What every model of a virtual machine shares: the page table, TLBs, mmu_lock, and who writes.
 *
 * One Promela step is one step of the hardware: an aligned load or store, one locked
 * read-modify-write, one page walk that fills the TLB, one store through the TLB, one TLB emptied
 * by an interrupt. Nothing larger is made atomic.
 *
 * Memory is one bit a page: `stale` says that the page holds something the replica does not. A
 * write sets it, a copy of the page clears it. That keeps the number of writes unbounded and the
 * state space finite, and it states the property itself: when every writer has stopped and one
 * more harvest was copied, no page may be stale.
 */
#ifndef VCPUS
#define VCPUS 2
#endif
#ifndef PAGES
#define PAGES 2
#endif
#define ALL_PAGES ((1 << PAGES) - 1)
#define BIT(page) (1 << (page))

byte bitmap;          /* the slot's dirty bits */
byte writable;        /* page table: pages that may be written */
byte tlb[VCPUS];      /* per vCPU: pages it may write without a walk */
byte stale;           /* pages whose content the replica lacks */
byte writers;         /* processes that may still write */
bool mmu_lock;

#define ACQUIRE(lock) atomic { !lock -> lock = true }

#ifndef GOLDEN_RULE
#define GOLDEN_RULE ((writable & ~bitmap & ALL_PAGES) == 0)
#endif

/* I1 is a statement about the moments at which mmu_lock is free: it is checked at each release. */
#ifdef CHECK_I1
#define RELEASE_MMU_LOCK atomic { assert(GOLDEN_RULE); mmu_lock = false }
#else
#define RELEASE_MMU_LOCK mmu_lock = false
#endif

#ifdef CHECK_LOSS
#define NOTHING_LOST atomic { printf("the last harvest is copied; mask of stale pages: %d\n", stale); assert(stale == 0) }
#else
#define NOTHING_LOST skip
#endif

inline choose_page(page)
{
    atomic { select(page : 0 .. PAGES - 1) }
}

/* A store of the guest. The check of the TLB and the store are one step because a flush arrives as
 * an interrupt, and interrupts are taken between instructions. `FAULT` is the log's fault path. */
#ifndef AFTER_FAULT
#define AFTER_FAULT skip    /* and the guest tries again */
#endif
#define GUEST_STORE(id, page)                                                                       \
    do                                                                                              \
    :: atomic { tlb[id] & BIT(page) ->                                                              \
           printf("vCPU %d stores into page %d through its TLB\n", id, page); stale = stale | BIT(page) }; \
       break                                                                                        \
    :: atomic { !(tlb[id] & BIT(page)) && (writable & BIT(page)) ->                                 \
           printf("vCPU %d walks the page table for page %d\n", id, page); tlb[id] = tlb[id] | BIT(page) } \
    :: !(tlb[id] & BIT(page)) && !(writable & BIT(page)) -> FAULT(id, page); AFTER_FAULT            \
    od

/* The copy of the pages that `taken` names: afterwards the replica holds what they held then. */
inline copy_pages(taken)
{
    page = 0;
    do
    :: atomic { page < PAGES && (taken & BIT(page)) ->
           printf("page %d is copied\n", page); stale = stale & ~BIT(page); page++ }
    :: atomic { page < PAGES && !(taken & BIT(page)) -> page++ }
    :: atomic { page == PAGES -> page = 0 }; break
    od
}

/* One interrupt after the other: a vCPU that has not been reached yet still uses its old entries. */
inline flush_tlbs()
{
    cpu = 0;
    do
    :: atomic { cpu < VCPUS -> printf("TLB of vCPU %d is flushed\n", cpu); tlb[cpu] = 0; cpu++ }
    :: atomic { cpu == VCPUS -> cpu = 0 }; break
    od
}

inline protect(taken)
{
    atomic { printf("the pages of mask %d are write-protected\n", taken); writable = writable & ~taken }
}
