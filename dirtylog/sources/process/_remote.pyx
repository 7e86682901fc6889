# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
# cython: auto_pickle=False, autotestdict=False, freethreading_compatible=True, embedsignature=True
"""What attaching needs below Python: one injected call, and scans of another process's page tables."""

from libc.errno cimport EFAULT, EPERM, ESRCH, errno
from libc.stdint cimport int64_t, uint64_t
from libc.stdlib cimport free, malloc, realloc
from libc.string cimport memcpy, strerror
from posix.fcntl cimport O_RDONLY, open as posix_open
from posix.unistd cimport close as posix_close

cimport cython

import os

import numpy as np

PAGE_SIZE = os.sysconf("SC_PAGESIZE")
# A division for each region that a scan finds would take longer than all else that is done with it.
cdef int PAGE_SHIFT = PAGE_SIZE.bit_length() - 1


cdef extern from "<fcntl.h>" nogil:
    enum:
        O_CLOEXEC


cdef extern from "sources/_pagemap.h" nogil:
    enum:
        DL_SCAN_VECTOR
    struct page_region:
        uint64_t start, end, categories
    struct uffdio_range:
        uint64_t start, len
    struct uffdio_writeprotect:
        uffdio_range range
        uint64_t mode
    unsigned long UFFDIO_WRITEPROTECT
    int dl_uffd_start(int uffd)
    int dl_uffd_register(int uffd, uint64_t start, uint64_t end)
    int dl_uffd_unregister(int uffd, uint64_t start, uint64_t end)
    int dl_pagemap_scan(int pagemap, uint64_t *at, uint64_t end, int take, page_region *vector)
    int dl_pagemap_populated(int pagemap, uint64_t *at, uint64_t end, int swapped, page_region *vector)
    int dl_pagemap_copies(int pagemap, uint64_t *at, uint64_t end, page_region *vector)


# What a walk looks for.
cdef enum Wanted:
    WRITTEN
    POPULATED
    COPIES


cdef extern from "<sys/ioctl.h>" nogil:
    int ioctl(int descriptor, unsigned long request, ...)


cdef extern from "<sys/uio.h>" nogil:
    struct iovec:
        void *iov_base
        size_t iov_len
    ssize_t process_vm_readv(int pid, const iovec *here, unsigned long nhere, const iovec *there,
                             unsigned long nthere, unsigned long flags)


cdef extern from "sources/process/_inject.h" nogil:
    enum dl_inject_step:
        DL_INJECT_DONE
        DL_INJECT_HELPER
        DL_INJECT_GADGET
        DL_INJECT_SEIZE
        DL_INJECT_STOP
        DL_INJECT_WORD_SIZE
        DL_INJECT_REGISTERS
        DL_INJECT_CALL
        DL_INJECT_USERFAULTFD
        DL_INJECT_PIDFD
        DL_INJECT_KEEPER
        DL_INJECT_DETACH
        DL_INJECT_UNSUPPORTED
    struct dl_injection:
        int pid, tid, patience_ms, in_process, keep, stop_at
        int uffd, keeper, error
        dl_inject_step step
        uint64_t stopped_ns
        int calls
    int dl_inject(dl_injection *injection)
    void dl_let_go(dl_injection *injection)
    int dl_hold(int tid, int patience_ms)
    int dl_let_run(int tid)


cdef extern from "sources/process/_launch.h" nogil:
    struct dl_launch_struct "dl_launch":
        char **words
        char **begins
        dl_injection in_ "in"
        int refused, ended, status
    int dl_launch(dl_launch_struct *launch)
    int dl_launch_go(int pid)
    int dl_same_memory(int pid, int other)
    int dl_pass_signals(int pid)


_STEPS = {
    DL_INJECT_HELPER: "clone() of the helper that traces",
    DL_INJECT_GADGET: "looking for a system call instruction in the target's code",
    DL_INJECT_SEIZE: "ptrace(PTRACE_SEIZE)",
    DL_INJECT_STOP: "waiting for the thread to stop",
    DL_INJECT_WORD_SIZE: "the target runs 32-bit code",
    DL_INJECT_REGISTERS: "ptrace() of the thread's registers",
    DL_INJECT_CALL: "the injected system call",
    DL_INJECT_USERFAULTFD: "userfaultfd(UFFD_USER_MODE_ONLY) in the target",
    DL_INJECT_PIDFD: "pidfd_getfd()",
    DL_INJECT_KEEPER: "clone() of a process that keeps the memory",
    DL_INJECT_DETACH: "ptrace(PTRACE_DETACH)",
    DL_INJECT_UNSUPPORTED: "attaching by ptrace on this architecture",
}


