/* The least that a harvest of userfaultfd write protection can cost: the PAGEMAP_SCAN loop, alone.
 *
 * Built as a shared library by track_harvest.py and run on the very memory that the tracker watches.
 */
#include <stdint.h>
#include <sys/ioctl.h>
#include <time.h>

struct region {
    uint64_t start, end, categories;
};

struct scan {
    uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages;
    uint64_t inverted, mask, anyof, returned;
};

enum { WP_MATCHING = 1, CHECK_WPASYNC = 2, WRITTEN = 2, ROOM = 8192 };

static struct region found[ROOM];

/* Seconds that one pass takes; the pages it found go to *pages. */
double bare_scan(int pagemap, uint64_t start, uint64_t end, uint64_t *pages)
{
    struct timespec before, after;
    int count;

    *pages = 0;
    clock_gettime(CLOCK_MONOTONIC, &before);
    while (start < end) {
        struct scan arg = {
            .size = sizeof(arg), .flags = WP_MATCHING | CHECK_WPASYNC, .start = start, .end = end,
            .vec = (uint64_t)(uintptr_t)found, .vec_len = ROOM, .mask = WRITTEN, .returned = WRITTEN,
        };

        count = ioctl(pagemap, _IOWR('f', 16, struct scan), &arg);
        if (count < 0)
            return -1;
        for (int i = 0; i < count; i++)
            *pages += (found[i].end - found[i].start) / 4096;
        start = arg.walk_end;
    }
    clock_gettime(CLOCK_MONOTONIC, &after);
    return (double)(after.tv_sec - before.tv_sec) + 1e-9 * (double)(after.tv_nsec - before.tv_nsec);
}
