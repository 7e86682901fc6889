/* Memory that is used while it fills: a fault is a request on the line, and what comes is put in place, without the GIL.
 *
 * One thread per migration reads the faults and the line. It holds no lock of Python's: a thread that waits for a page
 * may hold the GIL. A page that is there is never written again: since it came it is the program's.
 */
#ifndef DIRTYLOG_MIGRATE_POSTCOPY_H
#define DIRTYLOG_MIGRATE_POSTCOPY_H

#include <pthread.h>
#include <signal.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "sinks/migrate/_guard.h"
#include "sinks/migrate/_reading.h"

#define DL_FRAME_WANT 16
#define DL_FRAME_FILLED 17
#define DL_FRAME_SESSION ((size_t)16)

/* Requests that are on their way to the line at most; of more, the faults wait in the kernel. */
#define DL_WANTED_AT_ONCE ((size_t)1024)
#define DL_WANT_BYTES (DL_FRAME_HEADER + DL_FRAME_EXTENT)
#define DL_FAULTS_AT_ONCE 16

/* What a wait for the end may answer, beside why the line ended (negative). */
#define DL_POSTCOPY_GOES_ON 0
#define DL_POSTCOPY_FILLED 1
#define DL_POSTCOPY_ODD (-100010) /* what came is not what was due */

struct dl_postcopy_line {
    int fd;
    uint64_t received, sent; /* numbers of the next frames */
    double patience;         /* seconds of silence; 0: any */
};

struct dl_postcopy {
    /* Set before the thread begins. */
    struct dl_taking taking; /* the memory; tables of extents are checked as always */
    struct dl_guard guard;
    uint64_t *asked; /* of what is missing: what has been asked for on this line */
    unsigned char session[DL_FRAME_SESSION];
    int bell;
    pthread_t thread;
    int started;
    /* Shared: under the lock. */
    pthread_mutex_t lock;
    pthread_cond_t moved;
    struct dl_postcopy_line next;
    int has_next, stop, why, filled, runs;
    int64_t left;     /* granules that are missing */
    uint64_t applied; /* frames since the switch */
    /* The thread's own. */
    struct dl_postcopy_line line;
    struct dl_reading reading;
    double heard;
    unsigned char out[DL_WANTED_AT_ONCE * DL_WANT_BYTES];
    size_t used, gone;
};

/* 0, or -errno: nothing is guarded then. */
static inline int dl_postcopy_guard(struct dl_postcopy *p)
{
    p->bell = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (p->bell < 0)
        return -errno;
    int error = dl_guard_open(&p->guard);
    if (error) {
        close(p->bell);
        p->bell = -1;
    }
    return error;
}

/* Nothing is missing any more, or nobody has seen the memory. */
static inline void dl_postcopy_unguard(struct dl_postcopy *p)
{
    if (p->guard.uffd < 0)
        return;
    dl_guard_close(&p->guard);
    close(p->bell);
    p->bell = -1;
}

/* ---- requests ---------------------------------------------------------------------------------------------------- */

static inline void dl_postcopy_say(struct dl_postcopy *p, int kind, const unsigned char *data, size_t nbytes)
{
    unsigned char *header = p->out + p->used;
    memcpy(header + DL_FRAME_HEADER, data, nbytes);
    dl_put_header(header, kind, p->line.sent++, nbytes, 0, 0);
    p->used += DL_FRAME_HEADER + nbytes;
}

static inline int dl_postcopy_has_room(const struct dl_postcopy *p)
{
    /* One stays free for the last word. */
    return p->used + (DL_FAULTS_AT_ONCE + 1) * DL_WANT_BYTES <= sizeof p->out;
}

static inline void dl_postcopy_fault(struct dl_postcopy *p, uint64_t address)
{
    const struct dl_guard *g = &p->guard;
    int64_t number = dl_guard_granule(g, address);
    if (number < 0)
        return;
    if (!dl_has_page(g->missing, number)) {
        dl_guard_zero(g, address);
        return;
    }
    if (dl_has_page(p->asked, number))
        return;
    dl_add_page(p->asked, number);
    if (p->line.fd >= 0) {
        unsigned char extent[DL_FRAME_EXTENT];
        int64_t offset = number * g->granule, length = g->space.nbytes - offset;
        dl_put_le(extent, (uint64_t)offset, 8);
        dl_put_le(extent + 8, (uint64_t)(length < g->granule ? length : g->granule), 8);
        dl_postcopy_say(p, DL_FRAME_WANT, extent, sizeof extent);
    }
}

