"""Copies pages into a file: one thread gathers and digests a window while another writes the one before it."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

import numpy as np
import numpy.typing as npt

from dirtylog.sinks._bytes.extents import WINDOW, PackedExtents
from dirtylog.sinks._bytes.pageio import write_extents
from dirtylog.sinks.snapshot.layout import Layout

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["Gatherer", "copy"]

# From so many bytes on a second thread saves more than it costs: 3 ms to begin, and nothing saved at 50 MiB (measured).
THREADED_FROM = 64 * WINDOW
# One is filled, one is written, and one is ready for whoever is faster.
BUFFERS = 3


class Gatherer(Protocol):
    """What is copied: a page space that can be read by extents."""

    def gather(self, extents: npt.NDArray[np.int64], packed: memoryview) -> None:
        """Copy extents one after the other into `packed`."""


class _Descriptor:
    """A duplicate of a file's descriptor, closed when nobody has it any more."""

    number: int = -1

    def __init__(self, descriptor: int) -> None:
        self.number = os.dup(descriptor)

    def __del__(self) -> None:
        """Close it."""
        if self.number >= 0:
            os.close(self.number)


# What goes to the writer and comes back from it: a buffer, how much of it is written, where to, and how far that is.
_Work = tuple[memoryview, int, npt.NDArray[np.int64], int]


def _write_all(file: _Descriptor, path: str, full: SimpleQueue[_Work | None], empty: SimpleQueue[object]) -> None:
    """Write what comes until None does, or until it fails: then the error comes back in place of a buffer."""
    try:
        while (work := full.get()) is not None:
            buffer, size, extents, end = work
            write_extents(file.number, buffer[:size], extents, packed=True, name=path)
            empty.put((buffer, end))
    except BaseException as error:
        empty.put(error)


class _Behind:
    """A thread that writes windows in the order in which they are given.

    A context manager. The thread has buffers and a descriptor of its own, so if an interrupt hits the wait for its end
    as well, what it still writes goes into the file that it was begun for and nowhere else.

    Raises
    ------
    RuntimeError, OSError
        No thread can be started: there are too many, or the interpreter is about to end. No descriptor is left.
    """

    def __init__(self, descriptor: int, path: str, told: Callable[[int], object]) -> None:
        self._told = told
        self._full: SimpleQueue[_Work | None] = SimpleQueue()
        self._empty: SimpleQueue[object] = SimpleQueue()
        self._given = 0
        for _ in range(BUFFERS):
            self._empty.put((memoryview(bytearray(WINDOW)), 0))
        self._thread = threading.Thread(
            target=_write_all,
            args=(_Descriptor(descriptor), path, self._full, self._empty),
            name="dirtylog-snapshot",
        )
        self._thread.start()

    def buffer(self) -> memoryview:
        """Wait for a buffer that may be filled, and say what was written of it.

        Raises
        ------
        OSError
            What the writer met.
        """
        answer = self._empty.get()
        if isinstance(answer, BaseException):
            raise answer
        assert isinstance(answer, tuple)
        if answer[1]:
            self._given -= 1
            self._told(answer[1])
        buffer: memoryview = answer[0]
        return buffer

    def write(self, buffer: memoryview, size: int, extents: npt.NDArray[np.int64], end: int) -> None:
        """Let the first `size` bytes of a buffer be written; they may be read meanwhile."""
        self._full.put((buffer, size, extents, end))
        self._given += 1

    def finish(self) -> None:
        """Wait until all is written."""
        while self._given:
            self.buffer()

    def __del__(self) -> None:
        """Let the thread end, also if an interrupt came before the block was entered."""
        self._full.put(None)

    def __enter__(self) -> Self:
        """Return the writer."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let the thread end, and wait for it."""
        self._full.put(None)
        self._thread.join()


def _processors() -> int:
    """Return how many processors this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def copy(
    source: Gatherer,
    packed: PackedExtents,
    layout: Layout,
    descriptor: int,
    path: str,
    digest: Callable[[Buffer], bytes],
    told: Callable[[int], object],
) -> list[bytes]:
    """Copy extents of a source to their places in a file; return the digests of the windows.

    Each window is copied once, digested and written from the copy: the memory may change all the while.

    Parameters
    ----------
    source : Gatherer
        What to copy from.
    packed : PackedExtents
        What to copy.
    layout : Layout
        Where in the file it goes.
    descriptor : int
        The file.
    path : str
        Its name, for errors.
    digest : callable
        From bytes to their digest.
    told : callable
        Called by this thread with the bytes written, after each window.

    Raises
    ------
    OSError
        It cannot be written. No other thread writes any more.
    """
    chunks: list[bytes] = []
    if packed.total >= THREADED_FROM and _processors() > 1:
        behind = None
        with suppress(RuntimeError, OSError):
            behind = _Behind(descriptor, path, told)
        if behind is not None:
            with behind:
                for begin, end, extents in packed.windows():
                    buffer = behind.buffer()
                    part = buffer[: end - begin]
                    source.gather(extents, part)
                    behind.write(buffer, end - begin, layout.window(begin, extents), end)
                    chunks.append(digest(part))
                behind.finish()
            return chunks
    staging = memoryview(bytearray(min(WINDOW, packed.total)))
    for begin, end, extents in packed.windows():
        part = staging[: end - begin]
        source.gather(extents, part)
        chunks.append(digest(part))
        write_extents(descriptor, part, layout.window(begin, extents), packed=True, name=path)
        told(end)
    return chunks
