"""Epochs in a store of chunks: which chunks of an array are dirty."""

from __future__ import annotations

from dirtylog._public import publish
from dirtylog.sinks.store.chunks import ChunkMap

__all__ = ["ChunkMap"]

publish(__name__, globals(), __all__)
