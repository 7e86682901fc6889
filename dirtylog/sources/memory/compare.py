"""The comparing engine: a private copy of the memory, and which pages differ from it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Sequence
from errno import EBADF
from typing import Any

import numpy as np

from dirtylog._bits.owed import Owed
from dirtylog._bits.pages import DirtyPages
from dirtylog._bits.words import copy_differing, differing_pages
from dirtylog.sources import _backing
from dirtylog.sources.memory import _tracking
from dirtylog.sources.memory.arrays import empty

__all__ = ["Compare"]


class Compare:
    """Compare the pages with a private copy, which then takes over what differs."""

    def __init__(self, pinned: _tracking.PinnedPages, owed: Owed, edges: Sequence[int]) -> None:
        self._where = pinned.address, pinned.nbytes, pinned.page_size
        self._pages = pinned.first, pinned.end
        # All of it once; later, where files end.
        _backing.check_readable(*self._where)
        self._edges = edges
        self._live = memoryview(pinned)
        self._copy: Any = empty(len(self._live), np.uint8)
        self._copy[:] = self._live
        self._page_size = pinned.page_size
        self._closed = False
        # What the copy has taken over and nobody has been told, because a signal handler raised.
        self._owed = owed
        # Two harvests at once would both report what one of them has copied. Re-entrant: a signal handler or a
        # finalizer may collect, or close, in the middle of a harvest of its own thread; then both report what
        # the first had found.
        self._lock = threading.RLock()

    def collect(self, take: bool) -> DirtyPages:
        """Return the pages that differ; with `take` the copy takes them over."""
        pages: DirtyPages | None = None
        try:
            with self._lock:
                self._check()
                pages = differing_pages(self._live, self._copy, self._page_size)
                if take and pages:
                    self._check()
                    # A write that lands in between is in the copy and not in this answer, but it is
                    # in the memory too when the caller reads the page that this answer names.
                    copy_differing(self._live, self._copy, pages)
        except BaseException:
            if take and pages is not None:
                self._owed.owe(pages)  # I5
            raise
        return pages

    def _check(self) -> None:
        if self._closed:
            raise OSError(EBADF, "closed")
        # A file that was cut behind the mapping would raise SIGBUS; unmapped or forbidden memory SIGSEGV.
        _backing.check_readable(*self._where, self._edges)
        _tracking.check_permissions(*self._pages)

    def close(self) -> None:
        """Let go of the memory."""
        with self._lock:
            self._closed = True
            # In use by the collect that this close interrupted: it goes with the object.
            with contextlib.suppress(BufferError):
                self._live.release()
