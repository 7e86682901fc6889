/* The third level (I4 once more): a top bit over summary bits over leaves, marked and taken without a lock.
 *
 * Page i has a leaf bit and a summary bit of its own; one top bit stands for both summary bits. That a page's store comes
 * before its mark, and its copy after, is the matter of summary.pml: here they are one step. A marker marks the leaf, then
 * the summary bit if it finds it clear, then the top bit if it finds that clear. A harvest takes the top, looks at the
 * summary, takes what it finds there, and the leaves after that. A harvest of a part takes the summary bit and the leaf of
 * page 0 and leaves the top, which the rest still needs. A harvest that finds no memory for its answer gives the summary
 * bits back, and the top as a marker does.
 *
 * Marker 1 marks page 0 alone, which is all that two of them need to meet in every place.
 *
 * Two claims: nothing is lost, with HARVESTERS of one and of two (then each marker marks a page of its own, once; a harvest
 * is of everything, or with PARTS of a part as well); and, with one, nothing waits: a mark that has returned is in the next
 * harvest that begins, even if another marker has set the summary bit and is still on its way to the top.
 *
 * Variants: TOP_AFTER_SUMMARY, TOP_BEFORE_SUMMARY, TOP_LOADED_EARLY, SKIP_TOP_WHEN_SUMMARY_IS_SET, TOP_AROUND_SUMMARY,
 * PARTIAL_TAKES_TOP, PARTIAL_CLEARS_TOP, PARTIAL_TAKES_LEAF_FIRST, SUMMARY_LOOKED_AT_EARLY, GIVES_BACK_WITHOUT_TOP,
 * GIVES_BACK_TOP_FIRST.
 */
#ifndef HARVESTERS
#define HARVESTERS 1
#endif
#define PAGES 2
#define BIT(page) (1 << (page))
#if HARVESTERS == 1
#define PARTS
#endif

byte leaf, summary;      /* bit i: of page i */
bool top;
byte stale;              /* stored since the page was last copied */
byte untaken[2];         /* marked by this call, and not taken since */
byte returned;           /* marked by a call that has returned, and not taken since */
byte writers, harvesters;

inline mark_top(who)
{
#if !defined(TOP_LOADED_EARLY)
    atomic { seen = top; printf("%d finds the top %d\n", who, seen) };
#endif
    if
    :: seen
    :: else -> atomic { printf("%d marks the top\n", who); top = true }
    fi
}

inline mark_summary(who)
{
    atomic { seen = (summary & BIT(page)) != 0; printf("%d finds summary bit %d: %d\n", who, page, seen) };
#if defined(TOP_LOADED_EARLY)
    atomic { early = top; printf("%d finds the top %d\n", who, early) };
#endif
    if
    :: seen
    :: else ->
#if defined(TOP_AROUND_SUMMARY)
       atomic { printf("%d marks the top\n", who); top = true };
#endif
       atomic { printf("%d marks summary bit %d\n", who, page); summary = summary | BIT(page) }
    fi
#if defined(TOP_LOADED_EARLY)
    ; atomic { seen = early; early = false }
#endif
}

proctype marker(byte id)
{
    byte page;
    bool seen;
#if defined(TOP_LOADED_EARLY)
    bool early;
#endif
    do
    ::
#if HARVESTERS == 1
       atomic { select(page : 0 .. PAGES - 1 - id) };
#else
       page = id;
#endif
       atomic { printf("%d stores into page %d and marks its leaf\n", id, page); stale = stale | BIT(page);
                leaf = leaf | BIT(page); untaken[id] = BIT(page) };
#if defined(TOP_BEFORE_SUMMARY)
       mark_top(id);
       mark_summary(id);
#elif defined(SKIP_TOP_WHEN_SUMMARY_IS_SET) || defined(TOP_AROUND_SUMMARY)
       mark_summary(id);
       if
       :: seen
       :: else -> mark_top(id)
       fi;
#else
       mark_summary(id);
       mark_top(id);
#endif
       atomic { printf("%d returns\n", id); returned = returned | untaken[id]; untaken[id] = 0; page = 0; seen = false }
#if HARVESTERS == 2
       ; break
#endif
    :: break
    od;
    writers--
}

