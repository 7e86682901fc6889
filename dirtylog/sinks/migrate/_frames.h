/* The pages of a migration as frames: what goes into them at one end, and what comes of them at the other. */
#ifndef DIRTYLOG_SINKS_FRAMES_H
#define DIRTYLOG_SINKS_FRAMES_H

#include <errno.h>
#include <poll.h>
#include <stdint.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <time.h>

#include "_bits/content.h"
#include "_bits/crc32.h"
#include "_bits/deltas.h"
#include "_bits/stream.h"
#include "dirtylog/bits.h"

/* The protocol's numbers, which docs/reference/migration-format.md explains. */
#define DL_FRAME_VERSION 3
#define DL_FRAME_CHECKED ((size_t)20) /* the header before its CRC */
#define DL_FRAME_HEADER ((size_t)24)
#define DL_FRAME_PREFIX ((size_t)8) /* number of extents, codec, zeros */
#define DL_FRAME_EXTENT ((size_t)16)
#define DL_FRAME_PAGES 3
#define DL_FRAME_ZEROS 4
#define DL_FRAME_DELTAS 13
#define DL_FRAME_EXTENTS ((size_t)4096)
/* The bytes that a frame may speak of, and those that it may hold. */
#define DL_FRAME_WINDOW ((size_t)1 << 20)
#define DL_FRAME_MOST (DL_FRAME_PREFIX + DL_FRAME_EXTENT * DL_FRAME_EXTENTS + DL_FRAME_WINDOW)

static inline void dl_put_le(unsigned char *out, uint64_t value, int nbytes)
{
    for (int i = 0; i < nbytes; i++)
        out[i] = (unsigned char)(value >> 8 * i);
}

static inline uint64_t dl_take_le(const unsigned char *data, int nbytes)
{
    uint64_t value = 0;
    for (int i = 0; i < nbytes; i++)
        value |= (uint64_t)data[i] << 8 * i;
    return value;
}

/* The header of a frame, of which `behind` bytes stand behind it already, and `apart` bytes follow whose CRC is known. */
static inline void dl_put_header(unsigned char *header, int kind, uint64_t sequence, size_t behind, uint32_t sum,
                                 size_t apart)
{
    memcpy(header, "dlog", 4);
    header[4] = DL_FRAME_VERSION;
    header[5] = (unsigned char)kind;
    header[6] = header[7] = 0;
    dl_put_le(header + 8, sequence, 4);
    dl_put_le(header + 12, behind + apart, 8);
    uint32_t crc = dl_crc32(header, DL_FRAME_CHECKED, 0);
    crc = dl_crc32(header + DL_FRAME_HEADER, behind, crc);
    if (apart)
        crc = dl_crc32_join(crc, sum, apart);
    dl_put_le(header + DL_FRAME_CHECKED, crc, 4);
}

/* ---- memory ---------------------------------------------------------------------------------------------------- */

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

/* ---- the sending end: pages sorted into tables and bytes ------------------------------------------------------- */

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

/* ---- a line ------------------------------------------------------------------------------------------------------ */

/* What a wait ends with, beside errno's. */
#define DL_LINE_LATE (-100001)   /* this frame took too long */
#define DL_LINE_OVER (-100002)   /* all of it did */
#define DL_LINE_SIGNAL (-100003) /* look whether anything raises, and go on */
#define DL_LINE_ENDED (-100004)

#ifndef MSG_NOSIGNAL
#define MSG_NOSIGNAL 0
#endif

