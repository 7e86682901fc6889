# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
# cython: auto_pickle=False, autotestdict=False, freethreading_compatible=True, embedsignature=True
"""What is behind a source: memory that can still be read, and the process that it belongs to."""

from libc.stdint cimport uint64_t
from libc.string cimport strerror

from dirtylog._bits.atomic cimport dl_fetch_add, dl_load_acquire


cdef extern from "sources/_backing.h" nogil:
    int dl_memory_mapped(uint64_t start, uint64_t end)
    int dl_memory_readable(uint64_t start, uint64_t end, uint64_t page_size)


cdef extern from "<pthread.h>" nogil:
    int pthread_atfork(void (*prepare)() noexcept nogil, void (*parent)() noexcept nogil,
                       void (*child)() noexcept nogil)


__all__ = ["births", "check_readable", "forks"]

# Forks that this process began, and forks that it is the child of, by os.fork() and by fork(3) of any C library alike.
cdef uint64_t begun = 0
cdef uint64_t born = 0


cdef void before_fork() noexcept nogil:
    dl_fetch_add(&begun, 1)


cdef void after_fork_in_child() noexcept nogil:
    dl_fetch_add(&born, 1)


if pthread_atfork(before_fork, NULL, after_fork_in_child):
    raise MemoryError("no memory to be told of forks")


def forks() -> int:
    """Count the forks that this process, or its parents, have begun since dirtylog was imported."""
    return dl_load_acquire(&begun)


def births() -> int:
    """Count the forks since then that this process is the child of."""
    return dl_load_acquire(&born)


def check_readable(uint64_t start, uint64_t nbytes, uint64_t page_size, edges=None):
    """Refuse memory whose reading would end the process.

    Parameters
    ----------
    start, nbytes : int
        The range, in bytes.
    page_size : int
        Bytes: the system's own.
    edges : sequence of int, optional
        Addresses of the last page of each file's part of it. A file is cut from its
        end, so where they can be read the rest can, which costs less than asking for
        every page.

    Raises
    ------
    OSError
        ENOMEM: part of it is not mapped any more. EFAULT: the file behind it was cut.

    Notes
    -----
    The answer is of the moment: a file that is cut between the answer and the
    reading still raises SIGBUS.
    """
    cdef int error
    cdef uint64_t first = start & ~(page_size - 1)
    cdef uint64_t end = (start + nbytes + page_size - 1) & ~(page_size - 1)

    if edges is None:
        with nogil:
            error = dl_memory_readable(first, end, page_size)
    else:
        with nogil:
            error = dl_memory_mapped(first, end)
        for edge in edges:
            if error:
                break
            error = dl_memory_readable(edge, <uint64_t>edge + page_size, page_size)
    if error < 0:
        raise OSError(-error, strerror(-error).decode())
