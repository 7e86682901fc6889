/* The index of spans by address, in memory that a signal handler may read. */
#define _GNU_SOURCE
#include "_registry.h"

#include <errno.h>

#ifdef __linux__

#include <string.h>
#include <sys/mman.h>

static uint64_t reaches(uint64_t room) { return (room + DL_REACH - 1) / DL_REACH; }

/* One mapping holds both halves, each a header, the entries and their bounds. */
static struct dl_index *halves(uint64_t room)
{
    uint64_t half = sizeof(struct dl_index) + room * sizeof(struct dl_entry) + reaches(room) * sizeof(uint64_t);
    char *memory = mmap(NULL, 2 * half, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

    if (memory == MAP_FAILED)
        return NULL;
    for (int i = 0; i < 2; i++) {
        struct dl_index *index = (struct dl_index *)(memory + (uint64_t)i * half);

        index->room = room;
        index->other = (struct dl_index *)(memory + (uint64_t)!i * half);
        index->entries = (struct dl_entry *)(index + 1);
        index->reach = (uint64_t *)(index->entries + room);
    }
    return (struct dl_index *)memory;
}

static void unmap(struct dl_index *index)
{
    struct dl_index *start = index < index->other ? index : index->other;

    munmap(start, 2 * (uint64_t)((char *)start->other - (char *)start));
}

/* The bounds of the entries from `at` on; those before it are `from`'s. */
static void measure(struct dl_index *into, const struct dl_index *from, uint64_t at)
{
    uint64_t group = at / DL_REACH;

    if (from && group)
        memcpy(into->reach, from->reach, group * sizeof(*into->reach));
    for (; group < reaches(into->count); group++) {
        uint64_t last = (group + 1) * DL_REACH, reach = 0;

        for (uint64_t i = group * DL_REACH; i < last && i < into->count; i++)
            if (into->entries[i].end > reach)
                reach = into->entries[i].end;
        into->reach[group] = reach;
    }
}

static void publish(struct dl_registry *registry, struct dl_index *index)
{
    DL_STORE(&registry->now, index, RELEASE);
}

int dl_registry_add(struct dl_registry *registry, struct dl_span *span)
{
    struct dl_index *now = registry->now, *into = now ? now->other : NULL;
    uint64_t count = now ? now->count : 0, low = 0, high = count;

    if (!now || count == now->room)
        into = halves(now ? 2 * now->room : DL_REACH);
    if (!into)
        return -ENOMEM;
    while (low < high) {
        uint64_t middle = (low + high) / 2;

        if (now->entries[middle].first <= span->first)
            low = middle + 1;
        else
            high = middle;
    }
    if (low)
        memcpy(into->entries, now->entries, low * sizeof(*into->entries));
    into->entries[low] = (struct dl_entry){span->first, span->end, span};
    if (count > low)
        memcpy(into->entries + low + 1, now->entries + low, (count - low) * sizeof(*into->entries));
    into->count = count + 1;
    measure(into, now, low);
    publish(registry, into);
    if (now && into != now->other)
        unmap(now);
    return 0;
}

void dl_registry_remove(struct dl_registry *registry, const struct dl_span *span)
{
    struct dl_index *now = registry->now, *into;
    uint64_t low = 0, high = now ? now->count : 0;

    while (low < high) {
        uint64_t middle = (low + high) / 2;

        if (now->entries[middle].first < span->first)
            low = middle + 1;
        else
            high = middle;
    }
    while (now && low < now->count && now->entries[low].first == span->first && now->entries[low].span != span)
        low++;
    if (!now || low == now->count || now->entries[low].span != span)
        return;
    into = now->other;
    memcpy(into->entries, now->entries, low * sizeof(*into->entries));
    memcpy(into->entries + low, now->entries + low + 1, (now->count - low - 1) * sizeof(*into->entries));
    into->count = now->count - 1;
    measure(into, now, low);
    publish(registry, into);
}

#else

int dl_registry_add(struct dl_registry *registry, struct dl_span *span) { return -ENOSYS; }
void dl_registry_remove(struct dl_registry *registry, const struct dl_span *span) {}

#endif
