"""What a consumer of a log has: an observer with its pending pages, and the epochs it takes them in."""

from __future__ import annotations

import warnings
import weakref
from types import TracebackType
from typing import TYPE_CHECKING, Self

from dirtylog._bits.pages import DirtyPages
from dirtylog._core import DirtyBitmap
from dirtylog.errors import DirtyLogError, IncompleteLogWarning

if TYPE_CHECKING:
    from dirtylog.log import DirtyLog

__all__ = ["Epoch", "Observer"]


class Observer:
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
        # All that follows is guarded by the log's lock.
        self._pending = pending
        self._exact = True
        self._committed = 0
        self._held: DirtyPages | None = None
        self._holder: weakref.ref[Epoch] | None = None
        # The twin of Attachment._in_doubt: set while bits are in no safe place.
        self._in_doubt = False
        self._closed = False

    def __repr__(self) -> str:
        """Name it, and say how far it is."""
        return f"<Observer {self.name!r}: {'closed' if self._closed else f'{self._committed} epochs'}>"

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

    def collect(self) -> Epoch:
        """Return an epoch to enter: ``with observer.collect() as epoch:``.

        Returns
        -------
        Epoch
            On entry it harvests every source, adds the pages to every observer,
            and takes this observer's own. When the block ends normally
            (``return``, ``break`` and ``continue`` too) the epoch is committed;
            when it ends by any exception, KeyboardInterrupt and GeneratorExit
            too, its pages are pending again, and the next epoch has them.

        Notes
        -----
        The errors are those of :meth:`Epoch.__enter__`.
        """
        return Epoch(self)

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
            self._add(pages, 0)

    def close(self) -> None:
        """Leave the log: nothing is kept for this observer any more.

        An epoch that it holds may go on, and ends without effect. Closing twice is fine.
        """
        with self._log._lock:
            self._closed = True
            if self in self._log._observers:
                self._log._observers.remove(self)
            self._pending = DirtyBitmap(0, self._log.page_size)
            self._held = self._holder = None

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError(f"observer {self.name!r} is closed; make another with DirtyLog.observer")

    def _add(self, pages: DirtyPages, first_page: int) -> None:
        """Make `pages` pending, under the log's lock."""
        # The flag first: pages that are too many are noticed as such, whatever breaks.
        self._exact = self._exact and pages.exact
        if pages:
            self._pending.merge(pages, first_page)

    def _begin(self, epoch: Epoch) -> list[str]:
        """Harvest everything and take what is this observer's; return what there is to warn of."""
        log = self._log
        with log._lock:
            self._check_open()
            if self._holder is not None and self._holder() is not None:
                raise DirtyLogError(
                    f"observer {self.name!r} holds epoch {self._committed + 1} already; "
                    "leave its block first, or make another observer"
                )
            self._restore()
            self._holder = weakref.ref(epoch)
            log._gather()
            if self._in_doubt:
                self._exact = False
                self._pending.fill()
                log._unsaid.append(f"a collect of observer {self.name!r} was interrupted: all pages are reported")
            self._in_doubt = True
            pages = self._pending.harvest()
            if not self._exact:
                pages |= DirtyPages.from_runs([], pages.npages, pages.page_size, exact=False)
            self._held = epoch._pages = pages
            epoch._number = self._committed + 1
            self._exact = True
            self._in_doubt = False
            unsaid, log._unsaid = log._unsaid, []
            return unsaid

    def _end(self, epoch: Epoch, delivered: bool) -> None:
        """Commit or roll back; an epoch that is not (or no longer) the held one changes nothing."""
        with self._log._lock:
            if self._holder is None or self._holder() is not epoch:
                return
            if delivered:
                self._committed = epoch.number
                self._held = self._holder = None
            else:
                self._restore()

    def _restore(self) -> None:
        """Make what is held pending again: of an epoch that failed, or of one that was dropped in mid-air."""
        if self._held is not None:
            self._add(self._held, 0)
        self._held = self._holder = None


class Epoch:
    """What one observer collected at one moment; a context manager, entered once.

    Notes
    -----
    Rolled back, too, where the object is dropped without leaving its block: the
    next collect of the observer finds that and reports the pages again.
    """

    __module__ = "dirtylog"

    def __init__(self, observer: Observer) -> None:
        self._observer = observer
        self._pages: DirtyPages | None = None
        self._number = 0

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
            self._observer._end(self, delivered=False)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Commit where the block ended normally, roll back where it ended by an exception."""
        self._observer._end(self, delivered=kind is None)
