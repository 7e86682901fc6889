"""The destination of a migration: takes frames from a socket, trusts none of them, and fills memory.

The copy may run when the source has given it the right to, and never before: see `sender.py`.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dirtylog._bits.copying import zero_extents
from dirtylog._bits.deltas import lay_deltas
from dirtylog._bits.pages import DirtyPages, check_geometry
from dirtylog._core import DirtyBitmap
from dirtylog.errors import BackendUnavailable
from dirtylog.sinks._bytes.extents import WINDOW
from dirtylog.sinks.migrate.origins import room
from dirtylog.sinks.migrate.payloads import (
    COMPLETE,
    HELLO,
    MIN_PAGE_SIZE,
    PAGES,
    PART,
    RAW,
    READY,
    ROUND,
    RUNS,
    ZSTD,
    compressor,
    granule_offsets,
)
from dirtylog.sinks.migrate.policy import MigrationError
from dirtylog.sinks.migrate.sessions import Record, check_no_copy
from dirtylog.sinks.migrate.wire import MAX_EXTENTS, MAX_LAYOUT, Channel, Kind, Refusal, WireError
from dirtylog.sinks.snapshot.footer import MAX_PAGE_SIZE, MAX_STATE_BYTES, SnapshotError, decode_state
from dirtylog.sinks.snapshot.space import Space

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


class _Filling:
    """One migration under way, seen from the destination."""

    def __init__(self, target: Space, page_size: int, codec: int, fresh: bool) -> None:
        self.target = target
        self.granule = min(page_size, WINDOW)
        self.codec = codec
        self.seen = DirtyBitmap(-(-target.nbytes // self.granule))
        # Of memory that is zero from the start: what is not. The rest is neither read nor written for zeros.
        self.filled = DirtyBitmap(self.seen.npages) if fresh else None
        self.number = self.done = self.applied = 0
        # A sender sends each page once a round: what is left of the round that is under way.
        self.left = 0
        self.state = bytearray()

    def resumed(self) -> None:
        """Go on on another line: the round that was cut counts, and pages come in a new one alone."""
        self.left = 0
        self.state.clear()

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
        if self.state:
            raise WireError("pages come after the state")
        self.left -= size
        if self.left < 0:
            raise WireError(f"round {self.number} has more bytes than the memory, {self.target.nbytes}")
        self.done += size

    def table(self, payload: memoryview) -> tuple[npt.NDArray[np.int64], int, memoryview]:
        """Check the table before pages, or what changed in them: extents, their bytes, and what comes behind."""
        if payload.nbytes < PAGES.size:
            raise WireError(f"a frame of pages has {payload.nbytes} bytes")
        count, codec = PAGES.unpack_from(payload)
        end = PAGES.size + 16 * count
        if bytes(payload[5:8]) != b"\0\0\0" or codec not in (RAW, self.codec) or end > payload.nbytes:
            raise WireError(f"a frame of pages has {count} extents, codec {codec}, in {payload.nbytes} bytes")
        extents = _table(payload[PAGES.size : end], self.target.nbytes, self.granule)
        size = int(extents[:, 1].sum())
        self.took(size)
        data = payload[end:]
        # Of what changed in pages there is no more than of the pages.
        return extents, size, memoryview(self.unpacked(data, size)) if codec == ZSTD else data

    def pages(self, payload: memoryview) -> None:
        extents, size, data = self.table(payload)
        if data.nbytes != size:
            raise WireError(f"a PAGES frame holds {data.nbytes} bytes for extents of {size}")
        self.target.scatter(data, extents)
        numbers = self.mark(extents)
        if self.filled is not None:
            self.filled.mark_pages(numbers)
        self.applied += 1

    def deltas(self, payload: memoryview) -> None:
        extents, size, data = self.table(payload)
        numbers = self.numbers(extents)
        if _among(self.seen, numbers).count != len(numbers):
            raise WireError("a DELTAS frame is about pages that never came")
        regions = self.target.regions
        try:
            if len(regions) == 1:
                lay_deltas(data, extents, self.granule, regions[0].view)
            else:
                # Behind an array may be nothing: what a delta says of that goes nowhere.
                part = memoryview(bytearray(size))
                self.target.gather(extents, part)
                lay_deltas(data, np.array([[0, size]]), self.granule, part)
                self.target.scatter(part, extents)
        except ValueError as error:
            raise WireError(f"a DELTAS frame cannot be used: {error}") from None
        if self.filled is not None:
            self.filled.mark_pages(numbers)
        self.applied += 1

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
        numbers = self.mark(extents)
        if self.filled is not None:
            held = _among(self.filled, numbers)
            extents = held.runs() * self.granule
            extents[:, 1] = np.minimum(extents[:, 1], self.target.nbytes - extents[:, 0])
        for region, own, _, _ in self.target.parts(extents) if len(extents) else ():
            zero_extents(region.view, own)
        self.applied += 1

    def beside(self, payload: memoryview) -> None:
        if not self.number or not payload.nbytes:
            raise WireError("a part of the state is empty, or comes before the first round")
        if len(self.state) + payload.nbytes > MAX_STATE_BYTES:
            raise WireError(f"the sender's state has more than {MAX_STATE_BYTES} bytes")
        self.state += payload

    def numbers(self, extents: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        return granule_offsets(extents, self.granule) // self.granule

    def mark(self, extents: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        numbers = self.numbers(extents)
        self.seen.mark_pages(numbers)
        return numbers


def _among(pages: DirtyBitmap, numbers: npt.NDArray[np.int64]) -> DirtyPages:
    """Return which of some ascending pages are marked."""
    first = int(numbers[0])
    return pages.peek(first, int(numbers[-1]) + 1 - first) & DirtyPages.from_indices(numbers, pages.npages)


class _Stage(IntEnum):
    """How far the copy has come, as far as it decides who may run."""

    PART = PART
    """Not complete."""
    HAVE = COMPLETE
    """Complete and kept. It may run when it is told to, and never before."""
    RUNS = RUNS
    """It has the right to run, and the source has not."""
    GONE = 3
    """Given up before it was told to run: it never may."""


@dataclass(slots=True)
class _Copy:
    """One migration under way, seen from the destination, over as many lines as it takes."""

    channel: Channel
    out: Memory | Mapping[str, Memory] | Callable[[int], Memory] | None
    limit: int
    max_rounds: int
    state: Callable[[Any], object] | None
    arrived: Callable[[Any], object] | None
    start: Callable[[Any], object] | None
    progress: Callable[[int, int], object] | None
    reconnect: Callable[[int], socket.socket] | None
    journal: str | os.PathLike[str] | None
    stage: _Stage = _Stage.PART
    filling: _Filling | None = None
    record: Record | None = None
    agreed: bytes = b""
    result: Any = None
    breaks: int = 0
    own: socket.socket | None = None
    problem: BaseException | None = None

    @property
    def session(self) -> str:
        return "" if self.record is None else self.record.session

    def move(self, stage: _Stage) -> None:
        """Come to a stage, and record it before anything is said that depends on it."""
        self.stage = stage
        if self.record is not None:
            self.record.set(stage.name.lower())

    def run(self) -> None:
        """Receive until the copy has the right to run and the sender knows it."""
        while True:
            try:
                self.agree()
                if self.stage == _Stage.PART:
                    self.pages()
                if self.stage == _Stage.HAVE:
                    self.hear()
                self.channel.send(Kind.DONE, self.agreed[:16], counted=False)
            except (OSError, WireError) as error:
                self.again(error)
            else:
                return

    def again(self, error: Exception) -> None:
        """Take another line in place of a broken one. Raises `error` where there is none."""
        if self.reconnect is None or not self.channel.broken:
            raise error
        self.breaks += 1
        # What this raises ends the migration.
        sock = self.reconnect(self.breaks)
        self.close()
        self.own = sock
        self.channel = self.channel.again(sock)

    def close(self) -> None:
        """Close the socket that `reconnect` gave, if any."""
        own, self.own = self.own, None
        if own is not None:
            own.close()

    def agree(self) -> None:
        """Hear what is coming, make room for it, and say how far this session has come."""
        _, payload = self.channel.receive(Kind.HELLO)
        said = bytes(payload)
        if length := _layout_bytes(said):
            _, layout = self.channel.receive(Kind.LAYOUT)
            if layout.nbytes != length:
                raise WireError(f"a LAYOUT frame of {layout.nbytes} bytes, {length} were announced")
            said += layout
        if self.filling is None:
            session = said[:16].hex()
            check_no_copy(session, self.journal)
            self.result, self.filling = _room(said, self.out, self.limit)
            self.agreed = said
            self.record = Record(session, "copy", self.journal)
            self.move(_Stage.PART)
        elif said not in (self.agreed, self.agreed[:16] + bytes(HELLO.size - 16)):
            self.channel.refuse("another session is being received here")
            self.channel.broken = True
            raise WireError("a sender of another session, or of other memory, came in place of the one that was lost")
        else:
            self.filling.resumed()
        answer = READY.pack(self.stage, self.filling.number, self.filling.applied)
        self.channel.send(Kind.READY, answer, counted=False)

    def pages(self) -> None:
        """Receive pages until all are there, verified and kept; then say so."""
        channel, filling = self.channel, self.filling
        assert filling is not None
        take = {Kind.PAGES: filling.pages, Kind.DELTAS: filling.deltas, Kind.ZEROS: filling.zeros}
        while True:
            before = channel.digest()
            kind, payload = channel.receive(Kind.ROUND, *take, Kind.STATE, Kind.END)
            if kind == Kind.ROUND:
                filling.round(payload, self.max_rounds)
            elif kind == Kind.STATE:
                filling.beside(payload)
            elif kind == Kind.END:
                if bytes(payload) != before:
                    raise WireError("the sender's digest differs: not everything it sent has arrived")
                missing = filling.seen.npages - filling.seen.count()
                if missing:
                    raise WireError(f"the sender says that was all, and {missing} pages never came")
                if self.state is not None:
                    self.state(_state(filling.state))
                if self.arrived is not None:
                    self.arrived(self.result)
                self.move(_Stage.HAVE)
                channel.send(Kind.HAVE, before, counted=False)
                return
            else:
                take[kind](payload)
                if self.progress is not None:
                    self.progress(filling.number, filling.done)

    def hear(self) -> None:
        """Wait for the right to run, and take it."""
        _, payload = self.channel.receive(Kind.RUN, counted=False)
        if bytes(payload) != self.agreed[:16]:
            raise WireError("the right to run is for another session")
        try:
            self.move(_Stage.RUNS)
            if self.start is not None:
                self.start(self.result)
        except Exception as problem:
            # The right is here all the same, and the sender hears so.
            self.problem = problem

    def fail(self, error: BaseException) -> None:
        """End as what there is demands; raises what the caller is told, or returns where the copy may run."""
        expected = isinstance(error, (OSError, WireError))
        if self.stage == _Stage.RUNS:
            if expected:
                # Only the answer may be lost; nothing turns this into a failure.
                return
            error.add_note(f"the copy has the right to run, and the source has not; session {self.session}")
            raise error
        if self.stage == _Stage.HAVE and self.channel.broken and expected:
            raise MigrationError(
                f"the copy is complete and was not told to run before the line broke: settle session {self.session}, "
                f"or ask the source's end ({error})",
                uncertain=True,
                session=self.session,
            ) from error
        try:
            # Before the sender hears so: it takes the right back on this word.
            self.move(_Stage.GONE)
        finally:
            if not isinstance(error, Refusal):
                self.channel.refuse(
                    str(error) if expected or isinstance(error, BackendUnavailable) else _summary(error)
                )
        if not expected:
            if self.session:
                error.add_note(f"the copy was given up before it was told to run, and must not; session {self.session}")
            raise error
        number = self.filling.number if self.filling else 0
        raise MigrationError(f"migration failed in round {number}: {error}", session=self.session) from error


def receive(
    sock: socket.socket,
    *,
    out: Memory | Mapping[str, Memory] | Callable[[int], Memory] | None = None,
    limit: int = 1 << 36,
    state: Callable[[Any], object] | None = None,
    arrived: Callable[[Any], object] | None = None,
    start: Callable[[Any], object] | None = None,
    max_rounds: int = 1000,
    deadline: float | None = None,
    reconnect: Callable[[int], socket.socket] | None = None,
    journal: str | os.PathLike[str] | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> Any:
    """Receive the memory that :func:`send` sends from the other end.

    Parameters
    ----------
    sock : socket.socket
        Connected stream socket, best from :meth:`Listener.accept`; give it a timeout if the peer may hang: it bounds
        each frame as a whole. It stays open and yours.
    out : buffer, mapping of str to buffer, or callable, optional
        Writable contiguous memory of exactly the source's size: for arrays by name, one for each. Or what makes it:
        called with the size of all in bytes before the first page is sent, so that a file of that size can be
        reserved. By default new arrays; of memory without names one of uint8.
    limit : int
        Refuse memory of more bytes than this (64 GiB), unless `out` is a buffer.
    state : callable, optional
        Called with the state that the sender has sent beside the memory, or None, when all of both is there and before
        `arrived`: registers, say, to be set before the copy runs. What it raises is as of `arrived`.
    arrived : callable, optional
        Called with the memory when all of it is there and checked, before the sender hears so. Make it durable here:
        what this raises tells the sender that the migration failed, and the source goes on. The copy may not run yet.
    start : callable, optional
        Called with the memory when the source has given the copy the right to run, before the sender hears that it was
        taken. What it raises is raised at the end, with a note: the copy has the right all the same.
    max_rounds : int
        Refuse more rounds than this.
    deadline : float, optional
        Give up when the whole migration takes more seconds than this.
    reconnect : callable, optional
        Called when the line breaks, with how many times it has; returns the socket of the sender that came again,
        which is closed for you, or raises what ends the migration: ``lambda breaks: listener.accept(60)``.
    journal : path, optional
        A directory in which :func:`status` finds who may run even if this process is killed.
    progress : callable, optional
        Called with the round's number and the bytes of pages received so far, once a frame.

    Returns
    -------
    buffer, or dict of str to array
        `out`, or what is new: the source's memory as it was when it was paused. The copy has the right to run.

    Raises
    ------
    MigrationError
        The connection ended before the end, the sender gave up, or anything it sent was not right. What `out` holds
        then is of no use, unless the error is ``uncertain``: then all of it is there, and the source had not said that
        it may run. Ask there, or :func:`settle`, before you let the copy run.
    Exception
        What a callable raises; the sender is told.

    Notes
    -----
    Nothing that arrives is trusted: frames, tables and compressed data are bounded and checked before they are used,
    a round brings each page once at most and only the last may be empty, and every page must have come before the end
    is believed. Allocates the memory and a few MiB, and with a state of the largest size some 64 MiB more; memory whose
    pages are zero is not committed. CRC-32 finds accidents; for a line that somebody may listen to or change use TLS:
    :class:`Listener` with :class:`Keys`.
    """
    if max_rounds < 1:
        raise ValueError(f"max_rounds is {max_rounds}; it must be 1 or more")
    channel = Channel(sock, deadline)
    if out is not None and not callable(out):
        # Refused before anything is said.
        Space(out, 4096, writable=True)
    copy = _Copy(channel, out, limit, max_rounds, state, arrived, start, progress, reconnect, journal)
    try:
        copy.run()
    except BaseException as error:
        copy.fail(error)
    finally:
        copy.close()
    if copy.problem is not None:
        copy.problem.add_note(f"the copy has the right to run, and the source has not; session {copy.session}")
        raise copy.problem
    return copy.result


def _summary(error: BaseException) -> str:
    """Say in a line what ended the receiver, for a peer that has no traceback."""
    return f"the receiver failed ({type(error).__name__}: {error})"


def _layout_bytes(hello: bytes) -> int:
    """Return how long the text of the layout is that a HELLO announces."""
    if len(hello) != HELLO.size:
        raise WireError(f"a HELLO frame of {len(hello)} bytes")
    length: int = HELLO.unpack(hello)[4]
    if hello[33:36] != bytes(3) or length > MAX_LAYOUT:
        raise WireError(f"the sender announces a layout of {length} bytes; at most {MAX_LAYOUT}")
    return length


def _room(
    said: bytes, out: Memory | Mapping[str, Memory] | Callable[[int], Memory] | None, limit: int
) -> tuple[Any, _Filling]:
    """Check what is coming, and make room for it."""
    _, nbytes, page_size, codec, _ = HELLO.unpack_from(said)
    try:
        check_geometry(-(-nbytes // max(page_size, 1)), page_size)
    except ValueError as error:
        raise WireError(f"the sender announces impossible memory: {error}") from None
    if not 1 <= nbytes < 1 << 62 or not MIN_PAGE_SIZE <= page_size <= MAX_PAGE_SIZE or codec not in (RAW, ZSTD):
        raise WireError(f"the sender announces {nbytes} bytes in pages of {page_size}, codec {codec}")
    if codec == ZSTD:
        compressor()
    result, space = room(nbytes, page_size, said[HELLO.size :], out, limit)
    return result, _Filling(space, page_size, codec, fresh=out is None)


def _state(text: bytearray) -> Any:
    """Return what the sender sent beside the memory."""
    try:
        return decode_state(bytes(text), "the sender")
    except SnapshotError as error:
        raise WireError(str(error)) from None
