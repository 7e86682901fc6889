/* CRoaring's C API in the form of races.c: a compressed set of 32-bit numbers, for one thread. The functions come from a library
 * that was opened at run time, the one inside pyroaring or the system's, so that no header of it is needed.
 */
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef struct set set;

struct bits { /* bitset_t */
    uint64_t *array;
    size_t arraysize, capacity;
};

static struct {
    set *(*create)(void);
    void (*add)(set *, uint32_t);
    void (*add_many)(set *, size_t, const uint32_t *);
    void (*add_range_closed)(set *, uint32_t, uint32_t);
    void (*clear)(set *);
    uint64_t (*get_cardinality)(const set *);
    void (*to_uint32_array)(const set *, uint32_t *);
    bool (*overwrite)(set *, const set *);
    bool (*to_bitset)(const set *, struct bits *); /* NULL before version 1 */
} croaring;

struct roaring {
    set *pages, *ready; /* `ready`: what fill() makes of it */
    const uint64_t *ready_words;
    uint64_t npages;
};

void roaring_open(const void *functions) { memcpy(&croaring, functions, sizeof croaring); }

struct roaring *roaring_new(uint64_t npages)
{
    struct roaring *b = calloc(1, sizeof *b);
    *b = (struct roaring){croaring.create(), croaring.create(), NULL, npages};
    return b;
}

int roaring_mark(struct roaring *b, uint64_t page)
{
    if (page >= b->npages)
        return -1;
    croaring.add(b->pages, (uint32_t)page);
    return 0;
}

/* Numbers of its own type. */
int roaring_mark_pages(struct roaring *b, const uint32_t *pages, size_t n)
{
    croaring.add_many(b->pages, n, pages);
    return 0;
}

int roaring_mark_range(struct roaring *b, uint64_t first, uint64_t count)
{
    croaring.add_range_closed(b->pages, (uint32_t)first, (uint32_t)(first + count - 1));
    return 0;
}

uint64_t roaring_take(struct roaring *b, uint64_t *out)
{
    struct bits bits = {out, b->npages / 64, b->npages / 64};
    memset(out, 0, b->npages / 8);
    croaring.to_bitset(b->pages, &bits);
    croaring.clear(b->pages);
    return 0;
}

/* Numbers of its own type. */
size_t roaring_take_pages(struct roaring *b, uint32_t *out, size_t room)
{
    size_t n = croaring.get_cardinality(b->pages);
    (void)room;
    croaring.to_uint32_array(b->pages, out);
    croaring.clear(b->pages);
    return n;
}

uint64_t roaring_count(const struct roaring *b) { return croaring.get_cardinality(b->pages); }

/* A copy of a set of these pages, which has been made of their numbers the first time. */
uint64_t roaring_fill(struct roaring *b, const uint64_t *words)
{
    if (words != b->ready_words) {
        uint32_t numbers[64];
        b->ready_words = words;
        croaring.clear(b->ready);
        for (uint64_t i = 0; i < b->npages / 64; i++) {
            size_t n = 0;
            for (uint64_t word = words[i]; word; word &= word - 1)
                numbers[n++] = (uint32_t)(i * 64) + (uint32_t)__builtin_ctzll(word);
            if (n)
                croaring.add_many(b->ready, n, numbers);
        }
    }
    croaring.overwrite(b->pages, b->ready);
    return 0;
}
