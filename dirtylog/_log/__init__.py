"""The steps of a log that no signal handler may divide: each is one call into C."""

from __future__ import annotations
