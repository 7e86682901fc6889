# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
# cython: auto_pickle=False, autotestdict=False, freethreading_compatible=True, embedsignature=True
"""What observers are owed, and how a source's pages reach them: steps that no signal handler can divide (I5).

Python calls signal handlers between bytecodes. A method here calls no Python but a source's own harvest and
ends with pages in exactly one safe place: pending, or held by an epoch. All are called under the log's lock,
which a handler of the same thread may take again: it finds the state before a step, or the state after it.

The log, its observers, its attachments and their epochs are Python classes on what is here: a base class in C
has the attributes that a collect looks at, so that a collect costs little more than its harvests.
"""

cimport cython
from cpython.weakref cimport PyWeakref_NewRef
from libc.math cimport INFINITY
from libc.stdint cimport uint64_t

from dirtylog._bits.pages cimport DirtyPages
from dirtylog._core cimport DirtyBitmap

from time import monotonic

from dirtylog.errors import DirtyLogError

__all__ = ["Account", "Gathering", "Leaving", "Observing", "Share"]


@cython.final
cdef class Account:
    """The pages that one observer has not been given yet, and those that its epoch holds.

    Parameters
    ----------
    pending : DirtyBitmap
        What it is owed from the start; as large as the log's page space.
    """

    cdef DirtyBitmap pending
    cdef bint exact
    cdef DirtyPages held
    cdef object reference
    cdef readonly Py_ssize_t committed

    def __cinit__(self, DirtyBitmap pending not None):
        self.pending = pending
        self.exact = True

    @property
    def npages(self):
        return self.pending.npages

    @property
    def page_size(self):
        return self.pending.page_size

    @property
    def holder(self):
        """The epoch that holds pages; None where there is none, or it was dropped."""
        return self.holding()

    cdef object holding(self):
        return None if self.reference is None else self.reference()

    cdef bint free(self):
        """Whether nobody holds pages, or whoever holds them has had their time."""
        holder = self.holding()
        return holder is None or overdue(<Leaving>holder)

    def add(self, DirtyPages pages not None, first_page=0):
        """Make pages pending."""
        self.keep(pages, first_page)

    cdef int keep(self, DirtyPages pages, uint64_t first_page) except -1:
        cdef uint64_t npages = self.pending.bits.npages
        # The flag first: pages that are too many are noticed as such.
        self.exact = self.exact and pages.exact
        if pages.page_size != self.pending.page_size or first_page > npages or pages.npages > npages - first_page:
            self.pending.merge(pages, first_page)  # which says what is wrong
        elif pages.numbers is None or pages.entries:
            self.pending.put(pages, first_page)
        return 0

    def add_range(self, first, count, bint exact):
        """Make `count` pages from `first` on pending."""
        self.exact = self.exact and exact
        self.pending.mark_range(first, count)

    def adopt(self, DirtyBitmap larger not None):
        """Keep what is pending in `larger` from now on; one that is not larger is dropped."""
        if larger.npages > self.pending.npages or larger.page_size != self.pending.page_size:
            if self.pending.npages:
                larger.merge(self.pending.peek())
            self.pending = larger

    cdef DirtyPages open(self, epoch):
        """Move what is pending into `epoch`; None, and nothing, if another one that is alive holds pages.

        One whose deadline has passed is rolled back: its pages are in this epoch, and its end has no effect.
        """
        if not self.free():
            return None
        reference = PyWeakref_NewRef(epoch, None)
        self.settle()
        # I5: from here on nothing can fail.
        cdef DirtyPages pages = self.pending.take(0, self.pending.bits.npages, True)
        pages.exact = self.exact
        self.held = pages
        self.reference = reference
        self.exact = True
        return pages

    cdef int end(self, epoch, bint delivered) except -1:
        """Commit or roll back; an epoch that does not hold pages, or not any longer, changes nothing."""
        if self.holding() is not epoch:
            return 0
        if delivered:
            self.committed += 1
            self.held = None
        return self.settle()

    cdef int settle(self) except -1:
        """Make what is held pending again: of an epoch that failed, or of one that was dropped."""
        if self.held is not None:
            self.keep(self.held, 0)
        self.held = None
        self.reference = None
        return 0


cdef class Gathering:
    """A log: its lock, its sources and its observers.

    Attributes
    ----------
    _lock : RLock
        Guards all of it.
    _sources, _observers : list
        Of `Share` and `Observing`.
    _geometry : tuple of int
        Pages, and bytes per page (0: no source has said): one attribute, so that it changes in one step.
    _unsaid : list of str
        What there is to warn of.
    _leases : list of (int, source, lease)
        Harvests that some observer has not committed yet, of sources that ask to be told; numbered as they came.
    """

    cdef public object _lock
    cdef public list _sources, _observers, _unsaid, _leases
    cdef public tuple _geometry
    cdef Py_ssize_t numbered

    cdef list due(self):
        """Take out the leases whose pages every observer has committed; under the lock."""
        cdef list over = [], left = []
        cdef Py_ssize_t floor = self.numbered
        if not self._leases:
            return over
        for observer in self._observers:
            floor = min(floor, (<Observing?>observer).delivered)
        if self._leases[0][0] > floor:
            return over
        for entry in self._leases:
            (over if entry[0] <= floor else left).append(entry)
        self._leases = left
        return over


