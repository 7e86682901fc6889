"""Checkpoints of named arrays: one call writes what changed in all of them since the last one, or nothing."""

from __future__ import annotations

from dirtylog._public import publish
from dirtylog.sinks.checkpoint.checkpoint import Checkpoint
from dirtylog.sinks.checkpoint.directory import Change, Record
from dirtylog.sinks.checkpoint.export import export

__all__ = ["Change", "Checkpoint", "Record", "export"]

publish(__name__, globals(), __all__)
