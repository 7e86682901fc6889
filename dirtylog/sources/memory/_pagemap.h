/* PAGEMAP_SCAN, declared here because the distribution's headers may be older than the kernel. */
#ifndef DIRTYLOG_PAGEMAP_H
#define DIRTYLOG_PAGEMAP_H

#include <stdint.h>
#include <sys/ioctl.h>

struct dl_page_region {
    uint64_t start, end, categories;
};

struct dl_page_scan {
    uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages;
    uint64_t category_inverted, category_mask, category_anyof_mask, return_mask;
};

#define DL_PAGEMAP_SCAN _IOWR('f', 16, struct dl_page_scan)
#define DL_SCAN_WP_MATCHING (UINT64_C(1) << 0)
#define DL_SCAN_CHECK_WPASYNC (UINT64_C(1) << 1)
#define DL_PAGE_IS_WRITTEN (UINT64_C(1) << 1)
#define DL_PAGE_IS_PRESENT (UINT64_C(1) << 3)
#define DL_PAGE_IS_SWAPPED (UINT64_C(1) << 4)
#define DL_PAGE_IS_PFNZERO (UINT64_C(1) << 5)

#endif /* DIRTYLOG_PAGEMAP_H */
