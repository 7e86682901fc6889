/* Memory for words: 64-byte aligned, and in huge pages where it is large. */
#ifndef DIRTYLOG_MEMORY_H
#define DIRTYLOG_MEMORY_H

#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

/* From here on a block is mapped: it costs nothing until it is written, and
 * goes back to the kernel when it is freed. */
#define DL_MAP_BYTES ((size_t)1 << 21)
#define DL_LINE_BYTES ((size_t)64)

static inline uint64_t *dl_words_alloc(size_t nwords, int zero, size_t *mapped_bytes)
{
    *mapped_bytes = 0;
    if (nwords > SIZE_MAX / 16)
        return NULL;
    /* Rounded up to a line, so that a kernel may read whole lines; never empty. */
    size_t bytes = (nwords * sizeof(uint64_t) + DL_LINE_BYTES - 1) / DL_LINE_BYTES * DL_LINE_BYTES;
    if (bytes == 0)
        bytes = DL_LINE_BYTES;
    if (bytes < DL_MAP_BYTES) {
        uint64_t *words = aligned_alloc(DL_LINE_BYTES, bytes);
        if (words && zero)
            memset(words, 0, bytes);
        return words;
    }
    void *mapping = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapping == MAP_FAILED)
        return NULL;
#ifdef MADV_HUGEPAGE
    (void)madvise(mapping, bytes, MADV_HUGEPAGE); /* advice only: refused, small pages serve as well */
#endif
    *mapped_bytes = bytes;
    return mapping;
}

static inline void dl_words_free(uint64_t *words, size_t mapped_bytes)
{
    if (mapped_bytes)
        (void)munmap(words, mapped_bytes);
    else
        free(words);
}

#endif /* DIRTYLOG_MEMORY_H */
