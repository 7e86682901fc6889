"""What a consumer of a log has: an observer with its pending pages, and the epochs it takes them in."""

from __future__ import annotations

import time
import warnings
from typing import TYPE_CHECKING, Self

from dirtylog._bits.pages import DirtyPages
from dirtylog._core import DirtyBitmap
from dirtylog._log.account import Account, Leaving, Observing
from dirtylog.errors import DirtyLogError, IncompleteLogWarning

if TYPE_CHECKING:
    from dirtylog.log import DirtyLog

__all__ = ["Epoch", "Observer"]


class Observer(Observing):
    """One consumer of a log: what it has not been given yet, and the epoch it holds.

    Made by :meth:`DirtyLog.observer`. A context manager that closes it at the end.

    Attributes
    ----------
    name : str
        What errors call it.

    Notes
    -----
    Thread-safe. It holds one epoch at a time: the memory of its consumer is
    one, so there is one order in which it takes over epochs.
    """

    __module__ = "dirtylog"

    def __init__(self, log: DirtyLog, name: str, pending: DirtyBitmap) -> None:
        self.name = name
        self._log = log
        self._account = Account(pending)
        self._closed = False

    def __repr__(self) -> str:
        """Name it, and say how far it is."""
        return f"<Observer {self.name!r}: {'closed' if self._closed else f'{self._account.committed} epochs'}>"

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()

    @property
    def npages(self) -> int:
        """Pages of the log's page space."""
        return self._log.npages

    @property
    def page_size(self) -> int:
        """Bytes of a page."""
        return self._log.page_size

    @property
    def log(self) -> DirtyLog:
        """The log it observes."""
        return self._log

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    @property
    def epoch(self) -> Epoch | None:
        """The epoch that it holds: entered, and neither committed nor rolled back. None where there is none."""
        held: Epoch | None = self._account.holder
        return held

    def collect(self, *, owner: str = "", deadline: float | None = None) -> Epoch:
        """Return an epoch to enter: ``with observer.collect() as epoch:``.

        Parameters
        ----------
        owner : str, optional
            For whom the epoch is held, where it outlives the code that collected it: a transaction, say. Whoever finds
            it held is told.
        deadline : float, optional
            For how many seconds it is held, from when it is entered; without end by default. It does not end by itself:
            from then on the next collect rolls it back and has its pages too, and a `commit` that comes after that is
            refused.

        Returns
        -------
        Epoch
            On entry it harvests every source, adds the pages to every observer,
            and takes this observer's own. When the block ends normally
            (``return``, ``break`` and ``continue`` too) the epoch is committed;
            when it ends by any exception, KeyboardInterrupt and GeneratorExit
            too, its pages are pending again, and the next epoch has them.

        Raises
        ------
        ValueError
            `deadline` is not a number of seconds above 0.

        Notes
        -----
        Other errors are those of :meth:`Epoch.__enter__`.

        Examples
        --------
        >>> import dirtylog as dl
        >>> bitmap, log = dl.DirtyBitmap(10), dl.DirtyLog()
        >>> _ = log.attach(bitmap)
        >>> observer = log.observer("backup")
        >>> held = observer.collect(owner="upload 17", deadline=600).__enter__()
        >>> observer.epoch.owner, observer.epoch.overdue
        ('upload 17', False)
        >>> held.commit()
        """
        if deadline is None:
            return Epoch(self, owner) if owner else Epoch(self)
        if not deadline > 0:
            raise ValueError(f"deadline is {deadline}; it must be a number of seconds above 0, or None for no bound")
        return Epoch(self, owner, deadline)

    def put_back(self, pages: DirtyPages) -> None:
        """Make pages pending again that were committed.

        For a consumer of many epochs that fails as a whole, such as a migration:
        what it took is not delivered after all.

        Parameters
        ----------
        pages : DirtyPages
            What the next epoch shall report again; shorter than the page space
            where that has grown since.

        Raises
        ------
        IndexError
            `pages` reaches past the page space.
        TypeError
            `pages` is not DirtyPages.
        ValueError
            The page sizes differ, or the observer is closed.
        """
        if not isinstance(pages, DirtyPages):
            raise TypeError(f"pages is {type(pages).__name__}; it must be DirtyPages")
        with self._log._lock:
            self._check_open()
            if pages.npages > self._log.npages:
                raise IndexError(f"pages speaks of {pages.npages} pages and the log has {self._log.npages}")
            if pages.page_size != self._log.page_size:
                raise ValueError(f"pages are of {pages.page_size} bytes and the log has {self._log.page_size}")
            self._fitting().add(pages)

    def close(self) -> None:
        """Leave the log: nothing is kept for this observer any more.

        An epoch that it holds may go on, and ends without effect. Closing twice is fine.
        """
        with self._log._lock:
            self._closed = True
            if self in self._log._observers:
                self._log._observers.remove(self)
                self._abandon()
            self._account = Account(DirtyBitmap(0, self._log.page_size))