static inline void dl_postcopy_faults(struct dl_postcopy *p)
{
    struct uffd_msg messages[DL_FAULTS_AT_ONCE];
    ssize_t got = read(p->guard.uffd, messages, sizeof messages);
    for (ssize_t i = 0; i < got / (ssize_t)sizeof messages[0]; i++)
        if (messages[i].event == UFFD_EVENT_PAGEFAULT)
            dl_postcopy_fault(p, messages[i].arg.pagefault.address);
}

/* On another line nothing has been asked for: who waits faults again. */
static inline void dl_postcopy_rouse(struct dl_postcopy *p)
{
    struct dl_taking *t = &p->taking;
    struct dl_granule g = {0};
    int64_t granules = dl_granules_of(&t->space, t->granule);
    for (int64_t word = 0; word * DL_WORD_PAGES < granules; word++)
        while (p->asked[word]) {
            int64_t number = word * DL_WORD_PAGES + __builtin_ctzll(p->asked[word]);
            dl_drop_page(p->asked, number);
            t->rows[0] = number * t->granule;
            t->rows[1] = t->granule;
            t->count = 1;
            g = (struct dl_granule){0};
            if (dl_next_granule(t, &g) && g.held)
                dl_guard_wake(&p->guard, (uint64_t)(uintptr_t)g.place, dl_page_up(&p->guard, g.held));
        }
}

/* ---- what comes -------------------------------------------------------------------------------------------------- */

static inline void dl_postcopy_came(struct dl_postcopy *p, int64_t number)
{
    dl_drop_page(p->guard.missing, number);
    dl_drop_page(p->asked, number);
    pthread_mutex_lock(&p->lock);
    p->left--;
    pthread_mutex_unlock(&p->lock);
}

static inline int dl_postcopy_granule(struct dl_postcopy *p, const struct dl_granule *g, const unsigned char *from)
{
    struct dl_taking *t = &p->taking;
    size_t whole = dl_page_up(&p->guard, g->held);
    if (from && whole != g->held) {
        /* The end of the memory, or of an array: the rest of its last page is zeros. */
        memcpy(t->scratch, from, g->held);
        memset(t->scratch + g->held, 0, whole - g->held);
        from = t->scratch;
    }
    return dl_guard_place(&p->guard, g->place, from, whole);
}

/* Apply a frame: DL_RIGHT, what is wrong with it, or -errno. */
static inline int dl_postcopy_apply(struct dl_postcopy *p, const struct dl_frame *f)
{
    struct dl_taking *t = &p->taking;
    t->left = INT64_MAX;
    int wrong = dl_check_frame(t, f);
    if (wrong)
        return wrong;
    struct dl_granule g = {0};
    const unsigned char *data = f->data;
    while (dl_next_granule(t, &g)) {
        const unsigned char *from = data; /* NULL: zeros */
        int64_t number = g.at / t->granule;
        if (from)
            data += g.length;
        if (!dl_has_page(p->guard.missing, number))
            continue;
        int error = g.held ? dl_postcopy_granule(p, &g, from) : 0;
        if (error)
            return error;
        dl_postcopy_came(p, number);
    }
    pthread_mutex_lock(&p->lock);
    p->applied++;
    pthread_mutex_unlock(&p->lock);
    return DL_RIGHT;
}

static inline int dl_postcopy_frame(struct dl_postcopy *p)
{
    struct dl_frame frame;
    if (!dl_checked_parts(&p->reading, &frame) || frame.kind == DL_FRAME_DELTAS)
        return DL_POSTCOPY_ODD;
    int wrong = dl_postcopy_apply(p, &frame);
    return wrong > 0 ? DL_POSTCOPY_ODD : wrong;
}

