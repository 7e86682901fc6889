/* The receiving end of a migration: what a frame may say, and what comes of it in memory. */
#ifndef DIRTYLOG_MIGRATE_TAKING_H
#define DIRTYLOG_MIGRATE_TAKING_H

#include <stdint.h>
#include <string.h>

#include "_bits/content.h"
#include "_bits/crc32.h"
#include "_bits/deltas.h"
#include "_bits/stream.h"
#include "sinks/migrate/_format.h"
#include "sinks/migrate/_space.h"

/* Why a frame is refused; nothing of it has been written then. */
enum dl_wrong {
    DL_RIGHT,
    DL_WRONG_TABLE,
    DL_WRONG_PLACE,
    DL_WRONG_ORDER,
    DL_WRONG_PAGES,
    DL_WRONG_SIZE,
    DL_WRONG_ROUND,
    DL_WRONG_LENGTH,
    DL_WRONG_NEVER,
    DL_WRONG_DELTAS,
    DL_WRONG_CHANNEL,
};

struct dl_taking {
    struct dl_space space;
    int64_t granule;
    struct dl_share share; /* whole words of `seen` and `filled`: nobody else writes to those */
    uint64_t *seen;   /* the granules that have come */
    uint64_t *filled; /* of memory that was zero at first, those that may not be any more; or NULL */
    int64_t left;     /* bytes that may come in this round still */
    int64_t done;     /* bytes that have come */
    uint64_t applied; /* frames */
    uint64_t cleared; /* granules that had to be looked at to be zero */
    unsigned char *scratch;
    int64_t *rows;
    size_t count;
    int64_t size;
};

/* Ascending, apart, of whole granules, inside the memory, and not more than a frame may speak of. */
static inline int dl_take_table(struct dl_taking *t, const unsigned char *table, size_t nbytes)
{
    if (nbytes == 0 || nbytes % DL_FRAME_EXTENT || nbytes > DL_FRAME_EXTENT * DL_FRAME_EXTENTS)
        return DL_WRONG_TABLE;
    t->count = nbytes / DL_FRAME_EXTENT;
    t->size = 0;
    int64_t before = 0;
    for (size_t i = 0; i < t->count; i++) {
        int64_t offset = (int64_t)dl_take_le(table + DL_FRAME_EXTENT * i, 8);
        int64_t length = (int64_t)dl_take_le(table + DL_FRAME_EXTENT * i + 8, 8);
        /* In this order: once both are within bounds, their sum cannot overflow. */
        if (offset < 0 || offset >= t->space.nbytes || length < 1 || length > (int64_t)DL_FRAME_WINDOW)
            return DL_WRONG_PLACE;
        if (offset < before || offset + length > t->space.nbytes)
            return DL_WRONG_ORDER;
        before = offset + length;
        if (offset % t->granule || (before % t->granule && before != t->space.nbytes))
            return DL_WRONG_PAGES;
        if (t->share.channels > 1) {
            int64_t first = offset / t->granule / t->share.stripe;
            if (first % t->share.channels != t->share.index || (before - 1) / t->granule / t->share.stripe != first)
                return DL_WRONG_CHANNEL;
        }
        t->size += length;
        if (t->size > (int64_t)DL_FRAME_WINDOW)
            return DL_WRONG_SIZE;
        t->rows[2 * i] = offset;
        t->rows[2 * i + 1] = length;
    }
    return t->size > t->left ? DL_WRONG_ROUND : DL_RIGHT;
}

static inline void dl_mark_rows(const struct dl_taking *t, uint64_t *words)
{
    for (size_t i = 0; i < t->count; i++)
        for (int64_t at = t->rows[2 * i]; at < t->rows[2 * i] + t->rows[2 * i + 1]; at += t->granule)
            dl_add_page(words, at / t->granule);
}

/* Go on with each granule of the rows; within the loop `at` and `length` are its place, `place` its bytes. */
struct dl_granule {
    size_t row;
    int64_t within, at;
    size_t length, held;
    unsigned char *place;
};

/* Stand where the next one begins; returns the bytes from there to the end of its row, -1 behind the last row. */
static inline int64_t dl_left_of_row(const struct dl_taking *t, struct dl_granule *g)
{
    if (g->row < t->count && g->within == t->rows[2 * g->row + 1]) {
        g->row++;
        g->within = 0;
    }
    if (g->row == t->count)
        return -1;
    g->at = t->rows[2 * g->row] + g->within;
    return t->rows[2 * g->row + 1] - g->within;
}

static inline int dl_next_granule(const struct dl_taking *t, struct dl_granule *g)
{
    int64_t left = dl_left_of_row(t, g);
    if (left < 0)
        return 0;
    g->length = left < t->granule ? (size_t)left : (size_t)t->granule;
    g->within += (int64_t)g->length;
    const struct dl_region *region = dl_region_of(&t->space, g->at);
    g->held = dl_held_bytes(region, g->at, g->length);
    g->place = region->data + (g->at - region->start);
    return 1;
}

/* The same with what lies in one piece, and is there or is not. */
static inline int dl_next_span(const struct dl_taking *t, struct dl_granule *g)
{
    int64_t left = dl_left_of_row(t, g);
    if (left < 0)
        return 0;
    const struct dl_region *region = dl_region_of(&t->space, g->at);
    int there = g->at < region->end;
    int64_t end = there ? region->end : region + 1 < t->space.regions + t->space.count ? region[1].start : INT64_MAX;
    g->length = end - g->at < left ? (size_t)(end - g->at) : (size_t)left;
    g->within += (int64_t)g->length;
    g->held = there ? g->length : 0;
    g->place = there ? region->data + (g->at - region->start) : NULL;
    return 1;
}

