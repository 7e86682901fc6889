"""The destination of a migration: takes frames from a socket, trusts none of them, and fills memory.

The copy may run when the source has given it the right to, and never before: see `sender.py`.
"""

from __future__ import annotations

import mmap
import os
import secrets
import socket
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from dirtylog._bits.pages import check_geometry
from dirtylog.errors import BackendUnavailable
from dirtylog.sinks.migrate._postcopy import FILLED, GOES_ON, Faults
from dirtylog.sinks.migrate.control import Cancelled, Control
from dirtylog.sinks.migrate.filling import Filling, Part
from dirtylog.sinks.migrate.origins import room
from dirtylog.sinks.migrate.payloads import (
    COMPLETE,
    FAULTS,
    HELLO,
    JOIN,
    MIN_PAGE_SIZE,
    PART,
    RAW,
    READY,
    RUNS,
    ZSTD,
    compressor,
)
from dirtylog.sinks.migrate.policy import MigrationError
from dirtylog.sinks.migrate.sessions import Record, check_no_copy
from dirtylog.sinks.migrate.share import MAX_CHANNELS
from dirtylog.sinks.migrate.wire import MAX_LAYOUT, Broken, Channel, Kind, Refusal, WireError
from dirtylog.sinks.snapshot.footer import MAX_PAGE_SIZE, SnapshotError, decode_state
from dirtylog.sinks.snapshot.space import Space

if TYPE_CHECKING:
    from dirtylog._typing import Memory

__all__ = ["receive"]

# When a copy is started that lacks pages.
_When = Literal["at-once", "filled"]
# Bytes of pages between two looks at what is due.
TAKEN_AT_ONCE = 1 << 22
_OF_PAGES = (Kind.PAGES, Kind.DELTAS, Kind.ZEROS)


class _Stage(IntEnum):
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


class _Replaced(Exception):
    """The sender came on another line while its channels were awaited: which, and what it said."""

    def __init__(self, one: _Beside, hello: bytes) -> None:
        super().__init__("the sender came on another line")
        self.one, self.hello = one, hello


class _Beside:
    """A channel beside the first one, and the thread that fills its part."""

    def __init__(self, copy: _Copy, sock: socket.socket) -> None:
        self.copy, self.sock = copy, sock
        self.channel = copy.channel.beside(sock)
        self.thread: threading.Thread | None = None
        self.error: Exception | None = None
        # Whether its error ended the others, and not theirs it.
        self.first = False
        self.closing = False

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


