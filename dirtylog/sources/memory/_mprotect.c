/* Write protection by mprotect: a store faults, the SIGSEGV handler marks its page and opens it.
 *
 * One spin lock guards everything the handler reads, because nothing else may be waited for in a
 * signal handler. Its holders block all signals and touch no memory that could be tracked: the
 * engine's own statics, spans (which have pages of their own) and the stack. So a holder never
 * faults and is never interrupted on its own thread, and a handler that waits is let in soon.
 *
 * Under the lock, for each page of each span: it is write-protected, or its bit is set (I1). A store
 * through a page that another thread has just opened is therefore reported by the next harvest,
 * which cannot take the lock between the opening and the marking.
 *
 * Only whoever calls mprotect or mmap on tracked memory behind our back can make that untrue. So
 * before anything is reported or protected, the kernel's own list of mappings is asked (I6).
 */
#define _GNU_SOURCE
#include "_spans.h"

#include <errno.h>

#ifdef __linux__

#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "dirtylog/atomic.h"

#define BLOCK 512       /* pages opened at once when mappings run short */
#define CHUNK_WORDS 256 /* words taken under one hold of the lock */

static uint64_t held; /* the spin lock */
static struct dl_span *spans;
static uint64_t page_bytes, allowed_splits = 16384;
static unsigned forks;
static uint64_t closes; /* spans ever closed: a fault that raced with a close is tried again */
static int installed;
static struct sigaction previous;
static pthread_once_t once = PTHREAD_ONCE_INIT;

/* The last fault of this thread that belonged to no span. Initial-exec: a handler must not allocate. */
static __thread struct {
    uintptr_t address;
    uint64_t closes;
} stranger __attribute__((tls_model("initial-exec")));

static void spin_lock(void)
{
    while (dl_exchange(&held, 1))
        sched_yield();
}

static void spin_unlock(void) { dl_store_release(&held, 0); }

/* Outside the handler: a signal that came while the lock is held could store to tracked memory. */
static void lock_all(sigset_t *before)
{
    sigset_t every;

    sigfillset(&every);
    pthread_sigmask(SIG_SETMASK, &every, before);
    spin_lock();
}

static void unlock_all(const sigset_t *before)
{
    spin_unlock();
    pthread_sigmask(SIG_SETMASK, before, NULL);
}

/* The child keeps the handler and the spans: its inherited pages are still protected, and a store to
 * one must open it. Nobody may harvest them. The lock is not held across the fork, because the forking
 * thread then waits for malloc's locks, whose holder may be waiting in the handler. So it may be held by
 * a thread that the child does not have; whatever that one left half-done concerns which pages are
 * open, which resolve() does not rely on, and the list can be walked at any moment. */
static void after_fork_in_child(void)
{
    forks++;
    spin_unlock();
}

static void watch_forks(void) { pthread_atfork(NULL, NULL, after_fork_in_child); }

static int protect(uint64_t first, uint64_t end, int protection)
{
    void *start = (void *)(uintptr_t)(first * page_bytes);

    return mprotect(start, (end - first) * page_bytes, protection) < 0 ? -errno : 0;
}

static int is_open(const struct dl_span *span, uint64_t page)
{
    return page >= span->first && page < span->end &&
           (span->open[(page - span->first) / DL_WORD_PAGES] & dl_bit(page - span->first)) != 0;
}

static uint64_t all_splits(void)
{
    uint64_t splits = 0;

    for (const struct dl_span *span = spans; span; span = span->next)
        splits += span->splits;
    return splits;
}

/* Borders between open and protected pages: each is one mapping more. */
static uint64_t count_splits(const struct dl_span *span)
{
    uint64_t splits = 0, carry = 0;

    for (uint64_t i = 0; i < dl_words_for(span->end - span->first); i++) {
        splits += (uint64_t)__builtin_popcountll(span->open[i] ^ (span->open[i] << 1 | carry));
        carry = span->open[i] >> 63;
    }
    return splits;
}

/* Lock held. Make [first, end) writable and mark it in every span; `coarse`: more than was written. */
static int open_pages(uint64_t first, uint64_t end, int coarse)
{
    int error = protect(first, end, PROT_READ | PROT_WRITE);

    if (error)
        return error;
    for (struct dl_span *span = spans; span; span = span->next) {
        uint64_t from = first, to = end;

        if (!dl_span_clip(span, &from, &to))
            continue;
        if (to - from == 1 && !is_open(span, from))
            span->splits += 2 - 2 * (uint64_t)(is_open(span, from - 1) + is_open(span, from + 1));
        dl_words_set(span->open, from - span->first, to - span->first);
        dl_words_set(span->words, from - span->first, to - span->first);
        span->pending = 1;
        span->coarse |= coarse;
        if (to - from > 1)
            span->splits = count_splits(span);
    }
    return 0;
}

