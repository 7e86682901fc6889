"""A connected socket whose every exchange has a deadline: a peer that stops, or trickles, holds nobody for long."""

from __future__ import annotations

import array
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager

from dirtylog.errors import DirtyLogError

__all__ = ["Address", "Channel", "PeerError", "connected", "receive_with"]

Address = str | os.PathLike[str] | tuple[str, int] | socket.socket


class PeerError(DirtyLogError):
    """The program at the other end refused, broke its protocol, or hung up; the connection is of no more use."""

    __module__ = "dirtylog.sources.qemu"


def connected(address: Address, timeout: float) -> socket.socket:
    """Return a socket that is connected to an address, which errors name; one that is given is returned as it is."""
    if isinstance(address, socket.socket):
        return address
    if isinstance(address, tuple):
        return socket.create_connection(address, timeout)
    if not isinstance(address, str | os.PathLike):
        raise TypeError(
            f"an address is {type(address).__name__}; pass the path of a Unix socket, (host, port), or a socket"
        )
    path = os.fspath(address)
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.settimeout(timeout)
        connection.connect(path)
    except BaseException as error:
        connection.close()
        if isinstance(error, OSError) and error.filename is None and error.errno is not None:
            raise type(error)(error.errno, os.strerror(error.errno), path) from None
        raise
    return connection


def receive_with(
    connection: socket.socket, most: int, descriptors: int, flags: int = 0
) -> tuple[bytes, list[int], bool]:
    """Receive bytes, and the descriptors that come with them, which no other program inherits.

    Returns
    -------
    data : bytes
        At most so many; none if the other end has hung up.
    received : list of int
        At most so many; the caller's.
    all_of_them : bool
        Whether no more came: those are lost.
    """
    numbers = array.array("i")
    room = socket.CMSG_SPACE(descriptors * numbers.itemsize)
    data, ancillary, told, _ = connection.recvmsg(most, room, flags | socket.MSG_CMSG_CLOEXEC)
    for level, kind, payload in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            numbers.frombytes(payload[: len(payload) - len(payload) % numbers.itemsize])
    return data, list(numbers), not told & socket.MSG_CTRUNC


class Channel:
    """Bytes to and from one peer.

    Parameters
    ----------
    address : path-like, (str, int) or socket
        A Unix socket, a host with its port, or a connected socket, which is taken over.
    timeout : float
        Seconds that one exchange may take, however many pieces it comes in.
    peer : str
        What errors call the other end.
    """

    def __init__(self, address: Address, timeout: float, peer: str) -> None:
        if not 0 < timeout < float("inf"):
            raise ValueError(f"timeout is {timeout}; it must be a number of seconds, more than 0")
        self.timeout = timeout
        self.peer = peer
        self._socket = connected(address, timeout)
        self._end = time.monotonic() + timeout

    @contextmanager
    def exchange(self, timeout: float | None = None) -> Iterator[None]:
        """Begin an exchange: what is sent and received in the block shares one deadline."""
        self._end = time.monotonic() + (self.timeout if timeout is None else timeout)
        yield

    def first(self, most: int, descriptors: int) -> tuple[bytes, list[int]]:
        """Wait, for as long as it takes, for what begins an exchange; no bytes if the other end has hung up.

        Raises
        ------
        PeerError
            More descriptors came than may come.
        """
        self._socket.settimeout(None)
        data, received, all_of_them = receive_with(self._socket, most, descriptors)
        if len(received) > descriptors or not all_of_them:
            for each in received:
                os.close(each)
            raise PeerError(f"{self.peer} sent more descriptors than the {descriptors} that a message may carry")
        return data, received

    def fileno(self) -> int:
        """Return the socket's descriptor, to wait for what begins an exchange."""
        return self._socket.fileno()

    def _patience(self) -> float:
        left = self._end - time.monotonic()
        if left <= 0:
            raise TimeoutError(f"{self.peer} did not answer in time ({self.timeout:g} s for one exchange)")
        return left

    def send(self, data: bytes) -> None:
        """Send all of it."""
        self._socket.settimeout(self._patience())
        try:
            self._socket.sendall(data)
        except TimeoutError:
            raise TimeoutError(f"{self.peer} reads nothing ({self.timeout:g} s for one exchange)") from None

    def some(self, most: int) -> bytes:
        """Receive at least one byte and at most so many."""
        self._socket.settimeout(self._patience())
        try:
            data = self._socket.recv(most)
        except TimeoutError:
            raise TimeoutError(f"{self.peer} did not answer in time ({self.timeout:g} s for one exchange)") from None
        if not data:
            raise PeerError(f"{self.peer} hung up in the middle of an exchange; connect again")
        return data

    def fill(self, buffer: memoryview) -> None:
        """Receive as many bytes as the buffer has."""
        done = 0
        while done < len(buffer):
            self._socket.settimeout(self._patience())
            try:
                got = self._socket.recv_into(buffer[done:])
            except TimeoutError:
                continue  # which `_patience` then says
            if not got:
                raise PeerError(f"{self.peer} hung up in the middle of an exchange; connect again")
            done += got

    def exactly(self, count: int) -> bytes:
        """Receive so many bytes."""
        buffer = bytearray(count)
        self.fill(memoryview(buffer))
        return bytes(buffer)

    def close(self) -> None:
        """Hang up."""
        self._socket.close()