cdef class Observing:
    """An observer.

    Attributes
    ----------
    _log : Gathering
        The log it observes.
    _account : Account
        Changed under the log's lock, in steps that nothing divides.
    _closed : bool
        Whether it has left the log.
    """

    cdef public Gathering _log
    cdef public Account _account
    cdef public bint _closed
    # The newest lease whose pages it has committed: it was not there, and is owed nothing, at those before it came.
    cdef Py_ssize_t delivered

    def _begin_after(self, Gathering log not None):
        """Owe nothing of what was harvested before; under the log's lock."""
        self.delivered = log.numbered

    def _abandon(self):
        """Keep the leases of what was not delivered for whoever comes next; under the log's lock."""
        cdef list left = []
        for entry in self._log._leases:
            if entry[0] <= self.delivered:
                left.append(entry)
        self._log._leases = left

    def _fitting(self):
        """Return the account, as large as the log; under the log's lock."""
        return fitting(self)

    def _begin(self, Leaving epoch not None):
        """Harvest everything and take what is this observer's; return what there is to warn of."""
        cdef Gathering log = self._log
        cdef DirtyPages pages
        cdef list unsaid
        lock = log._lock
        lock.acquire()
        try:
            self._check_open()
            self._check_free()
            for share in list(log._sources):
                warning = (<Share?>share).collected(list(log._observers))
                if warning is not None:
                    log._unsaid.append(warning)
                (<Share>share).note(log)
            # What a signal handler has done meanwhile counts.
            self._check_open()
            number = self._account.committed + 1
            pages = fitting(self).open(epoch)
            if pages is None:
                self._check_free()
                raise DirtyLogError(f"observer {self.name!r} was used by a signal handler meanwhile; collect again")
            epoch.leases = log.numbered
            epoch._number = number
            epoch._pages = pages
            if epoch._patience != INFINITY:
                epoch._deadline = monotonic() + epoch._patience
            if not log._unsaid:
                return ()
            unsaid, log._unsaid = log._unsaid, []
            return unsaid
        finally:
            lock.release()

    def _check_open(self):
        if self._closed:
            raise ValueError(f"observer {self.name!r} is closed; make another with DirtyLog.observer")

    def _check_free(self):
        if not self._account.free():
            holder = self._account.holding()
            by = "" if holder is None or not holder.owner else f" for {holder.owner}"
            raise DirtyLogError(
                f"observer {self.name!r} holds epoch {self._account.committed + 1} already{by}; leave its block first, "
                "or end it by commit() or rollback() (it is the observer's `epoch`), or make another observer"
            )


cdef Account fitting(Observing observer):
    cdef tuple geometry = observer._log._geometry
    cdef Account account = observer._account
    cdef uint64_t npages = geometry[0]
    cdef uint64_t page_size = geometry[1] or 4096
    if not observer._closed and (account.pending.bits.npages != npages or account.pending.page_size != page_size):
        account.adopt(DirtyBitmap(npages, page_size))
    return observer._account


cdef list accounts_of(list observers):
    # No list comprehension: where memory ends in one, Cython 3.3 drops a reference too many.
    cdef list accounts = [None] * len(observers)
    cdef Py_ssize_t i
    for i in range(len(accounts)):
        accounts[i] = fitting(<Observing?>observers[i])
    return accounts


