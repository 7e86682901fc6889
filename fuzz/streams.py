"""Target: what a migration's destination reads from its socket."""

import socket
import struct
import zlib
from collections.abc import Iterator

import numpy as np

from dirtylog.sinks.migrate import MigrationError, receive
from dirtylog.sinks.migrate.payloads import HELLO, PAGES, RAW, ROUND, ZSTD
from dirtylog.sinks.migrate.wire import HEADER_BYTES, VERSION, Kind
from fuzz.target import Target, Wrong

__all__ = ["Migration"]

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
        """Receive into new memory."""
        with self.here, self.there:
            return receive(self.here, limit=LIMIT, state=lambda state: None)

    def judge(self, data: bytes, answer: object) -> None:
        """What is complete is within the limit."""
        arrays = answer.values() if isinstance(answer, dict) else [answer]
        if sum(memoryview(each).nbytes for each in arrays) > LIMIT:
            raise Wrong("more memory was made than the limit allows")
