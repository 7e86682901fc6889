"""What the commands that talk to QEMU share: how an address is written, its guest's memory, and its own dirty rate."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dirtylog.sources.qemu import GuestRange

__all__ = ["add_guest_argument", "address", "guest_at", "meter_guest"]


def add_guest_argument(parser: argparse.ArgumentParser) -> None:
    """Declare the monitor that says where a guest's memory is."""
    parser.add_argument(
        "--qmp",
        metavar="ADDRESS",
        help="the monitor of a QEMU that runs: its guest's memory alone, numbered by guest address",
    )


def guest_at(qmp: str) -> list[GuestRange]:
    """Ask a monitor where its guest's memory is."""
    from dirtylog.sources.qemu import Qmp, guest_memory

    with Qmp(address(qmp)) as monitor:
        return guest_memory(monitor)


def address(text: str) -> str | tuple[str, int]:
    """Read HOST:PORT, or the path of a Unix socket."""
    host, _, port = text.rpartition(":")
    return (host, int(port)) if host and port.isdecimal() and "/" not in text else text


def meter_guest(args: argparse.Namespace) -> int:
    """Have QEMU measure, and forecast a migration at that rate."""
    from dirtylog import DirtyLogError
    from dirtylog.commands import _terminal
    from dirtylog.commands._trace import show_forecasts
    from dirtylog.sinks.forecast import forecast
    from dirtylog.sources.qemu import DirtyRate, Qmp

    with Qmp(address(args.qmp)) as qmp:
        memory = qmp.execute("query-memory-size-summary")
        nbytes = int(memory["base-memory"]) + int(memory.get("plugged-memory", 0))
        try:
            rate = DirtyRate(qmp, args.mode).measure(args.seconds)
        except ValueError as error:
            raise DirtyLogError(str(error)) from error
    npages = -(-nbytes // 4096)

    def dirtied(_: float, seconds: float) -> float:
        return min(npages, rate.bytes_per_second * seconds / 4096)

    forecasts = [
        forecast(npages, 4096, dirtied, bandwidth=bandwidth, downtime=args.downtime) for bandwidth in args.bandwidth
    ]
    if args.json:
        _terminal.show_json({**asdict(rate), "migrations": [asdict(each) for each in forecasts]})
        return 0
    text = _terminal.bytes_text
    _terminal.show_table(
        f"by {rate.mode}, {rate.seconds} s",
        ["figure", "value"],
        [
            ["per second", text(rate.bytes_per_second)],
            *([f"vCPU {number} per second", text(each)] for number, each in rate.vcpus.items()),
            ["memory", text(nbytes)],
        ],
    )
    print(rate.meaning)
    show_forecasts(forecasts, args.downtime)
    return 0
