/* What the library keeps about KVM's rings: entries that hardware holds back, the reset, overflow, interrupts (I5, I6).
 *
 * A guest's writes are noted where only its exit brings them into the ring (page-modification logging). A harvest makes
 * the guest leave and waits; drains the ring into the slot's bitmap; has the kernel take the entries back and protect
 * their pages; takes what the bitmap has, and copies. The kernel may refuse to take entries back, and an interrupt may
 * end any harvest between two calls. A ring that is full overwrites what was read, or drops the entry: after that the
 * library reports everything, each time.
 *
 * KVM_RUN calls a ring full before it is, and does not enter the guest. Where nothing is found in it by the next harvest,
 * it is out of step after an overflow; unless "full" was old news, because a harvest has emptied it since.
 *
 * Variants: KICK_LEFT_OUT, KICK_NOT_WAITED_FOR, KICK_AFTER_DRAIN, RESET_FAILURE_IGNORED, OVERFLOW_IGNORED,
 * OVERFLOW_REPORTED_ONCE, TAKEN_IS_DROPPED, RECORD_AFTER_RESET, COUNTED_BEFORE_RESET, OUTSTANDING_IS_STUCK.
 */
#define PAGES 4
#define ALL 15
#define SIZE 3
#define SOFT_LIMIT 2
#define WRITES 5
#define BIT(page) (1 << (page))
#define USED (COUNT(dirty) + COUNT(marked))
#define COUNT(mask) (((mask) & 1) + ((mask) >> 1 & 1) + ((mask) >> 2 & 1) + ((mask) >> 3 & 1))

byte stale;        /* the replica lacks these pages */
byte writable;     /* the kernel notes no write to these */
byte held;       /* noted, and not in the ring before the guest leaves */
byte dirty;        /* pages of entries that nobody has read */
byte marked;       /* pages of entries that were read and not taken back */
byte bitmap;       /* the slot's, marked by drains */
byte owed;
byte outstanding;  /* how many entries the library believes are to be taken back */
bool lost;         /* the library's belief: everything is reported from now on */
bool was_full;     /* a ghost: the ring had no free entry at some time */
bool in_guest, kicked;
bool running, full_exit;   /* KVM_RUN is called; it has called the ring full, and that is not noted yet */
bool harvested;            /* a harvest was counted since the run began */
bool stuck;                /* noted, and nobody has harvested since */
bool lock;                 /* of the machine: held by a harvest, and by who notes that a ring was full */
byte left = WRITES;

inline push(page)
{
    if
    :: USED < SIZE -> dirty = dirty | BIT(page)
    :: USED >= SIZE && marked ->
       /* The lowest of those that were read is overwritten, and its page stays writable. */
       marked = marked & (marked - 1);
       dirty = dirty | BIT(page)
    :: USED >= SIZE && !marked
    fi;
    was_full = was_full || USED >= SIZE
}

inline leave()
{
    atomic {
        printf("the guest leaves with mask %d\n", held);
        page = 0;
        do
        :: page < PAGES && held & BIT(page) -> push(page); page++
        :: page < PAGES && !(held & BIT(page)) -> page++
        :: page == PAGES -> break
        od;
        held = 0; page = 0; in_guest = false; kicked = false
    }
}

inline write(number)
{
    atomic {
        in_guest && left > 0 -> printf("the guest writes page %d\n", number);
        stale = stale | BIT(number);
        held = held | (BIT(number) & ~writable);
        writable = writable | BIT(number);
        left--
    }
}

proctype vcpu()
{
    byte page;
end:
    do
    :: write(0)
    :: write(1)
    :: write(2)
    :: write(3)
    :: in_guest -> leave()
    :: atomic {
           !in_guest && !running && !full_exit -> running = true;
           if
           :: harvested = false
           :: true    /* a harvest made it leave, and it goes on: still the same run */
           fi
       }
    :: atomic { running && USED < SOFT_LIMIT -> running = false; in_guest = true }
    :: atomic { running && USED >= SOFT_LIMIT -> printf("full\n"); running = false; full_exit = true }
    :: atomic {
           full_exit && !lock -> full_exit = false;
#ifdef OUTSTANDING_IS_STUCK
           stuck = stuck || !harvested;
#else
           stuck = stuck || (!harvested && !outstanding);
#endif
           printf("noted: %d\n", stuck)
       }
    od
}

inline kick()
{
    atomic { kicked = in_guest; printf("the guest is kicked: %d\n", kicked) };
#ifndef KICK_NOT_WAITED_FOR
    !kicked
#endif
}

/* One call: nothing interrupts it, though the guest runs beside it. */
inline drain()
{
    atomic {
        printf("drained: mask %d\n", dirty);
        bitmap = bitmap | dirty;
#ifndef OVERFLOW_IGNORED
        lost = lost || COUNT(dirty) == SIZE || (stuck && !dirty);
#endif
        stuck = false;
#ifdef COUNTED_BEFORE_RESET
        harvested = true;
#endif
        outstanding = outstanding + COUNT(dirty);
        marked = marked | dirty;
        dirty = 0
    };
    if
    :: refused = true; printf("the kernel refuses to take entries back\n")
    :: atomic {
           refused = false;
           printf("taken back: mask %d of %d entries\n", marked, outstanding);
           writable = writable & ~marked;
           taken_back = COUNT(marked);
           marked = 0
       };
#ifdef RECORD_AFTER_RESET
       if
       :: refused = true; printf("interrupted before the record\n")
       :: true
       fi;
#endif
       atomic {
           if
           :: !refused ->
#ifndef OVERFLOW_IGNORED
              lost = lost || taken_back != outstanding;
#endif
              outstanding = 0
           :: else
           fi;
           taken_back = 0
       }
    fi;
#ifndef COUNTED_BEFORE_RESET
    harvested = true;
#endif
#ifdef RESET_FAILURE_IGNORED
    refused = false;
#endif
#ifdef CHECK_TRUTH
    assert(!lost || was_full)
#endif
}

inline take()
{
    atomic {
        mine = bitmap | owed | (lost -> ALL : 0);
        bitmap = 0; owed = 0;
#ifdef OVERFLOW_REPORTED_ONCE
        lost = false;
#endif
        printf("taken: mask %d\n", mine)
    }
}

inline harvest()
{
    lock = true;
#if !defined(KICK_LEFT_OUT) && !defined(KICK_AFTER_DRAIN)
    kick();
#endif
    drain();
#ifdef KICK_AFTER_DRAIN
    kick();
#endif
    if
    :: refused && !last
    :: !last -> printf("interrupted before pages are taken\n")
    :: !refused ->
       take();
       if
       :: !last ->
#ifndef TAKEN_IS_DROPPED
          atomic { owed = owed | mine; printf("interrupted: mask %d is owed\n", mine) };
#endif
          mine = 0
       :: atomic { printf("copied: mask %d\n", mine); stale = stale & ~mine; mine = 0 }
       fi
    :: refused && last -> goto unable     /* nothing is promised of a harvest that fails */
    fi;
    lock = false
}

proctype library()
{
    byte mine, taken_back;
    bool refused, last;
    do
    :: !last ->
       if
       :: left == 0 -> last = true
       :: true
       fi;
       harvest()
    :: last -> break
    od;
#ifdef CHECK_LOSS
    atomic { printf("mask of stale pages: %d\n", stale); assert(stale == 0) };
#endif
unable:
    skip
}

init
{
    atomic { run vcpu(); run library() }
}
