"""The neck of the hourglass: merges any number of sources into one page space, for any number of observers."""

from __future__ import annotations

import os
import threading
import warnings
import weakref
from itertools import chain, count
from operator import index
from typing import Protocol, SupportsIndex

from dirtylog._bits.pages import DirtyPages, check_geometry
from dirtylog._core import DirtyBitmap
from dirtylog._log.account import Gathering, Share
from dirtylog.epochs import Epoch, Observer
from dirtylog.errors import IncompleteLogWarning

__all__ = ["Attachment", "DirtyLog", "Epoch", "Observer", "Source"]


_logs: weakref.WeakSet[DirtyLog] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    # A thread that held the lock is in the other process. What it left half-done says so: it is in doubt.
    for log in list(_logs):
        log._lock = threading.RLock()
        for attachment in log._sources:
            attachment._after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)


class Source(Protocol):
    """What a log can harvest: a bitmap, a slot of a virtual machine, tracked memory, a trace."""

    @property
    def npages(self) -> int:
        """Pages it speaks about; fixed while it is attached."""

    @property
    def page_size(self) -> int:
        """Bytes of a page."""

    def harvest(self) -> DirtyPages:
        """Get and clear what was written since the last harvest."""

    # A source that keeps what it has handed out until it is delivered has two more, which a log looks for:
    #   lease             of the newest harvest, any value but None
    #   release_lease(lease)  every observer has committed the pages of that harvest; called without the log's lock


class Attachment(Share):
    """Where a source lies in the page space of a log.

    Attributes
    ----------
    source : Source
        The source itself.
    name : str
        What errors and reports call it.
    first_page : int
        The page of the log at which page 0 of the source lies.
    npages : int
        Its length, in pages.
    """

    __slots__ = ()

    def __init__(self, source: Source, name: str, first_page: int, npages: int) -> None:
        self.source = source
        self.name = name
        self.first_page = first_page
        self.npages = npages
        self._ask_for_leases()

    def __repr__(self) -> str:
        """Name the source and its range."""
        return f"<Attachment {self.name!r}: {self.npages} pages from page {self.first_page} on>"


