/* Runs each hot path once, as a function of its own, for an instruction counter.
 *
 *     driver PATH   (scalar, avx2; valgrind does not know AVX-512)
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "_bits/batch.h"
#include "_bits/runs.h"
#include "_bits/simd.h"
#include "dirtylog/bitmap.h"

#define NPAGES (UINT64_C(1) << 20)
#define HOT __attribute__((noinline))

static const struct dl_kernels *k;
static struct dl_bitmap bitmap;
static struct dl_taken taken[64];
static uint64_t out[NPAGES / 64], numbers[NPAGES / 64], masks[NPAGES / 64];
static int64_t pages[NPAGES + 64], batch[10000];

HOT void hot_mark(void)
{
    for (uint64_t i = 0; i < 10000; i++)
        dl_mark(&bitmap, i * 7919 % NPAGES);
}

HOT void hot_mark_range(void)
{
    for (uint64_t i = 0; i < 100; i++)
        dl_mark_range(&bitmap, i * 7919, 5000);
}

HOT void hot_batch(void) { (void)dl_mark_batch(&bitmap, batch, 10000); }

static size_t take_summary(void)
{
    uint64_t next = 0, lines = 0;
    return k->take_summary(&bitmap, 0, dl_lines_for(NPAGES), &next, taken, 64, 1, &lines);
}

HOT void hot_harvest_clean(void) { (void)take_summary(); }
HOT size_t hot_harvest_sparse(void)
{
    return k->take_lines_sparse(bitmap.words, taken, take_summary(), numbers, masks, 1);
}
HOT void hot_indices_sparse(size_t entries) { k->expand_sparse(numbers, masks, entries, pages, NPAGES); }
HOT void hot_harvest_dense(void) { k->take_lines_dense(bitmap.words, taken, take_summary(), out, 1); }
HOT void hot_scan_foreign(void) { k->take_dense(out, NPAGES / 64, masks, 1); }
HOT void hot_indices(void) { k->expand(out, NPAGES / 64, 0, pages, NPAGES); }
HOT void hot_runs(void) { dl_runs(k, out, NPAGES / 64, pages, NPAGES / 2); }
HOT void hot_popcount(void) { (void)k->popcount(out, NPAGES / 64); }

int main(int argc, char **argv)
{
    k = argc == 2 ? dl_kernels_find(argv[1]) : NULL;
    bitmap.npages = NPAGES;
    bitmap.words = aligned_alloc(64, NPAGES / 8);
    bitmap.summary = aligned_alloc(64, 4096);
    if (!k || !bitmap.words || !bitmap.summary) {
        fprintf(stderr, "usage: driver scalar|avx2\n");
        return 2;
    }
    memset(bitmap.words, 0, NPAGES / 8);
    memset(bitmap.summary, 0, 4096);
    hot_harvest_clean();
    for (uint64_t i = 0; i < 50; i++)
        dl_mark(&bitmap, i * 20011);
    hot_indices_sparse(hot_harvest_sparse());
    hot_mark();
    for (int64_t i = 0; i < 10000; i++)
        batch[i] = (i * 7919 + 3) % (int64_t)NPAGES; /* none of them marked by hot_mark() */
    hot_batch();
    hot_harvest_dense();
    hot_indices();
    hot_runs();
    hot_popcount();
    hot_scan_foreign();
    hot_mark_range();
    return 0;
}