/* Ghosts, which change with the bit that they speak of. */
#define FORGET(taken)                                                                               \
    returned = returned & ~taken; promised = promised & ~taken;                                     \
    untaken[0] = untaken[0] & ~taken; untaken[1] = untaken[1] & ~taken

/* What the leaf held is copied, and counts as reported. */
inline take_leaf(word)
{
    atomic { taken = leaf & BIT(word); leaf = leaf & ~BIT(word); FORGET(taken);
             printf("harvest takes leaf %d: %d\n", word, taken != 0); stale = stale & ~taken; taken = 0 }
}

inline take_summary(word)
{
    atomic { lines = lines | (summary & BIT(word)); printf("harvest takes summary bit %d: %d\n", word, (summary & BIT(word)) != 0);
             summary = summary & ~BIT(word) }
}

inline take_top()
{
    atomic { any = top; top = false; printf("harvest takes the top: %d\n", any) }
}

inline look_at_summary()
{
    atomic { look = summary; printf("harvest looks at the summary: %d\n", look) }
}

/* Of the two words of the summary, those that were not zero when it looked. */
inline take_summaries()
{
    if
    :: look & BIT(0) -> take_summary(0)
    :: else
    fi;
    if
    :: look & BIT(1) -> take_summary(1)
    :: else
    fi
}

inline take_leaves()
{
    if
    :: lines & BIT(0) -> take_leaf(0)
    :: else
    fi;
    if
    :: lines & BIT(1) -> take_leaf(1)
    :: else
    fi;
    atomic { lines = 0; look = 0 }
}

inline harvest_all()
{
    promised = returned;
#if defined(SUMMARY_LOOKED_AT_EARLY)
    look_at_summary();
#endif
#if defined(TOP_AFTER_SUMMARY)
    any = top;
#else
    take_top();
#endif
    if
    :: any ->
#if !defined(SUMMARY_LOOKED_AT_EARLY)
       look_at_summary();
#endif
       take_summaries();
       take_leaves()
    :: else
    fi;
#if defined(TOP_AFTER_SUMMARY)
    take_top();
#endif
#ifdef CHECK_PROMPT
    assert(promised == 0);
#endif
    atomic { any = false; promised = 0; look = 0 }
}

/* A range that has the line of page 0 whole, and nothing of the other. */
inline harvest_part()
{
#if defined(PARTIAL_TAKES_TOP)
    take_top();
    any = false;
#endif
#if defined(PARTIAL_TAKES_LEAF_FIRST)
    take_leaf(0);
    take_summary(0);
#else
    take_summary(0);
    if
    :: lines -> take_leaf(0)
    :: else
    fi;
#endif
#if defined(PARTIAL_CLEARS_TOP)
    look_at_summary();
    if
    :: look == 0 -> take_top()
    :: else
    fi;
    any = false;
#endif
    atomic { lines = 0; look = 0 }
}

inline give_summary_back()
{
    if
    :: lines -> atomic { printf("harvest gives the summary back: %d\n", lines); summary = summary | lines; lines = 0 }
    :: else
    fi
}

/* The summary is taken, and there is no memory for the answer. */
inline harvest_that_fails()
{
    take_top();
    if
    :: any ->
       look_at_summary();
       take_summaries();
#if defined(GIVES_BACK_TOP_FIRST)
       mark_top(8);
       give_summary_back()
#else
       give_summary_back();
#if !defined(GIVES_BACK_WITHOUT_TOP)
       mark_top(8)
#endif
#endif
    :: else
    fi;
    atomic { any = false; look = 0; seen = false }
}

proctype harvester()
{
    byte taken, promised, look, lines;
    bool any, seen;
    do
    :: harvest_all()
#ifdef PARTS
    :: harvest_part()
#endif
    :: harvest_that_fails()
    :: writers == 0 -> break
    od;
    harvesters--
}

init
{
    byte taken, promised, look, lines;
    bool any;
    atomic {
        writers = 2;
        harvesters = HARVESTERS;
        run marker(0);
        run marker(1);
        run harvester();
#if HARVESTERS == 2
        run harvester()
#endif
    }
    (writers == 0 && harvesters == 0);
    harvest_all();
#ifdef CHECK_LOSS
    atomic { printf("the last harvest is copied; mask of stale pages: %d\n", stale); assert(stale == 0) }
#endif
}
