/* A harvest to page numbers, on every vector path: whatever room there is, each call hands out the lowest dirty pages, writes
 * nothing past its room, and leaves the others dirty, where the levels above lead to them. Prints what is wrong. */
#include <stdio.h>
#include <string.h>

#include "_bits/numbered.h"

#define SPAN_PAGES ((uint64_t)DL_SPAN_WORDS * DL_WORD_PAGES)
/* A span, and two groups of another one, the last line in part. */
#define NPAGES (SPAN_PAGES + 40003)
#define WORDS (DL_SPAN_WORDS + 2 * DL_GROUP_WORDS)

static uint64_t words[WORDS] __attribute__((aligned(64))), before[WORDS];
static uint64_t summary[2 * DL_SPAN_GROUPS] __attribute__((aligned(64)));
static uint64_t top[DL_LINE_WORDS] __attribute__((aligned(64)));
static int64_t out[NPAGES + 64 + 1];

static uint64_t seed;

static uint64_t draw(void)
{
    seed ^= seed << 13;
    seed ^= seed >> 7;
    seed ^= seed << 17;
    return seed;
}

static const char *const kinds[] = {"nothing", "few pages", "a page in each line", "random pages", "many pages", "some groups", "all"};
#define KINDS (sizeof kinds / sizeof *kinds)

static void fill(const struct dl_bitmap *b, unsigned kind)
{
    seed = UINT64_C(88172645463325252);
    memset(words, 0, sizeof words);
    memset(summary, 0, sizeof summary);
    memset(top, 0, sizeof top);
    for (unsigned i = 0; kind == 1 && i < 70; i++)
        dl_mark(b, draw() % NPAGES);
    for (uint64_t page = 300; kind == 2 && page < NPAGES; page += DL_LINE_PAGES)
        dl_mark(b, page);
    for (unsigned i = 0; kind == 3 && i < 5000; i++)
        dl_mark(b, draw() % NPAGES);
    for (unsigned i = 0; kind == 4 && i < 200000; i++)
        dl_mark(b, draw() % NPAGES);
    for (uint64_t group = 1; kind == 5 && group < 8; group += 2) /* the first half, all of it, ... */
        dl_mark_range(b, group * DL_GROUP_LINES * DL_LINE_PAGES, (group + 1) * 4000);
    if (kind == 6)
        dl_mark_range(b, 0, NPAGES);
    if (!b->summary) /* I7: not ours, and left alone */
        words[NPAGES / 64] |= ~dl_tail_mask(NPAGES);
}

/* The lowest pages of `before`, at most `room`, are in `out`; the others are in the words, and found from above. */
static const char *wrong(const struct dl_bitmap *b, size_t room, size_t count)
{
    size_t seen = 0, left = 0;
    for (uint64_t word = 0; word < WORDS; word++) {
        uint64_t ours = word < NPAGES / 64 ? DL_ALL_PAGES : word == NPAGES / 64 ? dl_tail_mask(NPAGES) : 0;
        uint64_t taken = before[word] & ~words[word];
        if (words[word] & ~before[word] || taken & ~ours)
            return "a bit that was not ours to change";
        for (uint64_t pages = taken; pages; pages &= pages - 1) {
            if (left)
                return "a page before it was left";
            if (seen == count || out[seen++] != (int64_t)(word * 64 + dl_ffs(pages)))
                return "a page was taken and not handed out";
        }
        left += (words[word] & ours) != 0;
        if (taken && words[word] & ours && dl_ffs(words[word] & ours) < dl_fls(taken))
            return "a page of its word was left";
        if (b->summary && words[word] && !(summary[word / DL_GROUP_WORDS] & dl_bit(word / DL_LINE_WORDS)))
            return "the summary does not lead to what is left";
    }
    for (uint64_t group = 0; b->top && group < dl_groups_for(NPAGES); group++)
        if (summary[group] && !(top[0] & dl_bit(group / DL_SPAN_GROUPS)))
            return "the top does not lead to what is left";
    if (seen != count || count > room || (count < room && left))
        return "not as many as there are";
    return out[room] == -7 ? NULL : "a number past the room";
}

static int check(const struct dl_kernels *k, const struct dl_bitmap *b, unsigned kind, size_t room, uint64_t pages)
{
    size_t count, calls = 0;
    do {
        memcpy(before, words, sizeof words);
        for (size_t i = 0; i <= room; i++)
            out[i] = -7;
        count = dl_harvest_pages(k, b, out, room);
        const char *what = wrong(b, room, count);
        if (what) {
            printf("%s, %d levels, %s, room for %zu, call %zu of %zu pages: %s\n", k->name, 1 + !!b->summary + !!b->top,
                   kinds[kind], room, calls, count, what);
            return 1;
        }
        pages -= count;
        /* With little room what a few calls take, from the beginning and near the end, is enough. */
        if (++calls == 40 && pages > 40 * room) {
            pages -= dl_harvest_pages(k, b, out, pages - 20 * room - 1);
        }
    } while (count == room);
    if (pages || dl_count_pages(k, b)) {
        printf("%s, %s, room for %zu: %ld pages missing\n", k->name, kinds[kind], room, (long)pages);
        return 1;
    }
    return 0;
}

int main(void)
{
    const struct dl_bitmap bitmaps[] = {{words, NULL, NPAGES, NULL}, {words, summary, NPAGES, NULL}, {words, summary, NPAGES, top}};
    const struct dl_kernels *k;
    for (size_t path = 0; (k = dl_kernels_at(path)); path++)
        for (size_t levels = 0; levels < 3; levels++)
            for (unsigned kind = 0; kind < KINDS; kind++) {
                fill(&bitmaps[levels], kind);
                uint64_t pages = dl_count_pages(k, &bitmaps[levels]);
                const size_t rooms[] = {1, 2, 63, 64, 65, 127, 511, 512, 513, 4096, 32767, 32768, 40000, 140000, pages, pages + 1,
                                        pages ? pages - 1 : 1, NPAGES};
                for (size_t i = 0; i < sizeof rooms / sizeof *rooms; i++) {
                    fill(&bitmaps[levels], kind);
                    if (rooms[i] && check(k, &bitmaps[levels], kind, rooms[i], pages))
                        return 1;
                }
                fill(&bitmaps[levels], kind);
                if (dl_harvest_pages(k, &bitmaps[levels], out, 0) || dl_count_pages(k, &bitmaps[levels]) != pages) {
                    printf("%s, %s: no room, and pages were taken\n", k->name, kinds[kind]);
                    return 1;
                }
            }
    return 0;
}
