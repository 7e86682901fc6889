# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
# cython: auto_pickle=False, autotestdict=False, freethreading_compatible=True, embedsignature=True
"""Loads and stores of a virtqueue's indices, in the order that the guest's driver relies on."""

from libc.stdint cimport uint16_t, uintptr_t


cdef extern from "sources/vhost/_queues.h" nogil:
    uint16_t dl_ring_index(const uint16_t *index)
    void dl_ring_publish(uint16_t *index, uint16_t value)
    void dl_ring_fence()


__all__ = ["fence", "index", "publish"]


cdef uint16_t *place(unsigned char[::1] memory, Py_ssize_t at) except NULL:
    if at < 0 or at > memory.shape[0] - 2 or (<uintptr_t>&memory[at]) % 2:
        raise ValueError(f"an index at {at} is not aligned, or not in the {memory.shape[0]} bytes of memory")
    return <uint16_t *>&memory[at]


def index(unsigned char[::1] memory not None, Py_ssize_t at):
    """Load an index; what it makes valid is to be read after this.

    Parameters
    ----------
    memory : writable buffer of bytes
        The guest's.
    at : int
        Where the index is, in bytes: a multiple of 2.

    Raises
    ------
    ValueError
        It is not aligned, or not in the memory.

    Notes
    -----
    An acquire load: pairs with the driver's barrier before its store.
    """
    return dl_ring_index(place(memory, at))


def publish(unsigned char[::1] memory not None, Py_ssize_t at, uint16_t value):
    """Store an index, after all that it makes valid; parameters and errors are those of :func:`index`.

    Notes
    -----
    A release store: pairs with the driver's barrier after its load.
    """
    dl_ring_publish(place(memory, at), value)


def fence():
    """Let what was published be seen before it is read whether the driver wants to be told: a full fence."""
    dl_ring_fence()
