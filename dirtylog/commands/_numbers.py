"""Numbers on the command line: read, held to their bounds, refused by name before anything has begun."""

from __future__ import annotations

import argparse
import math
import threading
from collections.abc import Callable
from typing import Any

__all__ = ["LONGEST", "at_least", "more_than"]

# Nothing can wait for longer: about 292 years.
LONGEST = threading.TIMEOUT_MAX


def at_least(low: float, kind: Callable[[str], Any], high: float = math.inf) -> Callable[[str], Any]:
    """Make the `type` of an option whose number is `low` or more, and `high` or less."""

    def read(text: str) -> Any:
        value = _number(text, kind)
        if value < low:
            raise argparse.ArgumentTypeError(f"{text} is too small; it must be at least {low:g}")
        if value > high:
            raise argparse.ArgumentTypeError(f"{text} is too large; it must be at most {high:.10g}")
        return value

    return read


def more_than(low: float, kind: Callable[[str], Any], high: float = math.inf) -> Callable[[str], Any]:
    """Make the `type` of an option whose number is larger than `low`, and `high` or less."""
    bounded = at_least(low, kind, high)

    def read(text: str) -> Any:
        value = bounded(text)
        if value == low:
            raise argparse.ArgumentTypeError(f"{text} is too small; it must be more than {low:g}")
        return value

    return read


def _number(text: str, kind: Callable[[str], Any]) -> Any:
    whole = "a whole number" if kind is int else "a number"
    try:
        value = kind(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not {whole}") from None
    if isinstance(value, float) and not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text} is not {whole} that is finite")
    return value