@dataclass(slots=True)
class _Copy:
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
    stage: _Stage = _Stage.PART
    filling: Filling | None = None
    record: Record | None = None
    agreed: bytes = b""
    result: Any = None
    breaks: int = 0
    own: socket.socket | None = None
    beside: list[_Beside] = field(default_factory=list)
    problem: BaseException | None = None
    # What the sender said first on a line that it came on by itself.
    hello: bytes | None = None
    postcopy: bool = False
    when: _When = "at-once"
    faults: Faults | None = None
    started: bool = False

    @property
    def session(self) -> str:
        return "" if self.record is None else self.record.session

    def move(self, stage: _Stage) -> None:
        """Come to a stage, and record it before anything is said that depends on it."""
        self.stage = stage
        if self.record is not None:
            name = stage.name.lower()
            if stage == _Stage.HAVE and self.faults is not None:
                # Not complete, and of no use to anybody but this call.
                name = "ready"
            elif stage == _Stage.FAULTS and self.when == "filled":
                name = "fills"
            self.record.set(name)

    def run(self) -> None:
        """Receive until the copy has the right to run and the sender knows it."""
        self.channel.look = self.control._check
        self.control._on(self.channel.sock)
        while True:
            try:
                self.agree()
                if self.stage == _Stage.PART:
                    self.pages()
                if self.stage == _Stage.HAVE:
                    self.hear()
                self.channel.send(Kind.DONE, self.agreed[:16], counted=False)
                if self.stage == _Stage.FAULTS:
                    self.fill()
            except (OSError, WireError) as error:
                problem = self.hang_up()
                if isinstance(error, Refusal):
                    # The sender has given up, and ended its other channels after it had said so.
                    problem, self.channel.broken = None, False
                self.again(problem or error)
            except _Replaced as replaced:
                self.hello, channel = replaced.hello, replaced.one.channel
                channel.bytes_sent += self.channel.bytes_sent
                channel.bytes_received += self.channel.bytes_received
                self.go_on(replaced.one.sock, channel)
            else:
                return

    def again(self, error: Exception) -> None:
        """Take another line in place of a broken one. Raises `error` where there is none."""
        if self.control.cancelled:
            raise Cancelled("it was cancelled") from error
        if self.reconnect is None or not self.channel.broken:
            raise error
        self.breaks += 1
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
        self.hang_up()
        own, self.own = self.own, None
        if own is not None:
            own.close()

    # ---- the other channels ------------------------------------------------------------------------------------------

    def join(self, nonce: bytes) -> None:
        """Take in the other channels, and let each fill its part in a thread of its own."""
        filling = self.filling
        assert filling is not None
        waiting = dict(enumerate(filling.parts))
        del waiting[0]
        for _ in range(2 * MAX_CHANNELS):
            if not waiting:
                return
            assert self.another is not None
            one = _Beside(self, self.another())
            # Whatever happens, it is closed with the others.
            self.beside.append(one)
            try:
                kind, payload = one.channel.receive(Kind.JOIN, Kind.HELLO)
                if kind == Kind.HELLO and self.reconnect is not None and payload[:16] == self.agreed[:16]:
                    # Not closed with the others.
                    self.beside.pop()
                    self.breaks += 1
                    raise _Replaced(one, bytes(payload))
                session, said, index = JOIN.unpack(payload) if payload.nbytes == JOIN.size else (b"", b"", 0)
                if session != self.agreed[:16] or said != nonce or index not in waiting:
                    raise WireError("it is not a channel of this line of this session")
                part = waiting[index]
                answer = READY.pack(self.stage, part.number, part.taker.applied, bytes(16))
                one.channel.send(Kind.READY, answer, counted=False)
            except (OSError, WireError) as error:
                # Left over from a line that broke, say; the right one may come yet.
                one.channel.refuse(str(error))
                self.beside.pop().close()
                continue
            del waiting[index]
            one.start(part)
        raise Broken(f"{len(waiting)} channels never came")

    def hang_up(self) -> Exception | None:
        """End the other channels; return what was wrong with one of them, if that came first."""
        beside, self.beside = self.beside, []
        problem: Exception | None = None
        for one in beside:
            one.close()
            if problem is None and one.error is not None and one.first:
                problem = one.error
        if isinstance(problem, (OSError, Broken)):
            # A line is all of its channels.
            self.channel.broken = True
        elif problem is not None:
            self.channel.broken = False
        return problem

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
        if length := _layout_bytes(said):
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
            self.result, self.filling = _room(said, self.out, self.limit)
            self.agreed = said
            self.control._begin(session)
            self.record = Record(session, "copy", self.journal)
            self.move(_Stage.PART)
        elif said not in (self.agreed, self.agreed[:16] + bytes(HELLO.size - 16)):
            self.channel.refuse("another session is being received here")
            self.channel.broken = True
            raise WireError("a sender of another session, or of other memory, came in place of the one that was lost")
        elif said != self.agreed and self.stage == _Stage.HAVE and self.faults is not None:
            # It would run, and wait for ever where it lacks pages. Given up, the source may go on.
            raise WireError("the copy lacks pages, and who comes for the right alone has none of them: it is given up")
        else:
            self.filling.resumed()
        first, nonce = self.filling.parts[0], secrets.token_bytes(16)
        applied = first.taker.applied
        if self.stage == _Stage.FAULTS:
            assert self.faults is not None
            applied = self.faults.applied
        self.channel.send(Kind.READY, READY.pack(self.stage, first.number, applied, nonce), counted=False)
        if self.stage == _Stage.PART:
            try:
                self.join(nonce)
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
            self.move(_Stage.RUNS)
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
        for one in self.beside:
            one.wait()
        if problem := self.hang_up():
            raise problem
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
        self.move(_Stage.HAVE)
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
                self.move(_Stage.FAULTS)
                return
            self.move(_Stage.RUNS)
            if self.start is not None:
                self.start(self.result)
        except Exception as problem:
            # The right is here all the same, and the sender hears so.
            self.problem = problem

    def fail(self, error: BaseException) -> None:
        """End as what there is demands; raises what the caller is told, or returns where the copy may run."""
        expected = isinstance(error, (OSError, WireError))
        if self.stage == _Stage.FAULTS:
            self.fail_faulting(error, expected)
        if self.faults is not None and self.stage != _Stage.RUNS:
            self.faults.release()
        if self.stage == _Stage.RUNS:
            if expected:
                # Only the answer may be lost; nothing turns this into a failure.
                return
            error.add_note(f"the copy has the right to run, and the source has not; session {self.session}")
            raise error
        if self.stage == _Stage.HAVE and self.channel.broken and expected and self.faults is None:
            raise MigrationError(
                f"the copy is complete and was not told to run before the line broke: settle session {self.session}, "
                f"or ask the source's end ({error})",
                uncertain=True,
                session=self.session,
            ) from error
        try:
            # Before the sender hears so: it takes the right back on this word.
            self.move(_Stage.GONE)
        finally:
            if not isinstance(error, Refusal):
                plainly = expected or isinstance(error, (BackendUnavailable, Cancelled))
                self.channel.refuse(str(error) if plainly else _summary(error))
        if isinstance(error, Cancelled):
            number = self.filling.number if self.filling else 0
            raise MigrationError(f"the migration was cancelled in round {number}", session=self.session) from error
        if not expected:
            if self.session:
                error.add_note(f"the copy was given up before it was told to run, and must not; session {self.session}")
            raise error
        number = self.filling.number if self.filling else 0
        raise MigrationError(f"migration failed in round {number}: {error}", session=self.session) from error

    def fail_faulting(self, error: BaseException, expected: bool) -> None:
        """End a copy that has the right to run and may lack pages; raises, or returns where it lacks none."""
        assert self.faults is not None
        # Before its line is closed. What is lacking stays guarded: it never reads as zeros.
        self.faults.stop()
        if not self.faults.left:
            # The source has heard so, or will: nothing turns this into a failure.
            self.faults.release()
            try:
                self.move(_Stage.RUNS)
            except Exception as problem:
                error.add_note(f"the journal could not be written ({type(problem).__name__}: {problem})")
            if expected:
                self.begin()
            return
        if not self.started:
            # Nothing has run here, and the source may go on; it did not hear of the right, or asks.
            self.give_up(error, expected)
        lost = f"the copy runs, and waits where it lacks {self.faults.left} pages; session {self.session}"
        if expected:
            raise MigrationError(f"{lost}: the line to the source broke ({error})", session=self.session) from error
        error.add_note(lost)
        raise error

    def give_up(self, error: BaseException, expected: bool) -> None:
        """Say that a copy that has the right to run and did not begin never will; raises what the caller is told."""
        assert self.faults is not None
        left = self.faults.left
        # Durable before anybody is told: whoever reads it lets the source go on.
        try:
            self.move(_Stage.GONE)
        finally:
            # Nobody has seen the memory, and nobody waits for it where the journal cannot be written.
            self.faults.release()
        lost = (
            f"the copy was given up before it ran, lacking {left} pages: the source may go on; session {self.session}"
        )
        if expected:
            raise MigrationError(f"{lost}: the line to the source broke ({error})", session=self.session) from error
        error.add_note(lost)
        raise error


