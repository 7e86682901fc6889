/* Who writes while a bitmap keeps the log: guest stores that fault, and the VMM's own stores.
 *
 * A fault marks, makes writable, and the guest stores when it tries again, as KVM has it. With
 * STORE_IN_FAULT the fault completes the store itself and fills the TLB, all under the lock, as
 * dirtylog's machine does.
 *
 * Variants: MARK_OUTSIDE_LOCK, MARK_BEFORE_STORE.
 */
#if defined(STORE_IN_FAULT)
#define FAULT(id, page)                                                                             \
    ACQUIRE(mmu_lock);                                                                              \
    atomic { printf("vCPU %d faults on page %d: stored\n", id, page); stale = stale | BIT(page) };   \
    atomic { printf("vCPU %d marks page %d\n", id, page); bitmap = bitmap | BIT(page) };             \
    atomic { printf("vCPU %d makes page %d writable\n", id, page); writable = writable | BIT(page) };  \
    atomic { printf("vCPU %d caches page %d\n", id, page); tlb[id] = tlb[id] | BIT(page) };          \
    RELEASE_MMU_LOCK
#elif defined(MARK_OUTSIDE_LOCK)
#define FAULT(id, page)                                                                             \
    ACQUIRE(mmu_lock);                                                                              \
    atomic { printf("vCPU %d faults on page %d: writable\n", id, page); writable = writable | BIT(page) }; \
    RELEASE_MMU_LOCK;                                                                               \
    atomic { printf("vCPU %d marks page %d\n", id, page); bitmap = bitmap | BIT(page) }
#else
#define FAULT(id, page)                                                                             \
    ACQUIRE(mmu_lock);                                                                              \
    atomic { printf("vCPU %d faults on page %d: marked\n", id, page); bitmap = bitmap | BIT(page) };  \
    atomic { printf("vCPU %d makes page %d writable\n", id, page); writable = writable | BIT(page) };  \
    RELEASE_MMU_LOCK
#endif

proctype vcpu(byte id)
{
    byte page;
    do
    :: choose_page(page); GUEST_STORE(id, page); page = 0
    :: break
    od;
    writers--
}

/* The VMM, or a device it emulates, writes guest memory through its own mapping: no page table
 * stops it and it takes no lock, so it stores and then marks (I3). */
proctype vmm()
{
    byte page;
    do
    :: choose_page(page);
#ifdef MARK_BEFORE_STORE
       atomic { printf("the VMM marks page %d\n", page); bitmap = bitmap | BIT(page) };
       atomic { printf("the VMM stores into page %d\n", page); stale = stale | BIT(page); page = 0 }
#else
       atomic { printf("the VMM stores into page %d\n", page); stale = stale | BIT(page) };
       atomic { printf("the VMM marks page %d\n", page); bitmap = bitmap | BIT(page); page = 0 }
#endif
    :: break
    od;
    writers--
}

/* A log starts either clean, with every page protected, or initially-all-set: every bit set, no
 * page protected yet, TLBs full. */
init
{
    atomic {
        if
        :: true
        :: bitmap = ALL_PAGES; writable = ALL_PAGES; stale = ALL_PAGES;
           tlb[0] = ALL_PAGES; tlb[VCPUS - 1] = ALL_PAGES
        fi;
        writers = VCPUS + 1;
        run vcpu(0);
        run vcpu(1);
        run vmm();
        run harvester()
    }
}
