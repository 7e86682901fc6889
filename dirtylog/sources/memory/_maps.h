/* The kernel's own list of this process's mappings.
 *
 * Callable under a spin lock and in a signal handler: system calls and the stack alone.
 */
#ifndef DIRTYLOG_MAPS_H
#define DIRTYLOG_MAPS_H

#include <stdint.h>

struct dl_mapping {
    uint64_t start, end;   /* addresses in bytes */
    char permissions[5];   /* "rw-p", as /proc/self/maps writes them */
    uint64_t page_size;    /* bytes of a page of this mapping; 0: the kernel did not say */
    uint64_t inode;        /* 0: anonymous and private */
    uint32_t major, minor; /* of the device that the inode is on */
};

/* Called for each mapping in order of address; a value other than 0 ends the walk. `name` is empty
 * unless it was asked for, and may be cut. */
typedef int dl_mapping_visitor(const struct dl_mapping *mapping, const char *name, void *context);

/* Visit the mappings that have bytes of [start, end). Where the kernel answers for one address
 * (PROCMAP_QUERY, Linux 6.11) the cost follows the mappings in the range, else all there are.
 * The visitor's last answer, or -errno when the kernel does not tell. */
int dl_maps_walk(uint64_t start, uint64_t end, int with_names, dl_mapping_visitor *visit, void *context);

/* 0, or -EACCES when part of what is mapped in [start, end) may not be read: a mapping without that permission, or a
 * guard (MADV_GUARD_INSTALL, which no list of mappings shows; Linux 6.15 tells). 0 where the kernel tells nothing. */
int dl_maps_readable(uint64_t start, uint64_t end);

#endif /* DIRTYLOG_MAPS_H */
