"""Keeps checkpoints of named arrays: tracks what is written to them, and saves it by one call, or by itself.

Where they go is another's business: a directory (:mod:`dirtylog.sinks.checkpoint.chains`), or a store
(:mod:`dirtylog.sinks.checkpoint.stores`).
"""

from __future__ import annotations

import numbers
import os
import threading
import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from types import ModuleType, TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, Protocol, Self, SupportsIndex

from dirtylog.sinks._bytes.whole import whole
from dirtylog.sinks.checkpoint import directory as directories
from dirtylog.sinks.checkpoint.binding import Binding, place_of
from dirtylog.sinks.checkpoint.chains import Chain
from dirtylog.sinks.checkpoint.directory import PAGE_SIZE, Change, Record
from dirtylog.sinks.checkpoint.empties import A_BYTE, noted, without_items
from dirtylog.sinks.checkpoint.turns import EndedError, Turns
from dirtylog.sinks.snapshot.moment import check_moment
from dirtylog.sinks.snapshot.space import Space
from dirtylog.sources.memory import Tracker, track

if TYPE_CHECKING:
    from collections.abc import Iterable

    from dirtylog._typing import Memory
    from dirtylog.sinks.snapshot.chain import Progress

__all__ = ["Checkpoint", "keeper"]

FULL_EVERY = 1000


def keeper(directory: Any) -> ModuleType:
    """Return the module that reads checkpoints from there: from a directory, or from a store."""
    if isinstance(directory, os.PathLike) or (isinstance(directory, str) and "://" not in directory):
        return directories
    from dirtylog.sinks.checkpoint import stores

    return stores


class _BackEnd(Protocol):
    """Where checkpoints go."""

    def ready(
        self,
        before: Any,
        arrays: Mapping[str, Memory],
        trackers: Mapping[str, Tracker],
        new: Iterable[str],
        moved: bool = False,
    ) -> Any:
        """Return what takes in the new ones of some arrays, and the others from `before`; nothing has changed yet.

        With `moved`, nobody has said that they are new: their memory was found elsewhere.
        """

    def save(
        self,
        ready: Any,
        arrays: Mapping[str, Memory],
        step: int | None,
        state: object,
        until_taken: ExitStack | None = None,
        progress: Progress | None = None,
        empty: list[list[Any]] | None = None,
    ) -> Any:
        """Save, and note the empty ones; where a child holds the moment, leave `until_taken`, and with it the lock."""

    def close(self, ready: Any) -> None:
        """Let go what :meth:`ready` returned."""


@dataclass(frozen=True, slots=True)
class _Held:
    """What goes with one array: its tracker, unless it is empty, who else refers to it, and where it lay."""

    tracker: Tracker | None
    binding: Binding
    place: tuple[int, int]


@dataclass(frozen=True, slots=True)
class _Saved:
    """What is saved: the arrays, those of them that are not empty, what goes with each, and what takes them in.

    It is exchanged as a whole, by one assignment, so that whatever interrupts an update finds the one or the other.
    """

    arrays: Mapping[str, Memory]
    memory: Mapping[str, Memory]
    held: Mapping[str, _Held]
    ready: Any

    def trackers(self) -> dict[str, Tracker]:
        """Return the tracker of each array that has one."""
        return {name: each.tracker for name, each in self.held.items() if each.tracker is not None}


