"""The processes that one source watches: the one that was attached to, its children, and what keeps their memory."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dirtylog.sources.process._remote import PAGE_SIZE, Watch, same_memory
from dirtylog.sources.process.contents import RESERVED
from dirtylog.sources.process.regions import Area, parsed

__all__ = ["Member", "alone", "children", "end_keeper", "pages_of_children", "tracers"]

# Of a pagemap entry, in Linux Documentation/admin-guide/mm/pagemap.rst.
_EXCLUSIVE, _SWAPPED, _PRESENT = (np.uint64(1 << bit) for bit in (56, 62, 63))
_AT_ONCE = 1 << 18  # entries: 2 MiB


class Member:
    """A process and the watch over its memory.

    Parameters
    ----------
    pid : int
        The process.
    watch : Watch
        Of its memory: through itself, or through its keeper.
    pick : callable
        Picks the areas to watch out of its mappings.
    sparse : bool
        Watch large mappings only where they hold something: page numbers need not
        follow addresses.
    places : list of (int, int, int)
        Start and end, addresses in bytes, and the number of the first page: where page numbers
        are given. Empty where they are not.
    keeper : int
        A process of ours that shares the memory and never runs, so that what was
        written last can be asked for after the process has ended; or 0.
    """

    def __init__(
        self,
        pid: int,
        watch: Watch,
        pick: Callable[[list[Area]], list[Area]],
        *,
        sparse: bool,
        places: Sequence[tuple[int, int, int]] = (),
        keeper: int = 0,
    ) -> None:
        self.pid: int = pid
        self.watch: Watch = watch
        self.pick: Callable[[list[Area]], list[Area]] = pick
        self.sparse: bool = sparse
        self.places: Sequence[tuple[int, int, int]] = places
        self.keeper: int = keeper
        # A copy of its parent's memory that was not looked at yet.
        self.forked = False
        # What its maps file said at the last look, and what that means.
        self._text = b""
        self._areas: list[Area] = []

    def mappings(self) -> list[Area]:
        """Read its mappings: taken apart only if they are not what they were, which they are at most harvests.

        Raises
        ------
        OSError
            It has ended.
        """
        text = Path(f"/proc/{self.watch.pid}/maps").read_bytes()
        if text != self._text:
            self._text, self._areas = text, parsed(self.watch.pid, text)
        return self._areas

    def number_at(self, address: int) -> int | None:
        """The page number that an address is given; None where numbers are not given."""
        for start, end, first in self.places:
            if start <= address < end:
                return first + (address - start) // PAGE_SIZE
        return None

    def left(self) -> bool:
        """Whether the process has ended, or has executed another program."""
        if not self.keeper:
            return not self.watch.alive()
        same = same_memory(self.pid, self.keeper)
        return not (os.path.exists(f"/proc/{self.pid}/exe") if same is None else same)

    def shares_with(self, child: int) -> bool:
        """Whether a child still uses this memory itself: it is about to execute a program (vfork)."""
        return same_memory(child, self.pid) is True

    def is_copy_of(self, parent: int) -> bool:
        """Whether the memory is a copy of another process's, made by fork: no program was executed since."""
        return _layout(self.pid) == _layout(parent)

    def close(self) -> None:
        """Let the memory go, and end the keeper; a second call does nothing."""
        self.watch.close()
        keeper = self.keeper
        self.keeper = 0
        if keeper:
            end_keeper(keeper)


# The threads that trace keepers, and end with them.
tracers: dict[int, threading.Thread] = {}


def end_keeper(keeper: int) -> None:
    """End a process that keeps memory, and what traces it, and wait for both; what is gone needs nothing."""
    with suppress(ProcessLookupError):
        os.kill(keeper, signal.SIGKILL)
    with suppress(ChildProcessError):
        os.waitpid(keeper, 0)
    tracer = tracers.pop(keeper, None)
    if tracer is not None and tracer is not threading.current_thread():
        tracer.join()


def _layout(pid: int) -> bytes:
    """What the kernel told the program at its start: addresses that it chose at random, and that fork keeps."""
    try:
        return Path(f"/proc/{pid}/auxv").read_bytes()
    except OSError:
        return b""


def children(pid: int) -> list[int]:
    """List the children that the threads of a process have and have not waited for."""
    found: list[int] = []
    with suppress(OSError):
        for task in os.listdir(f"/proc/{pid}/task"):
            with suppress(OSError):
                found += map(int, Path(f"/proc/{pid}/task/{task}/children").read_text(encoding="ascii").split())
    return found


def pages_of_children(member: Member) -> int:
    """Count the pages to be watched of the children that a process has, and of theirs.

    Mappings so large that they are watched only where they hold something are not counted.
    """
    pages, found = 0, children(member.pid)
    for pid in found:
        with suppress(OSError):
            chosen = member.pick(parsed(pid, Path(f"/proc/{pid}/maps").read_bytes()))
            sizes = (area.end - area.start for area in chosen)
            pages += sum(size for size in sizes if size < RESERVED) // PAGE_SIZE
        found += children(pid)
    return pages


def alone(member: Member, start: int, end: int, swapped: bool) -> npt.NDArray[np.int64]:
    """Return the runs of pages that a process has for itself: after a fork, those that it or its parent has written.

    References
    ----------
    Bit 56 in Linux ``Documentation/admin-guide/mm/pagemap.rst``.
    """
    found: list[npt.NDArray[np.int64]] = []
    with open(f"/proc/{member.watch.pid}/pagemap", "rb", buffering=0) as pagemap:
        for page in range(start // PAGE_SIZE, end // PAGE_SIZE, _AT_ONCE):
            count = min(_AT_ONCE, end // PAGE_SIZE - page)
            entries = np.frombuffer(os.pread(pagemap.fileno(), count * 8, page * 8), np.uint64)
            own = (entries & _EXCLUSIVE != 0) & (entries & _PRESENT != 0)
            if swapped:  # said of protected pages that were never touched, too
                own |= entries & _SWAPPED != 0
            pages = np.flatnonzero(own) + page - start // PAGE_SIZE
            found.append(np.stack([pages, np.ones_like(pages)], axis=1))
    return np.concatenate(found) if found else np.empty((0, 2), np.int64)
