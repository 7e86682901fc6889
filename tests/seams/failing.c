/* In front of libc: of the calls that files are written with, the n-th and those after it fail, or do half. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static long from, until, calls;
static int error, halves, armed;

/* From the call `first` on, `number` of them fail with `with`; 0: they transfer half of what they are asked for. */
void arm(long first, long number, int with)
{
    from = first;
    until = first + number;
    error = with;
    halves = !with;
    calls = 0;
    armed = 1;
}

long disarm(void)
{
    armed = 0;
    return calls;
}

static int fails(void)
{
    if (!armed)
        return 0;
    calls++;
    return calls >= from && calls < until;
}

static long fail(void)
{
    errno = error;
    return -1;
}

#define REAL(name)                                                                                                     \
    static __typeof__(&name) real;                                                                                     \
    if (!real)                                                                                                         \
        real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

#define MOVES(name, offset_type, pointer)                                                                              \
    ssize_t name(int fd, pointer data, size_t size, offset_type offset)                                                \
    {                                                                                                                  \
        REAL(name);                                                                                                    \
        if (fails()) {                                                                                                 \
            if (!halves)                                                                                               \
                return fail();                                                                                         \
            size = (size + 1) / 2;                                                                                     \
        }                                                                                                              \
        return real(fd, data, size, offset);                                                                           \
    }
MOVES(pwrite, off_t, const void *)
MOVES(pwrite64, off64_t, const void *)
MOVES(pread, off_t, void *)
MOVES(pread64, off64_t, void *)

#define MOVES_MANY(name, offset_type)                                                                                  \
    ssize_t name(int fd, const struct iovec *parts, int count, offset_type offset)                                     \
    {                                                                                                                  \
        struct iovec half = parts[0];                                                                                  \
        REAL(name);                                                                                                    \
        if (!fails())                                                                                                  \
            return real(fd, parts, count, offset);                                                                     \
        if (!halves)                                                                                                   \
            return fail();                                                                                             \
        half.iov_len = (half.iov_len + 1) / 2;                                                                         \
        return real(fd, &half, 1, offset);                                                                             \
    }
MOVES_MANY(pwritev, off_t)
MOVES_MANY(pwritev64, off64_t)
MOVES_MANY(preadv, off_t)
MOVES_MANY(preadv64, off64_t)

ssize_t write(int fd, const void *data, size_t size)
{
    REAL(write);
    if (fd > 2 && fails()) {
        if (!halves)
            return fail();
        size = (size + 1) / 2;
    }
    return real(fd, data, size);
}

#define ANSWERS(name, parameters, arguments)                                                                           \
    int name parameters                                                                                                \
    {                                                                                                                  \
        REAL(name);                                                                                                    \
        return fails() && !halves ? (int)fail() : real arguments;                                                      \
    }
ANSWERS(fsync, (int fd), (fd))
ANSWERS(ftruncate, (int fd, off_t size), (fd, size))
ANSWERS(ftruncate64, (int fd, off64_t size), (fd, size))
ANSWERS(rename, (const char *old, const char *new), (old, new))
ANSWERS(link, (const char *old, const char *new), (old, new))
ANSWERS(mkdir, (const char *path, mode_t mode), (path, mode))
ANSWERS(fchmod, (int fd, mode_t mode), (fd, mode))
ANSWERS(flock, (int fd, int how), (fd, how))

int close(int fd)
{
    REAL(close);
    int answer = real(fd); /* closed it is, whatever it answers */

    return fails() && !halves ? (int)fail() : answer;
}

#define OPENS(name)                                                                                                    \
    int name(const char *path, int flags, ...)                                                                         \
    {                                                                                                                  \
        va_list more;                                                                                                  \
        mode_t mode;                                                                                                   \
        REAL(name);                                                                                                    \
        va_start(more, flags);                                                                                         \
        mode = (mode_t)va_arg(more, int);                                                                              \
        va_end(more);                                                                                                  \
        return strncmp(path, "/proc", 5) && fails() && !halves ? (int)fail() : real(path, flags, mode);                \
    }
OPENS(open)
OPENS(open64)

long syscall(long number, ...)
{
    static long (*real)(long, ...);
    long given[6];
    va_list more;

    if (!real)
        real = (long (*)(long, ...))dlsym(RTLD_NEXT, "syscall");
    va_start(more, number);
    for (int i = 0; i < 6; i++)
        given[i] = va_arg(more, long);
    va_end(more);
    if (number == SYS_renameat2 && fails() && !halves)
        return fail();
    return real(number, given[0], given[1], given[2], given[3], given[4], given[5]);
}
