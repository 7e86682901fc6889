"""The engine that needs none: every shard in this process, its calls in threads."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

from dirtylog.fleet.engine import Answer, Handle

__all__ = ["Threads"]


class _Local:
    """An object of this process."""

    def __init__(self, thing: Any, pool: ThreadPoolExecutor) -> None:
        self._thing = thing
        self._pool = pool

    def call(self, method: str, *args: Any) -> Future[Any]:
        return self._pool.submit(getattr(self._thing, method), *args)


class Threads:
    """Runs the shards of a fleet in threads of this process.

    Parameters
    ----------
    count : int
        Places, and threads.

    Notes
    -----
    A context manager: closes its threads at the end, not the shards.
    """

    same_process = True

    def __init__(self, count: int = 2) -> None:
        if not isinstance(count, int) or count < 1:
            raise ValueError(f"count is {count!r}; it must be at least 1")
        self._count = count
        self._pool = ThreadPoolExecutor(count, "dirtylog-fleet")

    def places(self) -> Sequence[int]:
        """List the places: numbers."""
        return range(self._count)

    def spawn(self, place: Hashable, factory: Callable[..., Any], *args: Any) -> Answer:
        """Make an object; all places are this process."""
        return self._pool.submit(lambda: _Local(factory(*args), self._pool))

    def release(self, handle: Handle) -> None:
        """Let an object go: in a thread, because one that does not answer may never end."""
        close = getattr(handle._thing, "close", None) if isinstance(handle, _Local) else None
        if close is not None:
            self._pool.submit(close)

    def close(self) -> None:
        """End the threads; does nothing a second time."""
        self._pool.shutdown()

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it."""
        self.close()
