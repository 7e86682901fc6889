/* Whether what is behind memory is still there: the one way in which sources keep clear of SIGBUS and SIGSEGV.
 *
 * Callable under a spin lock and in a signal handler: system calls and the stack alone.
 */
#ifndef DIRTYLOG_BACKING_H
#define DIRTYLOG_BACKING_H

#include <errno.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __linux__

#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22
#endif

#define DL_TOUCHES 64 /* pages that one process_vm_readv asks for */

/* For kernels before 5.14: the kernel itself reads one byte of each page, and answers instead of signalling. */
static inline int dl_touch_by_reading(uint64_t start, uint64_t end, uint64_t page_size)
{
    struct iovec from[DL_TOUCHES];
    char bytes[DL_TOUCHES];

    while (start < end) {
        struct iovec into = {bytes, 0};
        ssize_t done;

        for (; into.iov_len < DL_TOUCHES && start < end; start += page_size)
            from[into.iov_len++] = (struct iovec){(void *)(uintptr_t)start, 1};
        done = process_vm_readv(getpid(), &into, 1, from, into.iov_len, 0);
        if (done < 0)
            /* Where the call is forbidden nothing can be asked; what is mapped was asked before. */
            return errno == EFAULT ? -EFAULT : 0;
        if ((size_t)done < into.iov_len)
            return -EFAULT;
    }
    return 0;
}

/* 0, or -ENOMEM when part of [start, end) is not mapped any more; costs nothing per page. */
static inline int dl_memory_mapped(uint64_t start, uint64_t end)
{
    /* MS_ASYNC does nothing on Linux but walk the mappings, and answers ENOMEM where there is none. */
    return msync((void *)(uintptr_t)start, end - start, MS_ASYNC) < 0 ? -errno : 0;
}

/* 0, -ENOMEM when part of [start, end) is not mapped any more, or -EFAULT when reading it would raise
 * SIGBUS, because the file behind it was cut. Page-aligned addresses. Whoever cuts the file after the
 * answer still raises the signal: ask for a stretch, then read that stretch. */
static inline int dl_memory_readable(uint64_t start, uint64_t end, uint64_t page_size)
{
    void *memory = (void *)(uintptr_t)start;
    int error = dl_memory_mapped(start, end);

    if (error)
        return error;
    if (madvise(memory, end - start, MADV_POPULATE_READ) == 0)
        return 0;
    if (errno == EINVAL)
        return dl_touch_by_reading(start, end, page_size);
    return errno == EFAULT || errno == EHWPOISON ? -EFAULT : errno == ENOMEM ? -ENOMEM : 0;
}

#else

static inline int dl_memory_mapped(uint64_t start, uint64_t end) { return 0; }
static inline int dl_memory_readable(uint64_t start, uint64_t end, uint64_t page_size) { return 0; }

#endif

#endif /* DIRTYLOG_BACKING_H */
