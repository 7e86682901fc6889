/* KVM's dirty-log ABI in plain C: ioctls that answer -errno, the dirty ring, the kick of a running vCPU.
 *
 * Nothing of <linux/kvm.h> is included: distributions ship headers older than
 * the interface, and the layouts below are frozen ABI.
 */
#ifndef DIRTYLOG_SOURCES_KVM_H
#define DIRTYLOG_SOURCES_KVM_H

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>

#include "dirtylog/bitmap.h"

struct dl_kvm_region {
    uint32_t slot;
    uint32_t flags;
    uint64_t guest_address;
    uint64_t bytes;
    uint64_t host_address;
};

struct dl_kvm_enable {
    uint32_t capability;
    uint32_t flags;
    uint64_t arguments[4];
    uint8_t padding[64];
};

struct dl_kvm_dirty_log {
    uint32_t slot;
    uint32_t padding;
    uint64_t bitmap;
};

struct dl_kvm_clear_log {
    uint32_t slot;
    uint32_t num_pages;
    uint64_t first_page;
    uint64_t bitmap;
};

/* Registers of x86 travel as plain bytes; only their size is part of a number. */
struct dl_kvm_regs { uint8_t bytes[144]; };
struct dl_kvm_sregs { uint8_t bytes[312]; };

#define DL_KVM_GET_API_VERSION _IO(0xAE, 0x00)
#define DL_KVM_CREATE_VM _IO(0xAE, 0x01)
#define DL_KVM_CHECK_EXTENSION _IO(0xAE, 0x03)
#define DL_KVM_GET_VCPU_MMAP_SIZE _IO(0xAE, 0x04)
#define DL_KVM_CREATE_VCPU _IO(0xAE, 0x41)
#define DL_KVM_GET_DIRTY_LOG _IOW(0xAE, 0x42, struct dl_kvm_dirty_log)
#define DL_KVM_SET_USER_MEMORY_REGION _IOW(0xAE, 0x46, struct dl_kvm_region)
#define DL_KVM_RUN _IO(0xAE, 0x80)
#define DL_KVM_GET_REGS _IOR(0xAE, 0x81, struct dl_kvm_regs)
#define DL_KVM_SET_REGS _IOW(0xAE, 0x82, struct dl_kvm_regs)
#define DL_KVM_GET_SREGS _IOR(0xAE, 0x83, struct dl_kvm_sregs)
#define DL_KVM_SET_SREGS _IOW(0xAE, 0x84, struct dl_kvm_sregs)
#define DL_KVM_ENABLE_CAP _IOW(0xAE, 0xa3, struct dl_kvm_enable)
#define DL_KVM_CLEAR_DIRTY_LOG _IOWR(0xAE, 0xc0, struct dl_kvm_clear_log)
#define DL_KVM_RESET_DIRTY_RINGS _IO(0xAE, 0xc7)

/* Where the ring is mapped on the vCPU's descriptor, in pages. */
#define DL_KVM_DIRTY_LOG_PAGE_OFFSET 64

static inline int dl_ioctl(int fd, unsigned long request, uintptr_t argument)
{
    int result = ioctl(fd, request, argument);
    return result < 0 ? -errno : result;
}

static inline int dl_kvm_get_dirty_log(int fd, uint32_t slot, uint64_t *words)
{
    struct dl_kvm_dirty_log log = {slot, 0, (uintptr_t)words};
    return dl_ioctl(fd, DL_KVM_GET_DIRTY_LOG, (uintptr_t)&log);
}

static inline int dl_kvm_clear_dirty_log(int fd, uint32_t slot, uint64_t first, uint32_t count, const uint64_t *words)
{
    struct dl_kvm_clear_log log = {slot, count, first, (uintptr_t)words};
    return dl_ioctl(fd, DL_KVM_CLEAR_DIRTY_LOG, (uintptr_t)&log);
}

/* ---- a descriptor that is never closed under a call that uses it ---------- */

/* The number of a closed descriptor may belong to another file a moment later,
 * so close waits until the last call that read the number has left. */
struct dl_gate {
    pthread_mutex_t lock;
    pthread_cond_t left;
    unsigned users;
    unsigned births; /* of the process that it was made in */
    int shut;
};

/* How often the process that we are was forked from another since this was
 * loaded. KVM serves only the process that made the machine; and in a child,
 * locks may be held and calls be under way by threads that are not there. */
static unsigned dl_births;
static inline void dl_born(void) { dl_births++; }

static inline int dl_gate_inherited(const struct dl_gate *gate) { return gate->births != dl_births; }

