"""What the commands that read a trace ask for: the trace, and the migration that is asked about."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dirtylog.commands._numbers import at_least, more_than

if TYPE_CHECKING:
    from dirtylog.sinks.forecast import Forecast

__all__ = ["add_migration_arguments", "show_forecasts"]


def add_migration_arguments(parser: argparse.ArgumentParser, *, optional: bool = False) -> None:
    """Declare the trace, and the migration that is asked about."""
    parser.add_argument("trace", nargs="?" if optional else None, help="a trace that 'dirtylog record' wrote")
    parser.add_argument(
        "--bandwidth",
        type=more_than(0, float),
        nargs="+",
        default=[1.25e8, 1.25e9],
        metavar="BYTES",
        help="bytes per second to forecast a migration for (1.25e8 1.25e9); the trace comes before it",
    )
    parser.add_argument(
        "--downtime", type=at_least(0, float), default=0.3, metavar="SECONDS", help="pause that is allowed (0.3)"
    )
    parser.add_argument("--json", action="store_true", help="print the answers for a program")


def show_forecasts(forecasts: Sequence[Forecast], downtime: float) -> None:
    """Print what would become of a migration at each bandwidth."""
    from dirtylog.commands import _terminal

    _terminal.show_table(
        f"Migration with at most {downtime:g} s of pause",
        ["bandwidth", "verdict", "rounds", "seconds", "pause"],
        [
            [
                f"{_terminal.bytes_text(f.bandwidth)}/s",
                f.verdict,
                str(len(f.rounds)),
                f"{f.seconds:.3f}",
                f"{f.downtime:.3f}",
            ]
            for f in forecasts
        ],
        left=2,
    )
