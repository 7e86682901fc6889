/* CRC-32 as zlib has it, 32 bytes at a time where the CPU multiplies without carries. */
#ifndef DIRTYLOG_CRC32_H
#define DIRTYLOG_CRC32_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "_bits/cpuid.h"

/* What is folded is of this many bytes at least, and a multiple of sixteen. */
#define DL_CRC32_LEAST ((size_t)64)
#define DL_CRC32_REVERSED 0xEDB88320U

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define DL_CRC32_FOLDS 1
#include <immintrin.h>

#define DL_FOLDING __attribute__((target("pclmul,sse4.1")))

/* x^n modulo the polynomial, bits reversed, for the distances that a block of 128 bits is moved by. */
#define DL_CRC32_BY_512 0x01c6e41596LL, 0x0154442bd4LL
#define DL_CRC32_BY_128 0x00ccaa009eLL, 0x01751997d0LL
#define DL_CRC32_BY_64 0x0163cd6124LL
/* The polynomial itself, and the quotient of x^64 by it. */
#define DL_CRC32_POLYNOMIAL 0x01f7011641LL, 0x01db710641LL

static inline DL_FOLDING __m128i dl_load_block(const unsigned char *data)
{
    return _mm_loadu_si128((const __m128i *)(const void *)data);
}

/* `block` moved on by the distance of `by`, over `next`. */
static inline DL_FOLDING __m128i dl_fold(__m128i block, __m128i by, __m128i next)
{
    __m128i low = _mm_clmulepi64_si128(block, by, 0x00);
    __m128i high = _mm_clmulepi64_si128(block, by, 0x11);
    return _mm_xor_si128(_mm_xor_si128(low, high), next);
}

/* The state after `nbytes`, which are at least DL_CRC32_LEAST and a multiple of 16; the state is the CRC, inverted.
 *
 * Gopal et al., "Fast CRC Computation for Generic Polynomials Using PCLMULQDQ Instruction", Intel, 2009. */
static DL_FOLDING uint32_t dl_crc32_blocks(const unsigned char *data, size_t nbytes, uint32_t state)
{
    const __m128i by_512 = _mm_set_epi64x(DL_CRC32_BY_512);
    const __m128i by_128 = _mm_set_epi64x(DL_CRC32_BY_128);
    const __m128i polynomial = _mm_set_epi64x(DL_CRC32_POLYNOMIAL);
    const __m128i low_32 = _mm_set_epi32(0, -1, 0, -1);
    const unsigned char *end = data + nbytes;
    __m128i lane[4];
    for (int i = 0; i < 4; i++)
        lane[i] = dl_load_block(data + 16 * i);
    lane[0] = _mm_xor_si128(lane[0], _mm_cvtsi32_si128((int)state));
    /* Four lanes, so that one multiplication need not wait for the other. */
    for (data += 64; (size_t)(end - data) >= 64; data += 64)
        for (int i = 0; i < 4; i++)
            lane[i] = dl_fold(lane[i], by_512, dl_load_block(data + 16 * i));
    __m128i all = lane[0];
    for (int i = 1; i < 4; i++)
        all = dl_fold(all, by_128, lane[i]);
    for (; data < end; data += 16)
        all = dl_fold(all, by_128, dl_load_block(data));
    /* From 128 bits to 64, and by Barrett's reduction to 32. */
    all = _mm_xor_si128(_mm_srli_si128(all, 8), _mm_clmulepi64_si128(all, by_128, 0x10));
    all = _mm_xor_si128(_mm_srli_si128(all, 4),
                        _mm_clmulepi64_si128(_mm_and_si128(all, low_32), _mm_cvtsi64_si128(DL_CRC32_BY_64), 0x00));
    __m128i times = _mm_clmulepi64_si128(_mm_and_si128(all, low_32), polynomial, 0x10);
    times = _mm_clmulepi64_si128(_mm_and_si128(times, low_32), polynomial, 0x00);
    return (uint32_t)_mm_extract_epi32(_mm_xor_si128(all, times), 1);
}

static inline int dl_crc32_can_fold(void)
{
    static const struct dl_feature pclmul = {"pclmulqdq", 1, 2, 1}, sse41 = {"sse4_1", 1, 2, 19};
    return dl_has_feature(&pclmul) && dl_has_feature(&sse41);
}

/* Eight lanes of 256 bits, where the CPU has them. */
#define DL_CRC32_LANES 8
#define DL_CRC32_WIDE ((size_t)256)
#define DL_CRC32_BY_2048 0x01322d1430LL, 0x011542778aLL
#define DL_FOLDING_WIDE __attribute__((target("vpclmulqdq,avx2,pclmul,sse4.1")))
/* How far ahead of a copy is fetched: what arrives while memory answers. */
#define DL_CRC32_AHEAD ((size_t)512)
/* The compiler may not read it from memory again. */
#define DL_READ_ONCE(value) __asm__ volatile("" : "+x"(value))

