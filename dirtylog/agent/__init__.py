"""The helping side of attaching: a process offers a userfaultfd of its own memory over a Unix socket.

For programs that may not be traced, or that want to choose who watches them. Three lines in a program of your own::

    from dirtylog import agent

    agent.listen("/run/user/1000/my-program.sock")

Then, elsewhere: ``dirtylog.attach(pid, handover="/run/user/1000/my-program.sock")``. Or run a script with it:
``python -m dirtylog.agent --socket PATH script.py``.
"""

from __future__ import annotations

import os
import socket
import threading

from dirtylog.errors import BackendUnavailable
from dirtylog.sources.process.inside import answer, send_descriptors

__all__ = ["hand_over", "listen"]


def hand_over(connection: socket.socket) -> None:
    """Send a userfaultfd of this process, and its pagemap, through a connected Unix socket.

    Parameters
    ----------
    connection : socket
        Of the family AF_UNIX. It stays open.

    Raises
    ------
    BackendUnavailable
        The kernel refuses a userfaultfd.
    OSError
        The other end is gone.

    Notes
    -----
    This process keeps neither descriptor. Whoever receives them sees which
    pages it writes, and can read none of their content by them.
    """
    try:
        send_descriptors(connection)
    except ConnectionError:
        raise
    except OSError as error:
        raise BackendUnavailable("userfaultfd", error.strerror or str(error)) from error


def listen(path: str | os.PathLike[str]) -> socket.socket:
    """Offer this process's memory to be watched, and the names of its arrays, to its own user and to root.

    Parameters
    ----------
    path : path-like
        Where the socket appears, with mode 0600.

    Returns
    -------
    socket
        Close it to stop. A thread of no importance answers, and ends with the process.

    Raises
    ------
    OSError
        The path exists, or cannot be made.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        before = os.umask(0o177)
        try:
            listener.bind(os.fspath(path))
        finally:
            os.umask(before)
        listener.listen()
    except BaseException:
        listener.close()
        raise
    threading.Thread(target=answer, args=(listener, []), name="dirtylog agent", daemon=True).start()
    return listener
