"""Keeps the checkpoints of named arrays in a store: each is one snapshot of an Icechunk repository.

What :mod:`dirtylog.sinks.checkpoint.directory` and :mod:`dirtylog.sinks.checkpoint.chains` are for directories.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import numpy as np

from dirtylog.errors import DirtyLogError
from dirtylog.log import DirtyLog
from dirtylog.sinks.checkpoint import empties
from dirtylog.sinks.checkpoint.directory import PAGE_SIZE, Change, Record, differing
from dirtylog.sinks.store import branch as branches
from dirtylog.sinks.store.branch import BranchMoved, Version, since, versions
from dirtylog.sinks.store.sink import Saved, StoreSink
from dirtylog.sources.memory import Tracker

if TYPE_CHECKING:
    from dirtylog._typing import Memory
    from dirtylog.sinks.snapshot.chain import Progress

__all__ = ["Stored", "described", "diff", "history", "load", "state_of", "steps", "whole"]

BRANCH = "main"


def _repository(where: Any, *, create: bool = False) -> Any:
    """Open the repository of an address; one that is open is what it is."""
    if not isinstance(where, str):
        if not hasattr(where, "writable_session"):
            raise TypeError(f"directory is {type(where).__name__}; it must be a str, a path or an icechunk.Repository")
        return where
    if not create and not branches.exists(where):
        raise KeyError(f"{where} has no checkpoint: there is no repository")
    return branches.repository(where, create=create)


def _kept(repo: Any) -> Iterator[Version]:
    """Go through the checkpoints that the newest says are kept, newest first."""
    left: int | None = None
    for version in versions(repo, branch=BRANCH):
        if not version.transaction:
            continue
        if left is None:
            left = int(version.about.get("keep") or 0)
        yield version
        left -= 1
        if not left:
            return


def _find(repo: Any, where: Any, step: int | None) -> Version:
    """Return the version of a step, the later of two; or the newest."""
    seen: list[str] = []
    for version in _kept(repo):
        if step is None or version.step == step:
            return version
        if version.step is not None and len(seen) < 10:
            seen.append(str(version.step))
    said = f"{where} has no checkpoint" + ("" if step is None else f" of step {step}")
    raise KeyError(f"{said}; it has those of {', '.join(reversed(seen))}" if seen else said)


class Stored:
    """Saves in a store.

    Parameters
    ----------
    where : str or icechunk.Repository
        Its address, or itself.
    keep : int or None
        As for :class:`Checkpoint`.
    note : callable
        Called with an error that is no reason for a save to fail.
    """

    def __init__(self, where: Any, *, keep: int | None, note: Callable[[BaseException], None]) -> None:
        self._repo = _repository(where, create=True)
        self._keep = keep
        self._note = note
        # How many snapshots there are; None if they have to be counted.
        self._count: int | None = None
        if keep is not None:
            self._check_alone()

    def _check_alone(self) -> None:
        others = [*sorted({*self._repo.list_branches()} - {BRANCH}), *sorted(self._repo.list_tags())]
        if others:
            raise ValueError(
                f"keep is {self._keep}, and the repository has other branches or tags ({', '.join(others)}), "
                "whose snapshots would expire too; leave keep out and call expire_snapshots and garbage_collect of the "
                "repository yourself, or save to another one"
            )

    def ready(
        self,
        before: StoreSink | None,
        arrays: Mapping[str, Memory],
        trackers: Mapping[str, Tracker],
        new: Iterable[str],
        moved: bool = False,
    ) -> StoreSink:
        """Return what takes in all of some arrays, whichever are new; nothing has changed yet.

        Raises
        ------
        BranchMoved
            Somebody else has committed, and nobody has said that this checkpoint goes on from there.
        """
        if moved and before is not None and before.base is not None and since(self._repo, BRANCH, before.base):
            raise BranchMoved(
                f"{BRANCH!r} is not at {before.base} any more: somebody else has committed. Restore from the branch, "
                "or tell the checkpoint to go on from there: update()"
            )
        if not arrays:
            raise ValueError("all arrays are empty; in a store at least one must have an item")
        log, places, first = DirtyLog(), {}, 0
        for name in arrays:
            log.attach(trackers[name], first)
            places[name] = first * log.page_size
            first += trackers[name].npages
        # One without a base writes everything, over whatever is there.
        return StoreSink(log.observer("checkpoint", everything=True), arrays, self._repo, BRANCH, places=places)

    def save(
        self,
        ready: StoreSink,
        arrays: Mapping[str, Memory],
        step: int | None,
        state: object,
        until_taken: ExitStack | None = None,
        progress: Progress | None = None,
        empty: list[list[Any]] | None = None,
    ) -> Saved:
        """Save; all of it with the lock held."""
        count = self._count
        if count is None:
            count = sum(1 for _ in versions(self._repo, branch=BRANCH)) if self._keep is not None else 0
        self._count = None
        noted = {"keep": self._keep, **({"empty": empty} if empty else {})}
        saved = ready.save(step=step, state=state, about=noted, progress=progress)
        self._count = count + 1
        self._thin()
        return saved

    def _thin(self) -> None:
        """Let expire what is not kept, when it is as much again as what is."""
        if self._keep is None or self._count is None or self._count <= 2 * self._keep:
            return
        self._count = None
        try:
            self._check_alone()
            *_, oldest = _kept(self._repo)
            self._repo.expire_snapshots(oldest.time)
            self._repo.garbage_collect(oldest.time)
        except Exception as error:
            # The checkpoint is written. What could not be removed is tried again after the next.
            self._note(error if isinstance(error, DirtyLogError | OSError) else DirtyLogError(str(error)))

    def close(self, ready: StoreSink) -> None:
        """End a sink; a commit in doubt is resolved if the store answers."""
        ready.close()


def steps(where: Any) -> list[int]:
    """List the steps that are kept, oldest first."""
    return [version.step for version in _kept(_repository(where)) if version.step is not None][::-1]


def history(where: Any) -> list[Record]:
    """List the checkpoints that are kept, oldest first."""
    return [Record(version.step, version.time.timestamp(), version) for version in _kept(_repository(where))][::-1]


def _names(version: Version) -> list[str] | None:
    names = version.about.get("arrays")
    return [str(name) for name in names] if isinstance(names, list) else None


def _empty(version: Version) -> Any:
    return version.about.get("empty", [])


def load(
    where: Any,
    step: int | None,
    into: Mapping[str, Memory] | None = None,
    verify: bool = False,
    progress: Progress | None = None,
) -> Any:
    """Read the arrays of a checkpoint, into others if they are given."""
    if verify:
        raise ValueError("a store keeps no digests of what it has; leave verify out")
    if progress is not None:
        raise ValueError("a store does not say how far it has read; leave progress out")
    repo = _repository(where)
    version = _find(repo, where, step)
    names, empty, said = _names(version), _empty(version), f"snapshot {version.snapshot}"
    rest = None if into is None else empties.split(into, empty, said)
    if rest is not None and names is not None and set(rest) != set(names):
        raise ValueError(f"into has {sorted(rest)}; the checkpoint has {sorted(names)}")
    found = branches.restore(repo, version.snapshot, names=names, out=rest)
    return empties.woven(found, empty, said) if into is None else into


def whole(
    where: Any, step: int | None, names: Sequence[str] | None = None, progress: Progress | None = None
) -> dict[str, Any]:
    """Read the arrays of a checkpoint, or those of some names."""
    repo = _repository(where)
    version = _find(repo, where, step)
    found, empty, said = _names(version), _empty(version), f"snapshot {version.snapshot}"
    if names is None or found is None:
        return empties.woven(branches.restore(repo, version.snapshot, names=found), empty, said)
    there = empties.woven({}, empty, said)
    empties.check_names(names, [*there, *found])
    rest = [name for name in names if name not in there]
    read = branches.restore(repo, version.snapshot, names=rest) if rest else {}
    return {name: there[name] if name in there else read[name] for name in names}


def state_of(where: Any, step: int | None) -> Any:
    """Return the state that was saved with a checkpoint."""
    repo = _repository(where)
    return branches.state_of(repo, _find(repo, where, step).snapshot)


def described(where: Any, step: int | None) -> tuple[int | None, list[tuple[str, str, list[int], int]], Any]:
    """Return the step of a checkpoint, name, type, shape and bytes of each of its arrays, and its state."""
    repo = _repository(where)
    version = _find(repo, where, step)
    arrays = branches.described(repo, version.snapshot, _names(version))
    arrays = empties.described(arrays, _empty(version), f"snapshot {version.snapshot}")
    return version.step, arrays, branches.state_of(repo, version.snapshot)


def diff(where: Any, a: int, b: int | None) -> dict[str, Change]:
    """Say what changed from the older of two steps to the newer: both are read and compared."""
    repo = _repository(where)
    order = [version.snapshot for version in _kept(repo)]
    newer, older = sorted((_find(repo, where, step) for step in (a, b)), key=lambda each: order.index(each.snapshot))
    before, after = (branches.restore(repo, each.snapshot, names=_names(each)) for each in (older, newer))
    answer = {}
    for name, array in after.items():
        pages = differing(before.get(name), array, PAGE_SIZE)
        if pages:
            answer[name] = Change(pages, pages.rows(np.atleast_1d(array)))
    return answer
