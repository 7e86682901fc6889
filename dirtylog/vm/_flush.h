/* Guest mode, and the flushes that wait for its end. */
#ifndef DIRTYLOG_FLUSH_H
#define DIRTYLOG_FLUSH_H

#include "vm/_machine.h"

static inline void dl_vcpu_requests(struct dl_vcpu *vcpu)
{
    if (!dl_load_relaxed(&vcpu->requests))
        return;
    if (dl_exchange(&vcpu->requests, 0) & DL_REQUEST_TLB_FLUSH) {
        for (unsigned i = 0; i < DL_TLB_ENTRIES; i++)
            vcpu->tlb[i].tag = 0;
        vcpu->flushes++;
    }
}

static inline void dl_guest_enter(struct dl_vcpu *vcpu)
{
    /* A mutex is not fair: without this a vCPU that stores in a loop could keep
     * a flush waiting. Only politeness rests on it. */
    while (dl_load_relaxed(&vcpu->kickers))
        sched_yield();
    pthread_mutex_lock(&vcpu->guest);
    dl_vcpu_requests(vcpu);
}

static inline void dl_guest_leave(struct dl_vcpu *vcpu) { pthread_mutex_unlock(&vcpu->guest); }

/* Bring a vCPU out of guest mode and keep it out until dl_guest_leave(). */
static inline void dl_guest_kick(struct dl_vcpu *vcpu)
{
    DL_RMW(fetch_add, &vcpu->kickers, 1, RELAXED);
    pthread_mutex_lock(&vcpu->guest);
    DL_RMW(fetch_sub, &vcpu->kickers, 1, RELAXED);
}

static inline void dl_kick_all(struct dl_mmu *mmu)
{
    for (uint32_t i = 0; i < mmu->nvcpus; i++) {
        dl_guest_kick(&mmu->vcpus[i]);
        dl_guest_leave(&mmu->vcpus[i]);
    }
}

/* The generic flush: ask every vCPU, then wait until each has been out of guest
 * mode. The request is read when guest mode is entered again. */
static inline void dl_flush_generic(struct dl_mmu *mmu)
{
    for (uint32_t i = 0; i < mmu->nvcpus; i++)
        dl_fetch_or(&mmu->vcpus[i].requests, DL_REQUEST_TLB_FLUSH);
    dl_kick_all(mmu);
    mmu->flushes++;
}

/* ARM's flush of everything under the machine's VMID: entries of the old
 * generation match no more. A vCPU reads the generation before the page table,
 * so an entry it tags with the new one saw the protection that came before. */
static inline void dl_flush_generation(struct dl_mmu *mmu)
{
    DL_RMW(fetch_add, &mmu->generation, 1, SEQ_CST);
    dl_kick_all(mmu);
    mmu->flushes++;
}

static inline void dl_tlb_drop(struct dl_vcpu *vcpu, uint64_t first_gfn, uint64_t count)
{
    if (count < DL_TLB_ENTRIES) {
        for (uint64_t gfn = first_gfn; gfn < first_gfn + count; gfn++)
            if (vcpu->tlb[gfn % DL_TLB_ENTRIES].tag == gfn + 1)
                vcpu->tlb[gfn % DL_TLB_ENTRIES].tag = 0;
        return;
    }
    for (unsigned i = 0; i < DL_TLB_ENTRIES; i++)
        if (vcpu->tlb[i].tag - 1 - first_gfn < count)
            vcpu->tlb[i].tag = 0;
}

static inline void dl_flush_range(struct dl_mmu *mmu, uint64_t first_gfn, uint64_t count)
{
    for (uint32_t i = 0; i < mmu->nvcpus; i++) {
        dl_guest_kick(&mmu->vcpus[i]);
        dl_tlb_drop(&mmu->vcpus[i], first_gfn, count);
        dl_guest_leave(&mmu->vcpus[i]);
    }
    mmu->flushes++;
}

/* Every vCPU's own page-table entries of the slot, and what its TLB holds of them. */
static inline void dl_flush_shadow(struct dl_mmu *mmu, struct dl_memslot *slot)
{
    for (uint32_t i = 0; i < mmu->nvcpus; i++) {
        dl_guest_kick(&mmu->vcpus[i]);
        memset(slot->shadow + i * slot->npages, 0, slot->npages * sizeof *slot->shadow);
        dl_tlb_drop(&mmu->vcpus[i], slot->base_gfn, slot->npages);
        dl_guest_leave(&mmu->vcpus[i]);
    }
    mmu->flushes++;
}

static inline void dl_flush(struct dl_mmu *mmu)
{
    if (mmu->hooks.flush_tlbs)
        mmu->hooks.flush_tlbs(mmu->hooks.context, mmu, dl_flush_generic);
    else
        dl_flush_generic(mmu);
}

/* Under slots_lock. The new table is published under mmu_lock, so that a fault
 * sees either the old one until it is done, or the new one; vCPUs in guest mode
 * are waited for. Then nobody uses `removed`, and the caller frees it. */
static inline int dl_table_publish(struct dl_mmu *mmu, struct dl_slot_table *table)
{
    struct dl_slot_table *old = mmu->table;
    int error = dl_lock_acquire(mmu->mmu_lock);
    if (error)
        return error;
    DL_STORE(&mmu->table, table, RELEASE);
    dl_lock_release(mmu->mmu_lock);
    dl_flush_generic(mmu);
    free(old);
    return 0;
}

#endif /* DIRTYLOG_FLUSH_H */
