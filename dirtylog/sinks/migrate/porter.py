"""A listener whose TLS is done in a process of its own: what it hands out is plain, and needs no GIL of this one.

A copy that runs before it has everything may hold the GIL while it waits for a page. TLS by the interpreter would wait
for the GIL then, and the page would never come. Here another interpreter shakes hands, asks for the token, and carries
bytes between the line and one end of a Unix socket pair; the other end is handed out.

It has the listening socket and the keys, and takes a connection in when it is asked to. It ends when nobody holds a
line of it and the listener is closed, or its owner is gone.
"""

from __future__ import annotations

import json
import os
import select
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from dirtylog.errors import DirtyLogError
from dirtylog.sinks.migrate.control import Control
from dirtylog.sinks.migrate.door import Address, Listener, _slice
from dirtylog.sinks.migrate.keys import Keys

__all__ = ["ListenerProcess", "carry", "serve"]

_AT_ONCE = 1 << 16
_LARGEST = 1 << 16
# Seconds in which another interpreter begins, and says so: it takes a fraction of one.
_BEGINS = 60.0
_ENDED = "the process that does the listener's TLS has ended; open another listener"
# In the process: it begins with what this interpreter can import, and nobody has to wait for its end.
_CODE = """
import os, sys
if os.fork():
    os._exit(0)
sys.path[:] = {path!r}
from dirtylog.sinks.migrate.porter import serve
serve(0)
"""


