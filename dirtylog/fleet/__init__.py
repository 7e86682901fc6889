"""Epochs over many workers: every shard of an array at one moment, committed once to a store."""

from __future__ import annotations

from dirtylog._public import publish
from dirtylog.fleet.array import ShardedArray
from dirtylog.fleet.coordinator import Committed, Coordinator, Reborn
from dirtylog.fleet.threads import Threads
from dirtylog.sinks.store.participant import Participant, Prepared, Standing

__all__ = ["Committed", "Coordinator", "Participant", "Prepared", "Reborn", "ShardedArray", "Standing", "Threads"]

publish(__name__, globals(), __all__)
