/* The bitmap header under real threads, for ThreadSanitizer: marks, ranges and batches against harvests.
 *
 * Owned pages: a page's content is a plain variable. Its owner writes it only while nobody else
 * may look, and marks; the harvester reads it only when it took the bit, and hands the page back.
 * Nothing but the bitmap orders the write before the read, so if a mark did not release or a
 * harvest did not acquire, ThreadSanitizer would report a race on the content.
 *
 * Shared pages: every thread writes every page, contents are relaxed atomics, and marks overlap.
 * Here the oracle is the value: after the last harvest the replica equals memory, or a write was lost.
 *
 * Arguments: rounds a thread, and with KERNELS the path whose kernels harvest, as DirtyBitmap does, in place of the
 * header's dl_harvest, to words and to page numbers in turn; they count meanwhile as well. Prints the counts; exit status 1
 * if a write was lost.
 *
 * TWO_LEVELS leaves out the top, which otherwise has one bit.
 *
 * BROKEN_MARK and BROKEN_HARVEST replace one operation by a plain one: the test of this test.
 */
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "_bits/numbered.h"
#include "dirtylog/bitmap.h"

#define MARKERS 3
#define LINES 130u /* three summary words, the last not full */
#define PAGES (LINES * DL_LINE_PAGES - 37u)
#define WORDS ((PAGES + 63u) / 64u)

static uint64_t words[LINES * DL_LINE_WORDS] __attribute__((aligned(64)));
static uint64_t summary[DL_LINE_WORDS] __attribute__((aligned(64)));
#ifdef TWO_LEVELS
#define top NULL
#else
static uint64_t top[DL_LINE_WORDS] __attribute__((aligned(64)));
#endif
static const struct dl_bitmap bitmap = {words, summary, PAGES, top};

static uint64_t content[PAGES]; /* owned: plain; shared: relaxed */
static uint64_t replica[PAGES];
static uint64_t free_pages[PAGES]; /* owned: 1 when the owner may write */
static pthread_barrier_t start;
static uint64_t running;
static uint64_t rounds;
static int shared;

static uint64_t next_random(uint64_t *state)
{
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return *state;
}

static void mark(uint64_t page)
{
#ifdef BROKEN_MARK
    words[page / 64] |= dl_bit(page);
    dl_summary_mark_word(&bitmap, page / 64);
#else
    dl_mark(&bitmap, page);
#endif
}

/* The owner of a word of pages is a matter of its number: ranges of whole words then stay with one owner. */
static uint64_t own_word(uint64_t me, uint64_t random)
{
    uint64_t word = random % (WORDS / MARKERS) * MARKERS + me;
    return word < WORDS - 1 ? word : me;
}

static int may_write(uint64_t first, uint64_t count)
{
    for (uint64_t page = first; page < first + count; page++)
        if (!dl_load_acquire(&free_pages[page]))
            return 0;
    return 1;
}

static void write_owned(uint64_t first, uint64_t count)
{
    for (uint64_t page = first; page < first + count; page++) {
        dl_store_relaxed(&free_pages[page], 0);
        content[page]++;
    }
}

static void write_shared(uint64_t first, uint64_t count)
{
    for (uint64_t page = first; page < first + count; page++)
        DL_RMW(fetch_add, &content[page], 1, RELAXED);
}

struct marker {
    uint64_t me, written;
};

static void *mark_pages(void *argument)
{
    struct marker *marker = argument;
    uint64_t state = marker->me * UINT64_C(0x9e3779b97f4a7c15) + 1;
    pthread_barrier_wait(&start);
    for (uint64_t round = 0; round < rounds; round++) {
        uint64_t random = next_random(&state);
        uint64_t kind = random >> 60;
        uint64_t word = shared ? random % (WORDS - 3) : own_word(marker->me, random);
        uint64_t first = word * 64, count = 64;
        if (kind < 8) { /* one page */
            first += random >> 8 & 63;
            count = 1;
        } else if (shared && kind < 12) { /* a range with partial words at both ends, over several lines at times */
            first += random >> 8 & 63;
            count = 1 + (random >> 16 & 1023);
            if (first + count > PAGES)
                count = PAGES - first;
        }
        if (shared)
            write_shared(first, count);
        else if (may_write(first, count))
            write_owned(first, count);
        else {
            sched_yield(); /* until the harvester has handed the page back */
            round--;
            continue;
        }
        if (count == 1) {
            mark(first);
        } else if (kind < 14) {
            dl_mark_range(&bitmap, first, count);
        } else {
            dl_batch_begin();
            dl_batch_mark(&bitmap, word, DL_ALL_PAGES);
        }
        marker->written += count;
    }
    __atomic_fetch_sub(&running, 1, __ATOMIC_SEQ_CST);
    return NULL;
}

static void copy_word(uint64_t word, uint64_t mask)
{
    while (mask) {
        uint64_t page = word * 64 + dl_ffs(mask);
        mask &= mask - 1;
        if (shared) {
            replica[page] = dl_load_relaxed(&content[page]);
        } else {
            replica[page] = content[page];
            dl_store_release(&free_pages[page], 1);
        }
    }
}

