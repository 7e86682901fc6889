"""Read a trace or a fleet's, or watch a process: how fast memory got dirty, and whether a migration would converge."""

from __future__ import annotations

import argparse
import os
import sys
from collections import deque
from dataclasses import asdict
from typing import TYPE_CHECKING

from dirtylog.commands._fleet import add_fleet_arguments, check_no_fleet, sweep_fleet
from dirtylog.commands._monitor import meter_guest
from dirtylog.commands._numbers import more_than
from dirtylog.commands._program import add_memory_arguments, add_watch_arguments, record_program
from dirtylog.commands._refusal import Misunderstood
from dirtylog.commands._terminal import printable
from dirtylog.commands._trace import add_migration_arguments, show_forecasts

if TYPE_CHECKING:
    from dirtylog.sinks.trace.playback import Sample

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add_migration_arguments(parser, optional=True)
    parser.add_argument(
        "--window",
        type=more_than(0, float),
        nargs="+",
        default=[1.0, 10.0, 60.0],
        metavar="SECONDS",
        help="windows at the end of the trace to give the working set of; the trace comes before it",
    )

    parser.add_argument("--pid", type=int, help="watch this running process now, instead of reading a trace")
    parser.add_argument("--qmp", metavar="ADDRESS", help="have a QEMU measure its guest: its monitor, a Unix socket")
    parser.add_argument(
        "--mode",
        default="page-sampling",
        choices=("page-sampling", "dirty-bitmap", "dirty-ring"),
        help="with --qmp: how QEMU measures; all but page-sampling need KVM",
    )
    parser.add_argument("--seconds", type=int, default=1, help="with --qmp: how long, from 1 to 60 (1)")
    add_memory_arguments(parser)
    add_watch_arguments(parser)
    add_fleet_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Meter the trace, or record one of a process first."""
    if args.fleet is not None:
        if any(each is not None for each in (args.trace, args.pid, args.qmp, args.agent)):
            raise Misunderstood("name a trace, a running process by --pid, or a fleet by --fleet: one of them")
        return sweep_fleet(args)
    check_no_fleet(args)
    if args.qmp is not None:
        if args.trace is not None or args.pid is not None:
            raise Misunderstood("name a trace, a running process by --pid, or a QEMU by --qmp: one of them")
        return meter_guest(args)
    if (args.trace is None) == (args.pid is None):
        raise Misunderstood("name a trace, or a running process by --pid: one of them")
    if args.pid is None:
        if args.agent is not None:
            raise Misunderstood("--agent is about a running process; name one by --pid")
        return meter(args)
    from tempfile import TemporaryDirectory

    missed: list[str | None] = []
    # What record_program asks of a command line: there is no program to start.
    args.program, args.module, args.code, args.arrays = [], None, None, False
    with TemporaryDirectory(prefix="dirtylog-rate-") as directory:
        args.trace = os.path.join(directory, f"process-{args.pid}")
        record_program(args, args.trace, lambda _, why: missed.append(why))
        code = meter(args)
    if missed and missed[0]:
        print(f"dirtylog: not complete: {printable(missed[0])}", file=sys.stderr)
    return code


def meter(args: argparse.Namespace) -> int:
    """Meter the trace, and forecast a migration for each bandwidth."""
    from collections import Counter

    from dirtylog.commands import _terminal
    from dirtylog.sinks.rate import Peak
    from dirtylog.sinks.trace import Trace, what_if
    from dirtylog.sinks.trace.playback import samples, working_set

    nbytes, seconds, apart = 0, 0.0, {"start": 0, "end": 0}
    regions: Counter[str] = Counter()
    last: deque[Sample] = deque()
    with Trace(args.trace) as trace:
        begins, ends = trace.program
        peak = Peak(begins)
        forecasts = [what_if(trace, bandwidth, args.downtime) for bandwidth in args.bandwidth]
        for sample in samples(trace):
            size = sample.runs.count * trace.page_size
            nbytes += size
            if sample.end <= begins:
                apart["start"] += size
            elif sample.start >= ends:
                apart["end"] += size
            else:
                peak.add(sample.end, size)
            regions.update(
                {name: count * trace.page_size for name, count in sample.runs.count_ranges(trace.regions).items()}
            )
            if sample.start < ends:
                last.append(sample)
            while last and last[0].end <= sample.end - max(args.window):
                last.popleft()
            seconds = sample.end
        sets = {window: working_set(last, window) * trace.page_size for window in args.window}
    ran = min(ends, seconds) - begins
    mean = (nbytes - sum(apart.values())) / ran if ran > 0 else 0.0
    lengths = {"start": begins, "end": max(0.0, seconds - ends)}
    if args.json:
        _terminal.show_json(
            {
                "seconds": seconds,
                "bytes": nbytes,
                "bytes_per_second": mean,
                "peak_bytes_per_second": peak.bytes_per_second,
                **{f"{part}_bytes": size for part, size in apart.items()},
                **{f"{part}_seconds": length for part, length in lengths.items()},
                "working_set_bytes": {f"{window:g}": size for window, size in sets.items()},
                "regions_bytes": dict(regions),
                "migrations": [asdict(forecast) for forecast in forecasts],
            }
        )
        return 0
    text = _terminal.bytes_text
    _terminal.show_table(
        f"{os.path.basename(args.trace) if args.pid else args.trace}: {text(nbytes)} dirtied in {seconds:.2f} s",
        ["figure", "value"],
        [
            ["mean per second", text(mean)],
            ["peak per second", text(peak.bytes_per_second)],
            *(
                [f"its {part}, {_terminal.seconds_text(lengths[part])}, in neither of them", text(size)]
                for part, size in apart.items()
                if size
            ),
            *([f"working set of the last {window:g} s", text(size)] for window, size in sets.items()),
            *([name, text(size)] for name, size in regions.most_common(10) if size),
        ],
    )
    show_forecasts(forecasts, args.downtime)
    return 0
