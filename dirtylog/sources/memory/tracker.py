"""Tracking of this process's own memory: which pages of a buffer were written since the last harvest."""

from __future__ import annotations

import mmap
import operator
import signal
import warnings
from errno import EACCES, EBADF, EBUSY, ECHILD, EFAULT
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, SupportsIndex

from dirtylog._bits.owed import Owed
from dirtylog._bits.pages import DirtyPages
from dirtylog.errors import BackendUnavailable, DirtyLogError, IncompleteLogWarning
from dirtylog.sources._page_tables import cannot_hold
from dirtylog.sources._resource import Resource, has_forked
from dirtylog.sources.memory import _tracking
from dirtylog.sources.memory.compare import Compare
from dirtylog.sources.memory.probe import Mapping, blocks_faults, mappings_of

if TYPE_CHECKING:
    from dirtylog._typing import Memory

    Trackable = Memory

__all__ = ["BACKENDS", "Tracker", "track"]

BACKENDS = ("userfaultfd", "mprotect", "compare")


class _Engine(Protocol):
    """One way to find out what was written. Failures are OSErrors; EBADF: closed, ECHILD: forked."""

    def collect(self, take: bool) -> DirtyPages: ...
    def close(self) -> None: ...


class Tracker(Resource):
    """The pages of one buffer that were written since the last harvest.

    Made by :func:`track`; a source: it can be attached to a `DirtyLog`.

    Attributes
    ----------
    npages : int
        Pages of the buffer, ``ceil(nbytes / page_size)``. Page ``i`` is its bytes
        ``i * page_size`` to ``(i + 1) * page_size``, wherever it lies (I9).
    page_size : int
        The system's own, in bytes.
    backend : str
        Which back end it is: ``"userfaultfd"``, ``"mprotect"`` or ``"compare"``.
    refused : dict of str to str
        The back ends that ``"auto"`` passed over, and why.

    Notes
    -----
    Any number of threads may harvest, peek and write. A write that happened
    before a harvest began is in that harvest, or in that of another thread at
    the same time; never lost. Read a page's content after the harvest that
    reported it.

    No page table shows what goes through pinned pages: a direct read
    (``O_DIRECT``), an io_uring request, RDMA, a GPU or a device that is under
    way during a harvest. Its pages were marked when it began, if at all, and
    what arrives later is seen by the comparing back end only. Tell the tracker
    by :meth:`mark` when the transfer has ended.
    """

    def __init__(self, buffer: Trackable, backend: str = "auto") -> None:
        """Open the back end; see `track`."""
        super().__init__()
        if backend != "auto" and backend not in BACKENDS:
            known = ", ".join(map(repr, BACKENDS))
            raise ValueError(f"there is no back end {backend!r}; choose 'auto' or one of {known}")
        self._pinned = _tracking.PinnedPages(buffer, mmap.PAGESIZE)
        self.npages: int = self._pinned.npages
        self.page_size: int = self._pinned.page_size
        mappings = mappings_of(self._pinned.first, self._pinned.end - self._pinned.first)
        self._writers = {mapping.writers for mapping in mappings} or {"unknown"}
        self._nbytes = self._pinned.nbytes
        self.refused: dict[str, str] = {}
        self._owed = Owed(self.npages, self.page_size)
        try:
            self.backend: str
            self.backend, self._engine = self._open(backend, mappings)
        except BaseException:
            self._pinned.release()
            raise
        self._closed = False

    def _open(self, backend: str, mappings: list[Mapping]) -> tuple[str, _Engine]:
        for name in BACKENDS if backend == "auto" else (backend,):
            why = self._unsuited(name, mappings) if backend == "auto" else ""
            if not why:
                try:
                    return name, self._engine_for(name, mappings)
                except OSError as error:
                    why = error.strerror or str(error)
                    if name == "userfaultfd" and error.errno == EBUSY:
                        why += " (another userfaultfd has this memory: that of a migration which fills it, say)"
            self.refused[name] = why
        others = [repr(name) for name in BACKENDS if name != backend]
        raise BackendUnavailable(backend, self.refused[backend], f"try backend={' or '.join(others)}, or 'auto'")

    def _unsuited(self, name: str, mappings: list[Mapping]) -> str:
        """Say why ``"auto"`` should not choose a back end that would work."""
        if name == "compare":
            return ""
        unseen = ", and write protection sees this process's own stores only"
        for mapping in mappings:
            if mapping.writers == "anyone":
                return f"other processes may write {mapping.path}{unseen}"
            if mapping.writers == "lenders":
                return f"pages not yet copied show what others write to {mapping.path}{unseen}"
            if mapping.writers == "relatives":
                return f"it is older than the first tracker, and who was forked before may share it{unseen}"
        if "unknown" in self._writers:
            return f"the system does not tell who else may write this memory{unseen}"
        if "heirs" in self._writers and has_forked():
            return "a process that was forked may write this anonymous shared memory unseen"
        if name == "mprotect" and (thread := blocks_faults()):
            return f"thread {thread} blocks SIGSEGV, and its first store would end the process"
        if name == "mprotect" and (self._pinned.address % self.page_size or self._pinned.nbytes % self.page_size):
            return "the buffer shares pages with other data, and system calls that write there would fail with EFAULT"
        return ""

    def _engine_for(self, name: str, mappings: list[Mapping]) -> _Engine:
        if name == "compare":
            last = self.page_size
            ends = [min(mapping.end, self._pinned.end) - last for mapping in mappings if mapping.file[2]]
            # Where nothing is known of mappings, one file to its end.
            return Compare(self._pinned, self._owed, ends if mappings else [self._pinned.end - last])
        huge = next((mapping.page_size for mapping in mappings if mapping.page_size > self.page_size), 0)
        if name == "mprotect":
            if huge:
                raise OSError(f"the memory has hugetlb pages of {huge} bytes, and parts of one cannot be protected")
            if signal.SIGSEGV in signal.pthread_sigmask(signal.SIG_BLOCK, ()):
                raise OSError("this thread blocks SIGSEGV, and its first store would end the process")
            for mapping in mappings:
                if not mapping.permissions.startswith("rw-") and not self._ours(mapping):
                    raise OSError(f"the memory is mapped {mapping.permissions}, and closing would leave it rw-")
            # Counting mappings reads the whole list: as often as the number of trackers doubles.
            if not (open_now := _tracking.open_spans(name)) & (open_now - 1):
                _tracking.allow_splits(_spare_mappings())
        elif why := cannot_hold(self._pinned.end - self._pinned.first):
            raise OSError(why)
        return _tracking.Span(name, self._pinned.address, self._pinned.nbytes, self.page_size, bool(huge))

    def _ours(self, mapping: Mapping) -> bool:
        """Whether a mapping is read-only because another tracker made it so."""
        start = max(mapping.start, self._pinned.first)
        end = min(mapping.end, self._pinned.end)
        return mapping.permissions.startswith("r--") and _tracking.covers(start, end, self.page_size)

    @property
    def offset(self) -> int:
        """Always 0: byte ``i`` of the buffer lies in page ``i // page_size`` (I9). For code that still adds it."""
        return 0

    def harvest(self) -> DirtyPages:
        """Take the pages that were written since the last harvest.

        Returns
        -------
        DirtyPages
            Numbered from page 0 of the tracker. ``exact`` is False, with an
            `IncompleteLogWarning`, when the tracker cannot vouch for its answer
            and reports pages that nobody may have written (I6).

        Raises
        ------
        ValueError
            The tracker is closed.
        DirtyLogError
            The memory is gone, this is the child of a fork, or the SIGSEGV
            handler was replaced (mprotect): nothing can be tracked any longer.

        Notes
        -----
        userfaultfd: one PAGEMAP_SCAN for 8192 runs, O(pages) with a constant of
        about 1 ns, less where huge pages are. mprotect: O(npages / 64), and one
        mprotect per run; and it asks the kernel how the memory is mapped, about 1
        microsecond per mapping (before Linux 6.11: 2 per mapping of the process),
        and whether each mprotect tracker's memory is still there.
        compare: reads all of the memory and of its copy.
        """
        return self._collect(True)

    def peek(self) -> DirtyPages:
        """Look at what the next harvest would report; the harvest reports it again.

        Returns, Raises and Notes are those of :meth:`harvest`.
        """
        return self._collect(False)

    def mark(self, first_byte: SupportsIndex, nbytes: SupportsIndex) -> None:
        """Say that bytes were written in a way that no page table shows.

        For transfers that go through pinned pages: direct reads (``O_DIRECT``),
        io_uring, RDMA, GPUs, devices. Call it when the transfer has ended, not
        before (I3): a harvest in between copies what was there before.

        Parameters
        ----------
        first_byte, nbytes : int
            Where it wrote, in bytes of the buffer.

        Raises
        ------
        IndexError
            The range does not lie in the buffer; nothing is marked.
        ValueError
            The tracker is closed.
        DirtyLogError
            This is the child of a fork.

        Notes
        -----
        The next harvest reports every page that the range touches, exactly, with
        any back end, and so does each peek until then. Any thread may call it;
        O(pages / 64).

        Examples
        --------
        >>> import dirtylog as dl
        >>> buffer = dl.zeros(8 * 4096, "uint8")
        >>> with dl.track(buffer) as tracker:
        ...     # here a direct read into bytes 4096 to 12287 has ended
        ...     tracker.mark(4096, 8192)
        ...     tracker.harvest().indices().tolist()
        [1, 2]
        """
        self._check_open()
        if self._inherited:
            raise _forked()
        first, size, length = operator.index(first_byte), operator.index(nbytes), self._nbytes
        if first < 0 or size < 0 or first + size > length:
            raise IndexError(f"bytes {first} to {first + size} do not lie in the buffer of {length}; name bytes of it")
        if not size:
            return
        begin = first // self.page_size
        run = [[begin, (first + size - 1) // self.page_size - begin + 1]]
        # Dirty and not handed out: owed, like what an answer could not deliver (I5).
        self._owed.owe(DirtyPages.from_runs(run, self.npages, self.page_size))

    def _collect(self, take: bool) -> DirtyPages:
        self._check_open()
        if self._inherited:
            raise _forked()
        # Memory that children inherit shared is written behind our back from the first fork on.
        exposed = self._forked_since and self._writers & {"heirs", "relatives"} and self.backend != "compare"
        if take:
            if exposed:
                self._owed.owe_everything()
            return self._owed.take(self._engine.collect, True, warn=self._warn, failure=self._failure)
        try:
            pages = self._engine.collect(False)
        except OSError as error:
            if error.errno is None:  # a signal handler's TimeoutError, say
                raise
            raise self._failure(error) from error
        if exposed:
            pages = DirtyPages._all(self.npages, self.page_size, exact=False)
        if self._owed:
            return self._owed.peek(pages)
        if not pages.exact:
            self._warn(pages)
        return pages

    def _warn(self, pages: DirtyPages) -> None:
        warnings.warn(
            f"the {self.backend} tracker of {self.npages} pages cannot say which of them were written "
            f"and reports {pages.count}: the memory was remapped, is shared with the child of a fork, or "
            "mappings ran short",
            IncompleteLogWarning,
            stacklevel=4,
        )

    def _failure(self, error: OSError) -> Exception:
        if error.errno == EBADF:
            return ValueError("the Tracker is closed; open another one")
        if error.errno == ECHILD:
            return _forked()
        if error.errno == EFAULT:
            return DirtyLogError(
                f"the file behind these {self.npages} pages was cut, and reading them would end the process; take "
                "everything as written, close this tracker and track the memory that is left"
            )
        if error.errno == EBUSY:
            return DirtyLogError(
                "the tracker's SIGSEGV handler was replaced, by faulthandler.enable() or disable() say: its "
                f"{self.npages} pages are open and unwatched; take everything as written, close this "
                "tracker, put the handler back and track again"
            )
        where = f"{self.npages} pages from address {self._pinned.address:#x}"
        if error.errno == EACCES:
            return DirtyLogError(
                f"{where} may not be read now (mprotect or a guard), and comparing them would end the process; "
                "harvest when they are readable again: what is written until then is reported then"
            )
        return DirtyLogError(
            f"{where} can no longer be tracked by {self.backend} ({error.strerror}): they were unmapped, moved or "
            "replaced; take everything as written, close this tracker and track the memory where it is now"
        )

    def _release(self) -> None:
        # The engine of a comparing tracker has a lock, which in the child of a fork may be held by a thread
        # that exists in the parent only; its copy goes with the object.
        if not (self._inherited and self.backend == "compare"):
            self._engine.close()
        self._pinned.release()

    def __repr__(self) -> str:
        """Name the back end and the size."""
        state = "closed " if self.closed else ""
        return f"<{state}Tracker: {self.npages} pages of {self.page_size} bytes by {self.backend}>"


def _forked() -> DirtyLogError:
    return DirtyLogError(
        "this tracker belongs to the parent process: a fork's child is not tracked; "
        "close it here and track the buffer in the child itself"
    )


def _spare_mappings() -> int:
    """Half of the mappings that this process may still make: the rest of it needs some too."""
    try:
        limit = int(Path("/proc/sys/vm/max_map_count").read_text(encoding="ascii"))
        with Path("/proc/self/maps").open("rb") as maps:
            used = sum(1 for _ in maps)
    except OSError:
        return 16384
    return max(0, limit - used) // 2


def track(buffer: Trackable, backend: str = "auto") -> Tracker:
    """Track which pages of a buffer are written, from now on.

    What was written before this returns is not reported.

    Parameters
    ----------
    buffer : array or object with memory
        A NumPy array of any dtype, in C or Fortran order; `mmap.mmap`,
        `memoryview`, `bytearray`, a `multiprocessing.shared_memory.SharedMemory`;
        a PyTorch tensor on the CPU, a pandas Series, a pyarrow buffer: whatever
        lends its memory. It is kept alive and in place. Arrays of Python objects
        and objects that hand out copies are refused.
    backend : {"auto", "userfaultfd", "mprotect", "compare"}
        ``"auto"`` takes the first that works here and sees every writer. What
        cannot be known to be this process's alone is compared, since write
        protection sees the stores of this process, through this mapping, only:
        files, memfd and named shared memory; private mappings of a file, which
        show what others write to it until a page is copied; anonymous shared
        memory that is older than the first tracker, or than a fork. Name
        a back end to have it all the same.

    Returns
    -------
    Tracker
        A source and a context manager.

    Raises
    ------
    TypeError
        No buffer protocol.
    ValueError
        An empty or scattered buffer, or no such back end.
    BackendUnavailable
        The back end that was named does not work here: with what it answered.

    Notes
    -----
    Page ``i`` is bytes ``i * page_size`` to ``(i + 1) * page_size`` of the buffer
    (I9). A buffer that begins inside a page of the address space is tracked by
    all the pages it touches, and each of those lies in two of its own: a write is
    reported with at most one page beside it, and so is a neighbour's write to a
    page that both share. `dirtylog.zeros` and `dirtylog.empty` make arrays that
    begin on a page, which are tracked exactly; comparing is always exact.

    userfaultfd (Linux 6.7) sees every write, system calls and other processes'
    ``process_vm_writev`` included, and costs the writer about a microsecond for
    the first write to a page after a harvest. Memory that is not filled yet gets
    small pages while it is tracked.

    mprotect sees stores, each 4 to 7 microseconds for the first write to a page.
    System calls that write into a page before a store does fail with EFAULT:
    store a byte into each page first. A thread must not block SIGSEGV, since its
    first store would end the process, and the program must not install another
    SIGSEGV handler over the tracker's, which stays and passes on what is not its
    own. ``faulthandler.enable()`` and ``disable()`` change that handler too: call
    them before the first tracker is opened, since without its handler a store
    ends the process. A harvest that finds the handler gone opens the memory and
    raises `DirtyLogError`. When mappings run short (``vm.max_map_count``) it
    opens memory in blocks, and says so (I6). A harvest reads the process's list
    of mappings: memory that was mapped again, or made writable by the program's
    own ``mprotect``, is reported whole with ``exact=False``, unless it was made
    read-only again before the harvest.

    compare holds a copy and sees contents, not writes: a page that has its old
    content again is clean. If it went there and back while the caller copied it,
    the caller has content that no later harvest reports; let writers rest while
    you copy, or choose another back end. A harvest of memory whose file was cut
    raises `DirtyLogError`, and so does one of memory that may not be read for a
    while; a file that is cut while the harvest reads still ends the process by
    SIGBUS.

    References
    ----------
    ``PAGEMAP_SCAN`` in Linux ``Documentation/admin-guide/mm/pagemap.rst``;
    ``userfaultfd(2)``, asynchronous write protection.

    Examples
    --------
    >>> import dirtylog as dl
    >>> array = dl.zeros(4 * 4096, "uint8")
    >>> with dl.track(array) as tracker:
    ...     array[5000] = 1
    ...     tracker.harvest().indices().tolist(), tracker.harvest().count
    ([1], 0)
    """
    return Tracker(buffer, backend)
