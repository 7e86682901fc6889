# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
# cython: auto_pickle=False, autotestdict=False, freethreading_compatible=True, embedsignature=True
"""What a source has taken and not handed out: kept, whatever broke, and joined to its next answer (I5)."""

cimport cython
from cpython.object cimport PyObject
from cpython.weakref cimport PyWeakref_NewRef
from libc.stdint cimport uint64_t

from dirtylog._bits.atomic cimport dl_exchange, dl_fetch_or, dl_load_acquire
from dirtylog._bits.batch cimport dl_merge_dense, dl_merge_sparse
from dirtylog._bits.bitmap cimport dl_groups_for, dl_mark_range
from dirtylog._bits.bits cimport dl_words_for
from dirtylog._bits.blocks cimport block_new, kernels
from dirtylog._bits.pages cimport DirtyPages, pages_bare, pages_fill, pages_given
from dirtylog._bits.signals cimport dl_raised, dl_signals_raise
from dirtylog._bits.simd cimport DL_CLEAR, DL_LEAVE
from dirtylog._bits.taking cimport clear_pages, take_pages

from dirtylog._bits.pages import check_geometry

__all__ = ["Owed", "take_all"]

cdef enum:
    PAGES = 1       # some may be set
    INEXACT = 2     # the answer that has them is not exact
    SAID = 4        # and its warning has been shown


