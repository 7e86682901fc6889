"""A progress bar for work that reports bytes by callback: only for a person at a terminal, only after a second."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["byte_bar"]


@contextmanager
def byte_bar(doing: str) -> Iterator[Callable[[int, int], None]]:
    """Give a function to call with the bytes done and the bytes to do."""
    started = time.monotonic()
    progress: Any = None
    task: Any = None

    def show(done: int, total: int) -> None:
        nonlocal progress, task
        if progress is None and time.monotonic() - started > 1 and sys.stderr.isatty():
            progress, task = _rich_progress(doing)
        if progress:
            progress.update(task, completed=done, total=total)

    try:
        yield show
    finally:
        if progress:
            progress.stop()


def _rich_progress(doing: str) -> tuple[Any, Any]:
    try:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
    except ImportError:
        return False, None
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn())
    progress = Progress(*columns, console=Console(stderr=True), transient=True)
    progress.start()
    return progress, progress.add_task(doing)
