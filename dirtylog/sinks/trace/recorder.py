"""Writes traces: epoch by epoch, or a source at a steady rhythm; a file appears whole or not at all."""

from __future__ import annotations

import json
import math
import os
import threading
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from secrets import token_hex
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from dirtylog._bits.pages import DirtyPages, check_geometry
from dirtylog.log import Source
from dirtylog.sinks._bytes.pageio import UNSUPPORTED, sync_directory
from dirtylog.sinks.trace import layout
from dirtylog.sinks.trace.layout import parquet_module

__all__ = ["Recorder", "record"]

# Characters of what a reader should know, each.
LONGEST = 10_000


def _sync(path: Path) -> None:
    """Put a file on the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
    finally:
        os.close(descriptor)


class Recorder:
    """Write epochs to a trace file, which appears under its name when it is complete.

    Parameters
    ----------
    path : path-like
        Where the trace goes. A file that is there is replaced at the end.
    npages, page_size : int
        The page space, in pages of so many bytes. It grows with what is written.

    Attributes
    ----------
    regions : dict of str to (first, count)
        Names for ranges of pages, to fill in before the trace is complete. A trace has
        room for some ten thousand; of more, the largest are kept.
    about : dict of str to str
        What a reader should know: ``command``, ``started``, ``machine``. To fill in
        before the trace is complete; at most 10 000 characters each.
    program : (float, float)
        From when to when the program's own code ran, in seconds since the recording
        began: what is before that or after is its start and its end, and in no rate. To fill
        in before the trace is complete; by default, all of the time.
    epochs : int
        How many were written.

    Raises
    ------
    BackendUnavailable
        pyarrow is not installed.
    OSError
        The directory cannot be written.
    ValueError
        No such page space.

    Notes
    -----
    A context manager: leaving normally completes the trace, leaving by an
    exception removes what was written. For one thread.
    """

    def __init__(self, path: str | os.PathLike[str], npages: int, page_size: int = 4096) -> None:
        parquet = parquet_module()
        import pyarrow as pa

        self.npages: int
        self.page_size: int
        self.npages, self.page_size = check_geometry(npages, page_size)
        self._check_size(self.npages)
        self.regions: dict[str, tuple[int, int]] = {}
        self.about: dict[str, str] = {}
        self.program: tuple[float, float] | None = None
        # Absolute from the start: the program may change its directory before the trace is complete.
        self._path = Path(os.path.abspath(path))
        self._partial = self._path.with_name(f".{self._path.name}.{token_hex(8)}.partial")
        self._owner = os.getpid()
        self._schema = pa.schema(
            [pa.field(name, pa.type_for_alias(kind), False) for name, kind in layout.COLUMNS.items()]
        )
        self._rows: list[tuple[npt.NDArray[Any], ...]] = []
        self._waiting = 0
        self._time = 0.0
        self.epochs: int = 0
        try:
            self._writer: Any = parquet.ParquetWriter(
                self._partial, self._schema, compression="zstd", write_page_checksum=True
            )
        except OSError as error:
            # It may be there: what was written first found no room.
            self._partial.unlink(missing_ok=True)
            if error.errno is None:
                raise
            # pyarrow names the file that nobody asked for.
            raise OSError(error.errno, os.strerror(error.errno), str(self._path)) from error

    @staticmethod
    def _check_size(npages: int) -> None:
        if npages > layout.MAX_TRACE_PAGES:
            raise ValueError(f"npages is {npages}; a trace holds up to {layout.MAX_TRACE_PAGES}")

    @property
    def closed(self) -> bool:
        """Whether the trace is complete, or given up."""
        return self._writer is None

    def write(self, time: float, pages: DirtyPages) -> int:
        """Append one epoch.

        Parameters
        ----------
        time : float
            Seconds since the recording began; not before the last one.
        pages : DirtyPages
            What was written since the last epoch.

        Returns
        -------
        int
            The number of the epoch.

        Raises
        ------
        ValueError
            `time` goes back or is not finite, the page size is another, or the recorder is closed.
        """
        if self._writer is None:
            raise ValueError("the recorder is closed; a trace that is complete takes no more epochs")
        if not (math.isfinite(time) and time >= self._time):
            raise ValueError(f"time is {time}; it must be a finite number of at least {self._time} s")
        if pages.page_size != self.page_size:
            raise ValueError(f"the pages are of {pages.page_size} bytes; this trace has pages of {self.page_size}")
        self._check_size(pages.npages)
        runs = pages.runs()
        if not len(runs):
            # An epoch in which nothing was written is an answer too: one run of no pages.
            runs = np.zeros((1, 2), np.int64)
        self.npages = max(self.npages, pages.npages)
        self.epochs += 1
        self._time = time
        n = len(runs)
        self._rows.append((np.full(n, time), np.full(n, self.epochs), runs[:, 0], runs[:, 1], np.full(n, pages.exact)))
        self._waiting += n
        if self._waiting >= layout.ROWS_AT_ONCE // 8:
            self._flush()
        return self.epochs

    def _flush(self) -> None:
        import pyarrow as pa

        if self._rows:
            columns = [np.concatenate(column) for column in zip(*self._rows, strict=True)]
            # No row group is larger than a reader is ready to take.
            self._writer.write_table(pa.table(columns, schema=self._schema), row_group_size=layout.ROWS_AT_ONCE)
            self._rows, self._waiting = [], 0

    def close(self) -> None:
        """Complete the trace and give it its name; a second call does nothing."""
        if self._writer is None:
            return
        if self._owner != os.getpid():
            raise ValueError("this recorder belongs to the parent process; its fork's child makes one of its own")
        try:
            self._flush()
            self._writer.add_key_value_metadata({layout.METADATA_KEY.decode(): self._header()})
            self._writer.close()
            self._writer = None
            # Contents before the name, and the name before anybody is told: after a power cut there is the old trace
            # or the new one, never an empty file.
            _sync(self._partial)
            self._partial.replace(self._path)
        except BaseException:
            self.abort()
            raise
        # From here on it is there: nothing that fails may say otherwise, nor may a warning that is an error.
        try:
            sync_directory(self._path.parent)
        except OSError as error:
            with suppress(RuntimeWarning):
                warnings.warn(
                    f"{self._path} is written, but its directory could not be synced ({error.strerror}): a power cut "
                    "may take it back", RuntimeWarning, stacklevel=2,
                )  # fmt: skip

    def _header(self) -> str:
        """Return what the file says of itself: with the names of the largest regions, if all are more than is read."""
        about = {key: value if len(value) <= LONGEST else f"{value[:LONGEST]} ..." for key, value in self.about.items()}
        header = {
            "version": layout.FORMAT_VERSION,
            "npages": self.npages,
            "page_size": self.page_size,
            "epochs": self.epochs,
            "regions": self.regions,
            "about": about,
            **({"program": self.program} if self.program is not None else {}),
        }
        text = json.dumps(header)
        if len(text) <= layout.MAX_METADATA_BYTES:
            return text
        room = layout.MAX_METADATA_BYTES - len(json.dumps({**header, "regions": {}}))
        named = set()
        for name, place in sorted(self.regions.items(), key=lambda item: -item[1][1]):
            room -= len(json.dumps({name: place}))
            if room < 0:
                break
            named.add(name)
        header["regions"] = {name: place for name, place in self.regions.items() if name in named}
        return json.dumps(header)

    def abort(self) -> None:
        """Give up: remove what was written, and leave a file of that name as it was."""
        writer, self._writer = self._writer, None
        if self._owner != os.getpid():
            # The file is the parent's, the position in it too: what a close would write here would be in its trace.
            if writer is not None:
                writer.is_open = False
            return
        try:
            if writer is not None:
                with suppress(Exception):  # of a full disk, say: nobody wants what it would write any more
                    writer.close()
        finally:
            self._partial.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Complete the trace, or give it up where the block failed."""
        if kind is None:
            self.close()
        else:
            self.abort()

    def __del__(self) -> None:
        """Remove the unfinished file of a recorder that was forgotten."""
        if getattr(self, "_writer", None) is not None:
            with suppress(Exception):
                self.abort()


