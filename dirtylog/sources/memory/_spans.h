/* What the engines that watch this process's own memory share: which tracker wants which pages.
 *
 * Two trackers may watch the same page, and the kernel keeps one state for it. Whoever takes
 * that state must hand it to the others, so each engine keeps one registry of spans for the process
 * and one lock round it. Nothing here locks: the engine's lock is held by every caller.
 */
#ifndef DIRTYLOG_SPANS_H
#define DIRTYLOG_SPANS_H

#include <stdint.h>

#include "dirtylog/bits.h"

struct dl_span {
    uint64_t first, end;  /* pages of the address space: address / page size */
    uint64_t *words;      /* dirty and not yet handed out, page `first` is bit 0 */
    int pending;          /* `words` may hold a set bit */
    int inexact;          /* `words` holds pages that nobody is known to have written (I6) */
    int dead;             /* errno after which this span cannot be tracked again, else 0 */
    int closed;           /* close was called: in no registry any more, whatever went wrong before */
    int huge;             /* hugetlb: the kernel's pages are larger, and one store marks all of one (I6) */
    int coarse;           /* mprotect: pages were opened that nobody wrote */
    unsigned generation;  /* the engine's count of forks when the span was opened */
    uint64_t *open;       /* mprotect: pages that are writable now */
    uint64_t *empty;      /* mprotect: pages that had no contents of their own when they were protected */
    int private;          /* mprotect: private memory, where a lost page can be told */
    int file;             /* userfaultfd: private pages of a file are in it, of which the protection outlives the copy */
    uint64_t *copied;     /* userfaultfd: pages that were copies of their own at the last look; where `empty` is */
    uint64_t splits;      /* mprotect: about how many mappings the open pages cost */
    uint64_t mapped;      /* bytes that hold this struct and its words */
};

/* Which step of opening a span was refused. */
enum dl_step {
    DL_STEP_NONE,
    DL_STEP_USERFAULTFD,
    DL_STEP_API,
    DL_STEP_PAGEMAP,
    DL_STEP_REGISTER,
    DL_STEP_SCAN,
    DL_STEP_SIGACTION,
    DL_STEP_PROTECT,
};

enum dl_answer {
    DL_CLEAN = 0, /* nothing was written, the caller's words are untouched */
    DL_DIRTY = 1,
    DL_LOST = 2, /* pages are reported that nobody is known to have written (I6) */
};

/* One way to find out what was written. Functions return 0 or more, or -errno; they take the
 * engine's lock and may wait for it, so they are called without the GIL. */
struct dl_engine {
    /* Track the span from now on, clean. On failure `step` says which call refused. */
    int (*open)(struct dl_span *span, uint64_t page_size, enum dl_step *step);
    /* Idempotent; the span answers EBADF afterwards and may be freed. */
    void (*close)(struct dl_span *span);
    /* OR what was written into `words`, one bit a page of the span; with `take`, start clean again. */
    int (*collect)(struct dl_span *span, uint64_t *words, int take);
    /* Spans that are open in this process. */
    int (*count)(void);
};

extern const struct dl_engine dl_uffd_engine, dl_mprotect_engine;

/* Try each call in turn on a page of its own. */
int dl_uffd_probe(enum dl_step *step);
int dl_mprotect_probe(enum dl_step *step);

/* mprotect: how many mappings the engine may make the kernel split before it opens memory in blocks. */
void dl_mprotect_allow_splits(uint64_t splits);

/* mprotect: whether every page of a range is tracked already, and so may be mapped read-only by us. */
int dl_mprotect_covers(uint64_t first, uint64_t end);

/* A span in pages of its own: the SIGSEGV handler writes to it, and must not fault doing so, which
 * it would if a tracked buffer shared a page with it. NULL with errno set. */
struct dl_span *dl_span_new(uint64_t first, uint64_t npages);
void dl_span_free(struct dl_span *span);

/* 0, or -ENOMEM when part of the span's memory is not mapped any more. */
int dl_span_whole(const struct dl_span *span, uint64_t page_size);

/* Plain stores: the words belong to whoever holds the engine's lock. */
static inline void dl_words_set(uint64_t *words, uint64_t first, uint64_t end)
{
    for (struct dl_part part = dl_part_first(first, end); part.mask; dl_part_next(&part))
        words[part.word] |= part.mask;
}

static inline void dl_words_clear(uint64_t *words, uint64_t first, uint64_t end)
{
    for (struct dl_part part = dl_part_first(first, end); part.mask; dl_part_next(&part))
        words[part.word] &= ~part.mask;
}

/* The part of [first, end) that lies in `span`; false when there is none. */
static inline int dl_span_clip(const struct dl_span *span, uint64_t *first, uint64_t *end)
{
    if (*first < span->first)
        *first = span->first;
    if (*end > span->end)
        *end = span->end;
    return *first < *end;
}

static inline void dl_span_mark(struct dl_span *span, uint64_t first, uint64_t end)
{
    if (dl_span_clip(span, &first, &end)) {
        dl_words_set(span->words, first - span->first, end - span->first);
        span->pending = 1;
    }
}

/* mprotect: mark those of [first, end), inside the span, that are protected and were not empty. */
static inline void dl_span_mark_emptied(struct dl_span *span, uint64_t first, uint64_t end)
{
    struct dl_part part = dl_part_first(first - span->first, end - span->first);

    for (; part.mask; dl_part_next(&part)) {
        uint64_t mask = part.mask & ~(span->open[part.word] | span->empty[part.word]);

        span->words[part.word] |= mask;
        span->pending |= mask != 0;
    }
}

#endif /* DIRTYLOG_SPANS_H */
