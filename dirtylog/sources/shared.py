"""A dirty log in memory shared with other processes: the log of vhost-user."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import mmap
import operator
import os
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import TYPE_CHECKING, Self, SupportsIndex

import numpy as np
import numpy.typing as npt

from dirtylog._bits.pages import DirtyPages, check_geometry
from dirtylog._core import DirtyBitmap
from dirtylog.errors import DirtyLogError
from dirtylog.sources._backing import check_readable
from dirtylog.sources._resource import Resource

if TYPE_CHECKING:
    from dirtylog._typing import Memory

__all__ = ["LOG_PAGE", "SharedLog"]

LOG_PAGE = 4096
_WORD_PAGES = 64


class SharedLog(Resource):
    """A bitmap that other processes mark while this one harvests.

    Made by :meth:`create` or :meth:`open`; a source: it can be attached to a
    `DirtyLog`. The layout is vhost-user's: one bit for 4096 bytes of
    guest-physical address whatever the page size, page ``n`` is bit ``n % 8`` of
    byte ``n // 8``, which are the same bits as little-endian 64-bit words.

    Attributes
    ----------
    npages : int
        Pages of 4096 bytes that the log stands for.
    page_size : int
        4096 bytes.

    Notes
    -----
    Writers, in any language, set a bit by an atomic OR after the store to its
    page (I3): ``dl_mark`` of ``dirtylog/bitmap.h``, or
    ``atomic_fetch_or(&log[page / 8], 1 << page % 8)``. Any number of threads and
    processes may mark and harvest at once; no mark is lost, and each goes to one
    harvest. A harvest scans every word: O(npages / 64).

    References
    ----------
    "Migration" in QEMU's ``docs/interop/vhost-user.rst``; ``vhost_log_chunk_t``
    in ``include/hw/virtio/vhost.h``.

    Examples
    --------
    >>> import dirtylog as dl
    >>> with dl.SharedLog.create(1000) as log:
    ...     with dl.SharedLog.open(log.fileno()) as writer:  # in another process, say
    ...         writer.mark(17)
    ...     log.harvest().indices().tolist()
    [17]
    """

    __module__ = "dirtylog"

    page_size = LOG_PAGE

    def __init__(self, memory: mmap.mmap | memoryview, npages: int, descriptor: int, size: int) -> None:
        """Take over the memory and the descriptor; use `create` or `open`."""
        super().__init__()
        self._memory = memory
        self._descriptor = descriptor
        # What the object behind the descriptor must keep: a page cut off behind a mapping is SIGBUS.
        self._size = size
        words = np.frombuffer(memory, np.uint64)
        self._where = words.ctypes.data, words.nbytes
        # A file is cut from its end: where the last page can be read, the others can.
        self._edge = ((self._where[0] + words.nbytes - 1) // mmap.PAGESIZE * mmap.PAGESIZE,)
        self._file = _identity(descriptor)
        self.npages = npages
        # The bitmap, and for I7 the words' tail, where a writer ends up whose guest is larger than the log.
        # Together, so that a thread has both or, after a close by another one, neither.
        self._views: tuple[DirtyBitmap, npt.NDArray[np.uint64]] | None = (
            DirtyBitmap.from_buffer(memory, npages, LOG_PAGE),
            words[-1:],
        )
        self._closed = False

    @classmethod
    def create(
        cls,
        npages: SupportsIndex | None = None,
        path: str | os.PathLike[str] | None = None,
        *,
        nbytes: SupportsIndex | None = None,
    ) -> Self:
        """Make a new log, all clean.

        Parameters
        ----------
        npages : int, optional
            Pages of 4096 bytes. Give this or `nbytes`.
        path : path-like, optional
            File to make, which must not exist yet. It stays when the log is
            closed. Without it the log is an anonymous file (memfd) whose size is
            sealed; hand :meth:`fileno` to the other process.
        nbytes : int, optional
            Size of the guest in bytes; a last page in part counts.

        Returns
        -------
        SharedLog
            Of ``8 * ceil(npages / 64)`` bytes.

        Raises
        ------
        ValueError
            No pages, or too many, or both sizes or neither.
        FileExistsError
            The path is taken: open that log instead.
        MemoryError
            The log is larger than this machine's memory, and there is no `path`.
        OSError
            ENOSPC: there is no room for the file; or the system cannot make or
            map it.

        Notes
        -----
        The anonymous log takes memory as it is marked and harvested, not before;
        a harvest reads, and thereby takes, all of it. A file gets all its room
        at once.
        """
        pages = _pages(npages, nbytes)
        if pages is None:
            raise ValueError("how large is the guest? pass npages (pages of 4096 bytes) or nbytes")
        size = _bytes_for(pages)
        if path is None:
            memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
            if size > memory:
                raise MemoryError(
                    f"a log of {pages} pages takes {size} bytes and this machine has {memory}; pass a path to keep it "
                    "in a file, or log a smaller guest"
                )
            descriptor = os.memfd_create("dirtylog", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        else:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            if path is not None:
                # Room now or ENOSPC now: a hole that cannot be filled later would be SIGBUS at a mark. Asked
                # before it is taken, since tmpfs takes memory on the way to its answer.
                room = os.fstatvfs(descriptor)
                if size > room.f_bavail * room.f_frsize:
                    raise OSError(errno.ENOSPC, f"no room for a log of {size} bytes", os.fspath(path))
                os.posix_fallocate(descriptor, 0, size)
            else:
                os.ftruncate(descriptor, size)
                seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
                fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
            return cls(mmap.mmap(descriptor, size), pages, descriptor, size)
        except BaseException:
            os.close(descriptor)
            if path is not None:
                Path(path).unlink()
            raise

    @classmethod
    def open(
        cls,
        source: str | os.PathLike[str] | int | SharedMemory,
        npages: SupportsIndex | None = None,
        *,
        nbytes: SupportsIndex | None = None,
        offset: int = 0,
    ) -> Self:
        """Open a log that exists; marks that are in it stay.

        Parameters
        ----------
        source : path-like, int or SharedMemory
            A file, a file descriptor (which is duplicated and stays the
            caller's), or a `multiprocessing.shared_memory.SharedMemory` (which
            must stay open as long as the log).
        npages : int, optional
            Pages of the guest. By default as many as the log holds, in whole
            words.
        nbytes : int, optional
            The guest's size in bytes instead of `npages`.
        offset : int, default 0
            Bytes into the file where the log starts: a multiple of
            ``mmap.ALLOCATIONGRANULARITY``.

        Returns
        -------
        SharedLog
            A view of the memory; nothing is copied.

        Raises
        ------
        ValueError
            The log is smaller than the guest, is not a whole number of 64-bit words,
            or has bits past the guest's last page.
        TypeError
            `source` is none of the three.
        OSError
            The system cannot open or map it.
        """
        pages = _pages(npages, nbytes)
        if isinstance(source, SharedMemory):
            if source.buf is None:
                raise ValueError("the SharedMemory is closed; attach to it by name again")
            memory = memoryview(source.buf)
            size = _checked(memory.nbytes - offset, pages)
            return cls(memory[offset : offset + size], pages or size * 8, -1, offset + size)
        if isinstance(source, int):
            try:
                descriptor = fcntl.fcntl(source, fcntl.F_DUPFD_CLOEXEC, 0)
            except OSError as error:
                raise OSError(
                    error.errno, f"file descriptor {source}: {error.strerror}; pass one that is open"
                ) from None
        elif isinstance(source, str | os.PathLike):
            descriptor = os.open(source, os.O_RDWR | os.O_CLOEXEC)
        else:
            raise TypeError(f"a {type(source).__name__} is not a log: pass a path, a file descriptor or a SharedMemory")
        try:
            size = _checked(os.fstat(descriptor).st_size - offset, pages)
            return cls(mmap.mmap(descriptor, size, offset=offset), pages or size * 8, descriptor, offset + size)
        except BaseException:
            os.close(descriptor)
            raise

    def fileno(self) -> int:
        """Return the descriptor to hand to another process.

        Raises
        ------
        ValueError
            The log is closed.
        io.UnsupportedOperation
            It was opened from a `SharedMemory`: hand on its name instead.
        """
        self._check_open()
        if self._descriptor < 0:
            raise io.UnsupportedOperation("a log over SharedMemory has no descriptor of its own; hand on its name")
        return self._descriptor

    def _checked_views(self) -> tuple[DirtyBitmap, npt.NDArray[np.uint64]]:
        views = self._views
        if views is None:
            raise ValueError("the SharedLog is closed; open another one")
        size = self._size
        # Of the object behind the descriptor, unless the program has closed that, and given the number to another.
        if self._file is not None and (now := _identity(self._descriptor)) is not None and now[:2] == self._file[:2]:
            size = now[2]
        try:
            check_readable(*self._where, mmap.PAGESIZE, self._edge)
        except OSError:
            size = min(size, self._size - 1)  # that is all that is known
        # What `views` holds stays mapped, whoever closes the log meanwhile.
        self._check_open()
        if size < self._size:
            raise DirtyLogError(
                f"the log's file was cut to {size} bytes and {self._size} are mapped; "
                "take every page as written and make a new log"
            )
        return views

    def _checked_bitmap(self) -> DirtyBitmap:
        return self._checked_views()[0]

    def _bitmap_to_read(self) -> DirtyBitmap:
        bitmap, tail = self._checked_views()
        used = self.npages % _WORD_PAGES
        if used and (last := int(tail[0])) >> used:
            page = self.npages - used + last.bit_length() - 1
            raise DirtyLogError(
                f"another process marked page {page}, and the log was opened for {self.npages} pages: it is smaller "
                "than the guest; nothing was taken, open it with the guest's size"
            )
        return bitmap

    def harvest(
        self,
        first: SupportsIndex = 0,
        count: SupportsIndex | None = None,
        out: Memory | None = None,
        *,
        quiescent: bool = False,
    ) -> DirtyPages:
        """Get and clear the marks, atomically.

        Parameters, Returns and Raises are those of `DirtyBitmap.harvest`. With `quiescent` the promise is about every
        process that has the log: a back end has answered that its queues stand still, say; and

        Raises
        ------
        ValueError
            The log is closed.
        DirtyLogError
            A writer marked past the end, or the file was cut; nothing is cleared.
        """
        return self._bitmap_to_read().harvest(first, count, out, quiescent=quiescent)

    def peek(self, first: SupportsIndex = 0, count: SupportsIndex | None = None) -> DirtyPages:
        """Copy the marks and clear nothing; Raises as :meth:`harvest`."""
        return self._bitmap_to_read().peek(first, count)

    def mark(self, page: SupportsIndex) -> None:
        """Mark one page, after the store to it (I3); IndexError past the end."""
        self._checked_bitmap().mark(page)

    def mark_range(self, first: SupportsIndex, count: SupportsIndex) -> None:
        """Mark adjacent pages; IndexError past the end."""
        self._checked_bitmap().mark_range(first, count)

    def mark_pages(self, pages: npt.ArrayLike) -> None:
        """Mark a batch of pages; all are checked before the first is marked."""
        self._checked_bitmap().mark_pages(pages)

    def is_dirty(self, page: SupportsIndex) -> bool:
        """Tell whether a page is marked."""
        return self._checked_bitmap().is_dirty(page)

    def count(self) -> int:
        """Count the marked pages; Raises as :meth:`harvest`."""
        return self._bitmap_to_read().peek().count

    def clear(self, pages: DirtyPages | npt.NDArray[np.uint64]) -> None:
        """Clear the marks of some pages."""
        self._checked_bitmap().clear(pages)

    def _release(self) -> None:
        memory = self._memory
        # The views first, then the mapping they lie in. A harvest in another thread may still hold
        # one: the mapping then goes with it.
        self._views = None
        del self._memory
        with contextlib.suppress(BufferError):
            if isinstance(memory, mmap.mmap):
                memory.close()
            else:
                memory.release()
        descriptor, self._descriptor = self._descriptor, -1
        # The program may have closed it, and have opened something of its own under the number.
        now = _identity(descriptor)
        if now is not None and self._file is not None and now[:2] == self._file[:2]:
            os.close(descriptor)

    def __repr__(self) -> str:
        """Name the size."""
        state = "closed " if self.closed else ""
        return f"<{state}SharedLog: {self.npages} pages of {LOG_PAGE} bytes>"


def _identity(descriptor: int) -> tuple[int, int, int] | None:
    """Return device, inode and size of what is behind a descriptor; None if nothing is."""
    if descriptor < 0:
        return None
    try:
        status = os.fstat(descriptor)
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size


def _bytes_for(npages: int) -> int:
    return 8 * -(-npages // _WORD_PAGES)


def _pages(npages: SupportsIndex | None, nbytes: SupportsIndex | None) -> int | None:
    if npages is not None and nbytes is not None:
        raise ValueError("npages and nbytes both say how large the guest is; pass one of them")
    if npages is None and nbytes is None:
        return None
    pages = operator.index(npages) if npages is not None else -(-operator.index(nbytes or 0) // LOG_PAGE)
    if pages < 1:
        raise ValueError(f"a log of {pages} pages logs nothing; it takes at least 1")
    return check_geometry(pages, LOG_PAGE)[0]


def _checked(available: int, pages: int | None) -> int:
    """Return how many bytes to map of those there are."""
    if pages is None:
        if available < 8 or available % 8:
            raise ValueError(f"a log is whole 64-bit words, and this one has {available} bytes; pass npages or nbytes")
        return available
    if available < _bytes_for(pages):
        raise ValueError(
            f"the log has {available} bytes and is smaller than the guest: {pages} pages take {_bytes_for(pages)} "
            "(8 bytes for each 64 pages, begun ones too)"
        )
    return _bytes_for(pages)
