"""Frames on a socket: versioned, numbered, bounded and checked, and nothing believed before it is.

A frame is a header of 24 bytes (magic, version, kind, sequence number, payload length, CRC-32 of the header so far and
the payload; little-endian) and its payload. Numbers make a lost, repeated or reordered frame an error; the running
digest over all headers, which holds their CRCs, lets both ends agree at the end that they saw the same.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import ssl
import struct
import time
from collections.abc import Callable, Iterator
from enum import IntEnum
from functools import partial
from typing import TYPE_CHECKING, Protocol

from dirtylog._bits.checksum import crc32
from dirtylog.errors import DirtyLogError
from dirtylog.sinks._bytes.extents import WINDOW
from dirtylog.sinks.migrate import _frames
from dirtylog.sinks.migrate._postcopy import ODD, Faults

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = [
    "LOOK",
    "MAX_EXTENTS",
    "MAX_LAYOUT",
    "MAX_PART",
    "MAX_PAYLOAD",
    "Broken",
    "Channel",
    "Kind",
    "Refusal",
    "WireError",
]

MAGIC = b"dlog"
VERSION = 3
_HEADER = struct.Struct("<4sBBHIQ")
_CRC = struct.Struct("<I")
HEADER_BYTES = _HEADER.size + _CRC.size

# A frame of pages: at most one window of data, its extents, their number and the codec.
MAX_EXTENTS = 4096
_PIECE = 1 << 18
# Seconds between two looks at whether a wait is still wanted.
LOOK = 0.1
# Bytes that are copied for one call rather than sent by a call of their own.
_LARGE = 1 << 14
MAX_PAYLOAD = 8 + 16 * MAX_EXTENTS + WINDOW
# The names and types of arrays, as JSON; and one part of the sender's state.
MAX_LAYOUT = MAX_PART = WINDOW


class WireError(DirtyLogError):
    """The peer sent something that cannot be right, or hung up."""


class Broken(WireError):
    """The line ended, or lost or changed a frame; the peer may be well, and on another line."""


class Refusal(WireError):
    """The peer said no: it has failed, and says why."""


class Kind(IntEnum):
    """What a frame is for."""

    HELLO = 1
    """Sender: session, memory size, page size, codec, length of the layout."""
    READY = 2
    """Receiver: go ahead; how far this session has come."""
    PAGES = 3
    """Sender: extents and their bytes."""
    ZEROS = 4
    """Sender: extents that are zero."""
    ROUND = 5
    """Sender: a round begins."""
    END = 6
    """Sender: that was all; the digest over all frames before this one."""
    HAVE = 7
    """Receiver: all arrived and is kept; the same digest. It does not run yet."""
    REFUSED = 8
    """Either: no, and why."""
    RUN = 9
    """Sender: the right to run, which the source has given up; the session."""
    DONE = 10
    """Receiver: it has the right to run; the session."""
    LAYOUT = 11
    """Sender, after a HELLO that announces it: names, types, shapes and places of the arrays."""
    STATE = 12
    """Sender, before END: a part of what belongs to the memory beside it."""
    DELTAS = 13
    """Sender: extents and what changed in their pages since they were last sent."""
    JOIN = 14
    """Sender, first on each further channel: the session, what READY said, and which channel it is."""
    LACKING = 15
    """Sender, before END: extents that come when the copy runs."""
    WANT = 16
    """Receiver, which runs: an extent that it waits for."""
    FILLED = 17
    """Receiver, which runs: nothing is lacking any more; the session."""


_MAX = {
    Kind.HELLO: 64,
    Kind.READY: 64,
    Kind.PAGES: MAX_PAYLOAD,
    Kind.ZEROS: 16 * MAX_EXTENTS,
    Kind.ROUND: 8,
    Kind.END: 32,
    Kind.HAVE: 32,
    Kind.REFUSED: 1024,
    Kind.RUN: 16,
    Kind.DONE: 16,
    Kind.LAYOUT: MAX_LAYOUT,
    Kind.STATE: MAX_PART,
    Kind.DELTAS: MAX_PAYLOAD,
    Kind.JOIN: 36,
    Kind.LACKING: 16 * MAX_EXTENTS,
    Kind.WANT: 16,
    Kind.FILLED: 16,
}


class _Move(Protocol):
    """Makes a call that moves bytes, in what is left of a frame's time; `begins`: no byte of the frame has come."""

    def __call__(self, call: Callable[[], int], begins: bool = False) -> int: ...


def _joined(header: bytes, parts: tuple[Buffer, ...]) -> Iterator[memoryview]:
    """Return what goes in one call each: what is small together, what is large as it is, without a copy."""
    small = header
    for part in parts:
        view = memoryview(part)
        if view.nbytes < _LARGE:
            small += part
            continue
        if small:
            yield memoryview(small)
        yield view
        small = b""
    if small:
        yield memoryview(small)


