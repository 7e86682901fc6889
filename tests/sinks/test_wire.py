"""What a receiver reads from a socket: nothing is believed, nothing is larger than its bound, nothing hangs."""

import socket
import struct
import zlib

import numpy as np
import pytest
import zstandard

from dirtylog.sinks.migrate import MigrationError, receive
from dirtylog.sinks.migrate.payloads import HELLO, PAGES, ROUND
from dirtylog.sinks.migrate.wire import MAX_EXTENTS, MAX_PAYLOAD, Channel, Kind, WireError

NBYTES = 16 * 4096 - 100


@pytest.fixture
def pair():
    here, there = socket.socketpair()
    with here, there:
        here.settimeout(30)
        there.settimeout(30)
        yield here, there


def frame(kind, payload=b"", *, magic=b"dlog", version=3, zero=0, sequence=0, length=None, crc=None):
    header = struct.pack("<4sBBHIQ", magic, version, kind, zero, sequence, len(payload) if length is None else length)
    return header + struct.pack("<I", zlib.crc32(payload, zlib.crc32(header)) if crc is None else crc) + payload


def test_a_frame_arrives_as_it_was_sent(pair):
    here, there = map(Channel, pair)
    for payload in (b"", b"x" * 100, bytes(90_000)):
        for part in (payload[:50_000], payload[50_000:]):
            here.send(Kind.PAGES, part[:30], part[30:])
            kind, received = there.receive(Kind.PAGES)
            assert (kind, received) == (Kind.PAGES, part)
    assert here.digest() == there.digest()
    assert here.bytes_sent == there.bytes_received


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "ended in the middle"),
        (frame(5)[:10], "ended in the middle"),
        (frame(5, b"x" * 8)[:-1], "ended in the middle"),
        (frame(5, magic=b"HTTP"), "another protocol"),
        (frame(5, version=1), "version 1"),
        (frame(0), "kind 0"),
        (frame(99), "kind 99"),
        (frame(5, zero=1), "flags 0x1"),
        (frame(5, length=9), "announces 9 bytes; at most 8"),
        (frame(3, length=MAX_PAYLOAD + 1), "at most"),
        (frame(3, length=(1 << 64) - 1), "at most"),
        (frame(5, sequence=1), "frame 1 arrived where 0 was due"),
        (frame(5, crc=0), "does not match its checksum"),
        (frame(1), "HELLO frame where ROUND was due"),
        (frame(8, b"no \x1b[31m room"), r"the peer refused: no \?\[31m room"),
        (frame(8, b"\xff\xfe"), "the peer refused"),
    ],
)
def test_a_frame_that_cannot_be_right_is_refused(pair, raw, message):
    pair[0].sendall(raw)
    pair[0].shutdown(socket.SHUT_WR)
    with pytest.raises(WireError, match=message):
        Channel(pair[1]).receive(Kind.ROUND)


def test_any_flipped_bit_of_a_frame_is_found():
    good = frame(5, b"12345678")
    for bit in range(8 * len(good)):
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        here, there = socket.socketpair()
        with here, there:
            here.sendall(bad)
            here.shutdown(socket.SHUT_WR)
            with pytest.raises(WireError):
                Channel(there).receive(Kind.ROUND)


def test_a_frame_larger_than_its_kind_allows_is_not_sent(pair):
    with pytest.raises(ValueError, match="at most 8"):
        Channel(pair[0]).send(Kind.ROUND, b"123456789")


def test_a_peer_that_does_not_read_is_not_waited_for_and_the_timeout_stays_the_callers(pair):
    here, _ = pair
    here.settimeout(0.01)
    with pytest.raises(TimeoutError):  # noqa: PT012
        while True:
            Channel(here).send(Kind.PAGES, bytes(MAX_PAYLOAD))
    Channel(here).refuse("no")
    assert here.gettimeout() == 0.01
    here.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        here.send(b"")
    Channel(here).refuse("no")


