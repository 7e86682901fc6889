"""Traces of many machines swept for policy: at which bandwidth they migrate, and what it costs to save them."""

from __future__ import annotations

import math
import operator
import os
import statistics
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any, SupportsIndex

import numpy as np
import numpy.typing as npt

from dirtylog.errors import DirtyLogError
from dirtylog.sinks.forecast import Forecast
from dirtylog.sinks.trace import Trace, TraceError, what_if
from dirtylog.sinks.trace.layout import parquet_module
from dirtylog.sinks.trace.runs import Runs

__all__ = ["Machine", "Migrating", "Saves", "Saving", "Sweep", "sweep"]

# Names that a trace goes by. A file of another name is looked into: a Parquet file begins with its mark.
ENDINGS, MARK = (".parquet", ".trace"), b"PAR1"


@dataclass(frozen=True, slots=True)
class Saves:
    """What saving one machine at one interval would have cost.

    Attributes
    ----------
    epochs : int
        How many times it would have been saved.
    seconds : float
        In how long.
    pages : int
        Dirty pages of all epochs.
    chunks : tuple of int
        Dirty chunks of all epochs, for each size.
    most : tuple of int
        Dirty chunks of the epoch that has the most, for each size.
    """

    epochs: int
    seconds: float
    pages: int
    chunks: tuple[int, ...]
    most: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Machine:
    """What one trace says.

    Attributes
    ----------
    name : str
        The trace's, below the place that was swept.
    about : mapping of str to str
        What was noted when it was recorded: the machine, the command.
    seconds : float
        How long the program ran.
    memory_bytes : int
        The size of the memory that was watched.
    dirtied_bytes : int
        What was written while the program ran; a page counts again in every harvest.
    page_size : int
        In bytes.
    exact : bool
        False where the source lost track: figures are upper bounds.
    forecasts : tuple of Forecast
        One for each bandwidth and downtime, in the order of :attr:`Sweep.migrations`.
    saved : tuple of Saves
        One for each interval.
    """

    name: str
    about: Mapping[str, str]
    seconds: float
    memory_bytes: int
    dirtied_bytes: int
    page_size: int
    exact: bool
    forecasts: tuple[Forecast, ...]
    saved: tuple[Saves, ...]

    @property
    def bytes_per_second(self) -> float:
        """How fast it wrote, on the average."""
        return self.dirtied_bytes / self.seconds if self.seconds > 0 else 0.0


@dataclass(frozen=True, slots=True)
class Migrating:
    """How live migrations of all machines would go, at one bandwidth and one downtime.

    Attributes
    ----------
    bandwidth, downtime : float
        Bytes per second, and seconds of pause that are allowed.
    converging, diverging, unknown : int
        Machines; unknown where a trace is too short to tell.
    seconds, slowest : float or None
        What a migration takes of those that converge: the median, and the most. None where none does.
    pause : float or None
        The longest pause among those that converge; None where none does.
    """

    bandwidth: float
    downtime: float
    converging: int
    diverging: int
    unknown: int
    seconds: float | None
    slowest: float | None
    pause: float | None


@dataclass(frozen=True, slots=True)
class Saving:
    """What it costs to save all machines at one interval, in chunks of one size.

    Attributes
    ----------
    interval : float
        Seconds from one save to the next.
    chunk_bytes : int
        Size of a chunk.
    machines : int
        Those whose traces are at least as long as the interval; the others are not in these figures.
    bytes_per_second, requests_per_second : float
        What they write, all together: bytes before compression, and chunks, of which each is a request.
    bytes_per_epoch : float
        What one machine writes at a time, on the average over all epochs.
    largest : int
        The most that one machine writes at a time, in bytes.
    amplification : float
        Bytes written for each dirty byte: 1 at best.
    """

    interval: float
    chunk_bytes: int
    machines: int
    bytes_per_second: float
    requests_per_second: float
    bytes_per_epoch: float
    largest: int
    amplification: float


@dataclass(frozen=True, slots=True)
class Sweep:
    """What the traces of a fleet say.

    Attributes
    ----------
    machines : tuple of Machine
        By name.
    left_out : mapping of str to str
        Traces that could not be read, and why: nothing of them is in any figure.
    migrations : tuple of Migrating
        Every bandwidth with every downtime.
    savings : tuple of Saving
        Every interval with every size of chunks.
    """

    machines: tuple[Machine, ...]
    left_out: Mapping[str, str]
    migrations: tuple[Migrating, ...]
    savings: tuple[Saving, ...]


