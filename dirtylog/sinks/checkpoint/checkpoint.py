"""Keeps named arrays as a chain of snapshots in a directory, tracks what is written to them, and thins the chain out.

Each checkpoint is one snapshot file (:mod:`dirtylog.sinks.snapshot`) of all arrays, named by a number that goes up:
full the first time, a diff afterwards. It appears by one rename, so all arrays are of one moment or there is no
checkpoint, and the epochs of all trackers are committed after it, or rolled back together.

With `keep`, the oldest checkpoint that is kept is made full in place now and then, by one rename too, and those before
it are removed. It then holds what its child expects of its parent, so the chain above it stays as it is.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Mapping
from contextlib import ExitStack
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from dirtylog.log import DirtyLog, Observer
from dirtylog.sinks import snapshot
from dirtylog.sinks.snapshot import Info, SnapshotError
from dirtylog.sinks.snapshot.overlay import flatten
from dirtylog.sources.memory import Tracker, track

if TYPE_CHECKING:
    from dirtylog._typing import Memory

__all__ = ["Checkpoint"]

_NAME = re.compile(r"(\d{10})\.ckpt")


def _files(directory: str) -> list[str]:
    """List the checkpoint files, oldest first."""
    try:
        names = sorted(name for name in os.listdir(directory) if _NAME.fullmatch(name))
    except FileNotFoundError:
        return []
    return [os.path.join(directory, name) for name in names]


def _about(path: str) -> dict[str, Any]:
    state = snapshot.info(path).state
    if not isinstance(state, dict) or set(state) != {"step", "keep", "user"}:
        raise SnapshotError(f"{path}: this snapshot was not written by a Checkpoint; move it to another directory")
    return state


def _kept(directory: str) -> list[tuple[int | None, str]]:
    """List the steps that are kept and their files, oldest first; what the thread saved has none."""
    files = _files(directory)
    if not files:
        return []
    keep = _about(files[-1])["keep"]
    return [(_about(path)["step"], path) for path in files[-keep if keep else 0 :]]


class Checkpoint:
    """Saves named arrays, all or none, by writing what changed since the last time.

    Parameters
    ----------
    directory : str or path
        Where the checkpoints are; made if it is not there. One `Checkpoint` at a time writes there.
    arrays : mapping of str to array
        What to save: memory of any kind that :func:`dirtylog.track` takes. The arrays are written in place; a name that
        is bound to another array later (``w = w + 1``) is not followed.
    every : float, optional
        Save from a background thread every so many seconds, too; such a checkpoint has no step and is loaded as the
        latest. The thread holds :attr:`lock` while it copies: hold it yourself around writes that belong together. An
        error there is raised by the next call.
    keep : int, optional
        How many checkpoints can be loaded; all by default.
    backend : str
        How writes are noticed; as for :func:`dirtylog.track`.
    digest : str
        ``"xxh3_128"`` (needs xxhash) or ``"blake2b_128"``; by default the first if it is there.
    sync : bool
        Survive a power cut (fsync), not only the end of this process.

    Raises
    ------
    ValueError
        `every`, `keep` or an array will not do.

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
        backend: str = "auto",
        digest: str | None = None,
        sync: bool = True,
    ) -> None:
        if every is not None and not 0 < every < threading.TIMEOUT_MAX:
            raise ValueError(f"every is {every}; it must be a number of seconds above 0")
        if keep is not None and (not isinstance(keep, int) or keep < 1):
            raise ValueError(f"keep is {keep!r}; it must be at least 1, or None to keep all")
        if not isinstance(arrays, Mapping) or not arrays:
            raise ValueError("arrays must be a mapping of names to at least one array")
        self.directory: str = os.path.abspath(os.fspath(directory))
        self.lock: threading.RLock = threading.RLock()
        self._arrays = dict(arrays)
        self._keep = keep
        self._digest = digest or _best_digest()
        self._sync = sync
        self._parent: str | None = None
        self._step = -1
        self._error: BaseException | None = None
        self._ended = threading.Event()
        self._observers: dict[str, Observer] = {}
        os.makedirs(self.directory, exist_ok=True)
        with ExitStack() as stack:
            for name, array in self._arrays.items():
                tracker: Tracker = stack.enter_context(track(array, backend=backend))
                log = DirtyLog()
                log.attach(tracker)
                self._observers[name] = log.observer("checkpoint")
            self._resources = stack.pop_all()
        self._thread: threading.Thread | None = None
        if every is not None:
            self._thread = threading.Thread(target=self._run, args=(every,), name="dirtylog-checkpoint", daemon=True)
            self._thread.start()

    @property
    def closed(self) -> bool:
        """Whether it has ended."""
        return self._ended.is_set()

    def _run(self, every: float) -> None:
        while not self._ended.wait(every):
            try:
                with self.lock:
                    if not self._ended.is_set():
                        self._save(None, None)
            except Exception as error:
                self._error = error

    def _raise_earlier(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error

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
        with self.lock:
            if self.closed:
                raise ValueError("the checkpoint is closed")
            self._raise_earlier()
            number = self._step + 1 if step is None else step
            if not isinstance(number, int) or number < 0:
                raise ValueError(f"step is {step!r}; it must be a number from 0")
            return self._save(number, state)

    def _save(self, step: int | None, state: object) -> Info:
        files = _files(self.directory)
        last = int(os.path.basename(files[-1])[:10]) if files else 0
        path = os.path.join(self.directory, f"{last + 1:010d}.ckpt")
        about = {"step": step, "keep": self._keep, "user": state}
        with ExitStack() as epochs:
            pages = {name: epochs.enter_context(each.collect()).pages for name, each in self._observers.items()}
            if self._parent is None:
                info = snapshot.save(path, self._arrays, state=about, digest=self._digest, sync=self._sync)
            else:
                info = snapshot.save_diff(
                    path, self._arrays, pages, parent=self._parent, state=about, digest=self._digest, sync=self._sync
                )  # fmt: skip
            self._parent = path
            self._step = self._step if step is None else step
        self._thin([*files, path])
        return info

    def _thin(self, files: list[str]) -> None:
        """Remove what is not kept, when it is as much again as what is: so each save pays for a page or two of it."""
        if self._keep is None or len(files) < 2 * self._keep:
            return
        gone, oldest = files[: -self._keep], files[-self._keep]
        try:
            if snapshot.info(oldest).kind == "diff":
                # The newest is the parent of what comes next, by its digest: it goes on being that.
                flatten(oldest, sync=self._sync)
            # The newest of them first: what is left after an interruption still has its parents.
            for path in reversed(gone):
                os.unlink(path)
        except (OSError, SnapshotError) as error:
            # The checkpoint is written. What could not be removed is tried again after the next.
            self._error = error

    def close(self) -> None:
        """End the thread and the tracking; writes nothing. Raises what the thread met; does nothing a second time."""
        self._ended.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        with self.lock:
            self._resources.close()
            self._raise_earlier()

    def __enter__(self) -> Self:
        """Return the checkpoint."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it."""
        self.close()

    @staticmethod
    def steps(directory: str | os.PathLike[str]) -> list[int]:
        """List the steps that are kept, oldest first."""
        return [step for step, _ in _kept(os.path.abspath(os.fspath(directory))) if step is not None]

    @staticmethod
    def _path(directory: str | os.PathLike[str], step: int | None) -> str:
        kept = _kept(os.path.abspath(os.fspath(directory)))
        for number, path in reversed(kept):
            if step is None or number == step:
                return path
        raise KeyError(
            f"{os.fspath(directory)} has no checkpoint" + ("" if step is None else f" of step {step}") +
            f"; it has those of {[number for number, _ in kept if number is not None][-10:]}"
        )  # fmt: skip

    @staticmethod
    def load(
        directory: str | os.PathLike[str], step: int | None = None, *, into: Mapping[str, Memory] | None = None
    ) -> Any:
        """Read the arrays of a checkpoint.

        Parameters
        ----------
        directory : str or path
            Where the checkpoints are.
        step : int, optional
            Which one; the latest by default.
        into : mapping of str to array, optional
            Arrays of the same names and sizes to fill in place.

        Returns
        -------
        dict of str to array
            New arrays, or `into`.

        Raises
        ------
        KeyError
            There is none of that step, or it is not kept any more.
        SnapshotError
            It is damaged.
        """
        return snapshot.restore(Checkpoint._path(directory, step), out=into)

    @staticmethod
    def state_of(directory: str | os.PathLike[str], step: int | None = None) -> Any:
        """Return the state that was saved with a checkpoint; parameters and errors as for :meth:`load`."""
        return _about(Checkpoint._path(directory, step))["user"]


def _best_digest() -> str:
    try:
        import xxhash  # noqa: F401
    except ImportError:
        return "blake2b_128"
    return "xxh3_128"
