"""Targets: what comes from a socket: a migration, an NBD server, a QMP monitor, the front end of a device."""

import contextlib
import json
import mmap
import os
import socket
import struct
import zlib
from collections.abc import Iterator

import numpy as np

from dirtylog import DirtyBitmap, DirtyLog
from dirtylog.sinks.migrate import MigrationError, receive, send, sessions
from dirtylog.sinks.migrate.payloads import EXTENT, HELLO, PAGES, RAW, READY, ROUND, ZSTD
from dirtylog.sinks.migrate.wire import HEADER_BYTES, VERSION, Kind
from dirtylog.sources.qemu import NbdClient, PeerError, Qmp, QmpError
from dirtylog.sources.vhost import VhostBackend, VhostRequest
from dirtylog.sources.vhost.backend import MAX_PAYLOAD
from dirtylog.sources.vhost.memory import MAX_REGIONS
from fuzz.target import Target, Wrong

__all__ = ["Answers", "Device", "Migration", "Monitor", "Nbd", "Postcopy"]

LIMIT = 1 << 20
_HEADER = struct.Struct("<4sBBHIQ")


def frame(kind: int, payload: bytes, sequence: int) -> bytes:
    """Return a frame with the checksum that fits."""
    header = _HEADER.pack(b"dlog", VERSION, kind, 0, sequence, len(payload))
    return header + struct.pack("<I", zlib.crc32(payload, zlib.crc32(header))) + payload


def repaired(data: bytes) -> bytes:
    """Read kind, length and payload after payload, and make frames of them: in order, with checksums that fit."""
    import hashlib

    digest = hashlib.blake2b(digest_size=32)
    frames = []
    at = 0
    while at + 3 <= len(data):
        kind, length = data[at], int.from_bytes(data[at + 1 : at + 3], "little")
        payload = data[at + 3 : at + 3 + length]
        at += 3 + length
        if kind == Kind.END and payload == b"digest":
            payload = digest.digest()
        frames.append(frame(kind, payload, len(frames)))
        digest.update(frames[-1][:HEADER_BYTES])
    return b"".join(frames)


class Migration(Target):
    """`receive`: bytes as they are, or frames with checksums that fit so that their payloads are looked at."""

    name = "migration"
    refusals = (MigrationError,)

    def seeds(self) -> Iterator[bytes]:
        """Yield migrations of three pages in two rounds: raw, compressed, zeros; arrays by name, and a state."""
        import zstandard

        nbytes = 3 * 512 - 7
        memory = (np.arange(nbytes) % 251).astype(np.uint8).tobytes()
        table = np.array([[0, 1024], [1024, nbytes - 1024]], "<i8").tobytes()
        zeros = np.array([[512, 512]], "<i8").tobytes()
        for codec, content in ((RAW, memory), (ZSTD, zstandard.compress(memory))):
            payloads = [
                (Kind.HELLO, HELLO.pack(bytes(16), nbytes, 512, codec, 0, 0, 0)),
                (Kind.ROUND, ROUND.pack(1)),
                (Kind.PAGES, PAGES.pack(2, codec) + table + content),
                (Kind.ROUND, ROUND.pack(2)),  # a page comes once per round
                (Kind.ZEROS, zeros),
                (Kind.DELTAS, PAGES.pack(1, RAW) + np.array([0, 512], "<i8").tobytes() + b"\x04\x02ab\xfa\x03\x00"),
                (Kind.END, b"digest"),
                (Kind.RUN, bytes(16)),
            ]
            yield from self.both(payloads)
        layout = b'[["a","<i2",[256,2],"C",0,1024],["b","|u1",[505],"C",1024,505]]'
        payloads[0] = (Kind.HELLO, HELLO.pack(bytes(16), nbytes, 512, codec, 0, 0, len(layout)))
        payloads.insert(1, (Kind.LAYOUT, layout))
        payloads.insert(-2, (Kind.STATE, b'{"step":7,"registers":{"$bytes":"AAH/"}}'))
        yield from self.both(payloads)

    def both(self, payloads: list[tuple[Kind, bytes]]) -> Iterator[bytes]:
        """Yield frames to be repaired after each change, and the same as they go over the line."""
        packed = b"".join(bytes([kind]) + len(body).to_bytes(2, "little") + body for kind, body in payloads)
        yield b"+" + packed
        yield b"=" + repaired(packed)

    def prepare(self, data: bytes) -> bytes:
        """Make frames of what begins with a plus, and put everything into a socket."""
        raw = repaired(data[1:]) if data[:1] == b"+" else data[1:]
        self.here, self.there = socket.socketpair()
        # All of it fits, so that nobody waits.
        self.there.sendall(raw[: 1 << 16])
        self.there.shutdown(socket.SHUT_WR)
        self.here.settimeout(10)
        return data

    def read(self, data: bytes) -> object:
        """Receive into new memory, as a process that has received nothing before."""
        sessions._known.clear()
        with self.here, self.there:
            return receive(self.here, limit=LIMIT, state=lambda state: None)

    def judge(self, data: bytes, answer: object) -> None:
        """What is complete is within the limit."""
        arrays = answer.values() if isinstance(answer, dict) else [answer]
        if sum(memoryview(each).nbytes for each in arrays) > LIMIT:
            raise Wrong("more memory was made than the limit allows")