@cython.final
cdef class Owed:
    """Pages that were taken from a source and have not reached the caller.

    Between the moment at which a source forgets its pages and the return to the caller, an answer is in
    nobody's hands: a warning may be an error, memory may be short, a signal handler may raise. A source makes
    one of these when it is opened and hands out its answers through :meth:`take`; whatever breaks on the way,
    the pages are in the next answer.

    Parameters
    ----------
    npages : int
        Pages of the source.
    page_size : int, default 4096
        Bytes per page, a power of two.

    Raises
    ------
    ValueError
        `npages` or `page_size` is out of its bounds.
    MemoryError
        There is no memory for one bit per page.

    Notes
    -----
    Thread safety: every method may be called from any number of threads, and from signal handlers, at once.
    Owing needs no memory and calls no Python code, so it cannot fail and cannot be interrupted. It costs
    nothing while nothing is owed: one load per answer.

    An answer that an exception throws away before the caller has stored it is owed again: when it is
    deallocated, the exception is on its way (``thrown.h``). What the caller has stored is the caller's; an epoch
    of a log has the caller say when it has done with the pages.

    Examples
    --------
    >>> import dirtylog as dl
    >>> from dirtylog._bits.owed import Owed
    >>> source = dl.DirtyBitmap(64)
    >>> owed = Owed(64)
    >>> source.mark(3)
    >>> owed.owe(source.harvest())
    >>> source.mark(5)
    >>> owed.take(source.harvest).indices().tolist(), owed.take(source.harvest).count
    ([3, 5], 0)
    """

    def __cinit__(self, npages, page_size=4096):
        npages, page_size = check_geometry(npages, page_size)
        self.words = block_new(dl_words_for(npages), True)
        self.summary = block_new(dl_groups_for(npages), True)
        self.bits.words = self.words.words
        self.bits.summary = self.summary.words
        self.bits.npages = npages
        self.page_size = page_size
        self.myself = PyWeakref_NewRef(self, None)

    def __bool__(self):
        return dl_load_acquire(&self.state) != 0

    def owe(self, DirtyPages pages not None):
        """Keep pages for the next answer.

        Parameters
        ----------
        pages : DirtyPages
            Of the source; an answer that is not exact makes the next one inexact.

        Raises
        ------
        ValueError
            They are of another number or size of pages.
        """
        self.check(pages)
        self.note(pages, 0)

    def owe_everything(self):
        """Keep every page for the next answer, which will not be exact: nobody knows what is gone (I6)."""
        dl_fetch_or(&self.state, INEXACT)
        if self.bits.npages:
            with nogil:
                dl_mark_range(&self.bits, 0, self.bits.npages)
        dl_fetch_or(&self.state, PAGES | INEXACT)

    def forget(self):
        """Owe nothing any more: the source's pages are somebody else's business now."""
        dl_exchange(&self.state, 0)
        take_pages(&self.bits, self.page_size, 0, self.bits.npages, DL_CLEAR, None)

    def forget_pages(self, DirtyPages cleared not None):
        """Owe these pages no longer: the caller knows them. What else is owed stays so.

        Parameters
        ----------
        cleared : DirtyPages
            Pages of the source.

        Raises
        ------
        ValueError
            They are of another number or size of pages.
        """
        self.check(cleared)
        if dl_load_acquire(&self.state):
            clear_pages(&self.bits, cleared)

    def take(self, source, *arguments, warn=None, failure=None):
        """Call `source`, and return its pages with all that is owed.

        Parameters
        ----------
        source : callable
            Takes pages and returns them as DirtyPages. If it raises, it has put back what it took, or said so
            here by `owe` or `owe_everything`. One that is written in C leaves no gap at its end.
        *arguments
            Passed on to `source`.
        warn : callable, optional
            Called with the answer when that is not exact, before it is handed out. If it raises, because warnings
            are errors, the answer is owed, and the next one is handed out without another warning.
        failure : callable, optional
            Makes the exception to raise of an OSError with an errno that `source` raised.

        Returns
        -------
        DirtyPages
            In nobody else's answer.

        Raises
        ------
        ValueError
            `source` answered for another number or size of pages.
        Exception
            What `source` or `warn` raised, MemoryError, or what a signal handler raised meanwhile: the
            pages are owed.
        """
        cdef DirtyPages pages
        try:
            pages = source(*arguments)
        except OSError as error:
            # A source's own have a number. Without one it is somebody else's: a TimeoutError of a signal handler, say.
            if failure is None or error.errno is None:
                raise
            raise failure(error) from error
        return self.hand_out(pages, warn)

    def hand_out(self, DirtyPages pages not None, warn=None):
        """Return pages that have been taken with all that is owed; as `take` from there on."""
        self.check(pages)
        cdef uint64_t state = dl_load_acquire(&self.state)
        if state or not (pages.exact or warn is None):
            return self.settled(pages, state, warn)
        if dl_signals_raise():
            self.note(pages, 0)
            dl_raised()
        return self.given(pages)

    def peek(self, DirtyPages pages not None, warn=None):
        """Return `pages`, which a source still has, with all that is owed; it stays owed.

        `warn` is called as by `take`, until an answer has been refused because of it.
        """
        self.check(pages)
        cdef uint64_t state = dl_load_acquire(&self.state)
        if not state and (pages.exact or warn is None):
            return pages
        cdef DirtyPages answer = take_pages(&self.bits, self.page_size, 0, self.bits.npages, DL_LEAVE, None) | pages
        if state & INEXACT:
            answer = inexact(answer)
        if warn is not None and not answer.exact and not state & SAID:
            warn(answer)
        return answer

    def __reduce__(self):
        raise TypeError("what a source owes is the source's; it has no pickle")

    def __repr__(self):
        what = "something" if self else "nothing"
        return f"<Owed: {what} of {self.bits.npages} pages>"

    # ---- below Python

    cdef int check(self, DirtyPages pages) except -1:
        """Refuse pages of another source."""
        if pages.npages != self.bits.npages or pages.page_size != self.page_size:
            raise ValueError(
                f"an answer for {pages.npages} pages of {pages.page_size} bytes; the source has "
                f"{self.bits.npages} of {self.page_size}"
            )
        return 0

    cdef void note(self, DirtyPages pages, uint64_t said) noexcept:
        """Owe pages. Allocates nothing; calls no Python."""
        if not pages.exact:
            said |= INEXACT
        # Before the pages, so that whoever takes them knows, and after, so that the flag stays with the rest.
        if said:
            dl_fetch_or(&self.state, said)
        with nogil:
            if pages.numbers is not None:
                dl_merge_sparse(&self.bits, pages.numbers.words, pages.masks.words, pages.entries, 0)
            else:
                dl_merge_dense(kernels, &self.bits, pages.dense.words, dl_words_for(pages.npages), 0)
        dl_fetch_or(&self.state, said | PAGES)

    cdef DirtyPages settled(self, DirtyPages pages, uint64_t state, warn):
        """Join what is owed, or has come to be owed, and warn of what is not exact; the rest of `hand_out`."""
        cdef DirtyPages answer = pages
        try:
            if state:
                # Flags first: pages that are owed from here on set them again.
                state = dl_exchange(&self.state, 0)
                answer = self.joined(pages, state)
            if warn is not None and not answer.exact and not state & SAID:
                state |= SAID
                warn(answer)
            if dl_signals_raise():
                dl_raised()
        except BaseException:
            self.note(answer, state & (INEXACT | SAID))
            raise
        return self.given(answer)

    cdef DirtyPages given(self, DirtyPages pages):
        """Hand out: Python runs its handlers at the caller's next instruction, and may throw the answer away."""
        pages_given(pages, self.myself, owe_again)
        return pages

    cdef DirtyPages joined(self, DirtyPages pages, uint64_t state):
        """Take what is owed and join it, `state` being its flags; MemoryError before or after leaves it owed."""
        cdef DirtyPages earlier
        try:
            earlier = take_pages(&self.bits, self.page_size, 0, self.bits.npages, DL_CLEAR, None)
        except MemoryError:
            dl_fetch_or(&self.state, PAGES)
            raise
        try:
            answer = pages | earlier if earlier.counted() else pages
            return inexact(answer) if state & INEXACT else answer
        except BaseException:
            self.note(earlier, 0)
            raise


