"""Show live which memory of running processes is written, and how fast.

The processes are attached to from outside and go on undisturbed; they need no
preparation. PROCESS is a process id, or a name if one process has it.

Keys: the arrows choose a region, Enter looks at it from near, Escape goes back;
s sorts by rate, size or address, a shows all regions or those that were written,
f freezes the picture and goes on, d writes the last minute to a trace, q quits.
"""

from __future__ import annotations

import argparse
import errno
import os
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dirtylog.commands import _terminal
from dirtylog.commands._looks import ASCII_BARS, BARS, WINDOWS, Look, Row, Watcher, drawn
from dirtylog.commands._monitor import add_guest_argument, guest_at
from dirtylog.commands._numbers import LONGEST, at_least, more_than
from dirtylog.commands._program import command_of, machine_text, names_of
from dirtylog.commands._refusal import Misunderstood, refusing
from dirtylog.commands._screen import keys_until, raw_keys
from dirtylog.errors import BackendUnavailable, DirtyLogError

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["add_arguments", "run"]

SORTS = ("rate", "size", "address")
COLUMNS = ("region", "where", "per second", "working set", "size", "address")
# What a list has around its rows: the heading, the table's lines, the keys and a note.
AROUND = 7
# The characters that it takes to show so many columns, with regions' names of 28.
WIDTHS = {120: 6, 104: 5, 0: 4}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "process", nargs="+", metavar="PROCESS", help="process id, or the name of the one process that has it"
    )
    parser.add_argument(
        "--interval", type=more_than(0, float, LONGEST), default=1.0, metavar="SECONDS", help="time between looks (1)"
    )
    parser.add_argument("--once", action="store_true", help="look once, after one interval, and end")
    parser.add_argument(
        "--count", type=at_least(1, int), metavar="LOOKS", help="end after so many looks (until q or Ctrl-C)"
    )
    parser.add_argument("--json", action="store_true", help="print each look as JSON, one line each")
    parser.add_argument("--all", action="store_true", help="watch every writable mapping, also those below 1 MiB")
    parser.add_argument("--follow", action="store_true", help="watch their children too, as they come")
    parser.add_argument(
        "--agent", metavar="SOCKET", help="where the program's agent listens: it hands over, and names its arrays"
    )
    add_guest_argument(parser)
    parser.add_argument("--trust-shared", action="store_true", help="watch shared memory through these processes alone")


def run(args: argparse.Namespace) -> int:
    """Attach, and draw until told to stop."""
    from dirtylog import attach

    pids = list(dict.fromkeys(map(find_process, args.process)))
    for option in ("agent", "qmp"):
        if getattr(args, option) is not None and len(pids) > 1:
            raise Misunderstood(
                f"--{option} is about one process, and several were named; leave it out, or watch that one alone"
            )
    if args.qmp is not None and (args.all or args.follow):
        raise Misunderstood("--qmp names a guest's memory alone, of one process; leave out --all and --follow")
    looks = 1 if args.once else args.count
    with ExitStack() as stack:
        processes = []
        for pid in pids:
            with refusing():
                process = stack.enter_context(
                    attach(
                        pid,
                        guest_at(args.qmp) if args.qmp is not None else "all" if args.all else "large",
                        handover=args.agent,
                        trust_shared=args.trust_shared,
                        follow_children=args.follow,
                    )
                )
                processes.append((process, stack.enter_context(names_of(pid, args.agent))))
        about = [command_of(pid) for pid in pids], time.time()
        watcher = Watcher(processes, _bars())
        name = ", ".join(args.process)
        if args.json or args.once or not sys.stdout.isatty():
            _print(watcher, name, args, looks)
        else:
            _draw(watcher, Screen(name, pids, *about), args, looks)
    return 0


def _print(watcher: Watcher, name: str, args: argparse.Namespace, looks: int | None) -> None:
    """One look after the other, as JSON or as tables."""
    done = 0
    while looks is None or done < looks:
        time.sleep(args.interval)
        look = watcher.look()
        done += 1
        if args.json:
            _terminal.show_json_line(look.as_dict())
        else:
            _terminal.show_table(heading(name, look), COLUMNS, cells(listed(look, "rate", False)), left=2)


