"""Shards as actors of Dask: one for each worker process, dead when its worker dies, and made again by a restore."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Hashable, Sequence
from typing import Any, SupportsIndex

from numpy.typing import DTypeLike

from dirtylog.errors import BackendUnavailable
from dirtylog.fleet.array import ShardedArray as _ShardedArray
from dirtylog.fleet.engine import Answer, Engine, Handle

__all__ = ["Dask", "ShardedArray"]


# How long a call is waited for, in seconds, before it is asked whether its worker lives. Dask itself goes on for half a
# minute to try to reach one that has died, and waits for ever for one that is to make an actor and is gone.
LOOK = 0.25
# How long an answer that is there may take to be handed over.
DONE = 60.0


def _said(who: str) -> str:
    return f"{who} is gone, with what it had; restore from the last snapshot"


def _waited(what: Any, timeout: float | None, gone: Callable[[], str]) -> Any:
    """Wait for a future of Dask, as long as whoever is to answer it lives.

    Parameters
    ----------
    what : distributed.Future or ActorFuture
        What is waited for.
    timeout : float or None
        Seconds.
    gone : callable
        Says who has died; empty where nobody has.
    """
    end = math.inf if timeout is None else time.monotonic() + timeout
    while True:
        try:
            return what.result(min(LOOK, max(0.0, end - time.monotonic())))
        except TimeoutError:
            if what.done():
                # It came in between, or this is what the call itself raised; Dask's loop may be slow to say which.
                return what.result(max(DONE, end - time.monotonic()) if timeout is not None else None)
            if who := gone():
                raise ConnectionError(
                    f"{who} is gone, and what it had with it; restore from the last snapshot"
                ) from None
            if time.monotonic() >= end:
                raise


class _Call:
    """What a call to an actor will give."""

    def __init__(self, answer: Any, actor: _Actor) -> None:
        self._answer = answer
        self._actor = actor

    def result(self, timeout: float | None = None) -> Any:
        return _waited(self._answer, timeout, self._actor.gone)


class _Gone:
    """The answer of an actor that is gone."""

    def __init__(self, why: str) -> None:
        self._why = why

    def result(self, timeout: float | None = None) -> Any:
        raise ConnectionError(self._why)


class _Actor:
    """An actor; the future keeps it alive."""

    def __init__(self, future: Any, actor: Any, place: Hashable) -> None:
        self.future = future
        self._actor = actor
        self._place = place

    def gone(self) -> str:
        return "" if self.future.status == "finished" else f"the actor in {self._place}"

    def call(self, method: str, *args: Any) -> Answer:
        # Where one of many is gone the others are waited for all the same, so this is heard with their answers.
        if gone := self.gone():
            return _Gone(_said(gone))
        try:
            return _Call(getattr(self._actor, method)(*args), self)
        except RuntimeError as error:
            return _Gone(f"{_said(f'the actor in {self._place}')} ({error})")


class _Spawned:
    """An actor that is being made."""

    def __init__(self, future: Any, place: Hashable, places: Callable[[], Sequence[Hashable]]) -> None:
        self._future = future
        self._place = place
        self._places = places

    def result(self, timeout: float | None = None) -> _Actor:
        return _Actor(self._future, _waited(self._future, timeout, self._gone), self._place)

    def _gone(self) -> str:
        return "" if self._place in self._places() else f"the worker {self._place}"


class Dask:
    """Runs the shards of a fleet as actors of Dask.

    Parameters
    ----------
    client : distributed.Client
        Of the cluster. Its workers have dirtylog, zarr and icechunk, and reach the store.

    Raises
    ------
    BackendUnavailable
        The package distributed is not installed.

    Notes
    -----
    The actors live as long as the client: where it dies, restore the array from the store.

    Icechunk from version 2 on has threads from the moment when it is imported: a worker process that is forked from one
    that has imported it waits for ever. Dask starts workers by "spawn" unless it is told otherwise.
    """

    same_process = False

    def __init__(self, client: Any) -> None:
        try:
            import distributed
        except ImportError as error:
            raise BackendUnavailable("Dask", f"import distributed: {error}", "pip install distributed") from None
        if not isinstance(client, distributed.Client):
            raise TypeError(f"client is {type(client).__name__}; it must be a distributed.Client")
        self._client = client

    def places(self) -> Sequence[str]:
        """List the addresses of the workers."""
        # What client.scheduler_info() answers may be without workers: the client asks for that itself, now and then.
        client: Any = self._client
        return sorted(client.sync(client.scheduler.identity, n_workers=-1)["workers"])

    def spawn(self, place: Hashable, factory: Callable[..., Any], *args: Any) -> Answer:
        """Begin to make an actor in a worker."""
        future = self._client.submit(factory, *args, actor=True, workers=[place], allow_other_workers=False, pure=False)
        return _Spawned(future, place, self.places)

    def release(self, handle: Handle) -> None:
        """Let an actor go."""
        if isinstance(handle, _Actor):
            handle.future.release()


class ShardedArray(_ShardedArray):
    """An array over the workers of a Dask cluster; see :class:`dirtylog.fleet.ShardedArray`.

    Parameters
    ----------
    client : distributed.Client
        Of the cluster; or a :class:`Dask`.
    shape, dtype, repo, name, branch, chunks, shards, timeout
        As for :class:`dirtylog.fleet.ShardedArray`. Workers open the repository themselves: in memory it cannot be.
    """

    def __init__(
        self,
        client: Any,
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
        super().__init__(
            client if isinstance(client, Dask) else Dask(client),
            shape,
            dtype,
            repo=repo,
            name=name,
            branch=branch,
            chunks=chunks,
            shards=shards,
            timeout=timeout,
        )

    @classmethod
    def restore(cls, engine: Any, *args: Any, **options: Any) -> Any:
        """Make the array again from a snapshot, over the workers that are there now."""
        chosen: Engine = engine if isinstance(engine, Dask) else Dask(engine)
        return super().restore(chosen, *args, **options)
