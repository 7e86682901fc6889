/* What changed inside pages: runs of bytes that are as they were, and runs of new ones. */
#ifndef DIRTYLOG_DELTAS_H
#define DIRTYLOG_DELTAS_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "_bits/content.h"
#include "_bits/crc32.h"
#include "_bits/stream.h"

/* A delta of one page is pairs of numbers, each 7 bits at a time, low ones first, a set top bit saying that more come:
 * how many bytes are as they were, how many are new; after each pair the new bytes. The pairs add up to the page. */

/* A number below 2^28 takes so many bytes at most. */
#define DL_NUMBER_BYTES 4
/* New bytes go on over so few old ones: another pair would take as much. */
#define DL_BRIDGED 4

static inline size_t dl_put_number(unsigned char *out, size_t value)
{
    size_t n = 0;
    while (value >= 128) {
        out[n++] = (unsigned char)(value | 128);
        value >>= 7;
    }
    out[n++] = (unsigned char)value;
    return n;
}

/* -1 where the number is cut, is too long, or is written longer than it has to be. */
static inline int64_t dl_take_number(const unsigned char *data, size_t nbytes, size_t *at)
{
    int64_t value = 0;
    for (int part = 0; part < DL_NUMBER_BYTES && *at < nbytes; part++) {
        unsigned char each = data[(*at)++];
        value |= (int64_t)(each & 127) << (7 * part);
        if (!(each & 128))
            return part && !each ? -1 : value;
    }
    return -1;
}

/* Of 64 bytes those that are as they were. */
static inline uint64_t dl_same_bytes(const unsigned char *now, const unsigned char *before)
{
    uint64_t same = 0;
#if defined(__SSE2__)
    for (int i = 0; i < 4; i++) {
        __m128i a = _mm_loadu_si128((const __m128i *)(const void *)(now + 16 * i));
        __m128i b = _mm_loadu_si128((const __m128i *)(const void *)(before + 16 * i));
        same |= (uint64_t)(uint32_t)_mm_movemask_epi8(_mm_cmpeq_epi8(a, b)) << 16 * i;
    }
#else
    for (int i = 0; i < 64; i++)
        same |= (uint64_t)(now[i] == before[i]) << i;
#endif
    return same;
}

/* What is compared after a page and its copy. */
struct dl_pair {
    const unsigned char *now, *before;
};

/* How far ahead of a comparison is fetched, over the page's end, where the hardware stops: a core waits for memory, not
 * for this loop. */
#define DL_COMPARED_AHEAD ((size_t)2048)

static inline void dl_fetch_pair(const unsigned char *now, const unsigned char *before, size_t at, size_t nbytes,
                                 const struct dl_pair *next)
{
    int here = at < nbytes;
    __builtin_prefetch((here ? now : next->now - nbytes) + at);
    __builtin_prefetch((here ? before : next->before - nbytes) + at);
}

/* Where `now` differs from `before` next, from `at` on. */
static inline size_t dl_next_change(const unsigned char *now, const unsigned char *before, size_t at, size_t nbytes,
                                    const struct dl_pair *next)
{
    for (; at + 64 <= nbytes; at += 64) {
        uint64_t same = dl_same_bytes(now + at, before + at);
        dl_fetch_pair(now, before, at + DL_COMPARED_AHEAD, nbytes, next);
        if (~same)
            return at + (size_t)__builtin_ctzll(~same);
    }
    while (at < nbytes && now[at] == before[at])
        at++;
    return at;
}

/* Where bytes that are as they were begin, enough of them for a pair of their own. */
static inline size_t dl_end_of_change(const unsigned char *now, const unsigned char *before, size_t at, size_t nbytes)
{
    size_t same = 0;
    /* A run that begins among the last bytes of 64 is looked at again with those behind it. */
    for (; at + 64 <= nbytes; at += 64 - DL_BRIDGED) {
        uint64_t runs = dl_same_bytes(now + at, before + at);
        for (int i = 0; i < DL_BRIDGED; i++)
            runs &= runs >> 1;
        if (runs)
            return at + (size_t)__builtin_ctzll(runs);
    }
    for (; at < nbytes && same <= DL_BRIDGED; at++)
        same = now[at] == before[at] ? same + 1 : 0;
    return at - same;
}

/* Write the delta that makes `now` of `before` to `out`, and make `before` what `now` is: how many bytes it takes, or 0
 * where that is more than `most`; then `before` is something between the two. Nothing is read of `now` twice that the
 * other end learns once: `before` becomes what it will have, whatever somebody writes to `now` meanwhile. */
