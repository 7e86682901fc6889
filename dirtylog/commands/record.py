"""Run a Python program and record which pages it writes, as a trace.

The program runs as "python script.py args" would run it. The trace is complete
when the program has ended; "dirtylog rate" and "dirtylog report" read it.
"""

from __future__ import annotations

import argparse
import json
import sys

from dirtylog.commands._script import add_script_arguments, run_script

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("trace", help="the Parquet file to write")
    parser.add_argument("--json", action="store_true", help="say what was recorded as JSON, on the error stream")
    add_script_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Run the program and record it."""
    import mmap

    from dirtylog.sinks.profile import Profiler
    from dirtylog.sinks.trace import Recorder

    recorder = Recorder(args.trace, 0, mmap.PAGESIZE)
    profiler = Profiler(interval=args.interval, on_sample=recorder.write)

    def after() -> None:
        profile = profiler.stop()
        recorder.regions.update(profiler.regions)
        recorder.close()
        if args.json:
            summary = {
                "trace": args.trace,
                "seconds": profile.seconds,
                "samples": profile.samples,
                "dirtied_bytes": profile.dirtied_bytes,
                "exact": profile.exact,
            }
            print(json.dumps(summary), file=sys.stderr, flush=True)

    return run_script(args.script, args.args, before=profiler.start, after=after)
