# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
# cython: auto_pickle=False, autotestdict=False, freethreading_compatible=True, embedsignature=True
"""The pages of a migration as frames, at the speed of the line: sorted, checked, sent and applied without the GIL.

One end packs: each page of a window is zero, has changed a little, or goes whole. The other end takes: what comes is
from others, and all of a frame is checked before the first byte of it is written. Both can move whole frames over a
plain socket by themselves; anything else (TLS, compression, odd frames) goes through `wire.py`, page by page the same.
"""

cimport cython
from cpython.exc cimport PyErr_CheckSignals
from libc.stdint cimport int64_t, uint64_t
from libc.stdlib cimport calloc, free, malloc

from dirtylog._bits.copying cimport HeldBuffer, check_packed, check_plain, extents_pointer, hold

__all__ = ["ENDED", "FOREIGN", "LATE", "ODD", "OVER", "PAUSE", "Packer", "Taker"]


dl_crc32_prepare()

# Why a call for frames has come to its end, beside an errno, which is negative.
PAUSE, FOREIGN, ODD = DL_READ_PAUSE, DL_READ_FOREIGN, DL_READ_ODD
LATE, OVER, ENDED = DL_LINE_LATE, DL_LINE_OVER, DL_LINE_ENDED

# Frames whose headers one call keeps for the digest.
cdef enum:
    FRAMES_AT_ONCE = 512


cdef dict WRONG = {
    DL_WRONG_TABLE: "what should be a table of extents is not a table of extents",
    DL_WRONG_PLACE: "an extent is outside of the memory of {nbytes} bytes",
    DL_WRONG_ORDER: "extents overlap or reach past the memory's end",
    DL_WRONG_PAGES: "an extent is not of whole pages of {granule} bytes",
    DL_WRONG_SIZE: "a frame speaks of more than {window} bytes",
    DL_WRONG_ROUND: "round {round} has more bytes than the memory, {nbytes}",
    DL_WRONG_LENGTH: "a PAGES frame holds {given} bytes for extents of {size}",
    DL_WRONG_NEVER: "a DELTAS frame is about pages that never came",
    DL_WRONG_DELTAS: "a DELTAS frame cannot be used: its {given} bytes are not the deltas of these pages",
    DL_WRONG_CHANNEL: "an extent came over a channel that it does not belong to",
}


cdef class Memory:
    """The regions of a page space, kept for as long as this object lives."""

    def __dealloc__(self):
        free(self.regions)
        free(self.block)

    cdef int keep(self, regions, int64_t nbytes, bint writable, str what) except -1:
        """Hold ``(start, buffer)`` of each region; `nbytes` are the space's."""
        cdef int64_t before = 0
        cdef HeldBuffer each
        self.held = []
        self.regions = <dl_region *>calloc(max(len(regions), 1), sizeof(dl_region))
        if self.regions == NULL:
            raise MemoryError
        for i, (start, view) in enumerate(regions):
            each = hold(view, writable, what)
            if start < before or start > nbytes - each.raw.len:
                raise ValueError(f"region {i} begins at {start} and has {each.raw.len} bytes; the memory has {nbytes}")
            self.held.append(each)
            self.regions[i].start = start
            self.regions[i].end = before = start + each.raw.len
            self.regions[i].data = <unsigned char *>each.start()
        self.space.regions = self.regions
        self.space.count = len(self.held)
        self.space.nbytes = nbytes
        return 0

    cdef unsigned char *room(self, size_t nbytes) except NULL:
        """Have so many bytes of one's own; what is not touched is not committed."""
        self.block = <unsigned char *>malloc(nbytes)
        if self.block == NULL:
            raise MemoryError
        return self.block


cdef int take_share(dl_share *share, tuple given) except -1:
    """Read ``(index, channels, granules in a stripe)``."""
    share.index, share.channels, share.stripe = given
    if not (0 <= share.index < share.channels and share.stripe > 0 and share.stripe % 64 == 0):
        raise ValueError(f"share is {given}; it must be the index of a channel, how many there are, and a multiple of "
                         "64 granules")
    return 0


cdef int heed(look) except -1:
    """Let a signal's handler, and whoever looks while a line waits, raise what ends the wait."""
    PyErr_CheckSignals()
    if look is not None:
        look()
    return 0


