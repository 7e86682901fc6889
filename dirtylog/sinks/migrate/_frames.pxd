# What Cython calls of the headers beside this, and the memory of a migration, for whoever else fills it.
from libc.stdint cimport int64_t, uint64_t


cdef extern from "<sys/uio.h>" nogil:
    cdef struct iovec:
        void *iov_base
        size_t iov_len


cdef extern from "_bits/deltas.h" nogil:
    cdef struct dl_copies:
        unsigned char *data
        int64_t *pages
        int64_t *frames
        int64_t places
        size_t page_size
        size_t most
        int64_t older


cdef extern from "sinks/migrate/_format.h" nogil:
    size_t DL_FRAME_HEADER
    size_t DL_FRAME_EXTENT
    size_t DL_FRAME_EXTENTS
    size_t DL_FRAME_WINDOW
    size_t DL_FRAME_MOST
    int DL_FRAME_PAGES
    int DL_FRAME_ZEROS
    int DL_FRAME_DELTAS
    void dl_crc32_prepare() noexcept


cdef extern from "sinks/migrate/_space.h" nogil:
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


cdef extern from "sinks/migrate/_packing.h" nogil:
    size_t DL_SEND_AT_ONCE
    size_t DL_FRAMES_OF_A_WINDOW(size_t granules)
    cdef struct dl_rows:
        int64_t *rows
        size_t count
        size_t granules
    cdef struct dl_packing:
        dl_space space
        const unsigned char *packed
        const int64_t *extents
        int64_t count
        int64_t row
        int64_t within
        int64_t position
        int64_t granule
        dl_share share
        dl_copies copies
        uint64_t *frames
        uint64_t sent
        size_t room
        dl_rows zeros
        dl_rows deltas
        dl_rows whole
        size_t nbytes
        size_t changed
        size_t filled
        unsigned char *changes
        unsigned char *pages
        unsigned char *scratch
    cdef struct dl_sending:
        unsigned char *out
        size_t used
        size_t room
        unsigned char *headers
        size_t frames
        size_t most
        uint64_t sequence
        uint64_t nbytes
        iovec parts[2]
    int dl_pack_window(dl_packing *p) noexcept
    void dl_put_table(unsigned char *out, const dl_rows *table) noexcept
    size_t dl_make_frames(dl_packing *p, dl_sending *s, size_t *zeros, size_t *deltas) noexcept


cdef extern from "sinks/migrate/_line.h" nogil:
    double DL_LINE_LONGEST
    int DL_LINE_LATE
    int DL_LINE_OVER
    int DL_LINE_SIGNAL
    int DL_LINE_ENDED
    cdef struct dl_patience:
        double each
        double late
        double over
    cdef struct dl_least:
        int now
        int before
    double dl_line_clock() noexcept
    void dl_patience_begin(dl_patience *patience, double now) noexcept
    int dl_line_move(int fd, iovec *parts, int count, int sending, const dl_patience *patience,
                     dl_least *least) noexcept
    void dl_line_any(int fd, dl_least *least) noexcept


cdef extern from "sinks/migrate/_taking.h" nogil:
    int DL_WRONG_TABLE
    int DL_WRONG_PLACE
    int DL_WRONG_ORDER
    int DL_WRONG_PAGES
    int DL_WRONG_SIZE
    int DL_WRONG_ROUND
    int DL_WRONG_LENGTH
    int DL_WRONG_NEVER
    int DL_WRONG_DELTAS
    int DL_WRONG_CHANNEL
    cdef struct dl_taking:
        dl_space space
        int64_t granule
        dl_share share
        uint64_t *seen
        uint64_t *filled
        int64_t left
        int64_t done
        uint64_t applied
        uint64_t cleared
        unsigned char *scratch
        int64_t *rows
        size_t count
        int64_t size
    cdef struct dl_frame:
        int kind
        const unsigned char *table
        const unsigned char *data
        size_t table_bytes
        size_t nbytes
    int dl_take_frame(dl_taking *t, const dl_frame *f) noexcept


cdef extern from "sinks/migrate/_reading.h" nogil:
    int DL_READ_PAUSE
    int DL_READ_FOREIGN
    int DL_READ_ODD
    cdef struct dl_reading:
        unsigned char *head
        unsigned char *next
        size_t have
        size_t after
        unsigned char *payload
        size_t length
        size_t got
        int reads
        uint64_t sequence
        unsigned char *headers
        size_t frames
        size_t most
        uint64_t nbytes
        double began
        dl_least least
    int dl_read_frames(int fd, dl_reading *r, dl_taking *t, int64_t enough, dl_patience *patience) noexcept


cdef class Memory:
    cdef list held
    cdef dl_region *regions
    cdef dl_space space
    cdef unsigned char *block
    cdef int keep(self, regions, int64_t nbytes, bint writable, str what) except -1
    cdef unsigned char *room(self, size_t nbytes) except NULL

cdef int check_granule(int64_t granule) except -1