#ifdef KERNELS
static const struct dl_kernels *kernels;

/* The steps of DirtyBitmap.harvest: top and fence, summary, fence, leaves. */
static uint64_t harvest_by_kernels(uint64_t *out)
{
    struct dl_taken taken[2 * DL_LINE_WORDS];
    uint64_t next = 0, lines = 0;
    size_t groups = kernels->take_summary(&bitmap, 0, LINES, &next, taken, 2 * DL_LINE_WORDS, 1, &lines);
    dl_fence_seq_cst();
    memset(out, 0, sizeof(words));
    kernels->take_lines_dense(words, taken, groups, out, 1);
    return kernels->popcount(out, WORDS);
}

/* To page numbers, with room for some of them at a time: from one to more than there are. */
static uint64_t harvest_numbers(void)
{
    static int64_t out[PAGES + 1];
    static size_t room = 1;
    uint64_t pages = 0;
    size_t count;
    room = room % (PAGES + 1) * 3 % (PAGES + 1) + 1;
    do {
        count = dl_harvest_pages(kernels, &bitmap, out, room);
        pages += count;
        for (size_t i = 0; i < count; i++)
            copy_word((uint64_t)out[i] / 64, dl_bit((uint64_t)out[i]));
    } while (count == room);
    return pages;
}
#endif

static uint64_t harvest(void)
{
    static uint64_t out[LINES * DL_LINE_WORDS];
#ifdef BROKEN_HARVEST
    uint64_t pages = 0;
    for (uint64_t word = 0; word < WORDS; word++) {
        out[word] = words[word];
        words[word] = 0;
        pages += (uint64_t)__builtin_popcountll(out[word]);
    }
#elif defined(KERNELS)
    uint64_t pages = harvest_by_kernels(out);
#else
    uint64_t pages = dl_harvest(&bitmap, out);
#endif
    for (uint64_t word = 0; word < WORDS; word++)
        copy_word(word, out[word]);
    return pages;
}

/* A sub-range that ends inside words and lines: by masks, the summary left as it is. */
static uint64_t harvest_part(uint64_t first, uint64_t last)
{
    uint64_t pages = 0;
    for (uint64_t word = first / 64; word <= last / 64; word++) {
        uint64_t mask = dl_harvest_mask(&words[word], dl_part_first(word * 64 > first ? word * 64 : first, last + 1).mask);
        pages += (uint64_t)__builtin_popcountll(mask);
        copy_word(word, mask);
    }
    return pages;
}

int main(int argc, char **argv)
{
    uint64_t lost = 0;
    rounds = argc > 1 ? strtoull(argv[1], NULL, 10) : 20000;
#ifdef KERNELS
    kernels = dl_kernels_find(argc > 2 ? argv[2] : NULL);
    if (!kernels)
        return 3;
#endif
    for (shared = 0; shared < 2; shared++) {
        struct marker markers[MARKERS] = {{0, 0}};
        pthread_t threads[MARKERS];
        uint64_t harvests = 0, parts = 0, reported = 0, written = 0, state = 7;
        for (uint64_t page = 0; page < PAGES; page++) {
            content[page] = replica[page] = 0;
            free_pages[page] = 1;
        }
        running = MARKERS;
        pthread_barrier_init(&start, NULL, MARKERS + 1);
        for (uint64_t i = 0; i < MARKERS; i++) {
            markers[i].me = i;
            if (pthread_create(&threads[i], NULL, mark_pages, &markers[i]))
                return 2;
        }
        pthread_barrier_wait(&start);
        while (dl_load_seq_cst(&running)) {
            uint64_t first = next_random(&state) % PAGES;
            reported += harvest();
            harvests++;
#ifdef KERNELS
            reported += harvest_numbers();
            harvests++;
#endif
            reported += harvest_part(first, first + 700 < PAGES ? first + 700 : PAGES - 1);
            parts++;
#ifdef KERNELS
            if (dl_count_pages(kernels, &bitmap) > PAGES)
                return 2;
#endif
        }
        for (uint64_t i = 0; i < MARKERS; i++) {
            pthread_join(threads[i], NULL);
            written += markers[i].written;
        }
        pthread_barrier_destroy(&start);
        reported += harvest();
        for (uint64_t page = 0; page < PAGES; page++)
            lost += replica[page] != content[page];
        for (uint64_t word = 0; word < WORDS; word++)
            lost += words[word] != 0;
        printf("%s pages: %llu written, %llu reported by %llu harvests and %llu of a part, %llu lost\n",
               shared ? "shared" : "owned", (unsigned long long)written, (unsigned long long)reported,
               (unsigned long long)harvests, (unsigned long long)parts, (unsigned long long)lost);
        if (!written || !reported)
            return 2;
    }
    return lost ? 1 : 0;
}
