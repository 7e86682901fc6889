/* Copying scattered pages at the speed of one large memcpy: the next one is fetched while one is copied. */
#ifndef DIRTYLOG_SINKS_STREAM_H
#define DIRTYLOG_SINKS_STREAM_H

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

/* How far ahead of what is copied the source is fetched: one page. */
#define DL_STREAM_AHEAD ((size_t)4096)

/* Stores go past the caches. The source is fetched a page ahead, in the order
 * in which it will be copied: the hardware prefetcher stops at a page's end,
 * and does not know where the next extent begins. `next` has `next_bytes`; it
 * is only fetched, never used. */
static inline void dl_stream_copy(char *target, const char *source, size_t nbytes, const char *next, size_t next_bytes)
{
#if defined(__SSE2__)
    if (((uintptr_t)target & 15) == 0 && nbytes % DL_STREAM_LINE == 0) {
        for (size_t at = 0; at < nbytes; at += DL_STREAM_LINE) {
            size_t ahead = at + DL_STREAM_AHEAD;
            if (ahead < nbytes)
                _mm_prefetch(source + ahead, _MM_HINT_T0);
            else if (ahead - nbytes < next_bytes)
                _mm_prefetch(next + (ahead - nbytes), _MM_HINT_T0);
            for (size_t part = at; part < at + DL_STREAM_LINE; part += 16)
                _mm_stream_si128((__m128i *)(void *)(target + part),
                                 _mm_loadu_si128((const __m128i *)(const void *)(source + part)));
        }
        return;
    }
#endif
    memcpy(target, source, nbytes);
}

/* While a page is copied to the caches, the first lines of the next one are
 * fetched: from there on the hardware prefetcher goes on by itself. */
#define DL_AHEAD ((size_t)512)
static inline void dl_fetch(const char *next, size_t next_bytes)
{
#if defined(__GNUC__)
    for (size_t at = 0; at < next_bytes && at < DL_AHEAD; at += DL_STREAM_LINE)
        __builtin_prefetch(next + at);
#else
    (void)next;
    (void)next_bytes;
#endif
}

/* Streaming stores are in no order with later plain ones: nobody may hear that
 * the copy is done before it is. */
static inline void dl_stream_end(void)
{
#if defined(__SSE2__)
    _mm_sfence();
#endif
}

#endif /* DIRTYLOG_SINKS_STREAM_H */
