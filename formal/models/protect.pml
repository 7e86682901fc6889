/* Write protection by mprotect: two trackers of one page, two threads that store to it (I1).
 *
 * A store to a protected page faults; the handler, under the spin lock, opens the page and marks it in
 * every tracker. A harvest, under the same lock, takes its own mark, protects the page and clears the
 * mark; the page is copied after the lock is released. mprotect may fail: then the mark stays.
 *
 * With PROGRAM_OPENS the program makes the page writable by a call of its own, and nobody is told. A harvest takes
 * what is marked and protects what it left opened; then it looks whether what was left protected is writable, and
 * marks it for everybody if it is; then it takes again.
 *
 * Variants: MARK_BEFORE_LOCK, MARK_ONE_TRACKER, CLEAR_AFTER_UNLOCK, PROTECT_LEFT_OUT, COPY_BEFORE_PROTECT,
 * CLEAR_UNPROTECTED, MARK_AFTER_UNLOCK; of the look: LOOK_LEFT_OUT, TAKE_ONCE, LOOK_FOR_ONESELF, PROTECT_ALL_MARKED.
 */
#define ACQUIRE(lock) atomic { !lock -> lock = true }
#ifdef CHECK_I1
#define RELEASE atomic { assert(!writable || (word[0] && word[1])); spin_lock = false }
#else
#define RELEASE spin_lock = false
#endif

bool writable;   /* the page table entry; mprotect leaves no stale TLB entry behind */
bool word[2];    /* each tracker's mark */
bool stale[2];   /* each tracker's consumer lacks the page's content */
bool opened;       /* how the engine left the page */
bool spin_lock;
byte writers;

inline mark()
{
    word[0] = true;
#ifndef MARK_ONE_TRACKER
    word[1] = true
#else
    skip
#endif
}

proctype writer()
{
    do
    :: do
       :: atomic { writable -> printf("thread %d stores\n", _pid); stale[0] = true; stale[1] = true }; break
       :: atomic { !writable -> printf("thread %d faults\n", _pid) };
#ifdef MARK_BEFORE_LOCK
          mark();
#endif
          ACQUIRE(spin_lock);
          atomic { printf("the handler of thread %d opens the page\n", _pid); writable = true; opened = true };
#if !defined(MARK_BEFORE_LOCK) && !defined(MARK_AFTER_UNLOCK)
          mark();
#endif
          RELEASE;
#ifdef MARK_AFTER_UNLOCK
          mark();
#endif
       od
    :: break
    od;
    writers--
}

#ifdef PROGRAM_OPENS
proctype program()
{
    if
    :: atomic { printf("the program makes the page writable\n"); writable = true }
    :: skip
    fi;
    writers--
}

/* What the engine left protected and is writable, somebody else has opened. */
inline look()
{
    ACQUIRE(spin_lock);
    atomic {
        if
        :: writable && !opened ->
           printf("tracker %d finds the page opened\n", id);
           word[id] = true;
#ifndef LOOK_FOR_ONESELF
           word[0] = true;
           word[1] = true;
#endif
           opened = true
        :: else
        fi
    };
    spin_lock = false
}

/* Take what is marked, and protect it unless it is protected. */
inline take()
{
    ACQUIRE(spin_lock);
    atomic {
        if
        :: word[id] ->
           printf("tracker %d takes\n", id);
           taken = true;
#ifndef PROTECT_ALL_MARKED
           if
           :: opened -> writable = false; opened = false
           :: else
           fi;
#else
           writable = false;
           opened = false;
#endif
           word[id] = false
        :: else
        fi
    };
    spin_lock = false
}

proctype tracker(byte id)
{
    bool last, taken;
    do
    :: last -> break
    :: !last ->
       last = (writers == 0);
       take();
#ifndef LOOK_LEFT_OUT
       look();
#endif
#ifndef TAKE_ONCE
       take();
#endif
       if
       :: taken -> atomic { printf("tracker %d copies the page\n", id); stale[id] = false }; taken = false
       :: else
       fi
    od;
#ifdef CHECK_LOSS
    atomic { printf("tracker %d has harvested for the last time; stale pages: %d\n", id, stale[id]); assert(!stale[id]) }
#endif
}
#else
proctype tracker(byte id)
{
    bool last, taken;
    do
    :: last -> break
    :: !last ->
       last = (writers == 0);

       ACQUIRE(spin_lock);
       atomic { taken = word[id]; printf("tracker %d takes %d\n", id, taken) };
       if
       :: taken ->
#ifdef COPY_BEFORE_PROTECT
          atomic { printf("tracker %d copies the page\n", id); stale[id] = false };
#endif
          if
          :: atomic { printf("tracker %d protects the page\n", id);
#ifndef PROTECT_LEFT_OUT
             writable = false;
             opened = false
#else
             skip
#endif
             };
#ifndef CLEAR_AFTER_UNLOCK
             word[id] = false
#else
             skip
#endif
          :: atomic { printf("tracker %d is refused the protection\n", id);
#ifdef CLEAR_UNPROTECTED
             word[id] = false
#else
             skip
#endif
             }
          fi
       :: else
       fi;
       RELEASE;
       if
       :: taken ->
#ifdef CLEAR_AFTER_UNLOCK
          word[id] = false;
#endif
#ifndef COPY_BEFORE_PROTECT
          atomic { printf("tracker %d copies the page\n", id); stale[id] = false };
#endif
          taken = false
       :: else
       fi
    od;
#ifdef CHECK_LOSS
    atomic { printf("tracker %d has harvested for the last time; stale pages: %d\n", id, stale[id]); assert(!stale[id]) }
#endif
}
#endif

init
{
    atomic {
#ifdef PROGRAM_OPENS
        writers = 2;
        run writer();
        run program();
#else
        writers = 2;
        run writer();
        run writer();
#endif
        run tracker(0);
        run tracker(1)
    }
}
