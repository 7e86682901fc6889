"""A hand on a migration that runs: how far it is, how fast it may be, and stop; from any thread."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable

from dirtylog.sinks.migrate.policy import MigrationError

__all__ = ["Cancelled", "Control"]

# A pause is never longer than this, so that a new limit or a cancel is seen soon.
_NAP = 0.1


class Cancelled(MigrationError):
    """Somebody called :meth:`Control.cancel`."""


class Control:
    """See, slow down or end a migration from another thread: its `send`, or its `receive`.

    Parameters
    ----------
    bandwidth : float, optional
        Bytes per second that may go over the line; None: as fast as it can. A frame has up to 1 MiB and goes at once:
        the timeouts of both ends have to allow for the waits between frames. With postcopy, what a copy that runs waits
        for goes at once, and the background makes up for it.

    Attributes
    ----------
    bandwidth : float or None
        May be set at any time.
    round : int
        The round under way, from 1; 0 before.
    nbytes, wire_bytes : int
        Bytes of pages sent or received so far; bytes on the line (at the receiver: of the first channel).
    breaks : int
        How many times the line broke.
    session : str
        The migration's identifier, once it has begun.

    Notes
    -----
    Thread-safe. For one migration: a second one is refused.
    """

    def __init__(
        self,
        bandwidth: float | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        self._clock, self._sleep = clock, sleep
        self._due = clock()
        self._lock = threading.Lock()
        self._bandwidth: float | None = None
        self.bandwidth = bandwidth
        self.round: int = 0
        self.nbytes: int = 0
        self.wire_bytes: int = 0
        self.breaks: int = 0
        self.session: str = ""
        self._cancelled = self._late = False
        self._sock: socket.socket | None = None

    @property
    def bandwidth(self) -> float | None:
        """Bytes per second that may go over the line; None: as fast as it can."""
        return self._bandwidth

    @bandwidth.setter
    def bandwidth(self, value: float | None) -> None:
        if value is not None and not value > 0:
            raise ValueError(f"bandwidth is {value}; it must be a positive number of bytes per second, or None")
        with self._lock:
            if value is not None and self._bandwidth is not None:
                # What went under the old limit is waited for as the new one says.
                now = self._clock()
                self._due = now + max(self._due - now, 0.0) * (self._bandwidth / value)
            self._bandwidth = value

    @property
    def cancelled(self) -> bool:
        """Whether it was cancelled in time."""
        return self._cancelled

    def cancel(self) -> bool:
        """End the migration; the source keeps its right to run, and `send` or `receive` raises a MigrationError.

        Returns
        -------
        bool
            False where that is too late: the right to run has been given away, or the copy is complete, and the
            migration goes on to its end.

        Notes
        -----
        Seen before the next frame and, within a tenth of a second, in every wait: for the limit, for the line, for an
        answer. So it is while `reconnect` and `another` wait, if they pass this on: ``connect(..., control=control)``,
        ``listener.accept(60, control=control)``. What other callables do goes on until they return. Calling it twice is
        fine.
        """
        with self._lock:
            if self._late:
                return False
            self._cancelled = True
            sock = self._sock
        if sock is not None:
            try:
                # What waits for an answer finds an end; a refusal can still be sent. Not SSLSocket's own method, which
                # would go on without TLS.
                socket.socket.shutdown(sock, socket.SHUT_RD)
            except OSError:
                # It is gone already.
                return True
        return True

    # ---- for the sender ----------------------------------------------------------------------------------------------

    def _begin(self, session: str) -> None:
        with self._lock:
            if self.session:
                raise ValueError("this Control has been in a migration before; make another one")
            self.session = session

    def _on(self, sock: socket.socket) -> None:
        with self._lock:
            self._sock = sock
        self._check()

    def _off(self) -> None:
        with self._lock:
            self._sock = None

    def _check(self) -> None:
        if self._cancelled:
            raise Cancelled("it was cancelled")

    def _commit(self) -> None:
        """From here on it cannot be cancelled."""
        with self._lock:
            self._late = not self._cancelled
        self._check()

    def _pace(self, nbytes: int) -> None:
        """Wait until so many bytes may go."""
        while not self._late:
            self._check()
            with self._lock:
                limit, now = self._bandwidth, self._clock()
                left = self._due - now
                if limit is None or left <= 0:
                    # What was not used before is not saved up.
                    self._due = now + nbytes / limit if limit else now
                    break
            self._sleep(min(left, _NAP))
        with self._lock:
            self.wire_bytes += nbytes

    def _left(self) -> float:
        """Return the seconds until more may go."""
        with self._lock:
            return 0.0 if self._bandwidth is None else max(self._due - self._clock(), 0.0)

    def _note(self, nbytes: int) -> None:
        """Note bytes that go at once: what may wait comes later for them."""
        with self._lock:
            if self._bandwidth is not None:
                self._due = max(self._due, self._clock()) + nbytes / self._bandwidth
            self.wire_bytes += nbytes

    def _came(self, number: int, nbytes: int, wire_bytes: int) -> None:
        """Note how far the copy is; it ends here if it was cancelled."""
        self.round, self.nbytes, self.wire_bytes = number, nbytes, wire_bytes
        self._check()

    def _sent(self, nbytes: int) -> None:
        """Note bytes of pages that went, over any channel."""
        with self._lock:
            self.nbytes += nbytes
