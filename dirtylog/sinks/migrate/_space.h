/* The memory of a migration: regions of a page space, sets of its granules, and which of them go over which channel. */
#ifndef DIRTYLOG_MIGRATE_SPACE_H
#define DIRTYLOG_MIGRATE_SPACE_H

#include <stddef.h>
#include <stdint.h>

#include "dirtylog/bits.h"

/* A part of a page space that is there; behind its end, up to where the next one begins, there is nothing: zeros. */
struct dl_region {
    int64_t start, end;
    unsigned char *data;
};

struct dl_space {
    const struct dl_region *regions; /* ascending, at least one */
    int64_t count;
    int64_t nbytes;
};

/* The last region that begins at an offset or before it. */
static inline const struct dl_region *dl_region_of(const struct dl_space *space, int64_t offset)
{
    int64_t low = 0, high = space->count;
    while (high - low > 1) {
        int64_t middle = low + (high - low) / 2;
        if (space->regions[middle].start <= offset)
            low = middle;
        else
            high = middle;
    }
    return space->regions + low;
}

/* How many of `length` bytes from an offset on are there. They are of one page, and so of one region. */
static inline size_t dl_held_bytes(const struct dl_region *region, int64_t offset, size_t length)
{
    if (offset >= region->end)
        return 0;
    return (uint64_t)(region->end - offset) < length ? (size_t)(region->end - offset) : length;
}

static inline int64_t dl_granules_of(const struct dl_space *space, int64_t granule)
{
    return (space->nbytes + granule - 1) / granule;
}

/* Of words with a bit for each granule. */
static inline int dl_has_page(const uint64_t *words, int64_t number)
{
    return (words[number / DL_WORD_PAGES] & dl_bit((size_t)number)) != 0;
}

static inline void dl_add_page(uint64_t *words, int64_t number)
{
    words[number / DL_WORD_PAGES] |= dl_bit((size_t)number);
}

static inline void dl_drop_page(uint64_t *words, int64_t number)
{
    words[number / DL_WORD_PAGES] &= ~dl_bit((size_t)number);
}

/* Which granules go over one of several channels: every `channels`-th stripe of so many. */
struct dl_share {
    int64_t index, channels, stripe;
};

/* The number of a granule among those of its own channel. */
static inline int64_t dl_own_number(const struct dl_share *share, int64_t number)
{
    if (share->channels == 1)
        return number;
    return number / share->stripe / share->channels * share->stripe + number % share->stripe;
}

#endif /* DIRTYLOG_MIGRATE_SPACE_H */
