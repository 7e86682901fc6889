/* Threads that mark and harvest, as litmus tests of the headers: what is looked at is what the compiler makes of them.
 *
 * Page i is one word of memory, pages[i]; a write stores 1 to it. A harvest returns two bits a page: taken, and what it
 * then read. Every function has the registers of its arguments alone, so that each place in memory is known.
 */
#include "_bits/batch.h"
#include "dirtylog/bitmap.h"

#define THREAD(name) uint64_t name(uint64_t *pages, uint64_t *words, uint64_t *summary, uint64_t *top)
/* Two words of one line: page 0 is in the first one, page 64 in the second. */
#define BITMAP const struct dl_bitmap bitmap = {words, summary, 2 * DL_WORD_PAGES}
#define SECOND DL_WORD_PAGES
/* One word, under a summary and a top. */
#define BITMAP_OF_THREE const struct dl_bitmap bitmap = {words, summary, DL_WORD_PAGES, top}
/* The program's own accesses. */
#define WRITE(i) dl_store_relaxed(&pages[i], 1)
#define READ(i) dl_load_relaxed(&pages[i])
#define REPORT(i, word) ((word) & 1 ? (1 | READ(i) << 1) << 2 * (i) : 0)

/* ---- as built */

THREAD(mark) { BITMAP; WRITE(0); dl_mark(&bitmap, 0); return 0; }
THREAD(mark_second) { BITMAP; WRITE(1); dl_mark(&bitmap, SECOND); return 0; }
THREAD(range) { BITMAP; WRITE(0); dl_mark_range(&bitmap, 0, DL_WORD_PAGES); return 0; }
THREAD(range_of_both) { BITMAP; WRITE(0); WRITE(1); dl_mark_range(&bitmap, 0, 2 * DL_WORD_PAGES); return 0; }
THREAD(batch) { BITMAP; WRITE(0); dl_batch_begin(); dl_batch_mark(&bitmap, 0, 1); return 0; }
THREAD(batch_of_both)
{
    BITMAP;
    WRITE(0);
    WRITE(1);
    dl_batch_begin();
    dl_batch_mark(&bitmap, 0, 1);
    dl_batch_mark(&bitmap, 1, 1);
    return 0;
}

THREAD(harvest)
{
    BITMAP;
    uint64_t out[2];
    dl_harvest(&bitmap, out);
    return REPORT(0, out[0]) | REPORT(1, out[1]);
}

/* A harvest of the first word alone, which leaves the summary. */
THREAD(harvest_part)
{
    uint64_t taken = dl_harvest_mask(&words[0], DL_ALL_PAGES >> 1);
    dl_harvest_end();
    return REPORT(0, taken);
}

/* Clear, then copy, as manual protection has it: whatever was set, the page is copied. */
THREAD(clear)
{
    BITMAP;
    dl_clear_range(&bitmap, 0, 1);
    return 1 | READ(0) << 1;
}

/* A mark that has returned, told to another thread; and a harvest that begins after it was told. */
THREAD(mark_and_tell)
{
    BITMAP;
    dl_mark(&bitmap, 0);
    DL_STORE(&pages[1], 1, RELEASE);
    return 0;
}
THREAD(batch_and_tell)
{
    BITMAP;
    dl_batch_begin();
    dl_batch_mark(&bitmap, 0, 1);
    DL_STORE(&pages[1], 1, RELEASE);
    return 0;
}
THREAD(harvest_until_told)
{
    BITMAP;
    uint64_t first[2], second[2];
    dl_harvest(&bitmap, first);
    uint64_t told = DL_LOAD(&pages[1], ACQUIRE);
    dl_harvest(&bitmap, second);
    return told << 1 | ((first[0] | second[0]) & 1);
}

/* The acquire of a batch as compilers make it that know LDAPR: later accesses come after it, and an earlier release need
 * not come before. */
static inline uint64_t load_by_ldapr(const uint64_t *word)
{
    uint64_t value;
    __asm__ volatile(".arch_extension rcpc\n\tldapr\t%0, %1" : "=r"(value) : "Q"(*word) : "memory");
    return value;
}

THREAD(batch_by_ldapr)
{
    BITMAP;
    WRITE(0);
    dl_batch_begin();
    if (!(load_by_ldapr(&words[0]) & 1))
        dl_fetch_or(&words[0], 1);
    dl_summary_mark_word(&bitmap, 0);
    return 0;
}

/* ---- wrong orders, one mistake each */

/* I3: a test instead of the read-modify-write. */
THREAD(test_before_mark)
{
    BITMAP;
    WRITE(0);
    if (!(dl_load_relaxed(&words[0]) & 1))
        dl_mark(&bitmap, 0);
    return 0;
}

THREAD(batch_without_fence) { BITMAP; WRITE(0); dl_batch_mark(&bitmap, 0, 1); return 0; }

/* The leaf's load and the summary's in any order. */
THREAD(batch_without_acquire)
{
    dl_batch_begin();
    if (!(dl_load_relaxed(&words[0]) & 1))
        dl_fetch_or(&words[0], 1);
    if (!(dl_load_relaxed(&summary[0]) & 1))
        dl_fetch_or(&summary[0], 1);
    DL_STORE(&pages[1], 1, RELEASE);
    return 0;
}

/* The summary's load may be done before the leaf's store is seen. (LDAR after STLR would be in order by itself.) */
THREAD(range_without_fence)
{
    WRITE(0);
    dl_store_release(&words[0], DL_ALL_PAGES);
    if (!(dl_load_relaxed(&summary[0]) & 1))
        dl_fetch_or(&summary[0], 1);
    return 0;
}

