"""A guest's memory by guest-physical address, and the log in which a device marks what it has written there."""

from __future__ import annotations

import contextlib
import mmap
import os
import struct
from dataclasses import dataclass

from dirtylog._core import DirtyBitmap
from dirtylog.sources._channel import PeerError
from dirtylog.sources.vhost import eventfds

__all__ = ["MAX_REGIONS", "GuestMemory"]

LOG_PAGE = 4096
MAX_REGIONS = 8


@dataclass(frozen=True, slots=True)
class Region:
    """Guest memory behind one descriptor."""

    gpa: int
    size: int
    uva: int
    memory: mmap.mmap
    offset: int


class GuestMemory:
    """What the front end has described of its guest's memory, and its log.

    Attributes
    ----------
    log : DirtyBitmap or None
        The front end's log, one bit for `LOG_PAGE` bytes of guest-physical address.
    wanted : bool
        Whether the front end wants writes to be marked.
    notice : int
        The eventfd by which the front end wants to know of marks, or -1.
    """

    def __init__(self) -> None:
        self._regions: list[Region] = []
        self._log_memory: mmap.mmap | None = None
        self.log: DirtyBitmap | None = None
        self.wanted: bool = False
        self.notice: int = -1

    @property
    def size(self) -> int:
        """Bytes of all regions."""
        return sum(region.size for region in self._regions)

    @property
    def logging(self) -> bool:
        """Whether writes are marked now."""
        return self.log is not None and self.wanted

    # Access ---------------------------------------------------------------------------------------------------------

    def find(self, address: int, length: int) -> list[tuple[mmap.mmap, int, int]]:
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

    def translated(self, pointer: int, length: int, unit: int) -> int:
        """Turn an address of the front end into the guest's."""
        for region in self._regions:
            at = pointer - region.uva
            if at >= 0 and at + length <= region.size:
                if (region.offset + at) % unit:
                    raise PeerError(f"a queue has a part at {pointer:#x}, which is not a multiple of {unit}")
                return region.gpa + at
        raise PeerError(f"a queue lies at {pointer:#x}, which is not in the guest's memory")

    def read(self, address: int, length: int) -> bytes:
        """Read guest memory."""
        return b"".join(memory[at : at + count] for memory, at, count in self.find(address, length))

    def write(self, address: int, data: bytes) -> None:
        """Write guest memory, and mark its pages where the front end logs."""
        self.store(address, data)
        if self.logging:
            self.mark(address, len(data))

    def store(self, address: int, data: bytes) -> None:
        """Write guest memory, and mark nothing."""
        done = 0
        for memory, at, count in self.find(address, len(data)):
            memory[at : at + count] = data[done : done + count]
            done += count

    def mark(self, address: int, length: int) -> None:
        """Mark what has been stored."""
        # I3: after the store, with a full barrier behind the marks.
        if length and self.log is not None:
            first = address // LOG_PAGE
            try:
                self.log.mark_range(first, (address + length - 1) // LOG_PAGE - first + 1)
            except IndexError as error:
                raise PeerError(f"the log is smaller than the guest: {error}") from error
            eventfds.notify(self.notice)

    # What the front end describes -------------------------------------------------------------------------------------

    def describe(self, body: bytes, descriptors: list[int]) -> None:
        """Take the regions of a message in the place of those from before."""
        (count,) = struct.unpack("<I", body[:4])
        if len(body) < 8 + 32 * count or len(descriptors) != count:
            raise PeerError(
                f"the front end sent {count} regions in {len(body)} bytes, and {len(descriptors)} descriptors"
            )
        regions: list[Region] = []
        try:
            for number, descriptor in enumerate(descriptors):
                gpa, size, uva, offset = struct.unpack_from("<4Q", body, 8 + 32 * number)
                # A page behind the end of the file would be SIGBUS, not an error.
                if not size or offset + size > os.fstat(descriptor).st_size or gpa + size > 1 << 64:
                    raise PeerError(f"a region of {size} bytes at {offset} is not in its file")
                if any(gpa < other.gpa + other.size and other.gpa < gpa + size for other in regions):
                    raise PeerError(f"the region at {gpa:#x} overlaps another one")
                regions.append(Region(gpa, size, uva, mmap.mmap(descriptor, offset + size), offset))
            if self.logging and self.log is not None:
                self._check_log(self.log.npages, regions)
        except BaseException:
            for region in regions:
                region.memory.close()
            raise
        before, self._regions = self._regions, regions
        for region in before:
            region.memory.close()

    def want(self, wanted: bool) -> None:
        """Mark writes from now on, or no more; refused where the log is smaller than the guest."""
        if wanted and self.log is not None:
            self._check_log(self.log.npages, self._regions)
        self.wanted = wanted

    def take_log(self, body: bytes, descriptors: list[int]) -> None:
        """Take the log of a message in the place of the one from before."""
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

    @staticmethod
    def _check_log(npages: int, regions: list[Region]) -> None:
        guest = max((region.gpa + region.size for region in regions), default=0)
        if npages * LOG_PAGE < guest:
            raise PeerError(f"the log has {npages} pages and is smaller than the guest, which ends at {guest:#x}")

    def _drop_log(self) -> None:
        memory, self._log_memory, self.log = self._log_memory, None, None
        with contextlib.suppress(BufferError):  # whoever holds the bitmap still: then it goes with it
            if memory is not None:
                memory.close()

    def close(self) -> None:
        """Give up all of it."""
        self._drop_log()
        for region in self._regions:
            region.memory.close()
        self._regions = []
        self.notice = eventfds.given_up(self.notice)
