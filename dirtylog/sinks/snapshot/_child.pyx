# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
# cython: auto_pickle=False, autotestdict=False, freethreading_compatible=True, embedsignature=True
"""Lets a child process hold a moment of the memory, and write it, while this process goes on.

The child is a copy of this process in which one thread runs, with every lock as others had left it. So it does nothing
but system calls: no Python, no allocation, nothing that a lock could be needed for, and no handler of a fork. It is
made by the system call itself, without a signal at its end: neither who waits for children of their own nor who has a
handler for SIGCHLD ever meets it. Descriptors are shared with it, not copied, so what others close is closed.
"""

import os

from cpython.exc cimport PyErr_CheckSignals
from libc.errno cimport EINTR
from libc.stdint cimport int64_t

__all__ = ["available", "write_moment"]


cdef extern from *:
    """
    #include <errno.h>
    #include <stdint.h>
    #include <signal.h>
    #include <stddef.h>
    #include <sys/types.h>
    #include <sys/uio.h>
    #include <unistd.h>
    #ifdef __linux__
    #include <sched.h>
    #include <sys/prctl.h>
    #include <sys/syscall.h>
    #include <sys/wait.h>

    /* Not the library's, which looks at what other threads may have left, and which sanitizers replace. */
    static ssize_t dl_child_pwritev(int fd, const struct iovec *vectors, int count, int64_t offset)
    {
    #ifdef __LP64__
        return syscall(SYS_pwritev, fd, vectors, count, offset, 0);
    #else
        return pwritev(fd, vectors, count, (off_t)offset);
    #endif
    }

    /* The child. Its exit code is an errno, 0 if all is written. errno itself is its own: it has a copy. */
    static int dl_child_writes(int fd, const int64_t *pieces, ptrdiff_t n, long parent)
    {
        /* Whoever kills the parent has no child left over; a parent that ended before this was said, neither. */
        if (syscall(SYS_prctl, PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0) || syscall(SYS_getppid) != parent)
            return ESRCH;
        for (ptrdiff_t i = 0; i < n;) {
            struct iovec vectors[64];
            int64_t offset = pieces[3 * i + 1], end = offset;
            int first = 0, count = 0;
            /* Pieces that are neighbours in the file, wherever they are in memory, are one call. */
            for (; i < n && count < 64 && pieces[3 * i + 1] == end; i++) {
                vectors[count].iov_base = (void *)(uintptr_t)pieces[3 * i];
                vectors[count++].iov_len = (size_t)pieces[3 * i + 2];
                end += pieces[3 * i + 2];
            }
            while (first < count) {
                ssize_t done = dl_child_pwritev(fd, vectors + first, count - first, offset);
                if (done < 0 && errno == EINTR)
                    continue;
                if (done < 0 || (done == 0 && end > offset))
                    return done < 0 ? errno : EIO;
                offset += done;
                while (first < count && (size_t)done >= vectors[first].iov_len)
                    done -= (ssize_t)vectors[first++].iov_len;
                if (first < count) {
                    vectors[first].iov_base = (char *)vectors[first].iov_base + done;
                    vectors[first].iov_len -= (size_t)done;
                }
            }
        }
        return 0;
    }

    static int dl_fork_and_write(int fd, const int64_t *pieces, ptrdiff_t n)
    {
        sigset_t all, before;
        long parent = syscall(SYS_getpid), pid;
        int error;
        /* Blocked in the child, or a handler of Python's would run there; Ctrl-C reaches all of a terminal. */
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before);
    #if defined(__s390__) || defined(__CRIS__)
        pid = syscall(SYS_clone, 0, CLONE_FILES, 0, 0, 0);
    #else
        pid = syscall(SYS_clone, CLONE_FILES, 0, 0, 0, 0);
    #endif
        error = errno;
        if (pid == 0)
            for (;;)
                syscall(SYS_exit_group, dl_child_writes(fd, pieces, n, parent));
        pthread_sigmask(SIG_SETMASK, &before, NULL);
        return pid < 0 ? -error : (int)pid;
    }

    /* Wait for the child: 0 and its status, or -errno. */
    static int dl_reap(int pid, int *status)
    {
        return waitpid(pid, status, __WALL) == pid ? 0 : -errno;
    }

    static int dl_exit_code(int status) { return WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status); }
    #define DL_FORKS 1
    #else
    static int dl_fork_and_write(int fd, const int64_t *pieces, ptrdiff_t n) { return -ENOSYS; }
    static int dl_reap(int pid, int *status) { return -ENOSYS; }
    static int dl_exit_code(int status) { return 0; }
    #define DL_FORKS 0
    #endif
    """
    bint DL_FORKS
    int SIGKILL
    int dl_fork_and_write(int fd, const int64_t *pieces, Py_ssize_t n) nogil
    int dl_reap(int pid, int *status) nogil
    int dl_exit_code(int status) nogil
    int kill(int pid, int signal) nogil


def available():
    """Say whether this system has such a child: Linux has."""
    return DL_FORKS


def write_moment(int descriptor, const int64_t[:, ::1] pieces, taken):
    """Let a child write memory as it is now, and wait for its end.

    Parameters
    ----------
    descriptor : int
        The file.
    pieces : int64 array of shape (n, 3)
        Address, offset in the file and length in bytes. The memory is there until `taken` is called, at least.
    taken : callable
        Called with the child's process id as soon as the moment is held: writers may go on.

    Returns
    -------
    int
        0: all is written. Above: the errno that the child met. Below: the signal that ended it, negated.

    Raises
    ------
    OSError
        There is no child: EAGAIN, ENOMEM.
    Exception
        What `taken` or a handler of a signal raised; the child has ended.

    Notes
    -----
    The child has ended when this returns or raises: it shares the descriptor, whose number may be of another file
    later. The GIL is released while it waits.
    """
    cdef const int64_t *rows = NULL
    cdef Py_ssize_t n = pieces.shape[0]
    cdef int pid, answer = -EINTR, status = 0
    if pieces.shape[1] != 3:
        raise ValueError(f"pieces have {pieces.shape[1]} columns; they are address, offset and length")
    if n:
        rows = &pieces[0, 0]
    with nogil:
        pid = dl_fork_and_write(descriptor, rows, n)
    if pid < 0:
        raise OSError(-pid, f"no process could be made to hold the moment: {os.strerror(-pid)}")
    try:
        taken(pid)
        while answer == -EINTR:
            with nogil:
                answer = dl_reap(pid, &status)
            if answer == -EINTR:
                PyErr_CheckSignals()
    finally:
        if answer == -EINTR:
            kill(pid, SIGKILL)
            while answer == -EINTR:
                answer = dl_reap(pid, &status)
    if answer < 0:
        raise OSError(-answer, os.strerror(-answer))
    return dl_exit_code(status)
