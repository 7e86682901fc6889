"""An array whose rows live in many places, and whose checkpoints are one moment of all of them."""

from __future__ import annotations

import operator
import pickle
import threading
import uuid
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from contextlib import suppress
from itertools import pairwise
from types import TracebackType
from typing import Any, Self, SupportsIndex

import numpy as np
from numpy.typing import DTypeLike

from dirtylog.fleet.coordinator import Committed, Coordinator
from dirtylog.fleet.engine import Answer, Engine, Handle
from dirtylog.fleet.shard import Shard
from dirtylog.sinks.store.branch import history
from dirtylog.sinks.store.parts import default_chunks
from dirtylog.sinks.store.zarrs import ATTRIBUTE, read, zarr_package

__all__ = ["ShardedArray"]


class ShardedArray:
    """An array in shards of whole rows, one for each place of an engine, checkpointed as one.

    Parameters
    ----------
    engine : Engine
        Who runs the shards: :class:`Threads`, or :class:`dirtylog.fleet.dask.Dask`.
    shape : sequence of int
        Of the array; at least one axis.
    dtype : dtype, default float
        Of numbers.
    repo : icechunk.Repository
        Where checkpoints go; see :func:`dirtylog.sinks.store.repository`.
    name : str
        Of the array in the repository; none of that name may be there.
    branch : str
        Of the repository.
    chunks : sequence of int, optional
        The shape of a chunk; a shard is a whole number of them.
    shards : int, optional
        How many; one for each place by default, or fewer where there are not so many rows of chunks.
    timeout : float
        Seconds to wait for a shard's answer.

    Raises
    ------
    ValueError
        The array is there already, or cannot be stored.

    Notes
    -----
    Thread-safe: :meth:`apply` and :meth:`checkpoint` exclude each other, which is what makes a checkpoint one moment.

    Examples
    --------
    >>> from dirtylog.fleet import ShardedArray, Threads
    >>> from dirtylog.sinks.store import repository
    >>> def fill(rows, first_row, value):
    ...     rows[:] = value
    >>> repo = repository("directory")  # doctest: +SKIP
    >>> with Threads(2) as engine, ShardedArray(engine, (1000, 512), repo=repo) as array:  # doctest: +SKIP
    ...     _ = array.apply(fill, 1)
    ...     array.checkpoint().pages
    1000
    """

    def __init__(
        self,
        engine: Engine,
        shape: Sequence[SupportsIndex],
        dtype: DTypeLike = float,
        *,
        repo: Any,
        name: str = "array",
        branch: str = "main",
        chunks: Sequence[SupportsIndex] | None = None,
        shards: int | None = None,
        timeout: float = 60.0,
    ) -> None:
        sizes = tuple(map(operator.index, shape))
        kind = np.dtype(dtype)
        if not sizes or 0 in sizes or kind.kind not in "biufc" or not kind.isnative:
            raise ValueError(f"shape is {sizes} and dtype {kind}; a sharded array has rows, of numbers of this machine")
        extents = tuple(map(operator.index, chunks)) if chunks is not None else default_chunks(sizes, kind.itemsize)
        zarr = zarr_package()
        session = repo.writable_session(branch)
        try:
            zarr.create_array(session.store, name=name, shape=sizes, chunks=extents, dtype=kind, fill_value=0)
        except zarr.errors.ContainsArrayError:
            raise ValueError(f"there is an array {name!r} in {branch!r}; restore it, or choose another name") from None
        about = {"transaction": uuid.uuid4().hex, "epoch": 0, "pages": 0, "exact": True}
        base = session.commit(f"create {name}", metadata={ATTRIBUTE: about})
        try:
            fork = repo.writable_session(branch).fork()
            if not engine.same_process:
                fork = pickle.loads(pickle.dumps(fork))  # as it travels
            zarr.open_array(fork.store, path=name, mode="r")
        except Exception as error:
            raise ValueError(
                "what is sent to a worker does not see the repository: it is in memory, or cannot be read; use a "
                "directory that all workers have, or an object store"
            ) from error
        self._begin(engine, repo, name, branch, sizes, kind, extents, timeout)
        self._spawn_all(base, shards, False)

    def _begin(
        self,
        engine: Engine,
        repo: Any,
        name: str,
        branch: str,
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        chunks: tuple[int, ...],
        timeout: float,
    ) -> None:
        self.shape: tuple[int, ...] = shape
        self.dtype: np.dtype[Any] = dtype
        self.chunks: tuple[int, ...] = chunks
        self._engine = engine
        self._repo = repo
        self._name = name
        self._timeout = timeout
        self._coordinator = Coordinator(repo, branch, timeout=timeout)
        self._lock = threading.RLock()
        self._handles: dict[str, Handle] = {}
        self._places: dict[str, Hashable] = {}
        self._rows: dict[str, range] = {}
        self._base = ""
        self._closed = False

    @classmethod
    def restore(
        cls,
        engine: Engine,
        repo: Any,
        name: str = "array",
        snapshot: str | None = None,
        *,
        branch: str = "main",
        shards: int | None = None,
        timeout: float = 60.0,
    ) -> Self:
        """Make the array again from a snapshot, in any number of shards.

        Parameters
        ----------
        engine, repo, name, shards, timeout
            As for the class.
        snapshot : str, optional
            Which; the newest of the branch by default.
        branch : str
            Where later checkpoints go. One that is not there is made, from the snapshot: to go on from an older one
            beside what came after it.

        Raises
        ------
        KeyError
            There is no such array, or no snapshot.
        ValueError
            The branch has gone on since the snapshot: name a new one.
        """
        there = branch in repo.list_branches()
        if snapshot is None:
            if not there:
                raise KeyError(f"there is no branch {branch!r}; name a snapshot to make it from")
            snapshot = repo.lookup_branch(branch)
        if there and repo.lookup_branch(branch) != snapshot:
            raise ValueError(
                f"{branch!r} has gone on since {snapshot}; name a branch of its own, which is made from the snapshot"
            )
        zarr = zarr_package()
        session = repo.readonly_session(snapshot_id=snapshot)
        try:
            stored = zarr.open_array(session.store, path=name, mode="r")
        except FileNotFoundError:
            raise KeyError(f"the snapshot {snapshot} has no array {name!r}") from None
        if not there:
            repo.create_branch(branch, snapshot)
        array = cls.__new__(cls)
        array._begin(engine, repo, name, branch, stored.shape, stored.dtype, stored.chunks, timeout)
        array._spawn_all(snapshot, shards, True)
        return array

    def _spawn_all(self, base: str, shards: int | None, stored: bool) -> None:
        places = list(self._engine.places())
        if not places:
            raise ValueError("the engine has no places: no worker is there")
        blocks = -(-self.shape[0] // self.chunks[0])
        count = min(len(places) if shards is None else operator.index(shards), blocks)
        if count < 1:
            raise ValueError(f"shards is {shards}; it must be at least 1")
        edges = [min(blocks * each // count * self.chunks[0], self.shape[0]) for each in range(count + 1)]
        self._rows = {f"{first}-{end}": range(first, end) for first, end in pairwise(edges)}
        self._base = base
        try:
            self._spawn(self._rows, stored)
        except BaseException:
            self.close()
            raise
        self._coordinator.admit(self._handles)

    def _spawn(self, names: Iterable[str], stored: bool) -> None:
        """Make shards, from zeros or from the base, each in the place that has the fewest."""
        store = self._repo.readonly_session(snapshot_id=self._base).store if stored else None
        places: list[Hashable] = list(self._engine.places())
        asked: dict[str, Answer] = {}
        taken = Counter(self._places[name] for name in self._handles)
        for name in names:
            rows = self._rows[name]
            self._places[name] = min(places, key=taken.__getitem__)
            taken[self._places[name]] += 1
            asked[name] = self._engine.spawn(
                self._places[name],
                Shard,
                self._name,
                rows.start,
                (len(rows), *self.shape[1:]),
                self.dtype.str,
                self.chunks,
                self._base,
                store,
            )
        # All of them, also where one fails: one that is made and that nobody knows would never be closed.
        failed: Exception | None = None
        for name, answer in asked.items():
            try:
                self._handles[name] = answer.result(self._timeout)
            except Exception as error:
                failed = failed or error
        if failed is not None:
            raise failed

    def __repr__(self) -> str:
        """Say how large it is, and where it stands."""
        return f"<ShardedArray: shape {self.shape} of {self.dtype} in {len(self._rows)} shards, at {self._base}>"

    @property
    def base(self) -> str:
        """The last snapshot of all shards."""
        return self._base

    @property
    def rows(self) -> list[range]:
        """Which rows each shard has."""
        return list(self._rows.values())

    def apply(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Call a function in every shard, at the same time, and wait for all.

        Parameters
        ----------
        function : callable
            Called with the rows as a NumPy array, to read and to write in place, the number of the first of them, and
            `args`. Where shards are processes it travels there.
        *args
            Passed on.

        Returns
        -------
        list
            What the calls returned, by the order of the rows.

        Raises
        ------
        Exception
            What the first that failed raised; others may have written.
        """
        with self._lock:
            self._check_open()
            asked = [handle.call("apply", function, args) for handle in self._handles.values()]
            failed, found = None, []
            for answer in asked:
                try:
                    found.append(answer.result(self._timeout))
                except Exception as error:
                    failed = failed or error
            if failed is not None:
                raise failed
            return found

    def read(self, snapshot: str | None = None) -> np.ndarray[Any, Any]:
        """Return the array here: as it is now, or as it was.

        Parameters
        ----------
        snapshot : str, optional
            Which one; without, the rows that the shards have.
        """
        if snapshot is None:
            return np.concatenate(self.apply(_rows))
        store = self._repo.readonly_session(snapshot_id=snapshot).store
        found: np.ndarray[Any, Any] = read(store, [self._name])[self._name]
        return found

    def checkpoint(self, *, step: int | None = None, message: str | None = None) -> Committed:
        """Commit one moment of all shards: what is dirty in each, or nothing.

        Parameters
        ----------
        step : int, optional
            What to find it by.
        message : str, optional
            Of the commit.

        Returns
        -------
        Committed
            What was committed.

        Raises
        ------
        Exception
            As :meth:`Coordinator.epoch`. Where a worker has died: nothing is committed, and :meth:`recover` brings its
            shard back.
        """
        with self._lock:
            self._check_open()
            committed = self._coordinator.epoch(self._handles, step=step, message=message)
            self._base = committed.snapshot
            return committed

    def history(self) -> list[Any]:
        """List the snapshots of the branch, oldest first: see :func:`dirtylog.sinks.store.history`."""
        return history(self._repo, self._coordinator.branch)

    def recover(self) -> list[str]:
        """Go back to the last snapshot after a loss: shards that do not answer are made again, and all are restored.

        Returns
        -------
        list of str
            The shards that were made again, as ``"first-end"`` of their rows.

        Notes
        -----
        All go back, because a shard that has lost what was written since and one that has not are not of one moment. Do
        again what was done since the snapshot. A commit that was under way is there whole or not at all: :attr:`base`
        says which snapshot it is.
        """
        with self._lock:
            self._check_open()
            self._base = self._repo.lookup_branch(self._coordinator.branch)
            store = self._repo.readonly_session(snapshot_id=self._base).store
            asked: dict[str, Answer] = {}
            for name, handle in self._handles.items():
                with suppress(Exception):
                    asked[name] = handle.call("reload", self._base, store)
            lost = [name for name in self._rows if name not in asked]
            for name, answer in asked.items():
                try:
                    answer.result(self._timeout)
                except Exception:
                    lost.append(name)
            for name in lost:
                with suppress(Exception):
                    self._engine.release(self._handles.pop(name))
            self._spawn(lost, True)
            self._handles = {name: self._handles[name] for name in self._rows}
            self._coordinator.admit(self._handles)
            return lost

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError("the array is closed; restore it from its repository")

    def close(self) -> None:
        """Let the shards go; writes nothing, and does nothing a second time."""
        self._closed = True
        for handle in self._handles.values():
            with suppress(Exception):
                handle.call("close").result(self._timeout)
            with suppress(Exception):
                self._engine.release(handle)
        self._handles = {}

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it."""
        self.close()


def _rows(array: np.ndarray[Any, Any], first_row: int) -> np.ndarray[Any, Any]:
    return array.copy()
