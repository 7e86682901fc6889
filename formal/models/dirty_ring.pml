/* The dirty ring: each vCPU pushes the pages it dirties, user space harvests them, a reset
 * write-protects them again and frees the entries; the pages are copied after the reset.
 *
 * A vCPU enters the guest only below the soft limit, and one entry into the guest may dirty up to
 * RUN_PAGES pages before it can be stopped: the ring keeps entries in reserve for that.
 *
 * Two sizes are checked: two vCPUs that write the same pages, and ONE_VCPU with more pages than
 * entries and several stores a run, which the soft limit is about.
 *
 * Variants: COPY_BEFORE_RESET, REUSE_BEFORE_RESET, NO_SOFT_LIMIT, FLAG_BEFORE_ENTRY,
 * RESET_UNHARVESTED, FLUSH_LEFT_OUT, PROTECT_LEFT_OUT.
 */
#ifdef ONE_VCPU
#define VCPUS 1
#define PAGES 4
#define SIZE 3
#define RUN_PAGES 2
#else
#define VCPUS 2
#define PAGES 2
#define SIZE 2
#define RUN_PAGES 1
#endif
#define SOFT_LIMIT (SIZE - RUN_PAGES + 1)
#define FREE 0
#define DIRTY 1
#define RESET 2
#define AT(cpu, index) ((cpu) * SIZE + (index))
#define NEXT(index) (((index) + 1) % SIZE)

#define GOLDEN_RULE ((writable & ~(in_rings | in_hand) & ALL_PAGES) == 0)
#include "machine.pml"

byte flags[VCPUS * SIZE];
byte gfn[VCPUS * SIZE];
byte push_index[VCPUS];
byte fetch_index[VCPUS];
byte reset_index[VCPUS];
byte used[VCPUS];         /* what the vCPU counts against the soft limit */
byte in_hand;             /* pages harvested and not yet copied */
byte in_rings;            /* pages that entries name; a ghost, computed where I1 is checked */

/* I1 for a ring: a writable page is named by an entry that is not free, or in the harvester's hand. */
#undef RELEASE_MMU_LOCK
#ifdef CHECK_I1
#define RELEASE_MMU_LOCK                                                                            \
    atomic {                                                                                        \
        in_rings = 0; entry = 0;                                                                    \
        do                                                                                          \
        :: entry < VCPUS * SIZE && flags[entry] != FREE -> in_rings = in_rings | BIT(gfn[entry]); entry++ \
        :: entry < VCPUS * SIZE && flags[entry] == FREE -> entry++                                  \
        :: entry == VCPUS * SIZE -> break                                                           \
        od;                                                                                         \
        assert(GOLDEN_RULE);                                                                        \
        in_rings = 0; entry = 0; mmu_lock = false                                                   \
    }
#else
#define RELEASE_MMU_LOCK mmu_lock = false
#endif

#ifdef CHECK_ROOM
#define ROOM(id) assert(flags[AT(id, push_index[id])] == FREE)
#else
#define ROOM(id) skip
#endif

#define WRITE_ENTRY(id, page)                                                                       \
    atomic { printf("vCPU %d pushes page %d\n", id, page); gfn[AT(id, push_index[id])] = page }
#define PUBLISH(id)                                                                                 \
    atomic { printf("vCPU %d publishes the entry\n", id); flags[AT(id, push_index[id])] = DIRTY; PUSHED(id) }

/* The vCPU's own indices: it alone reads them, so they move with the store that publishes. */
#ifdef FLAG_BEFORE_ENTRY
#define PUSHED(id) skip
#define ADVANCE(id) push_index[id] = NEXT(push_index[id]); used[id]++
#define PUSH(id, page) PUBLISH(id); atomic { WRITE_ENTRY(id, page); ADVANCE(id) }
#else
#define PUSHED(id) push_index[id] = NEXT(push_index[id]); used[id]++
#define PUSH(id, page) WRITE_ENTRY(id, page); PUBLISH(id)
#endif

