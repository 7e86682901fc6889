/* Bytes over a socket, in the time that there is for them. */
#ifndef DIRTYLOG_MIGRATE_LINE_H
#define DIRTYLOG_MIGRATE_LINE_H

#include <errno.h>
#include <poll.h>
#include <stddef.h>
#include <sys/socket.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <time.h>

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
/* Seconds after which a call ends with the frame under way. */
#define DL_LINE_LONGEST 0.1

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

/* For how many bytes a wait on a socket is; by default one byte ends it. */
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

#endif /* DIRTYLOG_MIGRATE_LINE_H */
