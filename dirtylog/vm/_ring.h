/* A vCPU's dirty ring: the machine pushes, a harvester fetches, a reset makes room.
 *
 * An entry goes free -> dirty (push) -> to be reset (fetch) -> free (reset), as in
 * KVM: the flags are the only thing the two sides share, the indices are each
 * side's own. A push happens under the vCPU's guest lock, fetch and reset under
 * slots_lock.
 */
#ifndef DIRTYLOG_RING_H
#define DIRTYLOG_RING_H

#include <stdlib.h>

#include "dirtylog/atomic.h"
#include "dirtylog/bits.h"

#define DL_RING_FREE UINT64_C(0)
#define DL_RING_DIRTY UINT64_C(1)
#define DL_RING_RESET UINT64_C(2)
#define DL_RING_RESERVED 64u /* entries a vCPU may still push when it is told to stop */

struct dl_vcpu_ring_entry {
    uint64_t flags_and_slot; /* flags in the low half, as in struct kvm_dirty_gfn */
    uint64_t offset;         /* page within the slot */
};

struct dl_vcpu_ring {
    struct dl_vcpu_ring_entry *entries;
    uint64_t size;  /* a power of two, 0: no ring */
    uint64_t dirty; /* pushed so far */
    uint64_t fetch;
    uint64_t reset;
};

/* Neighbours of one slot that a reset protects in one go: KVM's (slot, offset, mask). */
struct dl_ring_mask {
    uint64_t slot;
    uint64_t offset;
    uint64_t mask;
};

static inline int dl_ring_full(const struct dl_vcpu_ring *ring)
{
    /* Acquire: what the reset did is over before its room is used. */
    return ring->size && ring->dirty - dl_load_acquire(&ring->reset) >= ring->size - DL_RING_RESERVED;
}

static inline void dl_ring_push(struct dl_vcpu_ring *ring, uint32_t slot, uint64_t offset)
{
    struct dl_vcpu_ring_entry *entry = &ring->entries[ring->dirty & (ring->size - 1)];
    entry->offset = offset;
    /* Release: pairs with the acquire in dl_ring_fetch(). Who sees the entry sees
     * the page's content, which was stored before (I3). */
    dl_store_release(&entry->flags_and_slot, (uint64_t)slot << 32 | DL_RING_DIRTY);
    ring->dirty++;
}

/* Take every entry pushed so far; returns how many are fetched and not released.
 * A harvest that fails further on leaves them so, and the next finds them (I5). */
static inline size_t dl_ring_fetch(struct dl_vcpu_ring *ring)
{
    while (ring->fetch - ring->reset < ring->size) {
        struct dl_vcpu_ring_entry *entry = &ring->entries[ring->fetch & (ring->size - 1)];
        uint64_t seen = dl_load_acquire(&entry->flags_and_slot);
        if ((seen & UINT32_MAX) != DL_RING_DIRTY)
            break;
        dl_store_release(&entry->flags_and_slot, (seen & ~(uint64_t)UINT32_MAX) | DL_RING_RESET);
        ring->fetch++;
    }
    return ring->fetch - ring->reset;
}

static inline size_t dl_ring_entries(const struct dl_vcpu_ring *ring, uint64_t *slots, uint64_t *offsets)
{
    size_t n = 0;
    for (uint64_t index = ring->reset; index != ring->fetch; index++, n++) {
        const struct dl_vcpu_ring_entry *entry = &ring->entries[index & (ring->size - 1)];
        slots[n] = dl_load_relaxed(&entry->flags_and_slot) >> 32;
        offsets[n] = entry->offset;
    }
    return n;
}

/* Add a page to a mask that has room for it: within 64 pages after its first
 * page, or before it, as far as no bit falls off the top. */
static inline int dl_ring_coalesce(struct dl_ring_mask *mask, uint64_t slot, uint64_t offset)
{
    uint64_t before;
    if (mask->slot != slot)
        return 0;
    if (offset >= mask->offset) {
        if (offset - mask->offset >= DL_WORD_PAGES)
            return 0;
        mask->mask |= dl_bit(offset - mask->offset);
        return 1;
    }
    before = mask->offset - offset;
    if (before + dl_fls(mask->mask) >= DL_WORD_PAGES)
        return 0;
    mask->mask = mask->mask << before | 1;
    mask->offset = offset;
    return 1;
}

/* The masks of every entry that was fetched; returns their number, at most `size`.
 * The caller write-protects their pages and flushes before dl_ring_release(). */
static inline size_t dl_ring_masks(const struct dl_vcpu_ring *ring, struct dl_ring_mask *masks)
{
    size_t n = 0;
    for (uint64_t index = ring->reset; index != ring->fetch; index++) {
        const struct dl_vcpu_ring_entry *entry = &ring->entries[index & (ring->size - 1)];
        uint64_t slot = dl_load_relaxed(&entry->flags_and_slot) >> 32;
        if (n && dl_ring_coalesce(&masks[n - 1], slot, entry->offset))
            continue;
        masks[n].slot = slot;
        masks[n].offset = entry->offset;
        masks[n++].mask = 1;
    }
    return n;
}

/* Make the entries of a slot nobody's: no slot has that id. No vCPU pushes any
 * more for it, or what it pushes is old news. */
static inline void dl_ring_forget(struct dl_vcpu_ring *ring, uint32_t slot)
{
    dl_ring_fetch(ring);
    for (uint64_t index = ring->reset; index != ring->fetch; index++) {
        struct dl_vcpu_ring_entry *entry = &ring->entries[index & (ring->size - 1)];
        if (dl_load_relaxed(&entry->flags_and_slot) >> 32 == slot)
            dl_store_relaxed(&entry->flags_and_slot, (uint64_t)UINT32_MAX << 32 | DL_RING_RESET);
    }
}

static inline void dl_ring_release(struct dl_vcpu_ring *ring)
{
    for (uint64_t index = ring->reset; index != ring->fetch; index++)
        dl_store_relaxed(&ring->entries[index & (ring->size - 1)].flags_and_slot, DL_RING_FREE);
    /* Release: pairs with the acquire in dl_ring_full(). */
    dl_store_release(&ring->reset, ring->fetch);
}

#endif /* DIRTYLOG_RING_H */
