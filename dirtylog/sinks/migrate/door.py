"""Who may talk: the listener and the connector of a migration, which let nobody in who has no right to.

TLS by the standard library (mutual certificates, or a key that both ends share), then a greeting in which both ends
prove that they hold the same token, without sending it. Only then does the receiver hear of memory. Many connections
are looked at side by side, in bounded memory and time, so that whoever is silent, slow or wrong holds up nobody.
"""

from __future__ import annotations

import errno
import os
import selectors
import socket
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Self, TypeAlias

from dirtylog.sinks.migrate.control import Control
from dirtylog.sinks.migrate.greeting import Steps, admit, greet
from dirtylog.sinks.migrate.keys import Keys, tls_context
from dirtylog.sinks.migrate.policy import MigrationError
from dirtylog.sinks.migrate.wire import LOOK, WireError

__all__ = ["Address", "Listener", "connect"]

Address: TypeAlias = tuple[str, int] | str


def _text(address: Address) -> str:
    return f"unix:{address}" if isinstance(address, str) else f"{address[0]}:{address[1]}"


def _resolve(address: Address, keys: Keys, insecure: bool) -> tuple[socket.AddressFamily, Address]:
    """Return the family and the numeric address, which may be talked to in the way that `keys` allow."""
    if isinstance(address, str):
        if not address or address.startswith("\0"):
            raise ValueError(f"{address!r} is not the path of a Unix socket")
        return socket.AF_UNIX, address
    host, port = address
    family, *_, found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    numeric = str(found[0])
    if not (keys.encrypts or insecure or ip_address(numeric.partition("%")[0]).is_loopback):
        raise ValueError(
            f"{host} is not a loopback address, and there is no TLS: anybody could connect, listen and change memory; "
            "give certificates (cert, key, ca) or a psk, tunnel it (ssh -L), or say insecure=True"
        )
    return socket.AddressFamily(family), (numeric, port)


def connect(
    address: Address,
    keys: Keys | None = None,
    *,
    insecure: bool = False,
    timeout: float = 30.0,
    control: Control | None = None,
) -> socket.socket:
    """Connect to a :class:`Listener`, and prove to each other who is there.

    Parameters
    ----------
    address : tuple of (str, int), or str
        Host and port, or the path of a Unix socket.
    keys : Keys, optional
        What this end shows and asks for.
    insecure : bool
        Allow an address that is not loopback without TLS.
    timeout : float
        Seconds for all of it; also the timeout of the socket that is returned.
    control : Control, optional
        Cancels this, too: of the migration that the connection is for.

    Returns
    -------
    socket.socket
        For :func:`send`; an `ssl.SSLSocket` where there is TLS. Yours: close it.

    Raises
    ------
    ValueError
        The address is not loopback, and there is no TLS.
    MigrationError
        The other end is not a receiver with this token, or `control` was cancelled.
    TimeoutError
        It did not answer in time.
    OSError
        Nobody listens, or TLS failed (`ssl.SSLError`).
    """
    keys = keys or Keys()
    family, where = _resolve(address, keys, insecure)
    context = tls_context(keys, server=False)
    end = time.monotonic() + timeout
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        _finish(sock, _reach(sock, where), end, control, f"{_text(address)} did not answer within {timeout:g} s")
        _set_options(sock)
        if context is not None:
            host = keys.name or ("localhost" if isinstance(address, str) else address[0])
            sock = context.wrap_socket(sock, do_handshake_on_connect=False, server_hostname=host)
        late = f"{_text(address)} did not finish the greeting within {timeout:g} s"
        _finish(sock, greet(sock, keys.token), end, control, late)
        sock.settimeout(timeout)
    except WireError as error:
        sock.close()
        raise MigrationError(f"{_text(address)}: {error}") from error
    except BaseException:
        sock.close()
        raise
    return sock


def _reach(sock: socket.socket, where: Address) -> Steps:
    """Connect."""
    code = sock.connect_ex(where)
    if code == errno.EINPROGRESS:
        yield selectors.EVENT_WRITE
        code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if code:
        raise OSError(code, os.strerror(code))


def _finish(sock: socket.socket, steps: Steps, end: float, control: Control | None, late: str) -> None:
    """Take steps one after the other, each when the socket is ready for it."""
    with selectors.DefaultSelector() as selector:
        selector.register(sock, selectors.EVENT_READ)
        for event in steps:
            selector.modify(sock, event)
            while not selector.select(_slice(end - time.monotonic(), control)):
                if time.monotonic() >= end:
                    raise TimeoutError(late)


def _slice(seconds: float | None, control: Control | None) -> float | None:
    """Return how long to wait at once; raises where it is cancelled."""
    if control is not None:
        control._check()
        seconds = LOOK if seconds is None else min(seconds, LOOK)
    return None if seconds is None else max(seconds, 0)


def _set_options(sock: socket.socket) -> None:
    if sock.family != socket.AF_UNIX:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)


@dataclass(slots=True)
class _Visitor:
    """A connection that has not proved yet that it may talk."""

    sock: socket.socket
    steps: Steps
    expires: float
    name: str