def inject(int pid, int tid, *, int patience_ms=1000, bint in_process=False, int stop_at=0):
    """Get a userfaultfd of another process's memory.

    Parameters
    ----------
    pid, tid : int
        The process, and the thread of it that is stopped for about a millisecond.
    patience_ms : int
        How long the thread may take to stop, in milliseconds.
    in_process : bool
        Trace from the calling thread. Otherwise a helper process traces, which
        finishes even when this process is killed meanwhile.
    stop_at : int
        For tests: the helper stops itself (SIGSTOP) before its ptrace call of this number.

    Returns
    -------
    descriptor : int
        Ours. The target keeps none.
    stopped : float
        Seconds for which the thread stood still.
    calls : int
        The ptrace calls that were made.

    Raises
    ------
    OSError
        ``strerror`` names the step and its answer. The target goes on as before.

    References
    ----------
    ``ptrace(2)``, ``pidfd_getfd(2)``.
    """
    cdef dl_injection injection

    injection.pid = pid
    injection.tid = tid
    injection.patience_ms = patience_ms
    injection.in_process = in_process
    injection.keep = 0
    injection.stop_at = stop_at
    with nogil:
        dl_inject(&injection)
    if injection.error:
        raise OSError(-injection.error, f"{_STEPS[injection.step]}: {strerror(-injection.error).decode()}")
    return injection.uffd, injection.stopped_ns / 1e9, injection.calls


def adopt(int pid, *, int patience_ms=1000):
    """Get a userfaultfd of our own child's memory, and a process that keeps that memory.

    Parameters
    ----------
    pid, patience_ms : int
        As for :func:`inject`; `pid` was started by this process.

    Returns
    -------
    descriptor, keeper : int
        Ours. The keeper is a child of ours that never runs: end and wait for it. It is
        ended by the kernel when the calling thread ends.

    Raises
    ------
    OSError
        As for :func:`inject`. After ETIMEDOUT end the calling thread, so that the
        child is not held when it stops later.
    """
    cdef dl_injection injection

    injection.pid = injection.tid = pid
    injection.patience_ms = patience_ms
    injection.in_process = injection.keep = 1
    injection.stop_at = 0
    with nogil:
        dl_inject(&injection)
    if injection.error:
        raise OSError(-injection.error, f"{_STEPS[injection.step]}: {strerror(-injection.error).decode()}")
    return injection.uffd, injection.keeper


def launch(words, begins=None):
    """Start a program, and stop it where watching it begins.

    Parameters
    ----------
    words : list of bytes
        The program, found on PATH, and its arguments.
    begins : list of bytes, optional
        Paths, or parts of paths after ``*``: it is stopped when it has opened, read
        and closed one of them; after ``!``, one that it opened without O_CLOEXEC.
        Otherwise at its very start.

    Returns
    -------
    pid, descriptor, keeper : int
        The program, stopped and traced by the calling thread until :func:`go`; a
        userfaultfd of it; a child of ours that keeps its memory, and never runs.
        Descriptor and keeper are -1 if the program has ended before.
    status : int
        Then that of ``waitpid``; otherwise 0.

    Raises
    ------
    OSError
        The program cannot be executed: ``filename`` is its name. Or it cannot be
        traced: no filename. No process is left then.

    References
    ----------
    ``ptrace(2)``, ``execve(2)``.
    """
    cdef dl_launch_struct launch
    cdef Py_ssize_t i

    words, begins = list(words), list(begins or ())
    launch.words = <char **>malloc((len(words) + 1) * sizeof(char *))
    launch.begins = <char **>malloc((len(begins) + 1) * sizeof(char *))
    all_begins = launch.begins
    try:
        if launch.words == NULL or launch.begins == NULL:
            raise MemoryError
        for i in range(len(words)):
            launch.words[i] = <bytes?>words[i]
        launch.words[len(words)] = NULL
        for i in range(len(begins)):
            launch.begins[i] = <bytes?>begins[i]
        launch.begins[len(begins)] = NULL
        if not begins:
            launch.begins = NULL
        launch.in_.patience_ms = 10000
        launch.in_.in_process = launch.in_.keep = 1
        with nogil:
            dl_launch(&launch)
    finally:
        free(launch.words)
        free(all_begins)
    if launch.refused:
        raise OSError(launch.refused, strerror(launch.refused).decode(), os.fsdecode(words[0]))
    if launch.in_.error:
        raise OSError(-launch.in_.error, f"{_STEPS[launch.in_.step]}: {strerror(-launch.in_.error).decode()}")
    if launch.ended:
        return launch.in_.pid, -1, -1, launch.status
    return launch.in_.pid, launch.in_.uffd, launch.in_.keeper, 0


