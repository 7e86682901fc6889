"""Memory that fills, seen from the destination of a migration: what may come over each channel, and what has."""

from __future__ import annotations

import numpy as np

from dirtylog._core import DirtyBitmap
from dirtylog.sinks._bytes.extents import WINDOW
from dirtylog.sinks.migrate._frames import Taker
from dirtylog.sinks.migrate.payloads import PAGES, RAW, ROUND, ZSTD, granules_of
from dirtylog.sinks.migrate.share import Share
from dirtylog.sinks.migrate.wire import Kind, WireError
from dirtylog.sinks.snapshot.footer import MAX_STATE_BYTES
from dirtylog.sinks.snapshot.space import Space

__all__ = ["Filling", "Part"]


class Part:
    """What comes over one channel: rounds of pages of its share.

    Parameters
    ----------
    taker : Taker
        What applies its frames.
    codec : int
        Of the session.
    most : int
        Bytes of pages that a round may have.
    alone : bool
        Whether there is no other channel: then no round but the last may be empty.
    """

    def __init__(self, taker: Taker, codec: int, most: int, alone: bool) -> None:
        self.taker: Taker = taker
        self.codec: int = codec
        self.most: int = most
        self.alone: bool = alone
        self.number: int = 0
        # Whether what is beside the pages has begun to come.
        self.over: bool = False

    def takes(self) -> bool:
        """Whether frames of pages may come now, none of them compressed."""
        return self.codec == RAW and self.number > 0 and not self.over

    def resumed(self) -> None:
        """Go on on another line: the round that was cut counts, and pages come in a new one alone."""
        self.taker.left = 0
        self.over = False

    def round(self, payload: memoryview, max_rounds: int) -> None:
        """Begin a round."""
        if self.number and self.alone and self.taker.left == self.most:
            raise WireError(f"round {self.number} was empty, and is not the last; the sender makes no progress")
        if self.number == max_rounds:
            raise WireError(f"the sender begins round {max_rounds + 1}, max_rounds is {max_rounds}; raise it")
        self.number += 1
        if bytes(payload) != ROUND.pack(self.number):
            raise WireError(f"round {self.number} was due")
        # A sender sends each page once a round.
        self.taker.round, self.taker.left = self.number, self.most

    def pages(self, kind: Kind, payload: memoryview) -> None:
        """Apply a frame of pages, of what changed in them, or of zeros."""
        if not self.number:
            raise WireError("pages come before the first round")
        if self.over:
            raise WireError("pages come after the state")
        table, data = payload, memoryview(b"")
        if kind != Kind.ZEROS:
            table, data = self._split(payload)
        try:
            self.taker.apply(kind, table, data)
        except ValueError as error:
            raise WireError(str(error)) from None

    def _split(self, payload: memoryview) -> tuple[memoryview, memoryview]:
        """Return the table of a frame, and its bytes, not compressed."""
        if payload.nbytes < PAGES.size:
            raise WireError(f"a frame of pages has {payload.nbytes} bytes")
        count, codec = PAGES.unpack_from(payload)
        end = PAGES.size + 16 * count
        if bytes(payload[5:8]) != b"\0\0\0" or codec not in (RAW, self.codec) or end > payload.nbytes:
            raise WireError(f"a frame of pages has {count} extents, codec {codec}, in {payload.nbytes} bytes")
        table, data = payload[PAGES.size : end], payload[end:]
        if codec == ZSTD:
            # Of what changed there is no more than of the pages.
            size = int(np.frombuffer(table, "<i8")[1::2].clip(0, WINDOW).sum())
            data = memoryview(_unpacked(data, min(size, WINDOW)))
        return table, data


def _unpacked(data: memoryview, size: int) -> bytes:
    import zstandard

    try:
        # Bounded by the announced size, whatever the stream says of itself.
        reader = zstandard.ZstdDecompressor(max_window_size=1 << 23).stream_reader(data)
        unpacked = bytes(reader.read(size))
        if reader.read(1):
            raise WireError(f"compressed pages are more than the {size} bytes of their extents")
    except zstandard.ZstdError as error:
        raise WireError(f"compressed pages cannot be unpacked: {error}") from None
    return unpacked


class Filling:
    """One migration under way, seen from the destination.

    Parameters
    ----------
    target : Space
        The memory.
    page_size, codec, channels : int
        As the sender announces them.
    fresh : bool
        Whether the memory is zero.
    postcopy : bool
        Whether pages may come after the end.
    """

    def __init__(
        self, target: Space, page_size: int, codec: int, channels: int, fresh: bool, postcopy: bool = False
    ) -> None:
        granule = min(page_size, WINDOW)
        npages = -(-target.nbytes // granule)
        words = np.zeros(-(-npages // 64), np.uint64)
        self.seen: DirtyBitmap = DirtyBitmap.from_buffer(words, npages)
        # Of memory that is zero from the start: what is not. The rest is neither read nor written for zeros.
        filled = np.zeros(len(words), np.uint64) if fresh else None
        self.parts: list[Part] = [
            Part(
                Taker(target.views(), target.nbytes, granule, words, filled, share.numbers),
                codec,
                min(share.count(npages) * granule, target.nbytes),
                channels == 1,
            )
            for share in Share.all(channels, granule)
        ]
        self.state: bytearray = bytearray()
        self.target: Space = target
        self.granule: int = granule
        # Whether some may come when the copy runs; which those are.
        self.postcopy: bool = postcopy
        self.lacking: DirtyBitmap = DirtyBitmap(npages)

    @property
    def number(self) -> int:
        """The round under way."""
        return self.parts[0].number

    @property
    def done(self) -> int:
        """Bytes of pages that have come."""
        return sum(part.taker.done for part in self.parts)

    def resumed(self) -> None:
        """Go on on another line."""
        for part in self.parts:
            part.resumed()
        self.state.clear()
        self.lacking.harvest()

    def beside(self, payload: memoryview) -> None:
        """Keep a part of what is beside the memory."""
        if not (self.number or self.postcopy) or not payload.nbytes:
            raise WireError("a part of the state is empty, or comes before the first round")
        if len(self.state) + payload.nbytes > MAX_STATE_BYTES:
            raise WireError(f"the sender's state has more than {MAX_STATE_BYTES} bytes")
        self.parts[0].over = True
        self.state += payload

    def lacks(self, payload: memoryview) -> None:
        """Note extents that come when the copy runs."""
        table = np.frombuffer(payload, "<i8") if payload.nbytes % 16 == 0 else np.zeros(0, np.int64)
        starts, lengths = table[::2], table[1::2]
        nbytes, granule = self.target.nbytes, self.granule
        # In this order: once both are within bounds their sum cannot overflow.
        right = len(table) > 0 and bool(((starts >= 0) & (starts < nbytes) & (lengths > 0) & (lengths <= nbytes)).all())
        if right:
            ends = starts + lengths
            whole = (starts % granule == 0) & ((ends % granule == 0) | (ends == nbytes)) & (ends <= nbytes)
            right = bool(whole.all() and (starts[1:] >= ends[:-1]).all())
        if not right:
            raise WireError("a LACKING frame is no table of extents of whole pages of this memory")
        self.parts[0].over = True
        self.lacking.merge(granules_of(table.reshape(-1, 2), granule, nbytes))

    def missing(self) -> int:
        """Return how many pages never came and are not to come, in parts of a MiB where they are larger."""
        if not self.lacking.count():
            return self.seen.npages - self.seen.count()
        there = self.seen.peek() | self.lacking.peek()
        return there.npages - there.count