/* From where they were received, past the caches. With `sum` they are summed, on the way where that is quicker: both
 * together take hardly longer than laying alone. */
static inline void dl_take_pages(struct dl_taking *t, const unsigned char *data, struct dl_crc32_copied *sum)
{
    struct dl_copier copier = {.streaming = 1};
    struct dl_granule g = {0};
    const unsigned char *unsummed = data;
    while (dl_next_span(t, &g)) {
        if (sum && g.held && dl_crc32_lays(g.place, g.length)) {
            dl_crc32_add(sum, unsummed, (size_t)(data - unsummed));
            dl_crc32_lay(sum, g.place, data, g.length);
            unsummed = data + g.length;
        } else if (g.held) {
            dl_copier_copy(&copier, (char *)g.place, (const char *)data, g.length);
        }
        data += g.length;
    }
    if (sum)
        dl_crc32_add(sum, unsummed, (size_t)(data - unsummed));
    dl_copier_end(&copier);
}

static inline int dl_take_deltas(struct dl_taking *t, const unsigned char *data, size_t nbytes)
{
    struct dl_granule g = {0};
    size_t at = 0;
    while (dl_next_granule(t, &g))
        if (!dl_has_page(t->seen, g.at / t->granule))
            return DL_WRONG_NEVER;
    /* All of it, before the first byte is written. */
    for (g = (struct dl_granule){0}; dl_next_granule(t, &g);)
        if (!dl_check_delta(data, nbytes, &at, g.place, g.length))
            return DL_WRONG_DELTAS;
    if (at != nbytes)
        return DL_WRONG_DELTAS;
    at = 0;
    for (g = (struct dl_granule){0}; dl_next_granule(t, &g);) {
        if (g.held == g.length) {
            dl_lay_delta(data, nbytes, &at, g.place, g.length);
            continue;
        }
        /* Behind an array may be nothing: what a delta says of that goes nowhere. */
        if (g.held)
            memcpy(t->scratch, g.place, g.held);
        memset(t->scratch + g.held, 0, g.length - g.held);
        dl_lay_delta(data, nbytes, &at, t->scratch, g.length);
        if (g.held)
            memcpy(g.place, t->scratch, g.held);
    }
    return DL_RIGHT;
}

/* What is looked at before it is written: no memory is committed for a whole page of so many bytes. */
#define DL_LOOKED_AT ((size_t)4096)

static inline void dl_take_zeros(struct dl_taking *t)
{
    struct dl_granule g = {0};
    while (dl_next_granule(t, &g)) {
        if (t->filled && !dl_has_page(t->filled, g.at / t->granule))
            continue;
        t->cleared++;
        for (size_t done = 0, part; done < g.held; done += part) {
            part = g.held - done < DL_LOOKED_AT ? g.held - done : DL_LOOKED_AT;
            if (!dl_is_zero(g.place + done, part))
                memset(g.place + done, 0, part);
        }
    }
}

/* A frame of pages: its table, and the bytes behind that; no bytes where they are zeros. */
struct dl_frame {
    int kind;
    const unsigned char *table, *data;
    size_t table_bytes, nbytes;
};

/* What is wrong with a frame before its bytes are looked at. */
static inline int dl_check_frame(struct dl_taking *t, const struct dl_frame *f)
{
    int wrong = dl_take_table(t, f->table, f->table_bytes);
    if (!wrong && f->kind == DL_FRAME_PAGES && f->nbytes != (size_t)t->size)
        wrong = DL_WRONG_LENGTH;
    return wrong;
}

static inline void dl_frame_taken(struct dl_taking *t)
{
    dl_mark_rows(t, t->seen);
    t->left -= t->size;
    t->done += t->size;
    t->applied++;
}

/* Apply a frame whose checksum is right. */
static inline int dl_take_frame(struct dl_taking *t, const struct dl_frame *f)
{
    int wrong = dl_check_frame(t, f);
    if (!wrong && f->kind == DL_FRAME_DELTAS)
        wrong = dl_take_deltas(t, f->data, f->nbytes);
    if (wrong)
        return wrong;
    if (f->kind == DL_FRAME_ZEROS)
        dl_take_zeros(t);
    else if (f->kind == DL_FRAME_PAGES)
        dl_take_pages(t, f->data, NULL);
    if (t->filled && f->kind != DL_FRAME_ZEROS)
        dl_mark_rows(t, t->filled);
    dl_frame_taken(t);
    return DL_RIGHT;
}

/* Pages of a damaged frame lie in memory. Its table may be what was damaged, so they may lie over pages that came in any
 * frame before, and the sender, which hears no more than how many frames have been applied, would not send those again. So
 * of what this channel carries nothing has come. What is not zero stays marked as that. */
static inline void dl_take_back(struct dl_taking *t)
{
    int64_t granules = dl_granules_of(&t->space, t->granule), stripe = t->share.stripe / DL_WORD_PAGES;
    for (int64_t word = 0; word * DL_WORD_PAGES < granules; word++)
        if (word / stripe % t->share.channels == t->share.index)
            t->seen[word] = 0;
    t->applied = 0;
}

#endif /* DIRTYLOG_MIGRATE_TAKING_H */
