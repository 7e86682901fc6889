"""What the commands that read a trace ask for: the trace, and the migration that is asked about."""

from __future__ import annotations

import argparse

from dirtylog.commands._numbers import at_least, more_than

__all__ = ["add_migration_arguments"]


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
