"""Epochs in a store of chunks: which chunks of an array are dirty, and each epoch as one snapshot of a repository."""

from __future__ import annotations

from dirtylog._public import publish
from dirtylog.sinks.store.advice import Advice, advise_chunks
from dirtylog.sinks.store.branch import BranchMoved, InDoubt, Version, history, repository, restore, state_of
from dirtylog.sinks.store.chunks import ChunkMap
from dirtylog.sinks.store.mirror import Mirror
from dirtylog.sinks.store.parts import default_chunks
from dirtylog.sinks.store.sink import Saved, StoreSink

__all__ = [
    "Advice",
    "BranchMoved",
    "ChunkMap",
    "InDoubt",
    "Mirror",
    "Saved",
    "StoreSink",
    "Version",
    "advise_chunks",
    "default_chunks",
    "history",
    "repository",
    "restore",
    "state_of",
]

publish(__name__, globals(), __all__)