static inline void dl_gate_init(struct dl_gate *gate)
{
    gate->births = dl_births;
    pthread_mutex_init(&gate->lock, NULL);
    pthread_cond_init(&gate->left, NULL);
    gate->users = 0;
    gate->shut = 0;
}

static inline int dl_gate_enter(struct dl_gate *gate)
{
    pthread_mutex_lock(&gate->lock);
    int open = !gate->shut;
    gate->users += (unsigned)open;
    pthread_mutex_unlock(&gate->lock);
    return open;
}

static inline void dl_gate_leave(struct dl_gate *gate)
{
    pthread_mutex_lock(&gate->lock);
    if (--gate->users == 0)
        pthread_cond_broadcast(&gate->left);
    pthread_mutex_unlock(&gate->lock);
}

/* True for the one caller that has to close. */
static inline int dl_gate_shut(struct dl_gate *gate)
{
    pthread_mutex_lock(&gate->lock);
    int first = !gate->shut;
    gate->shut = 1;
    pthread_mutex_unlock(&gate->lock);
    return first;
}

static inline void dl_gate_drain(struct dl_gate *gate)
{
    pthread_mutex_lock(&gate->lock);
    while (gate->users)
        pthread_cond_wait(&gate->left, &gate->lock);
    pthread_mutex_unlock(&gate->lock);
}

static inline int dl_gate_is_shut(struct dl_gate *gate)
{
    pthread_mutex_lock(&gate->lock);
    int shut = gate->shut;
    pthread_mutex_unlock(&gate->lock);
    return shut;
}

static inline void dl_gate_destroy(struct dl_gate *gate)
{
    pthread_cond_destroy(&gate->left);
    pthread_mutex_destroy(&gate->lock);
}

/* ---- running a vCPU, and making it return --------------------------------- */

#define DL_RUN_IMMEDIATE_EXIT 1 /* offset of kvm_run.immediate_exit */

struct dl_runner {
    pthread_mutex_t lock;
    pthread_cond_t left;
    pthread_t thread;
    uint64_t exits; /* how often KVM_RUN has returned */
    int running;
    int kicked;  /* the next run that is interrupted ends: somebody asked for it */
    int wanted;  /* the run under way is to leave the guest once, and may go on: a harvest waits for that */
};

static inline void dl_runner_init(struct dl_runner *runner)
{
    pthread_mutex_init(&runner->lock, NULL);
    pthread_cond_init(&runner->left, NULL);
    runner->exits = 0;
    runner->running = runner->kicked = runner->wanted = 0;
}

static inline void dl_runner_destroy(struct dl_runner *runner)
{
    pthread_cond_destroy(&runner->left);
    pthread_mutex_destroy(&runner->lock);
}

static inline void dl_kick_handler(int number) { (void)number; }

/* A signal that nobody uses, with a handler that does nothing: its only effect
 * is that KVM_RUN returns EINTR. Python's wakeup descriptor and handlers are
 * not involved. No SA_RESTART: the interruption is the purpose. Answers 0 when
 * every real-time signal is taken. */
static inline int dl_kick_signal(void)
{
#ifdef SIGRTMIN
    struct sigaction now, mine;
    memset(&mine, 0, sizeof mine);
    mine.sa_handler = dl_kick_handler;
    sigemptyset(&mine.sa_mask);
    for (int number = SIGRTMAX - 1; number >= SIGRTMIN; number--) {
        if (sigaction(number, NULL, &now) || (now.sa_flags & SA_SIGINFO) || now.sa_handler != SIG_DFL)
            continue;
        if (!sigaction(number, &mine, NULL))
            return number;
    }
#endif
    return 0;
}

/* Under the runner's lock. A run that has begun may not be in the kernel yet,
 * where a signal would find nothing to interrupt: then KVM_RUN sees
 * immediate_exit when it starts. */
static inline void dl_interrupt(struct dl_runner *runner, uint8_t *run, int number)
{
    DL_STORE(&run[DL_RUN_IMMEDIATE_EXIT], 1, SEQ_CST);
    if (runner->running)
        pthread_kill(runner->thread, number);
}

/* Either the runner takes the lock later, and finds `kicked`; or it took it
 * earlier, and we see `running` and interrupt it. A kick is never lost. */
static inline void dl_kick(struct dl_runner *runner, uint8_t *run, int number)
{
    pthread_mutex_lock(&runner->lock);
    runner->kicked = 1;
    dl_interrupt(runner, run, number);
    pthread_mutex_unlock(&runner->lock);
}

