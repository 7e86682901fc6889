/* A harvest on a machine whose exchange is two instructions: what its last fence is for.
 *
 * arm64 without LSE exchanges by LDAXR and STLXR. The load half acquires and the store half releases, so
 * a later load of the page may be done between the two: EARLY is where it may, LATE is after the exchange.
 * STLXR fails, and all begins again, if anyone has stored to the word meanwhile. The marker's own
 * fence is in order (batch: before its test), so its store to the page is in memory when it tests.
 *
 * Variant: FENCE_LEFT_OUT.
 */
bool data;      /* the page has the marker's store */
bool leaf;      /* set by an earlier mark, or not */
bool copied;    /* what the harvester read of the page */
bool taken;
byte done;

active proctype marker()
{
    bool seen;
    atomic { printf("the marker stores into the page; a fence\n"); data = true };
    atomic { seen = leaf; printf("the marker finds the leaf %d\n", seen) };
    if
    :: seen
    :: else -> atomic { printf("the marker marks\n"); leaf = true }
    fi;
    done++
}

active proctype harvester()
{
    bool seen, succeeds;
    if
    :: leaf = true
    :: skip
    fi;
    do
    :: succeeds -> break
    :: else ->
       atomic { seen = leaf; printf("the harvester loads the leaf, exclusively: %d\n", seen) };
#ifdef FENCE_LEFT_OUT
       if
       :: atomic { copied = data; printf("the harvester reads the page early: %d\n", copied) }
       :: skip
       fi;
#endif
       atomic {
           if
           :: leaf == seen -> leaf = false; taken = seen; succeeds = true; printf("the harvester stores the leaf\n")
           :: else -> printf("the harvester begins again\n")
           fi
       }
    od;
#ifndef FENCE_LEFT_OUT
    atomic { copied = data; printf("the harvester reads the page: %d\n", copied) };
#endif
    done++
}

/* Nobody is left: the page was written; its mark waits, or the copy that a harvest made has it. */
active proctype check()
{
    done == 2;
#ifdef CHECK_LOSS
    atomic { printf("leaf %d, copy has %d\n", leaf, copied); assert(!data || leaf || (taken && copied)) }
#endif
}
