/* CRC-32 as zlib has it, sixteen bytes at a time where the CPU multiplies without carries. */
#ifndef DIRTYLOG_CRC32_H
#define DIRTYLOG_CRC32_H

#include <stddef.h>
#include <stdint.h>

#include "_bits/cpuid.h"

/* What is folded is of this many bytes at least, and a multiple of sixteen. */
#define DL_CRC32_LEAST ((size_t)64)

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
#else
static inline uint32_t dl_crc32_blocks(const unsigned char *data, size_t nbytes, uint32_t state)
{
    (void)data;
    (void)nbytes;
    return state;
}

static inline int dl_crc32_can_fold(void)
{
    return 0;
}
#endif

#endif /* DIRTYLOG_CRC32_H */