/* Ask the run under way, if there is one, to leave the guest once: what Intel's
 * page-modification logging holds in hardware goes into the ring on the way
 * out. Answers which exit dl_left_wait() is to wait for: of a vCPU that does not
 * run, the last one. `run` is NULL where somebody closes the vCPU: he has
 * interrupted it, or is about to. */
static inline uint64_t dl_left_ask(struct dl_runner *runner, uint8_t *run, int number)
{
    pthread_mutex_lock(&runner->lock);
    uint64_t exits = runner->exits + (runner->running != 0);
    if (runner->running && run) {
        runner->wanted = 1;
        dl_interrupt(runner, run, number);
    }
    pthread_mutex_unlock(&runner->lock);
    return exits;
}

/* Wait until no guest runs that ran when dl_left_ask() was called. The thread
 * that leaves needs no lock but the runner's to say so, neither the GIL nor
 * one that a harvest holds; and whoever calls this is not inside KVM_RUN. */
static inline void dl_left_wait(struct dl_runner *runner, uint64_t exits)
{
    pthread_mutex_lock(&runner->lock);
    while (runner->exits < exits)
        pthread_cond_wait(&runner->left, &runner->lock);
    pthread_mutex_unlock(&runner->lock);
}

/* What dl_run() answers when only a harvest made the guest leave; KVM_RUN has
 * no positive answer. */
#define DL_RUN_AGAIN 1

/* KVM_RUN once; -EBUSY when another thread runs this vCPU. A kick that arrives
 * after the guest left for another reason stays for the next run: it is taken
 * back only by the run that it ended. What a harvest asked for is done with
 * any return, and leaves nothing behind for the next run.
 *
 * The kick's signal is let through before `running` is set: a thread that
 * blocks all signals, as servers' workers do, could not be made to return, and
 * closing would wait for it for ever. The old mask comes back after `running`
 * is cleared, when no kick is on its way to this thread any more; one that
 * was pending before is taken by the handler, which does nothing. */
static inline int dl_run(int fd, struct dl_runner *runner, uint8_t *run, int number)
{
    sigset_t kicks, before;
    sigemptyset(&kicks);
    sigaddset(&kicks, number);
    pthread_sigmask(SIG_UNBLOCK, &kicks, &before);
    pthread_mutex_lock(&runner->lock);
    int busy = runner->running;
    if (!busy) {
        runner->thread = pthread_self();
        runner->running = 1;
    }
    pthread_mutex_unlock(&runner->lock);
    if (busy) {
        pthread_sigmask(SIG_SETMASK, &before, NULL);
        return -EBUSY;
    }
    int result = dl_ioctl(fd, DL_KVM_RUN, 0);
    pthread_mutex_lock(&runner->lock);
    runner->running = 0;
    runner->exits++;
    if (result == -EINTR) {
        if (runner->wanted && !runner->kicked)
            result = DL_RUN_AGAIN;
        runner->kicked = 0;
    }
    runner->wanted = 0;
    DL_STORE(&run[DL_RUN_IMMEDIATE_EXIT], (uint8_t)runner->kicked, SEQ_CST);
    pthread_cond_broadcast(&runner->left);
    pthread_mutex_unlock(&runner->lock);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return result;
}

/* ---- the dirty ring -------------------------------------------------------- */

#define DL_RING_DIRTY 1u /* the kernel has filled the entry */
#define DL_RING_RESET 2u /* we have read it; 0 again once the kernel has protected the page */

struct dl_ring_entry {
    uint32_t flags;
    uint32_t slot;
    uint64_t offset;
};

struct dl_ring {
    struct dl_ring_entry *entries;
    uint32_t size;  /* entries, a power of two */
    uint32_t fetch; /* where the kernel puts the next entry that we have not read */
    int full;       /* KVM_RUN said DIRTY_RING_FULL and nobody has harvested since */
};

struct dl_ring_slot {
    const struct dl_bitmap *bits;
    uint32_t id;
};

struct dl_ring_result {
    uint64_t drained;
    uint64_t foreign;    /* entries for no slot of ours, or past its end */
    uint64_t bad_offset; /* the last of them */
    uint32_t bad_slot;
    int overflow;
};

static inline uint32_t dl_ring_flags(const struct dl_ring *ring, uint32_t index)
{
    return DL_LOAD(&ring->entries[index & (ring->size - 1)].flags, ACQUIRE);
}

/* Does an entry behind the free one at `fetch + drained` wait for us? The
 * kernel fills them in order, so with none there, there is none behind it,
 * unless the kernel has run past its own reset index: an overflow. */
