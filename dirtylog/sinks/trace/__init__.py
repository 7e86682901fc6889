"""Traces: record a source, replay what was recorded into any sink, and ask what a migration would have done."""

from __future__ import annotations

from dirtylog._public import publish
from dirtylog.sinks.trace.layout import TraceError
from dirtylog.sinks.trace.playback import replay, what_if
from dirtylog.sinks.trace.reader import Trace, TraceEpoch
from dirtylog.sinks.trace.recorder import Recorder, record

__all__ = ["Recorder", "Trace", "TraceEpoch", "TraceError", "record", "replay", "what_if"]

publish(__name__, globals(), __all__)