def sweep(
    where: str | os.PathLike[str],
    *,
    bandwidths: Iterable[float] = (1.25e8, 1.25e9),
    downtimes: Iterable[float] = (0.3,),
    intervals: Iterable[float] = (10.0, 60.0, 600.0),
    chunk_sizes: Iterable[SupportsIndex] = (1 << 16, 1 << 18, 1 << 20),
    pool: Any = None,
) -> Sweep:
    """Ask the traces of many machines what a policy would have done.

    Parameters
    ----------
    where : str or path
        A directory, with what lies below it, or an address that pyarrow knows: ``"s3://bucket/prefix"``, ``"gs://"``.
        Traces are the files that end in ``.parquet`` or ``.trace``, and other Parquet files.
    bandwidths : iterable of float
        Of a migration, in bytes per second; see :func:`dirtylog.sinks.trace.what_if`.
    downtimes : iterable of float
        Seconds that a program may be paused for.
    intervals : iterable of float
        Seconds from one save to the next. A save is at the first moment of the trace that is not before its time.
    chunk_sizes : iterable of int
        Bytes of a chunk of the memory, all or nothing of which is written.
    pool : concurrent.futures.Executor or distributed.Client, optional
        Who reads the traces, many at a time; they see the same directory, or reach the bucket.

    Returns
    -------
    Sweep
        Figures of all machines together, and of each.

    Raises
    ------
    BackendUnavailable
        pyarrow is not installed.
    DirtyLogError
        There is no trace.
    OSError
        The place cannot be listed.
    ValueError
        A number will not do.

    Notes
    -----
    Reads a trace once for each bandwidth and downtime, and once more. A trace that is damaged is left out and named; it
    does not end the sweep. From a bucket, each trace is copied to a temporary file first.

    Examples
    --------
    >>> import tempfile, dirtylog as dl
    >>> from dirtylog.fleet.traces import sweep
    >>> from dirtylog.sinks.trace import Recorder
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     for machine in range(3):
    ...         with Recorder(f"{directory}/{machine}.parquet", 1 << 15) as recorder:
    ...             for second in range(1, 31):
    ...                 _ = recorder.write(second, dl.DirtyPages.from_runs([[100 * machine, 1000]], 1 << 15))
    ...     found = sweep(directory, bandwidths=[1e8], intervals=[10], chunk_sizes=[1 << 20])
    >>> found.migrations[0].converging, found.savings[0].requests_per_second
    (3, 1.4)
    """
    parquet_module()
    place = os.fspath(where)
    policies = list(product(_numbers("bandwidths", bandwidths), _numbers("downtimes", downtimes, zero=True)))
    every = _numbers("intervals", intervals)
    sizes = [operator.index(size) for size in chunk_sizes]
    if not sizes or min(sizes) < 1:
        raise ValueError(f"chunk_sizes is {sizes}; each must be at least 1 byte, and there must be one")
    names = sorted(_names(place))
    ask = partial(_machine, place, policies=policies, intervals=every, sizes=sizes)
    if pool is None:
        answers: Iterable[Any] = map(ask, names)
    elif hasattr(pool, "gather"):
        # Dask would answer of a trace that was recorded again what it answered before.
        answers = pool.gather(pool.map(ask, names, pure=False))
    else:
        answers = pool.map(ask, names)
    machines, left_out = [], {}
    for name, answer in zip(names, answers, strict=True):
        if isinstance(answer, Machine):
            machines.append(answer)
        elif answer is not None:
            left_out[name] = str(answer)
    if not machines:
        why = "; ".join(f"{name}: {said}" for name, said in list(left_out.items())[:3])
        raise DirtyLogError(
            f"{place} has no trace that can be read{': ' + why if why else ''}; 'dirtylog record' writes them"
        )
    return Sweep(
        machines=tuple(machines),
        left_out=left_out,
        migrations=tuple(
            _migrating(bandwidth, downtime, [machine.forecasts[number] for machine in machines])
            for number, (bandwidth, downtime) in enumerate(policies)
        ),
        savings=tuple(
            _saving(interval, size, at, number, machines)
            for (at, interval), (number, size) in product(enumerate(every), enumerate(sizes))
        ),
    )


def _numbers(name: str, given: Iterable[float], *, zero: bool = False) -> list[float]:
    found = [float(number) for number in given]
    if not found or not all(math.isfinite(number) and (number > 0 or (zero and number == 0)) for number in found):
        raise ValueError(f"{name} is {found}; each must be {'at least' if zero else 'above'} 0, and there must be one")
    return found


# ---- all machines together ------------------------------------------------------------------------------------------


def _migrating(bandwidth: float, downtime: float, forecasts: Sequence[Forecast]) -> Migrating:
    converging = [each for each in forecasts if each.verdict == "converges"]
    seconds = [each.seconds for each in converging]
    return Migrating(
        bandwidth=bandwidth,
        downtime=downtime,
        converging=len(converging),
        diverging=sum(each.verdict == "does not converge" for each in forecasts),
        unknown=sum(each.verdict == "unknown" for each in forecasts),
        seconds=statistics.median(seconds) if seconds else None,
        slowest=max(seconds, default=None),
        pause=max((each.downtime for each in converging), default=None),
    )


def _saving(interval: float, size: int, at: int, number: int, machines: Sequence[Machine]) -> Saving:
    found = [(machine, machine.saved[at]) for machine in machines if machine.saved[at].epochs]
    epochs = sum(saved.epochs for _, saved in found)
    written = sum(saved.chunks[number] for _, saved in found) * size
    dirty = sum(saved.pages * machine.page_size for machine, saved in found)
    per_second = sum(saved.chunks[number] / saved.seconds for _, saved in found)
    return Saving(
        interval=interval,
        chunk_bytes=size,
        machines=len(found),
        bytes_per_second=per_second * size,
        requests_per_second=per_second,
        bytes_per_epoch=written / epochs if epochs else 0.0,
        largest=max((saved.most[number] for _, saved in found), default=0) * size,
        amplification=written / dirty if dirty else 0.0,
    )


