"""Migration: memory goes over a socket round by round while it is written, until the rest fits the downtime.

Each round collects an epoch first and copies its pages afterwards (I3): what is written during the copy is in the next
epoch. The first round sends everything; zero pages go as a range, without data. The source is paused for the last
round only; with postcopy the copy runs during that one, and what it touches comes first. A migration that fails makes
every page it had taken dirty again, and the source goes on as if nothing had been.
"""

from __future__ import annotations

from dirtylog._public import publish
from dirtylog.sinks.migrate.control import Control
from dirtylog.sinks.migrate.door import Listener, connect
from dirtylog.sinks.migrate.keys import Keys
from dirtylog.sinks.migrate.limit import DirtyLimit
from dirtylog.sinks.migrate.policy import MigrationError, NotConverging, Policy, Result, Round
from dirtylog.sinks.migrate.porter import ListenerProcess
from dirtylog.sinks.migrate.receiver import receive
from dirtylog.sinks.migrate.sender import send
from dirtylog.sinks.migrate.sessions import Status, status
from dirtylog.sinks.migrate.settling import settle

__all__ = [
    "Control",
    "DirtyLimit",
    "Keys",
    "Listener",
    "ListenerProcess",
    "MigrationError",
    "NotConverging",
    "Policy",
    "Result",
    "Round",
    "Status",
    "connect",
    "receive",
    "send",
    "settle",
    "status",
]

publish(__name__, globals(), __all__)
