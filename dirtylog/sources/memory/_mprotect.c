/* Write protection by mprotect: a store faults, the SIGSEGV handler marks its page and opens it.
 *
 * One spin lock guards everything the handler reads, because nothing else may be waited for in a
 * signal handler. Its holders block all signals and touch no memory that could be tracked: the
 * engine's own statics, spans and their index (which have pages of their own) and the stack. So a holder
 * never faults and is never interrupted on its own thread, and a handler that waits is let in soon.
 *
 * Under the lock, for each page of each span: it is write-protected, or its bit is set (I1). A store
 * through a page that another thread has just opened is therefore reported by the next harvest,
 * which cannot take the lock between the opening and the marking.
 *
 * Only whoever calls mprotect, mmap, mremap or madvise on tracked memory behind our back can make that
 * untrue. So before anything is reported or protected, the kernel is asked how the memory is mapped, and
 * which of its pages have become empty (I6).
 *
 * formal/models/protect.pml is this file's model.
 */
#define _GNU_SOURCE
#include "_faults.h"
#include "_maps.h"
#include "_registry.h"

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
#include "sources/_pagemap.h"

#define BLOCK 512       /* pages opened at once when mappings run short */
#define CHUNK_WORDS 256 /* words taken under one hold of the lock */

#define EMPTIES 128     /* runs of empty pages that the kernel tells at once */
#define STRETCH 65536   /* pages that it looks at under one hold of the lock */

static uint64_t held; /* the spin lock */
static struct dl_registry registry;
static uint64_t page_bytes, allowed_splits = 16384;
static uint64_t splits; /* of all spans */
static uint64_t changes; /* times that pages were protected, or left by their last span */
static unsigned forks;
static pthread_once_t once = PTHREAD_ONCE_INIT;

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

/* Borders between open and protected pages: each is one mapping more. */
static void count_splits(struct dl_span *span)
{
    uint64_t carry = 0;

    splits -= span->splits;
    span->splits = 0;
    for (uint64_t i = 0; i < dl_words_for(span->end - span->first); i++) {
        span->splits += (uint64_t)__builtin_popcountll(span->open[i] ^ (span->open[i] << 1 | carry));
        carry = span->open[i] >> 63;
    }
    splits += span->splits;
}

/* Lock held. Make [first, end) writable and mark it in every span; `coarse`: more than was written. */
static int open_pages(uint64_t first, uint64_t end, int coarse)
{
    int error = protect(first, end, PROT_READ | PROT_WRITE);
    struct dl_span *span;

    if (error)
        return error;
    DL_EACH_SPAN (span, &registry, first, end) {
        uint64_t from = first, to = end, more = 0;

        (void)dl_span_clip(span, &from, &to);
        if (to - from == 1 && !is_open(span, from))
            more = 2 - 2 * (uint64_t)(is_open(span, from - 1) + is_open(span, from + 1));
        dl_words_set(span->open, from - span->first, to - span->first);
        dl_words_clear(span->empty, from - span->first, to - span->first);
        dl_span_mark(span, from, to);
        span->coarse |= coarse;
        if (to - from > 1)
            count_splits(span);
        span->splits += more;
        splits += more;
    }
    return 0;
}

