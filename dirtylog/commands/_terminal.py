"""What a terminal shows: tables, progress and quantities, prettier where rich is installed."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any, TypeVar

__all__ = [
    "bytes_text",
    "encodes",
    "pages_text",
    "plain_table",
    "seconds_text",
    "show_json",
    "show_json_line",
    "show_note",
    "show_table",
    "table",
    "time_text",
    "with_progress",
]

Item = TypeVar("Item")

# A table of more rows is plain: rich takes a millisecond or two for each, more than finding out what is in it.
MANY = 500


def bytes_text(size: float) -> str:
    """Write a number of bytes with the unit a person would choose.

    Examples
    --------
    >>> bytes_text(512), bytes_text(268435456)
    ('512 B', '256.0 MiB')
    """
    if size < 1024:
        return f"{size:.0f} B"
    for unit in ("KiB", "MiB", "GiB"):
        size /= 1024
        if size < 1024:
            return f"{size:.1f} {unit}"
    return f"{size / 1024:.1f} TiB"


def pages_text(count: int) -> str:
    """Write a number of pages.

    Examples
    --------
    >>> pages_text(1), pages_text(2)
    ('1 page', '2 pages')
    """
    return f"{count} page{'' if count == 1 else 's'}"


def time_text(seconds: float) -> str:
    """Write a moment, given in seconds since 1970, as the local date and time."""
    return f"{datetime.fromtimestamp(seconds):%Y-%m-%d %H:%M:%S}"


def encodes(text: str) -> bool:
    """Tell whether standard output can show these characters."""
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        return False
    return True


def seconds_text(seconds: float) -> str:
    """Write a time with the unit a person would choose.

    Examples
    --------
    >>> seconds_text(0.0000004), seconds_text(0.0123), seconds_text(4)
    ('400 ns', '12.3 ms', '4 s')
    """
    for each in ("s", "ms", "µs"):
        unit = each
        if seconds >= 0.9995:
            if unit == "µs" and not encodes(unit):
                unit = "us"
            return f"{seconds:.3g} {unit}" if seconds < 999.5 else f"{seconds:,.0f} {unit}"
        seconds *= 1000
    return f"{seconds:.0f} ns"


def printable(text: str, keep: str = "") -> str:
    r"""Replace what a terminal might obey: names come from files, and an escape in one may do anything.

    Examples
    --------
    >>> printable("heap\x1b[31m")
    'heap?[31m'
    """
    return "".join(each if each.isprintable() or each in keep else "?" for each in text)


def show_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> None:
    """Print a table: the first `left` columns flush left, the numbers after them flush right."""
    title, rows = printable(title), [[printable(cell) for cell in row] for row in rows]
    if len(rows) > MANY:
        print(plain_table(title, columns, rows, left))
        return
    try:
        from rich.console import Console
        from rich.text import Text

        made = table("", columns, rows, left)
    except ImportError:
        print(plain_table(title, columns, rows, left))
        return
    # A file or a pipe has no width: what fits a usual window is wide enough, and cells are not cut.
    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 110)
    # Not the table's own title, which is wrapped at the table's width: a path is to be copied.
    console.print(Text(title, "bold"), soft_wrap=True)
    console.print(made)


def table(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    left: int = 1,
    one_line: bool = False,
    chosen: int | None = None,
) -> Any:
    """Lay out a table for rich, which must be installed.

    With `one_line`, cells are cut rather than wrapped; the row of number `chosen` stands out.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    made = Table(
        title=Text(title) if title else None,
        title_justify="left",
        title_style="bold",
        header_style="bold cyan",
        box=box.ROUNDED,
    )
    for number, column in enumerate(columns):
        made.add_column(column, justify="left" if number < left else "right", no_wrap=one_line or number == 0)
    for number, row in enumerate(rows):
        made.add_row(*map(Text, row), style="reverse" if number == chosen else None)
    return made


def plain_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Lay out a table in plain text.

    Examples
    --------
    >>> print(plain_table("Pages", ["state", "pages"], [["dirty", "12"], ["clean", "88"]]))
    Pages
    state  pages
    -----  -----
    dirty     12
    clean     88
    """
    widths = [max(len(row[column]) for row in [columns, *rows]) for column in range(len(columns))]

    def line(cells: Sequence[str]) -> str:
        fitted = zip(cells, widths, strict=True)
        return "  ".join(
            cell.ljust(width) if number < left else cell.rjust(width) for number, (cell, width) in enumerate(fitted)
        ).rstrip()

    return "\n".join([title, line(columns), line(["-" * width for width in widths]), *map(line, rows)])


def show_json_line(value: Any) -> None:
    """Print a result for programs that read one line at a time."""
    print(json.dumps(value), flush=True)


def show_json(value: Any) -> None:
    """Print a result for programs."""
    print(json.dumps(value, indent=2))


def show_note(text: str) -> None:
    """Print a remark for people: to the error stream, which is not part of the result."""
    print(text, file=sys.stderr)


def with_progress(items: Sequence[Item], doing: str) -> Iterable[Item]:
    """Go through items, with a progress bar if a person watches a terminal that rich can draw on."""
    if not sys.stderr.isatty():
        return items
    try:
        from rich.console import Console
        from rich.progress import track
    except ImportError:
        return items
    return track(items, doing, console=Console(stderr=True), transient=True)
