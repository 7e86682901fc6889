"""The helping side of attaching: a process offers a userfaultfd of its own memory over a Unix socket.

For programs that may not be traced, or that want to choose who watches them. Three lines in a program of your own::

    from dirtylog import agent

    agent.listen("/run/user/1000/my-program.sock")

Then, elsewhere: ``dirtylog.attach(pid, handover="/run/user/1000/my-program.sock")``. Or run a script with it:
``python -m dirtylog.agent --socket PATH script.py``.
"""

from __future__ import annotations

import array
import ctypes
import errno
import os
import socket
import struct
import threading

from dirtylog.errors import BackendUnavailable
from dirtylog.sources.process.handover import GREETING, MAGIC

__all__ = ["hand_over", "listen"]

_SYS_USERFAULTFD = {"x86_64": 323, "aarch64": 282, "riscv64": 282, "ppc64le": 364, "s390x": 355}
_USER_MODE_ONLY = 1


def _userfaultfd() -> int:
    number = _SYS_USERFAULTFD.get(os.uname().machine)
    if number is None:
        raise BackendUnavailable("userfaultfd", f"its number on {os.uname().machine} is not known")
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor = int(libc.syscall(number, os.O_CLOEXEC | os.O_NONBLOCK | _USER_MODE_ONLY))
    if descriptor < 0:
        code = ctypes.get_errno()
        raise BackendUnavailable("userfaultfd", f"userfaultfd(UFFD_USER_MODE_ONLY): {errno.errorcode.get(code, code)}")
    return descriptor


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
    own = [_userfaultfd()]
    try:
        own.append(os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC))
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", own))
        connection.sendmsg([GREETING.pack(MAGIC, os.getpid())], [rights])
    finally:
        for descriptor in own:
            os.close(descriptor)


def listen(path: str | os.PathLike[str]) -> socket.socket:
    """Offer this process's memory to be watched, to its own user and to root.

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
    threading.Thread(target=_answer, args=(listener, os.getpid()), name="dirtylog agent", daemon=True).start()
    return listener


def _answer(listener: socket.socket, owner: int) -> None:
    while os.getpid() == owner:
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        with connection:
            credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
            user = struct.unpack("3i", credentials)[1]
            if user in (0, os.geteuid()):
                try:
                    hand_over(connection)
                except (OSError, BackendUnavailable):
                    continue
