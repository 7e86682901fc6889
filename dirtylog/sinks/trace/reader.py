"""Reads traces, and trusts nothing in the file: epoch by epoch, as an iterator or as a source."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from dirtylog._bits.pages import DirtyPages, check_geometry
from dirtylog.sinks.trace import layout
from dirtylog.sinks.trace.layout import TraceError, parquet_module
from dirtylog.sinks.trace.parquet_pages import unpacked_sizes
from dirtylog.sinks.trace.runs import Runs

__all__ = ["Trace", "TraceEpoch"]


@dataclass(frozen=True)
class TraceEpoch:
    """One moment of a trace.

    Attributes
    ----------
    number : int
        1 for the first.
    time : float
        Seconds since the recording began, when the source was harvested.
    runs : Runs
        Which pages, as runs.
    page_size : int
        Bytes per page.
    exact : bool
        False where the source lost track.
    pages : DirtyPages
        What it reported.

    Notes
    -----
    `pages` is made when it is first asked for. What reads epochs without it costs what is in the file, however large
    the page space is.
    """

    number: int
    time: float
    runs: Runs
    page_size: int
    exact: bool

    @cached_property
    def pages(self) -> DirtyPages:
        """What it reported."""
        return self.runs.pages(self.page_size, exact=self.exact)

    @property
    def nbytes(self) -> int:
        """Bytes that the pages hold."""
        return self.runs.count * self.page_size


class Trace:
    """A trace file as a source: each harvest yields the next epoch, or all epochs up to a moment.

    Parameters
    ----------
    path : path-like
        A file that :class:`Recorder` or :func:`dirtylog.sinks.trace.record` wrote.

    Attributes
    ----------
    npages, page_size : int
        The page space, in pages of so many bytes.
    regions : dict of str to (first, count)
        Names for ranges of pages.
    about : dict of str to str
        What was recorded, when and where, as far as it was noted: ``command``,
        ``started``, ``machine``.
    program : (float, float)
        From when to when the program's own code ran, in seconds since the recording
        began; what is before that or after is its start and its end. Of a trace that
        says nothing of it, from 0 to infinity.
    length : int
        How many epochs the file says it has.
    time, number : float, int
        Of the epoch that was harvested last; 0 before.

    Raises
    ------
    BackendUnavailable
        pyarrow is not installed.
    OSError
        The file cannot be read.
    TraceError
        It is not a trace, or one of another version.

    Notes
    -----
    Trusts nothing in the file: names, types, sizes, order, ranges and checksums
    are checked, every row as it is read, and no more than 2**20 runs are held at
    a time unless one epoch has more. A bitmap of the page space is made only when
    pages are asked for: by a harvest, a peek, or an epoch's `pages`. For one
    thread. A context manager.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        parquet = parquet_module()
        import pyarrow as pa

        self.path: Path = Path(path)
        # A file that cannot be opened is an OSError of its own, not a damaged trace.
        self._handle: Any = self.path.open("rb")
        try:
            try:
                self._file: Any = parquet.ParquetFile(
                    self._handle,
                    page_checksum_verification=True,
                    arrow_extensions_enabled=False,
                    pre_buffer=False,
                    thrift_string_size_limit=layout.MAX_METADATA_BYTES * 16,
                    thrift_container_size_limit=layout.MAX_METADATA_BYTES,
                )
                self._check_layout()
            except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
                raise self._error(f"not a Parquet file that can be read ({error})") from error
            self.rewind()
        except BaseException:
            self._handle.close()
            raise

    def _error(self, what: str) -> TraceError:
        return TraceError(f"{self.path}: {what}; record it again, or take another copy of the file")

    def _check_layout(self) -> None:
        """Check all that the file says about itself before a row is read."""
        schema = self._file.schema_arrow
        if {field.name: str(field.type) for field in schema} != layout.COLUMNS or len(schema) != len(layout.COLUMNS):
            raise self._error(f"its columns are {schema.names}; a trace has {list(layout.COLUMNS)} of fixed types")
        raw = (self._file.metadata.metadata or {}).get(layout.METADATA_KEY, b"")
        if not raw or len(raw) > layout.MAX_METADATA_BYTES:
            raise self._error("it is not marked as a trace of dirtylog")
        try:
            header = json.loads(raw)
            version, sizes = header["version"], [header[key] for key in ("npages", "page_size", "epochs")]
            regions = {str(name): (first, count) for name, (first, count) in header["regions"].items()}
            # Traces of before have none.
            about = {str(key): str(value) for key, value in header.get("about", {}).items()}
            begins, ends = map(float, header.get("program", (0.0, math.inf)))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
            raise self._error(f"its header cannot be read ({type(error).__name__}: {error})") from error
        if version != layout.FORMAT_VERSION:
            raise self._error(f"it is of version {version!r}; this dirtylog reads version {layout.FORMAT_VERSION}")
        if any(type(size) is not int for size in sizes):
            raise self._error(f"npages, page_size and epochs are {sizes}, not whole numbers")
        try:
            self.npages: int
            self.page_size: int
            self.npages, self.page_size = check_geometry(sizes[0], sizes[1])
        except ValueError as error:
            raise self._error(str(error)) from error
        self.length: int = sizes[2]
        if self.npages > layout.MAX_TRACE_PAGES:
            raise self._error(f"npages is {self.npages}; a trace has up to {layout.MAX_TRACE_PAGES}")
        for name, (first, count) in regions.items():
            if type(first) is not int or type(count) is not int or not 0 <= first <= first + count <= self.npages:
                raise self._error(f"region {name!r} is {(first, count)}, not a range of its {self.npages} pages")
        if not 0 <= begins <= ends:
            raise self._error(f"its program ran from {begins} to {ends} s")
        self.regions = regions
        self.about = about
        self.program: tuple[float, float] = (begins, ends)
        metadata = self._file.metadata
        if not 0 <= self.length <= metadata.num_rows:
            raise self._error(f"it claims {self.length} epochs in {metadata.num_rows} rows")
        for i in range(metadata.num_row_groups):
            group = metadata.row_group(i)
            # 33 bytes per row, and as much again for dictionaries and levels.
            if not (
                0 <= group.num_rows <= layout.ROWS_AT_ONCE and 0 <= group.total_byte_size <= 66 * layout.ROWS_AT_ONCE
            ):
                raise self._error(f"row group {i} claims {group.num_rows} rows of {group.total_byte_size} bytes")
            self._check_pages(i, group)

    def _check_pages(self, number: int, group: Any) -> None:
        """Check what a row group's pages unpack to: the reader allocates what they say, not what the footer says."""
        total = 0
        try:
            for i in range(group.num_columns):
                column = group.column(i)
                start = column.data_page_offset
                if column.dictionary_page_offset and column.dictionary_page_offset > 0:
                    start = min(start, column.dictionary_page_offset)
                if start < 0 or column.total_compressed_size < 0:
                    raise ValueError(f"a column begins at byte {start}")
                for size in unpacked_sizes(self._handle.fileno(), start, column.total_compressed_size):
                    total += size
                    if total > 66 * layout.ROWS_AT_ONCE:
                        raise ValueError(f"its pages unpack to more than {66 * layout.ROWS_AT_ONCE} bytes")
        except (ValueError, OverflowError) as error:
            raise self._error(f"row group {number} cannot be read: {error}") from None

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        self._handle.close()

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""
        closed: bool = self._handle.closed
        return closed

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the file."""
        self.close()

    def rewind(self) -> None:
        """Begin again with the first epoch."""
        self.time: float = 0.0
        self.number: int = 0
        self._epochs = self.epochs()
        self._next: TraceEpoch | None = next(self._epochs, None)

    @property
    def done(self) -> bool:
        """Whether every epoch was harvested."""
        return self._next is None

    def harvest(self, until: float | None = None) -> DirtyPages:
        """Take the next epoch's pages, or those of all epochs up to a moment.

        Parameters
        ----------
        until : float, optional
            Seconds since the recording began.

        Returns
        -------
        DirtyPages
            None dirty at the end of the trace.

        Raises
        ------
        TraceError
            What comes next in the file is damaged.
        ValueError
            The trace is closed.
        """
        runs, exact = Runs.nothing(self.npages), True
        while self._next is not None and (until is None or self._next.time <= until):
            upcoming = self._next
            following = next(self._epochs, None)
            runs, exact = runs | upcoming.runs, exact and upcoming.exact
            self.time, self.number, self._next = upcoming.time, upcoming.number, following
            if until is None:
                break
        return runs.pages(self.page_size, exact=exact)

    def peek(self) -> DirtyPages:
        """Return what the next harvest would, and leave it there."""
        return self._next.pages if self._next is not None else DirtyPages._empty(self.npages, self.page_size)

    def epochs(self) -> Iterator[TraceEpoch]:
        """Iterate over all epochs, from the first, apart from any harvest.

        Yields
        ------
        TraceEpoch
            In the order of the recording.

        Raises
        ------
        TraceError
            At the first row that is damaged.
        ValueError
            The trace is closed.
        """
        time, number, exact = 0.0, 0, True
        parts: list[npt.NDArray[np.int64]] = []
        # Where the epoch's runs have come to: they ascend, so an epoch costs no more than its page space.
        reach = 0
        for times, numbers, runs, flags in self._batches():
            # An epoch begins where the number steps; it may go on into the next batch.
            steps = np.flatnonzero(np.diff(numbers, prepend=number))
            for start, end in pairwise(np.unique([0, *steps, len(numbers)]).tolist()):
                if numbers[start] != number:
                    if number:
                        yield self._epoch(number, time, parts, exact)
                    if numbers[start] != number + 1 or times[start] < time:
                        raise self._error(
                            f"epoch {numbers[start]} at {times[start]} s comes after epoch {number} at {time} s"
                        )
                    number, time, exact, parts = number + 1, float(times[start]), bool(flags[start]), []
                    reach = 0
                if not number:
                    raise self._error("it has rows of epoch 0; the first is 1")
                if not ((times[start:end] == time).all() and (flags[start:end] == exact).all()):
                    raise self._error(f"the rows of epoch {number} are not of one time")
                rows = runs[start:end]
                ends = rows[:, 0] + rows[:, 1]
                if rows[0, 0] < reach or (rows[1:, 0] < ends[:-1]).any():
                    raise self._error(f"the runs of epoch {number} overlap or do not ascend")
                if (parts or len(rows) > 1) and (not rows[:, 1].all() or (parts and not parts[0][0, 1])):
                    raise self._error(f"epoch {number} has a run of no pages beside others")
                reach = int(ends[-1])
                parts.append(rows)
        if number:
            yield self._epoch(number, time, parts, exact)
        if number != self.length:
            raise self._error(f"it claims {self.length} epochs and has {number}")

    def _epoch(self, number: int, time: float, parts: list[npt.NDArray[np.int64]], exact: bool) -> TraceEpoch:
        runs = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return TraceEpoch(number, time, Runs(runs, self.npages), self.page_size, exact)

    def _batches(self) -> Iterator[tuple[npt.NDArray[Any], ...]]:
        """Read and check some rows at a time: times, epoch numbers, runs, flags."""
        import pyarrow as pa

        if self.closed:
            raise ValueError(f"the trace {self.path} is closed; open it again")
        batches = self._file.iter_batches(
            batch_size=layout.ROWS_AT_ONCE // 8, columns=list(layout.COLUMNS), use_threads=False
        )
        while True:
            try:
                batch = next(batches, None)
            except (pa.ArrowException, OSError) as error:
                raise self._error(f"damaged ({error})") from error
            if batch is None:
                return
            if any(column.null_count for column in batch.columns):
                raise self._error("it has empty cells")
            times, numbers, first, count, flags = (column.to_numpy(zero_copy_only=False) for column in batch.columns)
            if not (np.isfinite(times).all() and (times >= 0).all()):
                raise self._error("it has a time that is not a number of seconds")
            # Compared without adding: first + count could wrap around.
            if not ((first >= 0) & (first <= self.npages) & (count >= 0) & (count <= self.npages - first)).all():
                raise self._error(f"it has a run that reaches out of its {self.npages} pages")
            yield times, numbers, np.stack([first, count], axis=1), flags
