"""A client of NBD, the network block device: reads an export, and what its metadata contexts say of each block.

As much of the protocol as dirty bitmaps need: fixed newstyle, structured replies, block status. No reply is believed
further than the request that it answers: lengths are bounded before memory is taken, ranges lie in what was asked for,
and every exchange has a deadline.
"""

from __future__ import annotations

import contextlib
import errno
import os
import struct
import threading
from collections.abc import Iterable, Iterator
from typing import SupportsIndex

import numpy as np
import numpy.typing as npt

from dirtylog.sources._channel import Address, Channel, PeerError
from dirtylog.sources._resource import Resource

__all__ = ["NbdClient"]

_MAGIC = 0x4E42444D41474943
_OPTION = 0x49484156454F5054
_OPTION_REPLY = 0x0003E889045565A9
_REQUEST = 0x25609513
_SIMPLE = 0x67446698
_STRUCTURED = 0x668E33EF

_OPT_GO = 7
_OPT_STRUCTURED_REPLY = 8
_OPT_SET_META_CONTEXT = 10

_REP_ACK = 1
_REP_INFO = 3
_REP_META_CONTEXT = 4
_ERROR_BIT = 1 << 31
_REFUSALS = {
    1: "it does not know the option",
    2: "its policy forbids it",
    3: "the request was invalid",
    4: "this platform does not support it",
    5: "it requires TLS",
    6: "it has no export of that name",
    7: "it is shutting down",
    8: "it requires the client to know block sizes",
    9: "the request was too large",
}

_INFO_EXPORT = 0
_INFO_BLOCK_SIZE = 3

_CMD_READ = 0
_CMD_DISC = 2
_CMD_FLUSH = 3
_CMD_BLOCK_STATUS = 7

_FLAG_DONE = 1
_CHUNK_NONE = 0
_CHUNK_DATA = 1
_CHUNK_HOLE = 2
_CHUNK_STATUS = 5
_CHUNK_ERROR = 1 << 15
_CHUNK_ERROR_OFFSET = _CHUNK_ERROR + 2

_HAS_FLAGS, _IS_READ_ONLY, _SENDS_FLUSH, _SENDS_DF = 1 << 0, 1 << 1, 1 << 2, 1 << 7
# In one piece. QEMU answers a disk's error in the middle of pieces by hanging up, and of one piece by the error.
_CMD_FLAG_DF = 1 << 2
# The errors that the protocol knows; another one is an EIO.
_ERRNOS = {1: errno.EPERM, 5: errno.EIO, 12: errno.ENOMEM, 22: errno.EINVAL, 28: errno.ENOSPC, 75: errno.EOVERFLOW,
           95: errno.ENOTSUP, 108: errno.ESHUTDOWN}  # fmt: skip

# What a server may make this client hold or wait for.
MAX_NAME = 4096
MAX_OPTION_REPLY = 1 << 16
MAX_OPTION_REPLIES = 256
MAX_ERRORS = 64
MAX_DESCRIPTORS = 1 << 20
MAX_EXTENTS = 1 << 24
MAX_READ = 1 << 25
# Block status is asked for so many bytes at once: a multiple of every granularity, below the protocol's 32 bits.
_STATUS_SPAN = 1 << 31


