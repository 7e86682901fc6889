/* One operation on a bitmap of three levels with others in the middle of it, before each of its accesses in turn.
 *
 * Every load, store and read-modify-write of a word comes through here, so that one thread can play two: at the n-th access
 * of the operation outside, those inside are done from beginning to end. What a page holds is newer than its copy (`stale`)
 * from the store before its mark to the harvest that hands it out. Nothing may be stale when all is done and one more
 * harvest has been taken; and where no harvest is outside, a harvest inside has every mark that has returned before it (I4).
 *
 * Prints the first order in which a write is lost.
 */
#include <stdio.h>
#include <string.h>

#include "dirtylog/atomic.h"

static void step(void);

#define dl_load_relaxed(word) (step(), dl_load_relaxed(word))
#define dl_load_acquire(word) (step(), dl_load_acquire(word))
#define dl_load_seq_cst(word) (step(), dl_load_seq_cst(word))
#define dl_store_relaxed(word, value) (step(), dl_store_relaxed(word, value))
#define dl_store_release(word, value) (step(), dl_store_release(word, value))
#define dl_fetch_or(word, bits) (step(), dl_fetch_or(word, bits))
#define dl_fetch_and(word, bits) (step(), dl_fetch_and(word, bits))
#define dl_exchange(word, value) (step(), dl_exchange(word, value))

#include "_bits/simd.c"

#include "_bits/batch.h"
#include "_bits/numbered.h"

#define SPAN_PAGES ((uint64_t)DL_SPAN_WORDS * DL_WORD_PAGES)
/* A span, and two groups of another one, the last line in part. */
#define NPAGES (SPAN_PAGES + 40000)
#define WORDS (DL_SPAN_WORDS + 2 * DL_GROUP_WORDS)

static uint64_t words[WORDS] __attribute__((aligned(64)));
static uint64_t summary[2 * DL_SPAN_GROUPS] __attribute__((aligned(64)));
static uint64_t top[DL_LINE_WORDS] __attribute__((aligned(64)));
static const struct dl_bitmap bitmap = {words, summary, NPAGES, top};
static const struct dl_kernels *k;

/* In one word, in one line, in one group, in one span; in the other span; the last one. */
static const uint64_t pages[] = {70, 71, 140, 700, 200000, SPAN_PAGES + 3, NPAGES - 1};
#define PAGES (sizeof pages / sizeof *pages)

static unsigned stale; /* bit i: pages[i] */
static int lost;       /* a mark that had returned was not in the next harvest */

static long steps, at;
static void (*inside)(void);

static void step(void)
{
    if (inside && steps++ == at) {
        void (*run)(void) = inside;
        inside = NULL;
        run();
    }
}

/* ---- operations */

static void copy(const uint64_t *out)
{
    for (unsigned i = 0; i < PAGES; i++)
        if (out[pages[i] / 64] & dl_bit(pages[i]))
            stale &= ~(1u << i);
}

static void mark(unsigned i)
{
    stale |= 1u << i;
    dl_mark(&bitmap, pages[i]);
}

static void mark_batch(unsigned i)
{
    int64_t batch[] = {(int64_t)pages[i], (int64_t)pages[i]};
    stale |= 1u << i;
    dl_mark_batch(&bitmap, batch, 2);
}

/* With whole words, and over the end of the span at times. */
static void mark_range(unsigned i)
{
    uint64_t first = pages[i] < 100 ? pages[i] : pages[i] - 100, end = pages[i] + 100 < NPAGES ? pages[i] + 100 : NPAGES;
    for (unsigned other = 0; other < PAGES; other++)
        if (pages[other] >= first && pages[other] < end)
            stale |= 1u << other;
    dl_mark_range(&bitmap, first, end - first);
}

static void harvest_by_header(unsigned i)
{
    uint64_t out[WORDS];
    (void)i;
    dl_harvest(&bitmap, out);
    copy(out);
}

static void harvest_words(unsigned i)
{
    uint64_t out[WORDS];
    (void)i;
    dl_harvest_by(k, &bitmap, out, DL_CLEAR);
    copy(out);
}

/* Some page numbers, with room for `room`; returns how many. */
static size_t take_numbers(size_t room)
{
    int64_t out[300];
    uint64_t taken[WORDS] = {0};
    size_t count = dl_harvest_pages(k, &bitmap, out, room);
    for (size_t i = 0; i < count; i++)
        taken[out[i] / 64] |= dl_bit((uint64_t)out[i]);
    copy(taken);
    return count;
}

static void harvest_a_number(unsigned i) { (void)i; take_numbers(1); }
static void harvest_numbers(unsigned i)
{
    const size_t room = i % 2 ? 300 : 2;
    while (take_numbers(room) == room)
        ;
}

/* As take_pages() of _bits/taking.pyx, with room for the groups of one span at a time; `fails`: there is no memory. */
static void take(uint64_t first, uint64_t end, int fails)
{
    uint64_t out[WORDS] = {0}, nlines = 0;
    struct dl_taken taken[4 * DL_SPAN_GROUPS];
    struct dl_basket basket = {k, NULL, NULL, 0, 0, out, 0, DL_CLEAR};
    struct dl_parts parts = dl_parts_of(NPAGES, first, end);
    uint64_t group = dl_first_group(&parts), groups = dl_end_group(&parts);
    size_t n = 0;
    if (parts.head_end == first && parts.tail_first == end) {
        uint64_t looks = groups, found = dl_next_group_within(k, &bitmap, group, groups, &looks);
        if (looks == groups || first || end < NPAGES)
            group = found;
    }
    while (group < groups)
        n += k->take_summary(&bitmap, parts.first_line, parts.end_line, &group, taken + n, DL_SPAN_GROUPS, 1, &nlines);
    if (fails) {
        dl_summary_untake(&bitmap, taken, n);
        return;
    }
    dl_take_range(&basket, &bitmap, &parts, taken, n);
    copy(out);
}