class Postcopy(Migration):
    """`receive` of a copy that is filled when it has the right to run: what is lacking, and what brings it."""

    name = "postcopy"

    def seeds(self) -> Iterator[bytes]:
        """Yield migrations of three pages: all of them lacking, and after a live round one that was written since."""
        nbytes = 3 * 4096 - 7
        memory = (np.arange(nbytes) % 251).astype(np.uint8).tobytes()
        hello = (Kind.HELLO, HELLO.pack(bytes(16), nbytes, 4096, RAW, 0, 1, 0))
        whole = np.array([[0, nbytes]], "<i8").tobytes()
        ends = [(Kind.END, b"digest"), (Kind.RUN, bytes(16))]
        parts = np.array([[0, 4096], [8192, nbytes - 8192]], "<i8").tobytes()
        zeros = np.array([[4096, 4096]], "<i8").tobytes()
        pages = (Kind.PAGES, PAGES.pack(2, RAW) + parts + memory[:4096] + memory[8192:])
        yield from self.both([hello, (Kind.LACKING, whole), (Kind.STATE, b"7"), *ends, pages, (Kind.ZEROS, zeros)])
        live = [(Kind.ROUND, ROUND.pack(1)), (Kind.PAGES, PAGES.pack(1, RAW) + whole + memory)]
        yield from self.both([hello, *live, (Kind.LACKING, parts), *ends, pages])

    def read(self, data: bytes) -> object:
        """Receive into new memory, which is not looked at before it is filled."""
        sessions._known.clear()
        with self.here, self.there:
            return receive(self.here, limit=LIMIT, state=lambda state: None, postcopy=True, run="filled")


