/* A copy that runs before it has everything: who may run, and what it may see.
 *
 * The copy is ready, and the source gives its right to run away (RUN) while two pages are missing. The copy runs; where it
 * touches what is missing it waits. Pages come in frames; the line may break with what is under way, and on the next one
 * the copy says how many frames it has applied. Until RUN has come the copy may give up, and the source goes on on its word.
 *
 * Variants: LOST_LINE_REVIVES_THE_SOURCE, READY_COPY_RUNS, GIVES_UP_WHILE_IT_RUNS, GUARD_ENDS_WITH_THE_LINE,
 * SENT_COUNTS_AS_APPLIED.
 *
 * With FILLED the copy runs when nothing is missing any more. Until then its journal says that it fills, and it may be
 * given up or killed: the source goes on, on its word or on that of the user, who reads the journal of a copy that has ended.
 *
 * Variants of that: LOST_LINE_REVIVES_THE_SOURCE, SENT_COUNTS_AS_APPLIED, STARTS_WHILE_IT_FILLS,
 * RUNS_BEFORE_IT_IS_RECORDED, GIVEN_UP_WHEN_FILLED, RECORDED_AS_RUNNING.
 */
#define NEVER 9

mtype = { RUN, PAGE, ready, faults, fills, runs, gone };

chan forth[2] = [3] of { mtype, byte };
byte line, copy_at;                       /* the newest line, and the one that the copy is on */
mtype stage = ready;                      /* the copy's, in its journal */
bool source_runs, copy_runs, dead;        /* what has run once has done something that stays; dead: the copy's process */
bool there[2], written[2], filled, guarded = true;
byte value[2];                            /* 0: never came, 1: the source's, 2: the program's */
byte frame[2], sent, applied;

#ifdef CHECK_BOTH
#define RUNS(who) atomic { who = true; printf("now runs: source %d, copy %d\n", source_runs, copy_runs); assert(!(source_runs && copy_runs)) }
#else
#define RUNS(who) who = true
#endif

#ifdef FILLED
#define HAS_THE_RIGHT (stage == fills || stage == runs || stage == faults)
#define NEVER_RUNS (stage == gone || (dead && (stage == ready || stage == fills)))
#ifdef RECORDED_AS_RUNNING
#define WHILE_IT_FILLS faults
#else
#define WHILE_IT_FILLS fills
#endif
#else
#define HAS_THE_RIGHT (stage == faults)
#define NEVER_RUNS (stage == gone)
#define WHILE_IT_FILLS faults
#endif

inline go(page)
{
    atomic {
        at == line && frame[page] == NEVER && !NEVER_RUNS && nfull(forth[at]) ->
        printf("page %d goes over line %d\n", page, at);
        forth[at]!PAGE(page);
        frame[page] = sent;
        sent++
    }
}

proctype source()
{
    byte at;
again:
    /* The word of a copy that has ended is in its journal. */
    atomic { copy_at == line || NEVER_RUNS || filled -> at = line; printf("the source comes on line %d\n", at) };
    if
    :: filled -> goto over
    :: NEVER_RUNS -> RUNS(source_runs); goto over
    :: !NEVER_RUNS && !filled
    fi;
    atomic {
#ifndef SENT_COUNTS_AS_APPLIED
        if :: frame[0] != NEVER && frame[0] >= applied -> frame[0] = NEVER :: else fi;
        if :: frame[1] != NEVER && frame[1] >= applied -> frame[1] = NEVER :: else fi;
#endif
        sent = applied
    };
    if
    :: atomic { stage == ready && at == line && nfull(forth[at]) -> forth[at]!RUN(0); printf("the right is given\n") }
    :: HAS_THE_RIGHT
    :: NEVER_RUNS -> RUNS(source_runs); goto over
    :: at != line -> goto lost
    fi;
    do
    :: go(0)
    :: go(1)
    :: filled -> goto over
    :: NEVER_RUNS -> RUNS(source_runs); goto over
    :: at != line -> goto lost
    od;
lost:
    printf("the source sees that its line is broken\n");
#ifdef LOST_LINE_REVIVES_THE_SOURCE
    RUNS(source_runs);
    goto over;
#endif
    goto again;
over:
    skip
}

proctype copy()
{
    byte page;
#ifdef READY_COPY_RUNS
    RUNS(copy_runs);
#endif
    do
    :: atomic { copy_at != line -> copy_at = line; printf("the copy comes to line %d\n", line) };
#ifdef GUARD_ENDS_WITH_THE_LINE
       guarded = false
#endif
#ifdef FILLED
    :: atomic { (stage == ready || stage == WHILE_IT_FILLS) && !filled -> stage = gone; printf("the copy is given up\n") }; break
    :: atomic { stage != gone && !filled -> dead = true; printf("the copy's process is killed, its journal says %e\n", stage) };
       break
#elif defined(GIVES_UP_WHILE_IT_RUNS)
    :: atomic { !filled -> stage = gone; printf("the copy is given up\n") }; break
#else
    :: atomic { stage == ready -> stage = gone; printf("the copy is given up\n") }; break
#endif
    :: atomic { copy_at == line && forth[copy_at]?[RUN, _] -> forth[copy_at]?RUN(_); stage = WHILE_IT_FILLS };
#ifdef STARTS_WHILE_IT_FILLS
       RUNS(copy_runs)
#endif
#ifndef FILLED
       if
       :: RUNS(copy_runs)
       :: atomic { stage = gone; printf("the copy is given up, and has not begun\n") }; break
       fi
#endif
    :: atomic {
           copy_at == line && stage == WHILE_IT_FILLS && forth[copy_at]?[PAGE, _] -> forth[copy_at]?PAGE(page);
           applied++;
           printf("page %d is laid\n", page);
           value[page] = 1;
           there[page] = true
       }
    :: atomic { there[0] && there[1] -> filled = true; printf("nothing is missing\n") };
#ifdef FILLED
#ifdef GIVEN_UP_WHEN_FILLED
       if :: atomic { stage = gone; printf("the copy is given up\n") }; break :: skip fi;
#endif
#ifdef RUNS_BEFORE_IT_IS_RECORDED
       RUNS(copy_runs);
       if :: atomic { dead = true; printf("the copy's process is killed, its journal says %e\n", stage) }; break :: skip fi;
       stage = runs;
#else
       atomic { stage = runs; printf("the copy's journal says that it runs\n") };
       RUNS(copy_runs);
#endif
#endif
       break
    :: timeout -> break
    od
}

/* Touches both pages, each twice. */
proctype program()
{
    byte page, touched;
    do
    :: atomic {
           copy_runs && touched < 4 && (there[touched % 2] || !guarded) -> page = touched % 2;
           printf("the program finds %d in page %d\n", value[page], page);
#ifdef CHECK_LOSS
           assert(value[page] == (written[page] -> 2 : 1));
#endif
           value[page] = 2;
           written[page] = true;
           touched++
       }
    :: touched == 4 -> break
    :: timeout -> break
    od;
#ifdef CHECK_NEITHER
    atomic {
        printf("in the end: source %d, copy %d, pages there %d and %d\n", source_runs, copy_runs, there[0], there[1]);
        assert(source_runs || (copy_runs && there[0] && there[1]))
    }
#endif
}

proctype breaks()
{
    if
    :: atomic { line < 1 -> line++; printf("the line breaks\n") }
    :: skip
    fi
}

init
{
    atomic {
        frame[0] = NEVER;
        frame[1] = NEVER;
        run source();
        run copy();
        run program();
        run breaks()
    }
}
