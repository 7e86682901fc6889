"""What the source sends: the pages of each round, window by window, and what has to go again on another line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from dirtylog._bits.copying import gather
from dirtylog._bits.deltas import DELTA, WHOLE, ZERO, extents_of
from dirtylog._bits.pages import DirtyPages
from dirtylog.sinks._bytes.extents import WINDOW, PackedExtents
from dirtylog.sinks.migrate.control import Control
from dirtylog.sinks.migrate.copies import Copies
from dirtylog.sinks.migrate.payloads import (
    HELLO,
    MIN_PAGE_SIZE,
    PAGES,
    PART,
    RAW,
    READY,
    ROUND,
    RUNS,
    ZSTD,
    granule_offsets,
)
from dirtylog.sinks.migrate.policy import Round
from dirtylog.sinks.migrate.wire import MAX_PART, Channel, Kind, WireError

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from dirtylog.sinks.snapshot.writer import Source

__all__ = ["Rounds"]

# Bytes of pages in a frame: a line that breaks takes what is under way with it.
SENT_AT_ONCE = 1 << 18
# Not sent yet, in the table of frames.
_PENDING = np.iinfo(np.uint64).max


def _table(extents: npt.NDArray[np.int64]) -> bytes:
    return extents.astype("<i8", copy=False).tobytes()


@dataclass(slots=True)
class Rounds:
    """One migration under way, seen from the source: what is sent, and what a copy may lack after a broken line."""

    channel: Channel
    source: Source
    layout: bytes
    copies: Copies
    compress: Callable[[Buffer], bytes] | None
    clock: Callable[[], float]
    session: bytes
    # The frame in which each granule went last, where a broken line can be replaced.
    frames: npt.NDArray[np.uint64] | None = None
    control: Control | None = None
    sent: int = 0
    begun: int = 0
    # What goes beside the memory, once it is known.
    state: bytes = b""
    rounds: list[Round] = field(default_factory=list)
    staging: memoryview = field(default_factory=lambda: memoryview(bytearray(WINDOW)))
    changes: memoryview = field(default_factory=lambda: memoryview(bytearray(WINDOW)))
    positions: npt.NDArray[np.int64] = field(default_factory=lambda: np.arange(WINDOW // MIN_PAGE_SIZE))
    packing: memoryview = field(default_factory=lambda: memoryview(bytearray(WINDOW)))

    @property
    def page_size(self) -> int:
        """Bytes of a page."""
        return self.source.page_size

    @property
    def granule(self) -> int:
        """Bytes of what is zero or not, and of what goes again: a page, or a window of a larger one."""
        return min(self.page_size, WINDOW)

    def remember(self) -> None:
        """Keep for each granule in which frame it went last: 8 bytes each."""
        self.frames = np.full(-(-self.source.nbytes // self.granule), _PENDING, np.uint64)

    def hello(self) -> int:
        """Say which session this is; return how far the copy is."""
        codec = ZSTD if self.compress else RAW
        said = HELLO.pack(self.session, self.source.nbytes, self.page_size, codec, len(self.layout))
        self.channel.send(Kind.HELLO, said)
        if self.layout:
            self.channel.send(Kind.LAYOUT, self.layout)
        _, answer = self.channel.receive(Kind.READY, counted=False)
        if answer.nbytes != READY.size:
            raise WireError(f"a READY frame of {answer.nbytes} bytes")
        stage, begun, applied = READY.unpack(answer)
        if not PART <= stage <= RUNS or begun > self.begun or applied > self.sent:
            raise WireError(f"the copy says that it is at stage {stage}, round {begun}, frame {applied}; it cannot be")
        # What it has not applied is as if it had not been sent.
        self.copies.forget(applied)
        self.begun, self.sent = begun, applied
        return int(stage)

    def lacking(self) -> DirtyPages:
        """Return the pages of which the copy may not have what was sent last."""
        assert self.frames is not None
        npages = -(-self.source.nbytes // self.page_size)
        granules = np.flatnonzero(self.frames >= np.uint64(self.sent))
        return DirtyPages.from_indices(np.unique(granules * self.granule // self.page_size), npages, self.page_size)

    def round(self, pages: DirtyPages, final: bool = False) -> None:
        """Send some pages as a round."""
        number = len(self.rounds) + 1
        begin, before = self.clock(), self.channel.bytes_sent
        packed = PackedExtents(pages, self.source.nbytes)
        if self.frames is not None:
            self.frames[granule_offsets(packed.extents, self.granule) // self.granule] = _PENDING
        self.begun += 1
        self.copies.round(self.sent)
        self.channel.send(Kind.ROUND, ROUND.pack(self.begun))
        zeros = deltas = 0
        for start, end, extents in packed.windows():
            counts = self.window(extents, end - start)
            zeros, deltas = zeros + counts[0], deltas + counts[1]
            if self.control is not None:
                self.control.nbytes += end - start
        seconds = self.clock() - begin
        self.rounds.append(
            Round(
                number=number,
                final=final,
                pages=pages.count,
                zero_pages=zeros // max(self.page_size // WINDOW, 1),
                delta_pages=deltas // max(self.page_size // WINDOW, 1),
                nbytes=packed.total,
                wire_bytes=self.channel.bytes_sent - before,
                seconds=seconds,
                bandwidth=packed.total / seconds if seconds > 0 else float("inf"),
            )
        )

    def window(self, extents: npt.NDArray[np.int64], nbytes: int) -> tuple[int, int]:
        """Send one window; return how many of its granules were zero, and of how many only what changed went."""
        part = self.staging[:nbytes]
        # Copied once: zero or not, changed or not is asked of the bytes that are sent.
        self.source.gather(extents, part)
        numbers, kinds, used = self.copies.sort(part, extents, self.changes)
        zero, delta, whole = (int(np.count_nonzero(kinds == kind)) for kind in (ZERO, DELTA, WHOLE))
        # In order, so that what a line takes with it is known frame by frame.
        if zero:
            self.goes(numbers[kinds == ZERO])
            self.channel.send(Kind.ZEROS, _table(self.of_kind(numbers, kinds, ZERO)))
        if delta:
            self.goes(numbers[kinds == DELTA])
            self.data(self.of_kind(numbers, kinds, DELTA), self.changes[:used], Kind.DELTAS)
        if whole < len(kinds):
            within = extents_of(self.positions[: len(kinds)], kinds, WHOLE, self.granule, nbytes)
            packed = self.packing[: int(within[:, 1].sum())]
            gather(part, within, packed)
            extents, part = self.of_kind(numbers, kinds, WHOLE), packed
            numbers = numbers[kinds == WHOLE]
        whole_part = PackedExtents.of_extents(extents)
        for start, end, piece in whole_part.windows(max(SENT_AT_ONCE, self.granule)):
            self.goes(numbers[start // self.granule : -(-end // self.granule)])
            self.data(piece, part[start:end])
        return zero, delta

    def of_kind(self, numbers: npt.NDArray[np.int64], kinds: npt.NDArray[np.uint8], kind: int) -> npt.NDArray[np.int64]:
        """Return the extents of the granules of one kind."""
        return extents_of(numbers, kinds, kind, self.granule, self.source.nbytes)

    def goes(self, numbers: npt.NDArray[np.int64]) -> None:
        """Note that some granules go in the next frame: until that one is applied, they count as lacking."""
        self.copies.went(numbers, self.sent)
        if self.frames is not None:
            self.frames[numbers] = self.sent
        self.sent += 1

    def data(self, extents: npt.NDArray[np.int64], part: memoryview, kind: Kind = Kind.PAGES) -> None:
        """Send a frame of pages or of what changed in them, compressed where that makes it smaller."""
        codec, payload = RAW, part
        if self.compress:
            smaller = self.compress(part)
            if len(smaller) < part.nbytes:
                codec, payload = ZSTD, memoryview(smaller)
        self.channel.send(kind, PAGES.pack(len(extents), codec), _table(extents), payload)

    def beside(self) -> None:
        """Send the state, in parts."""
        for begin in range(0, len(self.state), MAX_PART):
            self.channel.send(Kind.STATE, self.state[begin : begin + MAX_PART])

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