def receive(
    sock: socket.socket,
    *,
    out: Memory | Mapping[str, Memory] | Callable[[int], Memory] | None = None,
    limit: int = 1 << 36,
    state: Callable[[Any], object] | None = None,
    arrived: Callable[[Any], object] | None = None,
    start: Callable[[Any], object] | None = None,
    max_rounds: int = 1000,
    deadline: float | None = None,
    reconnect: Callable[[int], socket.socket] | None = None,
    journal: str | os.PathLike[str] | None = None,
    progress: Callable[[int, int], object] | None = None,
    another: Callable[[], socket.socket] | None = None,
    postcopy: bool = False,
    run: Literal["at-once", "filled"] = "at-once",
    control: Control | None = None,
) -> Any:
    """Receive the memory that :func:`send` sends from the other end.

    Parameters
    ----------
    sock : socket.socket
        Connected stream socket, best from :meth:`Listener.accept`; give it a timeout if the peer may hang: it bounds
        each frame as a whole, and how long the line may be silent. It stays open and yours.
    out : buffer, mapping of str to buffer, or callable, optional
        Writable contiguous memory of exactly the source's size: for arrays by name, one for each. Or what makes it:
        called with the size of all in bytes before the first page is sent, so that a file of that size can be
        reserved. By default new arrays; of memory without names one of uint8.
    limit : int
        Refuse memory of more bytes than this (64 GiB), unless `out` is a buffer.
    state : callable, optional
        Called with the state that the sender has sent beside the memory, or None, when all of both is there and before
        `arrived`: registers, say, to be set before the copy runs. What it raises is as of `arrived`.
    arrived : callable, optional
        Called with the memory when all of it is there and checked, before the sender hears so. Make it durable here:
        what this raises tells the sender that the migration failed, and the source goes on. The copy may not run yet.
    start : callable, optional
        Called with the memory when the source has given the copy the right to run, before the sender hears that it was
        taken. What it raises is raised at the end, with a note: the copy has the right all the same.
    max_rounds : int
        Refuse more rounds than this.
    deadline : float, optional
        Give up when the whole migration takes more seconds than this; with postcopy, up to the switch.
    reconnect : callable, optional
        Called when the line breaks, with how many times it has; returns the socket of the sender that came again,
        which is closed for you, or raises what ends the migration:
        ``lambda breaks: listener.accept(60, control=control)``.
    journal : path, optional
        A directory in which :func:`status` finds who may run even if this process is killed.
    progress : callable, optional
        Called with the round's number and the bytes of pages received so far, every few MiB.
    another : callable, optional
        Lets a sender come with several channels: returns one more socket of its, which is closed for you:
        ``lambda: listener.accept(60, control=control)``. Each is filled by a thread of its own.
    postcopy : bool
        Let a sender with `postcopy` start the copy before it has everything: `start` is called at once, and threads
        that touch what is lacking wait for it. `out` must be private anonymous memory that begins with a page of the
        system's, as :func:`dirtylog.zeros` makes it; by default it is. `sock` must be plain: TLS by this interpreter
        needs the GIL that a thread may hold while it waits for a page. :class:`ListenerProcess` does TLS in a process
        of its own, and hands out plain sockets.
    run : {"at-once", "filled"}
        When `start` is called with postcopy. ``"filled"``: when nothing is lacking any more, for programs whose system
        calls would meet what is (see Notes). Nobody may use the memory before. If the line is lost for good the copy
        is given up, and the source may go on.
    control : Control, optional
        Says how far it is, and cancels it as long as the copy is not complete, from any thread. Its bandwidth is the
        sender's matter.

    Returns
    -------
    buffer, or dict of str to array
        `out`, or what is new: the source's memory as it was when it was paused. The copy has the right to run.

    Raises
    ------
    MigrationError
        The connection ended before the end, the sender gave up, or anything it sent was not right. What `out` holds
        then is of no use, unless the error is ``uncertain``: then all of it is there, and the source had not said that
        it may run. Ask there, or :func:`settle`, before you let the copy run.
    Exception
        What a callable raises; the sender is told.

    Notes
    -----
    Nothing that arrives is trusted: frames, tables and compressed data are bounded and checked before they are used,
    a round brings each page once at most and only the last may be empty, and every page must have come before the end
    is believed. Allocates the memory and a few MiB, and with a state of the largest size some 64 MiB more; memory whose
    pages are zero is not committed. CRC-32 finds accidents; for a line that somebody may listen to or change use TLS:
    :class:`Listener` with :class:`Keys`.

    With postcopy `start` is called in this thread, and should only begin what uses the memory. System calls on what is
    lacking answer EFAULT where this process may not have a userfaultfd for the kernel's own faults: without
    CAP_SYS_PTRACE, unless ``vm.unprivileged_userfaultfd`` is 1. Make such calls when `receive`
    has returned, or let the program run then: ``run="filled"``. A child of a fork has none of the memory until then. A
    line is replaced by the interpreter: a thread that holds the GIL while it waits for a page, as access to one element
    of an array does, keeps `reconnect` from being called. :func:`dirtylog.track` takes mprotect while the memory fills,
    and does not report what is filled; afterwards open another one for userfaultfd, and then close the first.
    """
    if max_rounds < 1:
        raise ValueError(f"max_rounds is {max_rounds}; it must be 1 or more")
    if run not in get_args(_When):
        raise ValueError(f"run is {run!r}; it must be 'at-once' or 'filled'")
    channel = Channel(sock, deadline)
    if out is not None and not callable(out):
        # Refused before anything is said.
        Space(out, 4096, writable=True)
    control = control or Control()
    copy = _Copy(channel, out, limit, max_rounds, state, arrived, start, progress, reconnect, journal, another, control)
    copy.postcopy, copy.when = postcopy, run
    try:
        copy.run()
    except BaseException as error:
        copy.fail(error)
    finally:
        copy.close()
        control._off()
    if copy.problem is not None:
        copy.problem.add_note(f"the copy has the right to run, and the source has not; session {copy.session}")
        raise copy.problem
    return copy.result