static inline int dl_ring_waits_behind(const struct dl_ring *ring, uint32_t drained)
{
    for (uint32_t ahead = drained + 1; ahead < ring->size; ahead++)
        if (dl_ring_flags(ring, ring->fetch + ahead) == DL_RING_DIRTY)
            return 1;
    return 0;
}

static inline struct dl_ring_slot *dl_ring_find(struct dl_ring_slot *slots, size_t nslots, uint32_t id)
{
    size_t low = 0, high = nslots;
    while (low < high) {
        size_t middle = low + (high - low) / 2;
        if (slots[middle].id < id)
            low = middle + 1;
        else
            high = middle;
    }
    return low < nslots && slots[low].id == id ? &slots[low] : NULL;
}

static inline void dl_ring_mark(const struct dl_bitmap *bits, uint64_t word, uint64_t *pages)
{
    if (*pages)
        dl_mark_mask(bits, word, *pages);
    *pages = 0;
}

/* Move what the ring holds into the slots' bitmaps; `slots` is sorted by id. The
 * caller holds the VM's harvest lock: the ring has one reader. */
static inline struct dl_ring_result dl_ring_drain(struct dl_ring *ring, struct dl_ring_slot *slots, size_t nslots)
{
    struct dl_ring_result result = {0};
    struct dl_ring_slot *slot = NULL;
    const uint32_t mask = ring->size - 1;
    uint32_t drained = 0;
    /* Copies of what the loop needs: its stores might alias the originals. */
    uint32_t id = 0;
    struct dl_bitmap bits = {0};
    /* Pages of one word, marked by one locked instruction: a guest that writes one page after the other fills the ring
     * with them. All are marked before this returns, and so before KVM is told to take the entries back. */
    uint64_t word = 0, pages = 0;

again:
    for (; drained < ring->size; drained++) {
        struct dl_ring_entry *entry = &ring->entries[(ring->fetch + drained) & mask];
        /* Pairs with the write barrier (store-release with ACQ_REL) before the
         * flag in kvm_dirty_ring_push(): slot and offset are read after it. */
        if (DL_LOAD(&entry->flags, ACQUIRE) != DL_RING_DIRTY)
            break;
        uint64_t offset = entry->offset;
        if (!slot || id != entry->slot) {
            dl_ring_mark(&bits, word, &pages);
            id = entry->slot;
            slot = dl_ring_find(slots, nslots, id);
            bits = slot ? *slot->bits : (struct dl_bitmap){0};
        }
        if (offset < bits.npages) {
            if (offset / DL_WORD_PAGES != word)
                dl_ring_mark(&bits, word, &pages);
            word = offset / DL_WORD_PAGES;
            pages |= dl_bit(offset);
        } else {
            result.foreign++;
            result.bad_slot = id;
            result.bad_offset = offset;
        }
        /* Pairs with the acquire in kvm_dirty_gfn_harvested(): the kernel may
         * refill the entry once it has seen the flag, so we have read it. */
        DL_STORE(&entry->flags, DL_RING_RESET, RELEASE);
    }
    if (dl_ring_waits_behind(ring, drained)) {
        /* A running vCPU may have filled the free entry and those behind it
         * since we looked; seeing those with acquire, we see that one now. */
        if (dl_ring_flags(ring, ring->fetch + drained) == DL_RING_DIRTY)
            goto again;
        result.overflow = 1;
    }
    dl_ring_mark(&bits, word, &pages);
    ring->fetch += drained;
    result.drained = drained;
    /* A ring without one free entry may have lost any number of them: a vCPU
     * stops 64 entries earlier unless it ran past its reserve. And one that
     * KVM calls full while we find nothing is out of step for ever. */
    if (drained == ring->size || (drained == 0 && ring->full))
        result.overflow = 1;
    ring->full = 0;
    return result;
}

/* The answer to KVM_RESET_DIRTY_RINGS is the number of entries it took back. It
 * stops early when a signal is pending, which is delivered on return: then call
 * again, but only so often without progress that a stuck ring ends the loop. */
#define DL_RESET_ATTEMPTS 16

static inline int dl_kvm_reset_rings(int fd, uint64_t expected, uint64_t *reset)
{
    *reset = 0;
    for (int idle = 0; *reset < expected && idle < DL_RESET_ATTEMPTS; ) {
        int taken = dl_ioctl(fd, DL_KVM_RESET_DIRTY_RINGS, 0);
        if (taken < 0 && taken != -EINTR)
            return taken;
        idle = taken > 0 ? 0 : idle + 1;
        *reset += taken > 0 ? (uint64_t)taken : 0;
    }
    return 0;
}

#endif /* DIRTYLOG_SOURCES_KVM_H */
