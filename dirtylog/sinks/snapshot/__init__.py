"""Snapshots of memory in plain files: a full one, and chains of diffs that hold only what was dirty.

A snapshot is one file: its pages, and behind them a footer (:mod:`dirtylog.sinks.snapshot.footer`) which says which
pages these are, and vouches for them. A full snapshot has every page at its own offset, so that it can be mapped as the
memory; the pages that it does not hold are zero, and holes. A diff has its pages one after the other
(:mod:`dirtylog.sinks.snapshot.layout`); the others are the parent's. A page of a diff that has become zero is held, as
written zeros. The footer's page set decides, not the holes: file systems report data in blocks that may be coarser than
a page, and a copy of the file may turn zeros into holes.

A file appears whole or not at all (:mod:`dirtylog.sinks.snapshot.staged`). Any number of readers and writers, in any
number of processes: a reader that has opened a file has all of it, and of two writers of one name one is told that
the other was first.
"""

from __future__ import annotations

from dirtylog._public import publish
from dirtylog.sinks.snapshot.chain import Info
from dirtylog.sinks.snapshot.footer import SnapshotError
from dirtylog.sinks.snapshot.mapped import Mapped, open
from dirtylog.sinks.snapshot.overlay import flatten, rebase
from dirtylog.sinks.snapshot.parts import read
from dirtylog.sinks.snapshot.reader import info, restore, verify
from dirtylog.sinks.snapshot.upkeep import Entry, Pruned, catalog, clean, merge, prune
from dirtylog.sinks.snapshot.writer import save, save_diff

__all__ = [
    "Entry",
    "Info",
    "Mapped",
    "Pruned",
    "SnapshotError",
    "catalog",
    "clean",
    "flatten",
    "info",
    "merge",
    "open",
    "prune",
    "read",
    "rebase",
    "restore",
    "save",
    "save_diff",
    "verify",
]

publish(__name__, globals(), __all__)