static inline double dl_line_clock(void)
{
    struct timespec now;
    (void)clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

/* How long there may be waited: `each` for a frame, until `late` for this one, until `over` for all; 0: for ever. */
struct dl_patience {
    double each, late, over;
};

static inline void dl_patience_begin(struct dl_patience *patience, double now)
{
    patience->late = patience->each > 0 ? now + patience->each : 0;
}

/* Seconds after which a wait is looked at: it may not be wanted any more. */
#define DL_LINE_LOOK 0.1

/* Wait until the line may be ready, 0, or why not. */
static inline int dl_line_wait(int fd, short events, const struct dl_patience *patience)
{
    struct pollfd one = {.fd = fd, .events = events};
    double end = patience->late, left = DL_LINE_LOOK;
    if (patience->over > 0 && (!(end > 0) || patience->over < end))
        end = patience->over;
    if (end > 0) {
        left = end - dl_line_clock();
        if (left <= 0)
            return end == patience->over ? DL_LINE_OVER : DL_LINE_LATE;
    }
    int found = poll(&one, 1, left > DL_LINE_LOOK ? (int)(DL_LINE_LOOK * 1000) : (int)(left * 1000) + 1);
    if (found == 0)
        return DL_LINE_SIGNAL;
    return found < 0 ? (errno == EINTR ? DL_LINE_SIGNAL : -errno) : 0;
}

/* Whom a wait for bytes wakes: by default everybody whom one byte makes happy. */
struct dl_least {
    int now, before; /* 0: nothing has been changed */
};

/* Be woken when so many bytes are there, or no more will come, and not by every packet: to wake somebody takes as long as
 * it takes to receive it. */
static inline void dl_line_least(int fd, int nbytes, struct dl_least *least)
{
    socklen_t size = sizeof least->before;
    if (nbytes == least->now || (!least->now && getsockopt(fd, SOL_SOCKET, SO_RCVLOWAT, &least->before, &size)))
        return;
    if (setsockopt(fd, SOL_SOCKET, SO_RCVLOWAT, &nbytes, sizeof nbytes) == 0)
        least->now = nbytes;
}

/* Leave the socket as it was. */
static inline void dl_line_any(int fd, struct dl_least *least)
{
    if (least->now)
        dl_line_least(fd, least->before, least);
}

/* Move what is left of `parts` over the line: 0, or why not. What has moved is taken off them. With `least` a wait is for
 * all of the first one. */
static inline int dl_line_move(int fd, struct iovec *parts, int count, int sending, const struct dl_patience *patience,
                               struct dl_least *least)
{
    int first = 0;
    for (;;) {
        while (first < count && parts[first].iov_len == 0)
            first++;
        if (first == count)
            return 0;
        struct msghdr message = {.msg_iov = parts + first, .msg_iovlen = (size_t)(count - first)};
        ssize_t moved = sending ? sendmsg(fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL)
                                : recvmsg(fd, &message, MSG_DONTWAIT);
        if (moved < 0 && errno == EINTR)
            return DL_LINE_SIGNAL;
        if (moved < 0 && errno != EAGAIN && errno != EWOULDBLOCK)
            return -errno;
        if (moved == 0)
            return DL_LINE_ENDED;
        if (moved < 0) {
            if (least)
                dl_line_least(fd, (int)parts[0].iov_len, least);
            int error = dl_line_wait(fd, sending ? POLLOUT : POLLIN, patience);
            if (error)
                return error;
            continue;
        }
        for (int i = first; i < count && moved; i++) {
            size_t part = (size_t)moved < parts[i].iov_len ? (size_t)moved : parts[i].iov_len;
            parts[i].iov_base = (unsigned char *)parts[i].iov_base + part;
            parts[i].iov_len -= part;
            moved -= (ssize_t)part;
        }
        /* Of what is received the last part is read only along with the one before. */
        if (!sending && count == 2 && parts[0].iov_len == 0)
            return 0;
    }
}

/* ---- the receiving end ------------------------------------------------------------------------------------------- */

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

static inline int64_t dl_granules_of(const struct dl_taking *t)
{
    return (t->space.nbytes + t->granule - 1) / t->granule;
}

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

static inline int dl_has_page(const uint64_t *words, int64_t number)
{
    return (words[number / DL_WORD_PAGES] & dl_bit((size_t)number)) != 0;
}

static inline void dl_mark_rows(const struct dl_taking *t, uint64_t *words)
{
    for (size_t i = 0; i < t->count; i++)
        for (int64_t at = t->rows[2 * i]; at < t->rows[2 * i] + t->rows[2 * i + 1]; at += t->granule)
            words[at / t->granule / DL_WORD_PAGES] |= dl_bit((size_t)(at / t->granule));
}

/* Go on with each granule of the rows; within the loop `at` and `length` are its place, `place` its bytes. */
struct dl_granule {
    size_t row;
    int64_t within, at;
    size_t length, held;
    unsigned char *place;
};

static inline int dl_next_granule(const struct dl_taking *t, struct dl_granule *g)
{
    if (g->row < t->count && g->within == t->rows[2 * g->row + 1]) {
        g->row++;
        g->within = 0;
    }
    if (g->row == t->count)
        return 0;
    int64_t left = t->rows[2 * g->row + 1] - g->within;
    g->at = t->rows[2 * g->row] + g->within;
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
    if (g->row < t->count && g->within == t->rows[2 * g->row + 1]) {
        g->row++;
        g->within = 0;
    }
    if (g->row == t->count)
        return 0;
    int64_t left = t->rows[2 * g->row + 1] - g->within;
    g->at = t->rows[2 * g->row] + g->within;
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

/* Pages of a damaged frame lie in memory, and its table may be what is damaged: nobody knows where they lie. Of what this
 * channel carries nothing has come. What is not zero stays marked as that. */
static inline void dl_take_back(struct dl_taking *t)
{
    int64_t words = (dl_granules_of(t) + DL_WORD_PAGES - 1) / DL_WORD_PAGES, stripe = t->share.stripe / DL_WORD_PAGES;
    for (int64_t word = 0; word < words; word++)
        if (word / stripe % t->share.channels == t->share.index)
            t->seen[word] = 0;
    t->applied = 0;
}

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
/* Seconds after which a call ends with the frame under way. */
#define DL_READ_LONGEST 0.1

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
        if (enough <= 0 || r->frames == r->most || now - r->began > DL_READ_LONGEST)
            return DL_READ_PAUSE;
    }
}

#endif /* DIRTYLOG_SINKS_FRAMES_H */
