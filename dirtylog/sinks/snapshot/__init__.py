"""Snapshots of memory in plain sparse files: a full one, and chains of diffs that hold only what was dirty.

A snapshot is two files in one directory: the data, every page at its own offset so that it can be mapped, and
``NAME.json``, the sidecar (:mod:`dirtylog.sinks.snapshot.sidecar`), which says which pages the data holds. In a full
snapshot the other pages are zero, in a diff they are the parent's; either way they are holes. A page of a diff that has
become zero is held, as written zeros. The sidecar's page set decides, not the holes: file systems report data in blocks
that may be coarser than a page, and a copy of the file may turn zeros into holes.

Both files appear together or not at all (:mod:`dirtylog.sinks.snapshot.staged`). One writer at a time for a name; any
number of readers.
"""

from __future__ import annotations

from dirtylog._public import publish
from dirtylog.sinks.snapshot.chain import Info
from dirtylog.sinks.snapshot.overlay import rebase
from dirtylog.sinks.snapshot.reader import info, restore, verify
from dirtylog.sinks.snapshot.sidecar import SnapshotError
from dirtylog.sinks.snapshot.writer import save, save_diff

__all__ = ["Info", "SnapshotError", "info", "rebase", "restore", "save", "save_diff", "verify"]

publish(__name__, globals(), __all__)
