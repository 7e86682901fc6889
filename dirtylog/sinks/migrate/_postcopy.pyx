# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
# cython: auto_pickle=False, autotestdict=False, freethreading_compatible=True, embedsignature=True
"""Memory that a program uses while it arrives: what is missing is asked for when it is touched."""

cimport cython
from cpython.exc cimport PyErr_CheckSignals
from libc.stdint cimport int64_t, uint64_t, uintptr_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset, strerror

from dirtylog._bits.blocks cimport kernels
from dirtylog.sinks.migrate._frames cimport (
    DL_FRAME_EXTENT,
    DL_FRAME_EXTENTS,
    DL_FRAME_MOST,
    Memory,
    check_granule,
    dl_crc32_prepare,
    dl_reading,
    dl_space,
    dl_taking,
)

__all__ = ["FILLED", "GOES_ON", "ODD", "Faults"]


cdef extern from "sinks/migrate/_guard.h" nogil:
    cdef struct dl_guard:
        dl_space space
        int64_t granule
        uint64_t *missing
        size_t page_bytes
        int user_mode_only


cdef extern from "sinks/migrate/_postcopy.h" nogil:
    size_t DL_FRAME_SESSION
    int DL_POSTCOPY_GOES_ON
    int DL_POSTCOPY_FILLED
    int DL_POSTCOPY_ODD
    cdef struct dl_postcopy_line:
        int fd
        uint64_t received
        uint64_t sent
        double patience
    cdef struct dl_postcopy:
        dl_taking taking
        dl_guard guard
        uint64_t *asked
        unsigned char *session
        int started
        int filled
        int64_t left
        uint64_t applied
        dl_reading reading
    int64_t dl_postcopy_left(dl_postcopy *p) noexcept
    uint64_t dl_postcopy_applied(dl_postcopy *p) noexcept
    void dl_postcopy_init(dl_postcopy *p) noexcept
    int dl_postcopy_guard(dl_postcopy *p) noexcept
    void dl_postcopy_unguard(dl_postcopy *p) noexcept
    int dl_postcopy_start(dl_postcopy *p) noexcept
    void dl_postcopy_take_line(dl_postcopy *p, const dl_postcopy_line *line) noexcept
    void dl_postcopy_stop(dl_postcopy *p) noexcept
    void dl_postcopy_leave(dl_postcopy *p) noexcept
    int dl_postcopy_wait(dl_postcopy *p, double seconds) noexcept


dl_crc32_prepare()

GOES_ON, FILLED, ODD = DL_POSTCOPY_GOES_ON, DL_POSTCOPY_FILLED, DL_POSTCOPY_ODD


