"""Targets: what comes from a socket: a migration, the answers of an NBD server, of a QMP monitor."""

import json
import socket
import struct
import zlib
from collections.abc import Iterator

import numpy as np

from dirtylog.sinks.migrate import MigrationError, receive, sessions
from dirtylog.sinks.migrate.payloads import HELLO, PAGES, RAW, ROUND, ZSTD
from dirtylog.sinks.migrate.wire import HEADER_BYTES, VERSION, Kind
from dirtylog.sources.qemu import NbdClient, PeerError, Qmp, QmpError
from fuzz.target import Target, Wrong

__all__ = ["Migration", "Monitor", "Nbd"]

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
                (Kind.HELLO, HELLO.pack(bytes(16), nbytes, 512, codec, 0)),
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
        payloads[0] = (Kind.HELLO, HELLO.pack(bytes(16), nbytes, 512, codec, len(layout)))
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
