/* Frames off a line: read, checked and applied until something else comes. */
#ifndef DIRTYLOG_MIGRATE_READING_H
#define DIRTYLOG_MIGRATE_READING_H

#include <stdint.h>
#include <string.h>
#include <sys/uio.h>

#include "sinks/migrate/_line.h"
#include "sinks/migrate/_taking.h"

/* What is being read. */
struct dl_reading {
    unsigned char head[DL_FRAME_HEADER]; /* of this frame, as far as it has come */
    unsigned char next[DL_FRAME_HEADER]; /* of the one after it, which comes along with the end of this one */
    size_t have, after;
    unsigned char *payload;
    size_t length, got;
    int reads; /* whether `head` is complete, and its payload is being read */
    uint64_t sequence;
    unsigned char *headers;
    size_t frames, most;
    uint64_t nbytes;
    double began; /* the call */
    struct dl_least least;
};

/* Where a call may end, beside why a line did. */
#define DL_READ_PAUSE 0   /* enough for one call */
#define DL_READ_FOREIGN 1 /* a header for somebody else */
#define DL_READ_ODD 2     /* a frame that somebody else has to look at */

/* Whether a header is one of pages that is due, and its payload comes next; whatever is odd about it is for somebody
 * else to say. */
static inline int dl_read_header(struct dl_reading *r)
{
    const unsigned char *head = r->head;
    uint64_t length = dl_take_le(head + 12, 8);
    int kind = head[5];
    if (memcmp(head, "dlog", 4) || head[4] != DL_FRAME_VERSION || head[6] || head[7])
        return 0;
    if (dl_take_le(head + 8, 4) != (r->sequence & 0xFFFFFFFF))
        return 0;
    if (kind != DL_FRAME_ZEROS && ((kind != DL_FRAME_PAGES && kind != DL_FRAME_DELTAS) || length < DL_FRAME_PREFIX))
        return 0;
    if (length > (kind == DL_FRAME_ZEROS ? DL_FRAME_EXTENT * DL_FRAME_EXTENTS : DL_FRAME_MOST))
        return 0;
    r->reads = 1;
    r->length = (size_t)length;
    r->got = r->after = 0;
    return 1;
}

/* The checksum of the frame that has been read, as far as the first bytes of its payload. */
static inline uint32_t dl_read_sum(const struct dl_reading *r, size_t nbytes)
{
    uint32_t crc = dl_crc32(r->head, DL_FRAME_CHECKED, 0);
    return nbytes ? dl_crc32(r->payload, nbytes, crc) : crc;
}

static inline uint32_t dl_due_sum(const struct dl_reading *r)
{
    return (uint32_t)dl_take_le(r->head + DL_FRAME_CHECKED, 4);
}

/* Say what are the parts of the frame that has been read; 0: it is compressed, or its table does not fit it. */
static inline int dl_frame_parts(const struct dl_reading *r, struct dl_frame *f)
{
    *f = (struct dl_frame){.kind = r->head[5], .table = r->payload, .table_bytes = r->length};
    if (f->kind == DL_FRAME_ZEROS)
        return 1;
    size_t most = r->length - DL_FRAME_PREFIX;
    f->table += DL_FRAME_PREFIX;
    f->table_bytes = DL_FRAME_EXTENT * (size_t)dl_take_le(r->payload, 4);
    if (dl_take_le(r->payload + 4, 4) || f->table_bytes > most)
        return 0;
    f->data = f->table + f->table_bytes;
    f->nbytes = most - f->table_bytes;
    return 1;
}

/* The same of a frame whose checksum is right; 0: it is not. */
static inline int dl_checked_parts(const struct dl_reading *r, struct dl_frame *f)
{
    return dl_read_sum(r, r->length) == dl_due_sum(r) && dl_frame_parts(r, f);
}

/* Apply the frame that has been read; 0: it is for somebody else to say what is wrong with it. */
static inline int dl_take_reading(struct dl_taking *t, const struct dl_reading *r)
{
    struct dl_frame frame;
    struct dl_crc32_copied sum;
    if (r->head[5] != DL_FRAME_PAGES)
        return dl_checked_parts(r, &frame) && dl_take_frame(t, &frame) == DL_RIGHT;
    if (!dl_frame_parts(r, &frame) || dl_check_frame(t, &frame) != DL_RIGHT)
        return 0;
    dl_crc32_begin(&sum);
    sum.state = ~dl_read_sum(r, (size_t)(frame.data - r->payload));
    if (t->filled)
        dl_mark_rows(t, t->filled);
    dl_take_pages(t, frame.data, &sum);
    if (dl_crc32_end(&sum) != dl_due_sum(r)) {
        dl_take_back(t);
        return 0;
    }
    dl_frame_taken(t);
    return 1;
}

/* Receive and apply frames of pages, until so many bytes of pages have come, or something else has. */
static inline int dl_read_frames(int fd, struct dl_reading *r, struct dl_taking *t, int64_t enough,
                                 struct dl_patience *patience)
{
    for (;;) {
        struct iovec parts[2];
        int error;
        if (!r->reads) {
            parts[0].iov_base = r->head + r->have;
            parts[0].iov_len = DL_FRAME_HEADER - r->have;
            error = dl_line_move(fd, parts, 1, 0, patience, &r->least);
            r->have = DL_FRAME_HEADER - parts[0].iov_len;
            if (error)
                return error;
            if (!dl_read_header(r))
                return DL_READ_FOREIGN;
        }
        if (r->got < r->length) {
            parts[0].iov_base = r->payload + r->got;
            parts[0].iov_len = r->length - r->got;
            parts[1].iov_base = r->next;
            parts[1].iov_len = DL_FRAME_HEADER;
            error = dl_line_move(fd, parts, 2, 0, patience, &r->least);
            r->got = r->length - parts[0].iov_len;
            r->after = DL_FRAME_HEADER - parts[1].iov_len;
            if (error)
                return error;
        }
        if (!dl_take_reading(t, r))
            return DL_READ_ODD;
        memcpy(r->headers + DL_FRAME_HEADER * r->frames++, r->head, DL_FRAME_HEADER);
        r->nbytes += DL_FRAME_HEADER + r->length;
        r->sequence++;
        memcpy(r->head, r->next, DL_FRAME_HEADER);
        r->have = r->after;
        r->reads = 0;
        enough -= t->size;
        double now = dl_line_clock();
        dl_patience_begin(patience, now);
        if (enough <= 0 || r->frames == r->most || now - r->began > DL_LINE_LONGEST)
            return DL_READ_PAUSE;
    }
}

#endif /* DIRTYLOG_MIGRATE_READING_H */