/* Lock held. */
static int resolve(uint64_t page)
{
    uint64_t at = 0;
    struct dl_span *span = dl_registry_next(&registry, &at, page, page + 1);
    int error, was_open;

    if (!span)
        return DL_FAULT_FOREIGN;
    was_open = is_open(span, page);
    if (splits < allowed_splits) {
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
    return error ? error : was_open ? DL_FAULT_WAS_OPEN : DL_FAULT_OPENED;
}

int dl_mprotect_fault(uintptr_t address, uint64_t *seen)
{
    int fault;

    spin_lock();
    fault = resolve(address / page_bytes);
    *seen = changes;
    spin_unlock();
    return fault;
}

/* Lock held. 0, or -EBUSY where somebody has put another action in the handler's place. */
static int check_handler(struct dl_span *span)
{
    if (dl_faults_installed())
        return 0;
    /* Whatever is there now need not come back from a store. With all pages open and marked (I1) none
     * faults, and should the handler return, the next harvest reports them all (I6). */
    (void)open_pages(span->first, span->end, 1);
    return -EBUSY;
}

/* Lock held. Protect the runs of `taken`, whose bit 0 is page `base`; what is protected is closed in
 * every span. The pages from the first failure on stay open. */
static int protect_runs(const uint64_t *taken, uint64_t nwords, uint64_t base)
{
    uint64_t page = 0, npages = nwords * DL_WORD_PAGES;

    changes++;
    while (page < npages) {
        uint64_t word = taken[page / DL_WORD_PAGES] & dl_mask_from((unsigned)(page % DL_WORD_PAGES)), first;
        struct dl_span *span;
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
        DL_EACH_SPAN (span, &registry, base + first, base + page) {
            uint64_t from = base + first, to = base + page;

            (void)dl_span_clip(span, &from, &to);
            dl_words_clear(span->open, from - span->first, to - span->first);
        }
    }
    return 0;
}

static int all_open(const struct dl_span *span, uint64_t first, uint64_t end)
{
    struct dl_part part = dl_part_first(first - span->first, end - span->first);

    while (part.mask && !(part.mask & ~span->open[part.word]))
        dl_part_next(&part);
    return !part.mask;
}

/* Lock held. Pages that are not mapped as we left them: who believed any of them protected reports all. */
static void distrust(uint64_t first, uint64_t end)
{
    struct dl_span *span;

    DL_EACH_SPAN (span, &registry, first, end) {
        uint64_t from = first, to = end;

        (void)dl_span_clip(span, &from, &to);
        if (all_open(span, from, to))
            continue;
        dl_words_set(span->words, 0, span->end - span->first);
        dl_words_set(span->open, 0, span->end - span->first);
        splits -= span->splits;
        span->splits = 0;
        span->pending = span->coarse = 1;
    }
}

/* What a span has protected must be mapped "r--": memory that was replaced, or given other permissions,
 * is not, and stores to it have raised no fault. */
static int check_mapping(const struct dl_mapping *mapping, const char *name, void *context)
{
    if (memcmp(mapping->permissions, "r--", 3) != 0)
        distrust(mapping->start / page_bytes, mapping->end / page_bytes);
    return 0;
}

static int is_shared(const struct dl_mapping *mapping, const char *name, void *context)
{
    return mapping->permissions[3] != 'p';
}

/* Lock held. Pages of tracked memory that are gone may have been moved onto other tracked pages, which
 * are mapped "r--" then as if they were those: nobody's pages can be trusted. One call for each stretch
 * of neighbouring spans. */
static void check_neighbours(void)
{
    const struct dl_index *index = registry.now;

    for (uint64_t i = 0, next; i < index->count; i = next) {
        struct dl_span stretch = {.first = index->entries[i].first, .end = index->entries[i].end};

        for (next = i + 1; next < index->count && index->entries[next].first <= stretch.end; next++)
            if (index->entries[next].end > stretch.end)
                stretch.end = index->entries[next].end;
        if (dl_span_whole(&stretch, page_bytes) != -ENOMEM)
            continue;
        for (uint64_t k = i; k < next; k++) {
            struct dl_span *span = index->entries[k].span;

            if (!span->dead && dl_span_whole(span, page_bytes) == -ENOMEM) {
                span->dead = ENOMEM;
                distrust(0, UINT64_MAX);
            }
        }
    }
}

/* Lock held: no mapping of ours changes meanwhile. Where the kernel does not tell, nothing can be
 * vouched for. */
static void check_mappings(uint64_t first, uint64_t end)
{
    if (dl_maps_walk(first * page_bytes, end * page_bytes, 0, check_mapping, NULL) < 0)
        distrust(first, end);
    check_neighbours();
}

/* Lock held. Private memory that nobody stored to and that has lost its contents all the same
 * (MADV_DONTNEED, MREMAP_DONTUNMAP): a protected page that was not empty when it was protected and is
 * now, or was a copy and shows its file again. It is marked in every span, and open where a store has
 * marked it already. With `learn`, empty pages are only written down. Needs PAGEMAP_SCAN (Linux 6.7);
 * without it such pages go unseen. */
static void check_contents(struct dl_span *self, int pagemap, uint64_t first, uint64_t end, int learn)
{
    struct page_region regions[EMPTIES];

    for (uint64_t at = first * page_bytes; at < end * page_bytes;) {
        int found = dl_pagemap_empty(pagemap, &at, end * page_bytes, regions, EMPTIES);

        if (found < 0)
            return;
        for (int i = 0; i < found; i++) {
            uint64_t from = regions[i].start / page_bytes, to = regions[i].end / page_bytes;
            struct dl_span *span;

            DL_EACH_SPAN (span, &registry, from, to) {
                uint64_t a = from, b = to;

                (void)dl_span_clip(span, &a, &b);
                if (!(learn && span == self))
                    dl_span_mark_emptied(span, a, b);
                dl_words_set(span->empty, a - span->first, b - span->first);
            }
        }
    }
}

static int open_pagemap(const struct dl_span *span)
{
    return span->private ? open("/proc/thread-self/pagemap", O_RDONLY | O_CLOEXEC) : -1;
}

/* A stretch at a time: the lock is given back in between, because stores wait for it. */
static void look_for_emptied(struct dl_span *span)
{
    int pagemap = open_pagemap(span);
    sigset_t mask;

    for (uint64_t at = span->first; pagemap >= 0 && at < span->end; at += STRETCH) {
        lock_all(&mask);
        if (!span->dead && span->generation == forks)
            check_contents(span, pagemap, at, span->end - at < STRETCH ? span->end : at + STRETCH, 0);
        unlock_all(&mask);
    }
    if (pagemap >= 0)
        close(pagemap);
}

/* Lock held. 0, or why nothing can be said of the span any more. */
static int check_span(struct dl_span *span)
{
    int error;

    if (span->generation != forks)
        return -ECHILD;
    if (span->dead)
        return -span->dead;
    error = dl_span_whole(span, page_bytes);
    if (error == -ENOMEM)
        check_neighbours();
    return error ? error : check_handler(span);
}

/* What a harvest has found so far. */
struct found {
    uint64_t pages; /* not 0: some */
    int coarse;
};

/* Move what is marked into `words`; with `take`, protect it again. A stretch at a time, as above. */
static int move_words(struct dl_span *span, uint64_t *words, int take, struct found *found)
{
    uint64_t chunk[CHUNK_WORDS], open[CHUNK_WORDS], nwords = dl_words_for(span->end - span->first);
    struct dl_span *other;
    sigset_t mask;

    lock_all(&mask);
    found->coarse |= span->coarse;
    if (!span->pending || span->dead) {
        int error = -span->dead;

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
            int error = -span->dead;

            unlock_all(&mask);
            return error;
        }
        memcpy(chunk, span->words + at, size * sizeof(*chunk));
        /* What another tracker's harvest has protected stays as it is: had somebody opened it since, this would
         * hide that from the look that follows, and so from the other tracker. */
        for (uint64_t i = 0; i < size; i++)
            open[i] = chunk[i] & span->open[at + i];
        if (take && protect_runs(open, size, span->first + at * DL_WORD_PAGES) == 0) {
            memset(span->words + at, 0, size * sizeof(*chunk));
        } else if (take) {
            /* No mapping is left to protect with: what stays open stays marked (I1), and is reported
             * again until the system lets us protect it. */
            span->pending = found->coarse = 1;
        }
        unlock_all(&mask);
        /* The caller's words may share a page with a tracked buffer: outside the lock. */
        for (uint64_t i = 0; i < size; i++) {
            found->pages |= chunk[i];
            words[at + i] |= chunk[i];
        }
    }
    if (take) {
        lock_all(&mask);
        /* Closed meanwhile, it counts for nothing, and is in nobody's way. */
        DL_EACH_SPAN (other, &registry, span->first, span->end)
            count_splits(other);
        unlock_all(&mask);
    }
    return 0;
}

