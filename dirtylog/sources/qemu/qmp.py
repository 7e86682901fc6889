"""A client of QMP, QEMU's monitor: commands and their answers as JSON, one a line, events kept aside."""

from __future__ import annotations

import collections
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from dirtylog.errors import DirtyLogError
from dirtylog.sources._channel import Address, Channel, PeerError
from dirtylog.sources._resource import Resource

__all__ = ["Qmp", "QmpError"]

# What a monitor may make this client hold: one answer, and the events that nobody has asked for.
MAX_LINE = 1 << 26
MAX_EVENTS = 1000


class QmpError(DirtyLogError):
    """A command that QEMU refused, in QEMU's words.

    Parameters
    ----------
    command : str
        What was asked.
    kind : str
        QEMU's class of the error: ``"GenericError"``, ``"CommandNotFound"``, ``"DeviceNotFound"``, ...
    description : str
        QEMU's own words.
    """

    __module__ = "dirtylog.sources.qemu"

    def __init__(self, command: str, kind: str, description: str) -> None:
        self.command = command
        self.kind = kind
        self.description = description
        super().__init__(f"QEMU refused {command}: {description}" + (f" ({kind})" if kind != "GenericError" else ""))

    def __reduce__(self) -> tuple[type[QmpError], tuple[str, str, str]]:
        """Pickle by the three parts, not by the joined message."""
        return type(self), (self.command, self.kind, self.description)


