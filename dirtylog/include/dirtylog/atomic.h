/* Atomic operations on plain, naturally aligned 64-bit words (I8).
 *
 * Words are plain uint64_t so that the same bitmap can live in memory that a
 * kernel, another process or a C++ program shares: an _Atomic type in an
 * installed header would shut C++ out. C uses <stdatomic.h> through a cast,
 * which the ABI of every supported compiler allows for lock-free 64-bit words;
 * C++ uses the builtins that those macros expand to.
 *
 * Every function names its memory order; the reason for the order stands where
 * the function is called.
 */
#ifndef DIRTYLOG_ATOMIC_H
#define DIRTYLOG_ATOMIC_H

#include <stdint.h>

#ifdef __cplusplus

#define DL_LOAD(p, order) __atomic_load_n((p), __ATOMIC_##order)
#define DL_STORE(p, v, order) __atomic_store_n((p), (v), __ATOMIC_##order)
#define DL_RMW(op, p, v, order) __atomic_##op((p), (v), __ATOMIC_##order)
#define DL_EXCHANGE(p, v, order) __atomic_exchange_n((p), (v), __ATOMIC_##order)
#define DL_FENCE(order) __atomic_thread_fence(__ATOMIC_##order)

#else

#include <stdatomic.h>

#define DL_ORDER_RELAXED memory_order_relaxed
#define DL_ORDER_ACQUIRE memory_order_acquire
#define DL_ORDER_RELEASE memory_order_release
#define DL_ORDER_SEQ_CST memory_order_seq_cst
#define DL_WORD(p) ((_Atomic uint64_t *)(p))
#define DL_CONST_WORD(p) ((const _Atomic uint64_t *)(p))
#define DL_LOAD(p, order) atomic_load_explicit(DL_CONST_WORD(p), DL_ORDER_##order)
#define DL_STORE(p, v, order) atomic_store_explicit(DL_WORD(p), (v), DL_ORDER_##order)
#define DL_RMW(op, p, v, order) atomic_##op##_explicit(DL_WORD(p), (v), DL_ORDER_##order)
#define DL_EXCHANGE(p, v, order) atomic_exchange_explicit(DL_WORD(p), (v), DL_ORDER_##order)
#define DL_FENCE(order) atomic_thread_fence(DL_ORDER_##order)

#endif

static inline uint64_t dl_load_relaxed(const uint64_t *word) { return DL_LOAD(word, RELAXED); }
static inline uint64_t dl_load_acquire(const uint64_t *word) { return DL_LOAD(word, ACQUIRE); }
static inline uint64_t dl_load_seq_cst(const uint64_t *word) { return DL_LOAD(word, SEQ_CST); }

static inline void dl_store_relaxed(uint64_t *word, uint64_t value) { DL_STORE(word, value, RELAXED); }
static inline void dl_store_release(uint64_t *word, uint64_t value) { DL_STORE(word, value, RELEASE); }

/* Read-modify-write operations are full barriers, as the kernel's xchg(),
 * set_bit() in a fully ordered form, and test_and_clear_bit() are. */
static inline uint64_t dl_fetch_or(uint64_t *word, uint64_t bits) { return DL_RMW(fetch_or, word, bits, SEQ_CST); }
static inline uint64_t dl_fetch_and(uint64_t *word, uint64_t bits) { return DL_RMW(fetch_and, word, bits, SEQ_CST); }
static inline uint64_t dl_exchange(uint64_t *word, uint64_t value) { return DL_EXCHANGE(word, value, SEQ_CST); }

static inline void dl_fence_seq_cst(void) { DL_FENCE(SEQ_CST); }

#endif /* DIRTYLOG_ATOMIC_H */
