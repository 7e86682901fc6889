# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
# cython: auto_pickle=False, autotestdict=False, freethreading_compatible=True, embedsignature=True
"""Memory that a program uses while it arrives: what is missing is asked for when it is touched."""

cimport cython
from cpython.exc cimport PyErr_CheckSignals
from libc.stdint cimport int64_t, uint64_t, uintptr_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, strerror

from dirtylog._bits.copying cimport HeldBuffer, hold

__all__ = ["FILLED", "GOES_ON", "ODD", "Faults"]


cdef extern from "sinks/migrate/_postcopy.h" nogil:
    size_t DL_FRAME_EXTENTS
    size_t DL_FRAME_MOST
    size_t DL_FRAME_WINDOW
    size_t DL_FRAME_SESSION
    int DL_POSTCOPY_GOES_ON
    int DL_POSTCOPY_FILLED
    int DL_POSTCOPY_ODD
    cdef struct dl_region:
        int64_t start
        int64_t end
        unsigned char *data
    cdef struct dl_space:
        const dl_region *regions
        int64_t count
        int64_t nbytes
    cdef struct dl_share:
        int64_t index
        int64_t channels
        int64_t stripe
    cdef struct dl_taking:
        dl_space space
        int64_t granule
        dl_share share
        unsigned char *scratch
        int64_t *rows
    cdef struct dl_reading:
        unsigned char *payload
    cdef struct dl_postcopy_line:
        int fd
        uint64_t received
        uint64_t sent
        double patience
    cdef struct dl_postcopy:
        dl_taking taking
        uint64_t *missing
        uint64_t *asked
        unsigned char *payload
        unsigned char *session
        size_t page_bytes
        int uffd
        int user_mode_only
        int started
        int filled
        int64_t left
        uint64_t applied
        dl_reading reading
    void dl_crc32_prepare() noexcept
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
cdef class Faults:
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
    cdef list held
    cdef dl_region *regions
    cdef unsigned char *block
    cdef int64_t granules

    def __init__(self, regions, int64_t nbytes, int64_t granule, const uint64_t[::1] missing, bytes session not None):
        cdef HeldBuffer each
        cdef size_t words, i
        cdef size_t rows = 16 * DL_FRAME_EXTENTS
        cdef int error
        cdef int64_t left = 0
        if self.p != NULL:
            raise TypeError("Faults was initialised before")
        self.p = <dl_postcopy *>calloc(1, sizeof(dl_postcopy))
        if self.p == NULL:
            raise MemoryError
        dl_postcopy_init(self.p)
        if granule <= 0 or granule % <int64_t>self.p.page_bytes or granule > <int64_t>DL_FRAME_WINDOW:
            raise ValueError(f"granule is {granule}; it must be a multiple of {self.p.page_bytes}, the system's page")
        if <size_t>len(session) != DL_FRAME_SESSION:
            raise ValueError(f"session has {len(session)} bytes; it must have {DL_FRAME_SESSION}")
        self.granules = (nbytes + granule - 1) // granule
        words = <size_t>(self.granules + 63) // 64
        if <size_t>missing.shape[0] < words:
            raise ValueError(f"missing has {missing.shape[0]} words; {self.granules} granules take {words}")
        self.held = []
        self.regions = <dl_region *>calloc(max(len(regions), 1), sizeof(dl_region))
        self.block = <unsigned char *>calloc(1, 16 * words + rows + <size_t>granule + DL_FRAME_MOST)
        if self.regions == NULL or self.block == NULL:
            raise MemoryError
        for n, (start, view) in enumerate(regions):
            each = hold(view, True, "memory")
            if <uintptr_t>each.start() % self.p.page_bytes or start % granule or start > nbytes - each.raw.len:
                raise ValueError(f"region {n} begins at {start}, address {<uintptr_t>each.start():#x}: it must begin "
                                 "with a page of the system's")
            self.held.append(each)
            self.regions[n].start = start
            self.regions[n].end = start + each.raw.len
            self.regions[n].data = <unsigned char *>each.start()
        self.p.missing = <uint64_t *><void *>self.block
        self.p.asked = self.p.missing + words
        for i in range(words):
            self.p.missing[i] = missing[i]
            left += bin(missing[i]).count("1")
        self.p.taking.rows = <int64_t *><void *>(self.block + 16 * words)
        self.p.taking.scratch = self.block + 16 * words + rows
        self.p.payload = self.p.taking.scratch + granule
        self.p.reading.payload = self.p.payload
        self.p.taking.space.regions = self.regions
        self.p.taking.space.count = len(self.held)
        self.p.taking.space.nbytes = nbytes
        self.p.taking.granule = granule
        self.p.taking.share.channels = 1
        self.p.taking.share.stripe = 64
        self.p.left = left
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
        free(self.regions)
        free(self.block)

    @property
    def user_mode_only(self):
        return self.p.user_mode_only != 0

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
