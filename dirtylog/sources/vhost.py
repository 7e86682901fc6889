"""A virtio device in Python for a guest of QEMU: the back end of vhost-user, which marks what it writes.

While QEMU migrates a guest it hands the device a log: one bit for 4096 bytes of guest-physical address. Whatever the
device writes into guest memory must be marked there after the store (I3), or the destination runs on old content.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import select
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass, field

from dirtylog._core import DirtyBitmap
from dirtylog.sources._channel import PeerError
from dirtylog.sources._resource import Resource

__all__ = ["VhostBackend", "VhostRequest"]

LOG_PAGE = 4096
_VERSION, _REPLY, _NEED_REPLY = 1, 1 << 2, 1 << 3
# Feature bits that are the transport's own.
_LOG_ALL, _PROTOCOL_FEATURES, _VERSION_1 = 1 << 26, 1 << 30, 1 << 32
# Protocol features: more queues than one, a log by descriptor, replies on request, a device's configuration space.
_MQ, _LOG_SHMFD, _REPLY_ACK, _CONFIG = 1 << 0, 1 << 1, 1 << 3, 1 << 9

(_GET_FEATURES, _SET_FEATURES, _SET_OWNER, _RESET_OWNER, _SET_MEM_TABLE, _SET_LOG_BASE, _SET_LOG_FD, _SET_VRING_NUM,
 _SET_VRING_ADDR, _SET_VRING_BASE, _GET_VRING_BASE, _SET_VRING_KICK, _SET_VRING_CALL, _SET_VRING_ERR,
 _GET_PROTOCOL_FEATURES, _SET_PROTOCOL_FEATURES, _GET_QUEUE_NUM, _SET_VRING_ENABLE) = range(1, 19)  # fmt: skip
_GET_CONFIG, _SET_CONFIG = 24, 25

MAX_PAYLOAD = 4096
MAX_REGIONS = 8
MAX_QUEUE = 32768
_DESCRIPTOR = struct.Struct("<QIHH")
_NEXT, _WRITE, _INDIRECT = 1, 2, 4
_NO_NOTICE = 1


@dataclass(frozen=True, slots=True)
class _Region:
    """Guest memory behind one descriptor."""

    gpa: int
    size: int
    uva: int
    memory: mmap.mmap
    offset: int


@dataclass(slots=True)
class _Queue:
    """A split virtqueue, as the front end has described it so far."""

    num: int = 0
    logged: bool = False
    descriptors: int = 0
    used: int = 0
    available: int = 0
    log_address: int = 0
    position: int = 0
    started: bool = False
    enabled: bool = False
    kick: int = -1
    call: int = -1


@dataclass(slots=True)
class VhostRequest:
    """What the guest has put into a queue: buffers to read, then buffers to write.

    Attributes
    ----------
    queue : int
        The queue's number.
    readable, writable : list of (int, int)
        Guest-physical address and bytes of each buffer.
    written : int
        Bytes that the device says it has written: by default the end of the furthest `write`.
    """

    backend: VhostBackend
    queue: int
    head: int
    readable: list[tuple[int, int]] = field(default_factory=list)
    writable: list[tuple[int, int]] = field(default_factory=list)
    written: int = 0

    def read(self) -> bytes:
        """Return the content of the readable buffers, one behind the other."""
        return b"".join(self.backend.read(address, length) for address, length in self.readable)

    @property
    def room(self) -> int:
        """Bytes of the writable buffers together."""
        return sum(length for _, length in self.writable)

    def write(self, data: bytes, offset: int = 0) -> None:
        """Write into the writable buffers, which count as one, from `offset` on; marked where there is a log.

        Raises
        ------
        IndexError
            There is not so much room; nothing is written.
        """
        if offset < 0 or offset + len(data) > self.room:
            raise IndexError(f"bytes {offset} to {offset + len(data)} are written; the guest gave {self.room}")
        self.written = max(self.written, offset + len(data))
        for address, length in self.writable:
            if offset < length and data:
                part = data[: length - offset]
                self.backend.write(address + offset, part)
                data = data[len(part) :]
                offset = 0
            else:
                offset = max(offset - length, 0)


class VhostBackend(Resource):
    """One virtio device, behind a vhost-user connection that a VMM has made.

    Parameters
    ----------
    connection : socket
        A connected Unix stream socket, which the back end takes over. QEMU connects to what
        ``-chardev socket,path=...`` names, so the device listens and accepts.
    features : int, default 0
        The device's own feature bits (``VIRTIO_BLK_F_...``, ``VIRTIO_NET_F_...``).
    config : bytes, default b""
        The device's configuration space.
    queues : int, default 1
        How many queues it has.

    Attributes
    ----------
    logging : bool
        Whether writes are marked now: the front end migrates.
    log : DirtyBitmap or None
        The front end's log, one bit for 4096 bytes of guest-physical address.

    Notes
    -----
    Not thread-safe: one thread calls :meth:`step` or :meth:`serve`, and `read` and `write` from within the device's
    function. So every mark is set before the message that ends a migration is answered.

    Split queues with direct descriptors. Messages and queues are checked before they are believed: what lies outside of
    the guest's memory, descriptors that go in a circle and logs that are too small are refused by `PeerError`.

    On processors that reorder stores more than x86 does, the notifications order what the guest sees.

    References
    ----------
    `docs/interop/vhost-user.rst` of QEMU; "Split Virtqueues" in the virtio specification.

    Examples
    --------
    ::

        def disk(request):
            kind, _, sector = struct.unpack("<IIQ", request.read()[:16])
            request.write(content_of(sector, request.room - 1))
            request.write(b"\\0", request.room - 1)  # the status byte

        listener.bind("/run/disk.vhost")
        with VhostBackend(listener.accept()[0], config=capacity) as backend:
            backend.serve(disk)
    """

    __module__ = "dirtylog.sources.vhost"

    def __init__(self, connection: socket.socket, *, features: int = 0, config: bytes = b"", queues: int = 1) -> None:
        super().__init__()
        if not 1 <= queues <= 256:
            raise ValueError(f"queues is {queues}; a device has 1 to 256")
        if len(config) > 256:
            raise ValueError(f"config has {len(config)} bytes; vhost-user carries 256")
        own = _LOG_ALL | _PROTOCOL_FEATURES | _VERSION_1
        self._connection = connection
        self._offered = features | own
        self._features = 0
        self._protocol = 0
        self._config = config
        self._regions: list[_Region] = []
        self._queues = [_Queue() for _ in range(queues)]
        self.log: DirtyBitmap | None = None
        self._log_memory: mmap.mmap | None = None
        self._log_notice = -1
        self._closed = False

    def __repr__(self) -> str:
        """Say how much memory the guest has, and whether it migrates."""
        size = sum(region.size for region in self._regions)
        return f"<{'closed ' if self.closed else ''}VhostBackend: {size} bytes{', logging' if self.logging else ''}>"

    def fileno(self) -> int:
        """Return the connection's descriptor, to wait for messages."""
        self._check_open()
        return self._connection.fileno()

    @property
    def logging(self) -> bool:
        """Whether writes to guest memory are marked now."""
        return self.log is not None and bool(self._features & _LOG_ALL)

    # Guest memory ---------------------------------------------------------------------------------------------------

    def _find(self, address: int, length: int) -> tuple[mmap.mmap, int]:
        for region in self._regions:
            at = address - region.gpa
            if at >= 0 and at + length <= region.size:
                return region.memory, region.offset + at
        raise PeerError(f"{length} bytes at {address:#x} are not in the guest's memory")

    def _translated(self, pointer: int, length: int) -> int:
        """Turn an address of the front end into the guest's."""
        for region in self._regions:
            at = pointer - region.uva
            if at >= 0 and at + length <= region.size:
                return region.gpa + at
        raise PeerError(f"a queue lies at {pointer:#x}, which is not in the guest's memory")

    def read(self, address: int, length: int) -> bytes:
        """Read guest memory.

        Parameters
        ----------
        address : int
            Guest-physical, in bytes.
        length : int
            Bytes.

        Raises
        ------
        PeerError
            The guest has no such memory.
        """
        memory, at = self._find(address, length)
        return memory[at : at + length]

    def write(self, address: int, data: bytes) -> None:
        """Write guest memory, and mark its pages where the front end logs.

        Parameters
        ----------
        address : int
            Guest-physical, in bytes.
        data : bytes
            What to write.

        Raises
        ------
        PeerError
            The guest has no such memory; or its log is smaller than the guest.
        """
        self._store(address, data)
        if self.logging:
            self._mark(address, len(data))

    def _mark(self, address: int, length: int) -> None:
        # I3: after the store. The mark is an atomic OR with a full barrier.
        if length and self.log is not None:
            first = address // LOG_PAGE
            try:
                self.log.mark_range(first, (address + length - 1) // LOG_PAGE - first + 1)
            except IndexError as error:
                raise PeerError(f"the log is smaller than the guest: {error}") from error
            if self._log_notice >= 0:
                os.eventfd_write(self._log_notice, 1)

    # Messages -------------------------------------------------------------------------------------------------------

    def handle(self) -> bool:
        """Read one message of the front end and answer it.

        Returns
        -------
        bool
            False if the front end has hung up.

        Raises
        ------
        PeerError
            The message is none, or says what cannot be.
        OSError
            The connection failed.
        """
        self._check_open()
        header, descriptors, _, _ = socket.recv_fds(self._connection, 12, MAX_REGIONS)
        try:
            if not header:
                return False
            while len(header) < 12:
                header += self._received(12 - len(header))
            request, flags, length = struct.unpack("<III", header)
            if flags & 3 != _VERSION or length > MAX_PAYLOAD:
                raise PeerError(f"the front end sent message {request} with flags {flags:#x} and {length} bytes")
            body = b""
            while len(body) < length:
                body += self._received(length - len(body))
            try:
                answer = self._act(request, body, descriptors)
            except (PeerError, OSError, struct.error, ValueError) as error:
                if flags & _NEED_REPLY and self._protocol & _REPLY_ACK:
                    self._reply(request, struct.pack("<Q", 1))
                if isinstance(error, PeerError):
                    raise
                raise PeerError(f"the front end sent a message {request} that cannot be: {error}") from error
            if answer is not None:
                self._reply(request, answer)
            elif flags & _NEED_REPLY and self._protocol & _REPLY_ACK:
                self._reply(request, struct.pack("<Q", 0))
            return True
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    def _received(self, most: int) -> bytes:
        data = self._connection.recv(most)
        if not data:
            raise PeerError("the front end hung up in the middle of a message")
        return data

    def _reply(self, request: int, answer: bytes) -> None:
        self._connection.sendall(struct.pack("<III", request, _VERSION | _REPLY, len(answer)) + answer)

    def _queue(self, number: int) -> _Queue:
        if number >= len(self._queues):
            raise PeerError(f"the front end speaks of queue {number}; the device has {len(self._queues)}")
        return self._queues[number]

    def _act(self, request: int, body: bytes, descriptors: list[int]) -> bytes | None:
        """Do what a message asks; what it takes over of the descriptors it removes from the list."""
        if request in (_GET_FEATURES, _GET_PROTOCOL_FEATURES, _GET_QUEUE_NUM):
            offered = _LOG_SHMFD | _REPLY_ACK | (_CONFIG if self._config else 0)
            offered |= _MQ if len(self._queues) > 1 else 0
            answers = {_GET_FEATURES: self._offered, _GET_PROTOCOL_FEATURES: offered}
            return struct.pack("<Q", answers.get(request, len(self._queues)))
        if request == _SET_FEATURES:
            (self._features,) = struct.unpack("<Q", body)
            if not self._features & _PROTOCOL_FEATURES:
                for queue in self._queues:
                    queue.enabled = True
        elif request == _SET_PROTOCOL_FEATURES:
            (self._protocol,) = struct.unpack("<Q", body)
        elif request == _SET_MEM_TABLE:
            self._set_memory(body, descriptors)
        elif request == _SET_LOG_BASE:
            self._set_log(body, descriptors)
            return struct.pack("<Q", 0) if self._protocol & _LOG_SHMFD else None
        elif request == _SET_LOG_FD:
            self._log_notice = self._taken(self._log_notice, descriptors)
        elif request in (_GET_CONFIG, _SET_CONFIG):
            offset, size, flags = struct.unpack("<III", body[:12])
            if request == _GET_CONFIG:
                part = self._config[offset : offset + size].ljust(size, b"\0")
                return struct.pack("<III", offset, size, flags) + part
        elif _SET_VRING_NUM <= request <= _SET_VRING_ERR or request == _SET_VRING_ENABLE:
            return self._act_on_queue(request, body, descriptors)
        elif request not in (_SET_OWNER, _RESET_OWNER):
            raise PeerError(f"the front end sent message {request}, of a feature that was not offered")
        return None

    def _act_on_queue(self, request: int, body: bytes, descriptors: list[int]) -> bytes | None:
        if request == _SET_VRING_ADDR:
            number, flags, table, used, available, log_address = struct.unpack("<IIQQQQ", body)
            queue = self._queue(number)
            if not queue.num:
                raise PeerError(f"the front end places queue {number} before it says its size")
            places = (
                self._translated(table, 16 * queue.num),
                self._translated(used, 6 + 8 * queue.num),
                self._translated(available, 6 + 2 * queue.num),
            )
            queue.descriptors, queue.used, queue.available = places
            queue.logged, queue.log_address = bool(flags & 1), log_address
        elif request in (_SET_VRING_KICK, _SET_VRING_CALL, _SET_VRING_ERR):
            (number,) = struct.unpack("<Q", body)
            queue = self._queue(number & 0xFF)
            if request == _SET_VRING_KICK:
                queue.kick = self._taken(queue.kick, descriptors)
                queue.started = True
            elif request == _SET_VRING_CALL:
                queue.call = self._taken(queue.call, descriptors)
        else:
            number, value = struct.unpack("<II", body)
            queue = self._queue(number)
            if request == _SET_VRING_NUM:
                if not 1 <= value <= MAX_QUEUE or value & (value - 1):
                    raise PeerError(
                        f"queue {number} shall have {value} entries; a power of two to {MAX_QUEUE} is needed"
                    )
                queue.num = value
            elif request == _SET_VRING_BASE:
                queue.position = value & 0xFFFF
            elif request == _SET_VRING_ENABLE:
                queue.enabled = value != 0
            else:
                queue.started = False
                return struct.pack("<II", number, queue.position)
        return None

    @staticmethod
    def _taken(old: int, descriptors: list[int]) -> int:
        """Take over the descriptor of a message in the place of another one; none is -1."""
        new = descriptors.pop(0) if descriptors else -1
        if old >= 0:
            os.close(old)
        return new

    def _set_memory(self, body: bytes, descriptors: list[int]) -> None:
        (count,) = struct.unpack("<I", body[:4])
        if not 1 <= count <= MAX_REGIONS or len(body) < 8 + 32 * count or len(descriptors) != count:
            raise PeerError(
                f"the front end sent {count} regions in {len(body)} bytes, and {len(descriptors)} descriptors"
            )
        regions: list[_Region] = []
        try:
            for number, descriptor in enumerate(descriptors):
                gpa, size, uva, offset = struct.unpack_from("<4Q", body, 8 + 32 * number)
                # A page behind the end of the file would be SIGBUS, not an error.
                if not size or offset + size > os.fstat(descriptor).st_size or gpa + size > 1 << 64:
                    raise PeerError(f"a region of {size} bytes at {offset} is not in its file")
                if any(gpa < other.gpa + other.size and other.gpa < gpa + size for other in regions):
                    raise PeerError(f"the region at {gpa:#x} overlaps another one")
                regions.append(_Region(gpa, size, uva, mmap.mmap(descriptor, offset + size), offset))
        except BaseException:
            for region in regions:
                region.memory.close()
            raise
        before, self._regions = self._regions, regions
        for region in before:
            region.memory.close()

    def _set_log(self, body: bytes, descriptors: list[int]) -> None:
        size, offset = struct.unpack("<QQ", body)
        if not descriptors:
            raise PeerError("the front end sent a log without a descriptor; it needs the protocol feature LOG_SHMFD")
        guest = max((region.gpa + region.size for region in self._regions), default=0)
        if size % 8 or size * 8 * LOG_PAGE < guest:
            raise PeerError(f"the log has {size} bytes and is smaller than the guest, which ends at {guest:#x}")
        if offset + size > os.fstat(descriptors[0]).st_size:
            raise PeerError(f"a log of {size} bytes at {offset} is not in its file")
        memory = mmap.mmap(descriptors[0], offset + size)
        view = memoryview(memory)[offset:]
        self._drop_log()
        self.log = DirtyBitmap.from_buffer(view, size * 8, LOG_PAGE)
        self._log_memory = memory

    def _drop_log(self) -> None:
        memory, self._log_memory, self.log = self._log_memory, None, None
        with contextlib.suppress(BufferError):  # whoever holds the bitmap still: then it goes with it
            if memory is not None:
                memory.close()

    # Queues ---------------------------------------------------------------------------------------------------------

    def step(self, device: Callable[[VhostRequest], object], timeout: float | None = None) -> bool:
        """Wait for a message or a notification, and do what it asks.

        Parameters
        ----------
        device : callable
            Does one request: reads it, and writes the answer.
        timeout : float, optional
            Seconds to wait at most; for ever by default.

        Returns
        -------
        bool
            False if the front end has hung up.

        Raises
        ------
        PeerError, OSError, ValueError
            As for :meth:`handle`; the guest's queue is broken; or the back end is closed.
        """
        kicks = {queue.kick: queue for queue in self._queues if queue.kick >= 0}
        ready, _, _ = select.select([self.fileno(), *kicks], [], [], timeout)
        for descriptor in ready:
            if descriptor in kicks:
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(descriptor)
        if self.fileno() in ready and not self.handle():
            return False
        # A queue that has just been started may have got its notification before.
        for number, queue in enumerate(self._queues):
            if queue.started and queue.enabled:
                self._work(number, queue, device)
        return True

    def serve(self, device: Callable[[VhostRequest], object]) -> None:
        """Do requests until the front end hangs up; parameters and errors are those of :meth:`step`."""
        while self.step(device):
            pass

    def _work(self, number: int, queue: _Queue, device: Callable[[VhostRequest], object]) -> None:
        done = False
        while queue.position != self._short(queue.available + 2):
            if self._short(queue.available + 2) - queue.position & 0xFFFF > queue.num:
                raise PeerError(f"the guest's queue {number} holds more than its {queue.num} entries")
            head = self._short(queue.available + 4 + 2 * (queue.position % queue.num))
            request = self._request(number, queue, head)
            device(request)
            used = self._short(queue.used + 2)
            # The entry before the index that makes it valid; the marks behind both (I3).
            self._store(queue.used + 4 + 8 * (used % queue.num), struct.pack("<II", head, request.written))
            self._store(queue.used + 2, struct.pack("<H", used + 1 & 0xFFFF))
            if queue.logged and self.logging:
                self._mark(queue.log_address, 6 + 8 * queue.num)
            queue.position = queue.position + 1 & 0xFFFF
            done = True
        if done and queue.call >= 0 and not self._short(queue.available) & _NO_NOTICE:
            os.eventfd_write(queue.call, 1)

    def _short(self, address: int) -> int:
        return int.from_bytes(self.read(address, 2), "little")

    def _store(self, address: int, data: bytes) -> None:
        memory, at = self._find(address, len(data))
        memory[at : at + len(data)] = data

    def _request(self, number: int, queue: _Queue, head: int) -> VhostRequest:
        request = VhostRequest(self, number, head)
        at = head
        for _ in range(queue.num):
            if at >= queue.num:
                raise PeerError(f"the guest's queue {number} names descriptor {at} of {queue.num}")
            address, length, flags, following = _DESCRIPTOR.unpack(self.read(queue.descriptors + 16 * at, 16))
            if flags & _INDIRECT:
                raise PeerError("the guest uses indirect descriptors, which were not offered")
            if request.writable and not flags & _WRITE:
                raise PeerError(f"the guest's queue {number} has a buffer to read behind one to write")
            self._find(address, length)
            (request.writable if flags & _WRITE else request.readable).append((address, length))
            if not flags & _NEXT:
                return request
            at = following
        raise PeerError(f"the guest's queue {number} has descriptors that go in a circle")

    def _release(self) -> None:
        self._connection.close()
        self._drop_log()
        for region in self._regions:
            region.memory.close()
        self._regions = []
        for queue in self._queues:
            for descriptor in (queue.kick, queue.call):
                if descriptor >= 0:
                    os.close(descriptor)
            queue.kick = queue.call = -1
        if self._log_notice >= 0:
            os.close(self._log_notice)
            self._log_notice = -1
