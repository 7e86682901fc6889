"""Draw a trace as one HTML page: which memory was written when, how fast, and what snapshots and migrations would cost.

The page is one file that loads nothing from anywhere: send it, print it, look at it
on a phone. The browser draws its charts; drag across time to see one stretch of it in
all of them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from dirtylog.commands._refusal import Misunderstood
from dirtylog.commands._trace import add_migration_arguments

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add_migration_arguments(parser)
    parser.add_argument("--output", metavar="FILE", help="where the page goes (the trace's name with .html)")


def run(args: argparse.Namespace) -> int:
    """Write the page and say where it is."""
    from dirtylog.sinks.report import report_html
    from dirtylog.sinks.trace import Trace

    output = Path(args.output) if args.output else Path(args.trace).with_suffix(".html")
    if output.exists() and output.samefile(args.trace):
        raise Misunderstood(f"{output} is the trace itself, which the page would overwrite; name another by --output")
    with Trace(args.trace) as trace:
        page = report_html(trace, bandwidths=args.bandwidth, downtime=args.downtime)
    output.write_text(page, encoding="utf-8")
    if args.json:
        from dirtylog.commands import _terminal

        _terminal.show_json({"report": str(output), "bytes": len(page.encode())})
    else:
        print(output)
    return 0
