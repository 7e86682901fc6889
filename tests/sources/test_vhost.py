"""vhost-user both ways: QEMU's own back end marks our log; our back end marks the log of a QEMU that migrates."""

import mmap
import os
import select
import socket
import struct
import subprocess
import threading

import numpy as np
import pytest

import dirtylog as dl
from dirtylog.sources.qemu import PeerError, Qmp
from dirtylog.sources.vhost import VhostBackend

from ..qemu import ENVIRONMENT, emulated, listening, program

MEMORY = 4 << 20
UVA = 0x7F00_0000_0000
N, DESCRIPTORS, AVAILABLE, USED, HEADER, STATUS = 16, 0x1000, 0x2000, 0x3000, 0x4000, 0x5000
LOG_ALL, PROTOCOL, V1 = 1 << 26, 1 << 30, 1 << 32


def readable(file, seconds):
    poll = select.poll()
    poll.register(file, select.POLLIN)
    return bool(poll.poll(seconds * 1000))


class FrontEnd:
    """What QEMU is: the owner of a guest's memory, which hands it, a queue and a log to a device."""

    def __init__(self, connection):
        self.connection = connection
        self.descriptor = os.memfd_create("guest")
        os.ftruncate(self.descriptor, MEMORY)
        self.memory = mmap.mmap(self.descriptor, MEMORY)
        self.kick, self.call = os.eventfd(0), os.eventfd(0)
        self.log = dl.SharedLog.create(nbytes=MEMORY)
        self.count = 0

    def send(self, request, payload=b"", descriptors=(), flags=1):
        data = struct.pack("<III", request, flags, len(payload)) + payload
        socket.send_fds(self.connection, [data], list(descriptors))

    def ask(self, request, payload=b"", descriptors=(), flags=1):
        self.send(request, payload, descriptors, flags)
        return self.answer(request)

    def answered(self):
        return readable(self.connection, 0)

    def answer(self, request):
        got, flags, length = struct.unpack("<III", self.connection.recv(12, socket.MSG_WAITALL))
        assert (got, flags) == (request, 5)
        return self.connection.recv(length, socket.MSG_WAITALL) if length else b""

    def place(self, logged):
        where = (UVA + DESCRIPTORS, UVA + USED, UVA + AVAILABLE, USED)
        self.send(9, struct.pack("<IIQQQQ", 0, logged, *where))

    def describe(self):
        return [
            (16, struct.pack("<Q", 1 << 1 | 1 << 3), []),
            (2, struct.pack("<Q", V1 | PROTOCOL), []),
            (5, struct.pack("<II4Q", 1, 0, 0, MEMORY, UVA, 0), [self.descriptor]),
            (8, struct.pack("<II", 0, N), []),
            (10, struct.pack("<II", 0, 0), []),
            (9, struct.pack("<IIQQQQ", 0, 0, UVA + DESCRIPTORS, UVA + USED, UVA + AVAILABLE, USED), []),
            (13, struct.pack("<Q", 0), [self.call]),
            (12, struct.pack("<Q", 0), [self.kick]),
            (18, struct.pack("<II", 0, 1), []),
        ]

    def migrate(self):
        """Hand over the log, as a migration begins."""
        size = 8 * -(-self.log.npages // 64)
        self.send(6, struct.pack("<QQ", size, 0), [self.log.fileno()])

    def put(self, sector, segments):
        """Put a request of virtio-blk into the queue: read from `sector` on into the segments."""
        self.memory[HEADER : HEADER + 16] = struct.pack("<IIQ", 0, 0, sector)
        buffers = [(HEADER, 16, 1), *((address, length, 3) for address, length in segments), (STATUS, 1, 2)]
        for i, (address, length, flags) in enumerate(buffers):
            at = DESCRIPTORS + 16 * i
            self.memory[at : at + 16] = struct.pack("<QIHH", address, length, flags, i + 1)
        self.memory[STATUS] = 0xFF
        at = AVAILABLE + 4 + 2 * (self.count % N)
        self.memory[at : at + 2] = struct.pack("<H", 0)
        self.count += 1
        self.memory[AVAILABLE + 2 : AVAILABLE + 4] = struct.pack("<H", self.count & 0xFFFF)
        os.eventfd_write(self.kick, 1)

    def done(self):
        """Wait for the device's notice; one may come before there is anything to tell."""
        while struct.unpack("<H", self.memory[USED + 2 : USED + 4])[0] != self.count & 0xFFFF:
            assert readable(self.call, 60)  # libvhost-user makes it non-blocking, for both ends
            os.eventfd_read(self.call)
        assert self.memory[STATUS] == 0

    def close(self):
        self.connection.close()
        self.log.close()
        self.memory.close()
        for descriptor in (self.descriptor, self.kick, self.call):
            os.close(descriptor)


def pages_of(segments):
    return {page for at, length in segments for page in range(at >> 12, (at + length - 1 >> 12) + 1)}


def test_the_back_end_of_qemu_marks_our_log_exactly(tmp_path):
    chance = np.random.default_rng(0)
    disk = chance.integers(0, 256, 1 << 20, dtype="u1")
    disk.tofile(tmp_path / "raw")
    with listening(tmp_path / "v") as server:
        command = [
            program("qemu-storage-daemon"), "--blockdev", f"driver=file,node-name=d,filename={tmp_path / 'raw'}",
            "--export", f"type=vhost-user-blk,id=v,node-name=d,addr.type=fd,addr.str={server.fileno()}",
        ]  # fmt: skip
        process = subprocess.Popen(command, pass_fds=[server.fileno()], env=ENVIRONMENT)
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(str(tmp_path / "v"))
    front = FrontEnd(connection)
    try:
        (features,) = struct.unpack("<Q", front.ask(1))
        assert features & LOG_ALL
        front.send(3)
        assert struct.unpack("<Q", front.ask(15))[0] & 1 << 1
        for request, payload, descriptors in front.describe():
            front.send(request, struct.pack("<Q", 2) if request == 16 else payload, descriptors)
        front.put(0, [(1 << 20, 8192)])
        front.done()
        assert not front.log.harvest()
        front.migrate()
        front.answer(6)
        front.send(2, struct.pack("<Q", V1 | PROTOCOL | LOG_ALL))
        front.place(logged=1)
        for _ in range(300):
            segments = []
            for begin in ((0x10000, 0x100000), (0x100000, 0x3F0000)):
                length = int(chance.integers(1, 65)) * 512
                segments.append((int(chance.integers(*begin)) - 0x8000, length))
            sector = int(chance.integers(0, 1900))
            front.put(sector, segments)
            front.done()
            got = b"".join(front.memory[at : at + length] for at, length in segments)
            assert got == disk[sector * 512 : sector * 512 + len(got)].tobytes()
            assert set(front.log.harvest()) == pages_of(segments) | {USED >> 12, STATUS >> 12}
    finally:
        front.close()
        process.terminate()
        process.wait()


# Our back end ---------------------------------------------------------------------------------------------------------


def block(request):
    """A disk whose sectors hold their own number; 3 of the header's bytes say what is asked."""
    kind, _, sector = struct.unpack("<IIQ", request.read())
    assert kind == 0
    request.write(struct.pack("<I", sector) * ((request.room - 1) // 4))
    request.write(b"\0", request.room - 1)


@pytest.fixture
def pair():
    ours, theirs = socket.socketpair()
    front = FrontEnd(ours)
    with VhostBackend(theirs) as backend:
        yield front, backend
    front.close()


def set_up(pair):
    front, backend = pair
    for message in front.describe():
        front.send(*message)
        assert backend.handle()
    return front, backend


@pytest.fixture
def up(pair):
    """A device that is set up."""
    return set_up(pair)


def test_our_back_end_writes_and_marks_what_it_wrote_exactly(up):
    front, backend = up
    chance = np.random.default_rng(1)
    front.put(7, [(0x10000, 512)])
    backend.step(block)
    front.done()
    assert (backend.logging, front.log.count()) == (False, 0)
    front.migrate()
    backend.handle()
    assert struct.unpack("<Q", front.answer(6)) == (0,)
    assert not backend.logging
    front.send(2, struct.pack("<Q", V1 | PROTOCOL | LOG_ALL))
    backend.handle()
    front.place(logged=1)
    backend.handle()
    assert backend.logging
    for sector in range(40):
        length = int(chance.integers(1, 30)) * 512
        segments = [(int(chance.integers(0x10000, MEMORY - 0x10000)), length)]
        front.put(sector, segments)
        backend.step(block)
        front.done()
        at = segments[0][0]
        assert front.memory[at : at + length] == struct.pack("<I", sector) * (length // 4)
        assert set(front.log.harvest()) == pages_of(segments) | {USED >> 12, STATUS >> 12}
    assert struct.unpack("<II", front_base(front, backend)) == (0, 41)
    front.put(0, [(0x10000, 512)])
    backend.step(block, timeout=0)  # stopped
    assert front.log.count() == 0
    front.connection.close()
    assert backend.step(block) is False


def front_base(front, backend):
    front.send(11, struct.pack("<II", 0, 0))
    backend.handle()
    return front.answer(11)


def test_what_a_device_answers_about_itself(pair):
    front, _ = pair
    other, theirs = socket.socketpair()
    with VhostBackend(theirs, features=1 << 9, config=b"abc", queues=2) as backend, other:
        front.connection, old = other, front.connection
        old.close()
        for request, expected in ((1, 1 << 9 | LOG_ALL | PROTOCOL | V1), (15, 1 | 2 | 8 | 512), (17, 2)):
            front.send(request)
            backend.handle()
            assert struct.unpack("<Q", front.answer(request)) == (expected,)
        front.send(24, struct.pack("<III", 1, 4, 0) + bytes(4))
        backend.handle()
        assert front.answer(24) == struct.pack("<III", 1, 4, 0) + b"bc\0\0"
        assert "0 bytes" in repr(backend)
        front.send(16, struct.pack("<Q", 8))
        backend.handle()
        front.send(18, struct.pack("<II", 1, 1), flags=1 | 8)
        backend.handle()
        assert front.answer(18) == bytes(8)
        front.send(18, struct.pack("<II", 5, 1), flags=1 | 8)
        with pytest.raises(PeerError, match="queue 5; the device has 2"):
            backend.handle()
        assert front.answer(18) == struct.pack("<Q", 1)
    with pytest.raises(ValueError, match="closed"):
        backend.handle()
    with pytest.raises(ValueError, match="queues is 0"):
        VhostBackend(other, queues=0)


def table(*regions):
    return struct.pack("<II", len(regions), 0) + b"".join(struct.pack("<4Q", *region) for region in regions)


@pytest.mark.parametrize(
    ("request_", "payload", "descriptors", "why"),
    [
        (5, table((0, MEMORY + 1, UVA, 0)), 1, "is not in its file"),
        (5, table((0, MEMORY, UVA, 4096)), 1, "is not in its file"),
        (5, table((0, 0, UVA, 0)), 1, "a region of 0 bytes"),
        (5, table((0, 8192, UVA, 0), (4096, 8192, UVA, 0)), 2, "overlaps"),
        (5, table((0, 8192, UVA, 0)), 0, "0 descriptors with message 5, which carries 1 to 8"),
        (5, table((0, 8192, UVA, 0)), 2, "regions in 40 bytes, and 2 descriptors"),
        (5, table(((1 << 64) - 4096, 8192, UVA, 0)), 1, "is not in its file"),
        (5, b"\xff\xff\xff\xff" * 2, 1, "regions in 8 bytes"),
        (6, struct.pack("<QQ", 8, 0), 1, "smaller than the guest"),
        (6, struct.pack("<QQ", 1 << 40, 0), 1, "is not in its file"),
        (6, struct.pack("<QQ", 1 << 16, 0), 0, "0 descriptors with message 6, which carries 1"),
        (6, struct.pack("<QQ", 0, 0), 1, "both must be multiples of 8"),
        (6, struct.pack("<QQ", 1 << 16, 4), 1, "both must be multiples of 8"),
        (2, struct.pack("<Q", V1 | PROTOCOL | 1 << 34), 0, "were not offered"),
        (16, struct.pack("<Q", 1 << 5), 0, "were not offered"),
        (3, b"", 1, "1 descriptors with message 3, which carries 0"),
        (6, b"short", 1, "cannot be"),
        (8, struct.pack("<II", 0, 3), 0, "a power of two"),
        (8, struct.pack("<II", 0, 1 << 20), 0, "a power of two"),
        (8, struct.pack("<II", 9, 4), 0, "queue 9"),
        (9, struct.pack("<IIQQQQ", 0, 0, 5, UVA, UVA, 0), 0, "not in the guest's memory"),
        (9, struct.pack("<IIQQQQ", 0, 0, UVA + 8, UVA, UVA, 0), 0, "is not a multiple of 16"),
        (12, struct.pack("<Q", 0), 0, "0 descriptors with message 12, which carries 1"),
        (12, struct.pack("<Q", 0), 1, "memfd:guest .deleted. to be notified by; an eventfd is needed"),
        (13, struct.pack("<Q", 256), 1, "1 descriptors with message 13, which carries 0"),
        (24, struct.pack("<III", 0, 1 << 32 - 1, 0), 0, "bytes of configuration"),
        (77, b"", 0, "of a feature that was not offered"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_message_that_cannot_be_is_refused_before_anything_has_changed(up, request_, payload, descriptors, why):
    front, backend = up
    before = len(os.listdir("/proc/self/fd"))
    front.send(request_, payload, [front.descriptor] * descriptors)
    with pytest.raises(PeerError, match=why):
        backend.handle()
    assert len(os.listdir("/proc/self/fd")) == before
    front.put(3, [(0x10000, 512)])
    backend.step(block)
    front.done()


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (struct.pack("<III", 1, 0, 0), "flags 0x0"),
        (struct.pack("<III", 5, 1, 1 << 20), "1048576 bytes"),
        (b"abc", "hung up"),
        (struct.pack("<III", 5, 1, 8) + b"x", "hung up"),
    ],
)
def test_what_is_no_message_is_refused(pair, data, why):
    front, backend = pair
    front.connection.sendall(data)
    front.connection.shutdown(socket.SHUT_WR)
    with pytest.raises(PeerError, match=why):
        backend.handle()


@pytest.mark.parametrize(
    ("descriptors", "why"),
    [
        ([(HEADER, 16, 1, 0)], "in a circle"),
        ([(HEADER, 16, 1, 99)], "descriptor 99 of 16"),
        ([(MEMORY - 4, 16, 0, 0)], "not in the guest's memory"),
        ([(HEADER, 16, 4, 0)], "indirect"),
        ([(HEADER, 16, 3, 1), (HEADER, 16, 0, 0)], "to read behind one to write"),
        ([(0, MEMORY, 1, 1), (0, MEMORY, 2, 0)], "more bytes than the guest has memory"),
    ],
)
def test_a_queue_that_cannot_be_is_refused(up, descriptors, why):
    front, backend = up
    front.put(0, [])
    for i, each in enumerate(descriptors):
        front.memory[DESCRIPTORS + 16 * i : DESCRIPTORS + 16 * i + 16] = struct.pack("<QIHH", *each)
    with pytest.raises(PeerError, match=why):
        backend.step(block)
    front.memory[AVAILABLE + 2 : AVAILABLE + 4] = struct.pack("<H", 500)
    with pytest.raises(PeerError, match="more than its 16 entries"):
        backend.step(block, timeout=0)


def test_a_guest_that_never_pauses_keeps_no_message_waiting(up):
    front, backend = up
    front.put(0, [(0x10000, 512)])

    def next_one(request):
        block(request)
        if front.count == 1:
            front.send(11, struct.pack("<II", 0, 0))
        if front.count < 10_000:  # as fast as it is done, there is another one
            front.put(0, [(0x10000, 512)])

    while not front.answered():
        assert backend.step(next_one, timeout=60)
    assert struct.unpack("<II", front.answer(11))[1] == front.count - 1 < 1000


def test_more_descriptors_than_a_message_carries_are_refused_and_none_is_kept(up):
    front, backend = up
    before = len(os.listdir("/proc/self/fd"))
    front.send(5, table((0, 8192, UVA, 0)), [front.descriptor] * 9)
    with pytest.raises(PeerError, match="more descriptors than the 8 that a message may carry"):
        backend.handle()
    assert len(os.listdir("/proc/self/fd")) == before


def test_notices_that_nobody_takes_make_nobody_wait(up):
    front, backend = up
    os.eventfd_write(front.call, (1 << 64) - 2)  # as many as it holds: one more would wait for a reader
    front.put(0, [(0x10000, 512)])
    backend.step(block)
    assert front.memory[STATUS] == 0


def test_a_queue_without_notices_is_looked_at_again_and_again(up):
    front, backend = up
    front.send(12, struct.pack("<Q", 256))
    backend.step(block)
    front.put(5, [(0x10000, 512)])
    while front.memory[STATUS]:
        assert backend.step(block, timeout=60)


def test_a_front_end_that_stops_in_the_middle_of_a_message_is_not_waited_for_for_ever():
    ours, theirs = socket.socketpair()
    with ours, VhostBackend(theirs, timeout=0.01) as backend:
        ours.sendall(struct.pack("<III", 5, 1, 40))
        with pytest.raises(TimeoutError, match="the front end did not answer in time"):
            backend.handle()


def test_guest_memory_in_two_files_is_one_where_they_meet(pair):
    front, backend = pair
    half = MEMORY // 2
    body = table((0, half, UVA, 0), (half, half, UVA + half, half))
    for request, payload, descriptors in front.describe():
        both = request == 5
        front.send(request, body if both else payload, [front.descriptor] * 2 if both else descriptors)
        backend.handle()
    front.migrate()
    backend.handle()
    front.answer(6)
    front.send(2, struct.pack("<Q", V1 | PROTOCOL | LOG_ALL))
    backend.handle()
    front.put(9, [(half - 512, 1024)])
    backend.step(block)
    front.done()
    assert front.memory[half - 512 : half + 512] == struct.pack("<I", 9) * 256
    assert set(front.log.harvest()) >= {(half >> 12) - 1, half >> 12}
    with pytest.raises(PeerError, match="not in the guest's memory"):
        backend.read(MEMORY - 10, 20)
    # The queue stays where it was, and half of an index is no index.
    split = AVAILABLE + 3
    front.send(5, table((0, split, UVA, 0), (split, half, UVA + split, split)), [front.descriptor] * 2)
    backend.handle()
    front.put(0, [(0x10000, 512)])
    with pytest.raises(PeerError, match="none that is whole"):
        backend.step(block)


def test_memory_that_the_log_does_not_cover_is_refused_while_it_is_written(up):
    front, backend = up
    front.migrate()
    backend.handle()
    front.answer(6)
    larger = table((1 << 30, 8192, UVA, 0))
    front.send(5, larger, [front.descriptor])
    backend.handle()  # nobody marks
    front.send(2, struct.pack("<Q", V1 | PROTOCOL | LOG_ALL))
    with pytest.raises(PeerError, match="smaller than the guest"):
        backend.handle()
    assert not backend.logging
    front.send(5, table((0, MEMORY, UVA, 0)), [front.descriptor])
    backend.handle()
    front.send(2, struct.pack("<Q", V1 | PROTOCOL | LOG_ALL))
    backend.handle()
    front.send(5, larger, [front.descriptor])
    with pytest.raises(PeerError, match="smaller than the guest"):
        backend.handle()
    assert backend.logging


def test_a_request_is_read_in_parts(up):
    front, backend = up
    seen = []

    def device(request):
        seen.extend(
            [request.size, request.read(), request.read(4, 6), request.read(14), request.read(20), request.room]
        )
        with pytest.raises(IndexError, match="-1 bytes at 0"):
            request.read(0, -1)
        request.write(b"\0", request.room - 1)

    front.put(77, [(0x10000, 512)])
    for i, (at, length) in enumerate(((HEADER, 7), (HEADER + 7, 9))):
        front.memory[DESCRIPTORS + 16 * i : DESCRIPTORS + 16 * i + 16] = struct.pack("<QIHH", at, length, 1, i + 1)
    front.memory[DESCRIPTORS + 32 : DESCRIPTORS + 48] = struct.pack("<QIHH", STATUS, 1, 2, 0)
    backend.step(device)
    whole = struct.pack("<IIQ", 0, 0, 77)
    assert seen == [16, whole, whole[4:10], whole[14:], b"", 1]


def test_what_our_queues_are_not_is_not_offered(pair):
    front, _ = pair
    for bit in (28, 29, 33, 34, 38, 40, 64):
        with pytest.raises(ValueError, match="kinds of queues that this back end does not do"):
            VhostBackend(front.connection, features=1 << bit)


def test_the_back_end_of_a_program_with_many_open_files(many_open, pair):
    test_our_back_end_writes_and_marks_what_it_wrote_exactly(set_up(pair))


def test_a_device_that_writes_more_than_the_guest_gave_is_refused(up):
    front, backend = up

    def greedy(request):
        request.write(b"x" * 514)

    front.put(0, [(0x10000, 512)])
    with pytest.raises(IndexError, match="bytes 0 to 514 are written; the guest gave 513"):
        backend.step(greedy)
    assert front.memory[0x10000:0x10010] == bytes(16)


# A guest that migrates ------------------------------------------------------------------------------------------------

RAM = 16 << 20
SECTORS = 4096
# Pages that the guest loads, one after the other, from 64 KiB on; bytes of the first pass in which half of them are.
LOADED = 112
PART = 256 << 10
# A boot sector that reads one sector after the other from its disk into memory, page after page, for ever.
BOOT = (
    bytes.fromhex(
        "fa31c08ed88ed0bc0070fb88164b7cb042e6e9b4428a164b7cbe4c7ccd13722566ff06547c668126547cff070000a1527c0500013d00807203b8"
        "0010a3527cb02ee6e9ebceb021e6e9ebc8001000010000000010010000000000"
    ).ljust(510, b"\0")
    + b"\x55\xaa"
)


class Disk:
    """A virtio-blk disk, whose sectors are different each time they are read."""

    def __init__(self):
        self.reads = 0
        self._read = threading.Condition()

    def wait(self, reads):
        with self._read:
            return self._read.wait_for(lambda: self.reads >= reads, 60)

    def __call__(self, request):
        kind, _, sector = struct.unpack("<IIQ", request.read()[:16])
        if kind == 0:
            room = request.room - 1
            content = BOOT if sector == 0 else struct.pack("<II", self.reads, sector) * (room // 8)
            request.write(content[:room].ljust(room, b"\0"))
            with self._read:
                self.reads += 1
                self._read.notify_all()
        request.write(b"\0", request.room - 1)


def ram_of(stream):
    """The final content of the guest's RAM in a migration stream of QEMU."""
    at = 0

    def take(count):
        nonlocal at
        at += count
        assert at <= len(stream), f"the stream ends at {len(stream)}, in the middle"
        return stream[at - count : at]

    def number(size):
        return int.from_bytes(take(size), "big")

    assert (number(4), number(4)) == (0x5145564D, 3)
    ram, block, ram_id = {}, None, None
    while True:
        kind = number(1)
        if kind == 7:  # configuration
            take(number(4))
            continue
        if kind == 8:  # command
            number(2)
            take(number(2))
            continue
        if kind == 0x7E:  # footer
            number(4)
            continue
        if kind not in (1, 2, 3, 4):
            return ram
        section = number(4)
        if kind in (1, 4):
            name = take(number(1)).decode()
            take(8)
            if kind == 4 and name != "ram":
                return ram  # the state of devices follows
            assert name == "ram", name
            ram_id = section
        assert section == ram_id
        while True:
            head = number(8)
            flags, address = head & 0xFFF, head & ~0xFFF
            if flags & 4:
                while address:
                    name = take(number(1)).decode()
                    size = number(8)
                    ram[name] = bytearray(size)
                    address -= size
                continue
            if flags & 0x10:
                break
            if flags & 0xA and not flags & 0x20:
                block = take(number(1)).decode()
            if flags & 2:
                ram[block][address : address + 4096] = take(1) * 4096
            elif flags & 8:
                ram[block][address : address + 4096] = take(4096)


def migrated(qmp, server, disk):
    """Migrate; return the final content of the RAM.

    The destination reads a part of the first pass, and then nothing until the device has written over every page of
    that part: QEMU waits to send, and the guest runs on. From then on it only reads: QEMU sends the last pages with its
    big lock held, so whoever gave a command meanwhile would wait for QEMU, and QEMU for the destination.
    """
    qmp.execute("migrate-set-parameters", {"max-bandwidth": 1 << 40, "downtime-limit": 2000})
    qmp.execute("migrate", {"uri": f"unix:{server.getsockname()}"})
    with server.accept()[0] as connection:
        parts = [connection.recv(PART, socket.MSG_WAITALL)]
        assert disk.wait(disk.reads + LOADED + 1)
        while part := connection.recv(1 << 20):
            parts.append(part)
    qmp.wait("MIGRATION", lambda data: data["status"] == "completed")
    return ram_of(b"".join(parts))


def test_a_guest_of_qemu_migrates_with_what_our_device_wrote_and_without_marks_it_does_not(tmp_path):
    config = struct.pack("<QIIHBBI", SECTORS, 0, 1, 0, 0, 0, 512).ljust(60, b"\0")
    disk, failures = Disk(), []
    options = [
        "-machine", "pc,memory-backend=m", "-object", "memory-backend-memfd,id=m,size=16M,share=on",
        "-chardev", f"socket,id=c,path={tmp_path / 'disk'}",
        "-device", "vhost-user-blk-pci,chardev=c,num-queues=1,queue-size=16,bootindex=0",
    ]  # fmt: skip

    def serve():
        try:
            backend.serve(disk)
        except Exception as error:
            failures.append(error)

    with (
        listening(tmp_path / "disk") as device,
        listening(tmp_path / "stream") as stream,
        emulated(tmp_path / "qmp", *options) as process,
    ):
        for server in (device, stream):
            server.settimeout(60)
        with VhostBackend(device.accept()[0], config=config) as backend:
            thread = threading.Thread(target=serve)
            thread.start()
            try:
                with Qmp(tmp_path / "qmp") as qmp:  # which answers when the device has
                    assert disk.wait(LOADED), failures
                    qmp.execute("migrate-set-capabilities", {"capabilities": [{"capability": "events", "state": True}]})
                    stale = []
                    for marked in (False, True):
                        if not marked:
                            backend._memory.mark = lambda *_: None
                        else:
                            del backend._memory.mark
                        sent = migrated(qmp, stream, disk)
                        live = backend.read(0, RAM)
                        (content,) = [each for each in sent.values() if len(each) == RAM]
                        pages = [i for i in range(0, RAM, 4096) if live[i : i + 4096] != content[i : i + 4096]]
                        stale.append(len(pages))
                        if not marked:
                            qmp.execute("cont")
                            assert disk.wait(disk.reads + 1), failures
                    assert stale[0] > 0
                    assert stale[1] == 0
            finally:
                process.kill()  # which the device takes for the end
                thread.join(60)
    assert not failures
