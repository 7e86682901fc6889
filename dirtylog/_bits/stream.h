/* Copying scattered pages at the speed of one large memcpy: several at once, and past the caches where they are many. */
#ifndef DIRTYLOG_STREAM_H
#define DIRTYLOG_STREAM_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

/* From here on a copy would displace everything else from a core's own caches,
 * and fetch every line of the target only to overwrite it. */
#define DL_STREAM_BYTES ((int64_t)4 << 20)
#define DL_STREAM_LINE ((size_t)64)

/* Pages that are copied at once, and bytes of each in its turn. At the beginning of a page a core waits for memory, because
 * its prefetchers follow a stream within a page and know nothing of the next one: with four streams, there is another one
 * to go on with. One page after the other reaches 0.6 to 0.9 of a large memcpy, four at once 0.8 to 1.2. */
#define DL_AT_ONCE 4
#define DL_PIECE ((size_t)4096)

/* Pages on their way. Nothing has to be where it belongs before dl_copier_end(). */
struct dl_copier {
    int streaming; /* past the caches */
    int held;
    char *to[DL_AT_ONCE];
    const char *from[DL_AT_ONCE];
    size_t nbytes[DL_AT_ONCE];
};

/* Bytes before the first line of a target that is stored to as a whole: a store past the caches is slow where it fills a
 * line in part, and others come between. */
static inline size_t dl_before_line(const char *target, int streaming)
{
    return streaming ? -(uintptr_t)target % DL_STREAM_LINE : 0;
}

/* A loop that the compiler leaves as it is. Unrolled, with a load instruction for each page and part of a line, the copy of
 * four pages is a fifth slower (Granite Rapids, gcc 12). */
#if defined(__clang__)
#define DL_ROLLED _Pragma("clang loop unroll(disable)")
#elif defined(__GNUC__)
#define DL_ROLLED _Pragma("GCC unroll 1")
#else
#define DL_ROLLED
#endif

/* One cache line; for `streaming`, `target` is aligned to 16 bytes. */
static inline void dl_copy_line(char *target, const char *source, int streaming)
{
#if defined(__SSE2__)
    DL_ROLLED
    for (size_t at = 0; at < DL_STREAM_LINE; at += 16) {
        __m128i part = _mm_loadu_si128((const __m128i *)(const void *)(source + at));

        if (streaming)
            _mm_stream_si128((__m128i *)(void *)(target + at), part);
        else
            _mm_storeu_si128((__m128i *)(void *)(target + at), part);
    }
#else
    (void)streaming;
    memcpy(target, source, DL_STREAM_LINE);
#endif
}

/* Where pages are looked at one after the other: fetch the first lines of the next one, from where the hardware prefetcher
 * goes on by itself. */
#define DL_AHEAD ((size_t)512)
static inline void dl_fetch(const char *next, size_t next_bytes)
{
    for (size_t at = 0; at < next_bytes && at < DL_AHEAD; at += DL_STREAM_LINE)
        __builtin_prefetch(next + at);
}

/* Where scattered pages are copied four at once: the first lines of a page that comes two groups later, if it is far from the
 * one before it. Such a page costs a walk of the page tables, of the host's too in a guest, and then its first lines wait for
 * memory; both pass while eight others are copied. Pages that are near are on their way already: to fetch them too makes a
 * copy slower. */
#define DL_PAGES_AHEAD (2 * DL_AT_ONCE)
#define DL_FAR ((int64_t)32 << 10)
static inline void dl_fetch_far(const char *page, int64_t from_the_one_before)
{
    if (from_the_one_before >= DL_FAR)
        for (size_t at = 0; at < 4 * DL_STREAM_LINE; at += DL_STREAM_LINE)
            __builtin_prefetch(page + at);
}

/* Stores go past the caches, where the target is aligned. */
static inline void dl_stream_copy(char *target, const char *source, size_t nbytes)
{
#if defined(__SSE2__)
    if (((uintptr_t)target & 15) == 0 && nbytes % DL_STREAM_LINE == 0) {
        for (size_t at = 0; at < nbytes; at += DL_STREAM_LINE)
            dl_copy_line(target + at, source + at, 1);
        return;
    }
#endif
    memcpy(target, source, nbytes);
}

/* The four that are held: in turns as long as each has a line left, then what is left of each. */
static inline void dl_copy_held(struct dl_copier *c, int streaming)
{
    size_t before[DL_AT_ONCE], together = DL_PIECE;

    for (int i = 0; i < DL_AT_ONCE; i++) {
        before[i] = dl_before_line(c->to[i], streaming);
        if (c->nbytes[i] - before[i] < together)
            together = (c->nbytes[i] - before[i]) & ~(DL_STREAM_LINE - 1);
    }
    for (size_t at = 0; at < together; at += DL_STREAM_LINE)
        DL_ROLLED
        for (int i = 0; i < DL_AT_ONCE; i++)
            dl_copy_line(c->to[i] + before[i] + at, c->from[i] + before[i] + at, streaming);
    for (int i = 0; i < DL_AT_ONCE; i++) {
        size_t done = before[i] + together;

        /* One that is longer than another still has whole lines: nobody has fetched those of its target. */
        for (; streaming && c->nbytes[i] - done >= DL_STREAM_LINE; done += DL_STREAM_LINE)
            dl_copy_line(c->to[i] + done, c->from[i] + done, streaming);
        memcpy(c->to[i], c->from[i], before[i]);
        memcpy(c->to[i] + done, c->from[i] + done, c->nbytes[i] - done);
    }
    c->held = 0;
}

/* Copy `nbytes`, now or later: neither side may change its place, or overlap with another copy, before the end. */
static inline void dl_copier_copy(struct dl_copier *c, char *target, const char *source, size_t nbytes)
{
    while (nbytes >= DL_PIECE / 2) {
        size_t piece = dl_before_line(target, c->streaming) + DL_PIECE;

        if (piece > nbytes)
            piece = nbytes;
        if (c->streaming) {
            /* What is not a whole line goes through the caches, and would have all later stores wait for it. A whole line
             * must not be fetched: a store past the caches would first have to drive it out of them. */
            if ((uintptr_t)target % DL_STREAM_LINE)
                __builtin_prefetch(target, 1);
            if ((uintptr_t)(target + piece) % DL_STREAM_LINE)
                __builtin_prefetch(target + piece - 1, 1);
        }
        c->to[c->held] = target;
        c->from[c->held] = source;
        c->nbytes[c->held] = piece;
        target += piece, source += piece, nbytes -= piece;
        if (++c->held < DL_AT_ONCE)
            continue;
        /* Twice, so that the loop does not ask what kind of store it is. */
        if (c->streaming)
            dl_copy_held(c, 1);
        else
            dl_copy_held(c, 0);
    }
    memcpy(target, source, nbytes);
}

/* Streaming stores are in no order with later plain ones: nobody may hear that
 * the copy is done before it is. */
static inline void dl_stream_end(void)
{
#if defined(__SSE2__)
    _mm_sfence();
#endif
}

/* Copy what is still held: everything is where it belongs, for whoever hears of it. */
static inline void dl_copier_end(struct dl_copier *c)
{
    while (c->held) {
        c->held--;
        memcpy(c->to[c->held], c->from[c->held], c->nbytes[c->held]);
    }
    if (c->streaming)
        dl_stream_end();
}

#endif /* DIRTYLOG_STREAM_H */
