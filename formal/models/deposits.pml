/* Userfaultfd: the kernel keeps one "written" state for a page that two trackers watch (I5).
 *
 * Whoever scans takes that state for all. Under the registry's lock a scan deposits what it found with
 * the other trackers of the page before the lock is released. A third tracker that opens on the page scans
 * to arm it, and its scan may fail after the kernel has taken: then the page is doubtful, and deposited too.
 *
 * Variants: DEPOSIT_LEFT_OUT, DEPOSIT_AFTER_UNLOCK, SCAN_BEFORE_LOCK, OPENING_DROPS, FAILED_OPENING_FORGETS,
 * DEPOSIT_REPLACED.
 */
#define ACQUIRE(lock) atomic { !lock -> lock = true }

bool written;      /* the kernel's state of the page; a store to an armed page sets it first */
bool deposit[2];   /* found by another tracker's scan, not yet handed out */
bool stale[2];     /* each tracker's consumer lacks the page's content */
bool registry_lock;
byte writers;

proctype writer()
{
    do
    :: do
       :: atomic { written -> printf("the page is stored to\n"); stale[0] = true; stale[1] = true }; break
       :: atomic { !written -> printf("the kernel notes a write\n"); written = true }
       od
    :: break
    od;
    writers--
}

proctype tracker(byte id)
{
    bool last, found, before;
    do
    :: last -> break
    :: !last ->
       last = (writers == 0);

#ifdef SCAN_BEFORE_LOCK
       atomic { found = written; written = false; printf("tracker %d scans: %d\n", id, found) };
#endif
       ACQUIRE(registry_lock);
#ifndef SCAN_BEFORE_LOCK
       atomic { found = written; written = false; printf("tracker %d scans: %d\n", id, found) };
#endif
#if !defined(DEPOSIT_LEFT_OUT) && !defined(DEPOSIT_AFTER_UNLOCK)
#ifdef DEPOSIT_REPLACED
       deposit[1 - id] = found;
#else
       deposit[1 - id] = deposit[1 - id] || found;
#endif
#endif
       before = found;
       atomic { found = found || deposit[id]; deposit[id] = false };
       registry_lock = false;
#ifdef DEPOSIT_AFTER_UNLOCK
       deposit[1 - id] = deposit[1 - id] || before;
#endif
       if
       :: found -> atomic { printf("tracker %d copies the page\n", id); stale[id] = false }
       :: else
       fi;
       atomic { found = false; before = false }
    od;
#ifdef CHECK_LOSS
    atomic { printf("tracker %d has harvested for the last time; stale pages: %d\n", id, stale[id]); assert(!stale[id]) }
#endif
}

/* Counted as a writer, so that the last harvests come after it. */
proctype opening()
{
    bool found;
    ACQUIRE(registry_lock);
    atomic { found = written; written = false; printf("a third tracker arms the page: %d\n", found) };
    if
    :: atomic { found -> printf("its scan succeeds\n") };
#ifndef OPENING_DROPS
       atomic { deposit[0] = true; deposit[1] = true }
#else
       skip
#endif
    :: atomic { printf("its scan fails\n") };
#ifndef FAILED_OPENING_FORGETS
       atomic { deposit[0] = true; deposit[1] = true }
#else
       skip
#endif
    :: !found
    fi;
    registry_lock = false;
    writers--
}

init
{
    atomic {
        writers = 2;
        run writer();
        run opening();
        run tracker(0);
        run tracker(1)
    }
}