/* Lock held. 1: the store may go on; 0: not ours; -errno: ours, and the kernel refuses to open it. */
static int resolve(uint64_t page)
{
    struct dl_span *span = spans;
    int error;

    while (span && !(span->first <= page && page < span->end))
        span = span->next;
    if (!span)
        return 0;
    if (all_splits() < allowed_splits) {
        error = open_pages(page, page + 1, 0);
    } else {
        uint64_t first = page / BLOCK * BLOCK, end = first + BLOCK;

        (void)dl_span_clip(span, &first, &end);
        error = open_pages(first, end, 1);
    }
    /* Out of mappings all the same (the rest of the program has them): opening the whole span only
     * ever joins mappings. A handler that returned without opening anything would spin for ever. */
    if (error == -ENOMEM)
        error = open_pages(span->first, span->end, 1);
    return error ? error : 1;
}

static void chain(int number, siginfo_t *info, void *context)
{
    struct sigaction standard = {.sa_handler = SIG_DFL};

    if (previous.sa_flags & SA_SIGINFO) {
        previous.sa_sigaction(number, info, context);
    } else if (previous.sa_handler != SIG_DFL && previous.sa_handler != SIG_IGN) {
        previous.sa_handler(number);
    } else if (!(previous.sa_handler == SIG_IGN && info->si_code <= 0)) {
        /* The store is tried again and ends the process, as it would have without us. */
        sigaction(SIGSEGV, &standard, NULL);
        if (info->si_code <= 0)
            raise(SIGSEGV);
    }
}

static void on_fault(int number, siginfo_t *info, void *context)
{
    int error = errno, answer = 0, again = 0;

    if (info->si_code == SEGV_ACCERR) {
        uintptr_t address = (uintptr_t)info->si_addr;

        spin_lock();
        answer = resolve(address / page_bytes);
        /* A span that another thread closed between the fault and here has left its page open: try
         * once more. A fault that comes back with nothing closed in between is somebody else's. */
        again = answer == 0 && !(stranger.address == address && stranger.closes == closes);
        stranger.address = address;
        stranger.closes = closes;
        spin_unlock();
    }
    if (answer <= 0 && !again)
        chain(number, info, context);
    errno = error;
}

static int is_ours(const struct sigaction *now)
{
    return (now->sa_flags & SA_SIGINFO) && now->sa_sigaction == on_fault;
}

/* Lock held. 0, or -EBUSY where somebody has put another action in the handler's place. */
static int check_handler(struct dl_span *span)
{
    struct sigaction now;

    if (sigaction(SIGSEGV, NULL, &now) == 0 && is_ours(&now))
        return 0;
    /* Whatever is there now need not come back from a store. With all pages open and marked (I1) none
     * faults, and should the handler return, the next harvest reports them all (I6). */
    (void)open_pages(span->first, span->end, 1);
    return -EBUSY;
}

/* Lock held. The handler stays for good: a thread may have faulted on a page that a close has since
 * opened, and the signal that is on its way to it must still find the handler. */
static int install(void)
{
    struct sigaction ours = {.sa_sigaction = on_fault, .sa_flags = SA_SIGINFO | SA_ONSTACK}, now;

    if (sigaction(SIGSEGV, NULL, &now) < 0)
        return -errno;
    if (is_ours(&now))
        return 0;
    /* Whoever installed a handler over ours may call ours as its previous one; over it once more, the
     * two would call each other for ever. */
    if (installed && ((now.sa_flags & SA_SIGINFO) || (now.sa_handler != SIG_DFL && now.sa_handler != SIG_IGN)))
        return -EBUSY;
    sigfillset(&ours.sa_mask);
    previous = now;
    if (sigaction(SIGSEGV, &ours, NULL) < 0)
        return -errno;
    installed = 1;
    return 0;
}

/* Lock held. Protect the runs of `taken`, whose bit 0 is page `base`; what is protected is closed in
 * every span. The pages from the first failure on stay open. */
static int protect_runs(const uint64_t *taken, uint64_t nwords, uint64_t base)
{
    uint64_t page = 0, npages = nwords * DL_WORD_PAGES;

    while (page < npages) {
        uint64_t word = taken[page / DL_WORD_PAGES] & dl_mask_from((unsigned)(page % DL_WORD_PAGES)), first;
        int error;

        if (!word) {
            page = (page / DL_WORD_PAGES + 1) * DL_WORD_PAGES;
            continue;
        }
        first = page / DL_WORD_PAGES * DL_WORD_PAGES + dl_ffs(word);
        page = first + 1;
        while (page < npages && (taken[page / DL_WORD_PAGES] & dl_bit(page)))
            page++;
        error = protect(base + first, base + page, PROT_READ);
        if (error)
            return error;
        for (struct dl_span *span = spans; span; span = span->next) {
            uint64_t from = base + first, to = base + page;

            if (dl_span_clip(span, &from, &to))
                dl_words_clear(span->open, from - span->first, to - span->first);
        }
    }
    return 0;
}