/* Read what there is; 0, or why the line is of no use any more. */
static inline int dl_postcopy_read(struct dl_postcopy *p)
{
    struct dl_reading *r = &p->reading;
    for (;;) {
        unsigned char *to = r->reads ? r->payload + r->got : r->head + r->have;
        size_t due = r->reads ? r->length - r->got : DL_FRAME_HEADER - r->have;
        if (due) {
            ssize_t got = recv(p->line.fd, to, due, MSG_DONTWAIT);
            if (got < 0 && errno == EINTR)
                continue;
            if (got < 0)
                return errno == EAGAIN || errno == EWOULDBLOCK ? 0 : -errno;
            if (got == 0)
                return DL_LINE_ENDED;
            *(r->reads ? &r->got : &r->have) += (size_t)got;
            if ((size_t)got < due)
                continue;
        }
        if (!r->reads) {
            if (!dl_read_header(r))
                return DL_POSTCOPY_ODD;
            continue;
        }
        int error = dl_postcopy_frame(p);
        if (error)
            return error;
        r->sequence++;
        r->have = 0;
        r->reads = 0;
        p->heard = dl_line_clock();
        /* Between two frames the faults. */
        return 0;
    }
}

static inline int dl_postcopy_write(struct dl_postcopy *p)
{
    while (p->gone < p->used) {
        ssize_t went = send(p->line.fd, p->out + p->gone, p->used - p->gone, MSG_DONTWAIT | MSG_NOSIGNAL);
        if (went < 0 && errno == EINTR)
            continue;
        if (went < 0)
            return errno == EAGAIN || errno == EWOULDBLOCK ? 0 : -errno;
        p->gone += (size_t)went;
    }
    p->gone = p->used = 0;
    return 0;
}

/* ---- the thread -------------------------------------------------------------------------------------------------- */

static inline void dl_postcopy_ended(struct dl_postcopy *p, int why)
{
    p->line.fd = -1;
    p->used = p->gone = 0;
    pthread_mutex_lock(&p->lock);
    p->why = why;
    pthread_cond_broadcast(&p->moved);
    pthread_mutex_unlock(&p->lock);
}

/* Whether to stop; takes another line where there is one. */
static inline int dl_postcopy_rung(struct dl_postcopy *p)
{
    uint64_t rings;
    int stop, another;
    (void)!read(p->bell, &rings, sizeof rings);
    pthread_mutex_lock(&p->lock);
    stop = p->stop;
    another = p->has_next;
    p->has_next = 0;
    if (another)
        p->line = p->next;
    pthread_mutex_unlock(&p->lock);
    if (another && !stop) {
        p->used = p->gone = 0;
        p->reading.have = 0;
        p->reading.reads = 0;
        p->reading.sequence = p->line.received;
        p->heard = dl_line_clock();
        dl_postcopy_rouse(p);
    }
    return stop;
}

/* The last word goes as far as the line takes it in time: whoever misses it asks. */
static inline void dl_postcopy_end(struct dl_postcopy *p)
{
    struct dl_patience patience = {.each = p->line.patience > 0 ? p->line.patience : 30};
    if (p->line.fd >= 0) {
        dl_postcopy_say(p, DL_FRAME_FILLED, p->session, DL_FRAME_SESSION);
        struct iovec part = {p->out + p->gone, p->used - p->gone};
        dl_patience_begin(&patience, dl_line_clock());
        while (dl_line_move(p->line.fd, &part, 1, 1, &patience, NULL) == DL_LINE_SIGNAL)
            ;
    }
    pthread_mutex_lock(&p->lock);
    p->filled = 1;
    pthread_cond_broadcast(&p->moved);
    pthread_mutex_unlock(&p->lock);
}

static void *dl_postcopy_run(void *argument)
{
    struct dl_postcopy *p = argument;
    pthread_mutex_lock(&p->lock);
    p->runs = 1;
    pthread_cond_broadcast(&p->moved);
    pthread_mutex_unlock(&p->lock);
    while (p->left) {
        struct pollfd ready[3] = {
            {.fd = p->bell, .events = POLLIN},
            {.fd = dl_postcopy_has_room(p) ? p->guard.uffd : -1, .events = POLLIN},
            {.fd = p->line.fd, .events = (short)(POLLIN | (p->gone < p->used ? POLLOUT : 0))},
        };
        double left = 3600;
        int error = 0;
        if (p->line.fd >= 0 && p->line.patience > 0)
            left = p->heard + p->line.patience - dl_line_clock();
        if (left <= 0) {
            dl_postcopy_ended(p, DL_LINE_LATE);
            continue;
        }
        if (poll(ready, 3, (int)(left < 3600 ? left * 1000 : 3600000) + 1) < 0)
            continue;
        if (ready[0].revents && dl_postcopy_rung(p))
            return NULL;
        if (ready[1].revents)
            dl_postcopy_faults(p);
        if (p->line.fd < 0)
            continue;
        error = dl_postcopy_write(p);
        if (!error && p->line.fd == ready[2].fd && (ready[2].revents & ~POLLOUT))
            error = dl_postcopy_read(p);
        if (error)
            dl_postcopy_ended(p, error);
    }
    dl_postcopy_end(p);
    return NULL;
}