class Dripping(socket.socket):
    """A socket that takes a byte at a time, each after a second of its clock."""

    def __init__(self, sock):
        super().__init__(fileno=sock.detach())
        self.settimeout(30)
        self.now = 0

    def send(self, data):
        self.now += 1
        return super().send(data[:1])

    def sendall(self, data):
        # As an SSLSocket does: each write has the whole timeout.
        for at in range(len(data)):
            self.send(data[at:])


def test_a_frame_of_which_a_byte_goes_now_and_then_is_bounded_as_a_whole():
    here, there = socket.socketpair()
    with there, Dripping(here) as sock:
        channel = Channel(sock, clock=lambda: sock.now)
        with pytest.raises(TimeoutError, match="timed out sending a frame: 30 s is over"):
            channel.send(Kind.PAGES, bytes(100))
        assert sock.now == 30
        # Nothing that follows a part of a frame could be understood.
        channel.refuse("the source gave up")
        assert len(there.recv(100)) == 30
        assert there.recv(100) == b""


# ---- what is in the frames ------------------------------------------------------------------------------------------


def hello(nbytes=NBYTES, page_size=4096, codec=0):
    return frame(Kind.HELLO, HELLO.pack(bytes(16), nbytes, page_size, codec, 0, 0, 0))


def pages(extents, data, codec=0, count=None, sequence=2):
    table = struct.pack(f"<{2 * len(extents)}q", *(n for extent in extents for n in extent))
    count = len(extents) if count is None else count
    return frame(Kind.PAGES, PAGES.pack(count, codec) + table + data, sequence=sequence)


def zeros(extents, sequence=2):
    table = struct.pack(f"<{2 * len(extents)}q", *(n for extent in extents for n in extent))
    return frame(Kind.ZEROS, table, sequence=sequence)


BEGIN = hello(codec=1) + frame(Kind.ROUND, ROUND.pack(1), sequence=1)
DATA = bytes(range(256)) * 16
BOMB = zstandard.ZstdCompressor().compress(bytes(1 << 26))


@pytest.mark.parametrize(
    "raw",
    [
        frame(Kind.HELLO),
        hello(0),
        hello((1 << 64) - 1),
        hello(page_size=0),
        hello(page_size=3000),
        hello(page_size=256),
        hello(page_size=1 << 40),
        hello(codec=2),
        hello(NBYTES + 1),
        frame(Kind.END, b""),
        BEGIN[:-8],
        hello() + frame(Kind.ROUND, ROUND.pack(2), sequence=1),
        hello() + frame(Kind.ROUND, b"", sequence=1),
        hello() + hello(),
        BEGIN + frame(Kind.END, bytes(32), sequence=2),
        BEGIN + frame(Kind.DONE, bytes(32), sequence=2),
        BEGIN + frame(Kind.PAGES, b"", sequence=2),
        BEGIN + frame(Kind.PAGES, bytes(8), sequence=2),
        BEGIN + pages([(0, 4096)], DATA, count=2),
        BEGIN + pages([(0, 4096)], DATA, count=(1 << 32) - 1),
        BEGIN + pages([(0, 4096)], DATA, codec=7),
        BEGIN + pages([(0, 4096)], DATA[:-1]),
        BEGIN + pages([(0, 4096)], DATA + b"x"),
        BEGIN + pages([(-4096, 4096)], DATA),
        BEGIN + pages([(1, 4096)], DATA),
        BEGIN + pages([(0, 4095)], DATA[:-1]),
        BEGIN + pages([(0, 0)], b""),
        BEGIN + pages([(0, -4096)], b""),
        BEGIN + pages([(15 * 4096, 4096)], DATA),
        BEGIN + pages([(1 << 62, 4096)], DATA),
        BEGIN + pages([((1 << 63) - 1, (1 << 63) - 1)], DATA),
        BEGIN + pages([(0, (1 << 63) - 1)], DATA),
        BEGIN + pages([(0, 4096), (0, 4096)], DATA * 2),
        BEGIN + pages([(4096, 4096), (0, 4096)], DATA * 2),
        BEGIN + pages([(0, 8192), (4096, 4096)], DATA * 3),
        BEGIN + pages([(0, 4096)], b"not zstd", codec=1),
        BEGIN + pages([(0, 4096)], BOMB, codec=1),
        BEGIN + pages([(0, 4096)], zstandard.ZstdCompressor().compress(DATA + b"x"), codec=1),
        BEGIN + pages([(0, 4096)], zstandard.ZstdCompressor().compress(DATA[:-1]), codec=1),
        BEGIN + zeros([]),
        BEGIN + zeros([(4096, (1 << 63) - 4096), (8192, 8192)]),
        BEGIN + zeros([(NBYTES, 1)]),
        BEGIN + frame(Kind.ZEROS, bytes(17), sequence=2),
        BEGIN + frame(Kind.ZEROS, length=16 * MAX_EXTENTS + 1, sequence=2),
        BEGIN + pages([(0, 4096)], DATA) + frame(Kind.END, bytes(32), sequence=3),
    ],
)
def test_a_sender_that_lies_is_refused_and_writes_nothing(pair, raw):
    here, there = pair
    here.sendall(raw)
    here.shutdown(socket.SHUT_WR)
    out = np.full(NBYTES, 7, np.uint8)
    with pytest.raises(MigrationError):
        receive(there, out=out)
    assert (out[4096:] == 7).all()
    assert (out[:4096] == 7).all() or raw.startswith(BEGIN + pages([(0, 4096)], DATA))