THREAD(range_relaxed)
{
    BITMAP;
    WRITE(0);
    dl_store_relaxed(&words[0], DL_ALL_PAGES);
    dl_fence_seq_cst();
    dl_summary_mark_word(&bitmap, 0);
    return 0;
}

THREAD(mark_relaxed)
{
    BITMAP;
    WRITE(0);
    DL_RMW(fetch_or, &words[0], 1, RELAXED);
    dl_summary_mark_word(&bitmap, 0);
    return 0;
}

/* I4: the summary's load before the leaf is marked. */
THREAD(summary_loaded_early)
{
    WRITE(0);
    uint64_t seen = dl_load_seq_cst(&summary[0]);
    dl_fetch_or(&words[0], 1);
    if (!(seen & 1))
        dl_fetch_or(&summary[0], 1);
    return 0;
}

static inline uint64_t harvest_by(uint64_t *pages, uint64_t *words, uint64_t *summary, int summary_fence, int end_fence)
{
    uint64_t first = 0, second = 0;
    if (dl_load_relaxed(&summary[0]) && dl_exchange(&summary[0], 0)) {
        if (summary_fence)
            dl_fence_seq_cst();
        first = dl_harvest_word(&words[0]);
        second = dl_harvest_word(&words[1]);
    }
    if (end_fence)
        dl_harvest_end();
    return REPORT(0, first) | REPORT(1, second);
}

THREAD(harvest_without_summary_fence) { return harvest_by(pages, words, summary, 0, 1); }
THREAD(harvest_without_end) { return harvest_by(pages, words, summary, 1, 0); }

/* I4: the leaves before the summary. */
THREAD(harvest_leaves_first)
{
    uint64_t first = dl_harvest_word(&words[0]), second = dl_harvest_word(&words[1]);
    dl_fence_seq_cst();
    dl_exchange(&summary[0], 0);
    dl_harvest_end();
    return REPORT(0, first) | REPORT(1, second);
}

/* Get and clear by two accesses. */
THREAD(harvest_copy_then_zero)
{
    uint64_t first = dl_load_acquire(&words[0]);
    dl_store_release(&words[0], 0);
    dl_fence_seq_cst();
    return REPORT(0, first);
}

THREAD(clear_without_end)
{
    if (dl_load_relaxed(&words[0]) & 1)
        dl_fetch_and(&words[0], ~UINT64_C(1));
    return 1 | READ(0) << 1;
}

/* ---- a third level: one top bit for a line of summary words */

THREAD(mark_three) { BITMAP_OF_THREE; WRITE(0); dl_mark(&bitmap, 0); return 0; }
THREAD(range_three) { BITMAP_OF_THREE; WRITE(0); dl_mark_range(&bitmap, 0, DL_WORD_PAGES); return 0; }
THREAD(batch_three) { BITMAP_OF_THREE; WRITE(0); dl_batch_begin(); dl_batch_mark(&bitmap, 0, 1); return 0; }

THREAD(harvest_three)
{
    BITMAP_OF_THREE;
    uint64_t out[1];
    dl_harvest(&bitmap, out);
    return REPORT(0, out[0]);
}

THREAD(mark_three_and_tell)
{
    BITMAP_OF_THREE;
    dl_mark(&bitmap, 0);
    DL_STORE(&pages[1], 1, RELEASE);
    return 0;
}
THREAD(harvest_three_when_told)
{
    BITMAP_OF_THREE;
    uint64_t out[1];
    uint64_t told = DL_LOAD(&pages[1], ACQUIRE);
    dl_harvest(&bitmap, out);
    return told << 1 | (out[0] & 1);
}

/* The top's load in any order with the summary's mark. */
THREAD(top_loaded_relaxed)
{
    BITMAP;
    WRITE(0);
    dl_mark(&bitmap, 0);
    if (!(dl_load_relaxed(top) & 1))
        dl_fetch_or(top, 1);
    return 0;
}

/* The top's load before the summary is marked. */
THREAD(top_loaded_early)
{
    BITMAP;
    WRITE(0);
    dl_fetch_or(&words[0], 1);
    uint64_t seen = dl_load_seq_cst(top);
    dl_summary_mark_word(&bitmap, 0);
    if (!(seen & 1))
        dl_fetch_or(top, 1);
    return 0;
}

/* Where another marker has set the summary bit, his way to the top is waited for. */
THREAD(mark_three_and_skip)
{
    BITMAP_OF_THREE;
    dl_fetch_or(&words[0], 1);
    if (!(dl_load_seq_cst(&summary[0]) & 1)) {
        dl_fetch_or(&summary[0], 1);
        dl_top_mark_span(&bitmap, 0);
    }
    DL_STORE(&pages[1], 1, RELEASE);
    return 0;
}

static inline uint64_t harvest_leaf(uint64_t *words, uint64_t *summary)
{
    uint64_t taken = 0;
    if (dl_load_relaxed(summary) && dl_exchange(summary, 0)) {
        dl_fence_seq_cst();
        taken = dl_harvest_word(&words[0]);
    }
    return taken;
}

THREAD(harvest_without_top_fence)
{
    uint64_t taken = 0;
    if ((dl_load_relaxed(top) & 1) && (dl_fetch_and(top, ~UINT64_C(1)) & 1))
        taken = harvest_leaf(words, summary);
    dl_harvest_end();
    return REPORT(0, taken);
}

THREAD(harvest_summary_first)
{
    uint64_t taken = harvest_leaf(words, summary);
    dl_fence_seq_cst();
    dl_fetch_and(top, ~UINT64_C(1));
    dl_harvest_end();
    return REPORT(0, taken);
}
