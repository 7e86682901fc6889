"""A screen that is drawn again and again, and the keys that are pressed meanwhile."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from dirtylog.sources._ready import ready

__all__ = ["keys_in", "keys_until", "raw_keys"]

# What terminals send for keys that have no character: CSI or SS3 sequences, as xterm's ctlseqs names them.
_SEQUENCE = re.compile(r"\x1b[\[O][0-9;]*[A-Za-z~]|.", re.DOTALL)
_NAMES = {"A": "up", "B": "down", "C": "right", "D": "left"}
_CHARACTERS = {"\r": "enter", "\n": "enter", "\x1b": "escape", "\x7f": "escape"}


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


def keys_in(text: str) -> list[str]:
    """Tell the keys in what a terminal has sent: characters, or ``"up"``, ``"down"``, ``"enter"``, ``"escape"``, ...

    Examples
    --------
    >>> keys_in("q\\x1b[A\\x1bOB\\r")
    ['q', 'up', 'down', 'enter']
    """
    found = []
    for part in _SEQUENCE.findall(text):
        if len(part) == 1:
            found.append(_CHARACTERS.get(part, part))
        elif part[-1] in _NAMES:
            found.append(_NAMES[part[-1]])
    return found


def keys_until(moment: float, listening: bool) -> Iterator[str]:
    """Yield the keys that are pressed until a moment of `time.monotonic`; without a terminal just wait."""
    while (left := moment - time.monotonic()) > 0:
        if listening and ready([sys.stdin.fileno()], left):
            # Past Python's buffer: what is left in that, no waiting for the descriptor would tell of.
            text = os.read(sys.stdin.fileno(), 1024).decode(errors="replace")
            listening = bool(text)
            yield from keys_in(text)
        elif not listening:
            time.sleep(left)
