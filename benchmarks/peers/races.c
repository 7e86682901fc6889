/* Dirty bitmaps as Linux and QEMU keep them, and a stopwatch: between two ticks of it there is no Python.
 *
 * Compiled with -O2, as both are; never part of the package. Every contestant has the same functions:
 *
 *     mark(bitmap, page), mark_range(bitmap, first, count)    0
 *     mark_pages(bitmap, pages, n)                            0
 *     take(bitmap, out)                                       anything; all words of `out` are written
 *     take_pages(bitmap, out, room)                           how many; there is room for all
 *     count(bitmap)                                           how many
 *     fill(bitmap, words)                                     anything; the bitmap, which is clean, is these words
 */
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <time.h>

struct plain {
    uint64_t *words;
    uint64_t npages;
};

static uint64_t nwords(const struct plain *b) { return (b->npages + 63) / 64; }

static size_t number(uint64_t word, uint64_t i, int64_t *out)
{
    size_t n = 0;
    for (; word; word &= word - 1)
        out[n++] = (int64_t)(i * 64) + __builtin_ctzll(word);
    return n;
}

/* ---- Linux: set_bit() for each page; get_dirty_log_protect() skips clean words and exchanges the others ---- */

int linux_mark(const struct plain *b, uint64_t page)
{
    if (page >= b->npages)
        return -1;
    __atomic_fetch_or(&b->words[page / 64], UINT64_C(1) << page % 64, __ATOMIC_SEQ_CST);
    return 0;
}

int linux_mark_pages(const struct plain *b, const int64_t *pages, size_t n)
{
    for (size_t i = 0; i < n; i++)
        if (linux_mark(b, (uint64_t)pages[i]))
            return -1;
    return 0;
}

int linux_mark_range(const struct plain *b, uint64_t first, uint64_t count)
{
    for (uint64_t page = first; page < first + count; page++)
        if (linux_mark(b, page))
            return -1;
    return 0;
}

uint64_t linux_take(const struct plain *b, uint64_t *out)
{
    memset(out, 0, nwords(b) * 8);
    for (uint64_t i = 0; i < nwords(b); i++)
        if (__atomic_load_n(&b->words[i], __ATOMIC_RELAXED))
            out[i] = __atomic_exchange_n(&b->words[i], 0, __ATOMIC_SEQ_CST);
    return 0;
}

size_t linux_take_pages(const struct plain *b, int64_t *out, size_t room)
{
    size_t n = 0;
    (void)room;
    for (uint64_t i = 0; i < nwords(b); i++)
        if (__atomic_load_n(&b->words[i], __ATOMIC_RELAXED))
            n += number(__atomic_exchange_n(&b->words[i], 0, __ATOMIC_SEQ_CST), i, out + n);
    return n;
}

uint64_t plain_count(const struct plain *b)
{
    uint64_t pages = 0;
    for (uint64_t i = 0; i < nwords(b); i++)
        pages += (uint64_t)__builtin_popcountll(__atomic_load_n(&b->words[i], __ATOMIC_RELAXED));
    return pages;
}

uint64_t plain_fill(const struct plain *b, const uint64_t *words)
{
    memcpy(b->words, words, nwords(b) * 8);
    return 0;
}

/* ---- QEMU: ranges by whole words and one barrier; migration exchanges every word, whatever is in it ---- */

int qemu_mark_range(const struct plain *b, uint64_t first, uint64_t count)
{
    uint64_t end = first + count;
    while (first < end) {
        uint64_t in_word = 64 - first % 64 < end - first ? 64 - first % 64 : end - first;
        if (in_word == 64)
            __atomic_store_n(&b->words[first / 64], UINT64_MAX, __ATOMIC_RELAXED);
        else
            __atomic_fetch_or(&b->words[first / 64], ((UINT64_C(1) << in_word) - 1) << first % 64, __ATOMIC_SEQ_CST);
        first += in_word;
    }
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    return 0;
}

uint64_t qemu_take(const struct plain *b, uint64_t *out)
{
    for (uint64_t i = 0; i < nwords(b); i++)
        out[i] = __atomic_exchange_n(&b->words[i], 0, __ATOMIC_SEQ_CST);
    return 0;
}

size_t qemu_take_pages(const struct plain *b, int64_t *out, size_t room)
{
    size_t n = 0;
    (void)room;
    for (uint64_t i = 0; i < nwords(b); i++)
        n += number(__atomic_exchange_n(&b->words[i], 0, __ATOMIC_SEQ_CST), i, out + n);
    return n;
}

/* ---- the stopwatch: nanoseconds of one call, or of many ---- */

static double now(void)
{
    struct timespec at;
    clock_gettime(CLOCK_MONOTONIC, &at);
    return (double)at.tv_sec * 1e9 + (double)at.tv_nsec;
}

double time_mark(int (*mark)(const void *, uint64_t), const void *bitmap, const int64_t *pages, size_t n)
{
    double start = now();
    for (size_t i = 0; i < n; i++)
        mark(bitmap, (uint64_t)pages[i]);
    return now() - start;
}

double time_mark_pages(int (*mark)(const void *, const void *, size_t), const void *bitmap, const void *pages, size_t n)
{
    double start = now();
    mark(bitmap, pages, n);
    return now() - start;
}

double time_mark_range(int (*mark)(const void *, uint64_t, uint64_t), const void *bitmap, uint64_t first, uint64_t count)
{
    double start = now();
    mark(bitmap, first, count);
    return now() - start;
}

/* The others so many times over, where they change nothing: the mean. */
double time_take(uint64_t (*take)(const void *, uint64_t *), const void *bitmap, uint64_t *out, size_t times)
{
    double start = now();
    for (size_t i = 0; i < times; i++)
        take(bitmap, out);
    return (now() - start) / (double)times;
}

double time_take_pages(size_t (*take)(const void *, void *, size_t), const void *bitmap, void *out, size_t room, size_t times)
{
    double start = now();
    for (size_t i = 0; i < times; i++)
        take(bitmap, out, room);
    return (now() - start) / (double)times;
}

double time_count(uint64_t (*count)(const void *), const void *bitmap, size_t times)
{
    double start = now();
    for (size_t i = 0; i < times; i++)
        count(bitmap);
    return (now() - start) / (double)times;
}