def go(int pid):
    """Let a program that :func:`launch` has stopped run, untraced; called by the same thread."""
    cdef int error = dl_launch_go(pid)

    if error and -error != ESRCH:  # it was killed meanwhile: whoever waits for it finds out
        raise OSError(-error, f"ptrace(PTRACE_DETACH) of process {pid}: {strerror(-error).decode()}")


def pass_signals(int pid):
    """Pass the signals that are sent to this process on to a child of it, until called with 0.

    SIGINT, SIGQUIT, SIGTERM, SIGHUP, SIGUSR1, SIGUSR2 and SIGWINCH, but for those
    that a terminal sends: it sends them to the child as well.
    """
    cdef int error = dl_pass_signals(pid)

    if error:
        raise OSError(-error, f"sigaction: {strerror(-error).decode()}")


def same_memory(int pid, int other):
    """Tell whether two processes share their memory; None where the kernel cannot say.

    References
    ----------
    ``kcmp(2)``.
    """
    cdef int answer = dl_same_memory(pid, other)

    return None if answer < 0 else bool(answer)


def hold(int tid, int patience_ms):
    """Stop a thread of another process, until :func:`let_run`, or until the calling thread ends.

    Raises
    ------
    OSError
        EPERM: it may not be traced. ESRCH: it is gone. ETIMEDOUT: it did not stop
        in time; then end the calling thread, so that it is not held later.

    References
    ----------
    ``PTRACE_SEIZE`` and ``PTRACE_INTERRUPT`` in ``ptrace(2)``.
    """
    cdef int error

    with nogil:
        error = dl_hold(tid, patience_ms)
    if error:
        raise OSError(-error, f"stopping thread {tid} by ptrace: {strerror(-error).decode()}")


def let_run(int tid):
    """Let a thread go on that this thread holds; one that was killed meanwhile needs nothing."""
    cdef int error = dl_let_run(tid)

    if error and error != -ESRCH:
        raise OSError(-error, f"ptrace(PTRACE_DETACH) of thread {tid}: {strerror(-error).decode()}")


