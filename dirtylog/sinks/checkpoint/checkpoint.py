"""Keeps named arrays as a chain of snapshots in a directory, tracks what is written to them, and thins the chain out.

Each checkpoint is one snapshot file (:mod:`dirtylog.sinks.snapshot`) of all arrays, named by a number that goes up:
full the first time, a diff afterwards. It appears by one rename, so all arrays are of one moment or there is no
checkpoint, and the epochs of all trackers are committed after it, or rolled back together.

With `keep`, the oldest checkpoint that is kept takes in the diffs below it now and then, by one rename too, and those
are removed. It then holds what its child expects of its parent, so the chain above it stays as it is.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from dirtylog.log import DirtyLog, Observer
from dirtylog.sinks import snapshot
from dirtylog.sinks.checkpoint import directory as directories
from dirtylog.sinks.checkpoint.binding import Binding
from dirtylog.sinks.checkpoint.directory import Change, Record
from dirtylog.sinks.snapshot import Info, SnapshotError
from dirtylog.sinks.snapshot.moment import check_moment
from dirtylog.sinks.snapshot.space import Space
from dirtylog.sinks.snapshot.upkeep import thin
from dirtylog.sources.memory import Tracker, track

if TYPE_CHECKING:
    from dirtylog._typing import Memory

__all__ = ["Checkpoint"]

PAGE_SIZE = 4096
# How long a save waits for writers in its directory, in seconds, before it leaves what is not kept to the next one.
PATIENCE = 1.0


@dataclass(frozen=True, slots=True)
class _Held:
    """What goes with one array: its tracker, who collects from it, and who else refers to it."""

    tracker: Tracker
    observer: Observer
    binding: Binding


class Checkpoint:
    """Saves named arrays, all or none, by writing what changed since the last time.

    Parameters
    ----------
    directory : str or path
        Where the checkpoints are; made if it is not there. One `Checkpoint` at a time writes there.
    arrays : mapping of str to array
        What to save: memory of any kind that :func:`dirtylog.track` takes. Write to the arrays in place (``w += 1``,
        ``w[:] = ...``): a name that is bound to another array later (``w = w + 1``) is not followed, and a warning
        says so where it can be noticed. :meth:`update` goes on with another array, of any size.
    every : float, optional
        Save from a background thread every so many seconds, too; such a checkpoint has no step and is loaded as the
        latest. The thread holds :attr:`lock` while it copies: hold it yourself around writes that belong together. An
        error there is raised by the next call.
    keep : int, optional
        How many checkpoints can be loaded; all by default. Older ones are merged and removed by themselves.
    full_every : int
        Write all arrays again after so many diffs, so that loading never reads more files than that.
    backend : str
        How writes are noticed; as for :func:`dirtylog.track`.
    digest : str
        ``"xxh3_128"`` (needs xxhash) or ``"blake2b_128"``; by default the first if it is there.
    sync : bool
        Survive a power cut (fsync), not only the end of this process.
    moment : str
        ``"copy"``: :attr:`lock` is held until all is written. ``"fork"`` (Linux): until a child process has the memory,
        which takes milliseconds; then writers go on while the child writes. See :func:`dirtylog.sinks.snapshot.save`.

    Raises
    ------
    ValueError
        `every`, `keep`, `full_every`, `moment` or an array will not do.

    Notes
    -----
    The first checkpoint of each run of a program is full; the others cost what is dirty. A save that fails (the disk is
    full) changes nothing and loses nothing: the pages are in the next one. Safe to call from any thread;
    saves come one after the other.

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
        directory: str | os.PathLike[str],
        arrays: Mapping[str, Memory],
        *,
        every: float | None = None,
        keep: int | None = None,
        full_every: int = 1000,
        backend: str = "auto",
        digest: str | None = None,
        sync: bool = True,
        moment: str = "copy",
    ) -> None:
        if every is not None and not 0 < every < threading.TIMEOUT_MAX:
            raise ValueError(f"every is {every}; it must be a number of seconds above 0")
        if keep is not None and (not isinstance(keep, int) or keep < 1):
            raise ValueError(f"keep is {keep!r}; it must be at least 1, or None to keep all")
        if not isinstance(full_every, int) or full_every < 1:
            raise ValueError(f"full_every is {full_every!r}; it must be a number from 1")
        if not isinstance(arrays, Mapping) or not arrays:
            raise ValueError("arrays must be a mapping of names to at least one array")
        check_moment(moment, Space(arrays, PAGE_SIZE))
        self.directory: str = os.path.abspath(os.fspath(directory))
        self.lock: threading.RLock = threading.RLock()
        # Held for all of a save, and taken with `lock` held: after `lock` is released at the moment that is saved,
        # nobody who holds this one waits for `lock`.
        self._saving = threading.RLock()
        self._moment = moment
        self._keep = keep
        self._full_every = full_every
        self._backend = backend
        self._digest = digest or _best_digest()
        self._sync = sync
        self._parent: str | None = None
        # The names and sizes that the parent has: a diff is of the same.
        self._layout: list[tuple[str, int, int]] = []
        self._diffs = 0
        self._step = -1
        # The number of the newest file and how many there are; None if the directory has to be looked at.
        self._files: tuple[int, int] | None = None
        # The first file of this run up to the newest of which the steps only rise, and the highest of them.
        self._since, self._reached = 0, -1
        self._error: BaseException | None = None
        self._said: set[str] = set()
        self._unbound: set[str] = set()
        self._ended = threading.Event()
        self._arrays: dict[str, Memory] = {}
        self._held: dict[str, _Held] = {}
        os.makedirs(self.directory, exist_ok=True)
        self._take(arrays)
        self._thread: threading.Thread | None = None
        if every is not None:
            self._thread = threading.Thread(target=self._run, args=(every,), name="dirtylog-checkpoint", daemon=True)
            self._thread.start()

    def _take(self, arrays: Mapping[str, Memory]) -> None:
        """Track arrays in place of those of the same names; all of them or none."""
        with ExitStack() as stack:
            taken = {}
            for name in arrays:
                binding = Binding(arrays, name)
                tracker: Tracker = stack.enter_context(track(arrays[name], backend=self._backend))
                log = DirtyLog()
                log.attach(tracker)
                # An array that is new is new in all its pages, until a checkpoint has them.
                taken[name] = _Held(tracker, log.observer("checkpoint", everything=True), binding)
            before = {name: self._held[name] for name in arrays if name in self._held}
            self._arrays = {**self._arrays, **arrays}
            self._held = {**self._held, **taken}
            stack.pop_all()
        self._unbound -= set(arrays)
        for held in taken.values():
            held.binding.settle(arrays)
        for held in before.values():
            held.tracker.close()

    def update(self, arrays: Mapping[str, Memory]) -> None:
        """Go on with other arrays under these names; the next checkpoint holds them whole, and of the others a diff.

        Parameters
        ----------
        arrays : mapping of str to array
            Arrays by names that are known, or new ones. If one has another size, or is new, the next checkpoint holds
            all arrays whole.

        Raises
        ------
        ValueError
            The checkpoint is closed, or an array will not do; nothing has changed.

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
        with self.lock, self._saving:
            if self.closed:
                raise ValueError("the checkpoint is closed")
            check_moment(self._moment, Space({**self._arrays, **arrays}, PAGE_SIZE))
            self._take(arrays)

    @property
    def closed(self) -> bool:
        """Whether it has ended."""
        return self._ended.is_set()

    def _run(self, every: float) -> None:
        while not self._ended.wait(every):
            try:
                with ExitStack() as until_taken:
                    until_taken.enter_context(self.lock)
                    with self._saving:
                        if not self._ended.is_set():
                            self._save(None, None, until_taken)
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
        for name in self._arrays:
            if name not in self._unbound and self._held[name].binding.lost(self._arrays):
                self._unbound.add(name)
                warnings.warn(
                    f"the array {name!r} has no other reference than the checkpoint's: was the name bound to a new "
                    f"array ({name} = {name} + 1)? What is written to that one is not saved. Write in place "
                    f"({name} += 1), or tell the checkpoint: update({{{name!r}: {name}}})",
                    RuntimeWarning,
                    stacklevel=3,
                )

    def save(self, *, step: int | None = None, state: object = None) -> Info:
        """Write what changed since the last checkpoint.

        Parameters
        ----------
        step : int, optional
            What to load it by, from 0; by default one more than the last. The later of two of one step is loaded.
        state : object, optional
            What else belongs to it: dicts, lists, text, numbers and bytes; see :meth:`state_of`.

        Returns
        -------
        Info
            Of the file that was written.

        Raises
        ------
        OSError, SnapshotError
            It could not be written; nothing has changed, and the same pages are in the next one.
        ValueError
            `step` is negative, or the checkpoint is closed.
        Exception
            What the background thread met since the last call.
        """
        with ExitStack() as until_taken:
            until_taken.enter_context(self.lock)
            with self._saving:
                if self.closed:
                    raise ValueError("the checkpoint is closed")
                self._raise_earlier()
                self._check_bindings()
                number = self._step + 1 if step is None else step
                if not isinstance(number, int) or number < 0:
                    raise ValueError(f"step is {step!r}; it must be a number from 0")
                return self._save(number, state, until_taken)

    def _save(self, step: int | None, state: object, until_taken: ExitStack | None = None) -> Info:
        """Save; where a child holds the moment, leave `until_taken`, and with it the lock, as soon as it does."""
        last, count = self._files or directories.newest(self.directory)
        # A number of its own each time: what an interrupted save has left, finished or not, is in nobody's way.
        number, self._files = last + 1, None
        path = os.path.join(self.directory, directories.name_of(number))
        rises = self._since > 0 and (step is None or step > self._reached)
        since = self._since if rises else number
        reached = self._reached if step is None else step
        # If this fails and has left a file, the next begins another run.
        self._since = 0
        about = {"step": step, "keep": self._keep, "since": since, "reached": reached, "user": state}
        with ExitStack() as epochs:
            pages = {name: epochs.enter_context(each.observer.collect()).pages for name, each in self._held.items()}
            page_size = next(iter(pages.values())).page_size
            layout = [(row[0], row[4], row[5]) for row in Space(self._arrays, page_size).rows()]
            options: Any = {"state": about, "digest": self._digest, "sync": self._sync, "moment": self._moment}
            if self._moment == "fork" and until_taken is not None:
                options["progress"] = lambda *_: until_taken.close()
            full = self._parent is None or layout != self._layout or self._diffs >= self._full_every
            if full or self._parent is None:
                info = snapshot.save(path, self._arrays, page_size=page_size, **options)
            else:
                info = snapshot.save_diff(path, self._arrays, pages, parent=self._parent, **options)
            self._parent, self._layout = path, layout
            self._diffs = 0 if full else self._diffs + 1
            self._step = self._step if step is None else step
            self._since, self._reached = since, reached
            self._files = number, count + 1
        self._thin(count + 1)
        return info

    def _thin(self, count: int) -> None:
        """Remove what is not kept, when it is as much again as what is: so each save pays for a page or two of it."""
        keep = self._keep
        if keep is None or count < 2 * keep:
            return
        self._files = None
        try:
            thin(self.directory, lambda entries: directories.to_keep(entries, keep), patience=PATIENCE, sync=self._sync)
        except (OSError, SnapshotError) as error:
            # The checkpoint is written. What could not be removed is tried again after the next.
            self._note(error)

    def close(self) -> None:
        """End the thread and the tracking; writes nothing. Raises what the thread met; does nothing a second time."""
        self._ended.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        with self.lock, self._saving:
            for held in self._held.values():
                held.tracker.close()
            self._raise_earlier()

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
    def steps(directory: str | os.PathLike[str]) -> list[int]:
        """List the steps that are kept, oldest first."""
        return [step for step, _ in directories.kept(os.path.abspath(os.fspath(directory))) if step is not None]

    @staticmethod
    def history(directory: str | os.PathLike[str]) -> list[Record]:
        """List the checkpoints that are kept, oldest first: step, time, and what the file is.

        Raises
        ------
        SnapshotError
            One of the files is damaged, or no checkpoint's.
        """
        return directories.history(directory)

    @staticmethod
    def diff(directory: str | os.PathLike[str], a: int, b: int | None = None) -> dict[str, Change]:
        """Say what changed from one checkpoint to another.

        Parameters
        ----------
        directory : str or path
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
        held before; only page sets are read. Across runs both checkpoints are read and compared.

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
        older, newer = sorted(directories.find(directory, step) for step in (a, b))
        return directories.changed(older, newer)

    @staticmethod
    def _path(directory: str | os.PathLike[str], step: int | None) -> str:
        return directories.find(directory, step)

    @staticmethod
    def load(
        directory: str | os.PathLike[str],
        step: int | None = None,
        *,
        into: Mapping[str, Memory] | None = None,
        verify: bool = False,
    ) -> Any:
        """Map the arrays of a checkpoint, which takes milliseconds; their bytes are read when they are used.

        Parameters
        ----------
        directory : str or path
            Where the checkpoints are.
        step : int, optional
            Which one; the latest by default.
        into : mapping of str to array, optional
            Arrays of the same names and sizes to fill in place: all is read, and checked on the way.
        verify : bool
            Check every byte first. Without, what is mapped is checked only as far as the files' sizes and page sets.

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

        Notes
        -----
        What you write to the arrays is copied on write; the files never change. Go on with them: they are tracked like
        any others. The memory lives for as long as one of the arrays does, also when the checkpoint is merged or
        removed meanwhile. Whoever *cuts* one of its files ends the process at the next access to it, as with any
        mapping. Loading is O(files of the chain), and short runs of pages are copied at once:
        :class:`~dirtylog.sinks.snapshot.Mapped`.
        """
        path = Checkpoint._path(directory, step)
        if into is not None:
            if verify:
                snapshot.verify(path)
            return snapshot.restore(path, out=into)
        with snapshot.open(path, verify=verify) as mapped:
            return mapped.restored()

    @staticmethod
    def state_of(directory: str | os.PathLike[str], step: int | None = None) -> Any:
        """Return the state that was saved with a checkpoint; parameters and errors as for :meth:`load`."""
        return directories.about(Checkpoint._path(directory, step))["user"]


def _best_digest() -> str:
    try:
        import xxhash  # noqa: F401
    except ImportError:
        return "blake2b_128"
    return "xxh3_128"
