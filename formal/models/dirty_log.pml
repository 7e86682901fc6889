/* The dirty log (KVM_GET_DIRTY_LOG): the four steps of a harvest (I2) against vCPUs and the VMM.
 *
 * Snapshot and clear, write-protect: under mmu_lock. Flush the TLBs, hand out: after it.
 *
 * STORE_IN_FAULT: see bitmap_writers.pml.
 *
 * Variants: FLUSH_LEFT_OUT, FLUSH_BEFORE_PROTECT, COPY_BEFORE_FLUSH, COPY_THEN_ZERO,
 * PROTECT_LEFT_OUT, CLEAR_AFTER_UNLOCK, CLEAR_BEFORE_LOCK, and those of bitmap_writers.pml.
 */
#ifdef STORE_IN_FAULT
#define AFTER_FAULT break
#endif
#include "machine.pml"

inline take()
{
#ifdef COPY_THEN_ZERO
    taken = bitmap;
    atomic { printf("harvest copies mask %d, then zeroes the word\n", taken); bitmap = 0 }
#else
    atomic { taken = bitmap; bitmap = 0; printf("harvest takes the bits of mask %d\n", taken) }
#endif
}

proctype harvester()
{
    byte taken, page, cpu;
    bool last;
    do
    :: last -> break
    :: !last ->
       last = (writers == 0);

#if defined(CLEAR_BEFORE_LOCK)
       take();
       ACQUIRE(mmu_lock);
       protect(taken);
       RELEASE_MMU_LOCK;
#elif defined(CLEAR_AFTER_UNLOCK)
       ACQUIRE(mmu_lock);
       protect(bitmap);
       RELEASE_MMU_LOCK;
       take();
#elif defined(PROTECT_LEFT_OUT)
       ACQUIRE(mmu_lock);
       take();
       RELEASE_MMU_LOCK;
#elif defined(FLUSH_BEFORE_PROTECT)
       ACQUIRE(mmu_lock);
       take();
       if
       :: taken -> flush_tlbs()
       :: else
       fi;
       protect(taken);
       RELEASE_MMU_LOCK;
#else
       ACQUIRE(mmu_lock);
       take();
       protect(taken);
       RELEASE_MMU_LOCK;
#endif

#if defined(COPY_BEFORE_FLUSH)
       copy_pages(taken);
#endif
#if !defined(FLUSH_LEFT_OUT) && !defined(FLUSH_BEFORE_PROTECT)
       if
       :: taken -> flush_tlbs()
       :: else
       fi;
#endif
#if !defined(COPY_BEFORE_FLUSH)
       copy_pages(taken);
#endif
       atomic { taken = 0; page = 0; cpu = 0 }
    od;
    NOTHING_LOST
}

#include "bitmap_writers.pml"
