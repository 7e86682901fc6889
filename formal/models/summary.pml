/* The summary level (I4): one summary bit over a line of words, marked and taken without a lock.
 *
 * `page[i]` lies in word i of one line. A marker stores into its page, marks the leaf, looks at the
 * summary and marks it if it is clear. A harvest takes the summary first and the leaves after. A harvest
 * of a part of the line, as harvest(first, count) may be, takes the leaves and leaves the summary.
 *
 * Two claims: nothing is lost, and nothing waits: a mark that has returned is in the next harvest
 * that begins, even if another marker is still on its way to the summary.
 *
 * Variants: SUMMARY_AFTER_LEAVES, SUMMARY_BEFORE_LEAF, SUMMARY_LOADED_EARLY, SKIP_WHEN_LEAF_IS_SET,
 * LEAF_COPY_THEN_ZERO, PARTIAL_TAKES_LINE.
 */
#ifndef MARKERS
#define MARKERS 2
#endif
#define PAGES 2
#define ALL_PAGES ((1 << PAGES) - 1)
#define BIT(page) (1 << (page))

#ifdef CHECK_LOSS
#define NOTHING_LOST atomic { printf("the last harvest is copied; mask of stale pages: %d\n", stale); assert(stale == 0) }
#else
#define NOTHING_LOST skip
#endif

byte leaf;        /* bit i: the only page of word i */
bool summary;
byte stale;       /* stored since the page was last copied */
byte untaken[MARKERS];   /* marked by this call, and not taken since */
byte returned;    /* marked by a call that has returned, and not taken since */
byte writers;

proctype marker(byte id)
{
    byte page;
    bool seen;
    do
    :: atomic { select(page : 0 .. PAGES - 1) };
       atomic { printf("marker %d stores into page %d\n", id, page); stale = stale | BIT(page) };
#if defined(SUMMARY_BEFORE_LEAF)
       atomic { printf("marker %d marks the summary\n", id); summary = true };
       atomic { printf("marker %d marks leaf %d\n", id, page); leaf = leaf | BIT(page);
                untaken[id] = BIT(page) };
#else
#if defined(SUMMARY_LOADED_EARLY)
       seen = summary;
#endif
       atomic { printf("marker %d marks leaf %d\n", id, page);
#if defined(SKIP_WHEN_LEAF_IS_SET)
           seen = (leaf & BIT(page)) != 0;
#endif
           leaf = leaf | BIT(page); untaken[id] = BIT(page) };
#if defined(SKIP_WHEN_LEAF_IS_SET)
       if
       :: seen
       :: else -> seen = summary
       fi;
#elif !defined(SUMMARY_LOADED_EARLY)
       atomic { seen = summary; printf("marker %d finds the summary %d\n", id, seen) };
#endif
       if
       :: seen
       :: else -> atomic { printf("marker %d marks the summary\n", id); summary = true }
       fi;
#endif
       atomic { printf("marker %d returns\n", id); returned = returned | untaken[id];
                untaken[id] = 0; page = 0; seen = false }
    :: break
    od;
    writers--
}

/* Ghosts, which change with the bit that they speak of. */
#define FORGET(taken)                                                                               \
    returned = returned & ~taken; promised = promised & ~taken;                                     \
    untaken[0] = untaken[0] & ~taken; untaken[1] = untaken[1] & ~taken

/* One word: what it held is copied, and counts as reported. */
inline take_leaf(word)
{
#ifdef LEAF_COPY_THEN_ZERO
    taken = leaf & BIT(word);
    atomic { printf("harvest copied leaf %d: %d, now it zeroes it\n", word, taken != 0); leaf = leaf & ~BIT(word);
             FORGET(taken) };
#else
    atomic { taken = leaf & BIT(word); leaf = leaf & ~BIT(word);
             FORGET(taken);
             printf("harvest takes leaf %d: %d\n", word, taken != 0) };
#endif
    atomic { stale = stale & ~taken; taken = 0 }
}

inline take_summary()
{
    atomic { lines = summary; summary = false; printf("harvest takes the summary: %d\n", lines) }
}

inline harvest_all()
{
    promised = returned;
#ifdef SUMMARY_AFTER_LEAVES
    lines = summary;
    if
    :: lines -> take_leaf(0); take_leaf(1)
    :: else
    fi;
    take_summary();
#else
    take_summary();
    if
    :: lines -> take_leaf(0); take_leaf(1)
    :: else
    fi;
#endif
#ifdef CHECK_PROMPT
    assert(promised == 0);
#endif
    atomic { lines = false; promised = 0 }
}

/* harvest(first, count) of word 0 alone: the other word of the line still needs the summary bit. */
inline harvest_word_0()
{
#ifdef PARTIAL_TAKES_LINE
    take_summary();
    if
    :: lines -> take_leaf(0)
    :: else
    fi;
    lines = false
#else
    take_leaf(0)
#endif
}

proctype harvester()
{
    byte taken, promised;
    bool lines;
    do
    :: harvest_all()
    :: harvest_word_0()
    :: writers == 0 -> break
    od;
    harvest_all();
    NOTHING_LOST
}

init
{
    atomic {
        writers = MARKERS;
        run marker(0);
        run marker(1);
        run harvester()
    }
}
