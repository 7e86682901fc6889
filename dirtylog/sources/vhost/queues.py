"""Split virtqueues as a guest's driver fills them: requests out of one, answers into it."""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable
from dataclasses import dataclass, field

from dirtylog.sources._channel import PeerError
from dirtylog.sources.vhost import _queues, eventfds
from dirtylog.sources.vhost.memory import GuestMemory

__all__ = ["Queue", "VhostRequest"]

MAX_QUEUE = 32768
# Requests of a queue that are done before the front end is listened to again: a guest can go on for ever.
MAX_AT_ONCE = 64
_DESCRIPTOR = struct.Struct("<QIHH")
_NEXT, _WRITE, _INDIRECT = 1, 2, 4
_NO_NOTICE = 1


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

    memory: GuestMemory
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
                parts.append(self.memory.read(address + offset, count))
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
                self.memory.write(address + offset, part)
                data = data[len(part) :]
                offset = 0
            else:
                offset = max(offset - length, 0)


@dataclass(slots=True)
class Queue:
    """A split virtqueue, as the front end has described it so far."""

    number: int
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

    @property
    def running(self) -> bool:
        """Whether its requests may be done."""
        return self.started and self.enabled

    def place(self, memory: GuestMemory, table: int, used: int, available: int) -> None:
        """Lie where the front end says, in addresses of its own."""
        if not self.num:
            raise PeerError(f"the front end places queue {self.number} before it says its size")
        places = (
            memory.translated(table, 16 * self.num, 16),
            memory.translated(used, 6 + 8 * self.num, 4),
            memory.translated(available, 6 + 2 * self.num, 2),
        )
        self.descriptors, self.used, self.available = places

    def resize(self, num: int) -> None:
        """Have so many entries."""
        if not 1 <= num <= MAX_QUEUE or num & (num - 1):
            raise PeerError(f"queue {self.number} shall have {num} entries; a power of two to {MAX_QUEUE} is needed")
        self.num = num

    def work(self, memory: GuestMemory, device: Callable[[VhostRequest], object]) -> bool:
        """Do the requests that wait, and say whether there are more: a guest may go on for ever."""
        done, left = False, MAX_AT_ONCE
        while waiting := _index(memory, self.available + 2) - self.position & 0xFFFF:
            if waiting > self.num:
                raise PeerError(f"the guest's queue {self.number} holds more than its {self.num} entries")
            if not left:
                break
            left -= 1
            head = _index(memory, self.available + 4 + 2 * (self.position % self.num))
            request = self._request(memory, head)
            device(request)
            used = _index(memory, self.used + 2)
            # The buffers, and the entry, before the index that makes them valid; the marks behind all of them (I3).
            memory.store(self.used + 4 + 8 * (used % self.num), struct.pack("<II", head, request.written))
            _publish(memory, self.used + 2, used + 1 & 0xFFFF)
            if self.logged and memory.logging:
                memory.mark(self.log_address, 6 + 8 * self.num)
            self.position = self.position + 1 & 0xFFFF
            done = True
        if done:
            # The driver stores its wish for notices and then looks at the used index; we the other way round.
            _queues.fence()
            if not _index(memory, self.available) & _NO_NOTICE:
                eventfds.notify(self.call)
        return waiting > 0

    def _request(self, memory: GuestMemory, head: int) -> VhostRequest:
        request = VhostRequest(memory, self.number, head)
        at, room = head, memory.size
        for _ in range(self.num):
            if at >= self.num:
                raise PeerError(f"the guest's queue {self.number} names descriptor {at} of {self.num}")
            address, length, flags, following = _DESCRIPTOR.unpack(memory.read(self.descriptors + 16 * at, 16))
            if flags & _INDIRECT:
                raise PeerError("the guest uses indirect descriptors, which were not offered")
            if request.writable and not flags & _WRITE:
                raise PeerError(f"the guest's queue {self.number} has a buffer to read behind one to write")
            memory.find(address, length)
            room -= length
            if room < 0:
                raise PeerError(
                    f"the guest's queue {self.number} has a request of more bytes than the guest has memory"
                )
            (request.writable if flags & _WRITE else request.readable).append((address, length))
            if not flags & _NEXT:
                return request
            at = following
        raise PeerError(f"the guest's queue {self.number} has descriptors that go in a circle")

    def close(self) -> None:
        """Give up its notices."""
        self.kick = eventfds.given_up(self.kick)
        self.call = eventfds.given_up(self.call)


def _place(memory: GuestMemory, address: int) -> tuple[mmap.mmap, int]:
    mapping, at, count = memory.find(address, 2)[0]
    if count < 2 or at % 2:  # the memory was described anew, the queue was not
        raise PeerError(f"a queue's index is at {address:#x}, where the guest's memory has none that is whole")
    return mapping, at


def _index(memory: GuestMemory, address: int) -> int:
    return _queues.index(*_place(memory, address))


def _publish(memory: GuestMemory, address: int, value: int) -> None:
    _queues.publish(*_place(memory, address), value)
