/* The sending end of a migration: pages sorted into what is zero, what changed and what goes whole, and frames of them. */
#ifndef DIRTYLOG_MIGRATE_PACKING_H
#define DIRTYLOG_MIGRATE_PACKING_H

#include <stdint.h>
#include <string.h>
#include <sys/uio.h>

#include "_bits/crc32.h"
#include "_bits/deltas.h"
#include "_bits/stream.h"
#include "sinks/migrate/_format.h"
#include "sinks/migrate/_space.h"

/* The extents of one kind of page; neighbours are one. */
struct dl_rows {
    int64_t *rows;
    size_t count, granules;
};

static inline void dl_rows_add(struct dl_rows *table, int64_t offset, int64_t length)
{
    int64_t *last = table->rows + 2 * table->count;
    table->granules++;
    if (table->count && last[-2] + last[-1] == offset) {
        last[-1] += length;
        return;
    }
    last[0] = offset;
    last[1] = length;
    table->count++;
}

struct dl_packing {
    struct dl_space space;
    const unsigned char *packed; /* the bytes of the extents one after the other, where they are not read in place */
    const int64_t *extents;
    int64_t count, row, within, position; /* how far it has come: extents, and bytes of this one and of all */
    int64_t granule;
    struct dl_share share;
    struct dl_copies copies; /* of the granules by their own numbers */
    uint64_t *frames; /* in which frame each granule went last, or NULL */
    uint64_t sent;    /* frames of pages so far */
    size_t room;      /* bytes of whole pages, or of deltas, after which a window ends */
    /* A window: what is zero, what changed a little, what goes whole. */
    struct dl_rows zeros, deltas, whole;
    size_t nbytes, changed, filled;
    struct dl_whole copy; /* of what goes whole */
    unsigned char *changes, *pages, *scratch;
};

/* The bytes of a granule: where they are, or a copy with the zeros behind them. */
static inline const unsigned char *dl_packing_look(struct dl_packing *p, int64_t offset, size_t length)
{
    if (p->packed)
        return p->packed + p->position;
    const struct dl_region *region = dl_region_of(&p->space, offset);
    size_t held = dl_held_bytes(region, offset, length);
    if (held == length)
        return region->data + (offset - region->start);
    if (held)
        memcpy(p->scratch, region->data + (offset - region->start), held);
    memset(p->scratch + held, 0, length - held);
    return p->scratch;
}

/* What is to be looked at after the granule at `now`, of which there are `left` bytes with those that follow it. */
static inline const unsigned char *dl_packing_next(const struct dl_packing *p, const unsigned char *now, size_t length,
                                                   int64_t left)
{
    if (p->packed || (left > (int64_t)length && now != p->scratch))
        return now + length;
    if (left > (int64_t)length || p->row + 1 >= p->count)
        return now;
    int64_t offset = p->extents[2 * (p->row + 1)];
    const struct dl_region *region = dl_region_of(&p->space, offset);
    return offset < region->end ? region->data + (offset - region->start) : now;
}

static inline void dl_packing_went(struct dl_packing *p, struct dl_rows *table)
{
    if (!table->count)
        return;
    for (size_t i = 0; i < table->count; i++) {
        int64_t first = table->rows[2 * i] / p->granule;
        int64_t end = (table->rows[2 * i] + table->rows[2 * i + 1] + p->granule - 1) / p->granule;
        for (int64_t number = first; number < end; number++) {
            dl_page_goes(&p->copies, dl_own_number(&p->share, number), (int64_t)p->sent);
            if (p->frames)
                p->frames[number] = p->sent;
        }
    }
    p->sent++;
}

/* Take the next window of the extents; 0: there is none. Its frames are numbered before any of them is sent: if one
 * never is, its pages count as not arrived. */
