"""One migration under way, seen from the destination: what it hears and says."""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING, Any, Literal

from dirtylog.sinks.migrate._postcopy import FILLED, GOES_ON, Faults
from dirtylog.sinks.migrate.announced import filling_of, layout_bytes
from dirtylog.sinks.migrate.control import Cancelled, Control
from dirtylog.sinks.migrate.filling import Filling, Part
from dirtylog.sinks.migrate.others import Others, Replaced
from dirtylog.sinks.migrate.payloads import COMPLETE, FAULTS, HELLO, PART, READY, RUNS
from dirtylog.sinks.migrate.sessions import Record, check_no_copy
from dirtylog.sinks.migrate.wire import Broken, Channel, Kind, Refusal, WireError
from dirtylog.sinks.snapshot.footer import SnapshotError, decode_state

if TYPE_CHECKING:
    from dirtylog._typing import Memory

__all__ = ["Copy", "Stage", "When"]

# When a copy is started that lacks pages.
When = Literal["at-once", "filled"]
# Bytes of pages between two looks at what is due.
TAKEN_AT_ONCE = 1 << 22
_OF_PAGES = (Kind.PAGES, Kind.DELTAS, Kind.ZEROS)


class Stage(IntEnum):
    """How far the copy has come, as far as it decides who may run."""

    PART = PART
    """Not complete."""
    HAVE = COMPLETE
    """Complete and kept. It may run when it is told to, and never before."""
    RUNS = RUNS
    """It has the right to run, and the source has not."""
    FAULTS = FAULTS
    """It has the right to run, and the source has not; what it lacks only the source has."""
    GONE = 4
    """Given up before it ran: it never may."""