cdef int check_granule(int64_t granule) except -1:
    if not 0 < granule <= <int64_t>DL_FRAME_WINDOW:
        raise ValueError(f"granule is {granule}; it must be 1 to {DL_FRAME_WINDOW} bytes")
    return 0


@cython.final
cdef class Packer(Memory):
    """What goes over the line of some pages: what is zero as a range, what changed a little, the rest whole.

    Parameters
    ----------
    regions : sequence of (int, buffer)
        The memory: where each region begins in the page space, and its bytes. Empty: pages are given to `begin`.
    nbytes : int
        Of the page space.
    granule : int
        Bytes of what is zero or not and goes again or not: a page, or a MiB of a larger one.
    data : buffer
        Copies of what was last sent, of as many granules as `pages` has places: granule ``g`` at ``g % len(pages)``.
    pages, frames : int64 array
        Which granule each place holds, or -1; in which frame it went last.
    room : int
        Bytes of whole granules in a frame.
    share : tuple of (int, int, int)
        Which of how many channels this is, and how many granules are in a stripe: of several channels each has a
        stripe in turn. Places are those of its own granules, numbered without gaps.

    Notes
    -----
    Belongs to one thread at a time. Reads memory that is written meanwhile: a page is read once where it matters.
    """

    cdef dl_packing packing
    cdef dl_sending sending
    cdef HeldBuffer copies
    cdef HeldBuffer packed
    cdef int64_t[::1] places
    cdef int64_t[::1] place_frames
    cdef uint64_t[::1] sent_frames
    cdef const int64_t[:, ::1] extents
    cdef size_t frames_gone
    cdef uint64_t bytes_gone
    cdef size_t to_go
    cdef size_t left_over

    def __init__(self, regions, int64_t nbytes, int64_t granule, data, int64_t[::1] pages, int64_t[::1] frames,
                 Py_ssize_t room, tuple share=(0, 1, 64)):
        check_granule(granule)
        take_share(&self.packing.share, share)
        self.keep(regions, nbytes, False, "memory")
        self.copies = hold(data, True, "data")
        self.places, self.place_frames = pages, frames
        if self.copies.raw.len < pages.shape[0] * granule or frames.shape[0] < pages.shape[0]:
            raise ValueError(f"data has {self.copies.raw.len} bytes, frames {frames.shape[0]}: too few for "
                             f"{pages.shape[0]} places")
        if not 0 < room <= <Py_ssize_t>DL_FRAME_WINDOW:
            raise ValueError(f"room is {room}; it must be 1 to {DL_FRAME_WINDOW} bytes")
        cdef dl_packing *p = &self.packing
        cdef dl_sending *s = &self.sending
        p.space = self.space
        p.granule = granule
        p.copies.data = <unsigned char *>self.copies.start()
        p.copies.places = pages.shape[0]
        if pages.shape[0]:
            p.copies.pages, p.copies.frames = &pages[0], &frames[0]
        p.copies.page_size = <size_t>granule
        p.copies.most = <size_t>(granule - granule // 4)
        p.room = <size_t>room
        cdef size_t granules = DL_FRAME_WINDOW // <size_t>granule
        cdef size_t most = p.room + <size_t>granule
        cdef size_t table = DL_FRAME_EXTENT * granules
        s.room = DL_SEND_AT_ONCE + DL_FRAMES_OF_A_WINDOW(granules) + most
        s.most = FRAMES_AT_ONCE
        cdef size_t headers = DL_FRAME_HEADER * s.most
        cdef unsigned char *at = self.room(3 * table + 2 * most + <size_t>granule + s.room + headers)
        p.zeros.rows = <int64_t *><void *>at
        p.deltas.rows = <int64_t *><void *>(at + table)
        p.whole.rows = <int64_t *><void *>(at + 2 * table)
        at += 3 * table
        p.changes = at
        p.pages = at + most
        p.scratch = at + 2 * most
        at += 2 * most + <size_t>granule
        s.out = at
        s.headers = at + s.room

    @property
    def sent(self):
        """Frames of pages that have been numbered so far; set it to what the other end has applied."""
        return self.packing.sent

    @sent.setter
    def sent(self, uint64_t value):
        self.packing.sent = value

    def remember(self, uint64_t[::1] frames):
        """Note from here on in `frames` in which frame each granule went last."""
        if frames.shape[0] * self.packing.granule < self.packing.space.nbytes:
            raise ValueError(f"frames has {frames.shape[0]} places; the memory has {self.packing.space.nbytes} bytes")
        self.sent_frames = frames
        self.packing.frames = &frames[0] if frames.shape[0] else NULL

    def begin(self, const int64_t[:, ::1] extents, int64_t older, packed=None):
        """Begin with some pages.

        Parameters
        ----------
        extents : int64 array of shape (n, 2)
            Offset and length in bytes, ascending, apart, of whole granules; only the memory's last may be cut.
        older : int
            Granules that have no place take theirs if it is empty, or if what it holds went before this frame; with -1
            none.
        packed : buffer, optional
            The bytes of the extents, one after the other, rather than the memory's.
        """
        cdef const int64_t *rows = extents_pointer(extents)
        cdef Py_ssize_t n = extents.shape[0]
        cdef int64_t granule = self.packing.granule
        cdef int64_t nbytes = self.packing.space.nbytes
        cdef int64_t before = 0
        cdef Py_ssize_t i
        check_plain(rows, n, nbytes, "the memory")
        for i in range(n):
            if rows[2 * i] < before or rows[2 * i] % granule or not rows[2 * i + 1]:
                raise ValueError(f"extent {i} does not ascend in whole pages of {granule} bytes")
            before = rows[2 * i] + rows[2 * i + 1]
            if before % granule and before != nbytes:
                raise ValueError(f"extent {i} is not of whole pages of {granule} bytes")
        self.packed = None
        if packed is not None:
            self.packed = hold(packed, False, "packed")
            check_packed(rows, n, self.packed.raw.len)
        elif not self.packing.space.count:
            raise ValueError("there is no memory to read; pass packed")
        self.extents = extents
        self.packing.packed = NULL
        if self.packed is not None:
            self.packing.packed = <const unsigned char *>self.packed.start()
        self.packing.extents = rows
        self.packing.count = n
        self.packing.row = self.packing.within = self.packing.position = 0
        self.packing.copies.older = older

    cdef bytes table(self, dl_rows *rows):
        cdef bytes found = b"\0" * (DL_FRAME_EXTENT * rows.count)
        dl_put_table(<unsigned char *><char *>found, rows)
        return found

    def pack(self):
        """Pack the next window; None: there is none.

        Returns
        -------
        nbytes : int
            Bytes of its pages.
        counts : tuple of (int, int)
            How many granules are zero, and how many went as what changed.
        frames : list of (kind, number of extents, table, data)
            One for each kind there is, in the order in which they have been numbered; valid until the next call.
        """
        cdef dl_packing *p = &self.packing
        cdef int found
        with nogil:
            found = dl_pack_window(p)
        if not found:
            return None
        frames = []
        if p.zeros.count:
            frames.append((DL_FRAME_ZEROS, p.zeros.count, self.table(&p.zeros), memoryview(b"")))
        if p.deltas.count:
            data = <unsigned char[:p.changed]>p.changes
            frames.append((DL_FRAME_DELTAS, p.deltas.count, self.table(&p.deltas), memoryview(data)))
        if p.whole.count:
            data = <unsigned char[:p.filled]>p.pages
            frames.append((DL_FRAME_PAGES, p.whole.count, self.table(&p.whole), memoryview(data)))
        return p.nbytes, (p.zeros.granules, p.deltas.granules), frames

    def send(self, int fd, uint64_t sequence, Py_ssize_t enough, double patience, double left, look=None):
        """Pack and send windows over a plain socket.

        Parameters
        ----------
        fd : int
            Of a connected stream socket.
        sequence : int
            Number of the next frame.
        enough : int
            Bytes of pages after which to return.
        patience, left : float
            Seconds for a frame, and for everything; 0: no limit.
        look : callable, optional
            Called ten times per second while the line has no room; raises what ends it.

        Returns
        -------
        why : int
            `PAUSE`: `enough`, no more, or a tenth of a second is over. `LATE`, `OVER`, or an errno, negative: the line
            is of no use any more.
        nbytes, zeros, deltas : int
            Bytes of the pages that went; granules that were zero; granules of which only what changed went.

        Raises
        ------
        BaseException
            What a signal handler or `look` raises.

        Notes
        -----
        Afterwards, whatever was raised, `gone` says which frames have gone.
        """
        cdef dl_packing *p = &self.packing
        cdef dl_sending *s = &self.sending
        cdef dl_patience patient
        cdef size_t zeros = 0
        cdef size_t deltas = 0
        cdef size_t taken
        cdef size_t total = 0
        cdef int why = 0
        cdef double now = dl_line_clock()
        cdef double began = now
        s.frames, s.nbytes, s.sequence = 0, 0, sequence
        patient.each, patient.late = patience, 0
        patient.over = now + left if left > 0 else 0
        self.frames_gone, self.bytes_gone, self.to_go, self.left_over = 0, 0, 0, 0
        with nogil:
            while total < <size_t>enough and now - began <= DL_LINE_LONGEST:
                taken = dl_make_frames(p, s, &zeros, &deltas)
                if not taken:
                    break
                self.to_go = s.parts[0].iov_len + s.parts[1].iov_len
                dl_patience_begin(&patient, now)
                while True:
                    why = dl_line_move(fd, s.parts, 2, 1, &patient, NULL)
                    self.left_over = s.parts[0].iov_len + s.parts[1].iov_len
                    if why != DL_LINE_SIGNAL:
                        break
                    with gil:
                        heed(look)
                if why:
                    break
                total += taken
                self.frames_gone, self.bytes_gone = s.frames, s.nbytes
                now = dl_line_clock()
        return why, total, zeros, deltas

    @property
    def gone(self):
        """Frames that the last call of `send` has sent, their bytes, their headers, and whether a part of more went."""
        headers = (<char *>self.sending.headers)[:DL_FRAME_HEADER * self.frames_gone]
        return self.frames_gone, self.bytes_gone, headers, 0 < self.left_over < self.to_go


@cython.final
cdef class Taker(Memory):
    """What comes of frames of pages: memory that fills, and what of it has come.

    Parameters
    ----------
    regions : sequence of (int, buffer)
        The memory: where each region begins in the page space, and its bytes, writable.
    nbytes : int
        Of the page space.
    granule : int
        Bytes of what has come or not: a page, or a MiB of a larger one.
    seen : uint64 array
        A bit for each granule: it has come.
    filled : uint64 array, optional
        Of memory that is zero from the start, a bit for each granule that may not be any more. The others are neither
        read nor written where they are to be zero.
    share : tuple of (int, int, int)
        As of a :class:`Packer`: nothing else may come. Takers of several channels share `seen` and `filled`.

    Attributes
    ----------
    round, left : int
        The round that is under way, and the bytes that may come in it still.
    done, applied, cleared : int
        Bytes of pages and frames that have come; granules that were looked at because they have to be zero.

    Notes
    -----
    Belongs to one thread at a time.
    """

    cdef dl_taking taking
    cdef uint64_t[::1] seen
    cdef uint64_t[::1] filled
    cdef unsigned char *payload
    cdef unsigned char *headers
    cdef public uint64_t round

    def __init__(self, regions, int64_t nbytes, int64_t granule, uint64_t[::1] seen, uint64_t[::1] filled=None,
                 tuple share=(0, 1, 64)):
        check_granule(granule)
        take_share(&self.taking.share, share)
        if not regions:
            raise ValueError("there are no regions to fill")
        self.keep(regions, nbytes, True, "memory")
        cdef int64_t words = ((nbytes + granule - 1) // granule + 63) // 64
        if seen.shape[0] < words or (filled is not None and filled.shape[0] < words):
            raise ValueError(f"{nbytes} bytes in pages of {granule} take {words} words")
        self.seen, self.filled = seen, filled
        cdef dl_taking *t = &self.taking
        t.space = self.space
        t.granule = granule
        t.seen = &seen[0]
        t.filled = NULL if filled is None else &filled[0]
        cdef size_t rows = DL_FRAME_EXTENT * DL_FRAME_EXTENTS
        cdef unsigned char *at = self.room(rows + <size_t>granule + DL_FRAME_MOST + DL_FRAME_HEADER * FRAMES_AT_ONCE)
        t.rows = <int64_t *><void *>at
        t.scratch = at + rows
        self.payload = at + rows + <size_t>granule
        self.headers = self.payload + DL_FRAME_MOST

    @property
    def left(self):
        return self.taking.left

    @left.setter
    def left(self, int64_t value):
        self.taking.left = value

    @property
    def done(self):
        return self.taking.done

    @property
    def applied(self):
        return self.taking.applied

    @property
    def cleared(self):
        return self.taking.cleared

    def apply(self, int kind, table, data=b""):
        """Apply the content of one frame.

        Parameters
        ----------
        kind : int
            Of the frame.
        table : buffer
            Its extents.
        data : buffer
            The bytes of the pages, or the deltas, uncompressed.

        Raises
        ------
        ValueError
            It is not as it should be; nothing has been written.
        """
        cdef HeldBuffer rows = hold(table, False, "table")
        cdef HeldBuffer read = hold(data, False, "data")
        cdef dl_taking *t = &self.taking
        cdef dl_frame frame
        cdef int wrong
        if kind not in (DL_FRAME_PAGES, DL_FRAME_ZEROS, DL_FRAME_DELTAS):
            raise ValueError(f"a frame of kind {kind} has no pages")
        frame.kind = kind
        frame.table, frame.table_bytes = <const unsigned char *>rows.start(), <size_t>rows.raw.len
        frame.data, frame.nbytes = <const unsigned char *>read.start(), <size_t>read.raw.len
        with nogil:
            wrong = dl_take_frame(t, &frame)
        if wrong:
            raise ValueError(WRONG[wrong].format(nbytes=t.space.nbytes, granule=t.granule, window=DL_FRAME_WINDOW,
                                                 given=read.raw.len, size=t.size, round=self.round))

    def receive(self, int fd, bytes before, uint64_t sequence, int64_t enough, double first, double patience,
                double left, look=None):
        """Receive frames over a plain socket and apply them, up to one that is not of pages, or not right.

        Parameters
        ----------
        fd : int
            Of a connected stream socket.
        before : bytes
            What was read of the next header before.
        sequence : int
            Number of the next frame.
        enough : int
            Bytes of pages after which to return.
        first, patience, left : float
            Seconds for the first frame, for each other one, and for everything; 0: no limit.
        look : callable, optional
            Called ten times per second while nothing comes; raises what ends it.

        Returns
        -------
        why : int
            `PAUSE`: `enough`, or a tenth of a second is over. `FOREIGN`: the next header is not one of pages that are
            due. `ODD`: the next frame is whole, but not as it should be; if it is of pages and its checksum alone is
            wrong, they lie in memory, and of this channel nothing counts as come any more. `LATE`, `OVER`, `ENDED`, or
            an errno, negative: the line is of no use any more.
        kept : bytes
            What has been read and not been used: of a header, a header, or a frame and maybe more.
        frames, nbytes : int
            Frames that were applied, and their bytes on the line.
        headers : bytes
            Of these frames.
        """
        cdef dl_taking *t = &self.taking
        cdef dl_reading r
        cdef dl_patience patient
        cdef int why
        cdef size_t i
        if <size_t>len(before) > DL_FRAME_HEADER:
            raise ValueError(f"{len(before)} bytes are more than a header")
        r.have = <size_t>len(before)
        for i in range(r.have):
            r.head[i] = before[i]
        r.after = r.length = r.got = r.frames = r.nbytes = 0
        r.reads = 0
        r.payload, r.headers = self.payload, self.headers
        r.most = FRAMES_AT_ONCE
        r.sequence = sequence
        r.began = dl_line_clock()
        patient.each = first
        patient.over = r.began + left if left > 0 else 0
        dl_patience_begin(&patient, r.began)
        patient.each = patience
        r.least.now = 0
        try:
            with nogil:
                while True:
                    why = dl_read_frames(fd, &r, t, enough, &patient)
                    if why != DL_LINE_SIGNAL:
                        break
                    with gil:
                        heed(look)
        finally:
            # Others wait for a single byte.
            dl_line_any(fd, &r.least)
        kept = (<char *>r.head)[:r.have]
        if why == DL_READ_ODD:
            kept += (<char *>r.payload)[:r.length] + (<char *>r.next)[:r.after]
        return why, kept, r.frames, r.nbytes, (<char *>r.headers)[:DL_FRAME_HEADER * r.frames]
