"""Writes the checkpoints of named arrays as a chain of snapshots in a directory, and thins the chain out.

Each checkpoint is one snapshot file (:mod:`dirtylog.sinks.snapshot`) of all arrays, named by a number that goes up:
full the first time, a diff afterwards. It appears by one rename, so all arrays are of one moment or there is no
checkpoint, and the epochs of all trackers are committed after it, or rolled back together.

With `keep`, the oldest checkpoint that is kept takes in the diffs below it now and then, by one rename too, and those
are removed. It then holds what its child expects of its parent, so the chain above it stays as it is.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any

from dirtylog.log import DirtyLog, Observer
from dirtylog.sinks import snapshot
from dirtylog.sinks.checkpoint import directory as directories
from dirtylog.sinks.checkpoint.empties import A_BYTE
from dirtylog.sinks.snapshot import Info, SnapshotError
from dirtylog.sinks.snapshot.footer import best_digest, hasher
from dirtylog.sinks.snapshot.space import Space
from dirtylog.sinks.snapshot.upkeep import thin
from dirtylog.sources.memory import Tracker

if TYPE_CHECKING:
    from dirtylog._typing import Memory
    from dirtylog.sinks.snapshot.chain import Progress

__all__ = ["Chain"]

# How long a save waits for writers in its directory, in seconds, before it leaves what is not kept to the next one.
PATIENCE = 1.0


def _after(until_taken: ExitStack, progress: Progress | None) -> Progress:
    """Leave `until_taken` at the first call, before anybody is told."""

    def told(done: int, total: int) -> None:
        until_taken.close()
        if progress is not None:
            progress(done, total)

    return told


class Chain:
    """Saves in a directory.

    Parameters
    ----------
    directory : str
        Where; made if it is not there.
    keep, full_every, digest, sync, moment
        As for :class:`Checkpoint`.
    note : callable
        Called with an error that is no reason for a save to fail.
    """

    def __init__(
        self,
        directory: str,
        *,
        keep: int | None,
        full_every: int,
        digest: str | None,
        sync: bool,
        moment: str,
        note: Callable[[BaseException], None],
    ) -> None:
        self._directory = directory
        self._keep = keep
        self._full_every = full_every
        self._digest = digest or best_digest()
        hasher(self._digest)  # an error now, and not at the first save
        self._sync = sync
        self._moment = moment
        self._note = note
        # The file of the last checkpoint and the digest it was written with: what has its name may be another's by now.
        self._parent: tuple[str, str] | None = None
        # The names and sizes that the parent has: a diff is of the same.
        self._layout: list[tuple[str, int, int]] = []
        # The number of the newest file and how many there are; None if the directory has to be looked at.
        self._files: tuple[int, int] | None = None
        # The first file of this run up to the newest of which the steps only rise, and the highest of them.
        self._since, self._reached = 0, -1
        os.makedirs(directory, exist_ok=True)

    def ready(
        self,
        before: dict[str, Observer] | None,
        arrays: Mapping[str, Memory],
        trackers: Mapping[str, Tracker],
        new: Iterable[str],
        moved: bool = False,
    ) -> dict[str, Observer]:
        """Return what takes in the new ones of some arrays, and the others from `before`; nothing has changed yet."""
        observers = {}
        for name in new:
            log = DirtyLog()
            log.attach(trackers[name])
            # An array that is new is new in all its pages, until a checkpoint has them.
            observers[name] = log.observer("checkpoint", everything=True)
        # An array that has become empty has no pages any more.
        return {name: each for name, each in {**(before or {}), **observers}.items() if name in arrays}

    def save(
        self,
        ready: dict[str, Observer],
        arrays: Mapping[str, Memory],
        step: int | None,
        state: object,
        until_taken: ExitStack | None = None,
        progress: Progress | None = None,
        empty: list[list[Any]] | None = None,
    ) -> Info:
        """Save, and note the empty ones; where a child holds the moment, leave `until_taken`, and with it the lock."""
        last, count = self._files or directories.newest(self._directory)
        try:
            info = self._write(last + 1, ready, arrays, step, state, until_taken, progress, empty)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT) and self._keep is not None and count > self._keep:
                # For the next one: as long as nothing is saved, nothing else would remove what is not kept.
                with suppress(OSError, SnapshotError):
                    self._remove(self._keep)
            raise
        self._files = last + 1, count + 1
        self._thin(count + 1)
        return info

    def _write(
        self,
        number: int,
        ready: dict[str, Observer],
        arrays: Mapping[str, Memory],
        step: int | None,
        state: object,
        until_taken: ExitStack | None,
        progress: Progress | None,
        empty: list[list[Any]] | None,
    ) -> Info:
        """Write the file of a number, and commit the epochs."""
        # A number of its own each time: what an interrupted save has left, finished or not, is in nobody's way.
        self._files = None
        path = os.path.join(self._directory, directories.name_of(number))
        rises = self._since > 0 and (step is None or step > self._reached)
        since = self._since if rises else number
        reached = self._reached if step is None else step
        # If this fails and has left a file, the next begins another run.
        self._since = 0
        about = {"step": step, "keep": self._keep, "since": since, "reached": reached, "user": state}
        if empty:
            about["empty"] = empty
        # Where every array is empty, a file holds a byte without a name.
        memory: Memory | Mapping[str, Memory] = arrays or A_BYTE
        with ExitStack() as epochs:
            pages = {name: epochs.enter_context(each.collect()).pages for name, each in ready.items()}
            page_size = next(iter(pages.values())).page_size if pages else directories.PAGE_SIZE
            layout = [(row[0], row[4], row[5]) for row in Space(memory, page_size).rows()]
            options: Any = {"state": about, "digest": self._digest, "sync": self._sync, "moment": self._moment}
            options["progress"] = progress
            if self._moment == "fork" and until_taken is not None:
                options["progress"] = _after(until_taken, progress)
            try:
                if not arrays or self._parent is None or layout != self._layout:
                    info = snapshot.save(path, memory, page_size=page_size, **options)
                else:
                    options["full_every"] = self._full_every
                    options["parent"], options["parent_digest"] = self._parent
                    info = snapshot.save_diff(path, arrays, pages, **options)
            except SnapshotError:
                # What lies below was removed or damaged. The next stands for itself, or none would ever be saved again.
                self._parent = None
                raise
            except FileExistsError as error:
                raise FileExistsError(
                    error.errno,
                    "somebody else has saved to this directory meanwhile; give each Checkpoint a directory of its own "
                    "(nothing is lost: these pages are in the next save)",
                    path,
                ) from None
            self._parent, self._layout = (path, info.digest), layout
            self._since, self._reached = since, reached
        return info

    def _thin(self, count: int) -> None:
        """Remove what is not kept, when it is as much again as what is: so each save pays for a page or two of it."""
        keep = self._keep
        if keep is None or count < 2 * keep:
            return
        try:
            self._remove(keep)
        except (OSError, SnapshotError) as error:
            # The checkpoint is written. What could not be removed is tried again after the next.
            self._note(error)

    def _remove(self, keep: int) -> None:
        """Remove what is not kept, and let what is take in what it needs of that."""
        self._files = None
        thin(self._directory, lambda entries: directories.to_keep(entries, keep), patience=PATIENCE, sync=self._sync)

    def close(self, ready: dict[str, Observer]) -> None:
        """There is nothing to let go."""
