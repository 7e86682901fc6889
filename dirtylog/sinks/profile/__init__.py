"""The profiler: which of a process's own mappings get dirty, and how fast."""

from __future__ import annotations

from dirtylog._public import publish
from dirtylog.sinks.profile.profiler import Hot, Profile, Profiler, Snapshots

__all__ = ["Hot", "Profile", "Profiler", "Snapshots"]

publish(__name__, globals(), __all__)
