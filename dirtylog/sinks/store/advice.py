"""Which chunks an array should have, from what has been seen to be written to it."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, SupportsIndex

from dirtylog._bits.pages import DirtyPages
from dirtylog.sinks.store.chunks import ChunkMap
from dirtylog.sinks.store.parts import chunks_within, written
from dirtylog.sinks.store.zarrs import AT_ONCE

__all__ = ["Advice", "advise_chunks"]

SIZES = [1 << power for power in range(14, 24)]


@dataclass(frozen=True, slots=True)
class Advice:
    """What an epoch costs on the average with chunks of one shape.

    Attributes
    ----------
    chunks : tuple of int
        The shape.
    nbytes : float
        Bytes written per epoch, before compression.
    requests : float
        Chunks written per epoch: each is a request.
    amplification : float
        Bytes written for each dirty byte.
    seconds : float
        Estimated time per epoch, from the latency and the bandwidth that were given.
    chunk_count : int
        Chunks of the whole array: what the store's manifest has to list.
    """

    chunks: tuple[int, ...]
    nbytes: float
    requests: float
    amplification: float
    seconds: float
    chunk_count: int


def advise_chunks(
    epochs: Iterable[Any],
    shape: Sequence[SupportsIndex],
    itemsize: SupportsIndex,
    *,
    offset: SupportsIndex = 0,
    candidates: Iterable[Sequence[SupportsIndex]] | None = None,
    latency: float = 0.03,
    bandwidth: float = 1e8,
) -> list[Advice]:
    """Rank shapes of chunks by what the epochs of a trace would have cost.

    Parameters
    ----------
    epochs : iterable of DirtyPages or TraceEpoch
        What was dirty: ``trace.epochs()`` of a :class:`dirtylog.sinks.trace.Trace`, or harvests of your own.
    shape : sequence of int
        Of the array.
    itemsize : int
        Bytes per item.
    offset : int
        Where the array begins in the memory that the pages are of, in bytes.
    candidates : iterable of sequences of int, optional
        Shapes to compare; by default those whose bytes lie together, of 16 KiB to 8 MiB.
    latency : float
        Seconds that the store takes for one request; 32 are under way at once.
    bandwidth : float
        Bytes per second to the store, all requests together.

    Returns
    -------
    list of Advice
        The cheapest first. Of chunks that cost nearly the same, prefer the larger: a manifest lists every one.

    Raises
    ------
    ValueError
        There are no epochs, or a number will not do.

    Notes
    -----
    O(epochs times candidates times runs of pages).

    Examples
    --------
    >>> import dirtylog as dl
    >>> from dirtylog.sinks.store import advise_chunks
    >>> epochs = [dl.DirtyPages.from_indices([7, 5000, 20000], 32768)]  # of an array of 128 MiB
    >>> best = advise_chunks(epochs, (8192, 4096), 4)[0]
    >>> best.chunks, best.requests
    ((1, 4096), 3.0)
    """
    sizes, item = tuple(map(operator.index, shape)), operator.index(itemsize)
    if latency < 0 or not bandwidth > 0:
        raise ValueError(f"latency is {latency} and bandwidth {bandwidth}; they must be at least 0 and above 0")
    if candidates is None:
        shapes = [chunks_within(limit, sizes, item) for limit in SIZES]
    else:
        shapes = [tuple(map(operator.index, each)) for each in candidates]
    maps = [ChunkMap(sizes, chunks, item, offset=offset) for chunks in dict.fromkeys(shapes)]
    nbytes, requests, dirty, seen = [0] * len(maps), [0] * len(maps), 0, 0
    for each in epochs:
        pages = each if isinstance(each, DirtyPages) else each.pages
        seen += 1
        dirty += pages.nbytes
        for number, chunks in enumerate(maps):
            _, count, size = written(chunks, chunks.of_pages(pages))
            nbytes[number] += size
            requests[number] += count
    if not seen:
        raise ValueError("there are no epochs; advice is from what was seen to be written")
    found_advice = [
        Advice(
            chunks=chunks.chunks,
            nbytes=nbytes[number] / seen,
            requests=requests[number] / seen,
            amplification=nbytes[number] / dirty if dirty else 0.0,
            seconds=(requests[number] * latency / AT_ONCE + nbytes[number] / bandwidth) / seen,
            chunk_count=chunks.count,
        )
        for number, chunks in enumerate(maps)
    ]
    return sorted(found_advice, key=lambda advice: (advice.seconds, advice.chunk_count))
