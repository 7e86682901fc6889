"""What the source sends: the pages of each round, window by window, and what has to go again on another line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from dirtylog._bits.copying import gather
from dirtylog._bits.deltas import DELTA, WHOLE, ZERO
from dirtylog._bits.pages import DirtyPages
from dirtylog.sinks.extents import WINDOW, PackedExtents
from dirtylog.sinks.migrate.control import Control
from dirtylog.sinks.migrate.copies import Copies
from dirtylog.sinks.migrate.payloads import (
    HELLO,
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

# Bytes of a frame: a line that breaks loses what is under way, and a core's own cache holds it.
SENT_AT_ONCE = 1 << 18
# Not sent yet, in the table of frames.
_PENDING = np.iinfo(np.uint64).max


def _joined(offsets: npt.NDArray[np.int64], granule: int, end: int) -> npt.NDArray[np.int64]:
    """Return ascending granules as extents, neighbours joined, nothing past `end`."""
    starts = np.flatnonzero(np.diff(offsets, prepend=-2 * granule) != granule)
    lengths = np.diff(starts, append=len(offsets)) * granule
    extents = np.stack([offsets[starts], lengths], axis=1)
    extents[-1, 1] = min(extents[-1, 1], end - extents[-1, 0])
    return extents


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
        for start, end, extents in packed.windows(max(SENT_AT_ONCE, self.granule)):
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
        granule = self.granule
        offsets = granule_offsets(extents, granule)
        numbers = offsets // granule
        kinds, used = self.copies.sort(part, numbers, self.changes)
        zero, delta, whole = (np.flatnonzero(kinds == kind) for kind in (ZERO, DELTA, WHOLE))
        # The last frame of the window: until that one is applied, all of it counts as lacking.
        last = self.sent + sum(1 for each in (zero, delta, whole) if len(each)) - 1
        self.copies.went(numbers, last)
        if self.frames is not None:
            self.frames[numbers] = last
        if len(zero):
            self.sent += 1
            table = _joined(offsets[zero], granule, self.source.nbytes).astype("<i8").tobytes()
            self.channel.send(Kind.ZEROS, table)
        if len(delta):
            self.data(_joined(offsets[delta], granule, self.source.nbytes), self.changes[:used], Kind.DELTAS)
        if len(whole) == len(kinds):
            self.data(extents, part)
        elif len(whole):
            within = _joined(whole * granule, granule, nbytes)
            packed = self.packing[: int(within[:, 1].sum())]
            gather(part, within, packed)
            self.data(_joined(offsets[whole], granule, self.source.nbytes), packed)
        return len(zero), len(delta)

    def data(self, extents: npt.NDArray[np.int64], part: memoryview, kind: Kind = Kind.PAGES) -> None:
        """Send a frame of pages or of what changed in them, compressed where that makes it smaller."""
        codec, payload = RAW, part
        if self.compress:
            smaller = self.compress(part)
            if len(smaller) < part.nbytes:
                codec, payload = ZSTD, memoryview(smaller)
        table = extents.astype("<i8").tobytes()
        self.sent += 1
        self.channel.send(kind, PAGES.pack(len(extents), codec), table, payload)

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
