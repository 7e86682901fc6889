"""The sending end of a copy that runs already: what it asks for goes first, and the rest in the background."""

from __future__ import annotations

import select
import socket
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from dirtylog._bits.pages import DirtyPages
from dirtylog._core import DirtyBitmap
from dirtylog.sinks._bytes.extents import PackedExtents
from dirtylog.sinks.migrate._frames import Packer
from dirtylog.sinks.migrate.control import Control
from dirtylog.sinks.migrate.payloads import EXTENT, PAGES, RAW, granules_of
from dirtylog.sinks.migrate.wire import LOOK, Channel, Kind, WireError

if TYPE_CHECKING:
    from dirtylog.sinks.snapshot.space import Space

__all__ = ["Serving"]

# Bytes that go in the background between two looks at what is asked for, and behind a page that was: its neighbours
# are wanted next. What is in the system's buffer is before what is asked for.
_AT_ONCE = 1 << 17
_BEHIND = 1 << 14
_BUFFER = 1 << 18
# Granules that are looked at in one go for the next one that has not gone.
_AHEAD = 1 << 15


class Serving:
    """What a copy lacks, over as many lines as it takes.

    Parameters
    ----------
    source : Space
        The memory, which nobody writes any more.
    granule : int
        Bytes of what is lacking or not.
    lacks : DirtyPages
        In pages of the source.
    control : Control
        Limits what goes in the background, and is told how far this is.
    """

    def __init__(self, source: Space, granule: int, lacks: DirtyPages, control: Control) -> None:
        self.control: Control = control
        self.pages: DirtyPages = lacks
        self.granule: int = granule
        self.nbytes: int = source.nbytes
        self.granules: int = -(-source.nbytes // granule)
        self.to_go: DirtyBitmap = DirtyBitmap(self.granules)
        self.all: DirtyPages = granules_of(PackedExtents(lacks, source.nbytes).extents, granule, source.nbytes)
        self.to_go.merge(self.all)
        self.left: int = self.all.count
        self.at: int = 0
        self.frames: npt.NDArray[np.uint64] = np.zeros(self.granules, np.uint64)
        self.zeros: int = 0
        self.sent: int = 0
        nothing = np.zeros(0, np.int64)
        self.packer: Packer = Packer(
            source.views(), source.nbytes, granule, np.zeros(0, np.uint8), nothing, nothing, max(_AT_ONCE, granule)
        )
        self.packer.remember(self.frames)

    def extents(self) -> npt.NDArray[np.int64]:
        """Return what is lacking as extents in bytes."""
        return self._extents(self.all)

    def _extents(self, granules: DirtyPages) -> npt.NDArray[np.int64]:
        extents = granules.runs() * self.granule
        extents[:, 1] = np.minimum(extents[:, 1], self.nbytes - extents[:, 0])
        return extents

    def back_to(self, applied: int) -> None:
        """Go on on another line: the copy has applied so many frames, and what went in later ones goes again."""
        if applied > self.packer.sent:
            raise WireError(f"the copy says that it has applied {applied} frames of {self.packer.sent}; it cannot be")
        lost = DirtyPages.from_indices(np.flatnonzero(self.frames >= applied), self.granules) & self.all
        self.to_go.merge(lost)
        self.packer.sent = applied
        self.left = self.to_go.count()
        self.at = 0

    def run(self, channel: Channel, session: bytes) -> None:
        """Send until the copy says that it has everything."""
        poll = select.poll()
        poll.register(channel.sock, select.POLLIN)
        # What the copy waits for goes at once, whatever the limit; the background makes up for it.
        channel.pace = self.control._note
        if channel.sock.family != socket.AF_UNIX:
            channel.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER)
        while True:
            # With nothing left to send it waits for what is said.
            while not self.left or self._hears(channel, poll):
                kind, payload = channel.receive(Kind.WANT, Kind.FILLED, counted=False)
                if kind == Kind.FILLED:
                    if payload != session:
                        raise WireError("the copy answers for another session")
                    return
                self._asked(channel, payload)
            self._background(channel)

    def _hears(self, channel: Channel, poll: select.poll) -> bool:
        """Whether the copy has said something; as long as nothing more may go in the background, wait for that."""
        while not channel.has_more:
            wait = min(self.control._left(), LOOK)
            if poll.poll(1000 * wait):
                return True
            if not wait:
                return False
        return True

    def _asked(self, channel: Channel, payload: memoryview) -> None:
        if payload.nbytes != EXTENT.size:
            raise WireError(f"a WANT frame of {payload.nbytes} bytes")
        offset, length = EXTENT.unpack(payload)
        if not 0 <= offset < self.nbytes or offset % self.granule or not 0 < length <= self.granule:
            raise WireError(f"the copy asks for {length} bytes at {offset}; there are {self.nbytes}")
        self._give(channel, offset // self.granule, 1 + _BEHIND // self.granule)

    def _background(self, channel: Channel) -> None:
        count = max(_AT_ONCE // self.granule, 1)
        while not self._give(channel, self.at, count):
            # Of a large memory little may be lacking: step over what is not.
            look = min(_AHEAD, self.granules - self.at)
            ahead = self.to_go.peek(self.at, look).indices()
            self.at = int(ahead[0]) if len(ahead) else (self.at + look) % self.granules

    def _give(self, channel: Channel, first: int, count: int) -> int:
        """Send what of these granules has not gone yet; return how many that were."""
        count = min(count, self.granules - first)
        part = self.to_go.harvest(first, count)
        self.at = (first + count) % self.granules
        if not part:
            return 0
        self.left -= part.count
        self.packer.begin(self._extents(part), -1)
        while (window := self.packer.pack()) is not None:
            nbytes, (zeros, _), frames = window
            for kind, number, table, data in frames:
                if kind == Kind.ZEROS:
                    channel.send(Kind.ZEROS, table)
                else:
                    channel.send(Kind.PAGES, PAGES.pack(number, RAW), table, data)
            self.zeros += zeros
            self.sent += nbytes
            self.control._sent(nbytes)
        return part.count
