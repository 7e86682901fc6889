/* Opens the files of snapshots, which may be anything by the time they are opened, and reads all that is asked of them.
 */
#ifndef DIRTYLOG_SNAPSHOT_FILES_H
#define DIRTYLOG_SNAPSHOT_FILES_H

#include <errno.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

/* Open a regular file for reading and say how long it is; -errno, and -ENODATA for what is not one. */
static inline int dl_open_regular(const char *path, off_t *size)
{
    struct stat status;
    /* Not blocking: a name in a directory that somebody else fills may be a pipe. */
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);

    if (fd < 0)
        return -errno;
    if (fstat(fd, &status) || !S_ISREG(status.st_mode)) {
        close(fd);
        return -ENODATA;
    }
    *size = status.st_size;
    return fd;
}

/* Read so many bytes; -ENODATA where the file ends before. */
static inline int dl_read_all(int fd, char *target, size_t nbytes, off_t offset)
{
    while (nbytes) {
        ssize_t done = pread(fd, target, nbytes, offset);

        if (done < 0 && errno == EINTR)
            continue;
        if (done <= 0)
            return done < 0 ? -errno : -ENODATA;
        target += done;
        offset += done;
        nbytes -= (size_t)done;
    }
    return 0;
}

#endif
