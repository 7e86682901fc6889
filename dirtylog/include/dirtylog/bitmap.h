/* A dirty bitmap with optional summary levels: mark while others harvest.
 *
 * `words` holds one bit a page. `summary`, where there is one, holds one bit
 * for each 64-byte line of words (512 pages), so that a harvest reads only
 * lines in which something was marked. `top`, where there is one, holds one
 * bit for each 64-byte line of the summary (2^18 pages), so that a harvest of
 * a large bitmap reads only those lines of its summary. Memory that others
 * mark without knowing these levels (a kernel, a vhost-user back end) has none.
 *
 * Whoever marks a bitmap has to know all of its levels: a summary under a top
 * is marked by programs alone that were compiled with this header.
 *
 * Initialize the whole struct, as {0} or an initializer does, before you assign
 * its members: a `top` left as memory was is taken for one, and written to.
 *
 * No function here checks bounds: the caller has.
 */
#ifndef DIRTYLOG_BITMAP_H
#define DIRTYLOG_BITMAP_H

#include <stddef.h>
#include <string.h>

#include "dirtylog/atomic.h"
#include "dirtylog/bits.h"

struct dl_bitmap {
    uint64_t *words;   /* dl_words_for(npages), 64-byte aligned where there is a summary */
    uint64_t *summary; /* NULL: none */
    uint64_t npages;
    uint64_t *top; /* NULL: none; only over a summary. The last one, so that {words, summary, npages} has none */
};

/* Lines that a harvest has taken: the 64 lines from 64 * group on. */
struct dl_taken {
    uint64_t group;
    uint64_t lines;
};

#define DL_GROUP_LINES 64u
#define DL_GROUP_WORDS (DL_GROUP_LINES * DL_LINE_WORDS)
/* A span is what one top bit stands for: a line of summary words, with all that is below them. */
#define DL_SPAN_GROUPS DL_LINE_WORDS
#define DL_SPAN_LINES (DL_SPAN_GROUPS * DL_GROUP_LINES)
#define DL_SPAN_WORDS (DL_SPAN_LINES * DL_LINE_WORDS)

static inline uint64_t dl_lines_for(uint64_t npages) { return (dl_words_for(npages) + DL_LINE_WORDS - 1) / DL_LINE_WORDS; }
static inline uint64_t dl_groups_for(uint64_t npages) { return (dl_lines_for(npages) + DL_GROUP_LINES - 1) / DL_GROUP_LINES; }
static inline uint64_t dl_spans_for(uint64_t npages) { return (dl_groups_for(npages) + DL_SPAN_GROUPS - 1) / DL_SPAN_GROUPS; }
static inline uint64_t dl_top_words_for(uint64_t npages) { return dl_words_for(dl_spans_for(npages)); }

/* ---- marking ------------------------------------------------------------ */

/* I4: pairs with the exchange in dl_summary_take(). The leaf was set before
 * (fetch_or, seq_cst), so when this load still sees the summary bit, the
 * harvester takes the summary after that, and reads the leaf after taking it.
 * When it does not, the bit is set anew and the next harvest looks. */
static inline void dl_summary_mark(const struct dl_bitmap *b, uint64_t group, uint64_t lines)
{
    if ((dl_load_seq_cst(&b->summary[group]) & lines) != lines)
        dl_fetch_or(&b->summary[group], lines);
}

/* One bit of a level, which is nearly always set. What follows a locked instruction waits for it, so that each
 * instruction counts: the test is one, and what is for a clear bit alone is kept (`__asm__`) from being done before it. */
static inline void dl_level_mark(uint64_t *level, uint64_t bit)
{
    if (__builtin_expect(!(dl_load_seq_cst(&level[bit / DL_WORD_PAGES]) >> (bit % DL_WORD_PAGES) & 1), 0)) {
        __asm__("" : "+r"(bit));
        dl_fetch_or(&level[bit / DL_WORD_PAGES], dl_bit(bit));
    }
}

