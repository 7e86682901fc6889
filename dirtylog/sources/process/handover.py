"""Talks to a process that helps: takes the userfaultfd that it hands over, and asks for the names of its arrays."""

from __future__ import annotations

import json
import os
import socket
import struct

from dirtylog.errors import BackendUnavailable, DirtyLogError
from dirtylog.sources._channel import connected, receive_with
from dirtylog.sources.process.inside import GREETING, LENGTH, MAGIC, NAMES, REFUSED, Found

__all__ = ["Connection", "Found", "receive"]

# More than any program has to say of its arrays.
_MOST_BYTES = 64 << 20


def receive(where: str | os.PathLike[str] | socket.socket, pid: int, timeout: float = 10.0) -> tuple[int, int]:
    """Return the userfaultfd and the pagemap of a process that offers them.

    Parameters
    ----------
    where : path or socket
        Where the process's agent listens, or a connected Unix socket.
    pid : int
        The process they must belong to.
    timeout : float
        Seconds to wait for its answer.

    Raises
    ------
    DirtyLogError
        Who answers is another process, or no agent.
    OSError
        Nobody listens, or not in time.
    """
    if isinstance(where, socket.socket):
        return _take(where, pid, timeout)
    with connected(where, timeout) as connection:
        return _take(connection, pid, timeout)


def _take(connection: socket.socket, pid: int, timeout: float) -> tuple[int, int]:
    connection.settimeout(timeout)
    data, descriptors, _ = receive_with(connection, GREETING.size, 2, socket.MSG_WAITALL)
    try:
        if len(data) == GREETING.size and data[:8] == REFUSED:
            why = os.strerror(GREETING.unpack(data)[1])
            raise BackendUnavailable("userfaultfd", f"userfaultfd(UFFD_USER_MODE_ONLY) in process {pid}: {why}")
        if len(data) != GREETING.size or data[:8] != MAGIC or len(descriptors) != 2:
            raise DirtyLogError(
                f"who answers at {connection.getpeername() or 'the socket'!r} is not a dirtylog agent: it sent "
                f"{len(data)} bytes and {len(descriptors)} descriptors; start the process with python -m dirtylog.agent"
            )
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        peer = struct.unpack("3i", credentials)[0]
        claimed = GREETING.unpack(data)[1]
        # Who bound the socket before a fork is the peer then; the process itself says who it is.
        if pid not in (peer, claimed):
            raise DirtyLogError(f"the agent that answers is of process {claimed}, not of {pid}; attach to that one")
    except BaseException:
        for descriptor in descriptors:
            os.close(descriptor)
        raise
    return descriptors[0], descriptors[1]


class Connection:
    """A connection to a process that helps, to ask for the names of its arrays; a context manager.

    Parameters
    ----------
    where : path or socket
        As for :func:`receive`; a socket through which the descriptors were taken already.
    pid : int
        The process.
    timeout : float
        Seconds to wait for an answer; one that takes longer is there for a later call.

    Raises
    ------
    DirtyLogError, OSError
        As for :func:`receive`.
    """

    def __init__(self, where: str | os.PathLike[str] | socket.socket, pid: int, timeout: float = 10.0) -> None:
        self._timeout = timeout
        self._asked = False
        self._answer = bytearray()
        # Seconds of CPU time that the program took to look through its objects, in all.
        self.spent: float = 0.0
        if isinstance(where, socket.socket):
            self._socket = where
            return
        self._socket = connected(where, timeout)
        try:
            for descriptor in _take(self._socket, pid, timeout):
                os.close(descriptor)
        except BaseException:
            self._socket.close()
            raise

    def __enter__(self) -> Connection:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Hang up."""
        self._socket.close()

    def arrays(self) -> list[Found]:
        """Ask which large arrays the program has: what each is called, where it begins, where it ends.

        Raises
        ------
        TimeoutError
            Not in time: it holds the interpreter, or the machine is busy. Call again:
            that waits no longer for the answer, and asks for no second one before it is there.
        OSError
            It has ended, or talks nonsense; there is no use in asking again.
        """
        self._socket.settimeout(0.0 if self._asked else self._timeout)
        if not self._asked:
            self._socket.sendall(NAMES)
            self._asked = True
        try:
            self._receive(LENGTH.size)
            (length,) = LENGTH.unpack_from(self._answer)
            if length > _MOST_BYTES:
                raise OSError(f"a program says {length} bytes of its arrays; {_MOST_BYTES} are read")
            self._receive(LENGTH.size + length)
        except BlockingIOError as error:
            raise TimeoutError("the program has not answered yet") from error
        text = bytes(self._answer[LENGTH.size :])
        self._asked = False
        self._answer.clear()
        try:
            said = json.loads(text)
            if said is None:
                raise TimeoutError("the program could not look through its objects this time")
            arrays, seconds = said
            self.spent += max(0.0, float(seconds))
            return [(str(name), int(start), int(end)) for name, start, end in arrays]
        except (ValueError, TypeError, RecursionError) as error:
            raise OSError(f"what a program says of its arrays cannot be used: {error}") from error

    def _receive(self, length: int) -> None:
        """Have so many bytes of an answer; those that came before a time-out stay."""
        while len(self._answer) < length:
            part = self._socket.recv(min(length - len(self._answer), 1 << 16))
            if not part:
                raise ConnectionResetError("the program has hung up")
            self._answer += part
