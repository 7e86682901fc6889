/* Manual protection: GET copies the bits and clears nothing, CLEAR clears what was reported and
 * write-protects it, and only then are the pages copied.
 *
 * Variants: COPY_BEFORE_CLEAR, CLEAR_UNREPORTED, CLEAR_WITHOUT_PROTECT, CLEAR_WITHOUT_FLUSH,
 * GET_CLEARS.
 */
#include "machine.pml"

proctype harvester()
{
    byte reported, cleared, page, cpu;
    bool last;
    do
    :: last -> break
    :: !last ->
       last = (writers == 0);

       /* KVM_GET_DIRTY_LOG */
#ifdef GET_CLEARS
       atomic { reported = bitmap; bitmap = 0; printf("GET reports and clears mask %d\n", reported) };
#else
       atomic { reported = bitmap; printf("GET reports mask %d\n", reported) };
#endif

#ifdef COPY_BEFORE_CLEAR
       copy_pages(reported);
#endif

       /* KVM_CLEAR_DIRTY_LOG: one fetch-and-andnot a word; only bits that were still set are protected. */
       ACQUIRE(mmu_lock);
#ifdef CLEAR_UNREPORTED
       atomic { cleared = bitmap; bitmap = 0; printf("CLEAR zeroes the word, which held mask %d\n", cleared) };
#else
       atomic { cleared = bitmap & reported; bitmap = bitmap & ~reported; printf("CLEAR clears mask %d\n", cleared) };
#endif
#ifndef CLEAR_WITHOUT_PROTECT
       protect(cleared);
#endif
       RELEASE_MMU_LOCK;
#ifndef CLEAR_WITHOUT_FLUSH
       if
       :: cleared -> flush_tlbs()
       :: else
       fi;
#endif

#ifndef COPY_BEFORE_CLEAR
       copy_pages(reported);
#endif
       atomic { reported = 0; cleared = 0; page = 0; cpu = 0 }
    od;
    NOTHING_LOST
}

#include "bitmap_writers.pml"
