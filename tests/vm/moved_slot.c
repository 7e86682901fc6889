/* A slot moves while a vCPU's page-modification buffer, which names a page of it, fills up: the page's mark moves along.
 *
 * In C, because the moment is between two steps of one call: another vCPU that stays in guest mode holds the call there.
 */
#include <stdio.h>

#include "vm/_mmu.h"

enum { MOVING = 64, OTHER = 4096, PAGE = 5, SHIFT = 6 };

static struct dl_mmu mmu;
static struct dl_lock slots_lock, mmu_lock, dirty_log_lock;
static unsigned char memory[MOVING << SHIFT], other[OTHER << SHIFT];

static struct dl_memslot *add(uint32_t id, uint64_t gfn, uint64_t npages, unsigned char *host)
{
    struct dl_memslot *slot = dl_slot_new(&mmu, id, gfn, npages, host);
    if (!slot || dl_log_alloc(slot))
        return NULL;
    slot->logging = 1;
    return dl_mmu_add(&mmu, slot) ? NULL : slot;
}

static int touch(uint64_t first, uint64_t count)
{
    struct dl_store store = {.kind = DL_ADD_BYTE};
    int error = 0;
    for (uint64_t gfn = first; gfn < first + count && !error; gfn++) {
        size_t done;
        error = dl_vcpu_store(&mmu, &mmu.vcpus[0], &gfn, 1, &store, &done);
    }
    return error;
}

static int harvest(struct dl_memslot *slot)
{
    int error = dl_sync(&mmu, slot, 0);
    if (!error)
        error = dl_mmu_harvest(&mmu, slot, 1);
    dl_flush(&mmu);
    dl_snapshot_drop(&slot->log, 0);
    return error;
}

static void *move(void *slot) { return (void *)(intptr_t)dl_mmu_move(&mmu, slot, 1 << 20); }

int main(void)
{
    struct dl_memslot *moving, *full;
    pthread_t mover;
    void *error;
    int found;
    if (dl_lock_init(&slots_lock) || dl_lock_init(&mmu_lock) || dl_lock_init(&dirty_log_lock))
        return 2;
    mmu.slots_lock = &slots_lock, mmu.mmu_lock = &mmu_lock, mmu.dirty_log_lock = &dirty_log_lock;
    mmu.page_shift = SHIFT, mmu.dirtying = DL_BY_FAULT, mmu.pml = 1, mmu.hooks = dl_hooks_dirty_bits;
    if (dl_mmu_init(&mmu, 2) || !(moving = add(0, 0, MOVING, memory)) || !(full = add(1, 1 << 12, OTHER, other)))
        return 2;
    /* Mapped and harvested: from here on a write is noted in the buffer. */
    if (touch(0, MOVING) || touch(1 << 12, OTHER) || harvest(moving) || harvest(full) || touch(PAGE, 1))
        return 3;
    if (mmu.vcpus[0].pml_count != 1)
        return 4;
    pthread_mutex_lock(&mmu.vcpus[1].guest);
    if (pthread_create(&mover, NULL, move, moving))
        return 2;
    while (dl_slot_of_gfn(&mmu, PAGE))
        sched_yield();
    if (touch(1 << 12, 2 * DL_PML_ENTRIES))
        return 5;
    pthread_mutex_unlock(&mmu.vcpus[1].guest);
    pthread_join(mover, &error);
    if (error)
        return 6;
    moving = dl_slot_of_id(&mmu, 0);
    found = moving->log.marked.words[0] == dl_bit(PAGE);
    if (!found)
        printf("page %d was written, and the log holds %#llx\n", PAGE, (unsigned long long)moving->log.marked.words[0]);
    dl_mmu_destroy(&mmu);
    return !found;
}
