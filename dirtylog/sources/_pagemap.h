/* The kernel's interface to asynchronous write protection: userfaultfd, and PAGEMAP_SCAN over some process's pagemap.
 *
 * Shared by the engine that watches this process's own memory and by the source that watches another's: the same
 * registration, the same scan, the same way to go on when the result vector is full. Nothing here locks.
 */
#ifndef DIRTYLOG_PAGEMAP_H
#define DIRTYLOG_PAGEMAP_H

#include <errno.h>
#include <stdint.h>
#include <sys/ioctl.h>

/* Declared here because the distribution's headers may be older than the kernel. */
#ifndef UFFDIO_API
struct uffdio_api {
    uint64_t api, features, ioctls;
};
struct uffdio_range {
    uint64_t start, len;
};
struct uffdio_register {
    struct uffdio_range range;
    uint64_t mode, ioctls;
};
#define UFFDIO_API _IOWR(0xAA, 0x3F, struct uffdio_api)
#define UFFDIO_REGISTER _IOWR(0xAA, 0x00, struct uffdio_register)
#define UFFDIO_UNREGISTER _IOR(0xAA, 0x01, struct uffdio_range)
#endif
#ifndef UFFD_API
#define UFFD_API UINT64_C(0xAA)
#endif
#ifndef UFFDIO_REGISTER_MODE_WP
#define UFFDIO_REGISTER_MODE_WP (UINT64_C(1) << 1)
#endif
#ifndef UFFDIO_WRITEPROTECT
struct uffdio_writeprotect {
    struct uffdio_range range;
    uint64_t mode;
};
#define UFFDIO_WRITEPROTECT _IOWR(0xAA, 0x06, struct uffdio_writeprotect)
#endif
#ifndef UFFD_USER_MODE_ONLY
#define UFFD_USER_MODE_ONLY 1
#endif
#ifndef UFFD_FEATURE_WP_UNPOPULATED
#define UFFD_FEATURE_WP_UNPOPULATED (UINT64_C(1) << 13)
#endif
#ifndef UFFD_FEATURE_WP_ASYNC
#define UFFD_FEATURE_WP_ASYNC (UINT64_C(1) << 15)
#endif
#ifndef PAGEMAP_SCAN
struct page_region {
    uint64_t start, end, categories;
};
struct pm_scan_arg {
    uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages;
    uint64_t category_inverted, category_mask, category_anyof_mask, return_mask;
};
#define PAGEMAP_SCAN _IOWR('f', 16, struct pm_scan_arg)
#define PM_SCAN_WP_MATCHING (UINT64_C(1) << 0)
#define PM_SCAN_CHECK_WPASYNC (UINT64_C(1) << 1)
#define PAGE_IS_WRITTEN (UINT64_C(1) << 1)
#define PAGE_IS_FILE (UINT64_C(1) << 2)
#define PAGE_IS_PRESENT (UINT64_C(1) << 3)
#define PAGE_IS_SWAPPED (UINT64_C(1) << 4)
#define PAGE_IS_PFNZERO (UINT64_C(1) << 5)
#endif
#ifndef PAGE_IS_GUARD
#define PAGE_IS_GUARD (UINT64_C(1) << 8)
#endif

/* Regions that one ioctl may report: 192 KiB. */
#define DL_SCAN_VECTOR 8192

/* 0 or -errno. With WP_ASYNC nobody ever waits on the descriptor. */
static inline int dl_uffd_start(int uffd)
{
    struct uffdio_api api = {.api = UFFD_API, .features = UFFD_FEATURE_WP_UNPOPULATED | UFFD_FEATURE_WP_ASYNC};

    return ioctl(uffd, UFFDIO_API, &api) < 0 ? -errno : 0;
}

/* Not armed yet: until the first scan that takes, every page counts as written. */
static inline int dl_uffd_register(int uffd, uint64_t start, uint64_t end)
{
    struct uffdio_register want = {{start, end - start}, UFFDIO_REGISTER_MODE_WP, 0};

    return ioctl(uffd, UFFDIO_REGISTER, &want) < 0 ? -errno : 0;
}

static inline int dl_uffd_unregister(int uffd, uint64_t start, uint64_t end)
{
    struct uffdio_range range = {start, end - start};

    return ioctl(uffd, UFFDIO_UNREGISTER, &range) < 0 ? -errno : 0;
}