/* Under mmu_lock another vCPU may have made the page writable: then it has pushed it, too. */
#define FAULT(id, page)                                                                             \
    ACQUIRE(mmu_lock);                                                                              \
    if                                                                                              \
    :: writable & BIT(page)                                                                         \
    :: else ->                                                                                      \
       ROOM(id);                                                                                    \
       PUSH(id, page);                                                                              \
       atomic { printf("vCPU %d makes page %d writable\n", id, page); writable = writable | BIT(page) } \
    fi;                                                                                             \
    RELEASE_MMU_LOCK

proctype vcpu(byte id)
{
    byte page, left, entry;
    do
    :: break
    :: true ->
#ifndef NO_SOFT_LIMIT
       used[id] < SOFT_LIMIT;     /* KVM_RUN leaves with DIRTY_RING_FULL until this holds */
#endif
       left = RUN_PAGES;
       do
       :: left > 0 -> choose_page(page); GUEST_STORE(id, page); atomic { page = 0; left-- }
       :: true -> left = 0; break
       od
    od;
    writers--
}

inline harvest_rings()
{
    cpu = 0;
    do
    :: cpu < VCPUS && flags[AT(cpu, fetch_index[cpu])] == DIRTY ->
           atomic {
               printf("user space harvests page %d of ring %d\n", gfn[AT(cpu, fetch_index[cpu])], cpu);
               in_hand = in_hand | BIT(gfn[AT(cpu, fetch_index[cpu])])
           };
           atomic {
               flags[AT(cpu, fetch_index[cpu])] = RESET;
               fetch_index[cpu] = NEXT(fetch_index[cpu])
#ifdef REUSE_BEFORE_RESET
               ; used[cpu]--
#endif
           }
    :: atomic { cpu < VCPUS && flags[AT(cpu, fetch_index[cpu])] != DIRTY -> cpu++ }
    :: atomic { cpu == VCPUS -> cpu = 0 }; break
    od
}

#ifdef RESET_UNHARVESTED
#define MAY_RESET(flag) ((flag) != FREE)
#else
#define MAY_RESET(flag) ((flag) == RESET)
#endif

inline reset_rings()
{
    cpu = 0;
    do
    :: cpu < VCPUS && MAY_RESET(flags[AT(cpu, reset_index[cpu])]) ->
           atomic {
               page = gfn[AT(cpu, reset_index[cpu])];
#ifdef RESET_UNHARVESTED
               if
               :: flags[AT(cpu, reset_index[cpu])] == DIRTY -> fetch_index[cpu] = NEXT(fetch_index[cpu])
               :: else
               fi;
#endif
               printf("the reset frees the entry of page %d in ring %d\n", page, cpu);
               flags[AT(cpu, reset_index[cpu])] = FREE;
               gfn[AT(cpu, reset_index[cpu])] = 0;     /* nobody reads it now: fewer states */
               reset_index[cpu] = NEXT(reset_index[cpu])
#ifndef REUSE_BEFORE_RESET
               ; used[cpu]--
#endif
           };
           ACQUIRE(mmu_lock);
#ifndef PROTECT_LEFT_OUT
           protect(BIT(page));
#endif
           RELEASE_MMU_LOCK
    :: atomic { cpu < VCPUS && !MAY_RESET(flags[AT(cpu, reset_index[cpu])]) -> cpu++ }
    :: atomic { cpu == VCPUS -> cpu = 0 }; break
    od;
    page = 0;
#ifndef FLUSH_LEFT_OUT
    if
    :: in_hand -> flush_tlbs()
    :: else
    fi
#endif
}

proctype harvester()
{
    byte page, cpu, entry;
    bool last;
    do
    :: last -> break
    :: !last ->
       last = (writers == 0);
       harvest_rings();
#ifdef COPY_BEFORE_RESET
       copy_pages(in_hand);
       reset_rings();
#else
       reset_rings();
       copy_pages(in_hand);
#endif
       in_hand = 0
    od;
    NOTHING_LOST
}

init
{
    atomic {
        writers = VCPUS;
        run vcpu(0);
#if VCPUS > 1
        run vcpu(1);
#endif
        run harvester()
    }
}