class Listener:
    """Wait for senders, and hand out the connection of one that may talk.

    Parameters
    ----------
    address : tuple of (str, int), or str
        Host and port (0: any), or the path of a Unix socket, which is made for this user alone.
    keys : Keys, optional
        What this end shows and asks for.
    insecure : bool
        Allow an address that is not loopback without TLS.
    timeout : float
        Seconds in which a connection must prove itself; also the timeout of the sockets that are handed out.
    pending : int
        Connections looked at at once. Of more, the one that has waited longest is hung up on.
    refused : callable, optional
        Called with an address and a reason, both text, for each connection that is hung up on.

    Raises
    ------
    ValueError
        The address is not loopback, and there is no TLS.
    OSError
        The address cannot be had, or a file of `keys` cannot be read.

    Notes
    -----
    A context manager that closes it at the end. Belongs to one thread at a time. Needs at most some 64 KiB per
    pending connection with TLS, and a few hundred bytes without.
    """

    # Of the Unix socket that goes away with this.
    _path: str | None

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
        if pending < 1:
            raise ValueError(f"pending is {pending}; it must be 1 or more")
        keys = keys or Keys()
        family, where = _resolve(address, keys, insecure)
        self._timeout, self._pending, self._refused, self._clock = timeout, pending, refused, clock
        self._hold(socket.socket(family, socket.SOCK_STREAM), keys)
        try:
            if family == socket.AF_UNIX:
                # Linux gives the file this mode, less the umask: nobody else can connect, from the first moment on.
                os.fchmod(self._server.fileno(), 0o600)
            else:
                self._server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                self._server.bind(where)
            except OSError as error:
                # What the system answers names no address.
                raise OSError(error.errno, error.strerror, _text(address)) from None
            self._path = where if isinstance(where, str) else None
            self._server.listen(128)
            self._server.setblocking(False)
        except BaseException:
            self.close()
            raise

    def _hold(self, server: socket.socket, keys: Keys) -> None:
        """Begin with a socket, and with nobody."""
        self._server, self._keys = server, keys
        self._visitors: dict[int, _Visitor] = {}
        self._path = None
        try:
            self._context = tls_context(keys, server=True)
        except BaseException:
            server.close()
            raise

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()

    @property
    def address(self) -> Address:
        """Where it listens: host and port, or the path of the Unix socket."""
        if self._path is not None:
            return self._path
        host, port = self._server.getsockname()[:2]
        return host, port

    def close(self) -> None:
        """Stop listening, hang up on who has not been handed out, remove the Unix socket. Twice is fine."""
        self._server.close()
        for visitor in list(self._visitors.values()):
            visitor.sock.close()
        self._visitors.clear()
        path, self._path = self._path, None
        if path is not None:
            os.unlink(path)

    def accept(self, timeout: float | None = None, *, control: Control | None = None) -> socket.socket:
        """Wait for a sender that may talk.

        Parameters
        ----------
        timeout : float, optional
            Seconds to wait, whoever else comes meanwhile; by default for ever.
        control : Control, optional
            Cancels this, too: of the migration that the sender is awaited for.

        Returns
        -------
        socket.socket
            For :func:`receive`; an `ssl.SSLSocket` where there is TLS. Yours: close it.

        Raises
        ------
        TimeoutError
            Nobody who may talk has come in time.
        MigrationError
            `control` was cancelled.
        ValueError
            It is closed.
        OSError
            The system has no more descriptors, even with nobody pending.
        """
        if self._server.fileno() < 0:
            raise ValueError("the listener is closed")
        end = None if timeout is None else self._clock() + timeout
        with selectors.DefaultSelector() as selector:
            selector.register(self._server, selectors.EVENT_READ)
            for number in self._visitors:
                selector.register(number, selectors.EVENT_READ | selectors.EVENT_WRITE)
            while True:
                now = self._clock()
                if end is not None and now >= end:
                    raise TimeoutError(f"nobody who may talk came within {timeout:g} s")
                self._drop(selector, [v for v in self._visitors.values() if v.expires <= now], "it took too long")
                moments = [v.expires for v in self._visitors.values()] + ([] if end is None else [end])
                ready = selector.select(_slice(min(moments) - now if moments else None, control))
                # Whoever is on the way first, so that newcomers cannot push out who is about to prove itself.
                for each, _ in ready:
                    visitor = self._visitors.get(each.fd)
                    if visitor is not None and self._step(selector, visitor):
                        return visitor.sock
                if any(each.fd == self._server.fileno() for each, _ in ready):
                    self._newcomer(selector)

    def _newcomer(self, selector: selectors.BaseSelector) -> None:
        if len(self._visitors) >= self._pending:
            self._drop(selector, [next(iter(self._visitors.values()))], "too many others came after it")
        try:
            sock, peer = self._server.accept()
        except (BlockingIOError, ConnectionError):
            return
        except OSError:
            # No more descriptors: make room, or say so.
            if not self._visitors:
                raise
            self._drop(selector, [next(iter(self._visitors.values()))], "no descriptor was left")
            return
        try:
            sock.setblocking(False)
            _set_options(sock)
            if self._context is not None:
                sock = self._context.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
            name = "a Unix socket" if self._server.family == socket.AF_UNIX else f"{peer[0]}:{peer[1]}"
            visitor = _Visitor(sock, admit(sock, self._keys.token), self._clock() + self._timeout, name)
            selector.register(sock, selectors.EVENT_READ)
            self._visitors[sock.fileno()] = visitor
        except OSError:
            # It is gone again.
            sock.close()
        except BaseException:
            sock.close()
            raise

    def _step(self, selector: selectors.BaseSelector, visitor: _Visitor) -> bool:
        """Go on with one connection; return whether it may talk, and is handed out."""
        try:
            selector.modify(visitor.sock, next(visitor.steps))
        except StopIteration:
            selector.unregister(visitor.sock)
            del self._visitors[visitor.sock.fileno()]
            visitor.sock.settimeout(self._timeout)
            return True
        except (OSError, WireError) as error:
            self._drop(selector, [visitor], str(error))
        return False

    def _drop(self, selector: selectors.BaseSelector, visitors: Iterable[_Visitor], why: str) -> None:
        for visitor in visitors:
            selector.unregister(visitor.sock)
            del self._visitors[visitor.sock.fileno()]
            visitor.sock.close()
            if self._refused is not None:
                self._refused(visitor.name, why)
