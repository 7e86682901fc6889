/* Memory of which a part is missing, and what is put in its place: whoever touches what is missing waits.
 *
 * Until everything is there the memory is guarded by a userfaultfd that nothing closes, whatever breaks: a page that
 * never came would read as zeros without it (I6).
 */
#ifndef DIRTYLOG_MIGRATE_GUARD_H
#define DIRTYLOG_MIGRATE_GUARD_H

#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "sinks/migrate/_space.h"

#ifndef UFFD_USER_MODE_ONLY
#define UFFD_USER_MODE_ONLY 1
#endif

struct dl_guard {
    struct dl_space space; /* each region begins with a page of the system's, and has its last one to the end */
    int64_t granule;       /* whole pages of the system's */
    uint64_t *missing;     /* a bit for each granule */
    size_t page_bytes;
    int uffd; /* -1: nothing is guarded */
    int user_mode_only;
};

static inline void dl_guard_init(struct dl_guard *g)
{
    g->uffd = -1;
    g->page_bytes = (size_t)sysconf(_SC_PAGESIZE);
}

static inline size_t dl_page_up(const struct dl_guard *g, size_t nbytes)
{
    return (nbytes + g->page_bytes - 1) & ~(g->page_bytes - 1);
}

/* Each region, as whole pages of the system's. */
static inline void dl_guard_range(const struct dl_guard *g, int64_t i, uint64_t *start, size_t *nbytes)
{
    const struct dl_region *region = g->space.regions + i;
    *start = (uint64_t)(uintptr_t)region->data;
    *nbytes = dl_page_up(g, (size_t)(region->end - region->start));
}

static inline int dl_guard_advise(const struct dl_guard *g, int advice)
{
    for (int64_t i = 0; i < g->space.count; i++) {
        uint64_t start;
        size_t nbytes;
        dl_guard_range(g, i, &start, &nbytes);
        if (nbytes && madvise((void *)(uintptr_t)start, nbytes, advice))
            return -errno;
    }
    return 0;
}

/* What is missing is not there: pages that came and were written again since, and what the memory held before. */
static inline int dl_guard_discard(const struct dl_guard *g)
{
    int64_t granules = dl_granules_of(&g->space, g->granule);
    for (int64_t i = 0; i < g->space.count; i++) {
        const struct dl_region *region = g->space.regions + i;
        int64_t number = region->start / g->granule, last = (region->end + g->granule - 1) / g->granule;
        while (number < last && number < granules) {
            int64_t begin = number;
            while (number < last && dl_has_page(g->missing, number))
                number++;
            if (number > begin) {
                int64_t end = number * g->granule < region->end ? number * g->granule : region->end;
                unsigned char *place = region->data + (begin * g->granule - region->start);
                if (madvise(place, dl_page_up(g, (size_t)(end - begin * g->granule)), MADV_DONTNEED))
                    return -errno;
            } else {
                number++;
            }
        }
    }
    return 0;
}

static inline int dl_guard_register(const struct dl_guard *g)
{
    for (int64_t i = 0; i < g->space.count; i++) {
        struct uffdio_register want = {.mode = UFFDIO_REGISTER_MODE_MISSING};
        uint64_t start;
        size_t nbytes;
        dl_guard_range(g, i, &start, &nbytes);
        want.range.start = start;
        want.range.len = nbytes;
        if (nbytes && ioctl(g->uffd, UFFDIO_REGISTER, &want))
            return -errno;
    }
    return 0;
}

/* Nothing is missing any more, or nobody has seen the memory. */
static inline void dl_guard_close(struct dl_guard *g)
{
    /* The kernel wakes whoever still waits. */
    close(g->uffd);
    g->uffd = -1;
    (void)dl_guard_advise(g, MADV_DOFORK);
}

/* 0, or -errno: nothing is guarded then. */
static inline int dl_guard_open(struct dl_guard *g)
{
    struct uffdio_api api = {.api = UFFD_API};
    g->user_mode_only = 0;
    g->uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
    if (g->uffd < 0) {
        /* Faults that the kernel takes for somebody answer EFAULT then. */
        g->user_mode_only = 1;
        g->uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | UFFD_USER_MODE_ONLY);
    }
    if (g->uffd < 0)
        return -errno;
    int error = ioctl(g->uffd, UFFDIO_API, &api) ? -errno : 0;
    /* A child would find zeros where its parent waits. */
    if (!error)
        error = dl_guard_advise(g, MADV_DONTFORK);
    if (!error)
        error = dl_guard_register(g);
    if (!error)
        error = dl_guard_discard(g);
    if (error)
        dl_guard_close(g);
    return error;
}

/* ---- faults, and what comes ---------------------------------------------------------------------------------------- */

/* The granule that is touched there; -1: it is none of ours. */
static inline int64_t dl_guard_granule(const struct dl_guard *g, uint64_t address)
{
    for (int64_t i = 0; i < g->space.count; i++) {
        uint64_t start;
        size_t nbytes;
        dl_guard_range(g, i, &start, &nbytes);
        if (address >= start && address - start < nbytes)
            return (g->space.regions[i].start + (int64_t)(address - start)) / g->granule;
    }
    return -1;
}

static inline void dl_guard_wake(const struct dl_guard *g, uint64_t start, size_t nbytes)
{
    struct uffdio_range range = {start, nbytes};
    (void)ioctl(g->uffd, UFFDIO_WAKE, &range);
}

/* A page of which nothing is missing, and that is not there: zeros that were never put into memory. */
static inline void dl_guard_zero(const struct dl_guard *g, uint64_t address)
{
    struct uffdio_zeropage zero = {.range = {address & ~(uint64_t)(g->page_bytes - 1), g->page_bytes}};
    while (ioctl(g->uffd, UFFDIO_ZEROPAGE, &zero) && errno == EAGAIN)
        ;
    /* It may have come since the fault: who waits looks again. */
    dl_guard_wake(g, zero.range.start, g->page_bytes);
}

/* Put bytes, or zeros, where nothing is; 0, or -errno. */
static inline int dl_guard_place(const struct dl_guard *g, unsigned char *place, const unsigned char *from, size_t left)
{
    size_t most = left;
    while (left) {
        size_t length = left < most ? left : most;
        int64_t done;
        int failed;
        if (from) {
            struct uffdio_copy copy = {.dst = (uint64_t)(uintptr_t)place, .src = (uint64_t)(uintptr_t)from, .len = length};
            failed = ioctl(g->uffd, UFFDIO_COPY, &copy);
            done = copy.copy;
        } else {
            struct uffdio_zeropage zero = {.range = {(uint64_t)(uintptr_t)place, length}};
            failed = ioctl(g->uffd, UFFDIO_ZEROPAGE, &zero);
            done = zero.zeropage;
        }
        if (!failed)
            done = (int64_t)length;
        if (done <= 0) {
            if (errno == EAGAIN)
                continue;
            if (errno == ENOENT && length > g->page_bytes) {
                /* More than one mapping: somebody has protected a part of it, a tracker say. Page by page. */
                most = g->page_bytes;
                continue;
            }
            /* Somebody has unmapped it, or put something else there: it is theirs. */
            if (errno != EEXIST && errno != ENOENT)
                return -errno;
            dl_guard_wake(g, (uint64_t)(uintptr_t)place, g->page_bytes);
            done = (int64_t)g->page_bytes;
        }
        place += done;
        from = from ? from + done : NULL;
        left -= (size_t)done;
    }
    return 0;
}

#endif /* DIRTYLOG_MIGRATE_GUARD_H */
