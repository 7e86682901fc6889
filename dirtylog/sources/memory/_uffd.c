/* Userfaultfd write protection, asynchronous, read by PAGEMAP_SCAN: one registry for the process.
 *
 * A mapping can be registered with one userfaultfd only, and a scan that protects again (WP_MATCHING)
 * consumes what it reports. So the process has one userfaultfd, and a scan for one tracker deposits
 * what it found with every other tracker of the same pages before the lock is released (I5).
 *
 * The order inside a collect, for each page:
 *   1. the kernel, under the page table's lock, tests "written", protects the page and flushes the
 *      TLB: a store is either before that and reported, or after it and faults;
 *   2. the page is deposited with the other trackers;
 *   3. the lock is released, and only then is any answer handed out.
 * A second tracker cannot scan between 1 and 2, where the page looks clean and is not yet deposited.
 *
 * Descriptors are numbers, and programs close numbers that they do not know (a daemon: closerange). Before
 * each use ours are recognised as ours; lost, they are opened again and every span starts over (I6).
 *
 * formal/models/deposits.pml is this file's model.
 */
#define _GNU_SOURCE
#include "_maps.h"
#include "_registry.h"

#include <errno.h>

#ifdef __linux__

#include <fcntl.h>
#include <pthread.h>
#include <stddef.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "sources/_pagemap.h"

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; /* guards everything below */
static pthread_once_t once = PTHREAD_ONCE_INIT;
static struct dl_registry registry;
static uint64_t page_bytes;
/* Its logarithm: a division for each region found takes longer than all else here. */
static int page_shift;
static unsigned forks;
static struct page_region vector[DL_SCAN_VECTOR];

/* What tells our descriptors from others that have their numbers by now. A userfaultfd has an inode of its
 * own; every pagemap of a process has the same one, so ours stands at an offset that nobody else chooses. */
static struct {
    int uffd, pagemap;
    struct stat uffd_is, pagemap_is;
    off_t mark;
} ours = {.uffd = -1, .pagemap = -1};

static int same_file(int descriptor, const struct stat *is)
{
    struct stat now;

    return descriptor >= 0 && fstat(descriptor, &now) == 0 && now.st_dev == is->st_dev && now.st_ino == is->st_ino;
}

static int uffd_is_ours(void) { return same_file(ours.uffd, &ours.uffd_is); }

/* Cheap, for each scan: the wrong pagemap would answer "clean". */
static int pagemap_is_marked(void) { return lseek(ours.pagemap, 0, SEEK_CUR) == ours.mark; }

static int pagemap_is_ours(void) { return same_file(ours.pagemap, &ours.pagemap_is) && pagemap_is_marked(); }

/* The lock is held across the fork, so the child never inherits a half-done step. Both descriptors
 * stand for the parent's memory: the child must let go of them, and of the parent's trackers. */
static void before_fork(void) { pthread_mutex_lock(&lock); }
static void after_fork_in_parent(void) { pthread_mutex_unlock(&lock); }

static void close_descriptors(void)
{
    if (uffd_is_ours())
        close(ours.uffd);
    if (pagemap_is_ours())
        close(ours.pagemap);
    ours.uffd = ours.pagemap = -1;
}

/* In a page that no child inherits: 0 in one that was forked by the bare system call, of which nobody is told. */
static uint64_t *not_forked;

static void after_fork_in_child(void)
{
    if (not_forked)
        *not_forked = 1;
    close_descriptors();
    if (registry.now)
        registry.now->count = 0;
    forks++;
    pthread_mutex_init(&lock, NULL);
}

static void watch_forks(void)
{
    void *page = mmap(NULL, sizeof *not_forked, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

    if (page != MAP_FAILED && madvise(page, sizeof *not_forked, MADV_WIPEONFORK) == 0) {
        not_forked = page;
        *not_forked = 1;
    }
    pthread_atfork(before_fork, after_fork_in_parent, after_fork_in_child);
}

/* Before anything is asked of the descriptors: in a child they would answer for its parent, and take its pages. */
static void lock_ours(void)
{
    if (not_forked && !*not_forked)
        after_fork_in_child();
    pthread_mutex_lock(&lock);
}

static int open_descriptors(int *uffd, int *pagemap, enum dl_step *step)
{
    int error;

    /* USER_MODE_ONLY: an unprivileged process may have it. With WP_ASYNC nobody ever waits on the
     * descriptor, and faults that the kernel takes on the process's behalf are resolved all the same. */
    *step = DL_STEP_USERFAULTFD;
    *uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | UFFD_USER_MODE_ONLY);
    if (*uffd < 0)
        return -errno;
    *step = DL_STEP_API;
    error = dl_uffd_start(*uffd);
    if (error)
        goto fail;
    *step = DL_STEP_PAGEMAP;
    *pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    if (*pagemap < 0) {
        error = -errno;
        goto fail;
    }
    *step = DL_STEP_NONE;
    return 0;
fail:
    close(*uffd);
    *uffd = -1;
    return error;
}