class NbdClient(Resource):
    """One export of an NBD server, to read.

    Parameters
    ----------
    address : path-like, (str, int) or socket
        A Unix socket, a host with its port, or a connected stream socket, which the client takes over (for TLS: wrap
        it first).
    export : str, default ""
        Name of the export.
    contexts : iterable of str
        Metadata contexts to ask for, such as ``"base:allocation"`` or ``"qemu:dirty-bitmap:NAME"``. The server must
        have all of them.
    timeout : float, default 60
        Seconds that one exchange may take.

    Attributes
    ----------
    size : int
        Bytes of the export.
    block_size : int
        Bytes that offsets and lengths are multiples of at the server; 1 where it says nothing. Reads are widened to it.
    read_only : bool
        Whether the server takes no writes. (This client sends none.)
    contexts : tuple of str
        The contexts that the server has agreed to.

    Raises
    ------
    OSError
        There is nobody at the address, or no answer in time (`TimeoutError`).
    PeerError
        The server has no such export or context, or broke the protocol.

    Notes
    -----
    Thread-safe: one request at a time. After an `PeerError`, a time-out or an interrupted request the connection is of
    no more use, and the next call says so. A server that lies is refused, or answers wrongly about its own content; it
    cannot make the client take memory beyond 32 MiB for a reply and 400 MB for extents.

    References
    ----------
    `doc/proto.md` of the NBD project; `docs/interop/nbd.rst` of QEMU for the names of its contexts.
    """

    __module__ = "dirtylog.sources.qemu"

    def __init__(
        self, address: Address, export: str = "", contexts: Iterable[str] = (), *, timeout: float = 60
    ) -> None:
        super().__init__()
        self._name = export
        wanted = list(contexts)
        for text in (export, *wanted):
            if len(text.encode()) > MAX_NAME:
                raise ValueError(f"a name has {len(text.encode())} bytes; NBD has at most {MAX_NAME}: {text[:40]!r}...")
        if len(set(wanted)) < len(wanted):
            raise ValueError(f"contexts are {wanted}; each can be asked for once")
        # Re-entrant, so that a signal handler that reads in the middle of a request is told so instead of waiting.
        self._lock = threading.RLock()
        self._cookie = 0
        self._broken = ""
        self._channel = Channel(address, timeout, f"the NBD server of {export!r}")
        try:
            with self._channel.exchange():
                self._greet()
                self._ids = self._negotiate_contexts(wanted)
                self._go()
        except BaseException:
            self._channel.close()
            raise
        self.contexts: tuple[str, ...] = tuple(self._ids.values())
        self._closed = False

    def __repr__(self) -> str:
        """Name the export and its size."""
        return f"<{'closed ' if self.closed else ''}NbdClient of {self._name!r}: {self.size} bytes>"

    def _release(self) -> None:
        # A courtesy that lets the server end at once; a server that is gone needs none.
        with contextlib.suppress(OSError, PeerError):
            if not self._broken and not self._inherited and self._lock.acquire(blocking=False):
                with self._channel.exchange(1):
                    self._channel.send(struct.pack(">IHHQQI", _REQUEST, 0, _CMD_DISC, 0, 0, 0))
        self._channel.close()

    # Negotiation ----------------------------------------------------------------------------------------------------

    def _greet(self) -> None:
        magic, option, flags = struct.unpack(">QQH", self._channel.exactly(18))
        if magic != _MAGIC:
            raise PeerError(f"no NBD server is at that address: it began with {magic:#018x}")
        if option != _OPTION or not flags & 1:
            raise PeerError("the NBD server has no fixed newstyle negotiation, which named exports need")
        # FIXED_NEWSTYLE, and NO_ZEROES where the server offers it.
        self._channel.send(struct.pack(">I", 1 | flags & 2))
        self._ask(_OPT_STRUCTURED_REPLY, b"")
        for _ in self._replies(_OPT_STRUCTURED_REPLY, "structured replies, which block status needs"):
            raise PeerError("the NBD server answered with more than it was asked for")

    def _ask(self, option: int, payload: bytes) -> None:
        self._channel.send(struct.pack(">QII", _OPTION, option, len(payload)) + payload)

    def _replies(self, option: int, what: str) -> Iterable[tuple[int, bytes]]:
        """Yield the replies to an option until the server acknowledges it."""
        for _ in range(MAX_OPTION_REPLIES):
            magic, echoed, kind, length = struct.unpack(">QIII", self._channel.exactly(20))
            if magic != _OPTION_REPLY or echoed != option:
                raise PeerError(f"the NBD server answered option {echoed} ({magic:#x}) and was asked option {option}")
            if length > MAX_OPTION_REPLY:
                raise PeerError(
                    f"the NBD server answers option {option} with {length} bytes; {MAX_OPTION_REPLY} are read"
                )
            payload = self._channel.exactly(length)
            if kind & _ERROR_BIT:
                code = kind & ~_ERROR_BIT
                words = payload.decode("utf-8", "replace") or _REFUSALS.get(code, f"error {code}")
                raise PeerError(f"the NBD server refuses {what}: {words}")
            if kind == _REP_ACK:
                return
            yield kind, payload
        raise PeerError(f"the NBD server gave more than {MAX_OPTION_REPLIES} replies to option {option}")

    def _negotiate_contexts(self, wanted: list[str]) -> dict[int, str]:
        ids: dict[int, str] = {}
        if not wanted:
            return ids
        name = self._name.encode()
        queries = b"".join(struct.pack(">I", len(each.encode())) + each.encode() for each in wanted)
        payload = struct.pack(">I", len(name)) + name + struct.pack(">I", len(wanted)) + queries
        self._ask(_OPT_SET_META_CONTEXT, payload)
        for kind, body in self._replies(_OPT_SET_META_CONTEXT, f"the contexts {wanted} of {self._name!r}"):
            if kind != _REP_META_CONTEXT or len(body) < 5:
                raise PeerError(
                    f"the NBD server answered a request for contexts with reply {kind} of {len(body)} bytes"
                )
            (number,) = struct.unpack(">I", body[:4])
            context = body[4:].decode("utf-8", "replace")
            if context not in wanted or number in ids or context in ids.values():
                raise PeerError(f"the NBD server offers the context {context!r}; asked for were {wanted}, each once")
            ids[number] = context
        missing = [each for each in wanted if each not in ids.values()]
        if missing:
            raise PeerError(
                f"the export {self._name!r} has no context {missing[0]!r}; export the node with that bitmap"
            )
        return ids

    def _go(self) -> None:
        name = self._name.encode()
        self._ask(_OPT_GO, struct.pack(">I", len(name)) + name + struct.pack(">HH", 1, _INFO_BLOCK_SIZE))
        self.size: int = -1
        self.block_size: int = 1
        self._most = MAX_READ
        flags = 0
        for kind, body in self._replies(_OPT_GO, f"the export {self._name!r}"):
            if kind != _REP_INFO or len(body) < 2:
                raise PeerError(f"the NBD server answered with reply {kind} of {len(body)} bytes")
            (about,) = struct.unpack(">H", body[:2])
            if about == _INFO_EXPORT and len(body) == 12:
                self.size, flags = struct.unpack(">QH", body[2:])
            elif about == _INFO_BLOCK_SIZE and len(body) == 14:
                least, _, most = struct.unpack(">III", body[2:])
                if least < 1 or least & (least - 1) or least > 1 << 16 or most < least:
                    raise PeerError(f"the NBD server says block sizes from {least} to {most} bytes")
                self.block_size, self._most = least, min(MAX_READ, most // least * least)
        if not 0 <= self.size < 1 << 63 or not flags & _HAS_FLAGS:
            raise PeerError(f"the NBD server says of the export {self._name!r}: {self.size} bytes, flags {flags:#x}")
        self.read_only: bool = bool(flags & _IS_READ_ONLY)
        self._read_flags = _CMD_FLAG_DF if flags & _SENDS_DF else 0
        self._can_flush = bool(flags & _SENDS_FLUSH)

    # Transmission ---------------------------------------------------------------------------------------------------

    def _request(self, command: int, offset: int, length: int, flags: int = 0) -> None:
        self._check_open()
        if self._inherited:
            raise PeerError("the connection is that of the process this one was forked from; open another one")
        if self._broken:
            raise PeerError(f"the connection is of no more use: {self._broken}; connect again")
        # Until its reply is read to the end: an interrupt leaves the rest of it in the line.
        self._broken = "a request was interrupted, or failed in the middle"
        self._cookie += 1
        self._channel.send(struct.pack(">IHHQQI", _REQUEST, flags, command, self._cookie, offset, length))

    def _chunk(self, most: int) -> tuple[bool, int, int]:
        """Read the head of a chunk: whether it is the last, its type, its length."""
        (magic,) = struct.unpack(">I", self._channel.exactly(4))
        if magic == _SIMPLE:
            code, cookie = struct.unpack(">IQ", self._channel.exactly(12))
            if cookie != self._cookie:
                raise PeerError(f"the NBD server answered request {cookie}; it was asked request {self._cookie}")
            return True, _CHUNK_ERROR if code else _CHUNK_NONE, -code
        if magic != _STRUCTURED:
            raise PeerError(f"the NBD server sent {magic:#010x} where a reply begins")
        flags, kind, cookie, length = struct.unpack(">HHQI", self._channel.exactly(16))
        if cookie != self._cookie:
            raise PeerError(f"the NBD server answered request {cookie}; it was asked request {self._cookie}")
        if length > max(most, MAX_NAME + 16):
            raise PeerError(f"the NBD server sends a chunk of {length} bytes; at most {most} were asked for")
        return bool(flags & _FLAG_DONE), kind, length

    def _failure(self, kind: int, length: int, what: str) -> OSError:
        """Read an error chunk."""
        if length <= 0:
            code, words = -length, ""
        else:
            if not 6 <= length <= MAX_NAME + 16:
                raise PeerError(f"the NBD server sends an error of {length} bytes")
            body = self._channel.exactly(length)
            code, size = struct.unpack(">IH", body[:6])
            tail = 8 if kind == _CHUNK_ERROR_OFFSET else 0
            if code == 0 or length < 6 + size + tail:
                raise PeerError(
                    f"the NBD server sends an error that cannot be read: code {code}, {size} of {length} bytes"
                )
            words = body[6 : 6 + size].decode("utf-8", "replace")
        number = _ERRNOS.get(code, errno.EIO)
        return OSError(number, f"{what}: {words or os.strerror(number)}")

    def _chunks(self, most: int, what: str) -> Iterator[tuple[int, int]]:
        """Yield the type and the length of each chunk of a reply; raise at its end what the server could not do."""
        failure = None
        errors = 0
        done = False
        while not done:
            done, kind, size = self._chunk(most)
            if kind & _CHUNK_ERROR:
                found = self._failure(kind, size, what)
                failure = failure or found
                errors += 1
                if errors > MAX_ERRORS:
                    raise PeerError(f"the NBD server sent more than {MAX_ERRORS} errors for one request")
            elif kind != _CHUNK_NONE:
                yield kind, size
            elif size or not done:
                raise PeerError("the NBD server sent an empty chunk in the middle of a reply")
        self._broken = ""
        if failure is not None:
            raise failure

    def _check_range(self, offset: int, length: int) -> None:
        if offset < 0 or length < 0 or offset + length > self.size:
            raise IndexError(f"bytes {offset} to {offset + length} are not in the export, which has {self.size} bytes")

    def read(self, offset: SupportsIndex, length: SupportsIndex, out: memoryview | None = None) -> memoryview:
        """Read a range of the export.

        Parameters
        ----------
        offset, length : int
            In bytes.
        out : memoryview, optional
            Writable buffer of `length` bytes to read into.

        Returns
        -------
        memoryview
            The bytes: `out`, or a buffer of its own.

        Raises
        ------
        IndexError
            The range is not in the export.
        ValueError
            `out` is of another length, or the client is closed.
        OSError
            The server could not read it, with the error it gave; or no answer in time.
        PeerError
            The server broke the protocol.
        """
        start, count = int(offset.__index__()), int(length.__index__())
        self._check_range(start, count)
        if out is None:
            out = memoryview(bytearray(count))
        out = out.cast("B")
        if len(out) != count:
            raise ValueError(f"out has {len(out)} bytes; {count} are read")
        block = self.block_size
        for at in range(start, start + count, self._most):
            part = out[at - start : min(at - start + self._most, count)]
            before, after = at % block, -(at + len(part)) % block
            if before or after:
                # The edges lie in blocks that the server reads whole.
                begin, end = at - before, min(at + len(part) + after, self.size)
                for sub in range(begin, end, self._most):
                    whole = memoryview(bytearray(min(self._most, end - sub)))
                    self._read(sub, whole)
                    low, high = max(sub, at), min(sub + len(whole), at + len(part))
                    part[low - at : high - at] = whole[low - sub : high - sub]
            else:
                self._read(at, part)
        return out

    def _read(self, offset: int, out: memoryview) -> None:
        length = len(out)
        # Begins of what has come to ends; chunks may come in any order, but each byte once.
        got: dict[int, int] = {}
        with self._lock, self._channel.exchange():
            self._request(_CMD_READ, offset, length, self._read_flags)
            for kind, size in self._chunks(8 + length, f"read of {length} bytes at {offset}"):
                if kind not in (_CHUNK_DATA, _CHUNK_HOLE):
                    raise PeerError(f"the NBD server answered a read with a chunk of type {kind}")
                if size < 9 or (kind == _CHUNK_HOLE and size != 12):
                    raise PeerError(f"the NBD server sent a chunk of {size} bytes for a read")
                (at,) = struct.unpack(">Q", self._channel.exactly(8))
                count = size - 8
                if kind == _CHUNK_HOLE:
                    (count,) = struct.unpack(">I", self._channel.exactly(4))
                first = at - offset
                if first < 0 or not count or first + count > length or first in got:
                    raise PeerError(
                        f"the NBD server sent bytes {at} to {at + count}; {offset} to {offset + length} were asked "
                        "for, each once"
                    )
                got[first] = first + count
                if kind == _CHUNK_HOLE:
                    out[first : first + count] = bytes(count)
                else:
                    self._channel.fill(out[first : first + count])
                if len(got) > length // 512 + 1:
                    raise PeerError(f"the NBD server divides {length} bytes into more than {len(got) - 1} chunks")
            begins = sorted(got)
            # Each piece begins where the one before it ends, and the last ends where the range does.
            if begins[:1] != [0] or [*begins[1:], length] != [got[begin] for begin in begins]:
                self._broken = "a read was answered in part"
                raise PeerError(f"the NBD server left out bytes of the {length} at {offset}, or sent some twice")

    def extents(
        self, context: str, offset: SupportsIndex = 0, length: SupportsIndex | None = None
    ) -> npt.NDArray[np.int64]:
        """Ask what a metadata context says of a range.

        Parameters
        ----------
        context : str
            One that the client was made with.
        offset, length : int, optional
            The range, in bytes; by default to the end of the export.

        Returns
        -------
        int64 array of shape (n, 3)
            First byte, bytes, flags; ascending, without a gap, neighbours with different flags. Flags are the
            context's own: in ``qemu:dirty-bitmap:NAME`` 1 is dirty; in ``base:allocation`` 1 is a hole, 2 is zero.

        Raises
        ------
        KeyError
            The client was not made with that context.
        IndexError, ValueError, OSError, PeerError
            As for :meth:`read`.

        Notes
        -----
        O(extents); a context whose blocks change all the time is asked again for each 2 GiB at most.
        """
        start = int(offset.__index__())
        count = self.size - start if length is None else int(length.__index__())
        self._check_range(start, count)
        number = next((number for number, name in self._ids.items() if name == context), None)
        if number is None:
            raise KeyError(f"{context!r} is not a context of this client, which has {list(self.contexts)}")
        parts = [np.empty((0, 3), np.int64)]
        held = 0
        at, end = start, start + count
        while at < end:
            part = self._status(number, at, min(end - at, _STATUS_SPAN // self.block_size * self.block_size))
            at = int(part[-1, 0] + part[-1, 1])
            parts.append(part)
            held += len(part)
            if held > MAX_EXTENTS:
                raise PeerError(f"the NBD server divides {count} bytes into more than {MAX_EXTENTS} extents")
        return _joined(np.concatenate(parts))

    def _status(self, number: int, offset: int, length: int) -> npt.NDArray[np.int64]:
        """Ask once; the answer may end before the range does."""
        answers: dict[int, bytes] = {}
        with self._lock, self._channel.exchange():
            self._request(_CMD_BLOCK_STATUS, offset, length)
            for kind, size in self._chunks(4 + 8 * MAX_DESCRIPTORS, f"block status of {length} bytes at {offset}"):
                if kind != _CHUNK_STATUS:
                    raise PeerError(f"the NBD server answered a request for block status with a chunk of type {kind}")
                body = self._channel.exactly(size)
                (context,) = struct.unpack(">I", body[:4]) if size >= 12 and size % 8 == 4 else (-1,)
                if context not in self._ids or context in answers:
                    raise PeerError(f"the NBD server sent {size} bytes of block status for the context {context}")
                answers[context] = body[4:]
        if number not in answers:
            raise PeerError(f"the NBD server left out the context {self._ids[number]!r}")
        pairs = np.frombuffer(answers[number], ">u4").astype(np.int64).reshape(-1, 2)
        ends = np.cumsum(pairs[:, 0])
        if not pairs[:, 0].all():
            raise PeerError("the NBD server sent an extent of 0 bytes")
        # The last may say more than was asked; one that begins beyond the range may not be there at all.
        if len(pairs) > 1 and ends[-2] >= length:
            raise PeerError(f"the NBD server sent block status past the {length} bytes that it was asked for")
        ends = np.minimum(ends, length)
        begins = np.concatenate(([0], ends[:-1]))
        return np.stack([begins + offset, ends - begins, pairs[:, 1]], axis=1)

    def flush(self) -> None:
        """Have the server write what it holds back; nothing, where it says that it cannot.

        Raises
        ------
        OSError, PeerError, ValueError
            As for :meth:`read`.
        """
        self._check_open()
        if not self._can_flush:
            return
        with self._lock, self._channel.exchange():
            self._request(_CMD_FLUSH, 0, 0)
            for kind, _ in self._chunks(0, "flush"):
                raise PeerError(f"the NBD server answered a flush with a chunk of type {kind}")


def _joined(extents: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Join neighbours with the same flags."""
    if len(extents) < 2:
        return extents
    firsts = np.flatnonzero(np.concatenate(([True], extents[1:, 2] != extents[:-1, 2])))
    return np.stack([extents[firsts, 0], np.add.reduceat(extents[:, 1], firsts), extents[firsts, 2]], axis=1)
