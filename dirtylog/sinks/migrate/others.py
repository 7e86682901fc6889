"""The channels beside the first one, seen from the destination: each filled by a thread, and all ended as one line."""

from __future__ import annotations

import socket
import threading
from typing import TYPE_CHECKING

from dirtylog.sinks.migrate.payloads import JOIN, READY
from dirtylog.sinks.migrate.share import MAX_CHANNELS
from dirtylog.sinks.migrate.wire import Broken, Channel, Kind, WireError

if TYPE_CHECKING:
    from dirtylog.sinks.migrate.destination import Copy
    from dirtylog.sinks.migrate.filling import Part

__all__ = ["Others", "Replaced"]


class Replaced(Exception):
    """The sender came on another line while its channels were awaited: which, and what it said."""

    def __init__(self, one: Beside, hello: bytes) -> None:
        super().__init__("the sender came on another line")
        self.one: Beside = one
        self.hello: bytes = hello


class Beside:
    """A channel beside the first one, and the thread that fills its part."""

    def __init__(self, copy: Copy, sock: socket.socket) -> None:
        self.copy: Copy = copy
        self.sock: socket.socket = sock
        self.channel: Channel = copy.channel.beside(sock)
        self.thread: threading.Thread | None = None
        self.error: Exception | None = None
        # Whether its error ended the others, and not theirs it.
        self.first: bool = False
        self.closing: bool = False

    def start(self, part: Part) -> None:
        thread = threading.Thread(target=self.run, args=(part,), daemon=True)
        thread.start()
        self.thread = thread

    def run(self, part: Part) -> None:
        try:
            self.copy.frames(self.channel, part, int)
        except BaseException as error:
            # Whatever it was, its part is not complete.
            self.error = error if isinstance(error, Exception) else Broken(f"a channel's thread ended: {error!r}")
            self.first = not self.closing
            if self.first:
                # The first channel's thread finds an end, and looks here.
                self.copy.channel.cut(socket.SHUT_RD)

    def wait(self) -> None:
        """Wait until everything has come."""
        if self.thread is not None:
            self.thread.join()

    def close(self) -> None:
        self.closing = True
        self.channel.cut()
        self.wait()
        self.sock.close()


class Others:
    """The channels of a line beside its first one.

    Notes
    -----
    Whose they are is kept by each of them, as long as there is one, and not here: the migration keeps this, and the two
    together would keep the memory that it fills from its owner until the garbage collector comes.
    """

    def __init__(self) -> None:
        self.beside: list[Beside] = []

    def join(self, copy: Copy, nonce: bytes) -> None:
        """Take in the other channels of a migration, and let each fill its part in a thread of its own."""
        filling = copy.filling
        assert filling is not None
        waiting = dict(enumerate(filling.parts))
        del waiting[0]
        for _ in range(2 * MAX_CHANNELS):
            if not waiting:
                return
            assert copy.another is not None
            one = Beside(copy, copy.another())
            # Whatever happens, it is closed with the others.
            self.beside.append(one)
            try:
                kind, payload = one.channel.receive(Kind.JOIN, Kind.HELLO)
                if kind == Kind.HELLO and copy.reconnect is not None and payload[:16] == copy.agreed[:16]:
                    # Not closed with the others.
                    self.beside.pop()
                    copy.breaks += 1
                    raise Replaced(one, bytes(payload))
                session, said, index = JOIN.unpack(payload) if payload.nbytes == JOIN.size else (b"", b"", 0)
                if session != copy.agreed[:16] or said != nonce or index not in waiting:
                    raise WireError("it is not a channel of this line of this session")
                part = waiting[index]
                answer = READY.pack(copy.stage, part.number, part.taker.applied, bytes(16))
                one.channel.send(Kind.READY, answer, counted=False)
            except (OSError, WireError) as error:
                # Left over from a line that broke, say; the right one may come yet.
                one.channel.refuse(str(error))
                self.beside.pop().close()
                continue
            del waiting[index]
            one.start(part)
        raise Broken(f"{len(waiting)} channels never came")

    def hang_up(self, channel: Channel) -> Exception | None:
        """End them, and tell the first channel whether its line is broken.

        Returns
        -------
        Exception or None
            What was wrong with one of them, if that came first.
        """
        beside, self.beside = self.beside, []
        problem: Exception | None = None
        for one in beside:
            one.close()
            # Its traceback leads back to the channel: each would keep the other, and the memory that both lead to.
            error, one.error = one.error, None
            if problem is None and error is not None and one.first:
                problem = error
        if isinstance(problem, (OSError, Broken)):
            # A line is all of its channels.
            channel.broken = True
        elif problem is not None:
            channel.broken = False
        return problem

    def wait(self) -> None:
        """Wait until everything has come over all of them."""
        for one in self.beside:
            one.wait()