static void harvest(unsigned i) { (void)i; take(0, NPAGES, 0); }
static void harvest_fails(unsigned i) { (void)i; take(0, NPAGES, 1); }
/* The line of a page and no other; from its page to the last one. */
static void harvest_line(unsigned i) { take(pages[i] / 512 * 512, pages[i] / 512 * 512 + 512 < NPAGES ? pages[i] / 512 * 512 + 512 : NPAGES, 0); }
/* The page alone, whatever the levels above say. */
static void harvest_page(unsigned i) { take(pages[i], pages[i] + 1, 0); }
static void harvest_from(unsigned i) { take(pages[i], NPAGES, 0); }

enum kind { MARKS, TAKES_ALL, TAKES_SOME };

static const struct operation {
    const char *name;
    void (*run)(unsigned);
    enum kind kind;
} operations[] = {
    {"mark", mark, MARKS},
    {"batch", mark_batch, MARKS},
    {"range", mark_range, MARKS},
    {"harvest by the header", harvest_by_header, TAKES_ALL},
    {"harvest to words", harvest_words, TAKES_ALL},
    {"harvest", harvest, TAKES_ALL},
    {"harvest to numbers", harvest_numbers, TAKES_ALL},
    {"harvest to one number", harvest_a_number, TAKES_SOME},
    {"harvest that fails", harvest_fails, TAKES_SOME},
    {"harvest of a line", harvest_line, TAKES_SOME},
    {"harvest of a page", harvest_page, TAKES_SOME},
    {"harvest from there on", harvest_from, TAKES_SOME},
};
#define OPERATIONS (sizeof operations / sizeof *operations)

/* ---- how it begins */

static void start_clean(void) {}
/* Another line and another group of the first span are dirty: a harvest of a part must leave them to the next one. */
static void start_dirty(void)
{
    mark(3);
    mark(4);
}
/* All levels above the pages are set still, the pages are not. */
static void start_cleared(void)
{
    for (unsigned i = 0; i < PAGES; i++)
        mark(i);
    memset(words, 0, sizeof words);
    stale = 0;
}
/* The pages are dirty, the summary was taken by a harvest of parts, and the top has been left. */
static void start_in_parts(void)
{
    mark(0);
    take(0, 512, 0);
}

/* More dirty pages in a word than some harvests have room for. */
static void start_many(void)
{
    mark(0);
    mark(1);
    mark(2);
    dl_mark_range(&bitmap, 70, 6);
}

static const struct start {
    const char *name;
    void (*run)(void);
} starts[] = {{"clean", start_clean}, {"dirty", start_dirty}, {"cleared", start_cleared}, {"in parts", start_in_parts},
              {"many in a word", start_many}};
#define STARTS (sizeof starts / sizeof *starts)

/* ---- every order */

static const struct operation *outer, *inner;
static unsigned outer_page, inner_page;

static unsigned returned; /* stale, and by a mark that has returned */

static void run_inside(void)
{
    unsigned before = stale;
    if (inner->kind == MARKS)
        stale = 0;
    inner->run(inner_page);
    if (inner->kind != MARKS)
        return;
    returned |= stale;
    stale |= before;
    if (outer->kind != MARKS)
        return;
    (inner_page % 2 ? harvest : harvest_by_header)(0);
    lost = (stale & returned) != 0;
}

static int check(const struct start *start)
{
    for (at = 0;; at++) {
        memset(words, 0, sizeof words);
        memset(summary, 0, sizeof summary);
        memset(top, 0, sizeof top);
        stale = 0;
        lost = 0;
        start->run();
        returned = stale;
        steps = 0;
        inside = run_inside;
        outer->run(outer_page);
        int over = inside != NULL;
        inside = NULL;
        /* Two that take have everything between them. */
        if (outer->kind == TAKES_ALL && (inner->kind != MARKS || over))
            lost = stale != 0;
        if (at % 2)
            harvest(0);
        else
            harvest_by_header(0);
        if (lost || stale) {
            printf("%s of page %lu, %s: before its access %ld %s of page %lu; %s\n", outer->name,
                   (unsigned long)pages[outer_page], start->name, at, inner->name, (unsigned long)pages[inner_page],
                   stale ? "a write is lost" : "a mark that had returned is not in the next harvest");
            return 1;
        }
        if (over)
            return 0;
    }
}

int main(void)
{
    for (size_t path = 0; (k = dl_kernels_at(path)); path++)
        for (size_t start = 0; start < STARTS; start++)
            for (outer = operations; outer < operations + OPERATIONS; outer++)
                for (inner = operations; inner < operations + OPERATIONS; inner++)
                    for (outer_page = 0; outer_page < PAGES; outer_page++)
                        for (inner_page = 0; inner_page < PAGES; inner_page++)
                            if ((outer_page == 0 || outer_page == 5) && check(&starts[start])) {
                                printf("kernels: %s\n", k->name);
                                return 1;
                            }
    return 0;
}