def record(
    path: str | os.PathLike[str],
    source: Source,
    *,
    interval: float = 1.0,
    epochs: int | None = None,
    stop: threading.Event | None = None,
    clock: Callable[[], float] = time.monotonic,
    wait: Callable[[float], object] | None = None,
) -> int:
    """Harvest a source at a steady rhythm into a trace file.

    Parameters
    ----------
    path : path-like
        Where the trace goes.
    source : Source
        What to harvest. The recording takes its bits: to share them, record an
        observer's log through :class:`Recorder` instead.
    interval : float, default 1.0
        Seconds from one harvest to the next.
    epochs : int, optional
        How many harvests; until `stop` is set if left out.
    stop : threading.Event, optional
        Ends the recording, after one more harvest.
    clock : callable, optional
        Seconds, never going back; `time.monotonic` by default.
    wait : callable, optional
        Called with the seconds to the next harvest; waits for `stop` by default.

    Returns
    -------
    int
        Epochs written.

    Raises
    ------
    ValueError
        `interval` is not positive, or there is neither `epochs` nor `stop`.
    Exception
        What the source raises: then there is no trace.
    """
    if not (interval > 0 and math.isfinite(interval)):
        raise ValueError(f"interval is {interval}; it must be a positive number of seconds")
    if epochs is None and stop is None:
        raise ValueError("nothing would end this recording; give it a number of epochs, or a stop event")
    event = stop or threading.Event()
    pause = wait or event.wait
    start = clock()
    with Recorder(path, source.npages, source.page_size) as recorder:
        while recorder.epochs != epochs:
            last = event.is_set()
            if not last:
                # From the start on, not from the last harvest: delays do not add up.
                pause(max(0.0, start + (recorder.epochs + 1) * interval - clock()))
            pages = source.harvest()
            recorder.write(clock() - start, pages)
            if last:
                break
    return recorder.epochs