/* Lock held. Open our descriptors, unless they are open and still ours. */
static int have_descriptors(enum dl_step *step)
{
    static uint64_t times;
    int error;

    if (uffd_is_ours() && pagemap_is_ours())
        return 0;
    close_descriptors();
    error = open_descriptors(&ours.uffd, &ours.pagemap, step);
    if (error)
        return error;
    /* Never read by offset, so the offset is free to say whose it is. */
    ours.mark = (off_t)(((uintptr_t)&ours / sizeof ours + ++times * 7919) % 1000003 * 8 + 8);
    if (fstat(ours.uffd, &ours.uffd_is) == 0 && fstat(ours.pagemap, &ours.pagemap_is) == 0 &&
        lseek(ours.pagemap, ours.mark, SEEK_SET) == ours.mark)
        return 0;
    error = -errno;
    close(ours.uffd);
    close(ours.pagemap);
    ours.uffd = ours.pagemap = -1;
    return error;
}

/* One pass over the span. `words` may be NULL: what is found is then dropped, for this span only. */
static int walk(struct dl_span *span, uint64_t *words, int take)
{
    uint64_t at = span->first * page_bytes, end = span->end * page_bytes;
    int shared = dl_registry_count(&registry) > 1, answer = DL_CLEAN;

    while (at < end) {
        /* A full vector ends the walk early. */
        int found = dl_pagemap_scan(ours.pagemap, &at, end, take, vector);

        if (found < 0)
            return found;
        for (int i = 0; i < found; i++) {
            /* Whole pages, unless a test has us take several of the system's for one. */
            uint64_t first = vector[i].start >> page_shift, stop = (vector[i].end + page_bytes - 1) >> page_shift;

            if (words)
                dl_words_set(words, first - span->first, stop - span->first);
            if (take && shared)
                dl_registry_deposit(&registry, span, first, stop);
        }
        if (found)
            answer = DL_DIRTY;
    }
    return answer;
}

/* MADV_DONTNEED takes away the copy that a store to a private page of a file has made, and the file shows again. Unlike
 * that of anonymous memory, its protection stays, and the scan passes over it. */
static int is_private_file(const struct dl_mapping *mapping, const char *name, void *context)
{
    return mapping->inode != 0 && mapping->permissions[3] == 'p';
}

/* Those of [first, end), pages of the span, that were copies: none of them is one now. */
static int drop_copies(struct dl_span *span, uint64_t *words, int take, uint64_t first, uint64_t end)
{
    struct dl_part part = dl_part_first(first, end);
    int dropped = 0;

    for (; part.mask; dl_part_next(&part)) {
        uint64_t mask = part.mask & span->copied[part.word];

        if (words)
            words[part.word] |= mask;
        if (take)
            span->copied[part.word] &= ~mask;
        dropped |= mask != 0;
    }
    return dropped;
}

/* Lock held. Pages that were copies and are none: taken away, or swapped out, which nobody can tell apart where they are
 * protected (I6). Each span keeps account of its own. Where the kernel does not tell which pages are copies, any may have
 * been taken away by now, and any may be one that is taken away later. Returns whether there is such a page. */
static int look_for_dropped(struct dl_span *span, uint64_t *words, int take)
{
    uint64_t at = span->first * page_bytes, end = span->end * page_bytes, done = 0;
    int dropped = 0;

    while (at < end) {
        int found = dl_pagemap_copies(ours.pagemap, &at, end, vector);

        if (found < 0) {
            if (words)
                dl_words_set(words, 0, span->end - span->first);
            if (take)
                dl_words_set(span->copied, 0, span->end - span->first);
            return 1;
        }
        for (int i = 0; i < found; i++) {
            uint64_t first = (vector[i].start >> page_shift) - span->first;
            uint64_t stop = ((vector[i].end + page_bytes - 1) >> page_shift) - span->first;

            dropped |= drop_copies(span, words, take, done, first);
            if (take)
                dl_words_set(span->copied, first, stop);
            done = stop;
        }
    }
    return dropped | drop_copies(span, words, take, done, span->end - span->first);
}

