# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
# cython: auto_pickle=False, autotestdict=False, freethreading_compatible=True, embedsignature=True
"""What observers are owed, and how a source's pages reach them: steps that no signal handler can divide (I5).

Python calls signal handlers between bytecodes. A method here calls no Python but a source's own harvest and
ends with pages in exactly one safe place: pending, or held by an epoch. All are called under the log's lock,
which a handler of the same thread may take again: it finds the state before a step, or the state after it.
"""

cimport cython
from cpython.weakref cimport PyWeakref_NewRef

from dirtylog._bits.pages cimport DirtyPages, pages_bare, pages_fill
from dirtylog._core cimport DirtyBitmap

from dirtylog.errors import DirtyLogError


__all__ = ["Account", "Leaving", "Share"]


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
        return None if self.reference is None else self.reference()

    def add(self, DirtyPages pages not None, first_page=0):
        """Make pages pending."""
        # The flag first: pages that are too many are noticed as such.
        self.exact = self.exact and pages.exact
        self.pending.merge(pages, first_page)

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

    def open(self, epoch):
        """Move what is pending into `epoch`; None, and nothing, if another one that is alive holds pages."""
        if self.holder is not None:
            return None
        reference = PyWeakref_NewRef(epoch, None)
        self.settle()
        # I5: the one that is not exact has its memory before anything is taken.
        cdef DirtyPages vague = pages_bare(self.pending.npages, self.pending.page_size, False)
        cdef DirtyPages pages = self.pending.take(0, self.pending.npages, True)
        if not self.exact:
            pages_fill(vague, pages.dense, pages.numbers, pages.masks, pages.entries)
            pages = vague
        self.held = pages
        self.reference = reference
        self.exact = True
        return pages

    def end(self, epoch, bint delivered):
        """Commit or roll back; an epoch that does not hold pages, or not any longer, changes nothing."""
        if self.holder is not epoch:
            return
        if delivered:
            self.committed += 1
            self.held = None
        self.settle()

    def settle(self):
        """Make what is held pending again: of an epoch that failed, or of one that was dropped."""
        if self.held is not None:
            self.add(self.held)
        self.held = None
        self.reference = None


@cython.final
cdef class Share:
    """How the pages of one source reach every observer.

    From before a harvest until every observer has its pages, nobody knows which bits are gone. A harvest that
    fails leaves doubt, and one that is under way further down the stack is doubtful to a signal handler that
    collects: all pages of the source are then reported, not exact (I6).
    """

    cdef int active
    cdef bint doubt

    @property
    def doubtful(self):
        """Whether the next harvest reports everything."""
        return self.doubt or self.active > 0

    def gather(self, harvest, accounts, first_page, npages):
        """Call `harvest` and give its pages to every account.

        Returns 0; 1 where everything was reported first, because a harvest had failed; 2 where everything was
        reported and nothing harvested, because a harvest is under way further down the stack. What is marked
        in the source meanwhile stays for the next one.
        """
        cdef list everybody = list(accounts)
        cdef int doubtful = 2 if self.active > 0 else self.doubt
        cdef DirtyPages pages
        if doubtful:
            self.report_everything(everybody, first_page, npages)
        if doubtful == 2:
            return 2
        self.active += 1
        try:
            pages = harvest()
            if pages.npages != npages:
                raise DirtyLogError(
                    f"it answered for {pages.npages} pages and was attached with {npages}; "
                    "detach a source before it changes its size"
                )
            for account in everybody:
                (<Account?>account).add(pages, first_page)
        except BaseException:
            self.doubt = True
            raise
        finally:
            if self.active:
                self.active -= 1
        return doubtful

    def report_everything(self, accounts, first_page, npages):
        """Make all pages of the source pending everywhere, not exact, and doubt no more."""
        for account in list(accounts):
            (<Account?>account).add_range(first_page, npages, False)
        self.doubt = False

    def after_fork(self):
        """In the child of a fork: who was harvesting is in the other process."""
        if self.active:
            self.active = 0
            self.doubt = True


cdef class Leaving:
    """The end of an epoch's block, in C: it has happened before a signal handler can raise.

    An `__exit__` in Python can be interrupted before its first instruction, and the epoch would stay open.
    """

    def __exit__(self, kind, error, traceback):
        """Commit where the block ended normally, roll back where it ended by an exception."""
        self._leave(kind is None)

    def _leave(self, bint delivered):
        observer = self._observer
        account = (<Account?>observer._account)
        lock = observer._log._lock
        interrupt = None
        while True:
            try:
                lock.acquire()
                break
            except BaseException as error:
                # A handler raised while another thread had the lock. The block has ended all the same.
                interrupt = error
        try:
            account.end(self, delivered)
        finally:
            lock.release()
        if interrupt is not None:
            raise interrupt
