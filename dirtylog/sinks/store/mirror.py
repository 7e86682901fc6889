"""A copy of arrays in plain Zarr that follows them: the newest state and no other, over any store that Zarr knows."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, SupportsIndex

from dirtylog.log import Observer
from dirtylog.sinks.store.parts import Chunking, Part, Task, Written, parts_of, summary, tasks
from dirtylog.sinks.store.sink import Saved
from dirtylog.sinks.store.zarrs import create, read, write, zarr_package

if TYPE_CHECKING:
    from dirtylog._typing import Memory

__all__ = ["Mirror"]

ATTRIBUTE = "dirtylog mirror"


class Mirror:
    """Keeps a copy of arrays in plain Zarr: in a directory, or through fsspec or obstore wherever those reach.

    It is a mirror and not a history: chunks are written over in place, one after the other. Whoever reads in the middle
    of a save, or after one that failed, sees some chunks of this epoch and some of the last. The group's attributes say
    which epoch is there whole, and whether another is being written. For snapshots that are whole or not there, use
    :class:`StoreSink`.

    Parameters
    ----------
    observer : Observer
        Of the log that sees what is written to the arrays. Nobody else collects from it.
    arrays : mapping of str to array
        By the names that they are to have.
    store : zarr store, str or path
        As for ``zarr.open_group``.
    chunks, places, memory, compressors
        As for :class:`StoreSink`.

    Raises
    ------
    BackendUnavailable
        The package zarr is not installed, or too old.
    ValueError
        The arrays do not fit the log's page space, or cannot be stored.

    Notes
    -----
    Thread-safe; saves come one after the other. The first writes everything. One that fails keeps its pages: the next
    writes them again.
    """

    def __init__(
        self,
        observer: Observer,
        arrays: Mapping[str, Memory],
        store: Any,
        *,
        chunks: Chunking = None,
        places: Mapping[str, SupportsIndex] | None = None,
        memory: Memory | None = None,
        compressors: Any = "auto",
    ) -> None:
        zarr_package()
        self._observer = observer
        self._parts: list[Part] = parts_of(
            arrays, observer.npages, observer.page_size, chunks=chunks, places=places, memory=memory
        )
        self._store = store
        self._compressors = compressors
        self._complete = False
        self._lock = threading.RLock()

    def save(self) -> Saved:
        """Collect an epoch and write its dirty chunks over those that are there.

        Returns
        -------
        Saved
            What was written; its `snapshot` is empty, because a mirror has none.

        Raises
        ------
        Exception
            What the store raised. The mirror is torn until the next save, which has the same pages.
        """
        zarr = zarr_package()
        with self._lock, self._observer.collect() as epoch:
            work: list[Task] = tasks(self._parts, epoch.pages if self._complete else None)
            if work:
                group = zarr.open_group(self._store, mode="a")
                if not self._complete:
                    for part in self._parts:
                        create(group.store, part, part.array.shape, self._compressors)
                group.attrs[ATTRIBUTE] = {"whole": None, "writing": epoch.number}
                write(group.store, work)
                group.attrs[ATTRIBUTE] = {"whole": epoch.number, "writing": None}
                self._complete = True
            return Saved.of(Written(**summary(epoch, work)), "")

    @property
    def whole(self) -> int | None:
        """The epoch that is there whole, as the mirror itself says; None where it is torn, or empty."""
        try:
            said = zarr_package().open_group(self._store, mode="r").attrs.asdict().get(ATTRIBUTE)
        except FileNotFoundError:
            return None
        return said.get("whole") if isinstance(said, dict) else None

    def restore(self, *, out: Mapping[str, Memory] | None = None) -> dict[str, Any]:
        """Read the arrays as the mirror has them; ValueError where it is torn."""
        if self.whole is None:
            raise ValueError("the mirror is torn, because a save has failed or is under way, or empty; save again")
        group = zarr_package().open_group(self._store, mode="r")
        return read(group.store, [part.name for part in self._parts], out)