/* Lock held. Where the kernel does not tell how the memory is mapped, a file may be in it: the looks cost time, no more. */
static void learn_copies(struct dl_span *span)
{
    span->file = dl_maps_walk(span->first * page_bytes, span->end * page_bytes, 0, is_private_file, NULL) != 0;
    if (span->file)
        (void)look_for_dropped(span, NULL, 1);
}

/* Lock held. What was written to the span's memory is unknown, for every other tracker of it: a scan that
 * failed may have taken pages that it did not tell of (I6). */
static void doubt(const struct dl_span *span)
{
    struct dl_span *other;

    DL_EACH_SPAN (other, &registry, span->first, span->end)
        if (other != span) {
            dl_span_mark(other, span->first, span->end);
            other->inexact = 1;
        }
}

/* The span's memory was replaced. Track what is there now, or never again. */
static int start_over(struct dl_span *span)
{
    int error;

    doubt(span);
    error = dl_uffd_register(ours.uffd, span->first * page_bytes, span->end * page_bytes);
    if (!error)
        error = walk(span, NULL, 1);
    if (error >= 0)
        error = dl_span_whole(span, page_bytes);
    if (error < 0)
        span->dead = -error;
    else
        learn_copies(span);
    return error;
}

/* Lock held. Somebody closed our descriptors, and with them the kernel dropped every registration: all
 * that was written since is unknown, to every span. */
static int reopen(void)
{
    enum dl_step step;
    struct dl_span *span;
    int error = have_descriptors(&step);

    if (error)
        return error;
    DL_EACH_SPAN (span, &registry, 0, UINT64_MAX) {
        dl_words_set(span->words, 0, span->end - span->first);
        span->pending = span->inexact = 1;
        if (!span->dead)
            (void)start_over(span);
    }
    return 0;
}

static int uffd_collect(struct dl_span *span, uint64_t *words, int take)
{
    uint64_t npages = span->end - span->first;
    int answer, error;

    lock_ours();
    if (span->generation != forks) {
        answer = -ECHILD;
        goto out;
    }
    if (span->dead) {
        answer = -span->dead;
        goto out;
    }
    if (!uffd_is_ours() || !pagemap_is_marked()) {
        /* A peek changes nothing: the next harvest opens them again. */
        answer = DL_LOST;
        dl_words_set(words, 0, npages);
        if (!take)
            goto out;
        answer = reopen();
        if (!answer && span->dead)
            answer = -span->dead;
        /* EBADF means that a span is closed, which this one is not. */
        if (answer < 0) {
            answer = answer == -EBADF ? -EIO : answer;
            goto out;
        }
    } else {
        answer = walk(span, words, take);
    }
    /* PAGEMAP_SCAN passes over unmapped stretches in silence. */
    error = dl_span_whole(span, page_bytes);
    if (error < 0) {
        if (answer < 0 && take)
            doubt(span);
        answer = error;
        span->dead = -error;
        goto out;
    }
    if (answer < 0) {
        /* A peek changes nothing: the next harvest meets the same gap. */
        error = take ? start_over(span) : 0;
        if (error < 0) {
            answer = error;
            goto out;
        }
        answer = DL_LOST;
        dl_words_set(words, 0, npages);
    }
    if (span->file && look_for_dropped(span, words, take))
        answer = DL_LOST;
    if (span->huge && answer == DL_DIRTY)
        answer = DL_LOST;
    if (span->pending) {
        for (uint64_t i = 0; i < dl_words_for(npages); i++)
            words[i] |= span->words[i];
        answer = span->inexact || span->huge || answer == DL_LOST ? DL_LOST : DL_DIRTY;
        if (take) {
            memset(span->words, 0, dl_words_for(npages) * sizeof(uint64_t));
            span->pending = span->inexact = 0;
        }
    }
out:
    pthread_mutex_unlock(&lock);
    return answer;
}

