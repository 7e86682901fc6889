"""Run a program, or watch one that runs, and report how fast it dirties memory, and which memory.

It runs as it would without: same output, same exit code, and no code of ours in it.
The report goes to standard error, or to the file that --output names.
"""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from dirtylog.commands._numbers import more_than
from dirtylog.commands._program import add_program_arguments, report_file, watch, write_report

if TYPE_CHECKING:
    from dirtylog import Process
    from dirtylog.sinks.profile import Profile, Sampler
    from dirtylog.sources.process.naming import Names

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--json", action="store_true", help="write the report for a program")
    parser.add_argument("--output", metavar="FILE", help="where the report goes, instead of standard error")
    parser.add_argument(
        "--every", type=seconds_list, default="1,10,60", metavar="SECONDS,...", help="snapshot rhythms (1,10,60)"
    )
    add_program_arguments(parser)


def seconds_list(text: str) -> list[float]:
    """Read numbers of seconds between commas."""
    return [more_than(0, float)(part) for part in text.split(",")]


def run(args: argparse.Namespace) -> int:
    """Watch the program, then report."""
    from dirtylog.sinks.profile import Sampler

    output = report_file(args.output)
    samplers: list[Sampler] = []

    def begin(process: Process, names: Names) -> Sampler:
        samplers.append(Sampler(process, interval=args.interval, every=args.every, names=names))
        return samplers[0]

    def done(missed: str | None) -> None:
        profile = samplers[0].profile()
        if args.json:
            text = json.dumps({**profile.as_dict(), "missed": missed}, indent=2)
        else:
            text = report_text(profile) + (f"\n\nnot complete: {missed}" if missed else "")
        write_report(text, output)

    try:
        return watch(args, begin, done)
    finally:
        if output:
            output.close()


def apart_text(profile: Profile) -> list[str]:
    """Say what was written before the program's own code began, and after it had ended, if that was seen apart."""
    from dirtylog.commands._terminal import bytes_text, seconds_text

    return [
        f"its {name}: {bytes_text(part['dirtied_bytes'])} in the {which} {seconds_text(part['seconds'])}, "
        "in the total and in neither mean nor peak"
        for name, which, part in (("start", "first", profile.starting), ("end", "last", profile.ending))
        if part.get("dirtied_bytes")
    ]


def report_text(profile: Profile) -> str:
    """Lay the report out in plain text."""
    from dirtylog.commands._terminal import bytes_text, plain_table

    bound = "" if profile.exact else "at most "
    overhead = profile.overhead
    lines = [
        f"dirtylog: {bound}{bytes_text(profile.bytes_per_second)} dirtied per second "
        f"(peak {bytes_text(profile.peak_bytes_per_second)}), {bytes_text(profile.dirtied_bytes)} "
        f"in {profile.seconds:.2f} s and {profile.samples} samples",
        *apart_text(profile),
        f"overhead: about {overhead['share']:.1%} ({overhead['first_writes_seconds']:.3f} s in first writes to pages), "
        f"and {overhead['sampling_seconds']:.3f} s of sampling beside it",
        "",
        plain_table(
            "An incremental snapshot",
            ["every", "mean", "largest", "seen"],
            [
                [f"{s.every:g} s", bytes_text(s.mean_bytes), bytes_text(s.max_bytes), str(s.count)]
                if s.count
                else [f"{s.every:g} s", "-", "-", "watched for less"]
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
