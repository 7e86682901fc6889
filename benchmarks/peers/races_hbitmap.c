/* A dirty bitmap as the block layer of QEMU keeps one (hbitmap), made from its idea: a bit of each level says whether a word of
 * the level below has any, up to a level of one word; the number of dirty pages is kept. One thread, plain loads and stores.
 *
 * It is given its strongest form: a harvest takes and resets a word of pages at a time.
 */
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define LEVELS 6 /* 2^36 pages */

struct tree {
    uint64_t *level[LEVELS]; /* [0]: the pages */
    uint64_t words[LEVELS];
    int levels;
    uint64_t npages, dirty;
};

struct tree *hbitmap_new(uint64_t npages)
{
    struct tree *b = calloc(1, sizeof *b);
    b->npages = npages;
    for (uint64_t bits = npages; b->levels == 0 || bits > 1; b->levels++) {
        bits = (bits + 63) / 64;
        b->words[b->levels] = bits;
        b->level[b->levels] = calloc(bits, 8);
    }
    return b;
}

int hbitmap_mark(struct tree *b, uint64_t page)
{
    if (page >= b->npages)
        return -1;
    b->dirty += !(b->level[0][page / 64] >> page % 64 & 1);
    for (int i = 0; i < b->levels; i++, page /= 64) {
        uint64_t *word = &b->level[i][page / 64], was = *word;
        *word = was | UINT64_C(1) << page % 64;
        if (was) /* so the level above has its bit */
            break;
    }
    return 0;
}

int hbitmap_mark_pages(struct tree *b, const int64_t *pages, size_t n)
{
    for (size_t i = 0; i < n; i++)
        if (hbitmap_mark(b, (uint64_t)pages[i]))
            return -1;
    return 0;
}

int hbitmap_mark_range(struct tree *b, uint64_t first, uint64_t count)
{
    uint64_t last = first + count - 1;
    for (int i = 0, changed = 1; i < b->levels && changed; i++, first /= 64, last /= 64) {
        changed = 0;
        for (uint64_t word = first / 64; word <= last / 64; word++) {
            uint64_t mask = UINT64_MAX, was = b->level[i][word];
            if (word == first / 64)
                mask &= UINT64_MAX << first % 64;
            if (word == last / 64)
                mask &= UINT64_MAX >> (63 - last % 64);
            changed |= !was;
            if (i == 0)
                b->dirty += (uint64_t)__builtin_popcountll(mask & ~was);
            b->level[i][word] = was | mask;
        }
    }
    return 0;
}

/* Where an iteration is: at each level the word it is in, and the bits of it that are still to come. */
struct walk {
    const struct tree *b;
    uint64_t word[LEVELS], bits[LEVELS];
};

static struct walk begin(const struct tree *b)
{
    struct walk walk = {b, {0}, {0}};
    walk.bits[b->levels - 1] = b->level[b->levels - 1][0];
    return walk;
}

/* The next word of pages that has some; -1 if there is none. */
static int64_t next(struct walk *walk)
{
    int level = 1, levels = walk->b->levels;
    while (level < levels && !walk->bits[level])
        level++;
    if (level >= levels)
        return -1;
    for (;; level--) {
        uint64_t below = walk->word[level] * 64 + (uint64_t)__builtin_ctzll(walk->bits[level]);
        walk->bits[level] &= walk->bits[level] - 1;
        if (level == 1)
            return (int64_t)below;
        walk->word[level - 1] = below;
        walk->bits[level - 1] = walk->b->level[level - 1][below];
    }
}

static uint64_t reset(struct tree *b, uint64_t word)
{
    uint64_t was = b->level[0][word];
    b->level[0][word] = 0;
    b->dirty -= (uint64_t)__builtin_popcountll(was);
    for (int i = 1; i < b->levels; i++, word /= 64)
        if (b->level[i][word / 64] &= ~(UINT64_C(1) << word % 64))
            break;
    return was;
}

uint64_t hbitmap_take(struct tree *b, uint64_t *out)
{
    struct walk walk = begin(b);
    memset(out, 0, b->words[0] * 8);
    for (int64_t word = next(&walk); word >= 0; word = next(&walk))
        out[word] = reset(b, (uint64_t)word);
    return 0;
}

size_t hbitmap_take_pages(struct tree *b, int64_t *out, size_t room)
{
    struct walk walk = begin(b);
    size_t n = 0;
    (void)room;
    for (int64_t word = next(&walk); word >= 0; word = next(&walk))
        for (uint64_t pages = reset(b, (uint64_t)word); pages; pages &= pages - 1)
            out[n++] = word * 64 + __builtin_ctzll(pages);
    return n;
}

uint64_t hbitmap_count(const struct tree *b) { return b->dirty; }

uint64_t hbitmap_fill(struct tree *b, const uint64_t *words)
{
    memcpy(b->level[0], words, b->words[0] * 8);
    b->dirty = 0;
    for (uint64_t i = 0; i < b->words[0]; i++)
        b->dirty += (uint64_t)__builtin_popcountll(words[i]);
    for (int level = 1; level < b->levels; level++) {
        memset(b->level[level], 0, b->words[level] * 8);
        for (uint64_t i = 0; i < b->words[level - 1]; i++)
            b->level[level][i / 64] |= (uint64_t)(b->level[level - 1][i] != 0) << i % 64;
    }
    return 0;
}