class Answers(Migration):
    """`send`: what a copy says, of a migration and of one with postcopy."""

    name = "answers"

    def __init__(self) -> None:
        super().__init__()
        self.memory = (np.arange(3 * 4096) % 251).astype(np.uint8)
        self.log = DirtyLog()
        self.log.attach(DirtyBitmap(3))

    def send(self, sock: socket.socket, postcopy: bool) -> object:
        """Send three pages."""
        observer = self.log.observer("migration")
        try:
            return send(sock, self.memory, observer, session="0" * 32, postcopy=0 if postcopy else None)
        finally:
            observer.close()

    def seeds(self) -> Iterator[bytes]:
        """Yield what a copy did say."""
        for postcopy in (False, True):
            digest = self.digest(postcopy)
            said = [(Kind.READY, READY.pack(0, 0, 0, bytes(16))), (Kind.HAVE, digest), (Kind.DONE, bytes(16))]
            if postcopy:
                said += [(Kind.WANT, EXTENT.pack(8192, 4096)), (Kind.WANT, EXTENT.pack(0, 1)), (Kind.FILLED, bytes(16))]
            for one in self.both(said):
                yield (b"p" if postcopy else b"-") + one

    def digest(self, postcopy: bool) -> bytes:
        """Return that of what is sent: always the same."""
        sessions._known.clear()
        self.here, self.there = socket.socketpair()
        with self.here, self.there:
            self.there.sendall(frame(Kind.READY, READY.pack(0, 0, 0, bytes(16)), 0))
            self.there.shutdown(socket.SHUT_WR)
            with contextlib.suppress(MigrationError):
                self.send(self.here, postcopy)
            self.here.close()
            sent = b""
            while part := self.there.recv(1 << 16):
                sent += part
        at = 0
        while sent[at + 5] != Kind.END:
            at += HEADER_BYTES + _HEADER.unpack_from(sent, at)[5]
        return sent[at + HEADER_BYTES :][:32]

    def prepare(self, data: bytes) -> bytes:
        """Make frames of what follows the first byte."""
        super().prepare(data[1:])
        return data

    def read(self, data: bytes) -> object:
        """Send, as a process that has sent nothing before."""
        sessions._known.clear()
        with self.here, self.there:
            return self.send(self.here, data[:1] == b"p")

    def judge(self, data: bytes, answer: object) -> None:
        """Whatever is said, the memory is the source's own."""
        if not (self.memory == np.arange(3 * 4096) % 251).all():
            raise Wrong("the source's memory was written")


class Spoken(Target):
    """A client whose peer has said all it will ever say."""

    refusals: tuple[type[Exception], ...] = (PeerError,)

    def prepare(self, data: bytes) -> bytes:
        """Put everything into a socket."""
        self.here, self.there = socket.socketpair()
        self.there.sendall(data[: 1 << 16])
        self.there.shutdown(socket.SHUT_WR)
        return data


class Nbd(Spoken):
    """`NbdClient`: one read and one request for block status of whatever export the server offers."""

    name = "nbd"
    refusals = (PeerError, OSError)
    most = 1 << 20

    def seeds(self) -> Iterator[bytes]:
        """Yield the whole conversation: negotiation, a read in one piece and in three, block status in two parts."""

        def option(number: int, kind: int, payload: bytes = b"") -> bytes:
            return struct.pack(">QIII", 0x0003E889045565A9, number, kind, len(payload)) + payload

        def chunk(cookie: int, kind: int, payload: bytes, done: bool = True) -> bytes:
            return struct.pack(">IHHQI", 0x668E33EF, done, kind, cookie, len(payload)) + payload

        up = struct.pack(">QQH", 0x4E42444D41474943, 0x49484156454F5054, 3) + option(8, 1)
        up += option(10, 4, struct.pack(">I", 7) + b"base:allocation") + option(10, 1)
        up += option(7, 3, struct.pack(">HIII", 3, 1, 4096, 1 << 20))
        up += option(7, 3, struct.pack(">HQH", 0, 2048, 1 | 1 << 2 | 1 << 7)) + option(7, 1)
        one = chunk(1, 1, struct.pack(">Q", 0) + bytes(range(256)) * 8)
        three = chunk(1, 1, struct.pack(">Q", 1024) + b"b" * 1024, False)
        three += chunk(1, 2, struct.pack(">QI", 512, 512), False)
        three += chunk(1, 1, struct.pack(">Q", 0) + b"a" * 512, False) + chunk(1, 0, b"")
        status = chunk(2, 5, struct.pack(">IIIII", 7, 512, 0, 512, 3)) + chunk(3, 5, struct.pack(">III", 7, 9000, 1))
        flushed = struct.pack(">IIQ", 0x67446698, 0, 4)
        yield up + one + status + flushed
        yield up + three + status + flushed

    def read(self, data: bytes) -> object:
        """Read what there is, ask for its block status, and flush."""
        with self.there, NbdClient(self.here, "x", ["base:allocation"], timeout=10) as client:
            content = client.read(0, min(client.size, self.most))
            extents = client.extents("base:allocation", 0, min(client.size, self.most))
            client.flush()
            return len(content), extents

    def judge(self, data: bytes, answer: object) -> None:
        """Extents lie one behind the other and cover what was asked for."""
        assert isinstance(answer, tuple)
        length, extents = answer
        ends = extents[:, 0] + extents[:, 1]
        whole = int(ends[-1]) if len(extents) else 0
        if whole != length or (len(extents) and (extents[0, 0] or (ends[:-1] != extents[1:, 0]).any())):
            raise Wrong(f"extents of {length} bytes: {extents.tolist()}")