cdef void owe_again(PyObject *owed, PyObject *pages) noexcept:
    # Its warning has been shown.
    (<Owed>owed).note(<DirtyPages>pages, 0 if (<DirtyPages>pages).exact else SAID)


cdef DirtyPages inexact(DirtyPages pages):
    """The same pages as an answer that nobody vouches for."""
    if not pages.exact:
        return pages
    cdef DirtyPages answer = pages_bare(pages.npages, pages.page_size, False)
    pages_fill(answer, pages.dense, pages.numbers, pages.masks, pages.entries)
    return answer


def take_all(requests, dict taken=None, warn=None) -> dict:
    """Take from several sources, all or none.

    Parameters
    ----------
    requests : sequence of (key, Owed, callable)
        Whose pages to take, as by ``owed.take(callable)``.
    taken : dict, optional
        Empty; gets the answers, and is what is returned. A caller who is interrupted before it has returned them
        finds them there, and owes them again.
    warn : callable, optional
        Called with a key and its answer, for each that is not exact, when all have been taken. If it raises,
        everything is owed, and the next answers are handed out without another warning.

    Returns
    -------
    dict
        By key: the pages.

    Raises
    ------
    Exception
        What a source, `warn` or a signal handler raised: what the others have given is owed by them.
    """
    cdef list todo = list(requests)
    # I5: room for every answer before the first is taken.
    cdef list answers = [None] * len(todo)
    cdef list states = [0] * len(todo)
    cdef dict result = {} if taken is None else taken
    cdef bint warned = False
    cdef Py_ssize_t i
    cdef uint64_t state
    cdef Owed owed
    cdef DirtyPages pages
    try:
        for i in range(len(todo)):
            owed = todo[i][1]
            pages = todo[i][2]()
            owed.check(pages)
            answers[i] = pages
            state = dl_load_acquire(&owed.state)
            if state:
                state = dl_exchange(&owed.state, 0)
                states[i] = state
                answers[i] = owed.joined(pages, state)
        if warn is not None:
            warned = True
            for i in range(len(todo)):
                if not (<DirtyPages>answers[i]).exact and not <uint64_t>states[i] & SAID:
                    warn(todo[i][0], answers[i])
        for i in range(len(todo)):
            result[todo[i][0]] = (<Owed>todo[i][1]).given(<DirtyPages>answers[i])
        if dl_signals_raise():
            dl_raised()
        return result
    except BaseException:
        for i in range(len(todo)):
            if answers[i] is not None:
                pages = answers[i]
                state = <uint64_t>states[i] & (INEXACT | SAID)
                if warned and not pages.exact:
                    state |= SAID
                (<Owed>todo[i][1]).note(pages, state)
        result.clear()
        raise