static inline DL_FOLDING_WIDE __m256i dl_load_pair(const unsigned char *data)
{
    return _mm256_loadu_si256((const __m256i *)(const void *)data);
}

static inline DL_FOLDING_WIDE void dl_store_pair(unsigned char *target, __m256i part, int past)
{
    if (past)
        _mm256_stream_si256((__m256i *)(void *)target, part);
    else
        _mm256_storeu_si256((__m256i *)(void *)target, part);
}

/* The state after `nbytes`, which are a multiple of DL_CRC32_WIDE, and not 0. */
static DL_FOLDING_WIDE uint32_t dl_crc32_wide(const unsigned char *data, size_t nbytes, uint32_t state)
{
    const __m256i by = _mm256_broadcastsi128_si256(_mm_set_epi64x(DL_CRC32_BY_2048));
    unsigned char left[DL_CRC32_WIDE];
    __m256i lane[DL_CRC32_LANES];
    for (int i = 0; i < DL_CRC32_LANES; i++)
        lane[i] = dl_load_pair(data + 32 * i);
    lane[0] = _mm256_xor_si256(lane[0], _mm256_zextsi128_si256(_mm_cvtsi32_si128((int)state)));
    for (size_t at = DL_CRC32_WIDE; at < nbytes; at += DL_CRC32_WIDE)
        for (int i = 0; i < DL_CRC32_LANES; i++) {
            __m256i low = _mm256_clmulepi64_epi128(lane[i], by, 0x00);
            __m256i high = _mm256_clmulepi64_epi128(lane[i], by, 0x11);
            lane[i] = _mm256_xor_si256(_mm256_xor_si256(low, high), dl_load_pair(data + at + 32 * i));
        }
    for (int i = 0; i < DL_CRC32_LANES; i++)
        _mm256_storeu_si256((__m256i *)(void *)(left + 32 * i), lane[i]);
    /* What is left in the lanes has the CRC of everything before it. */
    return dl_crc32_blocks(left, sizeof left, 0);
}

/* The same of bytes that are copied meanwhile, and read once: whatever somebody writes to `source`, the lanes have what
 * `target` has. `opened` says that `lanes` hold what came before; otherwise `state` is of that. While the last bytes are
 * copied those at `next` are fetched: the hardware stops at a page's end. With `past`, which is known when this is
 * compiled, stores go past the caches, `target` is aligned to a line, and nothing is fetched: `source` is in a cache. */
static inline __attribute__((always_inline)) DL_FOLDING_WIDE void
dl_crc32_copy_lanes(unsigned char *target, const unsigned char *source, size_t nbytes, const unsigned char *next,
                    unsigned char *lanes, int opened, uint32_t state, int past)
{
    const __m256i by = _mm256_broadcastsi128_si256(_mm_set_epi64x(DL_CRC32_BY_2048));
    __m256i lane[DL_CRC32_LANES];
    size_t at = 0;
    for (int i = 0; i < DL_CRC32_LANES; i++)
        lane[i] = dl_load_pair(opened ? lanes + 32 * i : source + 32 * i);
    if (!opened) {
        for (int i = 0; i < DL_CRC32_LANES; i++) {
            DL_READ_ONCE(lane[i]);
            dl_store_pair(target + 32 * i, lane[i], past);
        }
        lane[0] = _mm256_xor_si256(lane[0], _mm256_zextsi128_si256(_mm_cvtsi32_si128((int)state)));
        at = DL_CRC32_WIDE;
    }
    for (; at < nbytes; at += DL_CRC32_WIDE) {
        if (!past) {
            size_t ahead = at + DL_CRC32_AHEAD;
            const unsigned char *fetched = ahead < nbytes ? source + ahead : next + (ahead - nbytes);
            for (size_t line = 0; line < DL_CRC32_WIDE; line += 64)
                __builtin_prefetch(fetched + line);
        }
        for (int i = 0; i < DL_CRC32_LANES; i++) {
            __m256i low = _mm256_clmulepi64_epi128(lane[i], by, 0x00);
            __m256i high = _mm256_clmulepi64_epi128(lane[i], by, 0x11);
            __m256i part = dl_load_pair(source + at + 32 * i);
            DL_READ_ONCE(part);
            dl_store_pair(target + at + 32 * i, part, past);
            lane[i] = _mm256_xor_si256(_mm256_xor_si256(low, high), part);
        }
    }
    for (int i = 0; i < DL_CRC32_LANES; i++)
        _mm256_storeu_si256((__m256i *)(void *)(lanes + 32 * i), lane[i]);
}

