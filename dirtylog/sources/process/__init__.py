"""Any process: which pages of its memory a running program writes, seen from outside and without its help."""

from __future__ import annotations

from dirtylog._public import publish
from dirtylog.sources.process.attaching import attach
from dirtylog.sources.process.process import Process
from dirtylog.sources.process.regions import Area, Region

__all__ = ["Area", "Process", "Region", "attach"]

publish(__name__, globals(), ["Area", "Region"])
publish("dirtylog", globals(), ["Process", "attach"])