class Qmp(Resource):
    """A connection to a monitor of QEMU, qemu-storage-daemon, or anything that speaks QMP.

    Parameters
    ----------
    address : path-like, (str, int) or socket
        Where the monitor listens: a Unix socket, a host with its port, or a connected socket, which is taken over.
    timeout : float, default 60
        Seconds that one command may take.

    Attributes
    ----------
    version : str
        QEMU's version.
    events : collections.deque of dict
        What QEMU told unasked, oldest first; of more than 1000 the oldest are dropped.

    Raises
    ------
    OSError
        Nobody listens there, or the monitor did not greet in time (`TimeoutError`): a monitor serves one client at a
        time, so another program may hold it.
    DirtyLogError
        What listens there does not speak QMP.

    Notes
    -----
    Thread-safe: one command at a time. A command whose answer did not come in time may be done all the same; its
    answer is dropped when it comes.

    References
    ----------
    `docs/interop/qmp-spec.rst` of QEMU.
    """

    __module__ = "dirtylog.sources.qemu"

    def __init__(self, address: Address, *, timeout: float = 60) -> None:
        super().__init__()
        # Re-entrant, so that a signal handler in the middle of a command is told so instead of waiting for ever.
        self._lock = threading.RLock()
        self._busy = False
        self._buffer = bytearray()
        self._number = 0
        self.events: collections.deque[dict[str, Any]] = collections.deque(maxlen=MAX_EVENTS)
        self._channel = Channel(address, timeout, "the QMP monitor")
        try:
            self.version: str = self._greet()
            self._closed = False
            self.execute("qmp_capabilities")
        except BaseException:
            self._closed = True
            self._channel.close()
            raise

    def __repr__(self) -> str:
        """Name the version at the other end."""
        return f"<{'closed ' if self.closed else ''}Qmp: QEMU {self.version}>"

    def _release(self) -> None:
        self._channel.close()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        with self._lock:
            self._check_open()
            if self._inherited:
                raise DirtyLogError("the connection is that of the process this one was forked from; open another one")
            if self._busy:
                raise DirtyLogError("the connection is in the middle of a command, which a signal handler interrupted")
            self._busy = True
            try:
                yield
            finally:
                self._busy = False

    def _greet(self) -> str:
        try:
            with self._channel.exchange():
                greeting = self._message()
        except TimeoutError as error:
            raise TimeoutError(
                f"{error}: a monitor serves one client at a time, and another program may hold this one; start QEMU "
                "with a second -qmp"
            ) from None
        version = greeting.get("QMP", {})
        for key in ("version", "qemu"):
            version = version.get(key, {}) if isinstance(version, dict) else {}
        if not isinstance(greeting.get("QMP"), dict):
            raise PeerError(f"no QMP monitor is at that address: it began with {str(greeting)[:80]}")
        if not isinstance(version, dict):
            return "unknown"
        return ".".join(str(version.get(part, "?"))[:20] for part in ("major", "minor", "micro"))

    def _message(self) -> dict[str, Any]:
        """Read one line; of the exchange that is under way."""
        scanned = 0
        while (at := self._buffer.find(b"\n", scanned)) < 0:
            scanned = len(self._buffer)
            if scanned > MAX_LINE:
                raise PeerError(f"the QMP monitor sent a line of more than {MAX_LINE} bytes")
            self._buffer += self._channel.some(1 << 16)
        line = bytes(self._buffer[:at])
        del self._buffer[: at + 1]
        try:
            message = json.loads(line.decode())  # UTF-8: of bytes, json would guess the encoding
        except (ValueError, RecursionError) as error:
            raise PeerError(f"the QMP monitor sent what is not JSON: {line[:80]!r}") from error
        if not isinstance(message, dict):
            raise PeerError(f"the QMP monitor sent {line[:80]!r}; a message is an object")
        return message

    def execute(self, command: str, arguments: Mapping[str, Any] | None = None) -> Any:
        """Give a command and return its answer.

        Parameters
        ----------
        command : str
            For example ``"query-status"``.
        arguments : mapping, optional
            Its arguments, named as QEMU names them.

        Returns
        -------
        object
            What JSON made of the answer.

        Raises
        ------
        QmpError
            QEMU refused it.
        OSError
            No answer in time (`TimeoutError`), or the connection failed.
        DirtyLogError
            QEMU hung up, or broke the protocol.
        ValueError
            The connection is closed.
        """
        with self._alone():
            self._number += 1
            number = self._number
            message = {"execute": command, "arguments": dict(arguments or {}), "id": number}
            with self._channel.exchange():
                self._channel.send(json.dumps(message).encode() + b"\n")
                while True:
                    answer = self._message()
                    if "event" in answer:
                        self.events.append(answer)
                    elif answer.get("id") == number or ("id" not in answer and "error" in answer):
                        break
                    # Else the answer to a command that was given up: whoever asked has gone.
        error = answer.get("error")
        if error is not None:
            parts = error if isinstance(error, dict) else {}
            raise QmpError(command, str(parts.get("class", "unknown"))[:80], str(parts.get("desc", error))[:4096])
        if "return" not in answer:
            raise PeerError(f"the QMP monitor answered {command} with {str(answer)[:80]}")
        return answer["return"]

    def wait(self, event: str, suits: Callable[[dict[str, Any]], bool] = lambda _: True) -> dict[str, Any]:
        """Wait for an event, and take it from those that were kept.

        Parameters
        ----------
        event : str
            Its name, for example ``"JOB_STATUS_CHANGE"``.
        suits : callable, optional
            Says of the event's data whether it is the one.

        Returns
        -------
        dict
            The event's data.

        Raises
        ------
        OSError
            It did not come in time (`TimeoutError`).
        DirtyLogError
            QEMU hung up, or broke the protocol.
        ValueError
            The connection is closed.
        """
        end = time.monotonic() + self._channel.timeout
        with self._alone():
            while True:
                for kept in list(self.events):
                    data = kept.get("data")
                    data = data if isinstance(data, dict) else {}
                    if kept.get("event") == event and suits(data):
                        self.events.remove(kept)
                        return data
                left = end - time.monotonic()
                if left <= 0:
                    raise TimeoutError(f"the QMP monitor did not tell of {event} in {self._channel.timeout:g} s")
                with self._channel.exchange(left):
                    message = self._message()
                if "event" in message:
                    self.events.append(message)