/* I4, one level up: pairs with dl_top_take(). The summary bits below were set
 * before, or seen to be set (seq_cst, both), so when the load still sees the top
 * bit, the harvester takes the top after that, and looks at the summary after
 * taking it. Also where the summary bit was set already: who set it may not have
 * come to the top yet, and a mark that has returned must not wait for him. */
static inline void dl_top_mark_span(const struct dl_bitmap *b, uint64_t span)
{
    if (b->top)
        dl_level_mark(b->top, span);
}

static inline void dl_summary_mark_word(const struct dl_bitmap *b, uint64_t word)
{
    if (!b->summary)
        return;
    dl_level_mark(b->summary, word / DL_LINE_WORDS);
    dl_top_mark_span(b, word / DL_SPAN_WORDS);
}

/* Every line that words [first, last] touch. */
static inline void dl_summary_mark_words(const struct dl_bitmap *b, uint64_t first, uint64_t last)
{
    if (!b->summary)
        return;
    struct dl_part part = dl_part_first(first / DL_LINE_WORDS, last / DL_LINE_WORDS + 1);
    for (; part.mask; dl_part_next(&part))
        dl_summary_mark(b, part.word, part.mask);
    for (uint64_t span = first / DL_SPAN_WORDS; span <= last / DL_SPAN_WORDS && b->top; span++)
        dl_level_mark(b->top, span);
}

/* I3: fetch_or is a full barrier between the caller's store to the page and
 * whatever tells others to look; it is never skipped on a relaxed load. */
static inline void dl_mark_mask(const struct dl_bitmap *b, uint64_t word, uint64_t mask)
{
    dl_fetch_or(&b->words[word], mask);
    dl_summary_mark_word(b, word);
}

static inline void dl_mark(const struct dl_bitmap *b, uint64_t page)
{
    dl_mark_mask(b, page / DL_WORD_PAGES, dl_bit(page));
}

/* `count` of at least 1. */
static inline void dl_mark_range(const struct dl_bitmap *b, uint64_t first, uint64_t count)
{
    struct dl_part part = dl_part_first(first, first + count);
    for (; part.mask; dl_part_next(&part)) {
        /* A word that becomes all ones needs no read-modify-write: whatever
         * others mark in it meanwhile is part of the value stored, and a
         * harvester's exchange comes either before it or after. Release: who
         * sees the bits sees the pages' content (I3). That a mark of another
         * processor, overwritten here, is published with this one relies on
         * stores being seen by all others at once, as on x86 and Armv8. */
        if (part.mask == DL_ALL_PAGES)
            dl_store_release(&b->words[part.word], DL_ALL_PAGES);
        else
            dl_fetch_or(&b->words[part.word], part.mask);
    }
    /* I4: plain stores may still wait in the store buffer while the summary is
     * loaded; this fence stands for the barrier that fetch_or would have been. */
    dl_fence_seq_cst();
    dl_summary_mark_words(b, first / DL_WORD_PAGES, part.last_word);
}

/* ---- a batch: one full fence, then test before set ----------------------- */

/* I3: after this fence every load of the batch is younger than the caller's
 * stores. A bit seen set now has not been harvested before those stores, so
 * the harvest that takes it reads the new content. */
static inline void dl_batch_begin(void) { dl_fence_seq_cst(); }

static inline void dl_batch_mark(const struct dl_bitmap *b, uint64_t word, uint64_t mask)
{
    /* Acquire: the summary below is not looked at before the leaf. */
    if ((dl_load_acquire(&b->words[word]) & mask) != mask)
        dl_fetch_or(&b->words[word], mask);
    /* Also where the leaf was set already: who set it may not have come to
     * the summary yet, and this mark must not wait for him. */
    dl_summary_mark_word(b, word);
}

/* ---- harvest ------------------------------------------------------------- */