class Epoch(Leaving):
    """What one observer collected at one moment; a context manager, entered once.

    Notes
    -----
    Rolled back, too, where the object is dropped without leaving its block: the
    next collect of the observer finds that and reports the pages again.

    If you cannot hold a ``with`` block, call `commit` or `rollback` yourself after
    `__enter__`.
    """

    __module__ = "dirtylog"

    def __repr__(self) -> str:
        """Say whose it is and what is in it."""
        return f"<Epoch {self._number or '(not entered)'} of {self._observer.name!r}: {self._pages}>"

    @property
    def pages(self) -> DirtyPages:
        """What was written since the last epoch that was committed, in pages of the log.

        ``pages.exact`` is False where any source lost track since then.
        """
        if self._pages is None:
            raise DirtyLogError("the epoch is not entered yet; write: with observer.collect() as epoch")
        return self._pages

    @property
    def number(self) -> int:
        """1 for the first epoch of an observer.

        Committed epochs are numbered without a gap: the number of one that was
        rolled back is that of the next, which holds its pages too.
        """
        if self._pages is None:
            raise DirtyLogError("the epoch has no number before it is entered; write: with observer.collect() as epoch")
        return self._number

    @property
    def observer(self) -> Observer:
        """Whose epoch it is."""
        return self._observer

    @property
    def overdue(self) -> bool:
        """Whether its deadline has passed: the next collect rolls it back, unless it is ended before."""
        return time.monotonic() >= self._deadline

    def __enter__(self) -> Self:
        """Harvest every source, give every observer its pages, and take this observer's.

        Raises
        ------
        DirtyLogError
            The observer holds an epoch already, or this one was entered before.
        ValueError
            The observer is closed.
        Exception
            What a source raised, with a note that names it. Nothing is lost: what
            was harvested before is pending, and so, at the next collect that
            succeeds, is every page of the source that failed, with
            ``exact=False`` (I6), because nobody knows which of its bits are gone.

        Warns
        -----
        IncompleteLogWarning
            A source failed in an earlier collect, and all its pages are reported.

        Notes
        -----
        Read a page's content after this call (I3): a write since is in the next epoch.
        """
        if self._pages is not None:
            raise DirtyLogError(f"{self} was entered before; an epoch is entered once: collect() again")
        try:
            for message in self._observer._begin(self):
                warnings.warn(message, IncompleteLogWarning, stacklevel=2)
        except BaseException:
            self._leave(False)
            raise
        return self

    def commit(self) -> None:
        """End the epoch: its pages are delivered, and no later one has them unless they are written again.

        Raises
        ------
        DirtyLogError
            It is not entered, or not held any more: committed, rolled back, its
            deadline passed and another collected, or its observer closed.

        Notes
        -----
        For whoever cannot hold a ``with`` block, and from within one: the end of the
        block then changes nothing. Thread-safe.
        """
        self._check_held()
        self._leave(True)

    def rollback(self) -> None:
        """End the epoch: its pages are pending again, and the next one has them.

        Raises
        ------
        DirtyLogError
            As for :meth:`commit`.

        Notes
        -----
        The way out where an interrupt left an epoch open: ``observer.epoch.rollback()``.
        Thread-safe.
        """
        self._check_held()
        self._leave(False)

    def _check_held(self) -> None:
        if self._observer._account.holder is not self:
            raise DirtyLogError(f"{self} is not open; it is committed or rolled back once, after it was entered")