/* Mark what changed without a store. Every question costs something per mapping, and open pages are
 * mappings of their own: a harvest asks when it has protected them. By then it has changed nothing that
 * this looks at, since it protects marked pages only, and those are in its answer. */
static void look(struct dl_span *span)
{
    sigset_t mask;

    look_for_emptied(span);
    lock_all(&mask);
    if (!span->dead)
        check_mappings(span->first, span->end);
    unlock_all(&mask);
}

static int mprotect_collect(struct dl_span *span, uint64_t *words, int take)
{
    struct found found = {.coarse = 0};
    sigset_t mask;
    int error;

    lock_all(&mask);
    error = check_span(span);
    unlock_all(&mask);
    if (!error && take)
        error = move_words(span, words, take, &found);
    if (error)
        return error;
    look(span);
    error = move_words(span, words, take, &found);
    return error ? error : found.coarse ? DL_LOST : found.pages ? DL_DIRTY : DL_CLEAN;
}

/* Lock held. */
static void forget(struct dl_span *span)
{
    struct dl_gap gap = {.from = span->first};

    while (dl_registry_gap(&registry, span, &gap))
        /* Memory that was unmapped meanwhile needs no opening. */
        (void)protect(gap.first, gap.end, PROT_READ | PROT_WRITE);
    dl_registry_remove(&registry, span);
    splits -= span->splits;
    changes++;
}