class Monitor(Spoken):
    """`Qmp`: the greeting, one command, one event."""

    name = "qmp"
    refusals = (PeerError, QmpError)

    def seeds(self) -> Iterator[bytes]:
        """Yield a conversation with events in between."""
        version = {"qemu": {"major": 7, "minor": 2, "micro": 22}, "package": ""}
        said: list[dict[str, object]] = [
            {"QMP": {"version": version, "capabilities": ["oob"]}},
            {"return": {}, "id": 1},
            {"event": "STOP", "data": {}},
            {"return": [{"name": "query-status"}], "id": 2},
            {"event": "JOB_STATUS_CHANGE", "data": {"id": "j", "status": "concluded"}},
        ]
        yield b"".join(json.dumps(each).encode() + b"\r\n" for each in said)

    def read(self, data: bytes) -> object:
        """Talk to it."""
        with self.there, Qmp(self.here, timeout=10) as qmp:
            return qmp.execute("query-commands"), qmp.wait("JOB_STATUS_CHANGE")


class Device(Target):
    """`VhostBackend`: messages of a front end with descriptors of every kind, and a queue that a guest fills.

    An input is a list of records, each after a mark: a kind, a number, and a body. The number says which descriptors a
    message carries, two bits each: none, the memory, a log, an eventfd; above 127, so many of the memory. Its version
    and length are made to fit; what is sent raw is sent as it is, and ends the conversation.
    """

    name = "vhost"
    refusals = (PeerError, OSError)
    memory_bytes = 1 << 16
    most_messages = 100
    MARK = b"\xfe\xdc"
    MESSAGE, STORE, RAW = 0, 1, 2

    def seeds(self) -> Iterator[bytes]:
        """Yield a device that is set up, does a request, and one more while its writes are logged."""

        def record(kind: int, number: int, body: bytes) -> bytes:
            return self.MARK + bytes([kind, number]) + body

        def message(request: int, body: bytes = b"", descriptors: int = 0, flags: int = 1) -> bytes:
            return record(self.MESSAGE, descriptors, struct.pack("<III", request, flags, len(body)) + body)

        def store(at: int, data: bytes) -> bytes:
            return record(self.STORE, 0, struct.pack("<H", at) + data)

        table = struct.pack("<II4Q", 1, 0, 0, self.memory_bytes, 1 << 40, 0)
        place = struct.pack("<IIQQQQ", 0, 1, (1 << 40) + 0x1000, (1 << 40) + 0x3000, (1 << 40) + 0x2000, 0x3000)
        up = message(1) + message(15) + message(16, struct.pack("<Q", 0x20B)) + message(3) + message(17)
        up += message(2, struct.pack("<Q", 1 << 30 | 1 << 32)) + message(5, table, 1)
        up += message(8, struct.pack("<II", 0, 8)) + message(10, bytes(8)) + message(9, place)
        up += message(13, bytes(8), 3) + message(12, bytes(8), 3) + message(18, struct.pack("<II", 0, 1), 0, 9)
        chain = struct.pack("<QIHHQIHH", 0x4000, 16, 1, 1, 0x8000, 0x2345, 2, 0)
        ask = store(0x1000, chain) + store(0x2004, bytes(2))
        first, second = store(0x2002, b"\1\0"), store(0x2002, b"\2\0")
        logged = message(6, struct.pack("<QQ", 64, 8), 2) + message(2, struct.pack("<Q", 1 << 26 | 1 << 30 | 1 << 32))
        end = message(24, struct.pack("<III", 0, 4, 0) + bytes(4)) + message(11, bytes(8))
        yield up + ask + first + message(3) + logged + second + message(7, b"", 3) + message(3) + end
        yield up + record(self.RAW, 0, message(4)[4:]) + end

    def prepare(self, data: bytes) -> bytes:
        """Make a guest's memory, and take the input apart."""
        pieces = [each for each in data.split(self.MARK)[: self.most_messages] if len(each) >= 2]
        self.records = [(each[0] % 3, each[1], each[2:]) for each in pieces]
        memory, log = os.memfd_create("guest"), os.memfd_create("log")
        os.ftruncate(memory, self.memory_bytes)
        os.ftruncate(log, 4096)
        self.descriptors = [memory, log, os.eventfd(0)]
        return data

    def read(self, data: bytes) -> object:
        """Say it all to a device that answers every request."""
        here, there = socket.socketpair()
        descriptors, memory = self.descriptors, self.descriptors[0]
        requests = 0
        refused: Exception | None = None

        def device(request: VhostRequest) -> None:
            nonlocal requests
            requests += 1
            request.read()
            request.write(b"x" * request.room)
            marked = backend.log if backend.logging else None
            for address, length in request.writable if marked is not None else ():
                pages = range(address // 4096, -(-(address + length) // 4096)) if length else ()
                if not all(marked.is_dirty(page) for page in pages):
                    raise Wrong(f"{length} bytes at {address} were written, and not marked")

        def step() -> None:
            nonlocal refused
            try:
                backend.step(device, 0)
            except self.refusals as error:
                refused = error  # read to its end; what comes next is another message
            listen()

        def listen() -> None:
            # A socket is ready to be written to while a quarter of its room is taken: some seventy answers.
            here.setblocking(False)
            with contextlib.suppress(OSError):
                here.recv(1 << 16)
            here.settimeout(10)

        try:
            with here, VhostBackend(there, config=b"conf", queues=2, timeout=10) as backend:
                here.settimeout(10)
                with mmap.mmap(memory, self.memory_bytes) as guest:
                    for kind, number, body in self.records:
                        if kind == self.STORE:
                            at, content = int.from_bytes(body[:2], "little"), body[2:]
                            content = content[: self.memory_bytes - at]
                            guest[at : at + len(content)] = content
                            step()
                            continue
                        if kind == self.RAW:
                            here.sendall(body)
                            here.shutdown(socket.SHUT_WR)
                            while backend.step(device, 0):
                                listen()
                            break
                        carried = [descriptors[(number >> shift & 3) - 1] for shift in (0, 2, 4) if number >> shift & 3]
                        if number > 127:
                            carried = [memory] * (number - 127)
                        # Whole: it would wait for the rest of one that is not.
                        request, flags = struct.unpack("<II", body[:8].ljust(8, b"\0"))
                        header = struct.pack("<III", request, flags & ~3 | 1, len(body[12:]))
                        socket.send_fds(here, [header + body[12:]], carried)
                        step()
                        if len(carried) > MAX_REGIONS or len(body) > 12 + MAX_PAYLOAD:
                            break  # refused before its body is read
        finally:
            for each in descriptors:
                os.close(each)
        if refused is not None:
            raise refused
        return requests
