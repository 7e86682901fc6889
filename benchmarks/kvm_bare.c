/* What the dirty log of KVM costs in a C program: the bare ioctls and a plain drain of a ring.
 *
 * Compiled and loaded by kvm_dirty_log.py, so that both sides work on the same
 * machine and the same dirty pages.
 */
#include <linux/kvm.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>

static double now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return 1e9 * (double)t.tv_sec + (double)t.tv_nsec;
}

/* Nanoseconds of one KVM_GET_DIRTY_LOG into words that are already there; negative on error. */
double bare_get(int vm, uint32_t slot, void *words)
{
    struct kvm_dirty_log log;
    memset(&log, 0, sizeof log);
    log.slot = slot;
    log.dirty_bitmap = words;
    double start = now_ns();
    int failed = ioctl(vm, KVM_GET_DIRTY_LOG, &log);
    double end = now_ns();
    return failed ? -1 : end - start;
}

struct entry {
    uint32_t flags, slot;
    uint64_t offset;
};

void *map_ring(int vcpu, size_t bytes)
{
    void *ring = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 64 * 4096);
    return ring == MAP_FAILED ? NULL : ring;
}

/* Nanoseconds to move the entries of one slot into its bitmap; with vm >= 0 also to reset them. */
double bare_drain(int vm, struct entry *ring, uint32_t size, uint32_t *fetch, uint32_t slot, uint64_t npages,
                  uint64_t *words, uint64_t *drained)
{
    double start = now_ns();
    uint32_t at = *fetch;
    uint64_t count = 0;
    memset(words, 0, (npages + 63) / 64 * 8);
    while (count < size) {
        struct entry *entry = &ring[at & (size - 1)];
        if (__atomic_load_n(&entry->flags, __ATOMIC_ACQUIRE) != 1)
            break;
        if (entry->slot != slot || entry->offset >= npages)
            return -1;
        words[entry->offset / 64] |= UINT64_C(1) << (entry->offset % 64);
        __atomic_store_n(&entry->flags, 2, __ATOMIC_RELEASE);
        at++;
        count++;
    }
    *fetch = at;
    *drained = count;
    if (vm >= 0 && ioctl(vm, KVM_RESET_DIRTY_RINGS, 0) != (int)count)
        return -2;
    return now_ns() - start;
}
