/* What a source has taken and not handed out is owed, and joined to its next answer (I5).
 *
 * Two threads harvest one source, and any harvest may be interrupted after it has taken its pages: then they are owed,
 * by an OR into a bitmap that needs no memory, and the flag that says so is set before the pages and after them. The next
 * harvest takes the flag first, then the pages. Each step is one atomic operation on memory that all share.
 *
 * Variants: ANSWER_IS_DROPPED, OWED_IS_REPLACED, OWED_IS_COPIED_THEN_ZEROED, FLAG_BEFORE_PAGES_ALONE,
 * PAGES_BEFORE_FLAG_IS_TAKEN.
 */
#define PAGES 2
#define BIT(page) (1 << (page))
#define HARVESTERS 2

byte stale;     /* the replica lacks these pages */
byte bits;      /* the source's own marks */
byte owed;      /* taken, and handed out to nobody */
bool flag;      /* there may be some */
byte at_work;

proctype writer()
{
    do
    :: atomic { printf("page 0 is written\n"); stale = stale | BIT(0) }; bits = bits | BIT(0)
    :: atomic { printf("page 1 is written\n"); stale = stale | BIT(1) }; bits = bits | BIT(1)
    :: break
    od;
    at_work--
}

inline take()
{
    atomic { mine = bits; bits = 0; printf("harvester %d takes mask %d\n", id, mine) };
#ifdef PAGES_BEFORE_FLAG_IS_TAKEN
    if
    :: flag ->
       atomic { mine = mine | owed; owed = 0; printf("harvester %d joins what is owed: mask %d\n", id, mine) };
       flag = false
    :: else
    fi;
#else
    atomic { seen = flag; flag = false };
    if
    :: seen ->
#ifdef OWED_IS_COPIED_THEN_ZEROED
       mine = mine | owed;
       owed = 0
#else
       atomic { mine = mine | owed; owed = 0; printf("harvester %d joins what is owed: mask %d\n", id, mine) }
#endif
    :: else
    fi;
#endif
    seen = false
}

inline owe()
{
#ifndef ANSWER_IS_DROPPED
#ifdef FLAG_BEFORE_PAGES_ALONE
    flag = true;
#endif
#ifdef OWED_IS_REPLACED
    atomic { owed = mine; printf("harvester %d is interrupted: mask %d is owed\n", id, owed) };
#else
    atomic { owed = owed | mine; printf("harvester %d is interrupted: mask %d is owed\n", id, owed) };
#endif
#ifndef FLAG_BEFORE_PAGES_ALONE
    flag = true;
#endif
#endif
    mine = 0
}

inline deliver()
{
    atomic { printf("harvester %d copies mask %d\n", id, mine); stale = stale & ~mine; mine = 0 }
}

proctype harvester(byte id)
{
    byte mine;
    bool seen;
    do
    :: take();
       if
       :: owe()
       :: deliver()
       fi
    :: break
    od;
    at_work--
}

/* When all have stopped, one more harvest that nothing interrupts leaves nothing stale. */
proctype last()
{
    byte mine, id = HARVESTERS;
    bool seen;
    at_work == 0;
    take();
    deliver();
#ifdef CHECK_LOSS
    atomic { printf("mask of stale pages: %d\n", stale); assert(stale == 0) }
#endif
}

init
{
    atomic {
        at_work = 1 + HARVESTERS;
        run writer();
        run harvester(0);
        run harvester(1);
        run last()
    }
}