class _Line:
    """When anything came last over any of the channels that are one line."""

    __slots__ = ("heard",)

    def __init__(self, now: float) -> None:
        self.heard: float = now


class Channel:
    """Frames over one connected stream socket, which stays the caller's.

    Parameters
    ----------
    sock : socket.socket
        Blocking, or with a timeout; a timeout ends the exchange. It bounds each frame as a whole, however
        many pieces the frame comes in: a peer that sends a byte now and then holds nobody. Between frames it bounds
        how long all channels of a line are silent: one may have nothing to carry while another is busy.
    deadline : float, optional
        Seconds from now on after which no frame is sent or received any more.
    clock : callable, optional
        Seconds, monotonic.

    Notes
    -----
    Not thread-safe. Allocates one frame's buffer for receiving (1.1 MiB), whatever the peer announces.
    """

    def __init__(
        self, sock: socket.socket, deadline: float | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        if deadline is not None and not deadline > 0:
            raise ValueError(f"deadline is {deadline}; it must be a positive number of seconds, or None")
        if not isinstance(sock, socket.socket) or sock.type != socket.SOCK_STREAM:
            raise TypeError("sock must be a connected stream socket")
        if sock.gettimeout() == 0:
            raise ValueError("sock is non-blocking; give it a timeout, or none: sock.settimeout(30)")
        self._sock = sock
        self._clock = clock
        self._deadline = None if deadline is None else clock() + deadline
        self._sent = 0
        self._received = 0
        self._digest = hashlib.blake2b(digest_size=32)
        self._payload = bytearray()
        # Read from the line along with something else, and not used yet.
        self._kept = memoryview(b"")
        self._line = _Line(clock())
        # A part of a frame has gone, and the rest never will: nothing can follow it.
        self._torn = False
        self.look: Callable[[], object] | None = None
        """Called in every wait, ten times per second; raises what ends it."""
        self.pace: Callable[[int], object] | None = None
        """Called with the bytes that are about to go; may wait, or raise."""
        self.broken: bool = False
        """Whether a frame could not be sent or received: the line is of no use any more."""
        self.bytes_sent: int = 0
        self.bytes_received: int = 0

    def again(self, sock: socket.socket) -> Channel:
        """Return a channel on another line, with what is left of the deadline."""
        channel = Channel(sock, None, self._clock)
        channel._deadline, channel.pace, channel.look = self._deadline, self.pace, self.look
        channel.bytes_sent, channel.bytes_received = self.bytes_sent, self.bytes_received
        if self._deadline is not None and self._clock() >= self._deadline:
            raise TimeoutError("timed out between two lines: the deadline is over")
        return channel

    @property
    def sock(self) -> socket.socket:
        """The socket under it."""
        return self._sock

    def beside(self, sock: socket.socket) -> Channel:
        """Return another channel of the same migration, which counts its own bytes."""
        channel = self.again(sock)
        channel.bytes_sent = channel.bytes_received = 0
        channel._line = self._line
        return channel

    def cut(self, how: int = socket.SHUT_RDWR) -> None:
        """End what another thread waits for on this line."""
        # It may be gone already. Not SSLSocket's own method, which would go on without TLS.
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self._sock, how)

    def forget_deadline(self) -> None:
        """Take as long as it takes, from here on and on every line that follows."""
        self._deadline = None

    @property
    def has_more(self) -> bool:
        """Whether bytes that have come wait in this process, where no poll of the descriptor sees them."""
        return bool(self._kept) or (isinstance(self._sock, ssl.SSLSocket) and self._sock.pending() > 0)

    def digest(self) -> bytes:
        """Return the digest over the sender's frames so far."""
        return self._digest.digest()

    def send(self, kind: Kind, *parts: Buffer, counted: bool = True) -> None:
        """Send a frame whose payload is `parts` laid end to end.

        Raises
        ------
        OSError
            The connection is gone, or a timeout.
        """
        length = sum(memoryview(part).nbytes for part in parts)
        if length > _MAX[kind]:
            raise ValueError(f"a {kind.name} frame of {length} bytes; at most {_MAX[kind]}")
        if self.pace is not None:
            # Before the frame has a number and its time begins: if this raises, the next frame is the next.
            self.pace(HEADER_BYTES + length)
        header = _HEADER.pack(MAGIC, VERSION, kind, 0, self._sent & 0xFFFFFFFF, length)
        crc = crc32(header)
        for part in parts:
            crc = crc32(part, crc)
        header += _CRC.pack(crc)
        self._sent += 1
        if counted:
            self._digest.update(header)
        with self._patience("sending a frame") as move:
            for data in _joined(header, parts):
                # What does not go in one call: an SSLSocket's sendall() gives each of its writes the whole timeout.
                done = 0
                while done < len(data):
                    done += move(partial(self._sock.send, data[done : done + _PIECE]))
                    self._torn = True
        self._torn = False
        self.bytes_sent += HEADER_BYTES + length

    # ---- many frames of pages at once, without the GIL --------------------------------------------------------------

    @property
    def plain(self) -> bool:
        """Whether frames may go by system calls on the descriptor: no TLS, nothing of somebody's own in between."""
        return type(self._sock) is socket.socket and self._clock is time.monotonic

    def _limits(self, doing: str) -> tuple[float, float]:
        """Return the seconds that a frame may take, and that are left for all of it; 0: no limit."""
        left = 0.0
        if self._deadline is not None:
            left = self._deadline - self._clock()
            if left <= 0:
                self._end(_frames.OVER, doing)
        return self._sock.gettimeout() or 0.0, left

    def _end(self, why: int, doing: str) -> None:
        """Raise what a call without the GIL ended with."""
        self.broken = True
        if why == _frames.OVER:
            raise TimeoutError(f"timed out {doing}: the deadline is over")
        if why == _frames.LATE:
            raise TimeoutError(f"timed out {doing}: {self._sock.gettimeout():g} s is over")
        if why == _frames.ENDED:
            raise Broken("the connection ended in the middle")
        raise OSError(-why, os.strerror(-why))

    def lend(self, faults: Faults) -> None:
        """Let faults be answered over this line, until they say why it ended."""
        patience, _ = self._limits("waiting for a frame")
        assert not self._kept
        faults.line(self._sock.fileno(), self._received, self._sent, patience)

    def lent(self, why: int) -> None:
        """Raise why a line that was lent has ended."""
        if why == ODD:
            self.broken = True
            raise Broken("what came is no frame of pages that was due")
        self._end(why, "waiting for a frame")

    def send_pages(self, packer: _frames.Packer, enough: int) -> tuple[int, int, int]:
        """Send frames of pages that `packer` makes, over a plain socket.

        Parameters
        ----------
        packer : Packer
            Its pages go, in windows.
        enough : int
            Bytes of pages after which to return.

        Returns
        -------
        nbytes, zeros, deltas : int
            Bytes of the pages that went, 0 when there are none left; how many granules of them were zero, and of how
            many only what changed went.

        Raises
        ------
        OSError
            The connection is gone, or a timeout.
        """
        doing = "sending a frame"
        patience, left = self._limits(doing)
        fd = self._sock.fileno()
        try:
            why, nbytes, zeros, deltas = packer.send(fd, self._sent, enough, patience, left, self.look)
        finally:
            frames, size, headers, self._torn = packer.gone
            self._sent += frames
            self.bytes_sent += size
            self._digest.update(headers)
        if why:
            self._end(why, doing)
        if self.pace is not None:
            self.pace(size)
        return nbytes, zeros, deltas

    def take_pages(self, taker: _frames.Taker, enough: int) -> bool:
        """Receive frames of pages over a plain socket, and apply them.

        Parameters
        ----------
        taker : Taker
            What they are applied to.
        enough : int
            Bytes of pages after which to return.

        Returns
        -------
        bool
            True: `enough` came, or a tenth of a second is over. False: the next frame is for :meth:`receive`, because
            it is not of pages, or not as it should be.

        Raises
        ------
        WireError, OSError
            As :meth:`receive`.
        """
        if len(self._kept) > HEADER_BYTES:
            return False
        doing = "waiting for a frame"
        patience, left = self._limits(doing)
        fd, before = self._sock.fileno(), self._clock()
        # Of a frame that has not begun, the wait began with the line's silence.
        first = self._line.heard + patience - before if not self._kept else 0.0
        first = first if first > 0 else patience
        answer = taker.receive(
            fd, bytes(self._kept), self._received, enough, min(first, patience), patience, left, self.look
        )
        why, kept, frames, size, headers = answer
        if frames or len(kept) > len(self._kept):
            self._line.heard = self._clock()
        self._kept = memoryview(kept)
        self._received += frames
        self.bytes_received += size
        self._digest.update(headers)
        if why == _frames.LATE and not kept and self._line.heard > before:
            # Another channel is busy: what this one has to carry comes later.
            return True
        if why not in (_frames.PAUSE, _frames.FOREIGN, _frames.ODD):
            self._end(why, doing)
        return why == _frames.PAUSE

    def receive(self, *expected: Kind, counted: bool = True) -> tuple[Kind, memoryview]:
        """Receive the next frame, which must be of one of the expected kinds.

        Returns
        -------
        kind : Kind
        payload : memoryview
            Valid until the next call.

        Raises
        ------
        WireError
            End of the stream, or anything that is not as this side would have sent it.
        Refusal
            The peer refused; a WireError too.
        OSError
            The connection is gone, or a timeout.
        """
        with self._patience("waiting for a frame") as move:
            return self._receive(expected, counted, move)

    def _receive(self, expected: tuple[Kind, ...], counted: bool, move: _Move) -> tuple[Kind, memoryview]:
        raw = memoryview(bytearray(HEADER_BYTES))
        self._fill(raw, move, begins=True)
        magic, version, number, zero, sequence, length = _HEADER.unpack_from(raw)
        if magic != MAGIC:
            raise WireError(f"the peer speaks another protocol: its frame begins with {magic!r}")
        if version != VERSION:
            raise WireError(f"the peer speaks version {version} of the protocol; this side speaks {VERSION}")
        if zero != 0 or number not in _MAX:
            raise WireError(f"a frame of kind {number}, flags {zero:#x}; there is none such")
        kind = Kind(number)
        if length > _MAX[kind]:
            raise WireError(f"a {kind.name} frame announces {length} bytes; at most {_MAX[kind]}")
        if sequence != self._received & 0xFFFFFFFF:
            raise Broken(f"frame {sequence} arrived where {self._received} was due: one is lost or came twice")
        if len(self._payload) < length:
            self._payload = bytearray(_MAX[kind])
        payload = memoryview(self._payload)[:length]
        self._fill(payload, move)
        if crc32(payload, crc32(raw[: _HEADER.size])) != _CRC.unpack_from(raw, _HEADER.size)[0]:
            raise Broken(f"{kind.name} frame {sequence} does not match its checksum")
        self._received += 1
        self.bytes_received += HEADER_BYTES + length
        if kind == Kind.REFUSED:
            reason = bytes(payload).decode("utf-8", "replace")
            raise Refusal(f"the peer refused: {''.join(c if c.isprintable() else '?' for c in reason)}")
        if kind not in expected:
            raise WireError(f"a {kind.name} frame where {' or '.join(k.name for k in expected)} was due")
        if counted:
            self._digest.update(raw)
        return kind, payload

    @contextlib.contextmanager
    def _patience(self, doing: str) -> Iterator[_Move]:
        """Bound one frame by the timeout and the deadline; yields what makes a call in the time that is left."""
        patience = self._sock.gettimeout()
        end = None if patience is None else self._clock() + patience

        def move(call: Callable[[], int], begins: bool = False) -> int:
            nonlocal end
            while True:
                now = self._clock()
                if begins and patience is not None:
                    # No byte of it yet: it is the silence of the whole line that is bounded.
                    end = max(end or 0.0, self._line.heard + patience)
                seconds = None if end is None else end - now
                if self._deadline is not None and (seconds is None or self._deadline - now < seconds):
                    seconds = self._deadline - now
                    if seconds <= 0:
                        raise TimeoutError(f"timed out {doing}: the deadline is over")
                if seconds is not None and seconds <= 0:
                    raise TimeoutError(f"timed out {doing}: {patience:g} s is over")
                short = (self.look is not None or begins) and (seconds is None or seconds > LOOK)
                self._sock.settimeout(LOOK if short else seconds)
                try:
                    return call()
                except TimeoutError:
                    if self.look is not None:
                        self.look()
                    if not short and not (begins and self._clock() < self._line.heard + (patience or 0.0)):
                        raise TimeoutError(f"timed out {doing}: {patience or 0:g} s is over") from None

        try:
            yield move
        except (OSError, Broken):
            self.broken = True
            raise
        finally:
            # A socket that somebody has closed meanwhile has no timeout to put back.
            with contextlib.suppress(OSError):
                self._sock.settimeout(patience)

    def _fill(self, buffer: memoryview, move: _Move, begins: bool = False) -> None:
        done = min(len(self._kept), buffer.nbytes)
        buffer[:done] = self._kept[:done]
        self._kept = self._kept[done:]
        while done < buffer.nbytes:
            count = move(partial(self._sock.recv_into, buffer[done:]), begins and not done)
            if count == 0:
                raise Broken("the connection ended in the middle")
            self._line.heard = self._clock()
            done += count

    def refuse(self, reason: str) -> None:
        """Tell the peer why this side gives up, if it still listens; within a frame it could not hear: hang up."""
        if self._torn:
            self.cut()
            return
        patience = self._sock.gettimeout()
        # It may be gone, or not read; the caller raises what went wrong in the first place.
        with contextlib.suppress(OSError):
            self._sock.settimeout(1 if patience is None else min(patience, 1))
            self._deadline = self.pace = self.look = None
            self.send(Kind.REFUSED, reason.encode("utf-8")[:1000], counted=False)
        with contextlib.suppress(OSError):
            self._sock.settimeout(patience)