static DL_FOLDING_WIDE void dl_crc32_copy_wide(unsigned char *target, const unsigned char *source, size_t nbytes,
                                               const unsigned char *next, unsigned char *lanes, int opened,
                                               uint32_t state)
{
    dl_crc32_copy_lanes(target, source, nbytes, next, lanes, opened, state, 0);
}

static DL_FOLDING_WIDE void dl_crc32_lay_wide(unsigned char *target, const unsigned char *source, size_t nbytes,
                                              unsigned char *lanes, int opened, uint32_t state)
{
    dl_crc32_copy_lanes(target, source, nbytes, source, lanes, opened, state, 1);
}

static inline int dl_crc32_can_fold_wide(void)
{
    static const struct dl_feature avx2 = {"avx2", 7, 1, 5}, vpclmul = {"vpclmulqdq", 7, 2, 10};
    /* The 256-bit registers: SSE's state and AVX's. */
    return dl_crc32_can_fold() && dl_has_feature(&avx2) && dl_has_feature(&vpclmul) && dl_system_keeps(6);
}
#else
#define DL_CRC32_WIDE ((size_t)256)
static inline uint32_t dl_crc32_blocks(const unsigned char *data, size_t nbytes, uint32_t state)
{
    (void)data;
    (void)nbytes;
    return state;
}

static inline uint32_t dl_crc32_wide(const unsigned char *data, size_t nbytes, uint32_t state)
{
    return dl_crc32_blocks(data, nbytes, state);
}

static inline void dl_crc32_copy_wide(unsigned char *target, const unsigned char *source, size_t nbytes,
                                      const unsigned char *next, unsigned char *lanes, int opened, uint32_t state)
{
    (void)next;
    (void)lanes;
    (void)opened;
    (void)state;
    memcpy(target, source, nbytes);
}

static inline void dl_crc32_lay_wide(unsigned char *target, const unsigned char *source, size_t nbytes,
                                     unsigned char *lanes, int opened, uint32_t state)
{
    dl_crc32_copy_wide(target, source, nbytes, source, lanes, opened, state);
}

static inline int dl_crc32_can_fold(void)
{
    return 0;
}

static inline int dl_crc32_can_fold_wide(void)
{
    return 0;
}
#endif

/* What a byte does to the state, and what it does with so many zeros behind it. */
#define DL_CRC32_SLICES 8
static uint32_t dl_crc32_table[DL_CRC32_SLICES][256];

/* x^(2^n) modulo the polynomial, bits reversed. */
#define DL_CRC32_X ((uint32_t)1 << 30)
static uint32_t dl_crc32_powers[32];

/* The product of two polynomials modulo the one of CRC-32, bits reversed. */
static inline uint32_t dl_crc32_times(uint32_t a, uint32_t b)
{
    uint32_t product = 0;
    for (uint32_t bit = (uint32_t)1 << 31; bit; bit >>= 1) {
        if (a & bit)
            product ^= b;
        b = b >> 1 ^ (b & 1 ? DL_CRC32_REVERSED : 0);
    }
    return product;
}

/* What the CPU can, asked once: where it is virtual, asking takes longer than what is to be computed. */
static int dl_crc32_folds, dl_crc32_folds_wide;

/* Once, before anything else of this file is called. */
static inline void dl_crc32_prepare(void)
{
    dl_crc32_folds = dl_crc32_can_fold();
    dl_crc32_folds_wide = dl_crc32_can_fold_wide();
    for (uint32_t byte = 0; byte < 256; byte++) {
        uint32_t state = byte;
        for (int bit = 0; bit < 8; bit++)
            state = state >> 1 ^ (state & 1 ? DL_CRC32_REVERSED : 0);
        dl_crc32_table[0][byte] = state;
    }
    for (int slice = 1; slice < DL_CRC32_SLICES; slice++)
        for (int byte = 0; byte < 256; byte++) {
            uint32_t before = dl_crc32_table[slice - 1][byte];
            dl_crc32_table[slice][byte] = before >> 8 ^ dl_crc32_table[0][before & 255];
        }
    dl_crc32_powers[0] = DL_CRC32_X;
    for (int n = 1; n < 32; n++)
        dl_crc32_powers[n] = dl_crc32_times(dl_crc32_powers[n - 1], dl_crc32_powers[n - 1]);
}