@dataclass(slots=True)
class Copy:
    """One migration under way, seen from the destination, over as many lines as it takes."""

    channel: Channel
    out: Memory | Mapping[str, Memory] | Callable[[int], Memory] | None
    limit: int
    max_rounds: int
    state: Callable[[Any], object] | None
    arrived: Callable[[Any], object] | None
    start: Callable[[Any], object] | None
    progress: Callable[[int, int], object] | None
    reconnect: Callable[[int], socket.socket] | None
    journal: str | os.PathLike[str] | None
    another: Callable[[], socket.socket] | None
    control: Control
    stage: Stage = Stage.PART
    filling: Filling | None = None
    record: Record | None = None
    agreed: bytes = b""
    result: Any = None
    breaks: int = 0
    own: socket.socket | None = None
    problem: BaseException | None = None
    # What the sender said first on a line that it came on by itself.
    hello: bytes | None = None
    postcopy: bool = False
    when: When = "at-once"
    faults: Faults | None = None
    started: bool = False
    others: Others = field(default_factory=Others)

    @property
    def session(self) -> str:
        """The session's identifier, once it is known."""
        return "" if self.record is None else self.record.session

    def move(self, stage: Stage) -> None:
        """Come to a stage, and record it before anything is said that depends on it."""
        self.stage = stage
        if self.record is not None:
            name = stage.name.lower()
            if stage == Stage.HAVE and self.faults is not None:
                # Not complete, and of no use to anybody but this call.
                name = "ready"
            elif stage == Stage.FAULTS and self.when == "filled":
                name = "fills"
            self.record.set(name)

    def run(self) -> None:
        """Receive until the copy has the right to run and the sender knows it."""
        self.channel.look = self.control._check
        self.control._on(self.channel.sock)
        while True:
            try:
                self.agree()
                if self.stage == Stage.PART:
                    self.pages()
                if self.stage == Stage.HAVE:
                    self.hear()
                self.channel.send(Kind.DONE, self.agreed[:16], counted=False)
                if self.stage == Stage.FAULTS:
                    self.fill()
            except (OSError, WireError) as error:
                self.again(self.first_of(error))
            except Replaced as replaced:
                self.hello, channel = replaced.hello, replaced.one.channel
                channel.bytes_sent += self.channel.bytes_sent
                channel.bytes_received += self.channel.bytes_received
                self.go_on(replaced.one.sock, channel)
            else:
                return

    def first_of(self, error: Exception) -> Exception:
        """Hang up on the other channels; return what was wrong with one of them, if that came before `error`."""
        problem = self.others.hang_up(self.channel)
        if isinstance(error, Refusal):
            # The sender has given up, and ended its other channels after it had said so.
            self.channel.broken = False
            return error
        return problem or error

    def again(self, error: Exception) -> None:
        """Take another line in place of a broken one. Raises `error` where there is none."""
        if self.control.cancelled:
            raise Cancelled("it was cancelled") from error
        if self.reconnect is None or not self.channel.broken:
            try:
                raise error
            finally:
                # Its traceback leads here: each would keep the other, and the memory.
                del error
        self.breaks += 1
        # The sender hears of it, though what came was damaged and the line is not.
        self.channel.cut()
        # What this raises ends the migration.
        sock = self.reconnect(self.breaks)
        self.go_on(sock, self.channel.again(sock))

    def go_on(self, sock: socket.socket, channel: Channel) -> None:
        """Go on on another line."""
        self.control.breaks = self.breaks
        self.close()
        self.own, self.channel = sock, channel
        self.control._on(sock)

    def close(self) -> None:
        """Close the sockets that `reconnect` and `another` gave, if any."""
        self.others.hang_up(self.channel)
        own, self.own = self.own, None
        if own is not None:
            own.close()

    def frames(self, channel: Channel, part: Part, progress: Callable[[], object]) -> bytes:
        """Apply what comes over a channel, up to its end; return the digest over it."""
        filling = self.filling
        assert filling is not None
        # What goes beside the pages comes over the first channel.
        state: tuple[Kind, ...] = (Kind.STATE,) if part is filling.parts[0] else ()
        if state and filling.postcopy:
            state = (Kind.STATE, Kind.LACKING)
        while True:
            if part.takes() and channel.plain:
                came = part.taker.done
                more = channel.take_pages(part.taker, TAKEN_AT_ONCE)
                if part.taker.done > came:
                    progress()
                if more:
                    continue
            before = channel.digest()
            kind, payload = channel.receive(Kind.ROUND, *_OF_PAGES, *state, Kind.END)
            if kind == Kind.ROUND:
                part.round(payload, self.max_rounds)
            elif kind == Kind.STATE:
                filling.beside(payload)
            elif kind == Kind.LACKING:
                filling.lacks(payload)
            elif kind == Kind.END:
                if bytes(payload) != before:
                    raise WireError("the sender's digest differs: not everything it sent has arrived")
                return before
            else:
                part.pages(kind, payload)
                progress()

    def agree(self) -> None:
        """Hear what is coming, make room for it, and say how far this session has come."""
        said, self.hello = self.hello, None
        if said is None:
            kind, payload = self.channel.receive(Kind.HELLO, *(() if self.filling is None else (Kind.JOIN,)))
            if kind == Kind.JOIN:
                self.channel.refuse("it is a channel of a line that broke")
                self.channel.broken = True
                raise Broken("a channel of an older line came in place of a new one")
            said = bytes(payload)
        if length := layout_bytes(said):
            _, layout = self.channel.receive(Kind.LAYOUT)
            if layout.nbytes != length:
                raise WireError(f"a LAYOUT frame of {layout.nbytes} bytes, {length} were announced")
            said += layout
        if self.filling is None:
            session = said[:16].hex()
            check_no_copy(session, self.journal)
            *_, channels, postcopy, _ = HELLO.unpack_from(said)
            if channels and self.another is None:
                raise WireError(f"the sender comes with {channels} channels; this side takes one: pass another=")
            if postcopy:
                self.check_postcopy()
            self.result, self.filling = filling_of(said, self.out, self.limit)
            self.agreed = said
            self.control._begin(session)
            self.record = Record(session, "copy", self.journal)
            self.move(Stage.PART)
        elif said not in (self.agreed, self.agreed[:16] + bytes(HELLO.size - 16)):
            self.channel.refuse("another session is being received here")
            self.channel.broken = True
            raise WireError("a sender of another session, or of other memory, came in place of the one that was lost")
        elif said != self.agreed and self.stage == Stage.HAVE and self.faults is not None:
            # It would run, and wait for ever where it lacks pages. Given up, the source may go on.
            raise WireError("the copy lacks pages, and who comes for the right alone has none of them: it is given up")
        else:
            self.filling.resumed()
        first, nonce = self.filling.parts[0], secrets.token_bytes(16)
        applied = first.taker.applied
        if self.stage == Stage.FAULTS:
            assert self.faults is not None
            applied = self.faults.applied
        self.channel.send(Kind.READY, READY.pack(self.stage, first.number, applied, nonce), counted=False)
        if self.stage == Stage.PART:
            try:
                self.others.join(self, nonce)
            except (OSError, WireError):
                self.channel.broken = True
                raise

    def check_postcopy(self) -> None:
        """Refuse a sender that would let the copy run before it has everything, where that cannot be."""
        if not self.postcopy:
            raise WireError(
                "the sender lets the copy run before it is complete; here it may not: pass postcopy=True (--postcopy)"
            )
        if self.arrived is not None:
            raise WireError(
                "the copy is to be kept before it may run (arrived=), and with postcopy it may before it is complete: "
                "send without postcopy"
            )
        if not self.channel.plain:
            raise WireError(
                "postcopy needs a plain socket (socket.socket itself): with TLS take one of a ListenerProcess, which "
                "does it in a process of its own"
            )

    def guard(self) -> None:
        """Let nobody see what is lacking before it is there."""
        filling = self.filling
        assert filling is not None
        words, target = filling.lacking.peek().words, filling.target
        try:
            self.faults = Faults(target.views(), target.nbytes, filling.granule, words, self.agreed[:16])
        except OSError as error:
            raise WireError(f"{error.strerror}: send without postcopy") from error

    def fill(self) -> None:
        """Answer the copy's faults until nothing is lacking; it is started first, or when it has everything."""
        faults, filling = self.faults, self.filling
        assert faults is not None
        assert filling is not None
        faults.start()
        self.channel.lend(faults)
        if self.when == "at-once":
            self.begin()
        before = filling.lacking.count()
        while (why := faults.wait(0.1)) == GOES_ON:
            if self.progress is not None and self.problem is None:
                try:
                    self.progress(filling.number, filling.done + (before - faults.left) * filling.granule)
                except Exception as problem:
                    # The copy runs: it is filled all the same.
                    self.problem = problem
        if why != FILLED:
            self.channel.lent(why)
        faults.release()
        try:
            self.move(Stage.RUNS)
        except Exception as problem:
            self.problem = self.problem or problem
        if self.when == "filled":
            self.begin()

    def begin(self) -> None:
        """Start the copy, once."""
        started, self.started = self.started, True
        if self.start is not None and not started:
            try:
                self.start(self.result)
            except Exception as problem:
                # The right is here all the same.
                self.problem = self.problem or problem

    def pages(self) -> None:
        """Receive pages until all are there, verified and kept; then say so."""
        filling = self.filling
        assert filling is not None

        def progress() -> None:
            self.control._came(filling.number, filling.done, self.channel.bytes_received)
            if self.progress is not None:
                self.progress(filling.number, filling.done)

        digest = self.frames(self.channel, filling.parts[0], progress)
        self.others.wait()
        if problem := self.others.hang_up(self.channel):
            try:
                raise problem
            finally:
                # As in `again`.
                del problem
        if missing := filling.missing():
            raise WireError(f"the sender says that was all, and {missing} pages never came")
        if self.state is not None:
            self.state(_state(filling.state))
        if filling.lacking.count():
            self.guard()
        elif self.arrived is not None:
            self.arrived(self.result)
        # From here on the source may give its right away at any moment.
        self.control._commit()
        self.move(Stage.HAVE)
        self.channel.send(Kind.HAVE, digest, counted=False)

    def hear(self) -> None:
        """Wait for the right to run, and take it."""
        _, payload = self.channel.receive(Kind.RUN, counted=False)
        if bytes(payload) != self.agreed[:16]:
            raise WireError("the right to run is for another session")
        try:
            if self.faults is not None:
                # What ends from here on takes the program with it.
                self.channel.forget_deadline()
                self.move(Stage.FAULTS)
                return
            self.move(Stage.RUNS)
            if self.start is not None:
                self.start(self.result)
        except Exception as problem:
            # The right is here all the same, and the sender hears so.
            self.problem = problem


def _state(text: bytearray) -> Any:
    """Return what the sender sent beside the memory."""
    try:
        return decode_state(bytes(text), "the sender")
    except SnapshotError as error:
        raise WireError(str(error)) from None
