/* Atomic operations on plain, naturally aligned 64-bit words (I8).
 *
 * Words are plain uint64_t so that the same bitmap can live in memory that a
 * kernel, another process or a C++ program shares: an _Atomic type in an
 * installed header would shut C++ out. The builtins are GCC's and Clang's, in
 * C and in C++ alike.
 *
 * Every function names its memory order; the reason for the order stands where
 * the function is called.
 */
#ifndef DIRTYLOG_ATOMIC_H
#define DIRTYLOG_ATOMIC_H

#include <stdint.h>

/* For any naturally aligned object of up to 8 bytes: pointers, counters and flags too. */
#define DL_LOAD(p, order) __atomic_load_n((p), __ATOMIC_##order)
#define DL_STORE(p, v, order) __atomic_store_n((p), (v), __ATOMIC_##order)
#define DL_RMW(op, p, v, order) __atomic_##op((p), (v), __ATOMIC_##order)
#define DL_EXCHANGE(p, v, order) __atomic_exchange_n((p), (v), __ATOMIC_##order)
#define DL_COMPARE_EXCHANGE(p, expected, desired, order, failure_order)                                                \
    __atomic_compare_exchange_n((p), (expected), (desired), 0, __ATOMIC_##order, __ATOMIC_##failure_order)
#define DL_FENCE(order) __atomic_thread_fence(__ATOMIC_##order)

static inline uint64_t dl_load_relaxed(const uint64_t *word) { return DL_LOAD(word, RELAXED); }
static inline uint64_t dl_load_acquire(const uint64_t *word) { return DL_LOAD(word, ACQUIRE); }
static inline uint64_t dl_load_seq_cst(const uint64_t *word) { return DL_LOAD(word, SEQ_CST); }

static inline void dl_store_relaxed(uint64_t *word, uint64_t value) { DL_STORE(word, value, RELAXED); }
static inline void dl_store_release(uint64_t *word, uint64_t value) { DL_STORE(word, value, RELEASE); }

/* Sequentially consistent among themselves and with the seq_cst loads. That is less than the kernel's
 * xchg() and test_and_clear_bit(), which are full barriers: a plain access after one of these may still be
 * done before it is complete, where it is two instructions (arm64 without LSE: LDAXR, STLXR). */
static inline uint64_t dl_fetch_or(uint64_t *word, uint64_t bits) { return DL_RMW(fetch_or, word, bits, SEQ_CST); }
static inline uint64_t dl_fetch_and(uint64_t *word, uint64_t bits) { return DL_RMW(fetch_and, word, bits, SEQ_CST); }
static inline uint64_t dl_fetch_add(uint64_t *word, uint64_t more) { return DL_RMW(fetch_add, word, more, SEQ_CST); }
static inline uint64_t dl_exchange(uint64_t *word, uint64_t value) { return DL_EXCHANGE(word, value, SEQ_CST); }

static inline void dl_fence_seq_cst(void) { DL_FENCE(SEQ_CST); }

/* After a read-modify-write: no later access, a plain load of a page too, is done before it is complete.
 * Linux's smp_mb__after_atomic(). A locked instruction of x86 is a full barrier by itself. */
static inline void dl_fence_after_rmw(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __atomic_signal_fence(__ATOMIC_SEQ_CST); /* the compiler alone */
#else
    DL_FENCE(SEQ_CST);
#endif
}

#endif /* DIRTYLOG_ATOMIC_H */