static inline size_t dl_make_delta(const unsigned char *now, unsigned char *before, size_t nbytes, unsigned char *out,
                                   size_t most, const struct dl_pair *next)
{
    size_t used = 0, from = 0;
    while (from < nbytes) {
        size_t at = dl_next_change(now, before, from, nbytes, next);
        /* What differed at `at` may be as it was by now: it goes all the same, so that every pair moves on. */
        size_t end = at < nbytes ? dl_end_of_change(now, before, at + 1, nbytes) : at;
        if (used + 2 * DL_NUMBER_BYTES + (end - at) > most)
            return 0;
        used += dl_put_number(out + used, at - from);
        used += dl_put_number(out + used, end - at);
        memcpy(out + used, now + at, end - at);
        memcpy(before + at, out + used, end - at);
        used += end - at;
        from = end;
    }
    return used;
}

/* Whether `data` from `*at` on is the delta of a page of `nbytes`; `*at` moves behind it. Every pair moves on, so that
 * this takes as long as what it reads. What it will be laid over is fetched from `page`, not written. */
static inline int dl_check_delta(const unsigned char *data, size_t length, size_t *at, const unsigned char *page,
                                 size_t nbytes)
{
    size_t from = 0;
    while (from < nbytes) {
        int64_t same = dl_take_number(data, length, at);
        int64_t changed = same < 0 ? -1 : dl_take_number(data, length, at);
        if (changed < 0 || same + changed == 0 || (uint64_t)(same + changed) > nbytes - from)
            return 0;
        if ((uint64_t)changed > length - *at)
            return 0;
        if (changed) {
            __builtin_prefetch(page + from + same, 1);
            __builtin_prefetch(page + from + same + changed - 1, 1);
        }
        *at += (size_t)changed;
        from += (size_t)(same + changed);
    }
    return 1;
}

/* Lay a delta that was checked over a page. */
static inline void dl_lay_delta(const unsigned char *data, size_t length, size_t *at, unsigned char *page,
                                size_t nbytes)
{
    size_t from = 0;
    while (from < nbytes) {
        size_t same = (size_t)dl_take_number(data, length, at);
        size_t changed = (size_t)dl_take_number(data, length, at);
        memcpy(page + from + same, data + *at, changed);
        *at += changed;
        from += same + changed;
    }
}

/* What becomes of a page. */
#define DL_PAGE_ZERO 0
#define DL_PAGE_WHOLE 1
#define DL_PAGE_DELTA 2

/* The last copies that were sent, of as many pages as there are places: page g at place g % places. */
struct dl_copies {
    unsigned char *data;
    int64_t *pages;  /* which page each place holds, or -1 */
    int64_t *frames; /* in which frame it went last */
    int64_t places;
    size_t page_size;
    size_t most;   /* bytes that a delta may take */
    int64_t older; /* a place that holds what went before this frame may be taken; none with -1 */
};

/* Where pages that go whole are copied to, one behind the other; what their checksum is, and what is looked at next. */
struct dl_whole {
    unsigned char *at;
    struct dl_crc32_copied sum;
    const unsigned char *next;
};

/* Say of a page whether it is zero, goes as a delta, which is written to `delta`, or whole: then it is copied to
 * `whole`. A page that goes whole takes its place where that is empty or may be taken. `now` may be written meanwhile:
 * what is sent is read once, and what the other end learns is what is kept. `used` is how long the delta is. */
static inline int dl_sort_page(const unsigned char *now, size_t length, int64_t number, struct dl_copies *copies,
                               unsigned char *delta, size_t *used, struct dl_whole *whole)
{
    int64_t place = copies->places ? number % copies->places : -1;
    unsigned char *before = place < 0 ? NULL : copies->data + (size_t)place * copies->page_size;
    int held = before && copies->pages[place] == number;
    if (dl_is_zero(now, length)) {
        if (held)
            copies->pages[place] = -1;
        return DL_PAGE_ZERO;
    }
    if (held && length == copies->page_size) {
        /* The copy of the next page, most likely. */
        struct dl_pair next = {whole->next, place + 1 < copies->places ? before + length : copies->data};
        *used = dl_make_delta(now, before, length, delta, copies->most, &next);
        if (*used)
            return DL_PAGE_DELTA;
    }
    dl_crc32_copy(&whole->sum, whole->at, now, length, whole->next);
    if (held || (before && (copies->pages[place] < 0 ? copies->older >= 0 : copies->frames[place] < copies->older))) {
        dl_stream_copy((char *)before, (const char *)whole->at, length);
        copies->pages[place] = number;
    }
    return DL_PAGE_WHOLE;
}

/* Note in which frame a page goes. */
static inline void dl_page_goes(struct dl_copies *copies, int64_t number, int64_t frame)
{
    if (copies->places && copies->pages[number % copies->places] == number)
        copies->frames[number % copies->places] = frame;
}

#endif /* DIRTYLOG_DELTAS_H */