class Checkpoint:
    """Saves named arrays, all or none, by writing what changed since the last time.

    Parameters
    ----------
    directory : str, path or icechunk.Repository
        Where the checkpoints are: a directory, or a store, ``"s3://bucket/prefix"``, ``"gs://..."``, ``"az://..."`` or
        ``"file:///..."``, with credentials from the environment (:func:`dirtylog.sinks.store.repository`). Made if it
        is not there. One `Checkpoint` at a time writes there. None where `store` is given.
    arrays : mapping of str to array
        What to save: memory of any kind that :func:`dirtylog.track` takes. Write to the arrays in place (``w += 1``,
        ``w[:] = ...``): a name that is bound to another array later (``w = w + 1``) is not followed, and a warning
        says so where it can be noticed. :meth:`update` goes on with another array, of any size. An object whose memory
        moves (``p.data = ...`` of a PyTorch tensor) is followed, and saved whole once. An array may be empty, of shape
        ``(0, 4)``, say: its type and shape are saved. A type that NumPy does not know by itself, such as bfloat16,
        comes back as bytes or integers of its size: take a ``.view`` of it.
    every : float, optional
        Save from a background thread every so many seconds, too; such a checkpoint has no step and is loaded as the
        latest. The thread holds :attr:`lock` while it copies: hold it yourself around writes that belong together. An
        error there is raised by the next call.
    keep : int, optional
        How many checkpoints can be loaded; all by default. Older ones are merged and removed by themselves, when there
        are twice as many, or the disk is full.
    full_every : int
        Write all arrays again where a chain has so many diffs, so that loading never reads more files than that. Where
        `keep` holds chains shorter, none gets so long. Not for a store, of which every snapshot stands for itself.
    backend : str
        How writes are noticed; as for :func:`dirtylog.track`.
    digest : str
        ``"xxh3_128"`` (needs xxhash) or ``"blake2b_128"``; by default the first if it is there. Not for a store.
    sync : bool
        Survive a power cut (fsync), not only the end of this process. What is in a store survives what the store does.
    moment : str
        ``"copy"``: :attr:`lock` is held until all is written. ``"fork"`` (Linux): until a child process has the memory,
        which takes milliseconds; then writers go on while the child writes. See :func:`dirtylog.sinks.snapshot.save`.
        Not for a store.
    store : icechunk.Repository, optional
        Save there, on its branch ``main``: for a repository that you have opened yourself. To read from it, pass it in
        the place of `directory`.

    Raises
    ------
    ValueError
        `every`, `keep`, `full_every`, `digest`, `moment` or an array will not do, or not for a store.
    BackendUnavailable
        A store needs the packages icechunk and zarr, and a digest may need xxhash.

    Notes
    -----
    The first checkpoint of each run of a program is full; the others cost what is dirty. A save that fails (the disk is
    full) changes nothing and loses nothing: the pages are in the next one. Safe to call from any thread;
    saves come one after the other.

    In a store a checkpoint is one snapshot of an Icechunk repository, whose arrays every reader of Zarr reads, in C
    order. With `keep`, older snapshots expire and what only they had is deleted, in all of the repository: it has one
    branch and no tags, and nobody else writes to it. Where somebody has, a save raises
    :class:`~dirtylog.sinks.store.BranchMoved` and nothing is merged: :meth:`update` with the same arrays goes on from
    there, and the next checkpoint holds them whole.

    Examples
    --------
    >>> import tempfile, numpy as np
    >>> w, b = np.zeros((1000, 1000)), np.zeros(1000)
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     with Checkpoint(directory, {"w": w, "b": b}, keep=10) as checkpoint:
    ...         for step in range(3):
    ...             w[step] = step
    ...             b[step] = step
    ...             written = checkpoint.save(step=step)
    ...     arrays = Checkpoint.load(directory, step=1)
    ...     Checkpoint.steps(directory), float(arrays["w"][1, 0]), float(arrays["b"][2]), written.kind
    ([0, 1, 2], 1.0, 0.0, 'diff')
    """

    def __init__(
        self,
        directory: str | os.PathLike[str] | Any,
        arrays: Mapping[str, Memory],
        *,
        every: float | None = None,
        keep: int | None = None,
        full_every: int = FULL_EVERY,
        backend: str = "auto",
        digest: str | None = None,
        sync: bool = True,
        moment: str = "copy",
        store: Any = None,
    ) -> None:
        if every is not None:
            if isinstance(every, bool) or not isinstance(every, numbers.Real) or not 0 < every < threading.TIMEOUT_MAX:
                raise ValueError(f"every is {every!r}; it must be a number of seconds above 0")
            every = float(every)  # whatever kind of number it is: a lock waits for those of Python alone
        if keep is not None:
            keep = whole(keep, "keep", 1, way_out=", or None to keep all")
        full_every = whole(full_every, "full_every", 1)
        if not isinstance(arrays, Mapping) or not arrays:
            raise ValueError("arrays must be a mapping of names to at least one array")
        self._check_space(arrays, moment)
        if (directory is None) == (store is None):
            raise ValueError("say where: a directory or the address of a store, or None and a repository as store=")
        where = directory if store is None else store
        self._turns = Turns()
        self._moment = moment
        self._backend = backend
        self._step = -1
        self._error: BaseException | None = None
        self._said: set[str] = set()
        self._unbound: set[str] = set()
        self._saved = _Saved({}, {}, {}, None)
        kept = keeper(where)
        self._back: _BackEnd
        if kept is directories:
            self.directory: Any = os.path.abspath(os.fspath(where))
            self._back = Chain(
                self.directory,
                keep=keep,
                full_every=full_every,
                digest=digest,
                sync=sync,
                moment=moment,
                note=self._note,
            )
        else:
            if refused := [
                name
                for name, other in (
                    ("full_every", full_every != FULL_EVERY),
                    ("digest", digest is not None),
                    ("moment", moment != "copy"),
                )
                if other
            ]:
                raise ValueError(
                    f"{' and '.join(refused)} cannot be chosen for a store; leave it out, or save to a directory"
                )
            self.directory = where
            self._back = kept.Stored(where, keep=keep, note=self._note)
        self._thread: threading.Thread | None = None
        try:
            self._take(arrays)
            if every is not None:
                self._thread = threading.Thread(
                    target=self._run, args=(every,), name="dirtylog-checkpoint", daemon=True
                )
                self._thread.start()
        except BaseException:
            # Nobody gets this object, and so nobody could close it: an interrupt may come when the thread runs already.
            self._turns.end()
            for tracker in self._saved.trackers().values():
                tracker.close()
            raise

    @staticmethod
    def _check_space(arrays: Mapping[str, Memory], moment: str) -> None:
        """Refuse what cannot be saved, before anything is done."""
        empty = without_items(arrays)
        noted(arrays, empty)
        # Names are checked there, also those of empty arrays.
        stand_ins: dict[str, Memory] = {name: A_BYTE if name in empty else arrays[name] for name in arrays}
        check_moment(moment, Space(stand_ins, PAGE_SIZE))

    def _take(self, arrays: Mapping[str, Memory], moved: bool = False) -> None:
        """Track arrays in place of those of the same names; all of them or none."""
        taken: dict[str, _Held] = {}
        before = self._saved
        ready: Any = None
        try:
            empty = without_items(arrays)
            for name in arrays:
                binding = Binding(arrays, name)
                place = place_of(arrays[name], f"memory {name!r}")
                tracker = None if name in empty else track(arrays[name], backend=self._backend)
                taken[name] = _Held(tracker, binding, place)
            saved = _Saved({**before.arrays, **arrays}, {}, {**before.held, **taken}, None)
            trackers = saved.trackers()
            memory = {name: saved.arrays[name] for name in saved.arrays if name in trackers}
            new = [name for name in arrays if name in trackers]
            ready = self._back.ready(before.ready, memory, trackers, new, moved)
            self._saved = replace(saved, memory=memory, ready=ready)
        finally:
            # What is not saved is closed, be it what was before, or what an interrupt kept from being saved.
            current = self._saved
            kept = {id(tracker) for tracker in current.trackers().values()}
            try:
                for other in (before.ready, ready):
                    if other is not None and other is not current.ready:
                        self._back.close(other)
            finally:
                for held in (*before.held.values(), *taken.values()):
                    if held.tracker is not None and id(held.tracker) not in kept:
                        held.tracker.close()
        self._unbound -= set(arrays)
        for held in taken.values():
            held.binding.settle(arrays)

    def update(self, arrays: Mapping[str, Memory]) -> None:
        """Go on with other arrays under these names; the next checkpoint holds them whole, and of the others a diff.

        Parameters
        ----------
        arrays : mapping of str to array
            Arrays by names that are known, or new ones. If one has another size, or is new, the next checkpoint holds
            all arrays whole; in a store it does so in any case.

        Raises
        ------
        ValueError
            The checkpoint is closed, or an array will not do; nothing has changed.
        DirtyLogError
            As for :meth:`save`.

        Examples
        --------
        >>> import tempfile, numpy as np
        >>> w = np.zeros(1000)
        >>> with tempfile.TemporaryDirectory() as directory, Checkpoint(directory, {"w": w}) as checkpoint:
        ...     first = checkpoint.save()
        ...     w = np.concatenate([w, w])  # it has grown
        ...     checkpoint.update({"w": w})
        ...     second = checkpoint.save()
        ...     [Checkpoint.load(directory, step)["w"].shape for step in (0, 1)]
        [(1000,), (2000,)]
        """
        if not isinstance(arrays, Mapping):
            raise ValueError("arrays must be a mapping of names to arrays")
        with self._turns.undoing(), ExitStack() as locked, self._turns.alone(locked):
            if self.closed:
                raise ValueError("the checkpoint is closed")
            self._check_space({**self._saved.arrays, **arrays}, self._moment)
            self._take(arrays)

    @property
    def closed(self) -> bool:
        """Whether it has ended."""
        return self._turns.ended

    @property
    def lock(self) -> threading.RLock:
        """What a save holds at the moment that it saves, and writers around writes that belong together."""
        return self._turns.lock

    def _run(self, every: float) -> None:
        while not self._turns.wait(every):
            try:
                with ExitStack() as until_taken, self._turns.alone(until_taken, ends=True):
                    self._check_bindings()
                    self._save(None, None, until_taken)
            except EndedError:
                return
            except Exception as error:
                self._note(error)

    def _note(self, error: BaseException) -> None:
        """Keep an error for the next call; one that comes again and again is said once."""
        said = f"{type(error).__name__}: {error}"
        if said not in self._said and self._error is None:
            self._said.add(said)
            self._error = error

    def _raise_earlier(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _check_bindings(self) -> None:
        """Warn of arrays that nobody can write to any more; before anything is done, for a warning may be an error."""
        for name, held in self._saved.held.items():
            if name not in self._unbound and held.binding.lost(self._saved.arrays):
                self._unbound.add(name)
                warnings.warn(
                    f"the array {name!r} has no other reference than the checkpoint's: was the name bound to a new "
                    f"array ({name} = {name} + 1)? What is written to that one is not saved. Write in place "
                    f"({name} += 1), or tell the checkpoint: update({{{name!r}: {name}}})",
                    RuntimeWarning,
                    stacklevel=3,
                )

    def save(self, *, step: int | None = None, state: object = None, progress: Progress | None = None) -> Any:
        """Write what changed since the last checkpoint.

        Parameters
        ----------
        step : int, optional
            What to load it by, from 0; by default one more than the last. The later of two of one step is loaded.
        state : object, optional
            What else belongs to it: dicts, lists, text, numbers and bytes; see :meth:`state_of`.
        progress : callable, optional
            Called with the bytes written and the bytes to write, once a MiB; in a store after each chunk, from zarr's
            thread; with ``moment="fork"`` first with 0 bytes, when writers may go on. What it raises ends the save as
            any other failure does: nothing has changed, and the same pages are in the next one.

        Returns
        -------
        Info or Saved
            Of the file that was written; of the snapshot, :class:`dirtylog.sinks.store.Saved`, in a store.

        Raises
        ------
        OSError, SnapshotError
            It could not be written; nothing has changed, and the same pages are in the next one. From a store, what it
            raises, and :class:`~dirtylog.sinks.store.BranchMoved` and :class:`~dirtylog.sinks.store.InDoubt`.
        ValueError
            `step` is negative, the checkpoint is closed, or an array that was empty is not any more.
        DirtyLogError
            It was called in the middle of a save or an update, by `progress` or a signal handler, or in the child of a
            fork; nothing has changed.
        Exception
            What the background thread met since the last call.
        """
        with self._turns.undoing(), ExitStack() as until_taken, self._turns.alone(until_taken):
            if self.closed:
                raise ValueError("the checkpoint is closed")
            self._raise_earlier()
            self._check_bindings()
            number = self._step + 1 if step is None else whole(step, "step", 0)
            return self._save(number, state, until_taken, progress)

    def _save(
        self,
        step: int | None,
        state: object,
        until_taken: ExitStack | None = None,
        progress: Progress | None = None,
    ) -> Any:
        """Save; where a child holds the moment, leave `until_taken`, and with it the lock, as soon as it does."""
        # What lies elsewhere by now is another array: of what is written there, its tracker sees nothing.
        places = {name: place_of(memory, f"memory {name!r}") for name, memory in self._saved.memory.items()}
        if moved := [name for name, place in places.items() if place != self._saved.held[name].place]:
            self._take({name: self._saved.arrays[name] for name in moved}, moved=True)
        saved = self._saved
        if progress is not None:
            progress = self._turns.telling(progress)
        names = frozenset(saved.arrays) - frozenset(saved.memory)
        empty = noted(saved.arrays, names) if names else None
        written = self._back.save(saved.ready, saved.memory, step, state, until_taken, progress, empty)
        self._step = self._step if step is None else step
        return written

    def close(self) -> None:
        """End the thread and the tracking; writes nothing. Raises what the thread met; does nothing a second time.

        Raises
        ------
        DirtyLogError
            It was called by the `progress` of a save to a store; call it again when that has ended.
        Exception
            What the background thread met since the last call.
        """
        self._turns.end()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        with self._turns.undoing(), ExitStack() as locked, self._turns.alone(locked, within=True):
            self._back.close(self._saved.ready)
            for tracker in self._saved.trackers().values():
                tracker.close()
            self._raise_earlier()

    def __reduce_ex__(self, protocol: SupportsIndex, /) -> NoReturn:
        """Refuse to be copied or pickled.

        Raises
        ------
        TypeError
            Always.
        """
        raise TypeError(
            "a Checkpoint is neither copied nor pickled: one at a time writes to its directory; make another one there"
        )

    def __enter__(self) -> Self:
        """Return the checkpoint."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it. What the thread met does not hide an error that ends the block."""
        try:
            self.close()
        except Exception as earlier:
            if error is None:
                raise
            error.add_note(f"and before that, in the checkpoint's thread: {type(earlier).__name__}: {earlier}")

    @staticmethod
    def steps(directory: str | os.PathLike[str] | Any) -> list[int]:
        """List the steps that are kept, oldest first."""
        found: list[int] = keeper(directory).steps(directory)
        return found

    @staticmethod
    def history(directory: str | os.PathLike[str] | Any) -> list[Record]:
        """List the checkpoints that are kept, oldest first: step, time, and what the file or the snapshot is.

        Raises
        ------
        SnapshotError
            One of the files is damaged, or no checkpoint's.
        """
        found: list[Record] = keeper(directory).history(directory)
        return found

    @staticmethod
    def diff(directory: str | os.PathLike[str] | Any, a: int, b: int | None = None) -> dict[str, Change]:
        """Say what changed from one checkpoint to another.

        Parameters
        ----------
        directory : str, path or icechunk.Repository
            Where the checkpoints are.
        a, b : int
            Steps, in any order; `b` is the latest by default.

        Returns
        -------
        dict of str to Change
            For each array that changed, its pages and its rows.

        Raises
        ------
        KeyError
            There is none of that step, or it is not kept any more.
        SnapshotError
            One of the files is damaged.

        Notes
        -----
        Within one run of a program these are the pages that were written in between, of which some may hold what they
        held before; only page sets are read. Across runs, and in a store, both checkpoints are read and compared.

        Examples
        --------
        >>> import tempfile, dirtylog as dl
        >>> w = dl.zeros((1000, 512))  # rows of a page each
        >>> with tempfile.TemporaryDirectory() as directory, Checkpoint(directory, {"w": w}) as checkpoint:
        ...     first = checkpoint.save()
        ...     w[7] = 1
        ...     second = checkpoint.save()
        ...     Checkpoint.diff(directory, 0, 1)["w"].rows.tolist()
        [7]
        """
        found: dict[str, Change] = keeper(directory).diff(directory, a, b)
        return found

    @staticmethod
    def load(
        directory: str | os.PathLike[str] | Any,
        step: int | None = None,
        *,
        into: Mapping[str, Memory] | None = None,
        verify: bool = False,
        progress: Progress | None = None,
    ) -> Any:
        """Map the arrays of a checkpoint, which takes milliseconds; their bytes are read when they are used.

        Parameters
        ----------
        directory : str, path or icechunk.Repository
            Where the checkpoints are.
        step : int, optional
            Which one; the latest by default.
        into : mapping of str to array, optional
            Arrays of the same names, types, shapes and orders, or bytes, to fill in place: all is read, and checked on
            the way.
        verify : bool
            Check every byte first. Without, what is mapped is checked only as far as the files' sizes and page sets.
        progress : callable, optional
            Called with the bytes read and the bytes to read, where all is read: with `into`, `verify`, or both, one
            after the other. Not for a store.

        Returns
        -------
        dict of str to array
            Writable arrays of this process alone, or `into`.

        Raises
        ------
        KeyError
            There is none of that step, or it is not kept any more.
        SnapshotError
            It is damaged.
        ValueError
            `verify` of a store, which keeps no digests, or `progress` of one; or `into` does not fit.
        TypeError
            `into` is not a mapping.

        Notes
        -----
        What you write to the arrays is copied on write; the files never change. Go on with them: they are tracked like
        any others. The memory lives for as long as one of the arrays does, also when the checkpoint is merged or
        removed meanwhile. Whoever *cuts* one of its files ends the process at the next access to it, as with any
        mapping. Loading is O(files of the chain), and short runs of pages are copied at once:
        :class:`~dirtylog.sinks.snapshot.Mapped`. From a store all is read at once, into new arrays in C order.
        """
        if into is not None and not isinstance(into, Mapping):
            raise TypeError(f"into is {type(into).__name__}; it must be a mapping of names to arrays")
        return keeper(directory).load(directory, step, into, verify, progress)

    @staticmethod
    def state_of(directory: str | os.PathLike[str] | Any, step: int | None = None) -> Any:
        """Return the state that was saved with a checkpoint; parameters and errors as for :meth:`load`."""
        return keeper(directory).state_of(directory, step)