/* 0, or -errno. No signal of the program's is handled in it. Its own faults are not blocked, and it has begun when this
 * returns, since a thread that begins blocks them: whoever looks for one that a store to protected memory would end, as
 * a tracker does, finds none. */
static inline int dl_postcopy_start(struct dl_postcopy *p)
{
    sigset_t all, before;
    int error;
    sigfillset(&all);
    sigdelset(&all, SIGSEGV);
    sigdelset(&all, SIGBUS);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    error = pthread_create(&p->thread, NULL, dl_postcopy_run, p);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    p->started = !error;
    pthread_mutex_lock(&p->lock);
    while (!error && !p->runs)
        pthread_cond_wait(&p->moved, &p->lock);
    pthread_mutex_unlock(&p->lock);
    return -error;
}

static inline void dl_postcopy_ring(struct dl_postcopy *p)
{
    uint64_t one = 1;
    (void)!write(p->bell, &one, sizeof one);
}

static inline void dl_postcopy_take_line(struct dl_postcopy *p, const struct dl_postcopy_line *line)
{
    pthread_mutex_lock(&p->lock);
    p->next = *line;
    p->has_next = 1;
    p->why = 0;
    dl_postcopy_ring(p);
    pthread_mutex_unlock(&p->lock);
}

/* Ends the thread, which holds the line; what is missing stays guarded. */
static inline void dl_postcopy_stop(struct dl_postcopy *p)
{
    if (!p->started)
        return;
    pthread_mutex_lock(&p->lock);
    p->stop = 1;
    dl_postcopy_ring(p);
    pthread_mutex_unlock(&p->lock);
    pthread_join(p->thread, NULL);
    p->started = 0;
}

/* Answer no more, for good. The guard's descriptor stays open, if there is one: whoever waits goes on waiting. */
static inline void dl_postcopy_leave(struct dl_postcopy *p)
{
    dl_postcopy_stop(p);
    if (p->bell >= 0)
        close(p->bell);
    pthread_cond_destroy(&p->moved);
    pthread_mutex_destroy(&p->lock);
}

/* Wait so many seconds for the end of all, or of the line. */
static inline int dl_postcopy_wait(struct dl_postcopy *p, double seconds)
{
    struct timespec until;
    int answer;
    (void)clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_sec += (time_t)seconds;
    until.tv_nsec += (long)((seconds - (double)(time_t)seconds) * 1e9);
    if (until.tv_nsec >= 1000000000) {
        until.tv_sec++;
        until.tv_nsec -= 1000000000;
    }
    pthread_mutex_lock(&p->lock);
    while (!p->filled && !p->why && pthread_cond_timedwait(&p->moved, &p->lock, &until) == 0)
        ;
    answer = p->filled ? DL_POSTCOPY_FILLED : p->why;
    pthread_mutex_unlock(&p->lock);
    return answer;
}

static inline int64_t dl_postcopy_left(struct dl_postcopy *p)
{
    pthread_mutex_lock(&p->lock);
    int64_t left = p->left;
    pthread_mutex_unlock(&p->lock);
    return left;
}

static inline uint64_t dl_postcopy_applied(struct dl_postcopy *p)
{
    pthread_mutex_lock(&p->lock);
    uint64_t applied = p->applied;
    pthread_mutex_unlock(&p->lock);
    return applied;
}

static inline void dl_postcopy_init(struct dl_postcopy *p)
{
    pthread_condattr_t monotonic;
    dl_guard_init(&p->guard);
    p->bell = p->line.fd = -1;
    pthread_mutex_init(&p->lock, NULL);
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_cond_init(&p->moved, &monotonic);
    pthread_condattr_destroy(&monotonic);
}

#endif /* DIRTYLOG_MIGRATE_POSTCOPY_H */
