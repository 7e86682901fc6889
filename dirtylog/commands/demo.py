"""Track real memory and a model VM while threads write, copy only what is dirty, prove the copy complete.

Threads write into an array of this process. `dirtylog.track` says which pages they
wrote since it was last asked, again and again while they go on writing, and only
those pages are copied into a replica. When the writers have stopped and the last
harvest is copied, replica and original are compared byte for byte. Then the same
writers run as vCPUs of the model VM, and KVM's way of dirty logging does the same.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

import dirtylog as dl
from dirtylog import reference
from dirtylog.commands import _terminal
from dirtylog.commands._numbers import LONGEST, at_least
from dirtylog.commands._writers import Write, Writers
from dirtylog.vm.machine import MAX_VCPUS

Pages = NDArray[np.uint8]  # one row a page
MIB = 1 << 20
CHUNK_PAGES = 4096  # copied and compared at a time: bounds what fancy indexing buffers


class Source(Protocol):
    """Where the dirty pages come from: the tracker, or a slot of the model VM."""

    def harvest(self) -> dl.DirtyPages:
        """Take the dirty pages."""


@dataclass
class Outcome:
    """What one source showed, in pages, bytes and seconds."""

    source: str
    pages: int
    page_size: int
    harvest_seconds: list[float] = field(default_factory=list)
    dirty_pages: list[int] = field(default_factory=list)
    bytes_copied: int = 0
    core_seconds: float = 0.0
    reference_seconds: float = 0.0
    equal: bool = False

    @property
    def bytes_held(self) -> int:
        """Bytes that a full copy moves."""
        return self.pages * self.page_size

    @property
    def speed_up(self) -> float:
        """How many times faster the core is than `dirtylog.reference` on the same words."""
        return self.reference_seconds / self.core_seconds

    def summary(self) -> dict[str, Any]:
        """Give every figure to a program."""
        return {**asdict(self), "bytes_held": self.bytes_held, "speed_up": self.speed_up}


def copy_pages(dirty: dl.DirtyPages, memory: Pages, replica: Pages) -> int:
    """Copy the dirty pages; return the bytes copied.

    A page that is written meanwhile may be copied half old and half new: it was
    marked again by that write, so the next harvest brings it again.
    """
    pages = dirty.indices()
    for start in range(0, len(pages), CHUNK_PAGES):
        chunk = pages[start : start + CHUNK_PAGES]
        replica[chunk] = memory[chunk]
    return dirty.nbytes


def equal_bytes(memory: Pages, replica: Pages) -> bool:
    """Compare every byte, by numpy alone: the proof must not lean on what it proves."""
    return all(
        np.array_equal(memory[start : start + CHUNK_PAGES], replica[start : start + CHUNK_PAGES])
        for start in range(0, len(memory), CHUNK_PAGES)
    )


def replicate(outcome: Outcome, source: Source, writers: Writers, memory: Pages, args: argparse.Namespace) -> None:
    """Harvest and copy while the writers write, then once more when they have stopped, and compare."""
    replica = memory.copy()
    busiest = dl.DirtyPages.from_indices([], outcome.pages, outcome.page_size)

    def harvest_and_copy() -> None:
        nonlocal busiest
        started = time.perf_counter()
        dirty = source.harvest()
        outcome.harvest_seconds.append(time.perf_counter() - started)
        # The harvest comes before the copy: what is written during the copy is
        # then reported next time. The other way round it would be lost (I2).
        outcome.bytes_copied += copy_pages(dirty, memory, replica)
        outcome.dirty_pages.append(dirty.count)
        if dirty.count > busiest.count:
            busiest = dirty

    with writers:
        for _ in _terminal.with_progress(range(args.rounds), outcome.source):
            time.sleep(args.interval)
            harvest_and_copy()
        writers.stop()
        harvest_and_copy()
    outcome.equal = equal_bytes(memory, replica)
    outcome.core_seconds, outcome.reference_seconds = time_both(busiest)


def time_both(dirty: dl.DirtyPages) -> tuple[float, float]:
    """Time harvest and extraction of the same words by the core and by `dirtylog.reference`, best of several."""
    words = dirty.words.tolist()

    def best(harvest_and_list: Callable[[], object], prepare: Callable[[], object], times: int) -> float:
        seconds = []
        for _ in range(times):
            prepare()
            started = time.perf_counter()
            harvest_and_list()
            seconds.append(time.perf_counter() - started)
        return min(seconds)

    fast = dl.DirtyBitmap(dirty.npages, dirty.page_size)
    slow = reference.DirtyBitmap(dirty.npages, dirty.page_size)
    return (
        best(lambda: fast.harvest().indices(), lambda: fast.merge(dirty), 20),
        best(lambda: slow.harvest().indices(), lambda: slow.words.__setitem__(slice(None), words), 5),
    )


def run_tracked(args: argparse.Namespace) -> Outcome:
    """Run the writers on memory of this process, tracked by the kernel."""
    memory = page_rows(args)

    def write(writer: int, pages: NDArray[np.int64]) -> None:
        memory[pages, writer] += 1

    with dl.track(memory, backend="userfaultfd") as tracker:
        outcome = Outcome(f"memory, by {tracker.backend}", len(memory), memory.shape[1])
        replicate(outcome, tracker, new_writers(write, args, len(memory)), memory, args)
    return outcome


def run_model(args: argparse.Namespace) -> Outcome:
    """Run the same writers as vCPUs of the model VM."""
    memory = page_rows(args)
    vm = dl.VM(arch="x86", vcpus=args.writers, page_size=memory.shape[1])
    vm.set_memory_region(0, 0, len(memory), memory=memory)

    def write(writer: int, pages: NDArray[np.int64]) -> None:
        vm.vcpus[writer].touch(pages)

    outcome = Outcome(f"model VM, {args.writers} vCPUs", len(memory), memory.shape[1])
    replicate(outcome, vm.slot(0), new_writers(write, args, len(memory)), memory, args)
    return outcome


def page_rows(args: argparse.Namespace, page_size: int = 4096) -> Any:
    """Allocate the memory that is written to, one row a page, and give every page its own content."""
    # Any, because numpy declares its arrays to be buffers from Python 3.12 on only.
    memory: Any = dl.empty((args.size * MIB // page_size, page_size), dtype=np.uint8)
    # Pages that were never written would have the kernel fetch memory at the first
    # write to each: the figures would be the allocator's, not dirty tracking's.
    memory[:] = np.arange(len(memory), dtype=np.uint64).astype(np.uint8)[:, np.newaxis]
    return memory


def new_writers(write: Write, args: argparse.Namespace, pages: int) -> Writers:
    """Set up writers that, together, write about one page in a thousand a millisecond."""
    return Writers(write, args.writers, pages, batch=max(pages // 1000 // args.writers, 1), pause=0.001)


def show(outcomes: list[Outcome], args: argparse.Namespace) -> None:
    """Print one column for each source."""
    median = statistics.median
    rows: list[tuple[str, Callable[[Outcome], str]]] = [
        ("pages", lambda o: f"{o.pages:,} of {o.page_size} B"),
        ("harvests", lambda o: f"{len(o.harvest_seconds)}"),
        ("dirty pages", lambda o: f"{sum(o.dirty_pages):,}"),
        ("dirty per harvest", lambda o: f"{median(o.dirty_pages):,.0f} ({median(o.dirty_pages) / o.pages:.1%})"),
        ("harvest time", lambda o: _terminal.seconds_text(median(o.harvest_seconds))),
        ("bytes copied", lambda o: _terminal.bytes_text(o.bytes_copied)),
        (
            "bytes held, each time",
            lambda o: _terminal.bytes_text(o.bytes_held * len(o.harvest_seconds)),
        ),
        ("copied of held", lambda o: f"{o.bytes_copied / (o.bytes_held * len(o.harvest_seconds)):.2%}"),
        ("core, busiest words", lambda o: _terminal.seconds_text(o.core_seconds)),
        ("reference.py, same words", lambda o: _terminal.seconds_text(o.reference_seconds)),
        ("speed-up", lambda o: f"{o.speed_up:,.0f} x"),
        ("replica equal", lambda o: "yes, byte for byte" if o.equal else "NO"),
    ]
    _terminal.show_table(
        f"{args.size} MiB, {args.writers} writers, {args.rounds} harvests while they write",
        ["", *(outcome.source for outcome in outcomes)],
        [[label, *(text(outcome) for outcome in outcomes)] for label, text in rows],
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--size", type=at_least(1, int), default=256, metavar="MIB", help="memory, in MiB (256)")
    parser.add_argument("--rounds", type=at_least(1, int), default=40, metavar="N", help="harvests (40)")
    parser.add_argument(
        "--interval",
        type=at_least(0, float, LONGEST),
        default=0.05,
        metavar="SECONDS",
        help="pause between harvests (0.05)",
    )
    parser.add_argument(
        "--writers", type=at_least(1, int, MAX_VCPUS), default=2, metavar="N", help="threads, vCPUs (2)"
    )
    parser.add_argument("--json", action="store_true", help="print the figures for a program")


def run(args: argparse.Namespace) -> int:
    """Run both, print, and say by the exit code whether both replicas are equal."""
    outcomes = []
    unavailable = ""
    try:
        outcomes.append(run_tracked(args))
    except dl.BackendUnavailable as error:
        unavailable = str(error)
        _terminal.show_note(f"{unavailable}\nOnly the model VM is shown.")
    outcomes.append(run_model(args))
    if args.json:
        _terminal.show_json({"unavailable": unavailable, "sources": [outcome.summary() for outcome in outcomes]})
    else:
        show(outcomes, args)
    return 0 if all(outcome.equal for outcome in outcomes) else 1
