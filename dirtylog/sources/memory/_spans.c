/* Spans in pages of their own, and whether a span's memory is still there. */
#define _GNU_SOURCE
#include "_spans.h"

#include <errno.h>

#ifdef __linux__

#include <stddef.h>
#include <sys/mman.h>

struct dl_span *dl_span_new(uint64_t first, uint64_t npages)
{
    /* Three bitmaps behind the struct, each on its own cache line; untouched words cost nothing. */
    uint64_t line = DL_LINE_WORDS * sizeof(uint64_t);
    uint64_t header = (sizeof(struct dl_span) + line - 1) / line * line;
    uint64_t nwords = (dl_words_for(npages) + DL_LINE_WORDS - 1) / DL_LINE_WORDS * DL_LINE_WORDS;
    uint64_t bytes = header + 3 * nwords * sizeof(uint64_t);
    char *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    struct dl_span *span = (struct dl_span *)memory;

    if (memory == MAP_FAILED)
        return NULL;
    span->first = first;
    span->end = first + npages;
    span->words = (uint64_t *)(memory + header);
    span->open = span->words + nwords;
    span->empty = span->copied = span->open + nwords;
    span->mapped = bytes;
    return span;
}

void dl_span_free(struct dl_span *span) { munmap(span, span->mapped); }

int dl_span_whole(const struct dl_span *span, uint64_t page_size)
{
    void *start = (void *)(uintptr_t)(span->first * page_size);

    /* MS_ASYNC does nothing on Linux but walk the mappings, and answers ENOMEM where there is none. */
    return msync(start, (span->end - span->first) * page_size, MS_ASYNC) < 0 ? -errno : 0;
}

#else

struct dl_span *dl_span_new(uint64_t first, uint64_t npages)
{
    errno = ENOSYS;
    return 0;
}

void dl_span_free(struct dl_span *span) {}
int dl_span_whole(const struct dl_span *span, uint64_t page_size) { return -ENOSYS; }

#endif