static inline uint32_t dl_crc32_bytes(const unsigned char *data, size_t nbytes, uint32_t state)
{
    for (; nbytes >= DL_CRC32_SLICES; data += DL_CRC32_SLICES, nbytes -= DL_CRC32_SLICES) {
        state ^= (uint32_t)data[0] | (uint32_t)data[1] << 8 | (uint32_t)data[2] << 16 | (uint32_t)data[3] << 24;
        state = dl_crc32_table[7][state & 255] ^ dl_crc32_table[6][state >> 8 & 255] ^
                dl_crc32_table[5][state >> 16 & 255] ^ dl_crc32_table[4][state >> 24] ^ dl_crc32_table[3][data[4]] ^
                dl_crc32_table[2][data[5]] ^ dl_crc32_table[1][data[6]] ^ dl_crc32_table[0][data[7]];
    }
    while (nbytes--)
        state = state >> 8 ^ dl_crc32_table[0][(state ^ *data++) & 255];
    return state;
}

/* The CRC of bytes that come after those whose CRC is `value`. */
static inline uint32_t dl_crc32(const unsigned char *data, size_t nbytes, uint32_t value)
{
    uint32_t state = ~value;
    size_t done = 0;
    if (nbytes >= 2 * DL_CRC32_WIDE && dl_crc32_folds_wide) {
        done = nbytes - nbytes % DL_CRC32_WIDE;
        state = dl_crc32_wide(data, done, state);
    }
    if (nbytes - done >= DL_CRC32_LEAST && dl_crc32_folds) {
        size_t blocks = (nbytes - done) & ~(size_t)15;
        state = dl_crc32_blocks(data + done, blocks, state);
        done += blocks;
    }
    return ~dl_crc32_bytes(data + done, nbytes - done, state);
}

/* The CRC of bytes and `nbytes` more, fewer than 2^28, from the CRCs of both. */
static inline uint32_t dl_crc32_join(uint32_t first, uint32_t then, size_t nbytes)
{
    for (int n = 3; nbytes; nbytes >>= 1, n++)
        if (nbytes & 1)
            first = dl_crc32_times(dl_crc32_powers[n], first);
    return first ^ then;
}

/* The CRC of what is copied part by part. */
struct dl_crc32_copied {
    uint32_t state; /* the CRC of what came before the lanes, inverted */
    int opened;     /* whether the lanes hold something */
    unsigned char lanes[DL_CRC32_WIDE];
};

static inline void dl_crc32_begin(struct dl_crc32_copied *c)
{
    c->state = ~(uint32_t)0;
    c->opened = 0;
}

/* The CRC of all that was copied since the beginning. */
static inline uint32_t dl_crc32_end(struct dl_crc32_copied *c)
{
    if (c->opened)
        c->state = dl_crc32_blocks(c->lanes, sizeof c->lanes, 0);
    c->opened = 0;
    return ~c->state;
}

/* Copy bytes that somebody may write to meanwhile; `next` is what may be copied after them. */
static inline void dl_crc32_copy(struct dl_crc32_copied *c, unsigned char *target, const unsigned char *source,
                                 size_t nbytes, const unsigned char *next)
{
    if (nbytes && nbytes % DL_CRC32_WIDE == 0 && dl_crc32_folds_wide) {
        dl_crc32_copy_wide(target, source, nbytes, next, c->lanes, c->opened, c->state);
        c->opened = 1;
        return;
    }
    memcpy(target, source, nbytes);
    c->state = ~dl_crc32(target, nbytes, dl_crc32_end(c));
}

/* Go on with bytes that are not copied here. */
static inline void dl_crc32_add(struct dl_crc32_copied *c, const unsigned char *data, size_t nbytes)
{
    if (nbytes)
        c->state = ~dl_crc32(data, nbytes, dl_crc32_end(c));
}

/* So many bytes are worth closing the lanes at both ends, where a target begins or ends within a line. */
#define DL_CRC32_RUN ((size_t)1 << 14)
#define DL_CRC32_LINE ((size_t)64)

/* Whether so many bytes are better summed while they are laid there. */
static inline int dl_crc32_lays(const unsigned char *target, size_t nbytes)
{
    if (!dl_crc32_folds_wide || nbytes < DL_CRC32_WIDE)
        return 0;
    return nbytes >= DL_CRC32_RUN || (nbytes % DL_CRC32_WIDE == 0 && (uintptr_t)target % DL_CRC32_LINE == 0);
}

/* Copy bytes out of a cache and past the caches; they are where they belong after dl_stream_end(). */
static inline void dl_crc32_lay(struct dl_crc32_copied *c, unsigned char *target, const unsigned char *source,
                                size_t nbytes)
{
    size_t before = -(uintptr_t)target % DL_CRC32_LINE;
    size_t lines = (nbytes - before) & ~(DL_CRC32_WIDE - 1), end = before + lines;
    dl_crc32_add(c, source, before);
    memcpy(target, source, before);
    dl_crc32_lay_wide(target + before, source + before, lines, c->lanes, c->opened, c->state);
    c->opened = 1;
    dl_crc32_add(c, source + end, nbytes - end);
    memcpy(target + end, source + end, nbytes - end);
}

#endif /* DIRTYLOG_CRC32_H */