class ListenerProcess(Listener):
    """A :class:`Listener` that does TLS in a process of its own: the sockets that it hands out are plain.

    For :func:`receive` with `postcopy`, whose threads may hold the GIL while they wait for a page. Its parameters,
    methods and errors are those of :class:`Listener`; without keys that encrypt it is one.

    Raises
    ------
    DirtyLogError
        The process could not be started, or `accept` finds that it has ended.

    Notes
    -----
    The process is this interpreter (`sys.executable`) once more, and gets the keys over a socket, not in its
    arguments. It takes some 40 MiB and a fraction of a second to begin. Where it ends, so do the lines that it carries;
    where this process ends, so does it. What it carries waits in a few hundred KiB more than the line's own buffers.
    """

    def __init__(
        self,
        address: Address,
        keys: Keys | None = None,
        *,
        insecure: bool = False,
        timeout: float = 30.0,
        pending: int = 64,
        refused: Callable[[str, str], object] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._process: socket.socket | None = None
        # Whether it looks for a sender already, on behalf of a call that ended without one.
        self._asked = False
        super().__init__(
            address, keys, insecure=insecure, timeout=timeout, pending=pending, refused=refused, clock=clock
        )
        if self._keys.encrypts:
            try:
                self._process = self._start()
            except BaseException:
                self.close()
                raise

    def _start(self) -> socket.socket:
        """Start the process, and hand it what it needs."""
        keys = self._keys
        files = (None if file is None else os.fspath(file) for file in (keys.cert, keys.key, keys.ca))
        secrets = (None if secret is None else secret.hex() for secret in (keys.psk, keys.token))
        request = json.dumps([*files, *secrets, self._timeout, self._pending]).encode()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            with theirs:
                # Not a signal of the terminal ends it before its owner has said what it has to say.
                started = subprocess.run(
                    [sys.executable or "", "-c", _CODE.format(path=[str(each) for each in sys.path])],
                    stdin=theirs.fileno(),
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    start_new_session=True,
                    check=False,
                    timeout=_BEGINS,
                )
            if started.returncode == 0:
                ours.settimeout(_BEGINS)
                socket.send_fds(ours, [request], [self._server.fileno()])
                said = ours.recv(_LARGEST)
                if said == b"ready":
                    ours.settimeout(None)
                    return ours
                if said:
                    raise OSError(said.decode())
        except (TimeoutError, subprocess.TimeoutExpired) as error:
            ours.close()
            raise DirtyLogError(
                f"a process for TLS could not be started: {sys.executable!r} did not begin within {_BEGINS:g} s"
            ) from error
        except OSError as error:
            ours.close()
            raise DirtyLogError(f"a process for TLS could not be started: {sys.executable!r}: {error}") from error
        except BaseException:
            ours.close()
            raise
        ours.close()
        raise DirtyLogError(f"a process for TLS could not be started: {sys.executable!r} cannot import dirtylog")

    def close(self) -> None:
        """Stop listening, and remove the Unix socket; lines that were handed out go on. Twice is fine."""
        process, self._process = self._process, None
        if process is not None:
            # At once, and not when the process has heard of it.
            with suppress(OSError):
                self._server.shutdown(socket.SHUT_RDWR)
            process.close()
        super().close()

    def accept(self, timeout: float | None = None, *, control: Control | None = None) -> socket.socket:
        """Wait for a sender that may talk; as :meth:`Listener.accept`, but the socket is always plain."""
        process = self._process
        if process is None:
            return super().accept(timeout, control=control)
        end = None if timeout is None else self._clock() + timeout
        poll = select.poll()
        poll.register(process, select.POLLIN)
        while True:
            left = None if end is None else end - self._clock()
            if left is not None and left <= 0:
                raise TimeoutError(f"nobody who may talk came within {timeout:g} s")
            if not self._asked:
                self._send(process, b"accept")
                self._asked = True
            seconds = _slice(left, control)
            if not poll.poll(None if seconds is None else 1000 * seconds):
                continue
            try:
                said, descriptors, _, _ = socket.recv_fds(process, _LARGEST, 1, socket.MSG_CMSG_CLOEXEC)
            except ConnectionError as error:  # it has ended before it read what it was asked
                raise DirtyLogError(_ENDED) from error
            if descriptors:
                self._asked = False
                sock = socket.socket(fileno=descriptors[0])
                sock.settimeout(self._timeout)
                return sock
            if not said:
                raise DirtyLogError(_ENDED)
            self._hear(json.loads(said))

    def _send(self, process: socket.socket, what: bytes) -> None:
        try:
            process.send(what)
        except OSError as error:
            raise DirtyLogError(_ENDED) from error

    def _hear(self, said: dict[str, Any]) -> None:
        if "refused" in said:
            if self._refused is not None:
                self._refused(*said["refused"])
            return
        # The system had no descriptors, say.
        self._asked = False
        raise OSError(*said["failed"])


# ---- the process -----------------------------------------------------------------------------------------------------


class _Gone(Exception):
    """Nobody asks any more."""


class _Owner(Control):
    """Ends a wait for senders when its owner is gone."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__()
        self._owner = sock

    def _check(self) -> None:
        with suppress(BlockingIOError):
            if not self._owner.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT):
                raise _Gone


def serve(descriptor: int) -> None:
    """Be the process: take senders in for whoever holds the other end of a socket, until it is closed."""
    owner = socket.socket(fileno=os.dup(descriptor))
    os.dup2(os.open(os.devnull, os.O_RDWR), descriptor)
    request, descriptors, _, _ = socket.recv_fds(owner, _LARGEST, 1, socket.MSG_CMSG_CLOEXEC)
    cert, key, ca, psk, token, timeout, pending = json.loads(request)
    keys = Keys(cert, key, ca, None, *(None if each is None else bytes.fromhex(each) for each in (psk, token)))
    listener = Listener.__new__(Listener)
    listener._timeout, listener._pending, listener._clock = timeout, pending, time.monotonic

    def refused(name: str, why: str) -> None:
        # Of a crowd that nobody asks about the rest is not told.
        with suppress(BlockingIOError):
            owner.send(json.dumps({"refused": [name, why[:1000]]}).encode(), socket.MSG_DONTWAIT)

    listener._refused = refused
    try:
        listener._hold(socket.socket(fileno=descriptors[0]), keys)
    except (OSError, ValueError) as error:
        # What its owner could read a moment ago.
        owner.send(str(error).encode()[:_LARGEST])
        return
    with owner, listener, suppress(_Gone, ConnectionError):
        owner.send(b"ready")
        while owner.recv(_LARGEST):
            try:
                line = listener.accept(control=_Owner(owner))
            except OSError as error:
                owner.send(json.dumps({"failed": [error.errno, error.strerror]}).encode())
                continue
            near, far = socket.socketpair()
            # Not daemons: the process ends with the last line.
            threading.Thread(target=carry, args=(line, near, timeout)).start()
            with far:
                socket.send_fds(owner, [b"here"], [far.fileno()])


class _Way:
    """One direction: what has been read, and could not be written yet."""

    def __init__(self, source: socket.socket, target: socket.socket) -> None:
        self.source, self.target = source, target
        self.data = memoryview(b"")
        self.over = False
        # What is to be waited for: a socket and an event of poll.
        self.waits = source, select.POLLIN

    def step(self) -> bool:
        """Go on as far as one call goes; return whether it went anywhere."""
        if self.over:
            return False
        reads = not self.data
        sock = self.source if reads else self.target
        try:
            if reads:
                self.data = memoryview(self.source.recv(_AT_ONCE))
                if not self.data:
                    self.end(self.target, socket.SHUT_WR)
            else:
                # What TLS has begun to write is given to it again, unchanged.
                self.data = self.data[self.target.send(self.data) :]
        except ssl.SSLWantReadError:
            self.waits = sock, select.POLLIN
        except ssl.SSLWantWriteError:
            self.waits = sock, select.POLLOUT
        except BlockingIOError:
            self.waits = sock, select.POLLIN if reads else select.POLLOUT
        except OSError:
            # Whoever reads finds the end, and whoever writes that nobody reads.
            self.end(*((self.target, socket.SHUT_WR) if reads else (self.source, socket.SHUT_RD)))
        else:
            return True
        return self.over

    def end(self, sock: socket.socket, how: int) -> None:
        """Say so at the other side."""
        self.over = True
        # It may be gone already. Not SSLSocket's own method, which would go on without TLS.
        with suppress(OSError):
            socket.socket.shutdown(sock, how)


def carry(line: socket.socket, near: socket.socket, patience: float) -> None:
    """Carry bytes both ways between a line and one end of a pair, until both directions are over; closes both.

    Parameters
    ----------
    line, near : socket.socket
        The line, with TLS; this end of the pair.
    patience : float
        Seconds in which the line has to take the last words, once the other end of the pair is closed.
    """
    with line, near:
        line.setblocking(False)
        near.setblocking(False)
        back, forth = _Way(line, near), _Way(near, line)
        end: float | None = None
        while not forth.over or not back.over:
            # Both, each time: neither direction waits for the other.
            moved = back.step(), forth.step()
            if end is not None and (forth.over or time.monotonic() >= end):
                # Nobody is there to be told anything, and the last words have gone, or cannot.
                return
            if any(moved):
                continue
            events = {near: 0} if end is None else {}
            for way in (back, forth):
                if not way.over:
                    sock, event = way.waits
                    events[sock] = events.get(sock, 0) | event
            poll = select.poll()
            for sock, event in events.items():
                poll.register(sock, event)
            found = dict(poll.poll(None if end is None else max(1000 * (end - time.monotonic()), 0) + 1))
            if end is None and found.get(near.fileno(), 0) & select.POLLHUP:
                end = time.monotonic() + patience
