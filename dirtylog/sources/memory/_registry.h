/* Which spans have pages of a range: an index for each engine, sorted by address.
 *
 * Nothing here locks: the engine's lock is held by every caller. A change fills the half that nobody
 * reads and is published by one store, so a fork, which may copy the process at any moment, copies the
 * index before the change or after it. The memory is the index's own: a SIGSEGV handler reads it.
 */
#ifndef DIRTYLOG_REGISTRY_H
#define DIRTYLOG_REGISTRY_H

#include "_spans.h"
#include "dirtylog/atomic.h"

#define DL_REACH 64 /* entries that share one bound: a search passes over them together */

struct dl_entry {
    uint64_t first, end; /* pages of the address space */
    struct dl_span *span;
};

struct dl_index {
    uint64_t count, room;
    struct dl_index *other;   /* the half that the next change fills */
    struct dl_entry *entries; /* ascending by `first` */
    uint64_t *reach;          /* the highest `end` of each DL_REACH entries */
};

struct dl_registry {
    struct dl_index *now; /* NULL: no span was ever added */
};

/* 0, or -ENOMEM with nothing changed. O(spans), at the speed of memory. */
int dl_registry_add(struct dl_registry *registry, struct dl_span *span);
/* Never fails; a span that is not in it is ignored. */
void dl_registry_remove(struct dl_registry *registry, const struct dl_span *span);

static inline uint64_t dl_registry_count(const struct dl_registry *registry)
{
    return registry->now ? registry->now->count : 0;
}

/* The next span at or after entry `*at` that has pages of [first, end), in order of address; NULL at the
 * end. O(spans / DL_REACH + spans found). */
static inline struct dl_span *dl_registry_next(const struct dl_registry *registry, uint64_t *at, uint64_t first,
                                               uint64_t end)
{
    const struct dl_index *index = DL_LOAD(&registry->now, ACQUIRE);

    while (index && *at < index->count) {
        const struct dl_entry *entry = &index->entries[*at];

        if (*at % DL_REACH == 0 && index->reach[*at / DL_REACH] <= first) {
            *at += DL_REACH;
            continue;
        }
        if (entry->first >= end)
            break;
        ++*at;
        if (entry->end > first)
            return entry->span;
    }
    return 0;
}

/* Each span of the registry that has pages of [first, end). */
#define DL_EACH_SPAN(span, registry, first, end)  \
    for (uint64_t dl_at = 0; ((span) = dl_registry_next((registry), &dl_at, (first), (end)));)

/* Deposit dirty pages with every tracker of them but `taker`, who has them already (I5). */
static inline void dl_registry_deposit(const struct dl_registry *registry, const struct dl_span *taker, uint64_t first,
                                       uint64_t end)
{
    struct dl_span *span;

    DL_EACH_SPAN (span, registry, first, end)
        if (span != taker)
            dl_span_mark(span, first, end);
}

/* Where a walk over the pages that one span alone watches has come to. */
struct dl_gap {
    uint64_t at, from;   /* start with {0, self->first} */
    uint64_t first, end; /* the stretch that was found */
};

/* The next stretch of `self` that no other span watches; false at the end. One pass over its neighbours. */
static inline int dl_registry_gap(const struct dl_registry *registry, const struct dl_span *self, struct dl_gap *gap)
{
    const struct dl_span *span;

    while ((span = dl_registry_next(registry, &gap->at, self->first, self->end))) {
        uint64_t from = gap->from;

        if (span == self)
            continue;
        if (span->end > gap->from)
            gap->from = span->end;
        if (span->first > from) {
            gap->first = from;
            gap->end = span->first;
            return 1;
        }
    }
    gap->first = gap->from;
    gap->end = gap->from = self->end > gap->from ? self->end : gap->from;
    return gap->first < self->end;
}

#endif /* DIRTYLOG_REGISTRY_H */
