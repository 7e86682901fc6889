"""What ``dirtylog rate --fleet`` prints: the traces of many machines, and what a policy would do to all of them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from dirtylog.commands._numbers import more_than
from dirtylog.commands._refusal import Misunderstood, refusing
from dirtylog.errors import BackendUnavailable

if TYPE_CHECKING:
    from dirtylog.fleet.traces import Sweep

__all__ = ["add_fleet_arguments", "check_no_fleet", "sweep_fleet"]

# Options that are about a fleet alone.
ITS_OWN = ("every", "chunk", "scheduler")


def add_fleet_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the place of the traces, and the policies that are asked about."""
    parser.add_argument(
        "--fleet", metavar="PLACE", help="sweep the traces of many machines: a directory, or s3://bucket/prefix"
    )
    parser.add_argument(
        "--every",
        type=more_than(0, float),
        nargs="+",
        metavar="SECONDS",
        help="with --fleet: intervals from one save to the next (10 60 600)",
    )
    parser.add_argument(
        "--chunk",
        type=more_than(0, int),
        nargs="+",
        metavar="BYTES",
        help="with --fleet: sizes of the chunks that are saved (65536 262144 1048576)",
    )
    parser.add_argument("--scheduler", metavar="ADDRESS", help="with --fleet: have a Dask cluster read the traces")


@contextmanager
def _cluster(address: str | None) -> Iterator[Any]:
    if address is None:
        yield None
        return
    try:
        from distributed import Client
    except ImportError as error:
        raise BackendUnavailable("Dask", f"import distributed: {error}", "pip install distributed") from None
    connect: Any = Client
    with connect(address) as client:
        yield client


def sweep_fleet(args: argparse.Namespace) -> int:
    """Sweep the traces, and print what they say."""
    from dirtylog.commands import _terminal
    from dirtylog.fleet.traces import sweep

    asked = {"intervals": args.every, "chunk_sizes": args.chunk}
    asked = {name: given for name, given in asked.items() if given is not None}
    with refusing(), _cluster(args.scheduler) as pool:
        found = sweep(args.fleet, bandwidths=args.bandwidth, downtimes=[args.downtime], pool=pool, **asked)
    if args.json:
        _terminal.show_json(
            {
                "machines": [
                    {**asdict(machine), "about": dict(machine.about), "bytes_per_second": machine.bytes_per_second}
                    for machine in found.machines
                ],
                "left_out": dict(found.left_out),
                "migrations": [asdict(each) for each in found.migrations],
                "savings": [asdict(each) for each in found.savings],
            }
        )
        return 0
    for name, why in found.left_out.items():
        print(f"dirtylog: left out: {_terminal.printable(name)}: {_terminal.printable(why)}", file=sys.stderr)
    _show(args.fleet, found, args.downtime)
    return 0


def check_no_fleet(args: argparse.Namespace) -> None:
    """Refuse what is about a fleet where there is none."""
    for name in ITS_OWN:
        if getattr(args, name) is not None:
            raise Misunderstood(f"--{name} is about a fleet; name its place by --fleet")


def _show(place: str, found: Sweep, downtime: float) -> None:
    from dirtylog.commands import _terminal

    size, seconds = _terminal.bytes_text, _terminal.seconds_text

    def time(value: float | None) -> str:
        return "-" if value is None else seconds(value)

    memory = sum(machine.memory_bytes for machine in found.machines)
    rate = sum(machine.bytes_per_second for machine in found.machines)
    fastest = sorted(found.machines, key=lambda machine: -machine.bytes_per_second)[:10]
    _terminal.show_table(
        f"{place}: {len(found.machines)} machines with {size(memory)}, {size(rate)} dirtied per second",
        ["the fastest", "memory", "per second", "traced"],
        [
            [machine.name, size(machine.memory_bytes), size(machine.bytes_per_second), seconds(machine.seconds)]
            for machine in fastest
        ],
    )
    _terminal.show_table(
        f"Migration with at most {downtime:g} s of pause",
        ["bandwidth", "converge", "do not", "unknown", "median", "slowest", "longest pause"],
        [
            [
                f"{size(each.bandwidth)}/s",
                str(each.converging),
                str(each.diverging),
                str(each.unknown),
                time(each.seconds),
                time(each.slowest),
                time(each.pause),
            ]
            for each in found.migrations
        ],
    )
    _terminal.show_table(
        "Saving all of them, dirty chunks alone",
        ["every", "chunks of", "machines", "per second", "requests per second", "largest save", "per dirty byte"],
        [
            [
                seconds(each.interval),
                size(each.chunk_bytes),
                str(each.machines),
                *(
                    [
                        size(each.bytes_per_second),
                        f"{each.requests_per_second:.1f}",
                        size(each.largest),
                        f"{each.amplification:.1f}",
                    ]
                    if each.machines
                    else ["-"] * 4
                ),
            ]
            for each in found.savings
        ],
    )
