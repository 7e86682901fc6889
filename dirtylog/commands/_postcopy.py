"""What ``dirtylog migrate`` says of postcopy: the options of both ends, and what does not go with them."""

from __future__ import annotations

import argparse
import mmap
import time
from collections.abc import Callable
from typing import Any

from dirtylog.commands._numbers import at_least
from dirtylog.commands._refusal import Misunderstood
from dirtylog.errors import DirtyLogError

__all__ = ["Times", "add_postcopy_receive", "add_postcopy_send", "check_pages", "check_postcopy"]

_KEPT = ("out", "snapshot", "checkpoint")


def add_postcopy_send(parser: argparse.ArgumentParser) -> None:
    """Declare the sender's option."""
    parser.add_argument(
        "--postcopy",
        type=at_least(0, int),
        metavar="N",
        help="let the copy run before it has everything, after N live rounds (0: at once)",
    )


def add_postcopy_receive(parser: argparse.ArgumentParser) -> None:
    """Declare the receiver's options."""
    parser.add_argument(
        "--postcopy", action="store_true", help="let a sender's --postcopy run the copy before it has everything"
    )
    parser.add_argument(
        # `run` is what the command does.
        "--run",
        dest="when",
        choices=("at-once", "filled"),
        help="of --postcopy: run the copy at once (default), or when it is filled, for programs whose system calls "
        "would fail on what is lacking",
    )


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def check_postcopy(args: argparse.Namespace) -> None:
    """Refuse what does not go with postcopy, before anything is opened.

    Raises
    ------
    Misunderstood
        It names the options and the way out.
    """
    if args.postcopy is None or args.postcopy is False:
        if getattr(args, "when", None) is not None:
            raise Misunderstood(f"--run {args.when} is about --postcopy; leave it out, or add --postcopy")
        return
    if args.end == "send":
        if args.pid is not None:
            raise Misunderstood(
                f"--postcopy lets the copy run, and of --pid {args.pid} memory goes without registers: nothing could; "
                "leave --postcopy out"
            )
        if args.force:
            raise Misunderstood("--force is about rounds that do not converge, and --postcopy needs none; leave it out")
        return
    if args.program is not None:
        raise Misunderstood(
            "--exec shares the memory with a program, and what --postcopy lacks is kept back from this process alone; "
            "leave --postcopy out at both ends"
        )
    kept = next((name for name in _KEPT if getattr(args, name) is not None), None)
    if kept is not None:
        raise Misunderstood(
            f"{_option(kept)} {getattr(args, kept)} is complete and on the disk before the copy may run, and with "
            "--postcopy it may before it is complete; leave --postcopy out at both ends, or receive into memory"
        )


def check_pages(args: argparse.Namespace, page_size: int) -> None:
    """Refuse memory whose pages are parts of the system's.

    Raises
    ------
    DirtyLogError
        It names both sizes.
    """
    if args.postcopy is not None and page_size < mmap.PAGESIZE:
        raise DirtyLogError(
            f"its pages have {page_size} bytes, and --postcopy takes the system's, {mmap.PAGESIZE}, or more; leave "
            "--postcopy out"
        )


class Times:
    """When a copy was let run, and when it was complete, in seconds from now on."""

    def __init__(self, start: Callable[[Any], object]) -> None:
        self._start, self._begin = start, time.perf_counter()
        self.ran = self.whole = 0.0

    def start(self, memory: Any) -> None:
        """Let it run."""
        self.ran = time.perf_counter() - self._begin
        self._start(memory)

    def complete(self) -> None:
        """Say that it is complete."""
        self.whole = time.perf_counter() - self._begin