/* One PAGEMAP_SCAN; 0 or more regions, or -errno. *at becomes where the walk ended: at arg->end, or before it when the
 * vector was full. */
static inline int dl_pagemap_step(int pagemap, uint64_t *at, struct pm_scan_arg *arg)
{
    arg->size = sizeof(*arg);
    arg->start = *at;
    int found = ioctl(pagemap, PAGEMAP_SCAN, arg);

    if (found < 0)
        return -errno;
    /* A kernel that reports no progress would spin us. */
    if (arg->walk_end <= *at)
        return -EIO;
    *at = arg->walk_end;
    return found;
}

/* What was written since the last scan that took. */
static inline int dl_pagemap_scan(int pagemap, uint64_t *at, uint64_t end, int take, struct page_region *vector)
{
    /* WRITTEN alone: a written page may have been swapped out since, so PRESENT is not asked for.
     * CHECK_WPASYNC: memory that was replaced under its watcher answers EPERM, not "clean" (I6). */
    struct pm_scan_arg arg = {
        .flags = PM_SCAN_CHECK_WPASYNC | (take ? PM_SCAN_WP_MATCHING : 0),
        .end = end,
        .vec = (uint64_t)(uintptr_t)vector,
        .vec_len = DL_SCAN_VECTOR,
        .category_mask = PAGE_IS_WRITTEN,
        .return_mask = PAGE_IS_WRITTEN,
    };

    return dl_pagemap_step(pagemap, at, &arg);
}

/* What is not what a fresh private anonymous page is: all zeros. With `swapped`, what was swapped out counts too; but
 * a page that is protected and was never touched looks swapped out as well. */
static inline int dl_pagemap_populated(int pagemap, uint64_t *at, uint64_t end, int swapped, struct page_region *vector)
{
    struct pm_scan_arg arg = {
        .end = end,
        .vec = (uint64_t)(uintptr_t)vector,
        .vec_len = DL_SCAN_VECTOR,
        .category_inverted = PAGE_IS_PFNZERO,
        .category_mask = PAGE_IS_PFNZERO,
        .category_anyof_mask = PAGE_IS_PRESENT | (swapped ? PAGE_IS_SWAPPED : 0),
        .return_mask = PAGE_IS_PRESENT,
    };

    return dl_pagemap_step(pagemap, at, &arg);
}

/* Private pages without contents of their own: neither swapped out, nor present, unless as the system's page of zeros or
 * as the file's, put there by a read. At most `room` regions. */
static inline int dl_pagemap_empty(int pagemap, uint64_t *at, uint64_t end, struct page_region *vector, uint64_t room)
{
    struct pm_scan_arg arg = {
        .end = end,
        .vec = (uint64_t)(uintptr_t)vector,
        .vec_len = room,
        .category_inverted = PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
        .category_mask = PAGE_IS_SWAPPED,
        .category_anyof_mask = PAGE_IS_PRESENT | PAGE_IS_PFNZERO | PAGE_IS_FILE,
        .return_mask = PAGE_IS_SWAPPED,
    };

    return dl_pagemap_step(pagemap, at, &arg);
}

/* Private pages that are there and are no file's: copies of their own. */
static inline int dl_pagemap_copies(int pagemap, uint64_t *at, uint64_t end, struct page_region *vector)
{
    struct pm_scan_arg arg = {
        .end = end,
        .vec = (uint64_t)(uintptr_t)vector,
        .vec_len = DL_SCAN_VECTOR,
        .category_inverted = PAGE_IS_FILE,
        .category_mask = PAGE_IS_PRESENT | PAGE_IS_FILE,
        .return_mask = PAGE_IS_PRESENT,
    };

    return dl_pagemap_step(pagemap, at, &arg);
}

/* 1 where there is a guard, whose reading raises SIGSEGV; 0 without, or -errno: EINVAL before Linux 6.15. */
static inline int dl_pagemap_guard(int pagemap, uint64_t *at, uint64_t end)
{
    struct page_region region;
    struct pm_scan_arg arg = {
        .end = end,
        .vec = (uint64_t)(uintptr_t)&region,
        .vec_len = 1,
        .category_mask = PAGE_IS_GUARD,
        .return_mask = PAGE_IS_GUARD,
    };

    return dl_pagemap_step(pagemap, at, &arg);
}

#endif /* DIRTYLOG_PAGEMAP_H */