static inline int dl_pack_window(struct dl_packing *p)
{
    p->zeros.count = p->zeros.granules = p->deltas.count = p->deltas.granules = 0;
    p->whole.count = p->whole.granules = p->nbytes = p->changed = p->filled = 0;
    dl_crc32_begin(&p->copy.sum);
    while (p->row < p->count) {
        int64_t offset = p->extents[2 * p->row] + p->within;
        int64_t left = p->extents[2 * p->row + 1] - p->within;
        size_t length = left < p->granule ? (size_t)left : (size_t)p->granule;
        if (p->nbytes && (p->nbytes + length > DL_FRAME_WINDOW || p->filled + length > p->room || p->changed > p->room))
            break;
        const unsigned char *now = dl_packing_look(p, offset, length);
        size_t used = 0;
        int64_t number = dl_own_number(&p->share, offset / p->granule);
        p->copy.at = p->pages + p->filled;
        p->copy.next = dl_packing_next(p, now, length, left);
        switch (dl_sort_page(now, length, number, &p->copies, p->changes + p->changed, &used, &p->copy)) {
        case DL_PAGE_ZERO:
            dl_rows_add(&p->zeros, offset, (int64_t)length);
            break;
        case DL_PAGE_DELTA:
            dl_rows_add(&p->deltas, offset, (int64_t)length);
            p->changed += used;
            break;
        default:
            dl_rows_add(&p->whole, offset, (int64_t)length);
            p->filled += length;
        }
        p->nbytes += length;
        p->position += (int64_t)length;
        p->within += (int64_t)length;
        if (p->within == p->extents[2 * p->row + 1]) {
            p->within = 0;
            p->row++;
        }
    }
    dl_stream_end();
    dl_packing_went(p, &p->zeros);
    dl_packing_went(p, &p->deltas);
    dl_packing_went(p, &p->whole);
    return p->nbytes != 0;
}

static inline void dl_put_table(unsigned char *out, const struct dl_rows *table)
{
    for (size_t i = 0; i < 2 * table->count; i++)
        dl_put_le(out + 8 * i, (uint64_t)table->rows[i], 8);
}

/* ---- the sending end: frames ----------------------------------------------------------------------------------- */

/* Frames that are ready, in one piece, and the pages of the last one, which are not copied behind it. */
struct dl_sending {
    unsigned char *out;
    size_t used, room;
    unsigned char *headers; /* of all frames so far, for the digest */
    size_t frames, most;    /* how many there are, and may be */
    uint64_t sequence;
    uint64_t nbytes;
    struct iovec parts[2];
};

/* What is kept back at most until it is worth a system call. */
#define DL_SEND_AT_ONCE ((size_t)1 << 16)
/* Of one window: three headers, prefixes and tables; deltas beside. */
#define DL_FRAMES_OF_A_WINDOW(granules) (3 * (DL_FRAME_HEADER + DL_FRAME_PREFIX + DL_FRAME_EXTENT * (granules)))

/* Its data is `nbytes` whose CRC is `sum`; copied behind the table, or sent from where it is: then `data` is NULL. */
static inline void dl_put_frame(struct dl_sending *s, int kind, const struct dl_rows *table, const unsigned char *data,
                                size_t nbytes, uint32_t sum)
{
    unsigned char *header = s->out + s->used, *at = header + DL_FRAME_HEADER;
    if (kind != DL_FRAME_ZEROS) {
        memset(at, 0, DL_FRAME_PREFIX);
        dl_put_le(at, table->count, 4);
        at += DL_FRAME_PREFIX;
    }
    dl_put_table(at, table);
    at += DL_FRAME_EXTENT * table->count;
    size_t before = (size_t)(at - header) - DL_FRAME_HEADER;
    dl_put_header(header, kind, s->sequence++, before, sum, nbytes);
    memcpy(s->headers + DL_FRAME_HEADER * s->frames++, header, DL_FRAME_HEADER);
    s->used += DL_FRAME_HEADER + before;
    s->nbytes += DL_FRAME_HEADER + before + nbytes;
    if (data) {
        memcpy(s->out + s->used, data, nbytes);
        s->used += nbytes;
    }
}

/* Make frames of the next windows, until they are worth a system call: what to send is in `parts`. Returns the bytes
 * of pages of these windows; 0: there is nothing more. */
static inline size_t dl_make_frames(struct dl_packing *p, struct dl_sending *s, size_t *zeros, size_t *deltas)
{
    size_t total = 0;
    s->used = 0;
    s->parts[1].iov_len = 0;
    while (s->used < DL_SEND_AT_ONCE && s->frames + 3 <= s->most && dl_pack_window(p)) {
        total += p->nbytes;
        *zeros += p->zeros.granules;
        *deltas += p->deltas.granules;
        if (p->zeros.count)
            dl_put_frame(s, DL_FRAME_ZEROS, &p->zeros, NULL, 0, 0);
        if (p->deltas.count)
            dl_put_frame(s, DL_FRAME_DELTAS, &p->deltas, p->changes, p->changed, dl_crc32(p->changes, p->changed, 0));
        if (p->whole.count) {
            dl_put_frame(s, DL_FRAME_PAGES, &p->whole, NULL, p->filled, dl_crc32_end(&p->copy.sum));
            s->parts[1].iov_base = p->pages;
            s->parts[1].iov_len = p->filled;
            break;
        }
    }
    s->parts[0].iov_base = s->out;
    s->parts[0].iov_len = s->used;
    return total;
}

#endif /* DIRTYLOG_MIGRATE_PACKING_H */
