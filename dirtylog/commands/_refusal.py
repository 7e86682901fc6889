"""What a command refuses in a sentence: words that do not go together, and arguments to which the library says no."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from dirtylog.errors import DirtyLogError

__all__ = ["Misunderstood", "refusing"]


class Misunderstood(DirtyLogError):
    """The words of the command line do not go together: exit code 2, as if one of them were unknown."""


@contextmanager
def refusing(way_out: str = "") -> Iterator[None]:
    """Let the library's errors about arguments be errors of the command: the arguments are what the user typed."""
    try:
        yield
    except (KeyError, ValueError) as error:
        # The text of a KeyError is the repr of what was missing.
        said = error.args[0] if isinstance(error, KeyError) and error.args else error
        raise DirtyLogError(f"{said}{way_out}") from error
