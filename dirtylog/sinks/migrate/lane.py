"""One channel of a migration, seen from the source: its share of the pages, in order."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from dirtylog.sinks._bytes.extents import WINDOW, PackedExtents
from dirtylog.sinks.migrate._frames import Packer
from dirtylog.sinks.migrate.control import Control
from dirtylog.sinks.migrate.copies import Copies
from dirtylog.sinks.migrate.payloads import FAULTS, PAGES, PART, RAW, READY, ROUND, RUNS, ZSTD
from dirtylog.sinks.migrate.share import Share
from dirtylog.sinks.migrate.wire import Channel, Kind, WireError
from dirtylog.sinks.snapshot.space import Space

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from dirtylog.sinks.snapshot.writer import Source

__all__ = ["Lane"]

# Bytes of whole pages in a frame: a line that breaks takes what is under way with it.
IN_A_FRAME = 1 << 18
# Bytes of pages between two looks at limits and at whether it was cancelled.
SENT_AT_ONCE = 1 << 22


class Worth:
    """Whether it is worth the time to compress what comes next: what could not be, for a while, is not tried again.

    Notes
    -----
    A frame that does not become smaller by a sixteenth makes the next one go as it is, the next two after another one,
    then four, up to 64. One that does starts over.
    """

    __slots__ = ("_left", "_skipped")

    def __init__(self) -> None:
        self._skipped = self._left = 0

    def asks(self) -> bool:
        """Say whether to try."""
        self._left -= 1
        return self._left < 0

    def answer(self, smaller: int, nbytes: int) -> None:
        """Note what trying has brought."""
        poor = smaller > nbytes - nbytes // 16
        self._skipped = min(max(2 * self._skipped, 1), 64) if poor else 0
        self._left = self._skipped


class Lane:
    """What goes over one channel, over as many lines as it takes.

    Parameters
    ----------
    share : Share
        Which pages.
    source : Source
        Where they are read.
    cache : int
        Bytes for copies of what was sent of the whole memory; this one's part of it is its own.
    compress : callable, optional
        From bytes to fewer bytes.
    """

    def __init__(self, share: Share, source: Source, cache: int, compress: Callable[[Buffer], bytes] | None) -> None:
        granules = -(-source.nbytes // share.granule)
        own = share.count(granules)
        self.share: Share = share
        self.source: Source = source
        self.copies: Copies = Copies(own * share.granule, share.granule, cache * own // granules)
        self.compress: Callable[[Buffer], bytes] | None = compress
        self.worth: Worth = Worth()
        self.channel: Channel | None = None
        # Of a channel beside the first: closed with it.
        self.own: socket.socket | None = None
        self.control: Control | None = None
        self.begun: int = 0
        self.served: int = 0
        self.staging: memoryview | None = None
        # Memory that is not in this process is read window by window.
        regions = source.views() if isinstance(source, Space) else []
        data, pages, frames = self.copies.data, self.copies.pages, self.copies.frames
        self.packer: Packer = Packer(
            regions, source.nbytes, share.granule, data, pages, frames, IN_A_FRAME, share.numbers
        )

    @property
    def line(self) -> Channel:
        """The channel, which is open."""
        assert self.channel is not None
        return self.channel

    def resume(self) -> tuple[int, bytes]:
        """Hear how far the copy is; return its stage, and what the other channels have to say."""
        _, answer = self.line.receive(Kind.READY, counted=False)
        if answer.nbytes != READY.size:
            raise WireError(f"a READY frame of {answer.nbytes} bytes")
        stage, begun, applied, nonce = READY.unpack(answer)
        if stage == FAULTS:
            # Of the frames since the copy runs.
            self.served = applied
            return int(stage), nonce
        if not PART <= stage <= RUNS or begun > self.begun or applied > self.packer.sent:
            raise WireError(f"the copy says that it is at stage {stage}, round {begun}, frame {applied}; it cannot be")
        # What it has not applied is as if it had not been sent.
        self.copies.forget(applied)
        self.begun, self.packer.sent = begun, applied
        return int(stage), nonce

    def round(self, extents: npt.NDArray[np.int64], on: Callable[[], object]) -> tuple[int, int]:
        """Send its share of a round; return how many granules were zero, and of how many only what changed went.

        `on` is called now and then, and raises what ends it.
        """
        self.begun += 1
        self.copies.round(self.packer.sent)
        self.line.send(Kind.ROUND, ROUND.pack(self.begun))
        zeros = deltas = 0
        for sent, zero, delta in self.goes(self.share.of(extents)):
            zeros, deltas = zeros + zero, deltas + delta
            if self.control is not None:
                self.control._sent(sent)
            on()
        return zeros, deltas

    def end(self) -> bytes:
        """Say that this was all; return the digest over it."""
        digest = self.line.digest()
        self.line.send(Kind.END, digest)
        return digest

    def hang_up(self) -> None:
        """Close the socket of its own, if any."""
        own, self.own = self.own, None
        if own is not None:
            own.close()

    def goes(self, extents: npt.NDArray[np.int64]) -> Iterator[tuple[int, int, int]]:
        """Send pages; yields the bytes of some, how many granules of them were zero, and of how many a delta went."""
        if isinstance(self.source, Space):
            self.packer.begin(extents, self.copies.older)
            yield from self.begun_with()
            return
        if self.staging is None:
            self.staging = memoryview(bytearray(WINDOW))
        for start, end, window in PackedExtents.of_extents(extents).windows():
            # Copied once, from wherever it is.
            part = self.staging[: end - start]
            self.source.gather(window, part)
            self.packer.begin(window, self.copies.older, part)
            yield from self.begun_with()

    def begun_with(self) -> Iterator[tuple[int, int, int]]:
        """Send what the packer has begun with."""
        channel = self.line
        while True:
            limited = self.control is not None and self.control.bandwidth is not None
            if self.compress is None and channel.plain and not limited:
                sent = channel.send_pages(self.packer, SENT_AT_ONCE)
                if not sent[0]:
                    return
                yield sent
                continue
            window = self.packer.pack()
            if window is None:
                return
            nbytes, (zeros, deltas), frames = window
            for kind, count, table, data in frames:
                if kind == Kind.ZEROS:
                    channel.send(Kind.ZEROS, table)
                else:
                    self.data(Kind(kind), count, table, data)
            yield nbytes, zeros, deltas

    def data(self, kind: Kind, count: int, table: bytes, part: memoryview) -> None:
        """Send a frame of pages or of what changed in them, compressed where that makes it smaller."""
        codec, payload = RAW, part
        if self.compress is not None and self.worth.asks():
            smaller = self.compress(part)
            self.worth.answer(len(smaller), part.nbytes)
            if len(smaller) < part.nbytes:
                codec, payload = ZSTD, memoryview(smaller)
        self.line.send(kind, PAGES.pack(count, codec), table, payload)
