"""The destination of a migration: takes frames from a socket, trusts none of them, and fills memory."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dirtylog._bits.copying import scatter, zero_extents
from dirtylog._bits.flat import flat_bytes
from dirtylog._bits.pages import check_geometry
from dirtylog._core import DirtyBitmap
from dirtylog.errors import BackendUnavailable
from dirtylog.sinks.extents import WINDOW
from dirtylog.sinks.migrate.payloads import HELLO, MIN_PAGE_SIZE, PAGES, RAW, ROUND, ZSTD, compressor, granule_offsets
from dirtylog.sinks.migrate.policy import MigrationError
from dirtylog.sinks.migrate.wire import MAX_EXTENTS, Channel, Kind, WireError

if TYPE_CHECKING:
    from dirtylog._typing import Memory

__all__ = ["receive"]


def _table(raw: memoryview, nbytes: int, granule: int) -> npt.NDArray[np.int64]:
    """Check a table of extents: ascending, apart, whole granules, inside the memory."""
    if raw.nbytes == 0 or raw.nbytes % 16 or raw.nbytes > 16 * MAX_EXTENTS:
        raise WireError(f"a table of {raw.nbytes} bytes is not a table of extents")
    extents = np.frombuffer(raw, "<i8").astype(np.int64).reshape(-1, 2)
    offsets, lengths = extents[:, 0], extents[:, 1]
    # In this order: once both are within the memory, their sum cannot overflow.
    if (offsets < 0).any() or (offsets >= nbytes).any() or (lengths < 1).any() or (lengths > WINDOW).any():
        raise WireError(f"an extent is outside of the memory of {nbytes} bytes")
    ends = offsets + lengths
    if ends[-1] > nbytes or (ends[:-1] > offsets[1:]).any():
        raise WireError("extents overlap or reach past the memory's end")
    if (offsets % granule).any() or (ends[:-1] % granule).any() or (ends[-1] % granule and ends[-1] != nbytes):
        raise WireError(f"an extent is not of whole pages of {granule} bytes")
    if int(lengths.sum()) > WINDOW:
        raise WireError(f"a frame speaks of {int(lengths.sum())} bytes; at most {WINDOW}")
    return extents


class _Receiver:
    """One migration under way, seen from the destination."""

    def __init__(self, target: memoryview, page_size: int, codec: int) -> None:
        self.target = target
        self.granule = min(page_size, WINDOW)
        self.codec = codec
        self.seen = DirtyBitmap(-(-target.nbytes // self.granule))
        self.number = self.done = 0
        # A sender sends each page once a round: what is left of the round that is under way.
        self.left = 0

    def round(self, payload: memoryview, max_rounds: int) -> None:
        if self.number and self.left == self.target.nbytes:
            raise WireError(f"round {self.number} was empty, and is not the last; the sender makes no progress")
        if self.number == max_rounds:
            raise WireError(f"the sender begins round {max_rounds + 1}, max_rounds is {max_rounds}; raise it")
        self.number += 1
        if bytes(payload) != ROUND.pack(self.number):
            raise WireError(f"round {self.number} was due")
        self.left = self.target.nbytes

    def took(self, size: int) -> None:
        if not self.number:
            raise WireError("pages come before the first round")
        self.left -= size
        if self.left < 0:
            raise WireError(f"round {self.number} has more bytes than the memory, {self.target.nbytes}")
        self.done += size

    def pages(self, payload: memoryview) -> None:
        if payload.nbytes < PAGES.size:
            raise WireError(f"a PAGES frame of {payload.nbytes} bytes")
        count, codec = PAGES.unpack_from(payload)
        end = PAGES.size + 16 * count
        if bytes(payload[5:8]) != b"\0\0\0" or codec not in (RAW, self.codec) or end > payload.nbytes:
            raise WireError(f"a PAGES frame of {count} extents, codec {codec}, in {payload.nbytes} bytes")
        extents = _table(payload[PAGES.size : end], self.target.nbytes, self.granule)
        size = int(extents[:, 1].sum())
        self.took(size)
        data: memoryview | bytes = payload[end:]
        if codec == ZSTD:
            data = self.unpacked(payload[end:], size)
        if memoryview(data).nbytes != size:
            raise WireError(f"a PAGES frame holds {memoryview(data).nbytes} bytes for extents of {size}")
        scatter(data, extents, self.target)
        self.mark(extents)

    def unpacked(self, data: memoryview, size: int) -> bytes:
        import zstandard

        try:
            # Bounded by the announced size, whatever the stream says of itself.
            reader = zstandard.ZstdDecompressor(max_window_size=1 << 23).stream_reader(data)
            unpacked = bytes(reader.read(size))
            if reader.read(1):
                raise WireError(f"compressed pages are more than the {size} bytes of their extents")
        except zstandard.ZstdError as error:
            raise WireError(f"compressed pages cannot be unpacked: {error}") from None
        return unpacked

    def zeros(self, payload: memoryview) -> None:
        extents = _table(payload, self.target.nbytes, self.granule)
        self.took(int(extents[:, 1].sum()))
        zero_extents(self.target, extents)
        self.mark(extents)

    def mark(self, extents: npt.NDArray[np.int64]) -> None:
        self.seen.mark_pages(granule_offsets(extents, self.granule) // self.granule)


def receive(
    sock: socket.socket,
    *,
    out: Memory | Callable[[int], Memory] | None = None,
    limit: int = 1 << 36,
    arrived: Callable[[Any], object] | None = None,
    max_rounds: int = 1000,
    deadline: float | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> Any:
    """Receive the memory that :func:`send` sends from the other end.

    Parameters
    ----------
    sock : socket.socket
        Connected stream socket; give it a timeout if the peer may hang: it bounds each frame as a whole. It stays
        open and yours.
    out : buffer or callable, optional
        Writable C-contiguous memory of exactly the source's size, or what makes it: called with the size in bytes
        before the first page is sent, so that a file of that size can be reserved. By default a new uint8 array.
    limit : int
        Refuse memory of more bytes than this (64 GiB), unless `out` is a buffer.
    arrived : callable, optional
        Called with the memory when all of it is there and checked, before the sender hears so. Make it durable here:
        what this raises tells the sender that the migration failed, and the source goes on.
    max_rounds : int
        Refuse more rounds than this.
    deadline : float, optional
        Give up when the whole migration takes more seconds than this.
    progress : callable, optional
        Called with the round's number and the bytes of pages received so far, once a frame.

    Returns
    -------
    buffer
        `out`, or the new array: the source's memory as it was when it was paused.

    Raises
    ------
    MigrationError
        The connection ended before the end, the sender gave up, or anything it sent was not right. What `out` holds
        then is of no use, unless the error is ``uncertain``: then all of it is there, and only the answer to the
        sender may be lost. Ask the source's side before you let the copy run.
    Exception
        What a callable raises; the sender is told.

    Notes
    -----
    Nothing that arrives is trusted: frames, tables and compressed data are bounded and checked before they are used,
    a round brings each page once at most and only the last may be empty, and every page must have come before the end
    is believed. Allocates the memory and a few MiB; memory whose pages are zero is not committed. CRC-32 finds
    accidents; for a line that somebody may listen to or change use TLS (an `ssl.SSLSocket` will do).
    """
    if max_rounds < 1:
        raise ValueError(f"max_rounds is {max_rounds}; it must be 1 or more")
    channel = Channel(sock, deadline)
    if out is not None and not callable(out):
        flat_bytes(out, writable=True, what="out")
    receiver: _Receiver | None = None
    last_word = False
    try:
        result, receiver = _agree(channel, out, limit)
        while True:
            before = channel.digest()
            kind, payload = channel.receive(Kind.ROUND, Kind.PAGES, Kind.ZEROS, Kind.END)
            if kind == Kind.ROUND:
                receiver.round(payload, max_rounds)
            elif kind == Kind.END:
                if bytes(payload) != before:
                    raise WireError("the sender's digest differs: not everything it sent has arrived")
                missing = receiver.seen.npages - receiver.seen.count()
                if missing:
                    raise WireError(f"the sender says that was all, and {missing} pages never came")
                if arrived is not None:
                    arrived(result)
                # Before it is sent: an interrupt may come between the last byte and the next line.
                last_word = True
                channel.send(Kind.DONE, before, counted=False)
                return result
            else:
                (receiver.pages if kind == Kind.PAGES else receiver.zeros)(payload)
                if progress is not None:
                    progress(receiver.number, receiver.done)
    except BaseException as error:
        if last_word:
            text = "all of it has arrived, and the sender may not have heard so: ask there before the copy runs"
            if isinstance(error, OSError):
                raise MigrationError(f"{text} ({error})", uncertain=True) from error
            error.add_note(text)
            raise
        expected = isinstance(error, (OSError, WireError))
        channel.refuse(str(error) if expected or isinstance(error, BackendUnavailable) else _summary(error))
        if not expected:
            raise
        raise MigrationError(f"migration failed in round {receiver.number if receiver else 0}: {error}") from error


def _summary(error: BaseException) -> str:
    """Say in a line what ended the receiver, for a peer that has no traceback."""
    return f"the receiver failed ({type(error).__name__}: {error})"


def _agree(channel: Channel, out: Memory | Callable[[int], Memory] | None, limit: int) -> tuple[Any, _Receiver]:
    """Hear what is coming, make room for it, and say go."""
    _, payload = channel.receive(Kind.HELLO)
    if payload.nbytes != HELLO.size:
        raise WireError(f"a HELLO frame of {payload.nbytes} bytes")
    nbytes, page_size, codec = HELLO.unpack(payload)
    try:
        check_geometry(-(-nbytes // max(page_size, 1)), page_size)
    except ValueError as error:
        raise WireError(f"the sender announces impossible memory: {error}") from None
    if nbytes < 1 or page_size < MIN_PAGE_SIZE or codec not in (RAW, ZSTD):
        raise WireError(f"the sender announces {nbytes} bytes in pages of {page_size}, codec {codec}")
    result: Any = out
    if out is None or callable(out):
        if nbytes > limit:
            raise WireError(f"the sender announces {nbytes} bytes, the limit is {limit}; raise limit, or pass out")
        result = np.zeros(nbytes, np.uint8) if out is None else out(nbytes)
    target = flat_bytes(result, writable=True, what="out")
    if target.nbytes != nbytes:
        raise WireError(f"the sender announces {nbytes} bytes; out has {target.nbytes}")
    if codec == ZSTD:
        compressor()
    receiver = _Receiver(target, page_size, codec)
    channel.send(Kind.READY, counted=False)
    return result, receiver
