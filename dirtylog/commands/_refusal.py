"""What a command refuses in a sentence: words that do not go together, and what the library or a store says no to."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from dirtylog.errors import DirtyLogError

__all__ = ["Misunderstood", "refusing"]


class Misunderstood(DirtyLogError):
    """The words of the command line do not go together: exit code 2, as if one of them were unknown."""


@contextmanager
def refusing(way_out: str = "") -> Iterator[None]:
    """Let the library's errors about arguments be errors of the command: the arguments are what the user typed.

    So are those of a store, which are of its package, and drawings of many lines.
    """
    try:
        yield
    except Exception as error:
        icechunk = sys.modules.get("icechunk")
        if icechunk is not None and isinstance(error, icechunk.IcechunkError):  # which may be a KeyError, too
            lines = [line.strip(" \t|x`->") for line in str(error).splitlines()]
            said = f"the store refused: {next(filter(None, lines), type(error).__name__)}"
        elif isinstance(error, KeyError | ValueError):
            # The text of a KeyError is the repr of what was missing.
            said = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
        else:
            raise
        raise DirtyLogError(f"{said}{way_out}") from error
