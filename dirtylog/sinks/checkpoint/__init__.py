"""Checkpoints of named arrays: one call writes what changed in all of them since the last one, or nothing."""

from __future__ import annotations

from dirtylog._public import publish
from dirtylog.sinks.checkpoint.checkpoint import Checkpoint

__all__ = ["Checkpoint"]

publish(__name__, globals(), __all__)
