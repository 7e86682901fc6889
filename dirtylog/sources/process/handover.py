"""Takes a userfaultfd that a process hands over by itself, through a Unix socket."""

from __future__ import annotations

import array
import os
import socket
import struct

from dirtylog.errors import DirtyLogError

__all__ = ["GREETING", "receive"]

# What an agent says with its two descriptors, a userfaultfd and its pagemap: this, and its process id.
GREETING = struct.Struct("<8sI")
MAGIC = b"dirtylog"


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
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(timeout)
        connection.connect(os.fspath(where))
        return _take(connection, pid, timeout)


def _take(connection: socket.socket, pid: int, timeout: float) -> tuple[int, int]:
    connection.settimeout(timeout)
    room = socket.CMSG_SPACE(2 * array.array("i").itemsize)
    data, ancillary, _, _ = connection.recvmsg(GREETING.size, room, socket.MSG_WAITALL)
    descriptors = array.array("i")
    for level, kind, payload in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            descriptors.frombytes(payload[: len(payload) - len(payload) % descriptors.itemsize])
    try:
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
        for descriptor in descriptors:
            os.set_inheritable(descriptor, False)
    except BaseException:
        for descriptor in descriptors:
            os.close(descriptor)
        raise
    return descriptors[0], descriptors[1]
