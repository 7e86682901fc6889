"""Shards as actors of Dask: one for each worker process, dead when its worker dies, and made again by a restore."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, SupportsIndex

from numpy.typing import DTypeLike

from dirtylog.errors import BackendUnavailable
from dirtylog.fleet.array import ShardedArray as _ShardedArray
from dirtylog.fleet.engine import Answer, Engine, Handle

__all__ = ["Dask", "ShardedArray"]


class _Actor:
    """An actor; the future keeps it alive."""

    def __init__(self, future: Any, actor: Any) -> None:
        self.future = future
        self._actor = actor

    def call(self, method: str, *args: Any) -> Answer:
        answer: Answer = getattr(self._actor, method)(*args)
        return answer


class _Spawned:
    """An actor that is being made."""

    def __init__(self, future: Any) -> None:
        self._future = future

    def result(self, timeout: float | None = None) -> _Actor:
        return _Actor(self._future, self._future.result(timeout))


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
    """

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
        return sorted(self._client.scheduler_info(n_workers=-1)["workers"])

    def spawn(self, place: Hashable, factory: Callable[..., Any], *args: Any) -> Answer:
        """Begin to make an actor in a worker."""
        return _Spawned(
            self._client.submit(factory, *args, actor=True, workers=[place], allow_other_workers=False, pure=False)
        )

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
