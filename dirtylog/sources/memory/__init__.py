"""This process's own memory: which pages of an array were written, by userfaultfd, by mprotect or by comparing."""

from __future__ import annotations

from dirtylog._public import publish
from dirtylog.sources.memory.arenas import Arena, arena
from dirtylog.sources.memory.arrays import empty, zeros
from dirtylog.sources.memory.tracker import BACKENDS, Tracker, track

__all__ = ["BACKENDS", "Arena", "Tracker", "arena", "empty", "track", "zeros"]

publish("dirtylog", globals(), ["Arena", "Tracker", "arena", "empty", "track", "zeros"])