@cython.final
cdef class Watch:
    """A process's memory, watched through a userfaultfd of it and its pagemap.

    Parameters
    ----------
    pid : int
        The process.
    uffd : int
        A userfaultfd that the process made. The watch owns it from here on. With
        -1, it can only be asked what memory holds (:meth:`populated`).
    pagemap : int
        The process's pagemap, owned as well; opened here when -1.

    Raises
    ------
    OSError
        The kernel lacks asynchronous write protection, or the pagemap cannot be
        opened. The descriptor is closed.

    Notes
    -----
    One call at a time: the caller has a lock.
    """

    cdef readonly int pid
    cdef int uffd, pagemap
    # Arguments of a wrong type are refused before the first line of `__cinit__`, and 0 is somebody's descriptor.
    cdef bint owns
    cdef page_region *vector

    def __cinit__(self, int pid, int uffd, int pagemap=-1):
        cdef int error

        self.pid = pid
        self.uffd = uffd
        self.pagemap = pagemap
        self.owns = True
        self.vector = <page_region *>malloc(DL_SCAN_VECTOR * sizeof(page_region))
        if self.vector == NULL:
            raise MemoryError
        error = dl_uffd_start(uffd) if uffd >= 0 else 0
        if error < 0:
            raise OSError(-error, f"ioctl(UFFDIO_API) with WP_UNPOPULATED and WP_ASYNC: {strerror(-error).decode()}")
        path = f"/proc/{pid}/pagemap".encode()
        if self.pagemap < 0:
            self.pagemap = posix_open(<const char *>path, O_RDONLY | O_CLOEXEC)
        if self.pagemap < 0:
            raise OSError(errno, f"open(/proc/{pid}/pagemap): {strerror(errno).decode()}")

    def __dealloc__(self):
        if self.owns:
            self.close()
        free(self.vector)

    def close(self):
        """Let the memory go: the kernel drops the registration. A second call does nothing."""
        cdef int uffd = self.uffd, pagemap = self.pagemap

        self.uffd = self.pagemap = -1
        if uffd >= 0:
            posix_close(uffd)
        if pagemap >= 0:
            posix_close(pagemap)

    def alive(self) -> bool:
        """Tell whether the memory is still that process's: neither exit nor exec has replaced it.

        A scan of memory that is gone answers "nothing was written", for ever. Write-protecting answers ESRCH then,
        and for a page that is not registered ENOENT as long as the process lives; nothing is changed by asking.
        """
        cdef uffdio_writeprotect nothing
        cdef int answer

        nothing.range.start = 0x7ffffffff000 - 0x1000  # below the end of user space: never part of a mapping we watch
        nothing.range.len = 0x1000
        nothing.mode = 0
        with nogil:
            answer = ioctl(self.uffd, UFFDIO_WRITEPROTECT, &nothing)
            answer = errno if answer < 0 else 0
        return answer != ESRCH

    def register(self, uint64_t start, uint64_t end):
        """Begin to watch ``[start, end)``, addresses in bytes; until it is armed, all of it counts as written.

        Raises
        ------
        OSError
            EBUSY: another userfaultfd has it. EINVAL: memory that cannot be watched, a shared file say.
        """
        cdef int error

        with nogil:
            error = dl_uffd_register(self.uffd, start, end)
        if error < 0:
            raise OSError(-error, f"ioctl(UFFDIO_REGISTER) of {start:#x} to {end:#x}: {strerror(-error).decode()}")

    def unregister(self, uint64_t start, uint64_t end):
        """Stop watching; memory that is gone needs nothing."""
        with nogil:
            dl_uffd_unregister(self.uffd, start, end)

    def scan(self, const int64_t[:, ::1] areas not None, bint take):
        """Report what was written in some areas since the last scan that took.

        Parameters
        ----------
        areas : ndarray of int64, shape (n, 3)
            Start and end, addresses in bytes, and the number of the first page.
            In the order of the page numbers.
        take : bool
            Protect again what is reported (harvest); False only looks.

        Returns
        -------
        runs : ndarray of int64, shape (m, 2)
            First page and count, ascending.
        lost : list of int
            Areas that are not watched any more, in part or whole: replaced since.

        Raises
        ------
        OSError, MemoryError, KeyboardInterrupt, ...
            Some of the pages may have been taken: count every area as written.
        """
        return self.walk(areas, WRITTEN, take)

    def populated(self, const int64_t[:, ::1] areas not None, bint swapped):
        """Report the pages of private anonymous areas that may hold something else than zeros.

        Parameters
        ----------
        areas : ndarray of int64, shape (n, 3)
            As for :meth:`scan`.
        swapped : bool
            Count what is swapped out as well. For areas that are not armed yet:
            in others, every page that was never touched counts.

        Returns
        -------
        ndarray of int64, shape (m, 2)
            First page and count, ascending.
        """
        return self.walk(areas, POPULATED, swapped)[0]

    def copies(self, const int64_t[:, ::1] areas not None):
        """Report the pages of private areas of files that are copies of their own, made by a write.

        Parameters
        ----------
        areas : ndarray of int64, shape (n, 3)
            As for :meth:`scan`.

        Returns
        -------
        ndarray of int64, shape (m, 2)
            First page and count, ascending. Without what is swapped out.
        """
        return self.walk(areas, COPIES, False)[0]

    cdef tuple walk(self, const int64_t[:, ::1] areas, Wanted wanted, bint how):
        cdef Py_ssize_t i, n = areas.shape[0]
        cdef size_t used = 0, room = DL_SCAN_VECTOR
        cdef uint64_t at, end, begin, first
        cdef int answer, k
        cdef int64_t *found = NULL
        cdef int64_t *larger
        cdef int64_t[:, ::1] runs

        if areas.shape[1] != 3:
            raise ValueError(f"areas have shape ({n}, {areas.shape[1]}); (n, 3) is needed")
        found = <int64_t *>malloc(2 * room * sizeof(int64_t))
        if found == NULL:
            raise MemoryError
        lost = []
        try:
            for i in range(n):
                begin = at = <uint64_t>areas[i, 0]
                end = <uint64_t>areas[i, 1]
                first = <uint64_t>areas[i, 2]
                while at < end:
                    if room - used < <size_t>DL_SCAN_VECTOR:
                        room = 2 * room + DL_SCAN_VECTOR
                        larger = <int64_t *>realloc(found, 2 * room * sizeof(int64_t))
                        if larger == NULL:
                            raise MemoryError
                        found = larger
                    with nogil:
                        if wanted == WRITTEN:
                            answer = dl_pagemap_scan(self.pagemap, &at, end, how, self.vector)
                        elif wanted == POPULATED:
                            answer = dl_pagemap_populated(self.pagemap, &at, end, how, self.vector)
                        else:
                            answer = dl_pagemap_copies(self.pagemap, &at, end, self.vector)
                        for k in range(answer):
                            found[2 * used] = <int64_t>((self.vector[k].start - begin >> PAGE_SHIFT) + first)
                            found[2 * used + 1] = <int64_t>(self.vector[k].end - self.vector[k].start >> PAGE_SHIFT)
                            used += 1
                    if answer == -EPERM and wanted == WRITTEN:
                        lost.append(i)
                        break
                    if answer < 0:
                        raise OSError(-answer, f"ioctl(PAGEMAP_SCAN) of {begin:#x} to {end:#x}: "
                                      f"{strerror(-answer).decode()}")
            result = np.empty((used, 2), np.int64)
            if used:
                runs = result
                memcpy(&runs[0, 0], found, 2 * used * sizeof(int64_t))
            return result, lost
        finally:
            free(found)