def _draw(watcher: Watcher, screen: Screen, args: argparse.Namespace, looks: int | None) -> None:
    """Draw on the whole screen."""
    try:
        from rich.live import Live
    except ImportError:
        _print(watcher, screen.name, args, looks)
        return
    begin, done = time.monotonic(), 0
    waiting = f"attached to {screen.name}; the first look comes in {args.interval:g} s"
    with raw_keys() as listening, Live(waiting, auto_refresh=False, screen=listening) as live:
        while looks is None or done < looks:
            begin += args.interval
            for key in keys_until(begin, listening):
                if not screen.press(key):
                    return
                if screen.look is not None:
                    live.update(screen.picture(live.console), refresh=True)
            screen.see(watcher.look())
            done += 1
            live.update(screen.picture(live.console), refresh=True)


class Screen:
    """What is shown of the looks: which region, in which order, from how near.

    Parameters
    ----------
    name : str
        What the user called the processes.
    pids : sequence of int
        Their ids.
    commands : sequence of str
        Their command lines, for a trace.
    started : float
        When the watch began, in seconds since 1970.
    """

    def __init__(self, name: str, pids: list[int], commands: list[str], started: float) -> None:
        self.name = name
        self._pids, self._commands, self._started = pids, commands, started
        self.look: Look | None = None
        self._latest: Look | None = None
        self._sort = 0
        self._everything = self._frozen = self._near = False
        # The chosen region, by process and address, wherever the next look has it in the list.
        self._chosen: tuple[int, int] | None = None
        self._note = ""

    def see(self, look: Look) -> None:
        """Show another look, unless the picture is frozen."""
        self._latest = look
        if not self._frozen or self.look is None:
            self.look = look

    def press(self, key: str) -> bool:
        """Do what a key says; return whether to go on."""
        key = key.lower()
        if key == "q":
            return False
        self._note = ""
        if key in ("f", " "):
            self._frozen = not self._frozen
            self.look = self.look if self._frozen else self._latest
        elif key == "a":
            self._everything = not self._everything
        elif key == "s":
            self._sort = (self._sort + 1) % len(SORTS)
        elif key in ("up", "k", "down", "j"):
            self._choose(-1 if key in ("up", "k") else 1)
        elif key in ("enter", "right"):
            self._choose(0)
            self._near = self._chosen is not None
        elif key in ("escape", "left"):
            self._near = False
        elif key == "d" and self.look is not None:
            self._note = self._dump(self.look)
        return True

    def _rows(self) -> list[Row]:
        return listed(self.look, SORTS[self._sort], self._everything) if self.look is not None else []

    def _place(self, rows: list[Row]) -> int | None:
        """Where the chosen region is in the list; None if it is gone, or none was chosen."""
        return next((i for i, row in enumerate(rows) if (row.pid, row.start) == self._chosen), None)

    def _choose(self, step: int) -> None:
        rows = self._rows()
        at = self._place(rows)
        if rows:
            row = rows[0] if at is None else rows[min(max(at + step, 0), len(rows) - 1)]
            self._chosen = row.pid, row.start

    def _dump(self, look: Look) -> str:
        """Write what was seen in the longest window as a trace; return what there is to say of that."""
        from dirtylog.sinks.trace import Recorder
        from dirtylog.sinks.trace.names import placed_names

        name = f"top-{self._pids[0]}-{time.strftime('%Y%m%d-%H%M%S')}.trace"
        try:
            with Recorder(name, 0, os.sysconf("SC_PAGESIZE")) as recorder:
                for seconds, pages in look.epochs():
                    recorder.write(seconds, pages)
                recorder.regions.update(placed_names(look.places()))
                recorder.about.update(
                    command="; ".join(self._commands),
                    started=time.strftime("%Y-%m-%d %H:%M:%S %z", time.localtime(self._started)),
                    machine=machine_text(),
                    watched=f"the last {recorder.epochs} looks of dirtylog top",
                )
        except (BackendUnavailable, DirtyLogError, OSError) as error:
            return f"no trace: {error}"
        return f"{recorder.epochs} looks are in {name}: dirtylog report {name}"

    def picture(self, console: Console) -> Any:
        """Lay out what is shown; there was a look."""
        from rich.console import Group
        from rich.text import Text

        assert self.look is not None
        rows = self._rows()
        at = self._place(rows)
        width, height = console.size
        going = "go on" if self._frozen else "freeze"
        if self._near and at is not None:
            parts = _close_up(self.look, rows[at], width, height)
            keys = f"q quit  f {going}  ↑↓ other region  Esc all regions  d trace"
        else:
            room = max(height - AROUND, 1)
            first = min(max((at or 0) - room + 1, 0), max(len(rows) - room, 0))
            columns = COLUMNS[: next(count for least, count in WIDTHS.items() if width >= least)]
            shown = [line[: len(columns)] for line in cells(rows[first : first + room])]
            chosen = None if at is None else at - first
            parts = [
                Text(heading(self.name, self.look), "bold", no_wrap=True, overflow="ellipsis"),
                _terminal.table("", columns, shown, left=2, one_line=True, chosen=chosen),
            ]
            more = f"  {first + 1} to {first + len(shown)} of {len(rows)}" if len(rows) > len(shown) else ""
            keys = (
                f"q quit  f {going}  s sort by {SORTS[self._sort - len(SORTS) + 1]}  a all regions  "
                f"↑↓ Enter one region  d trace{more}"
            )
        lines = [Text(keys if _terminal.encodes(keys) else keys.replace("↑↓", "j/k"), "dim", no_wrap=True)]
        return Group(*parts, *lines, Text(_terminal.printable(self._note), "yellow"))