/* Lock held. Pages that another tracker still watches stay registered and armed. */
static void forget(struct dl_span *span)
{
    struct dl_gap gap = {.from = span->first};

    if (uffd_is_ours())
        while (dl_registry_gap(&registry, span, &gap)) {
            /* Memory that was unmapped meanwhile needs no unregistering. */
            (void)dl_uffd_unregister(ours.uffd, gap.first * page_bytes, gap.end * page_bytes);
        }
    dl_registry_remove(&registry, span);
    if (!dl_registry_count(&registry))
        close_descriptors();
}

static int uffd_open(struct dl_span *span, uint64_t page_size, enum dl_step *step)
{
    int error = 0;

    pthread_once(&once, watch_forks);
    lock_ours();
    page_bytes = page_size;
    page_shift = __builtin_ctzll(page_size);
    *step = DL_STEP_USERFAULTFD;
    /* The others must not be left without a registration in silence. */
    if (dl_registry_count(&registry) && !(uffd_is_ours() && pagemap_is_ours()))
        error = reopen();
    if (!error)
        error = have_descriptors(step);
    if (!error) {
        span->generation = forks;
        *step = DL_STEP_REGISTER;
        error = dl_registry_add(&registry, span);
        if (!error) {
            error = dl_uffd_register(ours.uffd, span->first * page_size, span->end * page_size);
            if (!error) {
                *step = DL_STEP_SCAN;
                error = walk(span, NULL, 1);
                if (error < 0)
                    doubt(span);
                else
                    learn_copies(span);
            }
            if (error < 0)
                forget(span);
        }
        if (error >= 0) {
            *step = DL_STEP_NONE;
            error = 0;
        } else if (!dl_registry_count(&registry)) {
            close_descriptors();
        }
    }
    pthread_mutex_unlock(&lock);
    return error;
}

static void uffd_close(struct dl_span *span)
{
    lock_ours();
    /* A forked child inherits spans of the parent's registry, which are none of its own. */
    if (span->generation == forks && !span->closed)
        forget(span);
    span->closed = 1;
    span->dead = EBADF;
    pthread_mutex_unlock(&lock);
}

static int scan_page(int pagemap, uint64_t start, uint64_t end)
{
    return dl_pagemap_scan(pagemap, &start, end, 1, vector);
}

/* Scans one armed page of its own, written once: the answer must be that page. */
static int probe_scan(int uffd, int pagemap, enum dl_step *step)
{
    size_t size = (size_t)sysconf(_SC_PAGESIZE);
    volatile char *page = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    uint64_t start = (uint64_t)(uintptr_t)page;
    int found;

    if (page == MAP_FAILED)
        return -errno;
    *step = DL_STEP_REGISTER;
    found = dl_uffd_register(uffd, start, start + size);
    if (!found) {
        *step = DL_STEP_SCAN;
        found = scan_page(pagemap, start, start + size);
        if (found >= 0)
            found = scan_page(pagemap, start, start + size);
        if (found == 0) {
            page[0] = 1;
            found = scan_page(pagemap, start, start + size);
        } else if (found > 0) {
            found = -EIO;
        }
    }
    munmap((void *)page, size);
    return found == 1 ? 0 : found < 0 ? found : -EIO;
}

int dl_uffd_probe(enum dl_step *step)
{
    int uffd = -1, pagemap = -1, error;

    pthread_once(&once, watch_forks);
    /* Under the lock, because the scan's vector is the process's. */
    lock_ours();
    error = open_descriptors(&uffd, &pagemap, step);
    if (!error) {
        error = probe_scan(uffd, pagemap, step);
        close(uffd);
        close(pagemap);
    }
    pthread_mutex_unlock(&lock);
    if (!error)
        *step = DL_STEP_NONE;
    return error;
}

static int uffd_count(void)
{
    int count;

    lock_ours();
    count = (int)dl_registry_count(&registry);
    pthread_mutex_unlock(&lock);
    return count;
}

#else /* no Linux, no userfaultfd */

static int uffd_open(struct dl_span *span, uint64_t page_size, enum dl_step *step)
{
    *step = DL_STEP_USERFAULTFD;
    return -ENOSYS;
}

static void uffd_close(struct dl_span *span) {}
static int uffd_collect(struct dl_span *span, uint64_t *words, int take) { return -ENOSYS; }
static int uffd_count(void) { return 0; }

int dl_uffd_probe(enum dl_step *step)
{
    *step = DL_STEP_USERFAULTFD;
    return -ENOSYS;
}

#endif

const struct dl_engine dl_uffd_engine = {uffd_open, uffd_close, uffd_collect, uffd_count};