/* Take the lines of `mask` in one group of the summary; returns which were set.
 *
 * I4: the exchange comes before any word of those lines is read; pairs with
 * the load in dl_summary_mark(). A full fence has to follow before the words are
 * read with relaxed loads: where an exchange is two instructions, its store may
 * be seen after such a load. */
static inline uint64_t dl_summary_take(const struct dl_bitmap *b, uint64_t group, uint64_t mask)
{
    uint64_t *summary = &b->summary[group];
    return mask == DL_ALL_PAGES ? dl_exchange(summary, 0) : dl_fetch_and(summary, ~mask) & mask;
}

/* Take the spans of `spans` in one word of the top; returns which were set. A
 * harvest may take a span's bit only if it takes the summary of the whole span
 * next: one of a part leaves it, since the rest still needs it.
 *
 * I4: pairs with the load of dl_top_mark_span(). The fence comes before any summary
 * word of those spans is looked at with a relaxed load, as below the summary. */
static inline uint64_t dl_top_take(const struct dl_bitmap *b, uint64_t word, uint64_t spans)
{
    uint64_t taken = dl_fetch_and(&b->top[word], ~spans) & spans;
    dl_fence_after_rmw();
    return taken;
}

/* For a harvest of everything that has come to `group`: whether it may pass over the DL_SPAN_GROUPS groups from there on.
 * If not, it has taken their top bit. */
static inline int dl_span_is_clean(const struct dl_bitmap *b, uint64_t group)
{
    uint64_t span = group / DL_SPAN_GROUPS;
    if (!b->top || group % DL_SPAN_GROUPS)
        return 0;
    return !(dl_load_relaxed(&b->top[span / DL_WORD_PAGES]) & dl_bit(span)) ||
           !dl_top_take(b, span / DL_WORD_PAGES, dl_bit(span));
}

/* I5: a harvest that cannot go on gives the lines back, unread. The top after the
 * summary, as whoever marks (I4): another harvester may be at it meanwhile. */
static inline void dl_summary_untake(const struct dl_bitmap *b, const struct dl_taken *taken, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        dl_fetch_or(&b->summary[taken[i].group], taken[i].lines);
        dl_top_mark_span(b, taken[i].group / DL_SPAN_GROUPS);
    }
}

/* I3: the last step of every harvest: no page is read before its bit is seen to be taken. A batch tests before
 * it sets, so if the caller's load of a page came before the store half of the exchange, a writer could find
 * the bit still set, leave it, and be missing from both. */
static inline void dl_harvest_end(void) { dl_fence_after_rmw(); }

/* Get and clear one word; `dl_harvest_end` follows the last one. The load spares clean words the locked exchange, as
 * in KVM; a mark that comes after it is for the next harvest. */
static inline uint64_t dl_harvest_word(uint64_t *word)
{
    return dl_load_relaxed(word) ? dl_exchange(word, 0) : 0;
}

/* Get and clear the bits of `mask` only. */
static inline uint64_t dl_harvest_mask(uint64_t *word, uint64_t mask)
{
    if (mask == DL_ALL_PAGES)
        return dl_harvest_word(word);
    return dl_load_relaxed(word) & mask ? dl_fetch_and(word, ~mask) & mask : 0;
}

/* Get and clear words [first, end) into `out`, which holds the whole bitmap; returns the pages. */
static inline uint64_t dl_harvest_words(const struct dl_bitmap *b, uint64_t first, uint64_t end, uint64_t *out)
{
    uint64_t pages = 0;
    for (uint64_t word = first; word < end; word++) {
        out[word] = dl_harvest_word(&b->words[word]);
        pages += (uint64_t)__builtin_popcountll(out[word]);
    }
    return pages;
}

/* ---- harvest while nobody marks ------------------------------------------ */

/* A line of words that nobody else writes meanwhile: compilers make a few vector moves of each of the two. It needs no
 * atomic (I8); whoever only looks still sees each aligned word as it was or as it is. */
