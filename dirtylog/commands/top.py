"""Show live which memory of a running process is written, and how fast.

The process is attached to from outside and goes on undisturbed; it needs no
preparation. PROCESS is a process id, or a name if one process has it.

Keys: q quits, f freezes the picture and goes on, s sorts by rate, size or
address, a shows all regions or those that were written.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dirtylog.commands import _terminal
from dirtylog.commands._numbers import LONGEST, at_least, more_than
from dirtylog.commands._program import names_of
from dirtylog.commands._refusal import refusing
from dirtylog.commands._screen import keys_until, raw_keys
from dirtylog.commands._terminal import printable

if TYPE_CHECKING:
    from dirtylog import DirtyPages, Process
    from dirtylog.sources.process import Region
    from dirtylog.sources.process.naming import Names

__all__ = ["add_arguments", "run"]

WINDOWS = (1.0, 10.0, 60.0)
SORTS = ("rate", "size", "address")
# From nothing written to every page written.
BARS = "·▁▂▃▄▅▆▇█"
ASCII_BARS = ".:-=+*#%@"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("process", help="process id, or the name of the one process that has it")
    parser.add_argument(
        "--interval", type=more_than(0, float, LONGEST), default=1.0, metavar="SECONDS", help="time between looks (1)"
    )
    parser.add_argument("--once", action="store_true", help="look once, after one interval, and end")
    parser.add_argument(
        "--count", type=at_least(1, int), metavar="LOOKS", help="end after so many looks (until q or Ctrl-C)"
    )
    parser.add_argument("--json", action="store_true", help="print each look as JSON, one line each")
    parser.add_argument("--all", action="store_true", help="watch every writable mapping, also those below 1 MiB")
    parser.add_argument("--follow", action="store_true", help="watch its children too, as they come")
    parser.add_argument(
        "--agent", metavar="SOCKET", help="where the program's agent listens: it hands over, and names its arrays"
    )
    parser.add_argument("--trust-shared", action="store_true", help="watch shared memory through this process alone")


@dataclass(frozen=True, slots=True)
class Row:
    """One region at one look: where it is, and what of it was written in the last interval."""

    name: str
    start: int
    nbytes: int
    bytes_per_second: float
    working_set_bytes: int
    strip: str
    pid: int = 0


@dataclass(frozen=True, slots=True)
class Look:
    """What one look saw; sizes in bytes, times in seconds."""

    seconds: float
    nbytes: int
    bytes_per_second: float
    exact: bool
    working_sets: dict[str, int]
    rows: tuple[Row, ...]


class Watcher:
    """Harvests a process, and remembers as much as the longest working set needs."""

    def __init__(self, process: Process, bars: str, names: Names, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._process = process
        self._names = names
        self._bars = bars
        self._history: deque[tuple[float, DirtyPages]] = deque()
        self._last = clock()
        process.harvest()

    def look(self) -> Look:
        """Harvest, and say what it means."""
        pages = self._process.harvest()
        now = self._clock()
        seconds, self._last = now - self._last, now
        self._history.append((now, pages))
        while self._history and self._history[0][0] < now - max(WINDOWS):
            self._history.popleft()
        sets = {window: self._written_since(now - window, pages) for window in WINDOWS}
        regions = self._names(self._process.regions)
        rows = tuple(self._row(region, pages, sets[max(WINDOWS)], seconds) for region in regions)
        return Look(
            seconds,
            pages.nbytes,
            pages.nbytes / seconds if seconds > 0 else 0.0,
            pages.exact,
            {f"{window:g}": written.nbytes for window, written in sets.items()},
            rows,
        )

    def _written_since(self, moment: float, pages: DirtyPages) -> DirtyPages:
        for when, earlier in self._history:
            if when > moment:
                pages |= earlier
        return pages

    def _row(self, region: Region, pages: DirtyPages, recent: DirtyPages, seconds: float) -> Row:
        from dirtylog import DirtyPages
        from dirtylog._bits.strip import density

        inside = DirtyPages.from_runs([[region.first_page, region.npages]], pages.npages, pages.page_size)
        own, lately = pages & inside, recent & inside
        shifted = own.runs() - [region.first_page, 0]
        shares = density(DirtyPages.from_runs(shifted, region.npages, pages.page_size), 24)
        # The least share that shows: a page that was written is to be seen, however large the region is.
        marks = [self._bars[-int(-share * (len(self._bars) - 1) // 1)] for share in shares]
        name = printable(region.name or region.kind)
        return Row(
            name if region.pid in (0, self._process.pid) else f"{region.pid}: {name}",
            region.start,
            region.npages * pages.page_size,
            own.nbytes / seconds if seconds > 0 else 0.0,
            lately.nbytes,
            "".join(marks),
            region.pid,
        )


def run(args: argparse.Namespace) -> int:
    """Attach, and draw until told to stop."""
    from dirtylog import attach

    pid = find_process(args.process)
    looks = 1 if args.once else args.count
    select = "all" if args.all else "large"
    with ExitStack() as stack:
        with refusing():
            process = stack.enter_context(
                attach(
                    pid,
                    select=select,
                    handover=args.agent,
                    trust_shared=args.trust_shared,
                    follow_children=args.follow,
                )
            )
            names = stack.enter_context(names_of(pid, args.agent))
        watcher = Watcher(process, BARS if _terminal.encodes(BARS) else ASCII_BARS, names)
        if args.json or args.once or not sys.stdout.isatty():
            _print(watcher, args, looks)
        else:
            _draw(watcher, process, args, looks)
    return 0


def _print(watcher: Watcher, args: argparse.Namespace, looks: int | None) -> None:
    """One look after the other, as JSON or as tables."""
    done = 0
    while looks is None or done < looks:
        time.sleep(args.interval)
        look = watcher.look()
        done += 1
        if args.json:
            _terminal.show_json_line(asdict(look))
        else:
            _terminal.show_table(heading(args.process, look), COLUMNS, cells(look, "rate", False), left=2)


def _draw(watcher: Watcher, process: Process, args: argparse.Namespace, looks: int | None) -> None:
    """Draw on the whole screen."""
    try:
        from rich.live import Live
    except ImportError:
        _print(watcher, args, looks)
        return
    from rich.console import Group
    from rich.text import Text

    sort, everything, frozen, done = 0, False, False, 0
    look: Look | None = None
    begin = time.monotonic()

    def picture() -> Any:
        if look is None:
            return Text(f"attached to process {process.pid}; the first look comes in {args.interval:g} s")
        keys = f"q quit   f {'go on' if frozen else 'freeze'}   s sort by {SORTS[sort - 2]}   a all regions"
        return Group(
            _terminal.table(
                heading(args.process, look), COLUMNS, cells(look, SORTS[sort], everything), left=2, one_line=True
            ),
            Text(keys, style="dim"),
        )

    with raw_keys() as listening, Live(picture(), auto_refresh=False, screen=listening) as live:
        while looks is None or done < looks:
            begin += args.interval
            for key in keys_until(begin, listening):
                if key in "qQ":
                    return
                frozen ^= key in "fF "
                everything ^= key in "aA"
                sort = (sort + (key in "sS")) % len(SORTS)
                live.update(picture(), refresh=True)
            latest = watcher.look()
            done += 1
            if not frozen:
                look = latest
                live.update(picture(), refresh=True)


COLUMNS = ("region", "where", "per second", "working set", "size", "address")


def heading(name: str, look: Look) -> str:
    """The line above the table."""
    text = _terminal.bytes_text
    sets = ", ".join(f"{window} s: {text(size)}" for window, size in look.working_sets.items())
    bound = "" if look.exact else "at most "
    return f"{name}: {bound}{text(look.bytes_per_second)} per second; working set of the last {sets}"


def cells(look: Look, sort: str, everything: bool) -> list[list[str]]:
    """The regions as rows of a table: those that were ever written, or all."""
    order = {
        "rate": lambda row: (-row.bytes_per_second, -row.working_set_bytes),
        "size": lambda row: (-row.nbytes,),
        "address": lambda row: (row.start,),
    }[sort]
    text = _terminal.bytes_text
    shown = [row for row in look.rows if everything or row.working_set_bytes]
    return [
        [
            row.name if len(row.name) <= 28 else "..." + row.name[-25:],
            row.strip,
            text(row.bytes_per_second),
            text(row.working_set_bytes),
            text(row.nbytes),
            f"{row.start:#x}",
        ]
        for row in sorted(shown, key=order)
    ]


def find_process(text: str) -> int:
    """Return the id of the process that is meant.

    Raises
    ------
    ProcessLookupError
        There is none, or there are several.
    """
    if text.isdigit():
        return int(text)
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            name = Path(f"/proc/{pid}/comm").read_text(errors="replace").rstrip("\n")
        except OSError:
            continue
        if int(pid) != os.getpid() and text in (name, os.path.basename(words[0].decode(errors="replace"))):
            found.append(int(pid))
    if len(found) == 1:
        return found[0]
    raise ProcessLookupError(
        3,
        f"no process is called {text!r}; pass its id"
        if not found
        else f"{len(found)} processes are called {text!r}: {', '.join(map(str, sorted(found)))}; pass one of the ids",
    )