# ---- one machine: runs wherever the pool is -------------------------------------------------------------------------


def _machine(
    where: str,
    name: str,
    *,
    policies: Sequence[tuple[float, float]],
    intervals: Sequence[float],
    sizes: Sequence[int],
) -> Machine | str | None:
    """Return what a trace says; why it cannot be read; None where it is no Parquet file and has no trace's name."""
    with _local(where, name) as path:
        if not name.endswith(ENDINGS):
            with open(path, "rb") as file:
                if file.read(len(MARK)) != MARK:
                    return None
        try:
            with Trace(path) as trace:
                return _read(trace, name, policies, intervals, sizes)
        except (TraceError, OSError) as error:
            return str(error)


def _read(
    trace: Trace,
    name: str,
    policies: Sequence[tuple[float, float]],
    intervals: Sequence[float],
    sizes: Sequence[int],
) -> Machine:
    begins, ends = trace.program
    meters = [_Meter(trace, interval, begins, sizes) for interval in intervals]
    pages, last, exact = 0, begins, True
    for epoch in trace.epochs():
        exact = exact and epoch.exact
        if begins < epoch.time <= ends:
            pages += epoch.runs.count
            last = epoch.time
            for meter in meters:
                meter.add(epoch.time, epoch.runs)
    return Machine(
        name=name,
        about=trace.about,
        seconds=last - begins,
        memory_bytes=trace.npages * trace.page_size,
        dirtied_bytes=pages * trace.page_size,
        page_size=trace.page_size,
        exact=exact,
        forecasts=tuple(what_if(trace, bandwidth, downtime) for bandwidth, downtime in policies),
        saved=tuple(meter.saved() for meter in meters),
    )


class _Meter:
    """Counts what saves at one interval would have written."""

    def __init__(self, trace: Trace, interval: float, begins: float, sizes: Sequence[int]) -> None:
        self._page_size = trace.page_size
        self._interval = interval
        self._sizes = sizes
        self._nothing = self._pending = Runs.nothing(trace.npages)
        self._begins = self._last = begins
        self._epochs = self._pages = 0
        self._chunks: npt.NDArray[np.int64] = np.zeros(len(sizes), np.int64)
        self._most: npt.NDArray[np.int64] = np.zeros(len(sizes), np.int64)

    def add(self, time: float, runs: Runs) -> None:
        self._pending |= runs
        # A sum of harvests may end a little early.
        if time - self._last < self._interval * (1 - 1e-3):
            return
        chunks = [chunks_of(self._pending.runs(), self._page_size, size) for size in self._sizes]
        self._chunks += chunks
        self._most = np.maximum(self._most, chunks)
        self._pages += self._pending.count
        self._epochs += 1
        self._last, self._pending = time, self._nothing

    def saved(self) -> Saves:
        return Saves(
            epochs=self._epochs,
            seconds=self._last - self._begins,
            pages=self._pages,
            chunks=tuple(self._chunks.tolist()),
            most=tuple(self._most.tolist()),
        )


def chunks_of(runs: npt.NDArray[np.int64], page_size: int, size: int) -> int:
    """Count the chunks of a size, in bytes, that have a byte in a run of pages; runs ascend and do not overlap."""
    if not len(runs):
        return 0
    first = runs[:, 0] * page_size // size
    last = (runs.sum(axis=1) * page_size - 1) // size
    # Two runs that follow each other have at most the chunk in common in which one ends and the other begins.
    return int((last - first + 1).sum() - (first[1:] == last[:-1]).sum())


# ---- where they are -------------------------------------------------------------------------------------------------


def _names(where: str) -> Iterator[str]:
    """List the files below a place."""
    if "://" in where:
        from pyarrow import fs

        system, root = fs.FileSystem.from_uri(where)
        for info in system.get_file_info(fs.FileSelector(root, recursive=True)):
            if info.is_file:
                yield info.path[len(root) :].lstrip("/")
        return
    if not os.path.isdir(where):
        os.listdir(where)  # says what is wrong
    for directory, _, files in os.walk(where):
        for name in files:
            if not name.startswith("."):
                yield os.path.relpath(os.path.join(directory, name), where)


@contextmanager
def _local(where: str, name: str) -> Iterator[str]:
    """Give a file's path; of one in a bucket, that of a copy."""
    if "://" not in where:
        yield os.path.join(where, name)
        return
    from pyarrow import fs

    system, root = fs.FileSystem.from_uri(where)
    with tempfile.TemporaryDirectory(prefix="dirtylog-trace-") as directory:
        path = os.path.join(directory, os.path.basename(name))
        fs.copy_files(f"{root}/{name}", path, source_filesystem=system, destination_filesystem=fs.LocalFileSystem())
        yield path
