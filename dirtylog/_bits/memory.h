/* Memory for words: 64-byte aligned, and in huge pages where it is large. */
#ifndef DIRTYLOG_MEMORY_H
#define DIRTYLOG_MEMORY_H

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "dirtylog/atomic.h"

#define DL_LINE_BYTES ((size_t)64)

/* Rounded up to a line, so that a kernel may read whole lines; never empty. 0: too large. */
static inline size_t dl_words_bytes(size_t nwords)
{
    if (nwords > SIZE_MAX / 16)
        return 0;
    size_t lines = nwords / 8 + (nwords % 8 != 0);
    return (lines ? lines : 1) * DL_LINE_BYTES;
}

/* From here on a block is mapped, where there is mmap(): it costs nothing until it is written,
 * and goes back to the kernel when it is freed. */
#define DL_MAP_BYTES ((size_t)1 << 21)

#ifdef __SANITIZE_ADDRESS__ /* which watches both ends of what it gives */
static inline uint64_t *dl_heap_alloc(size_t bytes, int zero)
{
    uint64_t *words = aligned_alloc(DL_LINE_BYTES, bytes);
    return words && zero ? memset(words, 0, bytes) : words;
}

static inline void dl_heap_free(uint64_t *words) { free(words); }
#else
/* A block of the heap: from the first whole line on of what malloc() gives, whose address is kept before that line.
 * aligned_alloc() would pass by what malloc() keeps at hand for small blocks, and cost what the heap looks like. */
static inline uint64_t *dl_heap_alloc(size_t bytes, int zero)
{
    int cleared = zero && bytes >= DL_MAP_BYTES; /* most of that comes zeroed from the kernel, and calloc() knows */
    char *memory = cleared ? calloc(1, bytes + DL_LINE_BYTES) : malloc(bytes + DL_LINE_BYTES);
    if (!memory)
        return NULL;
    char *line = memory + DL_LINE_BYTES - (uintptr_t)memory % DL_LINE_BYTES;
    memcpy(line - sizeof memory, &memory, sizeof memory);
    if (zero && !cleared)
        memset(line, 0, bytes);
    return (uint64_t *)(void *)line;
}

static inline void dl_heap_free(uint64_t *words)
{
    void *memory;
    if (!words)
        return;
    memcpy(&memory, (char *)words - sizeof memory, sizeof memory);
    free(memory);
}
#endif

#ifdef __linux__
#include <sys/mman.h>

/* The block of words freed last, kept for the next result of that size: mapping one anew
 * costs a fault and a cleared page for each page of it. Its first word holds its size
 * meanwhile. One a process; a larger one goes back to the kernel at once. */
#define DL_SPARE_BYTES ((size_t)1 << 26)
static uint64_t dl_spare; /* address; 0: none. An exchange has it for one thread alone. */

static inline uint64_t *dl_spare_take(size_t bytes)
{
    uint64_t *spare = (uint64_t *)(uintptr_t)dl_exchange(&dl_spare, 0);
    if (spare && *spare != bytes) {
        (void)munmap(spare, *spare);
        return NULL;
    }
    return spare;
}

static inline void dl_spare_put(uint64_t *words, size_t bytes)
{
    if (bytes <= DL_SPARE_BYTES) {
        *words = bytes;
        words = (uint64_t *)(uintptr_t)dl_exchange(&dl_spare, (uint64_t)(uintptr_t)words);
        bytes = words ? *words : 0;
    }
    if (words)
        (void)munmap(words, bytes);
}

static inline uint64_t *dl_words_alloc(size_t nwords, int zero, size_t *mapped_bytes)
{
    *mapped_bytes = 0;
    size_t bytes = dl_words_bytes(nwords);
    if (bytes == 0)
        return NULL;
    if (bytes < DL_MAP_BYTES)
        return dl_heap_alloc(bytes, zero);
    void *mapping = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapping == MAP_FAILED)
        return NULL;
#ifdef MADV_HUGEPAGE
    (void)madvise(mapping, bytes, MADV_HUGEPAGE); /* advice only: refused, small pages serve as well */
#endif
    *mapped_bytes = bytes;
    return mapping;
}

/* Words, zeroed if `zero`, that will be written nearly all over: a dense result. */
static inline uint64_t *dl_words_alloc_spare(size_t nwords, int zero, size_t *mapped_bytes)
{
    size_t bytes = dl_words_bytes(nwords);
    if (bytes >= DL_MAP_BYTES) {
        uint64_t *spare = dl_spare_take(bytes);
        if (spare) {
            *mapped_bytes = bytes;
            return zero ? memset(spare, 0, bytes) : spare;
        }
    }
    return dl_words_alloc(nwords, zero, mapped_bytes);
}

static inline void dl_words_free(uint64_t *words, size_t mapped_bytes)
{
    if (mapped_bytes)
        (void)munmap(words, mapped_bytes);
    else
        dl_heap_free(words);
}

static inline void dl_words_free_spare(uint64_t *words, size_t mapped_bytes)
{
    if (mapped_bytes)
        dl_spare_put(words, mapped_bytes);
    else
        dl_heap_free(words);
}

#else /* any other system: the heap alone */

static inline uint64_t *dl_words_alloc(size_t nwords, int zero, size_t *mapped_bytes)
{
    size_t bytes = dl_words_bytes(nwords);
    *mapped_bytes = 0;
    return bytes ? dl_heap_alloc(bytes, zero) : NULL;
}

static inline uint64_t *dl_words_alloc_spare(size_t nwords, int zero, size_t *mapped_bytes)
{
    return dl_words_alloc(nwords, zero, mapped_bytes);
}

static inline void dl_words_free(uint64_t *words, size_t mapped_bytes)
{
    (void)mapped_bytes;
    dl_heap_free(words);
}

static inline void dl_words_free_spare(uint64_t *words, size_t mapped_bytes) { dl_words_free(words, mapped_bytes); }

#endif /* __linux__ */

#endif /* DIRTYLOG_MEMORY_H */
