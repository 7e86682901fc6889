"""What ``dirtylog migrate send`` sends: a snapshot, a checkpoint, a process's memory, or that of a demonstration."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dirtylog.commands._arrivals import digest_of
from dirtylog.commands._numbers import at_least

if TYPE_CHECKING:
    from dirtylog.log import Observer

__all__ = ["Origin", "add_origins", "origin_of"]


def add_origins(parser: argparse.ArgumentParser) -> None:
    """Declare what may be sent, and how."""
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument("--snapshot", metavar="FILE", help="the memory of a snapshot, with its state")
    group.add_argument("--checkpoint", metavar="DIR", help="the arrays of a checkpoint, with its state")
    group.add_argument("--pid", type=int, help="the memory of this running process, from outside; not its registers")
    group.add_argument("--demo", action="store_true", help="memory that threads of this command write meanwhile")
    parser.add_argument("--step", type=int, metavar="N", help="of --checkpoint: which step (the latest)")
    parser.add_argument(
        "--select",
        choices=("all", "large", "guest"),
        help="of --pid: all that is writable (default), mappings of 1 MiB and more, or a guest's RAM",
    )
    parser.add_argument(
        "--freeze",
        choices=("ptrace", "cgroup"),
        help="of --pid: hold it alone still for the last round (ptrace, default), or all of its control group",
    )
    parser.add_argument("--stop", action="store_true", help="of --pid: leave it stopped when it has arrived (SIGSTOP)")
    parser.add_argument("--size", type=at_least(1, int), default=64, metavar="MIB", help="of --demo: memory, MiB (64)")
    parser.add_argument(
        "--writers", type=at_least(0, int, 1024), default=2, metavar="N", help="of --demo: threads that write (2)"
    )
    parser.add_argument(
        "--batch",
        type=at_least(1, int),
        default=8,
        metavar="PAGES",
        help="of --demo: pages each writes every millisecond (8)",
    )


@dataclass(slots=True)
class Origin:
    """Memory to send, who sees it written, and how it is paused."""

    memory: Any
    observer: Observer
    backend: str
    state: Any = None
    pause: Callable[[], object] | None = None
    resume: Callable[[], object] | None = None
    running: Callable[[], AbstractContextManager[object]] = nullcontext
    digest: Callable[[], str | None] = lambda: None


def origin_of(args: argparse.Namespace) -> AbstractContextManager[Origin]:
    """Return what is sent, as the command line says; a context manager.

    Raises
    ------
    DirtyLogError
        An option is about something else.
    """
    from dirtylog.errors import DirtyLogError

    for name, about in (("step", "checkpoint"), ("select", "pid"), ("freeze", "pid"), ("stop", "pid")):
        if getattr(args, name) not in (None, False) and getattr(args, about) is None:
            raise DirtyLogError(f"--{name} is about --{about}; leave it out, or name one")
    if args.snapshot is not None:
        return _of_snapshot(args.snapshot)
    if args.checkpoint is not None:
        from dirtylog.sinks.checkpoint.directory import find

        try:
            return _of_snapshot(find(args.checkpoint, args.step))
        except KeyError as error:
            raise DirtyLogError(str(error.args[0])) from error
    return _of_process(args) if args.pid is not None else _of_demo(args)


@contextmanager
def _of_snapshot(path: str) -> Iterator[Origin]:
    from dirtylog import DirtyBitmap, DirtyLog
    from dirtylog.sinks import snapshot

    # Checked first: what is sent is vouched for at the other end.
    with snapshot.open(path, verify=True) as mapped:
        log = DirtyLog()
        # Nobody writes it.
        log.attach(DirtyBitmap(mapped.npages, mapped.page_size))
        memory = mapped.regions if mapped.names else mapped.array
        yield Origin(memory, log.observer("migration"), "snapshot", mapped.state, digest=lambda: digest_of(memory))


@contextmanager
def _of_process(args: argparse.Namespace) -> Iterator[Origin]:
    import os
    import signal

    from dirtylog import DirtyLog, attach
    from dirtylog.sinks.migrate.origins import Outside
    from dirtylog.sources.process.freezing import frozen

    how = args.freeze or "ptrace"
    with attach(args.pid, args.select or "all") as process, ExitStack() as held:
        log = DirtyLog()
        log.attach(process)
        outside = Outside(process)

        def pause() -> None:
            held.enter_context(frozen(args.pid, how))
            outside.paused = how

        yield Origin(outside, log.observer("migration"), "process", outside.state, pause, held.close)
        if args.stop:
            os.kill(args.pid, signal.SIGSTOP)


@contextmanager
def _of_demo(args: argparse.Namespace) -> Iterator[Origin]:
    import numpy as np

    import dirtylog as dl
    from dirtylog.commands._writers import Writers

    try:
        memory: Any = dl.zeros(((args.size << 20) // 4096, 4096), dtype=np.uint8)
    except ValueError as error:
        raise dl.DirtyLogError(str(error)) from error
    memory[: len(memory) // 2] = np.arange(4096) % 251

    def write(writer: int, pages: Any) -> None:
        memory[pages, writer] += 1

    writers = Writers(write, args.writers, len(memory), args.batch, 0.001)
    log = dl.DirtyLog()
    with dl.track(memory) as tracker:
        log.attach(tracker)
        yield Origin(
            memory,
            log.observer("migration"),
            tracker.backend,
            pause=writers.stop,
            running=lambda: writers,
            digest=lambda: digest_of(memory),
        )