static int all_open(const struct dl_span *span, uint64_t first, uint64_t end)
{
    for (uint64_t page = first; page < end;) {
        uint64_t at = page - span->first, stop = page - at % DL_WORD_PAGES + DL_WORD_PAGES;
        uint64_t mask = dl_mask_from((unsigned)(at % DL_WORD_PAGES));

        if (stop > end) {
            stop = end;
            mask &= dl_mask_below((unsigned)((end - 1 - span->first) % DL_WORD_PAGES) + 1);
        }
        if (mask & ~span->open[at / DL_WORD_PAGES])
            return 0;
        page = stop;
    }
    return 1;
}

/* Lock held. Pages that are not mapped as we left them: who believed any of them protected reports all. */
static void distrust(uint64_t first, uint64_t end)
{
    for (struct dl_span *span = spans; span; span = span->next) {
        uint64_t from = first, to = end;

        if (!dl_span_clip(span, &from, &to) || all_open(span, from, to))
            continue;
        dl_words_set(span->words, 0, span->end - span->first);
        dl_words_set(span->open, 0, span->end - span->first);
        span->splits = 0;
        span->pending = span->coarse = 1;
    }
}

/* Lock held: no mapping of ours changes meanwhile. What a span has protected must be mapped "r--": memory
 * that was replaced, or given other permissions, is not, and stores to it have raised no fault. Where
 * the kernel does not tell, nothing can be vouched for. One line a mapping: "start-end rwxp ...". */
static void check_mappings(void)
{
    char text[2048], permissions[3] = "";
    uint64_t bounds[2] = {0, 0};
    unsigned field = 0, letters = 0;
    ssize_t size = -1;
    uint64_t lines = 0;
    /* Not "self": its memory is gone once the process's first thread has ended. */
    int file = open("/proc/thread-self/maps", O_RDONLY | O_CLOEXEC);

    while (file >= 0 && (size = read(file, text, sizeof text)) > 0) {
        for (ssize_t i = 0; i < size; i++) {
            char c = text[i];

            if (c == '\n') {
                if (permissions[0] != 'r' || permissions[1] != '-' || permissions[2] != '-')
                    distrust(bounds[0] / page_bytes, bounds[1] / page_bytes);
                bounds[0] = bounds[1] = 0;
                field = letters = 0;
                lines++;
            } else if (field < 2 && (c == '-' || c == ' ')) {
                field++;
            } else if (field < 2) {
                bounds[field] = bounds[field] << 4 | (uint64_t)(c <= '9' ? c - '0' : c - 'a' + 10);
            } else if (field == 2 && letters < sizeof permissions) {
                permissions[letters++] = c;
            } else {
                field = 3;
            }
        }
    }
    if (file >= 0)
        close(file);
    if (size < 0 || lines == 0)
        distrust(0, UINT64_MAX);
}

static int mprotect_collect(struct dl_span *span, uint64_t *words, int take)
{
    uint64_t chunk[CHUNK_WORDS], nwords = dl_words_for(span->end - span->first), seen = 0;
    int error, coarse;
    sigset_t mask;

    lock_all(&mask);
    if (span->generation != forks)
        error = -ECHILD;
    else if (span->dead)
        error = -span->dead;
    else
        error = dl_span_whole(span, page_bytes);
    if (error == -ENOMEM)
        span->dead = ENOMEM;
    if (!error)
        error = check_handler(span);
    if (!error)
        check_mappings();
    coarse = span->coarse;
    if (error || !span->pending) {
        unlock_all(&mask);
        return error;
    }
    if (take)
        span->pending = span->coarse = 0;
    unlock_all(&mask);

    for (uint64_t at = 0; at < nwords; at += CHUNK_WORDS) {
        uint64_t size = nwords - at < CHUNK_WORDS ? nwords - at : CHUNK_WORDS;

        lock_all(&mask);
        /* A close between two holds of the lock has opened the pages for good: protected again, with no
         * span left that knows them, they would end the process at the next store. */
        if (span->dead) {
            error = -span->dead;
            unlock_all(&mask);
            return error;
        }
        memcpy(chunk, span->words + at, size * sizeof(*chunk));
        if (take && protect_runs(chunk, size, span->first + at * DL_WORD_PAGES) == 0) {
            memset(span->words + at, 0, size * sizeof(*chunk));
        } else if (take) {
            /* No mapping is left to protect with: what stays open stays marked (I1), and is reported
             * again until the system lets us protect it. */
            span->pending = coarse = 1;
        }
        unlock_all(&mask);
        /* The caller's words may share a page with a tracked buffer: outside the lock. */
        for (uint64_t i = 0; i < size; i++) {
            seen |= chunk[i];
            words[at + i] |= chunk[i];
        }
    }
    if (take) {
        lock_all(&mask);
        for (struct dl_span *other = spans; other; other = other->next)
            other->splits = count_splits(other);
        unlock_all(&mask);
    }
    return coarse ? DL_LOST : seen ? DL_DIRTY : DL_CLEAN;
}

