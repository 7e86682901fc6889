"""Whose turn it is at a checkpoint: one save at a time; interrupts, forks, and calls in the middle of one."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any

from dirtylog.errors import DirtyLogError

if TYPE_CHECKING:
    from dirtylog.sinks.snapshot.chain import Progress

__all__ = ["EndedError", "Turns"]

# How often the thread looks whether it is to end while it waits for a lock, in seconds.
INTERVAL = 0.05

_every: weakref.WeakSet[Turns] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    """Give each checkpoint locks that no thread of the parent holds."""
    for turns in list(_every):
        turns._renew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)


def _is_owned(lock: Any) -> bool:
    """Say whether this thread holds a lock, as `threading.Condition` asks it."""
    return bool(lock._is_owned())


class EndedError(Exception):
    """The thread is to end."""


class _Undoing:
    """A block that leaves no lock held which was not before, should it fail.

    An interrupt may come between a lock's step and what remembers it.
    """

    __slots__ = ("_held", "_turns")

    def __init__(self, turns: Turns) -> None:
        self._turns = turns

    def __enter__(self) -> None:
        self._held = self._turns._held()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._turns._let_go(self._held)


class Turns:
    """The locks of one checkpoint, and who is in the middle of what."""

    def __init__(self) -> None:
        self.lock: threading.RLock = threading.RLock()
        # Held for all of a save, and taken with `lock` held: after `lock` is released at the moment that is saved,
        # nobody who holds this one waits for `lock`.
        self.saving: threading.RLock = threading.RLock()
        # The thread that holds it and is in the middle of something.
        self._busy: int | None = None
        # The threads of a store in which it is told how far it is.
        self._told: set[int] = set()
        # Whether this is the child of a fork.
        self._inherited = False
        self._ended = threading.Event()
        _every.add(self)  # when it has all that the child of a fork renews

    def _renew(self) -> None:
        """Take new locks in the child of a fork, where those that threads of the parent held are held for ever."""
        ended = self.ended
        self.lock, self.saving, self._ended = threading.RLock(), threading.RLock(), threading.Event()
        self._busy, self._told, self._inherited = None, set(), True
        if ended:
            self.end()

    @property
    def ended(self) -> bool:
        """Whether the checkpoint has ended."""
        return self._ended.is_set()

    def end(self) -> None:
        """Let the thread end."""
        self._ended.set()

    def wait(self, seconds: float) -> bool:
        """Wait for the end, so long at most; return whether it has come."""
        return self._ended.wait(seconds)

    def undoing(self) -> _Undoing:
        """Return a block to be put around `alone` and its `locked`: if it fails, it leaves no lock held."""
        return _Undoing(self)

    @contextmanager
    def alone(self, locked: ExitStack, *, ends: bool = False, within: bool = False) -> Iterator[None]:
        """Hold `lock`, to be left with `locked`, and `saving`; while another save writes, hold neither.

        Otherwise writers would wait for all of that save, and not only for the moment of this one. Whoever holds `lock`
        and saves makes them wait.

        With `ends`, for the thread: whoever closes the checkpoint waits for it, and may hold both, so it looks now and
        then whether it is to end. With `within`, for closing, the thread that saves may do this in the middle of it,
        and the child of a fork may.
        """
        me = threading.get_ident()
        if self._busy == me or me in self._told:
            # It holds `saving`. It must not wait for `lock`, which it may have left: whoever has that may wait for it.
            # A thread of a store holds nothing, and the save waits for it.
            if not within or self._busy != me:
                raise DirtyLogError(
                    "this thread is in the middle of a save or an update, of which progress= or a signal handler calls "
                    "for another; nothing has changed: call again when it has ended"
                )
            yield
            return
        # The child of a fork has others.
        lock, saving = self.lock, self.saving
        while True:
            self._acquire(lock, ends)
            locked.callback(lock.release)
            if saving.acquire(blocking=False):
                break
            locked.close()
            self._acquire(saving, ends)  # until it ends
            saving.release()
        try:
            if ends and self.ended:
                raise EndedError
            if self._inherited and not within:
                raise DirtyLogError(
                    "this checkpoint belongs to the parent process: a fork's child is not tracked; close it here and "
                    "make another one, in a directory of its own"
                )
            self._busy = me
            yield
        finally:
            self._busy = None
            saving.release()

    def _held(self) -> list[threading.RLock]:
        """List the locks that this thread holds."""
        return [lock for lock in (self.lock, self.saving) if _is_owned(lock)]

    def _let_go(self, held: list[threading.RLock]) -> None:
        """Leave no lock held but those."""
        if self.saving not in held and self._busy == threading.get_ident():
            self._busy = None
        for lock in (self.lock, self.saving):
            while lock not in held and _is_owned(lock):
                lock.release()

    def _acquire(self, lock: threading.RLock, ends: bool) -> None:
        """Take a lock; for the thread, as long as it is not to end."""
        while not lock.acquire(timeout=INTERVAL if ends else -1):
            if self.ended:
                raise EndedError

    def telling(self, progress: Progress) -> Progress:
        """Return what calls `progress` and knows the thread that it does so in."""

        def told(done: int, total: int) -> None:
            me = threading.get_ident()
            self._told.add(me)
            try:
                progress(done, total)
            finally:
                self._told.discard(me)

        return told
