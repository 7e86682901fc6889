/* The indices of a virtqueue: 16 bits each, little-endian, in memory that a guest's driver reads and writes meanwhile.
 *
 * What the driver does, and what each of these pairs with:
 *
 *   driver: buffers, descriptors, entry; barrier; available index     dl_ring_index: index; then entry, descriptors
 *   driver: used index; barrier; entry, buffers                       dl_ring_publish: buffers, entry; then index
 *   driver: "notify me"; full barrier; used index                     dl_ring_publish; full fence; "notify me"
 *
 * Without the last one, each may miss the other's store, on x86 too: the driver sleeps, and nobody wakes it.
 */
#ifndef DIRTYLOG_QUEUES_H
#define DIRTYLOG_QUEUES_H

#include <stdint.h>

#include "dirtylog/atomic.h"

static inline uint16_t dl_ring_bytes(uint16_t value)
{
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    return __builtin_bswap16(value);
#else
    return value;
#endif
}

static inline uint16_t dl_ring_index(const uint16_t *index) { return dl_ring_bytes(DL_LOAD(index, ACQUIRE)); }

static inline void dl_ring_publish(uint16_t *index, uint16_t value)
{
    DL_STORE(index, dl_ring_bytes(value), RELEASE);
}

/* After what was published, before what the driver wants to be told is read. */
static inline void dl_ring_fence(void) { dl_fence_seq_cst(); }

#endif /* DIRTYLOG_QUEUES_H */