/* Lock held; the span is in the registry. */
static int protect_span(struct dl_span *span)
{
    int error = protect(span->first, span->end, PROT_READ), pagemap;
    struct dl_span *other;

    if (error)
        return error;
    changes++;
    /* The others' open pages in this range are protected again; their bits stay set. */
    DL_EACH_SPAN (other, &registry, span->first, span->end) {
        uint64_t first = span->first, end = span->end;

        (void)dl_span_clip(other, &first, &end);
        dl_words_clear(other->open, first - other->first, end - other->first);
        count_splits(other);
    }
    span->private = dl_maps_walk(span->first * page_bytes, span->end * page_bytes, 0, is_shared, NULL) == 0;
    pagemap = open_pagemap(span);
    if (pagemap >= 0) {
        check_contents(span, pagemap, span->first, span->end, 1);
        close(pagemap);
    }
    return 0;
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
    error = dl_faults_install();
    if (!error) {
        *step = DL_STEP_PROTECT;
        /* Protecting it wipes out what tells the others that their memory was replaced. */
        if (dl_registry_count(&registry))
            check_mappings(span->first, span->end);
        error = dl_registry_add(&registry, span);
        if (!error) {
            error = protect_span(span);
            if (error)
                forget(span);
        }
        if (!error)
            *step = DL_STEP_NONE;
    }
    unlock_all(&mask);
    return error;
}

static void mprotect_close(struct dl_span *span)
{
    sigset_t mask;

    lock_all(&mask);
    if (!span->closed)
        forget(span);
    span->closed = 1;
    span->dead = EBADF;
    unlock_all(&mask);
}

static int mprotect_count(void)
{
    sigset_t mask;
    int count;

    lock_all(&mask);
    count = (int)dl_registry_count(&registry);
    unlock_all(&mask);
    return count;
}

int dl_mprotect_covers(uint64_t first, uint64_t end)
{
    struct dl_span hole = {.first = first, .end = end};
    struct dl_gap gap = {.from = first};
    sigset_t mask;
    int covered;

    lock_all(&mask);
    covered = !dl_registry_gap(&registry, &hole, &gap);
    unlock_all(&mask);
    return covered;
}

void dl_mprotect_allow_splits(uint64_t limit)
{
    sigset_t mask;

    lock_all(&mask);
    allowed_splits = limit;
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
            sigset_t fault, before;

            /* In a thread that blocks it, the signal of a fault would end the process. */
            sigemptyset(&fault);
            sigaddset(&fault, SIGSEGV);
            pthread_sigmask(SIG_UNBLOCK, &fault, &before);
            page[0] = 1;
            pthread_sigmask(SIG_SETMASK, &before, NULL);
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
int dl_mprotect_fault(uintptr_t address, uint64_t *seen) { return DL_FAULT_FOREIGN; }
void dl_mprotect_allow_splits(uint64_t limit) {}

int dl_mprotect_probe(enum dl_step *step)
{
    *step = DL_STEP_PROTECT;
    return -ENOSYS;
}

#endif

const struct dl_engine dl_mprotect_engine = {mprotect_open, mprotect_close, mprotect_collect, mprotect_count};