cdef class Share:
    """How the pages of one source reach every observer.

    From before a harvest until every observer has its pages, nobody knows which bits are gone. A harvest that
    fails leaves doubt, and one that is under way further down the stack is doubtful to a signal handler that
    collects: all pages of the source are then reported, not exact (I6).

    Attributes
    ----------
    source : Source
        Whose pages.
    name : str
        What errors and reports call it.
    first_page, npages : int
        The page of the log at which page 0 of the source lies, and its length in pages.
    """

    cdef public object source, name
    cdef public uint64_t first_page, npages
    cdef int active
    cdef bint doubt, leased
    # Of the harvest that every account has and the log has not noted yet.
    cdef object lease

    def _ask_for_leases(self):
        """Look whether the source hears of commits."""
        self.leased = callable(getattr(self.source, "release_lease", None))

    cdef int note(self, Gathering log) except -1:
        """Let the log remember the lease of the last harvest: later than the accounts have its pages."""
        if self.lease is not None:
            log.numbered += 1
            log._leases.append((log.numbered, self.source, self.lease))
            self.lease = None
        return 0

    def _note(self, Gathering log not None):
        self.note(log)

    @property
    def _doubtful(self):
        """Whether the next harvest reports everything."""
        return self.doubt or self.active > 0

    def _harvest(self, observers):
        """Give every observer what the source reports, under the log's lock; return what there is to warn of."""
        return self.collected(list(observers))

    cdef object collected(self, list observers):
        """Harvest for `observers`; None, or what there is to warn of."""
        cdef int doubtful
        try:
            doubtful = self.gather(observers)
        except BaseException as error:
            error.add_note(
                f"source {self.name!r} failed in a collect: what other sources reported is kept, and all its "
                f"{self.npages} pages will be reported by the next collect that succeeds; detach it to go on without"
            )
            raise
        if not doubtful:
            return None
        why = "failed earlier" if doubtful == 1 else "is under way in the code that a signal handler interrupted"
        return f"a harvest of {self.name!r} {why}: all its {self.npages} pages are reported"

    cdef int gather(self, list observers) except -1:
        """Harvest, and give the pages to every account.

        Returns 0; 1 where everything was reported first, because a harvest had failed; 2 where everything was
        reported and nothing harvested, because a harvest is under way further down the stack. What is marked
        in the source meanwhile stays for the next one.
        """
        cdef list everybody = accounts_of(observers)
        cdef int doubtful = 2 if self.active > 0 else self.doubt
        cdef DirtyPages pages
        if doubtful:
            self.report(everybody)
        if doubtful == 2:
            return 2
        self.active += 1
        try:
            pages = self.source.harvest()
            if pages.npages != self.npages:
                raise DirtyLogError(
                    f"it answered for {pages.npages} pages and was attached with {self.npages}; "
                    "detach a source before it changes its size"
                )
            for account in everybody:
                (<Account>account).keep(pages, self.first_page)
            if self.leased:
                self.lease = self.source.lease
        except BaseException:
            self.doubt = True
            raise
        finally:
            if self.active:
                self.active -= 1
        return doubtful

    def _report_everything(self, observers):
        """Make all pages of the source pending everywhere, not exact, and doubt no more."""
        self.report(accounts_of(list(observers)))

    cdef int report(self, list accounts) except -1:
        for account in accounts:
            (<Account>account).add_range(self.first_page, self.npages, False)
        self.doubt = False
        return 0

    def _after_fork(self):
        """In the child of a fork: who was harvesting is in the other process."""
        if self.active:
            self.active = 0
            self.doubt = True


cdef bint overdue(Leaving epoch) except -1:
    """Whether an epoch's deadline has passed. One without a deadline asks no clock."""
    return epoch._deadline != INFINITY and monotonic() >= epoch._deadline


cdef class Leaving:
    """The end of an epoch's block, in C: it has happened before a signal handler can raise.

    An `__exit__` in Python can be interrupted before its first instruction, and the epoch would stay open.

    Attributes
    ----------
    _observer : Observing
        Whose epoch it is.
    _pages : DirtyPages
        None before it is entered.
    _number : int
        0 before it is entered.
    owner : str
        For whom it is held; empty where nobody said so.
    _patience, _deadline : float
        Seconds that it may be held, and the monotonic time until which it is; infinite where there is no bound.
    """

    cdef public Observing _observer
    cdef public DirtyPages _pages
    cdef public Py_ssize_t _number
    cdef readonly str owner
    cdef public double _patience, _deadline
    # The newest lease whose pages it may hold.
    cdef Py_ssize_t leases

    def __cinit__(self, Observing observer not None, str owner not None="", double patience=INFINITY):
        self._observer = observer
        self.owner = owner
        self._patience = patience
        self._deadline = INFINITY

    def __exit__(self, kind, error, traceback):
        """Commit where the block ended normally, roll back where it ended by an exception."""
        self._leave(kind is None)

    cpdef _leave(self, bint delivered):
        cdef Observing observer = self._observer
        lock = observer._log._lock
        interrupt = None
        while True:
            try:
                lock.acquire()
                break
            except BaseException as error:
                # A handler raised while another thread had the lock. The block has ended all the same.
                interrupt = error
        due = ()
        try:
            if delivered and observer._account.holding() is self:
                observer.delivered = self.leases
            observer._account.end(self, delivered)
            if observer._log._leases and delivered:
                due = observer._log.due()
        finally:
            lock.release()
        # The epoch has ended, whatever a source says to that: a lease that is not released reports too much, later.
        for _, source, lease in due:
            try:
                source.release_lease(lease)
            except BaseException as error:
                error.add_note("the epoch has been committed all the same")
                interrupt = error
        if interrupt is not None:
            raise interrupt
