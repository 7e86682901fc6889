"""Some rows of a sharded array, where they live: memory, its tracker, and its part in transactions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dirtylog.log import DirtyLog
from dirtylog.sinks.store.participant import Participant, Prepared, Standing
from dirtylog.sinks.store.zarrs import read
from dirtylog.sources.memory import track, zeros

__all__ = ["Shard"]


class Shard:
    """Rows of an array, tracked from the start.

    Parameters
    ----------
    name : str
        Of the array in the store.
    first_row : int
        Where the rows begin.
    shape : sequence of int
        Of these rows.
    dtype : str
        As NumPy describes it.
    chunks : sequence of int
        Of the stored array.
    base : str
        The snapshot that it begins from.
    store : zarr store or None
        To read it from; None where the snapshot has zeros.
    """

    def __init__(
        self,
        name: str,
        first_row: int,
        shape: Sequence[int],
        dtype: str,
        chunks: Sequence[int],
        base: str,
        store: Any | None,
    ) -> None:
        self._name = name
        self._chunks = tuple(chunks)
        self.first_row: int = first_row
        self.array: np.ndarray[Any, Any] = zeros(shape, np.dtype(dtype))
        if store is not None:
            self._load(store)
        self._tracker = track(self.array)
        log = DirtyLog()
        log.attach(self._tracker)
        self._observer = log.observer("fleet")
        self._participant = self._new(base)

    def _new(self, base: str) -> Participant:
        arrays = {self._name: self.array}
        return Participant(self._observer, arrays, base=base, chunks=self._chunks, first_row=self.first_row)

    def _load(self, store: Any) -> None:
        rows = slice(self.first_row, self.first_row + len(self.array))
        read(store, out={self._name: self.array}, rows=rows)

    def reload(self, base: str, store: Any) -> Standing:
        """Go back to a snapshot: what was written since is gone, and nothing is dirty."""
        self._participant.close()
        self._load(store)
        with self._observer.collect():
            pass
        self._participant = self._new(base)
        return self._participant.standing()

    def apply(self, function: Callable[..., Any], args: Sequence[Any]) -> Any:
        """Call a function with the rows and the number of the first."""
        return function(self.array, self.first_row, *args)

    def standing(self) -> Standing:
        """See `Participant.standing`."""
        return self._participant.standing()

    def prepare(self, tx: str, session: Any) -> Prepared:
        """See `Participant.prepare`."""
        return self._participant.prepare(tx, session)

    def decide(self, tx: str, commit: bool, snapshot: str | None = None) -> bool:
        """See `Participant.decide`."""
        return self._participant.decide(tx, commit, snapshot)

    def resolve(self, repo: Any, branch: str) -> Standing:
        """See `Participant.resolve`."""
        return self._participant.resolve(repo, branch)

    def close(self) -> None:
        """End the tracking; does nothing a second time."""
        self._participant.close()
        self._tracker.close()
