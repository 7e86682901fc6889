/* The end of a migration: who may run.
 *
 * The copy has everything, kept, and says so (HAVE); the source records that it gives its right to run away, and says so
 * (RUN); the copy records that it has the right, runs, and says so (DONE). Lines break at any moment and are replaced;
 * what is under way on one is read or lost. Each end may give up before the right is given, and each may crash once and
 * come again with what its journal says. A stranger may answer in the copy's place. At last, when nothing moves, the
 * user looks at both journals, and lets the source run where the copy was given up.
 *
 * Variants: RUN_WHEN_COMPLETE, RESUME_WITHOUT_ANSWER, RECORD_AFTER_RUN, STRANGER_IS_BELIEVED, REFUSES_AND_LISTENS,
 * RESTART_RESUMES, RESUME_AFTER_DONE, RUN_BEFORE_HAVE, HAVE_BEFORE_DURABLE, DROPPED_WHEN_BROKEN, REFUSAL_UNRECORDED.
 */
mtype = { HELLO, READY_PART, READY_HAVE, READY_RUNS, END, HAVE, RUN, DONE, REFUSED, STRANGER };
mtype = { live, given, done, part, have, runs, gone };

chan forth = [4] of { mtype, byte };
chan back = [4] of { mtype, byte };
byte line;                        /* the newest line; a frame on an older one is read by who is still there, or lost */
byte strangers = 1;
mtype source_journal = live;
mtype copy_journal = part;
bool source_runs, copy_runs;
bool complete, durable;           /* the copy's memory, and whether it outlives a crash */
byte ended;

#ifdef CHECK_BOTH
#define RUNS(who) atomic { who = true; printf("now runs: source %d, copy %d\n", source_runs, copy_runs); assert(!(source_runs && copy_runs)) }
#else
#define RUNS(who) who = true
#endif
#ifdef CHECK_KEPT
#define KEPT atomic { printf("the copy is complete: %d, durable: %d\n", complete, durable); assert(complete && durable) }
#else
#define KEPT skip
#endif
#define SAY(channel, word) atomic { if :: at == line && nfull(channel) -> printf("%e on line %d\n", word, at); channel!word(at) :: else fi }

proctype source()
{
    byte at, crashes = 1;
    mtype said;
again:
    at = line;
    SAY(forth, HELLO);
    do
    :: atomic { at != line -> printf("the source sees that its line is broken\n") };
#ifdef RESUME_WITHOUT_ANSWER
       if
       :: source_journal == given -> RUNS(source_runs); break
       :: else
       fi;
#endif
       goto again
    :: atomic { source_journal == live -> printf("the source gives up\n") };
       RUNS(source_runs);
       SAY(forth, REFUSED);
       break
    :: atomic { crashes > 0 -> crashes--; printf("the source's agent crashes, and reads its journal\n") };
       if
#ifdef RESTART_RESUMES
       :: true -> RUNS(source_runs); break
#else
       :: source_journal == live -> RUNS(source_runs); break
       :: else -> atomic { if :: line < 2 -> line++ :: else fi }; goto again
#endif
       fi
    :: atomic { strangers > 0 && source_journal == given -> strangers--; printf("a stranger answers\n") };
#ifdef STRANGER_IS_BELIEVED
       RUNS(source_runs); break
#else
       atomic { if :: line < 2 -> line++ :: else fi }; goto again
#endif
    /* What is left of older lines, once the newer one is taken. */
    :: atomic { at > 0 && back?[said, 0] -> back?said(0) }
    :: atomic { at > 1 && back?[said, 1] -> back?said(1) }
    :: atomic { back?said(eval(at)) -> printf("the source hears %e\n", said) };
       if
       :: said == READY_PART && source_journal == live ->
          SAY(forth, END);
#ifdef RUN_BEFORE_HAVE
          source_journal = given; KEPT; SAY(forth, RUN)
#endif
       :: (said == HAVE || said == READY_HAVE) ->
#ifdef RECORD_AFTER_RUN
          SAY(forth, RUN);
          if
          :: crashes > 0 -> crashes--; RUNS(source_runs); break
          :: source_journal = given
          fi
#else
          source_journal = given;
          KEPT;
          SAY(forth, RUN)
#endif
       :: said == DONE ->
          source_journal = done;
#ifdef RESUME_AFTER_DONE
          RUNS(source_runs);
#endif
          break
       :: said == REFUSED -> source_journal = live; RUNS(source_runs); break
       :: else
       fi
    :: timeout -> break
    od;
    ended++
}

proctype copy()
{
    byte at, crashes = 1;
    mtype said;
    do
    :: atomic { at != line -> at = line; printf("the copy comes to line %d\n", line) };
#ifdef DROPPED_WHEN_BROKEN
       complete = complete && copy_journal == runs;
#endif
    :: atomic { copy_journal == part || copy_journal == have -> printf("the copy is given up\n") };
#ifdef REFUSES_AND_LISTENS
       SAY(back, REFUSED)
#else
#ifndef REFUSAL_UNRECORDED
       copy_journal = gone;
#endif
       SAY(back, REFUSED);
       break
#endif
    :: atomic { crashes > 0 -> crashes--; complete = complete && durable; copy_runs = false; printf("the copy crashes, and reads its journal\n") };
       if
       :: copy_journal == part -> copy_journal = gone; break
       :: copy_journal == runs -> RUNS(copy_runs)
       :: else
       fi
    /* What is left of older lines, once the newer one is taken. */
    :: atomic { at > 0 && forth?[said, 0] -> forth?said(0) }
    :: atomic { at > 1 && forth?[said, 1] -> forth?said(1) }
    :: atomic { forth?said(eval(at)) -> printf("the copy hears %e\n", said) };
       if
       :: said == HELLO && copy_journal == part -> SAY(back, READY_PART)
       :: said == HELLO && copy_journal == have -> SAY(back, READY_HAVE)
       :: said == HELLO && copy_journal == runs -> SAY(back, READY_RUNS); SAY(back, DONE)
       :: said == END ->
          complete = true;
#ifdef HAVE_BEFORE_DURABLE
          copy_journal = have;
          SAY(back, HAVE);
          durable = true;
#else
          durable = true;
          copy_journal = have;
          SAY(back, HAVE);
#endif
#ifdef RUN_WHEN_COMPLETE
          RUNS(copy_runs)
#endif
       :: said == RUN ->
          copy_journal = runs;
          KEPT;
          RUNS(copy_runs);
          SAY(back, DONE)
       :: said == REFUSED -> copy_journal = gone; break
       :: else
       fi
    :: timeout -> break
    od;
    ended++
}

proctype breaks()
{
    do
    :: atomic { line < 1 -> line++; printf("the line breaks\n") }
    :: break
    od;
    ended++
}

proctype user()
{
    atomic { ended == 3 -> skip };
    if
    :: !source_runs && !copy_runs && copy_journal == gone -> RUNS(source_runs)
    :: else
    fi;
#ifdef CHECK_NEITHER
    atomic {
        printf("in the end: source %d, copy %d, journals %e and %e\n", source_runs, copy_runs, source_journal, copy_journal);
        assert(source_runs || copy_runs)
    }
#endif
}

init
{
    atomic { run source(); run copy(); run breaks(); run user() }
}