def read_memory(int pid, const int64_t[:, ::1] extents not None, unsigned char[::1] out not None):
    """Read ranges of another process's memory, as far as they are there.

    Parameters
    ----------
    pid : int
        The process.
    extents : ndarray of int64, shape (n, 3)
        Address, length, and where in `out` it goes, all in bytes.
    out : writable buffer of bytes
        What cannot be read, because it is gone, stays as it is here.

    Returns
    -------
    int
        Bytes that could not be read.

    Raises
    ------
    OSError
        EPERM or ESRCH. Memory that is gone is not an error.
    IndexError
        An extent ends past `out`.

    References
    ----------
    ``process_vm_readv(2)``.
    """
    cdef Py_ssize_t i, n = extents.shape[0]
    cdef uint64_t length, done, page_bytes = <uint64_t>PAGE_SIZE
    cdef uint64_t missing = 0
    cdef ssize_t got
    cdef iovec here, there
    cdef int error = 0
    cdef unsigned char *target

    if n == 0:
        return 0
    if extents.shape[1] != 3:
        raise ValueError(f"extents have shape ({n}, {extents.shape[1]}); (n, 3) is needed")
    for i in range(n):
        if extents[i, 1] < 0 or extents[i, 2] < 0 or extents[i, 2] > out.shape[0] - extents[i, 1]:
            raise IndexError(f"extent {i} is {extents[i, 1]} bytes to offset {extents[i, 2]}; out has {out.shape[0]}")
    target = &out[0] if out.shape[0] else NULL
    with nogil:
        for i in range(n):
            length = <uint64_t>extents[i, 1]
            done = 0
            while done < length and not error:
                here.iov_base = target + extents[i, 2] + done
                here.iov_len = there.iov_len = length - done
                there.iov_base = <void *>(<uint64_t>extents[i, 0] + done)
                got = process_vm_readv(pid, &here, 1, &there, 1, 0)
                if got > 0:
                    done += <uint64_t>got
                elif got < 0 and errno != EFAULT:
                    error = errno
                else:
                    # This page is not there; on with the next.
                    got = <ssize_t>min(page_bytes - (<uint64_t>there.iov_base) % page_bytes, length - done)
                    missing += <uint64_t>got
                    done += <uint64_t>got
    if error:
        raise OSError(error, f"process_vm_readv of process {pid}: {strerror(error).decode()}")
    return missing
