/* The log: one source, several observers, epochs that commit or roll back (I5).
 *
 * collect() harvests the source under the log's lock, gives what it found to every observer, and
 * takes what this observer is owed. Its consumer copies those pages and may fail after any of
 * them; then the whole epoch is owed again.
 *
 * Variants: ROLL_BACK_LEFT_OUT, ROLL_BACK_REPLACES, ONLY_THE_COLLECTOR, FORGET_AT_COMMIT,
 * PARTS_ARE_KEPT, ROLL_BACK_WITHOUT_LOCK.
 */
#define OBSERVERS 2
#define PAGES 2
#define ALL_PAGES ((1 << PAGES) - 1)
#define BIT(page) (1 << (page))
#define ACQUIRE(lock) atomic { !lock -> lock = true }

byte source;             /* the source's dirty bits */
byte owed[OBSERVERS];    /* reported by the source, not yet collected by this observer */
byte stale[OBSERVERS];   /* pages whose content this observer's replica lacks */
byte writers;
bool log_lock;

proctype writer()
{
    byte page;
    do
    :: atomic { select(page : 0 .. PAGES - 1) };
       atomic { printf("page %d is written\n", page); stale[0] = stale[0] | BIT(page); stale[1] = stale[1] | BIT(page) };
       atomic { printf("page %d is marked\n", page); source = source | BIT(page); page = 0 }
    :: break
    od;
    writers--
}

proctype observer(byte id)
{
    byte epoch, taken, page, mine;
    bool last, failed;
    do
    :: last -> break
    :: !last ->
       last = (writers == 0);

       ACQUIRE(log_lock);
       atomic { taken = source; source = 0 };
#ifdef ONLY_THE_COLLECTOR
       owed[id] = owed[id] | taken;
#else
       owed[0] = owed[0] | taken;
       owed[1] = owed[1] | taken;
#endif
       atomic { epoch = owed[id]; taken = 0; printf("observer %d collects mask %d\n", id, epoch) };
#ifndef FORGET_AT_COMMIT
       owed[id] = 0;
#endif
       log_lock = false;

       /* The consumer copies page after page; a copy that fails half-way leaves the page as stale as it was. */
       do
       :: atomic { page < PAGES && (epoch & BIT(page)) ->
              printf("observer %d copies page %d\n", id, page); stale[id] = stale[id] & ~BIT(page); page++ }
       :: atomic { page < PAGES && !(epoch & BIT(page)) -> page++ }
       :: atomic { page == PAGES -> page = 0 }; break
       :: atomic { page < PAGES && epoch && !last -> printf("observer %d fails before page %d\n", id, page);
              failed = true }; break
       od;

       if
       :: failed ->
          /* A failed snapshot is thrown away: what it held already is as good as never copied. */
#ifdef ROLL_BACK_LEFT_OUT
          stale[id] = stale[id] | epoch;
#else
          stale[id] = stale[id] | epoch;
#if defined(ROLL_BACK_REPLACES)
          ACQUIRE(log_lock);
          atomic { owed[id] = epoch; printf("observer %d is owed mask %d again\n", id, epoch) };
          log_lock = false;
#elif defined(ROLL_BACK_WITHOUT_LOCK)
          mine = owed[id];
          atomic { owed[id] = mine | epoch; printf("observer %d is owed mask %d again\n", id, epoch) };
#elif defined(PARTS_ARE_KEPT)
          ACQUIRE(log_lock);
          epoch = epoch & ~(BIT(page) - 1);
          atomic { owed[id] = owed[id] | epoch; printf("observer %d is owed mask %d again\n", id, epoch) };
          log_lock = false;
#else
          ACQUIRE(log_lock);
          atomic { owed[id] = owed[id] | epoch; printf("observer %d is owed mask %d again\n", id, epoch) };
          log_lock = false;
#endif
#endif
       :: else ->
#ifdef FORGET_AT_COMMIT
          ACQUIRE(log_lock);
          atomic { owed[id] = 0; printf("observer %d commits\n", id) };
          log_lock = false;
#else
          atomic { skip; printf("observer %d commits\n", id) }
#endif
       fi;
       atomic { epoch = 0; page = 0; mine = 0; failed = false }
    od;
#ifdef CHECK_LOSS
    atomic { printf("observer %d has collected for the last time; mask of stale pages: %d\n", id, stale[id]); assert(stale[id] == 0) }
#endif
}

init
{
    atomic {
        writers = 1;
        run writer();
        run observer(0);
        run observer(1)
    }
}
