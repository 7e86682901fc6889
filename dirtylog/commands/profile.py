"""Run a Python program and report how fast it dirties memory, and which memory.

The program runs as "python script.py args" would run it: same output, same exit
code. The report goes to standard error, or to the file that --output names.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from dirtylog.commands._numbers import more_than
from dirtylog.commands._script import add_script_arguments, run_script

if TYPE_CHECKING:
    from dirtylog.sinks.profile import Profile

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--json", action="store_true", help="write the report for a program")
    parser.add_argument("--output", metavar="FILE", help="where the report goes, instead of standard error")
    parser.add_argument(
        "--every", type=seconds_list, default="1,10,60", metavar="SECONDS,...", help="snapshot rhythms (1,10,60)"
    )
    add_script_arguments(parser)


def seconds_list(text: str) -> list[float]:
    """Read numbers of seconds between commas."""
    return [more_than(0, float)(part) for part in text.split(",")]


def run(args: argparse.Namespace) -> int:
    """Run the program, then report."""
    from dirtylog.sinks.profile import Profiler

    profiler = Profiler(interval=args.interval, every=args.every)

    def after() -> None:
        profile = profiler.stop()
        text = json.dumps(profile.as_dict(), indent=2) if args.json else report_text(profile)
        if args.output:
            Path(args.output).write_text(text + "\n", encoding="utf-8")
        else:
            print(text, file=sys.stderr, flush=True)

    return run_script(args.script, args.args, before=profiler.start, after=after)


def report_text(profile: Profile) -> str:
    """Lay the report out in plain text."""
    from dirtylog.commands._terminal import bytes_text, plain_table

    bound = "" if profile.exact else "at most "
    overhead = profile.overhead
    lines = [
        f"dirtylog: {bound}{bytes_text(profile.bytes_per_second)} dirtied per second "
        f"(peak {bytes_text(profile.peak_bytes_per_second)}), {bytes_text(profile.dirtied_bytes)} "
        f"in {profile.seconds:.2f} s and {profile.samples} samples",
        f"overhead: about {overhead['share']:.1%} ({overhead['sampling_seconds']:.3f} s of sampling, "
        f"{overhead['first_writes_seconds']:.3f} s in first writes to pages)",
        "",
        plain_table(
            "An incremental snapshot",
            ["every", "mean", "largest", "seen"],
            [
                [f"{s.every:g} s", bytes_text(s.mean_bytes), bytes_text(s.max_bytes), str(s.count)]
                if s.count
                else [f"{s.every:g} s", "-", "-", "the program ended sooner"]
                for s in profile.snapshots
            ],
        ),
        "",
        plain_table(
            "Hot mappings",
            ["what", "address", "size", "dirtied", "share"],
            [
                [m.name, f"{m.address:#x}", bytes_text(m.size), bytes_text(m.dirtied_bytes), f"{m.share:.1%}"]
                for m in profile.mappings[:10]
            ],
            left=2,
        ),
    ]
    return "\n".join(lines)