static inline void dl_move_line(uint64_t *line, uint64_t *out)
{
    memcpy(out, line, DL_LINE_WORDS * sizeof *line);
    memset(line, 0, DL_LINE_WORDS * sizeof *line);
}

/* As dl_harvest_words(), a line at a time. */
static inline uint64_t dl_move_words(const struct dl_bitmap *b, uint64_t first, uint64_t end, uint64_t *out)
{
    uint64_t pages = 0;
    for (; first + DL_LINE_WORDS <= end; first += DL_LINE_WORDS) {
        dl_move_line(b->words + first, out + first);
        for (uint64_t word = first; word < first + DL_LINE_WORDS; word++)
            pages += (uint64_t)__builtin_popcountll(out[word]);
    }
    return pages + dl_harvest_words(b, first, end, out);
}

/* The last step of a harvest that has cleared by plain stores: they are seen before the promise ends that let them be. A
 * batch tests before it sets (I3), and must not find what has been taken. */
static inline void dl_move_end(void) { dl_fence_seq_cst(); }

/* ---- harvest of everything ----------------------------------------------- */

/* The two below. `quiescent` is a constant that folds away, also where a compiler would rather have both in one. */
__attribute__((always_inline)) static inline uint64_t dl_harvest_all(const struct dl_bitmap *b, uint64_t *out,
                                                                     int quiescent)
{
    uint64_t nwords = dl_words_for(b->npages), pages = 0;
    if (!b->summary) {
        /* I7: whoever shares the memory may set bits past the last page; they are not ours. */
        uint64_t whole = b->npages / DL_WORD_PAGES;
        pages = quiescent ? dl_move_words(b, 0, whole, out) : dl_harvest_words(b, 0, whole, out);
        if (whole < nwords) {
            out[whole] = dl_harvest_mask(&b->words[whole], dl_tail_mask(b->npages));
            pages += (uint64_t)__builtin_popcountll(out[whole]);
        }
    } else {
        memset(out, 0, nwords * sizeof *out);
        for (uint64_t group = 0; group < dl_groups_for(b->npages); group++) {
            if (dl_span_is_clean(b, group)) {
                group += DL_SPAN_GROUPS - 1;
                continue;
            }
            if (!dl_load_relaxed(&b->summary[group]))
                continue;
            uint64_t lines = dl_summary_take(b, group, DL_ALL_PAGES);
            if (!quiescent)
                dl_fence_seq_cst(); /* I4, see there */
            for (; lines; lines &= lines - 1) {
                uint64_t first = group * DL_GROUP_WORDS + dl_ffs(lines) * (uint64_t)DL_LINE_WORDS;
                uint64_t end = first + DL_LINE_WORDS < nwords ? first + DL_LINE_WORDS : nwords;
                pages += quiescent ? dl_move_words(b, first, end, out) : dl_harvest_words(b, first, end, out);
            }
        }
    }
    if (quiescent)
        dl_move_end();
    else
        dl_harvest_end();
    return pages;
}

/* Get and clear everything into dl_words_for(npages) words; returns the pages.
 * The same order as the library's own harvest, without its vector code. */
static inline uint64_t dl_harvest(const struct dl_bitmap *b, uint64_t *out) { return dl_harvest_all(b, out, 0); }

/* dl_harvest() for a caller who knows that from the call to its return nobody else marks, clears or harvests, and has heard
 * so from those who did (a join, a lock). Where everything is dirty, gcc 12 at -O2 makes it 2.5 times as fast with a summary
 * and 4 times without; with -mpopcnt as well, 6 and 11 times (python -m benchmarks.quiescent). In place of I8, and of the
 * orders of I3 and I4 between mark and harvest, stands that promise. */
static inline uint64_t dl_harvest_quiescent(const struct dl_bitmap *b, uint64_t *out) { return dl_harvest_all(b, out, 1); }

#endif /* DIRTYLOG_BITMAP_H */
