"""A virtio device in Python for a guest of QEMU: the back end of vhost-user, which marks what it writes.

While QEMU migrates a guest it hands the device a log: one bit for 4096 bytes of guest-physical address. Whatever the
device writes into guest memory must be marked there after the store (I3), or the destination runs on old content.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass, field

from dirtylog._core import DirtyBitmap
from dirtylog.sources import _queues
from dirtylog.sources._channel import Channel, PeerError
from dirtylog.sources._ready import ready
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
MAX_CONFIG = 256
# Requests of a queue that are done before the front end is listened to again: a guest can go on for ever.
MAX_AT_ONCE = 64
# Seconds between two looks at a queue of which the front end gives no notice.
_LOOK = 0.001
# What a queue may be like, and this back end does not do: indirect descriptors, event indices, an IOMMU, a packed ring,
# data in notifications, a reset of one queue.
_NOT_DONE = sum(1 << bit for bit in (28, 29, 33, 34, 38, 40))
# Descriptors that come with a message, at least and at most; the others carry none.
_CARRIES = {_SET_MEM_TABLE: (1, MAX_REGIONS), _SET_LOG_BASE: (1, 1), _SET_LOG_FD: (0, 1)}
_NO_DESCRIPTOR = 1 << 8
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
    more: bool = False
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
        Guest-physical address and bytes of each buffer. Together they have no more bytes than the guest has memory.
    written : int
        Bytes that the device says it has written: by default the end of the furthest `write`.
    """

    backend: VhostBackend
    queue: int
    head: int
    readable: list[tuple[int, int]] = field(default_factory=list)
    writable: list[tuple[int, int]] = field(default_factory=list)
    written: int = 0

    @property
    def size(self) -> int:
        """Bytes of the readable buffers together."""
        return sum(length for _, length in self.readable)

    @property
    def room(self) -> int:
        """Bytes of the writable buffers together."""
        return sum(length for _, length in self.writable)

    def read(self, offset: int = 0, length: int | None = None) -> bytes:
        """Read the readable buffers, which count as one, from `offset` on: all, or at most `length` bytes.

        Raises
        ------
        IndexError
            `offset` or `length` is negative.
        """
        if offset < 0 or (length is not None and length < 0):
            raise IndexError(f"{length} bytes at {offset} are read; both must be from 0")
        left = self.size - offset if length is None else length
        parts = []
        for address, size in self.readable:
            count = min(size - offset, left)
            if count > 0:
                parts.append(self.backend.read(address + offset, count))
                left -= count
            offset = max(offset - size, 0)
        return b"".join(parts)

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
    timeout : float, default 60
        Seconds that the front end may take for one message, once it has begun, or to take in an answer.

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
    the guest's memory, descriptors that go in a circle and logs that are too small are refused by `PeerError`, after
    which the connection is of no more use. So that a guest that never pauses keeps nobody waiting, a step does 64
    requests of a queue at most. Whoever *cuts* the file behind the guest's memory ends this process by SIGBUS, as with
    any mapping.

    A queue's indices are loaded and stored in the order that the guest's driver relies on, on every processor: see
    :doc:`/explanation/memory-orders`.

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

    def __init__(
        self,
        connection: socket.socket,
        *,
        features: int = 0,
        config: bytes = b"",
        queues: int = 1,
        timeout: float = 60,
    ) -> None:
        super().__init__()
        if not 1 <= queues <= 256:
            raise ValueError(f"queues is {queues}; a device has 1 to 256")
        if len(config) > MAX_CONFIG:
            raise ValueError(f"config has {len(config)} bytes; vhost-user carries {MAX_CONFIG}")
        if features & _NOT_DONE or not 0 <= features < 1 << 64:
            raise ValueError(
                f"features is {features:#x}; it must have 64 bits, and none of {_NOT_DONE:#x}, kinds of queues that "
                "this back end does not do"
            )
        own = _LOG_ALL | _PROTOCOL_FEATURES | _VERSION_1
        self._channel = Channel(connection, timeout, "the front end")
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
        return self._channel.fileno()

    @property
    def logging(self) -> bool:
        """Whether writes to guest memory are marked now."""
        return self.log is not None and bool(self._features & _LOG_ALL)

    # Guest memory ---------------------------------------------------------------------------------------------------

    def _find(self, address: int, length: int) -> list[tuple[mmap.mmap, int, int]]:
        """Return where guest memory is: the mapping, where in it, how many bytes; in parts where regions meet."""
        parts: list[tuple[mmap.mmap, int, int]] = []
        begin, end = address, address + length
        while begin < end or not parts:
            for region in self._regions:
                at = begin - region.gpa
                if 0 <= at < region.size:
                    count = min(end - begin, region.size - at)
                    parts.append((region.memory, region.offset + at, count))
                    begin += count
                    break
            else:
                raise PeerError(f"{length} bytes at {address:#x} are not in the guest's memory")
        return parts

    def _translated(self, pointer: int, length: int, unit: int) -> int:
        """Turn an address of the front end into the guest's."""
        for region in self._regions:
            at = pointer - region.uva
            if at >= 0 and at + length <= region.size:
                if (region.offset + at) % unit:
                    raise PeerError(f"a queue has a part at {pointer:#x}, which is not a multiple of {unit}")
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
        return b"".join(memory[at : at + count] for memory, at, count in self._find(address, length))

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
        # I3: after the store, with a full barrier behind the marks.
        if length and self.log is not None:
            first = address // LOG_PAGE
            try:
                self.log.mark_range(first, (address + length - 1) // LOG_PAGE - first + 1)
            except IndexError as error:
                raise PeerError(f"the log is smaller than the guest: {error}") from error
            if self._log_notice >= 0:
                self._notify(self._log_notice)

    # Messages -------------------------------------------------------------------------------------------------------

    def handle(self) -> bool:
        """Wait for a message of the front end, read it and answer it.

        Returns
        -------
        bool
            False if the front end has hung up.

        Raises
        ------
        PeerError
            The message is none, or says what cannot be.
        OSError
            The connection failed, or the rest of a message did not come in time (`TimeoutError`).
        """
        self._check_open()
        header, descriptors = self._channel.first(12, MAX_REGIONS)
        try:
            if not header:
                return False
            with self._channel.exchange():
                self._exchange(header + self._channel.exactly(12 - len(header)), descriptors)
            return True
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    def _exchange(self, header: bytes, descriptors: list[int]) -> None:
        """Do what a message asks, and answer it."""
        request, flags, length = struct.unpack("<III", header)
        if flags & 3 != _VERSION or length > MAX_PAYLOAD:
            raise PeerError(f"the front end sent message {request} with flags {flags:#x} and {length} bytes")
        body = self._channel.exactly(length)
        try:
            least, most = _CARRIES.get(request, (0, 0))
            if request in (_SET_VRING_KICK, _SET_VRING_CALL, _SET_VRING_ERR):
                least = most = 0 if struct.unpack("<Q", body)[0] & _NO_DESCRIPTOR else 1
            if not least <= len(descriptors) <= most:
                raise PeerError(
                    f"the front end sent {len(descriptors)} descriptors with message {request}, which carries "
                    + (f"{least} to {most}" if least < most else str(least))
                )
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

    def _reply(self, request: int, answer: bytes) -> None:
        self._channel.send(struct.pack("<III", request, _VERSION | _REPLY, len(answer)) + answer)

    def _queue(self, number: int) -> _Queue:
        if number >= len(self._queues):
            raise PeerError(f"the front end speaks of queue {number}; the device has {len(self._queues)}")
        return self._queues[number]

    def _act(self, request: int, body: bytes, descriptors: list[int]) -> bytes | None:
        """Do what a message asks; what it takes over of the descriptors it removes from the list."""
        offered = _LOG_SHMFD | _REPLY_ACK | (_CONFIG if self._config else 0) | (_MQ if len(self._queues) > 1 else 0)
        if request in (_GET_FEATURES, _GET_PROTOCOL_FEATURES, _GET_QUEUE_NUM):
            answers = {_GET_FEATURES: self._offered, _GET_PROTOCOL_FEATURES: offered}
            return struct.pack("<Q", answers.get(request, len(self._queues)))
        if request == _SET_FEATURES:
            (features,) = struct.unpack("<Q", body)
            self._check_offered(features, self._offered)
            if features & _LOG_ALL and self.log is not None:
                self._check_log(self.log.npages, self._regions)
            self._features = features
            if not self._features & _PROTOCOL_FEATURES:
                for queue in self._queues:
                    queue.enabled = True
        elif request == _SET_PROTOCOL_FEATURES:
            (protocol,) = struct.unpack("<Q", body)
            self._check_offered(protocol, offered)
            self._protocol = protocol
        elif request == _SET_MEM_TABLE:
            self._set_memory(body, descriptors)
        elif request == _SET_LOG_BASE:
            self._set_log(body, descriptors)
            return struct.pack("<Q", 0) if self._protocol & _LOG_SHMFD else None
        elif request == _SET_LOG_FD:
            self._log_notice = self._taken(self._log_notice, descriptors)
        elif request in (_GET_CONFIG, _SET_CONFIG):
            offset, size, flags = struct.unpack("<III", body[:12])
            if size > MAX_CONFIG or offset > MAX_CONFIG:
                raise PeerError(
                    f"the front end speaks of {size} bytes of configuration at {offset}; {MAX_CONFIG} exist"
                )
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
                self._translated(table, 16 * queue.num, 16),
                self._translated(used, 6 + 8 * queue.num, 4),
                self._translated(available, 6 + 2 * queue.num, 2),
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
    def _check_offered(features: int, offered: int) -> None:
        if features & ~offered:
            raise PeerError(f"the front end accepts the features {features & ~offered:#x}, which were not offered")

    @staticmethod
    def _check_log(npages: int, regions: list[_Region]) -> None:
        guest = max((region.gpa + region.size for region in regions), default=0)
        if npages * LOG_PAGE < guest:
            raise PeerError(f"the log has {npages} pages and is smaller than the guest, which ends at {guest:#x}")

    @staticmethod
    def _taken(old: int, descriptors: list[int]) -> int:
        """Take over the eventfd of a message in the place of another one; none is -1."""
        if descriptors:
            what = os.readlink(f"/proc/self/fd/{descriptors[0]}")
            if what != "anon_inode:[eventfd]":
                # A file or a pipe could keep us waiting, whatever is asked of it.
                raise PeerError(f"the front end sent {what} to be notified by; an eventfd is needed")
            # Also for the front end, which shares it: a notice that nobody has taken yet is a notice.
            os.set_blocking(descriptors[0], False)
        new = descriptors.pop(0) if descriptors else -1
        if old >= 0:
            os.close(old)
        return new

    @staticmethod
    def _notify(eventfd: int) -> None:
        with contextlib.suppress(BlockingIOError):  # its counter is full: whoever waits has been told
            os.eventfd_write(eventfd, 1)

    def _set_memory(self, body: bytes, descriptors: list[int]) -> None:
        (count,) = struct.unpack("<I", body[:4])
        if len(body) < 8 + 32 * count or len(descriptors) != count:
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
            if self.logging and self.log is not None:
                self._check_log(self.log.npages, regions)
        except BaseException:
            for region in regions:
                region.memory.close()
            raise
        before, self._regions = self._regions, regions
        for region in before:
            region.memory.close()

    def _set_log(self, body: bytes, descriptors: list[int]) -> None:
        size, offset = struct.unpack("<QQ", body)
        if not size or size % 8 or offset % 8:
            raise PeerError(f"the log has {size} bytes at {offset}; both must be multiples of 8")
        self._check_log(size * 8, self._regions)
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
        number = self.fileno()
        kicks = {queue.kick for queue in self._queues if queue.kick >= 0}
        if any(queue.more for queue in self._queues):
            timeout = 0
        elif any(queue.started and queue.enabled and queue.kick < 0 for queue in self._queues):
            timeout = _LOOK if timeout is None else min(timeout, _LOOK)
        found = ready([number, *kicks], timeout)
        for kick in found & kicks:
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(kick)
        if number in found and not self.handle():
            return False
        # A queue that has just been started may have got its notification before.
        for place, queue in enumerate(self._queues):
            queue.more = queue.started and queue.enabled and self._work(place, queue, device)
        return True

    def serve(self, device: Callable[[VhostRequest], object]) -> None:
        """Do requests until the front end hangs up; parameters and errors are those of :meth:`step`."""
        while self.step(device):
            pass

    def _work(self, number: int, queue: _Queue, device: Callable[[VhostRequest], object]) -> bool:
        """Do the requests of a queue, and say whether there are more: a guest may go on for ever."""
        done, left = False, MAX_AT_ONCE
        while waiting := self._index(queue.available + 2) - queue.position & 0xFFFF:
            if waiting > queue.num:
                raise PeerError(f"the guest's queue {number} holds more than its {queue.num} entries")
            if not left:
                break
            left -= 1
            head = self._index(queue.available + 4 + 2 * (queue.position % queue.num))
            request = self._request(number, queue, head)
            device(request)
            used = self._index(queue.used + 2)
            # The buffers, and the entry, before the index that makes them valid; the marks behind all of them (I3).
            self._store(queue.used + 4 + 8 * (used % queue.num), struct.pack("<II", head, request.written))
            self._publish(queue.used + 2, used + 1 & 0xFFFF)
            if queue.logged and self.logging:
                self._mark(queue.log_address, 6 + 8 * queue.num)
            queue.position = queue.position + 1 & 0xFFFF
            done = True
        if done:
            # The driver stores its wish for notices and then looks at the used index; we the other way round.
            _queues.fence()
            if queue.call >= 0 and not self._index(queue.available) & _NO_NOTICE:
                self._notify(queue.call)
        return waiting > 0

    def _place(self, address: int) -> tuple[mmap.mmap, int]:
        memory, at, count = self._find(address, 2)[0]
        if count < 2 or at % 2:  # the memory was described anew, the queue was not
            raise PeerError(f"a queue's index is at {address:#x}, where the guest's memory has none that is whole")
        return memory, at

    def _index(self, address: int) -> int:
        return _queues.index(*self._place(address))

    def _publish(self, address: int, value: int) -> None:
        _queues.publish(*self._place(address), value)

    def _store(self, address: int, data: bytes) -> None:
        """Write guest memory, and mark nothing."""
        done = 0
        for memory, at, count in self._find(address, len(data)):
            memory[at : at + count] = data[done : done + count]
            done += count

    def _request(self, number: int, queue: _Queue, head: int) -> VhostRequest:
        request = VhostRequest(self, number, head)
        at, room = head, sum(region.size for region in self._regions)
        for _ in range(queue.num):
            if at >= queue.num:
                raise PeerError(f"the guest's queue {number} names descriptor {at} of {queue.num}")
            address, length, flags, following = _DESCRIPTOR.unpack(self.read(queue.descriptors + 16 * at, 16))
            if flags & _INDIRECT:
                raise PeerError("the guest uses indirect descriptors, which were not offered")
            if request.writable and not flags & _WRITE:
                raise PeerError(f"the guest's queue {number} has a buffer to read behind one to write")
            self._find(address, length)
            room -= length
            if room < 0:
                raise PeerError(f"the guest's queue {number} has a request of more bytes than the guest has memory")
            (request.writable if flags & _WRITE else request.readable).append((address, length))
            if not flags & _NEXT:
                return request
            at = following
        raise PeerError(f"the guest's queue {number} has descriptors that go in a circle")

    def _release(self) -> None:
        self._channel.close()
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