/* Lock held. */
static void forget(struct dl_span *span)
{
    uint64_t at = span->first, first, end;

    while (dl_span_alone(spans, span, at, &first, &end)) {
        /* Memory that was unmapped meanwhile needs no opening. */
        (void)protect(first, end, PROT_READ | PROT_WRITE);
        at = end;
    }
    dl_span_unlink(&spans, span);
    closes++;
}

static int mprotect_open(struct dl_span *span, uint64_t page_size, enum dl_step *step)
{
    sigset_t mask;
    int error;

    pthread_once(&once, watch_forks);
    lock_all(&mask);
    page_bytes = page_size;
    span->generation = forks;
    *step = DL_STEP_SIGACTION;
    error = install();
    if (!error) {
        *step = DL_STEP_PROTECT;
        /* Protecting it wipes out what tells the others that their memory was replaced. */
        if (spans)
            check_mappings();
        dl_span_link(&spans, span);
        error = protect(span->first, span->end, PROT_READ);
        if (error) {
            forget(span);
        } else {
            /* The others' open pages in this range are protected again; their bits stay set. */
            for (struct dl_span *other = spans; other; other = other->next) {
                uint64_t first = span->first, end = span->end;

                if (dl_span_clip(other, &first, &end))
                    dl_words_clear(other->open, first - other->first, end - other->first);
                other->splits = count_splits(other);
            }
            *step = DL_STEP_NONE;
        }
    }
    unlock_all(&mask);
    return error;
}

static void mprotect_close(struct dl_span *span)
{
    sigset_t mask;

    lock_all(&mask);
    if (span->dead != EBADF)
        forget(span);
    span->dead = EBADF;
    unlock_all(&mask);
}

static int mprotect_count(void)
{
    sigset_t mask;
    int count = 0;

    lock_all(&mask);
    for (struct dl_span *span = spans; span; span = span->next)
        count++;
    unlock_all(&mask);
    return count;
}

int dl_mprotect_covers(uint64_t first, uint64_t end)
{
    struct dl_span hole = {.first = first, .end = end};
    uint64_t from, to;
    sigset_t mask;
    int covered;

    lock_all(&mask);
    covered = !dl_span_alone(spans, &hole, first, &from, &to);
    unlock_all(&mask);
    return covered;
}

void dl_mprotect_allow_splits(uint64_t splits)
{
    sigset_t mask;

    lock_all(&mask);
    allowed_splits = splits;
    unlock_all(&mask);
}

/* A page of its own is tracked and written; the handler must mark it. */
int dl_mprotect_probe(enum dl_step *step)
{
    uint64_t size = (uint64_t)sysconf(_SC_PAGESIZE), word = 0;
    volatile char *page = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    struct dl_span *span;
    int error;

    *step = DL_STEP_PROTECT;
    if (page == MAP_FAILED)
        return -errno;
    span = dl_span_new((uint64_t)(uintptr_t)page / size, 1);
    if (!span) {
        error = -errno;
    } else {
        error = mprotect_open(span, size, step);
        if (!error) {
            page[0] = 1;
            error = mprotect_collect(span, &word, 1);
            error = error < 0 ? error : word == 1 ? 0 : -EIO;
            mprotect_close(span);
        }
        dl_span_free(span);
    }
    munmap((void *)page, size);
    return error;
}

#else /* mprotect exists elsewhere, but which signal and code a fault brings differs */

static int mprotect_open(struct dl_span *span, uint64_t page_size, enum dl_step *step)
{
    *step = DL_STEP_PROTECT;
    return -ENOSYS;
}

static void mprotect_close(struct dl_span *span) {}
static int mprotect_collect(struct dl_span *span, uint64_t *words, int take) { return -ENOSYS; }
static int mprotect_count(void) { return 0; }
int dl_mprotect_covers(uint64_t first, uint64_t end) { return 0; }
void dl_mprotect_allow_splits(uint64_t splits) {}

int dl_mprotect_probe(enum dl_step *step)
{
    *step = DL_STEP_PROTECT;
    return -ENOSYS;
}

#endif

const struct dl_engine dl_mprotect_engine = {mprotect_open, mprotect_close, mprotect_collect, mprotect_count};
