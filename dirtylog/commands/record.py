"""Run a program, or watch one that runs, and record which pages it writes, as a trace.

It runs as it would without: same output, same exit code, and no code of ours in it.
The trace is complete when it has ended, however that was, or when the time is over;
"dirtylog rate" and "dirtylog report" read it.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING

from dirtylog.commands._program import add_program_arguments, record_program
from dirtylog.commands._refusal import Misunderstood
from dirtylog.commands._terminal import printable

if TYPE_CHECKING:
    from dirtylog.sinks.profile import Sampler

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--json", action="store_true", help="say what was recorded as JSON, on the error stream")
    # The first of the program's words: as an argument of its own it would take the "--" that may come after it.
    add_program_arguments(parser, before="TRACE", about="the Parquet file to write, ")


def run(args: argparse.Namespace) -> int:
    """Watch the program and record it."""
    words = args.program[args.program[:1] == ["--"] :]
    if not words:
        raise Misunderstood("there is no trace to write: name a file after the options, and then the program")
    args.trace, args.program = words[0], words[1:]

    def report(sampler: Sampler, missed: str | None) -> None:
        if args.json:
            profile = sampler.profile()
            summary = {
                "trace": args.trace,
                "seconds": profile.seconds,
                "samples": profile.samples,
                "dirtied_bytes": profile.dirtied_bytes,
                "exact": profile.exact,
                "missed": missed,
            }
            print(json.dumps(summary), file=sys.stderr, flush=True)
        elif missed:
            print(f"dirtylog: not complete: {printable(missed)}", file=sys.stderr, flush=True)

    return record_program(args, args.trace, report)
