"""What the two ends of a migration agree on: the payloads of frames, their codecs, and where their pages lie."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from dirtylog._bits.pages import DirtyPages
from dirtylog.errors import BackendUnavailable

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = [
    "COMPLETE",
    "EXTENT",
    "FAULTS",
    "HELLO",
    "JOIN",
    "MIN_PAGE_SIZE",
    "PAGES",
    "PART",
    "RAW",
    "READY",
    "ROUND",
    "RUNS",
    "ZSTD",
    "compressor",
    "granule_offsets",
    "granules_of",
]

# Below this a window's table of extents would not fit its frame.
MIN_PAGE_SIZE = 512
# Session, memory and page size in bytes, codec, channels, whether the copy runs before it has everything, bytes of the
# layout; how far the copy is, rounds begun and frames of pages applied on this channel, what the other channels have to
# say; session, that, which channel; number of the round; number of extents, codec.
HELLO = struct.Struct("<16sQQBB?xI")
READY = struct.Struct("<B7xQQ16s")
JOIN = struct.Struct("<16s16sI")
ROUND = struct.Struct("<Q")
PAGES = struct.Struct("<IB3x")
EXTENT = struct.Struct("<2q")
RAW, ZSTD = 0, 1
# How far the copy is, in READY.
PART, COMPLETE, RUNS, FAULTS = 0, 1, 2, 3


def compressor() -> Callable[[Buffer], bytes]:
    """Return zstd's function from bytes to fewer bytes.

    Raises
    ------
    BackendUnavailable
        zstandard is not installed.
    """
    try:
        import zstandard
    except ImportError as error:
        raise BackendUnavailable(
            "zstandard", f"import zstandard: {error}", "pip install zstandard, or send with compress=False"
        ) from None
    zstd = zstandard.ZstdCompressor(level=1)
    return lambda data: bytes(zstd.compress(memoryview(data)))


def granule_offsets(extents: npt.NDArray[np.int64], granule: int) -> npt.NDArray[np.int64]:
    """Return the offset of each granule of some extents; the last granule may be partial."""
    counts = -(-extents[:, 1] // granule)
    before = np.cumsum(counts) - counts
    offsets: npt.NDArray[np.int64] = (
        np.repeat(extents[:, 0], counts) + (np.arange(counts.sum()) - np.repeat(before, counts)) * granule
    )
    return offsets


def granules_of(extents: npt.NDArray[np.int64], granule: int, nbytes: int) -> DirtyPages:
    """Return the granules of some extents of a memory of so many bytes."""
    runs = np.stack([extents[:, 0] // granule, -(-extents[:, 1] // granule)], axis=1)
    return DirtyPages.from_runs(runs, -(-nbytes // granule))
