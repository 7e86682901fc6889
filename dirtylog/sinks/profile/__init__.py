"""The profiler: which of a process's own mappings get dirty, and how fast."""

from __future__ import annotations

from dirtylog._public import publish
from dirtylog.sinks.profile.account import Hot, Profile, Snapshots
from dirtylog.sinks.profile.profiler import Profiler
from dirtylog.sinks.profile.sampler import Sampler

__all__ = ["Hot", "Profile", "Profiler", "Sampler", "Snapshots"]

publish(__name__, globals(), __all__)
