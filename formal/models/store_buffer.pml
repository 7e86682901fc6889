/* Marks against a harvest on a machine with store buffers: what the fences are for.
 *
 * Every marking thread has a buffer. Its plain stores go in and reach memory later; its loads do
 * not wait for them; a fence waits until the buffer is empty; a locked read-modify-write does so,
 * too, and then works on memory. TSO (x86): stores leave in order. With -DWEAK (a model of Arm's
 * freedom, stores only): relaxed stores to different places leave in any order, and a release
 * store leaves only when it is the oldest. The harvester stores nothing plainly: it has no buffer.
 *
 * OPERATION is how a thread marks: MARK one page by fetch_or; BATCH several pages after one fence,
 * testing first; RANGE whole words by plain stores of all ones, then a fence, then the summary.
 *
 * With THIRD a top bit lies over the summary's, and is marked after it and taken before it.
 *
 * Variants: TEST_WITHOUT_FENCE, TEST_INSTEAD_OF_FETCH_OR, RANGE_WITHOUT_FENCE, RANGE_RELAXED.
 */
#define MARKERS 2
#define PAGES 2
#define BIT(page) (1 << (page))

/* What a plain store goes to. A leaf word of all ones is one page here. */
mtype = { DATA, LEAF, LEAF_RELEASE };

byte leaf;
bool summary;
#ifdef THIRD
bool top;
#endif
byte stale;
byte writers;
chan buffer[MARKERS] = [4] of { mtype, byte };

#define FENCE(id) empty(buffer[id])

/* One store leaves the buffer of marker `id` and is memory. */
#define OLDEST_LEAVES(id, kind, page, memory)                                                       \
    atomic { buffer[id] ? kind, page ->                                                             \
        printf("marker %d: its store to %e of page %d reaches memory\n", id, kind, page); memory = memory | BIT(page) }
#ifdef WEAK
#define LEAVES(id, kind, page, memory)                                                              \
    atomic { buffer[id] ?? kind, page ->                                                            \
        printf("marker %d: its store to %e of page %d reaches memory\n", id, kind, page); memory = memory | BIT(page) }
#else
#define LEAVES(id, kind, page, memory) OLDEST_LEAVES(id, kind, page, memory)
#endif

proctype drain(byte id)
{
end:
    do
    :: LEAVES(id, DATA, 0, stale)
    :: LEAVES(id, DATA, 1, stale)
#if defined(RANGE) && defined(RANGE_RELAXED)
    :: LEAVES(id, LEAF, 0, leaf)
    :: LEAVES(id, LEAF, 1, leaf)
#elif defined(RANGE)
    :: OLDEST_LEAVES(id, LEAF_RELEASE, 0, leaf)
    :: OLDEST_LEAVES(id, LEAF_RELEASE, 1, leaf)
#endif
    od
}

#define STORE(id, page) atomic { printf("marker %d stores into page %d: buffered\n", id, page); buffer[id] ! DATA, page }

#define FETCH_OR_LEAF(id, page)                                                                     \
    atomic { FENCE(id) -> printf("marker %d marks leaf %d by fetch_or\n", id, page); leaf = leaf | BIT(page) }

inline mark_summary(id)
{
    atomic { seen = summary; printf("marker %d finds the summary %d\n", id, seen) };
    if
    :: seen
    :: else -> atomic { FENCE(id) -> printf("marker %d marks the summary\n", id); summary = true }
    fi;
#ifdef THIRD
    atomic { seen = top; printf("marker %d finds the top %d\n", id, seen) };
    if
    :: seen
    :: else -> atomic { FENCE(id) -> printf("marker %d marks the top\n", id); top = true }
    fi;
#endif
    seen = false
}

/* Test first; the leaf is marked only if the load found it clear. */
inline test_and_mark(id, page)
{
    atomic { seen = (leaf & BIT(page)) != 0; printf("marker %d finds leaf %d: %d\n", id, page, seen) };
    if
    :: seen
    :: else -> FETCH_OR_LEAF(id, page)
    fi;
    mark_summary(id)
}

proctype marker(byte id)
{
    byte page;
    bool seen;
    do
#if defined(BATCH)
    :: STORE(id, 0); STORE(id, 1);
#ifndef TEST_WITHOUT_FENCE
       FENCE(id);
#endif
       test_and_mark(id, 0);
       test_and_mark(id, 1)
#elif defined(RANGE)
    :: STORE(id, 0); STORE(id, 1);
#ifdef RANGE_RELAXED
       atomic { printf("marker %d stores leaf 0, relaxed: buffered\n", id); buffer[id] ! LEAF, 0 };
       atomic { printf("marker %d stores leaf 1, relaxed: buffered\n", id); buffer[id] ! LEAF, 1 };
#else
       atomic { printf("marker %d stores leaf 0: buffered\n", id); buffer[id] ! LEAF_RELEASE, 0 };
       atomic { printf("marker %d stores leaf 1: buffered\n", id); buffer[id] ! LEAF_RELEASE, 1 };
#endif
#ifndef RANGE_WITHOUT_FENCE
       FENCE(id);
#endif
       mark_summary(id)
#else
    :: atomic { select(page : 0 .. PAGES - 1) };
       STORE(id, page);
#ifdef TEST_INSTEAD_OF_FETCH_OR
       test_and_mark(id, page);
#else
       FETCH_OR_LEAF(id, page);
       mark_summary(id);
#endif
       page = 0
#endif
    :: break
    od;
    FENCE(id);
    writers--
}

inline take_leaf(page)
{
    atomic { taken = leaf & BIT(page); leaf = leaf & ~BIT(page); printf("harvest takes leaf %d: %d\n", page, taken != 0) };
    atomic { stale = stale & ~taken; taken = 0 }
}

inline take_summary()
{
    atomic { lines = summary; summary = false; printf("harvest takes the summary: %d\n", lines) }
}

inline harvest()
{
#ifdef THIRD
    atomic { lines = top; top = false; printf("harvest takes the top: %d\n", lines) };
    if
    :: lines -> take_summary()
    :: else
    fi;
#else
    take_summary();
#endif
    if
    :: lines -> take_leaf(0); take_leaf(1)
    :: else
    fi;
    lines = false
}

proctype harvester()
{
    byte taken;
    bool lines;
    do
    :: harvest()
    :: writers == 0 -> break
    od;
    harvest();
#ifdef CHECK_LOSS
    atomic { printf("the last harvest is copied; mask of stale pages: %d\n", stale); assert(stale == 0) }
#endif
}

init
{
    atomic {
        writers = MARKERS;
        run drain(0);
        run drain(1);
        run marker(0);
        run marker(1);
        run harvester()
    }
}
