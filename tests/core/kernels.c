/* Every vector path that this CPU can run, against the scalar one, on random words. Prints what differs. */
#include <stdio.h>
#include <string.h>

#include "_bits/simd.h"

#define WORDS 100
#define ROUNDS 2000

static uint64_t seed = UINT64_C(88172645463325252);

static uint64_t draw(void)
{
    seed ^= seed << 13;
    seed ^= seed >> 7;
    seed ^= seed << 17;
    return seed;
}

static uint64_t draw_word(unsigned kind)
{
    switch (kind) {
    case 0: return 0;
    case 1: return draw() % 8 ? 0 : UINT64_C(1) << draw() % 64;
    case 2: return draw() & draw() & draw();
    case 3: return draw();
    default: return ~UINT64_C(0) << draw() % 64;
    }
}

struct answer {
    uint64_t count, left[WORDS], dense[WORDS], numbers[WORDS], masks[WORDS];
    size_t next, sparse, expanded, singles;
    int64_t pages[WORDS * 64], single_pages[WORDS * 64];
};

static void run(const struct dl_kernels *k, const uint64_t *words, size_t from, size_t n, size_t room, int clear,
                struct answer *answer)
{
    memset(answer, 0, sizeof *answer);
    answer->count = k->popcount(words, n);
    answer->next = k->next_nonzero(words, from, n);
    answer->expanded = k->expand(words, n, 0, answer->pages, room);
    memset(answer->pages + answer->expanded, 0, (WORDS * 64 - answer->expanded) * 8); /* a store may reach past the last */
    memcpy(answer->left, words, n * 8);
    answer->sparse = k->take_sparse(answer->left, from, n, answer->numbers, answer->masks, clear);
    answer->singles = k->expand_sparse(answer->numbers, answer->masks, answer->sparse, answer->single_pages, WORDS * 64);
    memset(answer->single_pages + answer->singles, 0, (WORDS * 64 - answer->singles) * 8);
    memset(answer->numbers + answer->sparse, 0, (WORDS - answer->sparse) * 8);
    memset(answer->masks + answer->sparse, 0, (WORDS - answer->sparse) * 8);
    k->take_dense(answer->left, n, answer->dense, clear);
}

/* The header's own harvests, which have no vector code: everything, of memory with one level, two, and three. */
static int header_differs(const uint64_t *words, uint64_t npages, int levels)
{
    int own = levels > 1;
    static uint64_t left[2][WORDS + DL_LINE_WORDS] __attribute__((aligned(64))), out[2][WORDS + 1];
    uint64_t summary[2][1] = {{0}, {0}}, top[2][1] = {{0}, {0}}, pages[2];
    memset(left, 0, sizeof left);
    memset(out, 7, sizeof out);
    for (int quiescent = 0; quiescent < 2; quiescent++) {
        struct dl_bitmap bitmap = {left[quiescent], own ? summary[quiescent] : NULL, npages,
                                   levels > 2 ? top[quiescent] : NULL};
        for (uint64_t word = 0; word < dl_words_for(npages); word++)
            if (words[word])
                dl_mark_mask(&bitmap, word, own && word == npages / 64 ? words[word] & dl_tail_mask(npages) : words[word]);
        pages[quiescent] = (quiescent ? dl_harvest_quiescent : dl_harvest)(&bitmap, out[quiescent]);
    }
    return pages[0] != pages[1] || memcmp(left[0], left[1], sizeof left[0]) || memcmp(out[0], out[1], sizeof out[0]) ||
           summary[0][0] || summary[1][0] || top[0][0] || top[1][0];
}

int main(void)
{
    static uint64_t words[WORDS] __attribute__((aligned(64)));
    static struct answer expected, found;
    const struct dl_kernels *scalar = dl_kernels_find("scalar"), *k;
    for (size_t path = 0; (k = dl_kernels_at(path)); path++)
        for (unsigned round = 0; round < ROUNDS; round++) {
            size_t n = draw() % (WORDS + 1), from = n ? draw() % n : 0, room;
            unsigned kind = draw() % 5;
            for (size_t i = 0; i < n; i++)
                words[i] = draw_word(kind);
            for (int levels = 1; n && levels <= 3; levels++)
                if (header_differs(words, 64 * n - draw() % 64, levels)) {
                    printf("the header's harvests differ in round %u, %zu words of kind %u\n", round, n, kind);
                    return 1;
                }
            room = draw() % 2 ? scalar->popcount(words, n) : WORDS * 64;
            run(scalar, words, from, n, room, DL_CLEAR, &expected);
            for (int clear = DL_CLEAR; clear <= DL_CLEAR_QUIESCENT; clear++) {
                run(k, words, from, n, room, clear, &found);
                if (memcmp(&expected, &found, sizeof found)) {
                    printf("%s%s and scalar differ in round %u, %zu words of kind %u\n", k->name,
                           clear == DL_CLEAR ? "" : ", quiescent,", round, n, kind);
                    return 1;
                }
            }
        }
    return 0;
}
