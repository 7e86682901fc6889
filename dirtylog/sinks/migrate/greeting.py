"""The greeting of a migration, as steps that say what they wait for: TLS, then proofs that both ends hold the token."""

from __future__ import annotations

import hashlib
import hmac
import secrets
import selectors
import socket
import ssl
import struct
from collections.abc import Generator
from typing import TypeAlias

from dirtylog.sinks.migrate.wire import MAGIC, VERSION, WireError

__all__ = ["Steps", "admit", "greet"]

Steps: TypeAlias = Generator[int, None, None]

_GREETING = struct.Struct("<4sB3x32s")
_PREFIX = 8
_WAITS = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)


def _event(wait: OSError, plain: int) -> int:
    """Return what a socket has to be ready for before its call is tried again."""
    if isinstance(wait, ssl.SSLWantReadError):
        return selectors.EVENT_READ
    return selectors.EVENT_WRITE if isinstance(wait, ssl.SSLWantWriteError) else plain


def _read(sock: socket.socket, size: int) -> Generator[int, None, bytes]:
    data = b""
    while len(data) < size:
        try:
            part = sock.recv(size - len(data))
        except _WAITS as wait:
            yield _event(wait, selectors.EVENT_READ)
            continue
        if not part:
            raise WireError("the peer hung up in the greeting: it may have another token, version or kind of keys")
        data += part
    return data


def _write(sock: socket.socket, data: bytes) -> Steps:
    while data:
        try:
            data = data[sock.send(data) :]
        except _WAITS as wait:
            yield _event(wait, selectors.EVENT_WRITE)


def _hands(sock: socket.socket) -> Steps:
    """Shake hands where there is TLS."""
    while isinstance(sock, ssl.SSLSocket):
        try:
            sock.do_handshake()
        except _WAITS as wait:
            yield _event(wait, selectors.EVENT_READ)
        else:
            return


def _greeting_of_peer(sock: socket.socket) -> Generator[int, None, bytes]:
    # What is not of this protocol is seen by its first bytes: a port scanner need not say more.
    prefix = yield from _read(sock, _PREFIX)
    magic, version, _ = _GREETING.unpack(prefix + bytes(_GREETING.size - _PREFIX))
    if magic != MAGIC:
        raise WireError(f"the peer speaks another protocol: it begins with {magic!r}")
    if version != VERSION:
        raise WireError(f"the peer speaks version {version} of the protocol; this side speaks {VERSION}")
    return prefix + (yield from _read(sock, _GREETING.size - _PREFIX))


def _proof(token: bytes | None, who: bytes, greetings: bytes) -> bytes:
    """Prove the token of one end, for this one conversation."""
    return hmac.digest(token or b"", who + greetings, hashlib.sha256)


def _expect(sock: socket.socket, proof: bytes) -> Steps:
    # In constant time; and nothing has been allocated for this peer yet.
    if not hmac.compare_digest((yield from _read(sock, len(proof))), proof):
        raise WireError("the peer holds another token, or none")


def _greeting() -> bytes:
    return _GREETING.pack(MAGIC, VERSION, secrets.token_bytes(32))


def greet(sock: socket.socket, token: bytes | None) -> Steps:
    """Be the sender: prove the token first, then ask for the receiver's proof."""
    yield from _hands(sock)
    mine = _greeting()
    yield from _write(sock, mine)
    both = mine + (yield from _greeting_of_peer(sock))
    yield from _write(sock, _proof(token, b"sender", both))
    yield from _expect(sock, _proof(token, b"receiver", both))


def admit(sock: socket.socket, token: bytes | None) -> Steps:
    """Be the receiver: whoever has not proved the token learns nothing that depends on it."""
    yield from _hands(sock)
    theirs = yield from _greeting_of_peer(sock)
    mine = _greeting()
    yield from _write(sock, mine)
    yield from _expect(sock, _proof(token, b"sender", theirs + mine))
    yield from _write(sock, _proof(token, b"receiver", theirs + mine))