def _bars() -> str:
    """What the terminal can show of bars."""
    return BARS if _terminal.encodes(BARS) else ASCII_BARS


def _close_up(look: Look, row: Row, width: int, height: int) -> list[Any]:
    """Lay out one region from near."""
    from rich.text import Text

    text = _terminal.bytes_text
    margin = 15  # an address and a space
    columns = max(min(width - margin, 128), 8)
    detail = look.detail(row, max(min(height - 9, 32), 1), columns)
    sets = ", ".join(f"{window} s: {text(size)}" for window, size in detail.working_sets.items())
    shown = [
        Text(f"{row.name} at {row.start:#x}, {text(row.nbytes)}", "bold", no_wrap=True),
        Text(f"{text(row.bytes_per_second)} per second; working set of the last {sets}", no_wrap=True),
        Text(
            f"a character is {text(detail.cell_bytes)}; faint: not in this look, but in the last {max(WINDOWS):g} s",
            "dim",
            no_wrap=True,
        ),
        Text(""),
    ]
    for address, now, lately in detail.lines:
        line = Text(no_wrap=True)
        line.append(f"{address:#x} ".rjust(margin), "dim")
        for new, old in zip(now, lately, strict=True):
            empty = new in (BARS[0], ASCII_BARS[0])
            line.append(old if empty else new, "dim" if empty else "bold green")
        shown.append(line)
    highest = max(detail.rates, default=0.0)
    marks = drawn((rate / highest if highest else 0.0 for rate in detail.rates), _bars())
    shown += [Text(""), Text(f"look by look, at most {text(highest)} per second", "dim", no_wrap=True), Text(marks)]
    return shown


def heading(name: str, look: Look) -> str:
    """The line above the table."""
    text = _terminal.bytes_text
    # Before the figures, for a narrow window shows the beginning alone.
    said = f"{name} ({', '.join(map(str, look.ended))} ended)" if look.ended else name
    if not look.rows:
        return f"{said}: none of its mappings has 1 MiB, and --all watches smaller ones too"
    sets = ", ".join(f"{window} s: {text(size)}" for window, size in look.working_sets.items())
    bound = "" if look.exact else "at most "
    return f"{said}: {bound}{text(look.bytes_per_second)} per second; working set of the last {sets}"


def listed(look: Look, sort: str, everything: bool) -> list[Row]:
    """The regions in order: those that were ever written, or all."""
    order = {
        "rate": lambda row: (-row.bytes_per_second, -row.working_set_bytes),
        "size": lambda row: (-row.nbytes,),
        "address": lambda row: (row.pid, row.start),
    }[sort]
    return sorted((row for row in look.rows if everything or row.working_set_bytes), key=order)


def cells(rows: list[Row]) -> list[list[str]]:
    """The regions as lines of a table."""
    text = _terminal.bytes_text
    return [
        [
            row.name if len(row.name) <= 28 else "..." + row.name[-25:],
            row.strip,
            text(row.bytes_per_second),
            text(row.working_set_bytes),
            text(row.nbytes),
            f"{row.start:#x}",
        ]
        for row in rows
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
    if not found:
        raise ProcessLookupError(errno.ESRCH, f"no process is called {text!r}; pass its id")
    ids = " ".join(map(str, sorted(found)))
    raise ProcessLookupError(
        errno.ESRCH, f"{len(found)} processes are called {text!r}; pass the ids of those that are meant: {ids}"
    )
