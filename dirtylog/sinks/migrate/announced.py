"""What a sender announces: what of it cannot be is refused, and for the rest there is made room."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from dirtylog._bits.pages import check_geometry
from dirtylog.sinks.migrate.filling import Filling
from dirtylog.sinks.migrate.origins import room
from dirtylog.sinks.migrate.payloads import HELLO, MIN_PAGE_SIZE, RAW, ZSTD, compressor
from dirtylog.sinks.migrate.share import MAX_CHANNELS
from dirtylog.sinks.migrate.wire import MAX_LAYOUT, WireError
from dirtylog.sinks.snapshot.footer import MAX_PAGE_SIZE
from dirtylog.sinks.snapshot.space import Space

if TYPE_CHECKING:
    from dirtylog._typing import Memory

__all__ = ["filling_of", "layout_bytes"]


def layout_bytes(hello: bytes) -> int:
    """Return how long the text of the layout is that a HELLO announces."""
    if len(hello) != HELLO.size:
        raise WireError(f"a HELLO frame of {len(hello)} bytes")
    said = HELLO.unpack(hello)
    *_, channels, _, length = said
    if HELLO.pack(*said) != hello:
        raise WireError("the sender announces something that this side does not know")
    if length > MAX_LAYOUT:
        raise WireError(f"the sender announces a layout of {length} bytes; at most {MAX_LAYOUT}")
    if channels == 1 or channels > MAX_CHANNELS:
        raise WireError(f"the sender announces {channels} channels; it must be 0, for one, or 2 to {MAX_CHANNELS}")
    return int(length)


def filling_of(
    said: bytes, out: Memory | Mapping[str, Memory] | Callable[[int], Memory] | None, limit: int
) -> tuple[Any, Filling]:
    """Check what is coming, and make room for it."""
    _, nbytes, page_size, codec, channels, postcopy, _ = HELLO.unpack_from(said)
    try:
        check_geometry(-(-nbytes // max(page_size, 1)), page_size)
    except ValueError as error:
        raise WireError(f"the sender announces impossible memory: {error}") from None
    if not 1 <= nbytes < 1 << 62 or not MIN_PAGE_SIZE <= page_size <= MAX_PAGE_SIZE or codec not in (RAW, ZSTD):
        raise WireError(f"the sender announces {nbytes} bytes in pages of {page_size}, codec {codec}")
    if codec == ZSTD:
        compressor()
    if postcopy and page_size < mmap.PAGESIZE:
        raise WireError(f"the sender announces pages of {page_size} bytes; postcopy takes {mmap.PAGESIZE} or more")
    # Whole pages of the system's own.
    made = _pages if postcopy and out is None else out
    result, space = room(nbytes, page_size, said[HELLO.size :], made, limit)
    if postcopy and out is not None:
        _check_private(space)
    # A command's way to make room knows that it is zero; of anybody else's nobody does.
    fresh = out is None or getattr(out, "zeros", None) is True
    return result, Filling(space, page_size, codec, channels or 1, fresh=fresh, postcopy=postcopy)


def _pages(nbytes: int) -> Memory:
    """Return new memory that begins with a page of the system's."""
    return np.frombuffer(mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), np.uint8)


def _check_private(space: Space) -> None:
    """Refuse memory that cannot be guarded page by page: shared with somebody, a file's, or a part of a page."""
    for region in space.regions:
        start = region.address
        if start % mmap.PAGESIZE or (start + region.nbytes) % mmap.PAGESIZE:
            raise WireError("postcopy needs whole pages of the system's: out is dirtylog.zeros(...), say")
        mappings = region.mappings()
        # Where the system does not tell, nobody knows (I6). Huge pages of the system's own kind are a file's, too.
        private = [mapping.permissions.endswith("p") and not mapping.file[2] for mapping in mappings]
        if not all(private) or (region.nbytes and not mappings):
            raise WireError("postcopy needs private anonymous memory: out is dirtylog.zeros(...), say")
