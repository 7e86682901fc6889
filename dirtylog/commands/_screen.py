"""A screen that is drawn again and again, and the keys that are pressed meanwhile."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from dirtylog.sources._ready import ready

__all__ = ["keys_until", "raw_keys"]


@contextmanager
def raw_keys() -> Iterator[bool]:
    """Get keys one by one and unechoed, if standard input is a terminal; yield whether it is.

    Ctrl-C interrupts as ever, and the terminal is put back whatever happens.
    """
    try:
        import termios
        import tty

        if not sys.stdin.isatty():
            raise OSError("standard input is not a terminal")
        before = termios.tcgetattr(sys.stdin)
    except (ImportError, OSError, ValueError, AttributeError):
        yield False
        return
    try:
        tty.setcbreak(sys.stdin)
        yield True
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


def keys_until(moment: float, listening: bool) -> Iterator[str]:
    """Yield the keys that are pressed until a moment of `time.monotonic`; without a terminal just wait."""
    while (left := moment - time.monotonic()) > 0:
        if not listening:
            time.sleep(left)
            return
        if ready([sys.stdin.fileno()], left):
            key = sys.stdin.read(1)
            if not key:
                return
            yield key