class DirtyLog(Gathering):
    """Merge any number of sources into one page space and serve any number of observers.

    Every collect harvests every source once and gives the pages to all
    observers: nobody takes bits away from anybody. An observer sees them when it
    collects itself, in an epoch that is committed or rolled back.

    Notes
    -----
    Thread-safe, while writers run. One lock guards the log: it is held while the
    sources are harvested and while the result is distributed, so a `collect`,
    `attach`, `detach` or `observer` waits until the harvests of another one are
    done, and never for the body of another observer's ``with`` block. A write that happened before a collect began
    is in that collect's epoch.

    A source that keeps what it has handed out until it is delivered, such as the bitmaps of a QEMU disk, has an
    attribute `lease` and a method `release_lease`: the log calls it when every observer has committed the pages of
    that harvest. What an observer leaves uncommitted when it closes is never released.

    A collect costs the harvests, plus O(dirty words) for each observer. Each
    observer keeps one bit per page.

    A signal handler may collect, whatever it has interrupted: the last checkpoint
    on SIGTERM. It does so with an observer of its own; one whose epoch was
    interrupted holds it still, and says so. If the handler came in the middle of
    a harvest, all pages of that source are reported, with ``exact=False``: what
    the harvest had found was not in a safe place yet. The same holds for a
    finalizer that closes an observer during a collect.

    The log does not own its sources: it closes none.

    The child of a fork has a log of its own, with what its sources are there. A
    source that was being harvested at the fork reports every page, not exact. An
    epoch that another thread held stays held: end it by its `rollback`.

    Examples
    --------
    >>> import dirtylog as dl
    >>> guest, device = dl.DirtyBitmap(100), dl.DirtyBitmap(10)
    >>> log = dl.DirtyLog()
    >>> _ = log.attach(guest), log.attach(device, first_page=90)
    >>> backup = log.observer("backup")
    >>> guest.mark(5), device.mark(2)
    (None, None)
    >>> with backup.collect() as epoch:
    ...     epoch.number, epoch.pages.indices().tolist()
    (1, [5, 92])
    """

    __module__ = "dirtylog"

    def __init__(self) -> None:
        # Re-entrant: a signal handler, or a finalizer, may use the log in the middle of a collect of its own thread.
        # It finds every step done or not begun (dirtylog/_log/account.pyx).
        self._lock = threading.RLock()
        self._sources = []
        self._observers = []
        self._geometry = (0, 0)
        self._unsaid = []
        self._leases = []
        _logs.add(self)

    def __repr__(self) -> str:
        """Say how much there is."""
        return f"<DirtyLog: {len(self._sources)} sources, {len(self._observers)} observers, {self.npages} pages>"

    @property
    def npages(self) -> int:
        """Pages of the page space: the end of the source that reached furthest, attached still or not."""
        return self._geometry[0]

    @property
    def page_size(self) -> int:
        """Bytes of a page, which the first source decides; 4096 before there is one."""
        return self._geometry[1] or 4096

    @property
    def sources(self) -> tuple[Attachment, ...]:
        """The attached sources, in the order in which they are harvested."""
        return tuple(self._sources)

    @property
    def observers(self) -> tuple[Observer, ...]:
        """The observers that are open."""
        return tuple(self._observers)

    def attach(
        self, source: Source, first_page: SupportsIndex = 0, *, name: str = "", everything: bool = False
    ) -> Attachment:
        """Harvest `source` from now on.

        Parameters
        ----------
        source : Source
            Anything with `npages`, `page_size` and `harvest`.
        first_page : int, default 0
            Where page 0 of the source lies in the page space. Ranges may overlap:
            guest and device writes to the same memory, for example.
        name : str, optional
            What errors and reports call it.
        everything : bool, default False
            Report every page of it to the observers there are: for memory that
            they have never copied. Otherwise they see what is written from the
            point on at which the source itself began to track.

        Returns
        -------
        Attachment
            Where it lies.

        Raises
        ------
        IndexError
            `first_page` is negative.
        TypeError
            `source` is not a source.
        ValueError
            The page sizes differ, the source or the name is attached already, or
            the page space would be too large.

        Notes
        -----
        May make the page space larger: then it is O(npages) for every observer.
        """
        start = index(first_page)
        if start < 0:
            raise IndexError(f"first_page is {start}; pages are numbered from 0 on")
        if not callable(getattr(source, "harvest", None)) or not hasattr(source, "npages"):
            raise TypeError(f"{type(source).__name__} is not a source: it needs npages, page_size and harvest()")
        length, page_size = check_geometry(source.npages, source.page_size)
        check_geometry(start + length, page_size)
        with self._lock:
            attachment = Attachment(source, name or self._free_name(source, start), start, length)
            if self._geometry[1] and page_size != self._geometry[1]:
                raise ValueError(
                    f"{attachment.name!r} has pages of {page_size} bytes and the log has {self.page_size}; "
                    "use another log for it"
                )
            for other in self._sources:
                if other.source is source:
                    raise ValueError(f"the source is attached already, as {other.name!r}; detach it first")
                if other.name == attachment.name:
                    raise ValueError(f"there is a source {other.name!r} already; give this one a name of its own")
            self._grow(max(self.npages, start + length), page_size)
            if everything:
                for observer in list(self._observers):
                    observer._fitting().add_range(start, length, True)
            self._sources.append(attachment)
        return attachment

    def detach(self, source: Source) -> None:
        """Harvest `source` a last time, then let it go.

        Parameters
        ----------
        source : Source
            One that is attached.

        Warns
        -----
        IncompleteLogWarning
            The last harvest failed: all pages of the source are reported to
            every observer as dirty, and their next epochs are not exact (I6).

        Raises
        ------
        ValueError
            `source` is not attached.

        Notes
        -----
        The page space stays as large as it is, and pages that are pending stay
        pending.
        """
        with self._lock:
            attachment = next((each for each in self._sources if each.source is source), None)
            if attachment is None:
                raise ValueError(f"this {type(source).__name__} is not attached; attached are {self._sources}")
            try:
                warning = attachment._harvest(self._observers)
                attachment._note(self)
            except Exception as error:
                attachment._report_everything(self._observers)
                warning = (
                    f"the last harvest of {attachment.name!r} failed ({type(error).__name__}: {error}): "
                    f"all its {attachment.npages} pages are reported"
                )
            self._sources.remove(attachment)
        if warning:
            warnings.warn(warning, IncompleteLogWarning, stacklevel=2)

    def observer(self, name: str, *, everything: bool = False) -> Observer:
        """Make a consumer of its own rhythm.

        Parameters
        ----------
        name : str
            What errors call it; unlike those of the other observers.
        everything : bool, default False
            Begin with all pages of all attached sources dirty: the first epoch
            is then a whole copy. Otherwise the observer sees what is harvested
            after this call: what a source has marked and nobody has harvested
            yet is its too, what another collect has harvested is not.

        Returns
        -------
        Observer
            Open until its `close`, or the end of its ``with`` block.

        Raises
        ------
        TypeError
            `name` is not a string.
        ValueError
            There is an observer of that name.

        Notes
        -----
        O(npages), once. To start without ``everything=True`` and lose nothing,
        make the observer first, then copy the memory, then collect.
        """
        if not isinstance(name, str):
            raise TypeError(f"name is {name!r}; it must be a string")
        with self._lock:
            if any(other.name == name for other in self._observers):
                raise ValueError(
                    f"there is an observer {name!r} already; close it (it is in the log's `observers`), "
                    "or choose another name"
                )
            observer = Observer(self, name, DirtyBitmap(self.npages, self.page_size))
            observer._begin_after(self)
            if everything:
                for source in self._sources:
                    observer._account.add_range(source.first_page, source.npages, True)
            self._observers.append(observer)
        return observer

    def _free_name(self, source: Source, first_page: int) -> str:
        taken = {other.name for other in self._sources}
        base = f"{type(source).__name__} at page {first_page}"
        return next(name for name in chain([base], (f"{base} ({n})" for n in count(2))) if name not in taken)

    def _grow(self, npages: int, page_size: int) -> None:
        """Make room in every observer, or raise before anything has changed."""
        if (npages, page_size) == self._geometry:
            return
        observers = list(self._observers)
        grown = [DirtyBitmap(npages, page_size) for _ in observers]
        # From here on an observer that is still smaller, because a signal handler raised, grows when it is used.
        self._geometry = (npages, page_size)
        for observer, pending in zip(observers, grown, strict=True):
            observer._account.adopt(pending)