@cython.final
cdef class Faults(Memory):
    """Guard memory of which a part is missing, and fill it over a line.

    Parameters
    ----------
    regions : sequence of (int, buffer)
        The memory: where each region begins in the page space, and its bytes, writable; private, anonymous, and whole
        pages of the system's: what follows a region up to the end of its last page is the region's.
    nbytes : int
        Of the page space.
    granule : int
        Bytes of what is missing or not; a multiple of the system's pages.
    missing : uint64 array
        A bit for each granule that is to come.
    session : bytes
        Of the migration.

    Attributes
    ----------
    user_mode_only : bool
        System calls on what is missing answer EFAULT: this process may not have a userfaultfd that covers the kernel.
    left, applied : int
        Granules that are missing; frames that have been applied.

    Raises
    ------
    OSError
        The kernel does not let this memory be guarded.

    Notes
    -----
    From the start on nothing but the end of the process takes the guard away before everything is there: a program that
    is lost waits, and does not read zeros. A child of a fork has none of the memory meanwhile.
    """

    cdef dl_postcopy *p

    def __init__(self, regions, int64_t nbytes, int64_t granule, const uint64_t[::1] missing, bytes session not None):
        cdef int64_t granules
        cdef int64_t i
        cdef size_t words
        cdef size_t rows = DL_FRAME_EXTENT * DL_FRAME_EXTENTS
        cdef uintptr_t address
        cdef int error
        if self.p != NULL:
            raise TypeError("Faults was initialised before")
        self.p = <dl_postcopy *>calloc(1, sizeof(dl_postcopy))
        if self.p == NULL:
            raise MemoryError
        dl_postcopy_init(self.p)
        check_granule(granule)
        if granule % <int64_t>self.p.guard.page_bytes:
            raise ValueError(f"granule is {granule}; it must be a multiple of {self.p.guard.page_bytes}, the system's "
                             "page")
        if <size_t>len(session) != DL_FRAME_SESSION:
            raise ValueError(f"session has {len(session)} bytes; it must have {DL_FRAME_SESSION}")
        granules = (nbytes + granule - 1) // granule
        words = <size_t>(granules + 63) // 64
        if <size_t>missing.shape[0] < words:
            raise ValueError(f"missing has {missing.shape[0]} words; {granules} granules take {words}")
        self.keep(regions, nbytes, True, "memory")
        for i in range(self.space.count):
            address = <uintptr_t>self.regions[i].data
            if address % self.p.guard.page_bytes or self.regions[i].start % granule:
                raise ValueError(f"region {i} begins at {self.regions[i].start}, address {address:#x}: it must begin "
                                 "with a page of the system's")
        cdef unsigned char *at = self.room(16 * words + rows + <size_t>granule + DL_FRAME_MOST)
        self.p.guard.missing = <uint64_t *><void *>at
        self.p.asked = self.p.guard.missing + words
        memset(at, 0, 16 * words)
        if words:
            memcpy(self.p.guard.missing, &missing[0], 8 * words)
        self.p.left = <int64_t>kernels.popcount(self.p.guard.missing, words)
        at += 16 * words
        self.p.taking.rows = <int64_t *><void *>at
        self.p.taking.scratch = at + rows
        self.p.reading.payload = at + rows + granule
        self.p.taking.space = self.p.guard.space = self.space
        self.p.taking.granule = self.p.guard.granule = granule
        self.p.taking.share.channels = 1
        self.p.taking.share.stripe = 64
        memcpy(self.p.session, <char *>session, DL_FRAME_SESSION)
        with nogil:
            error = dl_postcopy_guard(self.p)
        if error:
            raise OSError(-error, f"userfaultfd over the memory that is to be filled: {strerror(-error).decode()}")

    def __dealloc__(self):
        if self.p == NULL:
            return
        with nogil:
            dl_postcopy_leave(self.p)
        free(self.p)

    @property
    def user_mode_only(self):
        return self.p.guard.user_mode_only != 0

    @property
    def left(self):
        return dl_postcopy_left(self.p)

    @property
    def applied(self):
        return dl_postcopy_applied(self.p)

    def start(self):
        """Begin to answer faults; from here on the memory may be used."""
        cdef int error = 0
        if not self.p.started:
            error = dl_postcopy_start(self.p)
        if error:
            raise OSError(-error, f"a thread for the faults: {strerror(-error).decode()}")

    def line(self, int fd, uint64_t received, uint64_t sent, double patience):
        """Fill it over this line.

        Parameters
        ----------
        fd : int
            Of a connected stream socket, which stays open until `wait` says why it ended, or `stop` has returned.
        received, sent : int
            Numbers of the next frames.
        patience : float
            Seconds for which it may be silent; 0: for ever.
        """
        cdef dl_postcopy_line line
        line.fd, line.received, line.sent, line.patience = fd, received, sent, patience
        dl_postcopy_take_line(self.p, &line)

    def wait(self, double seconds):
        """Wait for the end.

        Returns
        -------
        int
            `GOES_ON`: the time is over. `FILLED`: all of it is there. Negative: why the line ended; `ODD`: by what
            came.
        """
        cdef int why
        with nogil:
            why = dl_postcopy_wait(self.p, seconds)
        PyErr_CheckSignals()
        return why

    def stop(self):
        """End the thread, and with it the use of the line. What is missing stays guarded."""
        with nogil:
            dl_postcopy_stop(self.p)

    def release(self):
        """Take the guard away: all is there, or nobody has used the memory and nobody will."""
        with nogil:
            dl_postcopy_stop(self.p)
            dl_postcopy_unguard(self.p)
