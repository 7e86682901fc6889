"""One virtio device behind a vhost-user connection: the messages of the front end, and when queues are worked on."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Callable

from dirtylog._core import DirtyBitmap
from dirtylog.sources._channel import Channel, PeerError
from dirtylog.sources._ready import ready
from dirtylog.sources._resource import Resource
from dirtylog.sources.vhost import eventfds
from dirtylog.sources.vhost.memory import MAX_REGIONS, GuestMemory
from dirtylog.sources.vhost.queues import Queue, VhostRequest

__all__ = ["MAX_PAYLOAD", "VhostBackend"]

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
MAX_CONFIG = 256
# Seconds between two looks at a queue of which the front end gives no notice.
_LOOK = 0.001
# What a queue may be like, and this back end does not do: indirect descriptors, event indices, an IOMMU, a packed ring,
# data in notifications, a reset of one queue.
_NOT_DONE = sum(1 << bit for bit in (28, 29, 33, 34, 38, 40))
# Descriptors that come with a message, at least and at most; the others carry none.
_CARRIES = {_SET_MEM_TABLE: (1, MAX_REGIONS), _SET_LOG_BASE: (1, 1), _SET_LOG_FD: (0, 1)}
_NO_DESCRIPTOR = 1 << 8


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
        self._protocol = 0
        self._config = config
        self._memory = GuestMemory()
        self._queues = [Queue(number) for number in range(queues)]
        self._closed = False

    def __repr__(self) -> str:
        """Say how much memory the guest has, and whether it migrates."""
        closed, logging = "closed " if self.closed else "", ", logging" if self.logging else ""
        return f"<{closed}VhostBackend: {self._memory.size} bytes{logging}>"

    def fileno(self) -> int:
        """Return the connection's descriptor, to wait for messages."""
        self._check_open()
        return self._channel.fileno()

    @property
    def logging(self) -> bool:
        """Whether writes to guest memory are marked now."""
        return self._memory.logging

    @property
    def log(self) -> DirtyBitmap | None:
        """The front end's log, one bit for 4096 bytes of guest-physical address; None if it gave none."""
        return self._memory.log

    # Guest memory ---------------------------------------------------------------------------------------------------

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
        return self._memory.read(address, length)

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
        self._memory.write(address, data)

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

    def _queue(self, number: int) -> Queue:
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
            self._memory.want(bool(features & _LOG_ALL))
            if not features & _PROTOCOL_FEATURES:
                for queue in self._queues:
                    queue.enabled = True
        elif request == _SET_PROTOCOL_FEATURES:
            (protocol,) = struct.unpack("<Q", body)
            self._check_offered(protocol, offered)
            self._protocol = protocol
        elif request == _SET_MEM_TABLE:
            self._memory.describe(body, descriptors)
        elif request == _SET_LOG_BASE:
            self._memory.take_log(body, descriptors)
            return struct.pack("<Q", 0) if self._protocol & _LOG_SHMFD else None
        elif request == _SET_LOG_FD:
            self._memory.notice = eventfds.taken(self._memory.notice, descriptors)
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
            queue.place(self._memory, table, used, available)
            queue.logged, queue.log_address = bool(flags & 1), log_address
        elif request in (_SET_VRING_KICK, _SET_VRING_CALL, _SET_VRING_ERR):
            (number,) = struct.unpack("<Q", body)
            queue = self._queue(number & 0xFF)
            if request == _SET_VRING_KICK:
                queue.kick = eventfds.taken(queue.kick, descriptors)
                queue.started = True
            elif request == _SET_VRING_CALL:
                queue.call = eventfds.taken(queue.call, descriptors)
        else:
            number, value = struct.unpack("<II", body)
            queue = self._queue(number)
            if request == _SET_VRING_NUM:
                queue.resize(value)
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
        elif any(queue.running and queue.kick < 0 for queue in self._queues):
            timeout = _LOOK if timeout is None else min(timeout, _LOOK)
        found = ready([number, *kicks], timeout)
        for kick in found & kicks:
            eventfds.take_notice(kick)
        if number in found and not self.handle():
            return False
        # A queue that has just been started may have got its notification before.
        for queue in self._queues:
            queue.more = queue.running and queue.work(self._memory, device)
        return True

    def serve(self, device: Callable[[VhostRequest], object]) -> None:
        """Do requests until the front end hangs up; parameters and errors are those of :meth:`step`."""
        while self.step(device):
            pass

    def _release(self) -> None:
        self._channel.close()
        self._memory.close()
        for queue in self._queues:
            queue.close()