def _summary(error: BaseException) -> str:
    """Say in a line what ended the receiver, for a peer that has no traceback."""
    return f"the receiver failed ({type(error).__name__}: {error})"


def _layout_bytes(hello: bytes) -> int:
    """Return how long the text of the layout is that a HELLO announces."""
    if len(hello) != HELLO.size:
        raise WireError(f"a HELLO frame of {len(hello)} bytes")
    said = HELLO.unpack(hello)
    *_, channels, _, length = said
    if HELLO.pack(*said) != hello:
        raise WireError("the sender announces something that this side does not know")
    if length > MAX_LAYOUT:
        raise WireError(f"the sender announces a layout of {length} bytes; at most {MAX_LAYOUT}")
    if channels == 1 or channels > MAX_CHANNELS:
        raise WireError(f"the sender announces {channels} channels; it must be 0, for one, or 2 to {MAX_CHANNELS}")
    return int(length)


def _room(
    said: bytes, out: Memory | Mapping[str, Memory] | Callable[[int], Memory] | None, limit: int
) -> tuple[Any, Filling]:
    """Check what is coming, and make room for it."""
    _, nbytes, page_size, codec, channels, postcopy, _ = HELLO.unpack_from(said)
    try:
        check_geometry(-(-nbytes // max(page_size, 1)), page_size)
    except ValueError as error:
        raise WireError(f"the sender announces impossible memory: {error}") from None
    if not 1 <= nbytes < 1 << 62 or not MIN_PAGE_SIZE <= page_size <= MAX_PAGE_SIZE or codec not in (RAW, ZSTD):
        raise WireError(f"the sender announces {nbytes} bytes in pages of {page_size}, codec {codec}")
    if codec == ZSTD:
        compressor()
    if postcopy and page_size < mmap.PAGESIZE:
        raise WireError(f"the sender announces pages of {page_size} bytes; postcopy takes {mmap.PAGESIZE} or more")
    # Whole pages of the system's own.
    made = _pages if postcopy and out is None else out
    result, space = room(nbytes, page_size, said[HELLO.size :], made, limit)
    if postcopy and out is not None:
        _check_private(space)
    # A command's way to make room knows that it is zero; of anybody else's nobody does.
    fresh = out is None or getattr(out, "zeros", None) is True
    return result, Filling(space, page_size, codec, channels or 1, fresh=fresh, postcopy=postcopy)


def _pages(nbytes: int) -> Memory:
    """Return new memory that begins with a page of the system's."""
    return np.frombuffer(mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), np.uint8)


def _check_private(space: Space) -> None:
    """Refuse memory that cannot be guarded page by page: shared with somebody, a file's, or a part of a page."""
    for region in space.regions:
        start = region.address
        if start % mmap.PAGESIZE or (start + region.nbytes) % mmap.PAGESIZE:
            raise WireError("postcopy needs whole pages of the system's: out is dirtylog.zeros(...), say")
        mappings = region.mappings()
        # Where the system does not tell, nobody knows (I6). Huge pages of the system's own kind are a file's, too.
        private = [mapping.permissions.endswith("p") and not mapping.file[2] for mapping in mappings]
        if not all(private) or (region.nbytes and not mappings):
            raise WireError("postcopy needs private anonymous memory: out is dirtylog.zeros(...), say")


def _state(text: bytearray) -> Any:
    """Return what the sender sent beside the memory."""
    try:
        return decode_state(bytes(text), "the sender")
    except SnapshotError as error:
        raise WireError(str(error)) from None