def test_the_liar_can_tell_the_truth(pair):
    # The test above would be worth nothing if its frames were refused for another reason.
    here, there = pair
    sender = Channel(here)
    sender.send(Kind.HELLO, HELLO.pack(bytes(16), NBYTES, 4096, 1, 0, 0, 0))
    sender.send(Kind.ROUND, ROUND.pack(1))
    table = struct.pack("<4q", 0, 4096, 8192, 4096)
    sender.send(Kind.PAGES, PAGES.pack(2, 1), table, zstandard.ZstdCompressor().compress(DATA * 2))
    sender.send(Kind.PAGES, PAGES.pack(1, 0), struct.pack("<2q", 4096, 4096), DATA)
    sender.send(Kind.ZEROS, struct.pack("<2q", 12288, NBYTES - 12288))
    sender.send(Kind.END, sender.digest())
    sender.send(Kind.RUN, bytes(16))
    out = np.full(NBYTES, 7, np.uint8)
    assert receive(there, out=out) is out
    assert out[: 3 * 4096].tobytes() == DATA * 3
    assert not out[3 * 4096 :].any()


@pytest.mark.parametrize(("byte", "value"), [(34, 2), (35, 1)])
def test_a_sender_that_announces_what_nobody_knows_is_refused(pair, byte, value):
    here, there = pair
    said = bytearray(HELLO.pack(bytes(16), NBYTES, 4096, 0, 0, 0, 0))
    said[byte] = value
    Channel(here).send(Kind.HELLO, said)
    with pytest.raises(MigrationError, match="announces something that this side does not know"):
        receive(there, postcopy=True)


def test_an_end_before_every_page_has_come_is_refused(pair):
    here, there = pair
    sender = Channel(here)
    sender.send(Kind.HELLO, HELLO.pack(bytes(16), NBYTES, 4096, 0, 0, 0, 0))
    sender.send(Kind.ROUND, ROUND.pack(1))
    sender.send(Kind.ZEROS, struct.pack("<2q", 4096, NBYTES - 4096))
    sender.send(Kind.END, sender.digest())
    with pytest.raises(MigrationError, match="1 pages never came"):
        receive(there)


def test_a_wrong_digest_at_the_end_is_refused(pair):
    here, there = pair
    sender = Channel(here)
    sender.send(Kind.HELLO, HELLO.pack(bytes(16), NBYTES, 4096, 0, 0, 0, 0))
    sender.send(Kind.ROUND, ROUND.pack(1))
    sender.send(Kind.ZEROS, struct.pack("<2q", 0, NBYTES))
    sender.send(Kind.END, bytes(32))
    with pytest.raises(MigrationError, match="digest differs"):
        receive(there)
