"""What the source sends: the pages of each round over all channels, and what has to go again on another line."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import numpy.typing as npt

from dirtylog._bits.pages import DirtyPages
from dirtylog.sinks._bytes.extents import WINDOW, PackedExtents
from dirtylog.sinks.migrate.control import Control
from dirtylog.sinks.migrate.lane import Lane
from dirtylog.sinks.migrate.payloads import HELLO, JOIN, PART, RAW, ZSTD, compressor, granule_offsets
from dirtylog.sinks.migrate.policy import Round
from dirtylog.sinks.migrate.share import Share
from dirtylog.sinks.migrate.wire import MAX_EXTENTS, MAX_PART, Broken, Channel, Kind, WireError

if TYPE_CHECKING:
    from dirtylog.sinks.snapshot.writer import Source

__all__ = ["Rounds"]

# Not sent yet, in the table of frames.
_PENDING = np.iinfo(np.uint64).max
_T = TypeVar("_T")


@dataclass(slots=True)
class Rounds:
    """One migration under way, seen from the source: what is sent, and what a copy may lack after a broken line."""

    first: Channel
    source: Source
    layout: bytes
    cache: int
    compress: bool
    clock: Callable[[], float]
    session: bytes
    channels: int = 1
    another: Callable[[], socket.socket] | None = None
    postcopy: bool = False
    # The frame in which each granule went last, where a broken line can be replaced.
    frames: npt.NDArray[np.uint64] | None = None
    # What goes beside the memory, once it is known.
    state: bytes = b""
    rounds: list[Round] = field(default_factory=list)
    lanes: list[Lane] = field(init=False)

    def __post_init__(self) -> None:
        """Divide the pages among the channels."""
        self.lanes = [
            Lane(share, self.source, self.cache, compressor() if self.compress else None)
            for share in Share.all(self.channels, self.granule)
        ]
        self.channel = self.first

    @property
    def channel(self) -> Channel:
        """The first channel, over which everything goes but pages of the others."""
        return self.lanes[0].line

    @channel.setter
    def channel(self, channel: Channel) -> None:
        self.lanes[0].channel = channel

    @property
    def bytes_sent(self) -> int:
        """Bytes that went over all channels."""
        return sum(lane.channel.bytes_sent for lane in self.lanes if lane.channel is not None)

    @property
    def page_size(self) -> int:
        """Bytes of a page."""
        return self.source.page_size

    @property
    def granule(self) -> int:
        """Bytes of what is zero or not, and of what goes again: a page, or a window of a larger one."""
        return min(self.page_size, WINDOW)

    def watch(self, control: Control) -> None:
        """Be limited and cancelled by it, and tell it how far this is."""
        self.channel.pace, self.channel.look = control._pace, control._check
        for lane in self.lanes:
            lane.control = control

    def remember(self) -> None:
        """Keep for each granule in which frame it went last: 8 bytes each."""
        self.frames = np.full(-(-self.source.nbytes // self.granule), _PENDING, np.uint64)
        for lane in self.lanes:
            lane.packer.remember(self.frames)

    def hello(self) -> int:
        """Say which session this is, open the other channels; return how far the copy is."""
        codec = ZSTD if self.compress else RAW
        channels = self.channels if self.channels > 1 else 0
        what = self.source.nbytes, self.page_size, codec, channels, self.postcopy, len(self.layout)
        self.channel.send(Kind.HELLO, HELLO.pack(self.session, *what))
        if self.layout:
            self.channel.send(Kind.LAYOUT, self.layout)
        stage, nonce = self.lanes[0].resume()
        if stage == PART:
            try:
                for lane in self.lanes[1:]:
                    self.join(lane, nonce)
            except (OSError, WireError):
                self.channel.broken = True
                raise
        return stage

    def join(self, lane: Lane, nonce: bytes) -> None:
        """Open one of the other channels."""
        assert self.another is not None
        lane.own = sock = self.another()
        lane.channel = self.channel.beside(sock) if lane.channel is None else lane.channel.again(sock)
        lane.line.send(Kind.JOIN, JOIN.pack(self.session, nonce, lane.share.index))
        lane.resume()

    def hang_up(self) -> None:
        """Close the other channels."""
        for lane in self.lanes[1:]:
            lane.hang_up()

    def cut(self) -> None:
        """End what the other channels wait for."""
        for lane in self.lanes[1:]:
            lane.line.cut()

    def end(self) -> bytes:
        """Say over all channels that this was all, the first one last; return its digest."""
        try:
            for lane in reversed(self.lanes):
                digest = lane.end()
        finally:
            # A line is all of its channels.
            self.channel.broken = any(lane.line.broken for lane in self.lanes)
        return digest

    def side_by_side(self, work: Callable[[Lane, Callable[[], object]], _T]) -> list[_T]:
        """Let all channels do something at once; what one of them raises ends it for all.

        `work` calls its second argument now and then.
        """
        if len(self.lanes) == 1:
            return [work(self.lanes[0], int)]
        found: dict[int, _T] = {}
        # What ended a channel, and whether its line was broken; what came first made the others end.
        failed: list[tuple[BaseException, bool]] = []

        def check() -> None:
            if failed:
                raise Broken("another channel of this migration has ended")

        def fail(lane: Lane, error: BaseException) -> None:
            failed.append((error, lane.line.broken))
            self.cut()
            if lane.line.broken:
                # The first one may wait for room that nobody makes any more; what the copy says can still be read.
                self.channel.cut(socket.SHUT_WR)

        def run(lane: Lane) -> None:
            try:
                found[lane.share.index] = work(lane, check)
            except BaseException as error:
                fail(lane, error)

        threads = [threading.Thread(target=run, args=(lane,), daemon=True) for lane in self.lanes[1:]]
        try:
            for thread in threads:
                thread.start()
            found[0] = work(self.lanes[0], check)
            for thread in threads:
                thread.join()
        except BaseException as error:
            fail(self.lanes[0], error)
            if not isinstance(error, Exception):
                raise
        finally:
            for thread in threads:
                if thread.ident is not None:
                    thread.join()
            self.channel.broken = bool(failed) and failed[0][1]
        if failed:
            try:
                raise failed[0][0]
            finally:
                # Their tracebacks lead back to here: each would keep the other, and the memory that both lead to.
                failed.clear()
        return [found[index] for index in range(len(self.lanes))]

    def lacking(self) -> DirtyPages:
        """Return the pages of which the copy may not have what was sent last."""
        assert self.frames is not None
        npages = -(-self.source.nbytes // self.page_size)
        applied = np.array([lane.packer.sent for lane in self.lanes], np.uint64)
        owners = self.lanes[0].share.owners(len(self.frames))
        granules = np.flatnonzero(self.frames >= applied[owners])
        return DirtyPages.from_indices(np.unique(granules * self.granule // self.page_size), npages, self.page_size)

    def round(self, pages: DirtyPages, final: bool = False) -> None:
        """Send some pages as a round."""
        begin, before = self.clock(), self.bytes_sent
        packed = PackedExtents(pages, self.source.nbytes)
        if self.frames is not None:
            self.frames[granule_offsets(packed.extents, self.granule) // self.granule] = _PENDING
        counts = self.side_by_side(lambda lane, on: lane.round(packed.extents, on))
        zeros, deltas = (sum(each[kind] for each in counts) for kind in (0, 1))
        self.over(pages, packed.total, (zeros, deltas), (begin, before), final)

    def over(
        self, pages: DirtyPages, nbytes: int, granules: tuple[int, int], begin: tuple[float, int], final: bool
    ) -> None:
        """Note a round that is over.

        Parameters
        ----------
        pages, nbytes : DirtyPages, int
            What has gone.
        granules : tuple of (int, int)
            How many of its granules were zero, and of how many only what changed went.
        begin : tuple of (float, int)
            The clock, and the bytes that had gone over the line, when it began.
        final : bool
            Whether the source was paused.
        """
        seconds = self.clock() - begin[0]
        zeros, deltas = (count // (self.page_size // self.granule) for count in granules)
        self.rounds.append(
            Round(
                number=len(self.rounds) + 1,
                final=final,
                pages=pages.count,
                zero_pages=zeros,
                delta_pages=deltas,
                nbytes=nbytes,
                wire_bytes=self.bytes_sent - begin[1],
                seconds=seconds,
                bandwidth=nbytes / seconds if seconds > 0 else float("inf"),
            )
        )

    def beside(self) -> None:
        """Send the state, in parts."""
        for begin in range(0, len(self.state), MAX_PART):
            self.channel.send(Kind.STATE, self.state[begin : begin + MAX_PART])

    def lacks(self, extents: npt.NDArray[np.int64]) -> None:
        """Say what comes when the copy runs."""
        for begin in range(0, len(extents), MAX_EXTENTS):
            self.channel.send(Kind.LACKING, extents[begin : begin + MAX_EXTENTS].astype("<i8").tobytes())

    def dirtied(self, pages: DirtyPages, throttle: float) -> Round:
        """Complete the last round with what was dirtied during it."""
        last = self.rounds[-1]
        self.rounds[-1] = replace(
            last,
            dirtied=pages.count,
            dirty_rate=pages.count / last.seconds if last.seconds > 0 else 0.0,
            expected_downtime=pages.nbytes / last.bandwidth if last.bandwidth > 0 else float("inf"),
            throttle=throttle,
        )
        return self.rounds[-1]
