"""The sending end: rounds over a socket while the memory is written, until the rest fits the downtime.

The end is in two steps. The copy says that it has everything, verified and kept; only then the source gives its right
to run away, records that, and says so; only then may the copy run. Until the right is given every failure leaves it
with the source; from then on it never comes back by itself.
"""

from __future__ import annotations

import mmap
import os
import socket
import ssl
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING

from dirtylog._bits.pages import DirtyPages
from dirtylog.sinks.migrate.control import Cancelled, Control
from dirtylog.sinks.migrate.origins import layout_of, source_of
from dirtylog.sinks.migrate.payloads import FAULTS, MIN_PAGE_SIZE, PART, RUNS
from dirtylog.sinks.migrate.policy import MigrationError, NotConverging, Policy, Result, Round
from dirtylog.sinks.migrate.rounds import Rounds
from dirtylog.sinks.migrate.serving import Serving
from dirtylog.sinks.migrate.sessions import Record, check_unused, new_session
from dirtylog.sinks.migrate.share import MAX_CHANNELS
from dirtylog.sinks.migrate.wire import Channel, Kind, Refusal, WireError
from dirtylog.sinks.snapshot.footer import encode_state
from dirtylog.sinks.snapshot.space import Space

if TYPE_CHECKING:
    from dirtylog._typing import Memory
    from dirtylog.log import Observer
    from dirtylog.sinks.snapshot.writer import Source
    from dirtylog.sources.process import Process

__all__ = ["send"]


class _Stage(IntEnum):
    """How far a migration has come, as far as it decides who may run."""

    LIVE = 0
    """The source runs."""
    PAUSED = 1
    """The source may be paused; the copy has no right to run, complete or not."""
    GIVEN = 2
    """The right is given away: the copy may run. Only its own word says that it does not."""
    DONE = 3
    """The copy has said that it has the right."""


@dataclass(slots=True)
class _Attempt:
    """What a migration owes, however it ends: pages to the observer, a running source, no throttle, a word to the peer.

    Each of these is crossed off when it is done, so that `give_up` can be interrupted and called again.
    """

    sender: Rounds
    observer: Observer
    taken: DirtyPages
    resume: Callable[[], object] | None
    throttle: Callable[[float], object] | None
    reconnect: Callable[[int], socket.socket] | None
    record: Record
    control: Control
    stage: _Stage = _Stage.LIVE
    level: float = 0.0
    certain: bool = False
    resumed: bool = False
    told: bool = False
    breaks: int = 0
    own: socket.socket | None = None
    serving: Serving | None = None
    problems: list[Exception] = field(default_factory=list)

    def take(self, pages: DirtyPages) -> DirtyPages:
        """Remember what has to go back if this fails."""
        self.taken = self.taken | pages
        return pages

    @property
    def uncertain(self) -> bool:
        return self.stage == _Stage.GIVEN and not self.certain

    # ---- going on after a broken line --------------------------------------------------------------------------------

    def again(self, error: Exception) -> int:
        """Replace a broken line; return how far the copy is. Raises `error` where there is none to replace."""
        while True:
            if self.reconnect is None or not self.sender.channel.broken or isinstance(error, Refusal):
                try:
                    raise error
                finally:
                    # Its traceback leads here: each would keep the other, and the memory.
                    del error
            self.control._check()
            self.breaks += 1
            self.control.breaks = self.breaks
            self.sender.hang_up()
            # The copy hears of it, though what came was damaged and the line is not.
            self.sender.channel.cut()
            # What this raises ends the migration.
            sock = self.reconnect(self.breaks)
            self.close()
            self.own = sock
            self.sender.channel = self.sender.channel.again(sock)
            self.control._on(sock)
            try:
                return self.sender.hello()
            except Refusal as refusal:
                if self.stage == _Stage.GIVEN:
                    # Not the word of the copy that was given the right: nothing follows from it.
                    raise WireError(f"another receiver answers: {refusal}") from error
                raise
            except (OSError, WireError) as another:
                error = another

    def close(self) -> None:
        """Close the sockets that `reconnect` and `another` gave, if any."""
        self.sender.hang_up()
        own, self.own = self.own, None
        if own is not None:
            own.close()

    def begin(self) -> None:
        try:
            stage = self.sender.hello()
        except (OSError, WireError) as error:
            stage = self.again(error)
        self.check_part(stage)

    def check_part(self, stage: int) -> None:
        if stage != PART:
            raise WireError("the copy says that it is complete, and it cannot be: another migration of this session?")

    def round(self, pages: DirtyPages, final: bool = False) -> None:
        """Send a round, over as many lines as it takes; what a source dirties meanwhile is for the next one."""
        self.control.round += 1
        while True:
            try:
                self.sender.round(pages, final)
            except (OSError, WireError) as error:
                self.check_part(self.again(error))
            else:
                return
            # No more than that: what is dirty by now is dirtied again before the round is over.
            pages = self.sender.lacking()

    # ---- the right to run --------------------------------------------------------------------------------------------

    def commit(self) -> None:
        """Hear that the copy is complete, give it the right to run, and hear that it has it."""
        stage = PART
        # From the last line on nothing turns this into a migration that failed.
        while self.stage < _Stage.DONE:
            try:
                if stage == PART:
                    self.complete()
                if stage < RUNS:
                    self.give()
                self.hear()
                self.stage = _Stage.DONE
            except (OSError, WireError) as error:
                stage = self.again(error)
                if self.stage < _Stage.GIVEN and stage >= RUNS:
                    raise WireError("the copy says that it runs, and it was never given the right to") from error
                if self.stage == _Stage.GIVEN and stage == PART:
                    raise WireError("the copy was complete and is not any more: another receiver answers") from error
                if stage == PART and self.serving is not None:
                    # What the copy has not had of the live rounds comes with the rest.
                    self.postpone(self.serving.pages | self.sender.lacking())
                elif stage == PART:
                    self.round(self.sender.lacking(), final=True)

    def postpone(self, pages: DirtyPages) -> None:
        """Send these pages when the copy runs."""
        assert isinstance(self.sender.source, Space)
        self.serving = Serving(self.sender.source, self.sender.granule, pages, self.control)

    def serve(self) -> None:
        """Send a copy that runs what it lacks, over as many lines as it takes."""
        serving = self.serving
        assert serving is not None
        begin = self.sender.clock(), self.sender.bytes_sent
        self.control.round += 1
        try:
            self.record.set("serves")
        except Exception as problem:
            self.problems.append(problem)
        stage = FAULTS
        error: Exception | None = None
        while stage == FAULTS:
            try:
                if error is not None:
                    serving.back_to(self.sender.lanes[0].served)
                    self.hear()
                serving.run(self.sender.channel, self.sender.session)
                break
            except (OSError, WireError) as broken:
                error = broken
                stage = self.again(broken)
                if stage < RUNS:
                    raise WireError("the copy ran, and does not any more: another receiver answers") from broken
        self.sender.over(serving.pages, serving.sent, (serving.zeros, 0), begin, final=True)
        self.serving = None

    def complete(self) -> None:
        if self.serving is not None:
            self.sender.lacks(self.serving.extents())
        self.sender.beside()
        digest = self.sender.end()
        _, answer = self.sender.channel.receive(Kind.HAVE, counted=False)
        if answer != digest:
            raise WireError("the receiver's digest differs: it has not seen what was sent")

    def give(self) -> None:
        if self.stage < _Stage.GIVEN:
            self.control._commit()
            # Recorded before it is said. Until then whatever breaks takes it back: RUN comes after both lines.
            self.record.set("given")
            self.stage = _Stage.GIVEN
        if self.serving is not None:
            # What ends from here on takes the program with it.
            self.sender.channel.forget_deadline()
        self.sender.channel.send(Kind.RUN, self.sender.session)

    def hear(self) -> None:
        _, answer = self.sender.channel.receive(Kind.DONE, counted=False)
        if answer != self.sender.session:
            raise WireError("the copy answers for another session")

    # ---- the end -----------------------------------------------------------------------------------------------------

    def epilogue(self, progress: Callable[[Round], object] | None) -> tuple[Exception, ...]:
        """Call what is called after the end; what that raises is not a failure of the migration."""
        last = self.sender.rounds[-1]
        calls: list[Callable[[], object]] = [lambda: self.record.set("done"), self.unthrottle]
        if progress is not None:
            calls.append(lambda: progress(last))
        for call in calls:
            try:
                call()
            except Exception as problem:
                self.problems.append(problem)
        return tuple(self.problems)

    def unthrottle(self) -> None:
        level, self.level = self.level, 0.0
        if level and self.throttle is not None:
            self.throttle(0.0)

    def give_up(self, error: BaseException) -> None:
        """Put everything back as it was, the source first: it must go on even if nobody takes the pages back."""
        if isinstance(error, Refusal):
            self.certain = True
        # After the end as well: whoever is not handed a result has to be able to send everything again.
        self.put_back(error)
        try:
            if self.stage in (_Stage.PAUSED, _Stage.GIVEN) and not self.uncertain and not self.resumed:
                if self.record.stage != "live":
                    # If this fails the source stays paused: somebody may settle by what the journal says.
                    self.record.set("live")
                self.resumed = True
                if self.resume is not None:
                    self.resume()
        finally:
            try:
                self.unthrottle()
            except Exception as problem:
                error.add_note(f"throttle(0.0) failed as well ({type(problem).__name__}: {problem})")
            finally:
                self.tell()
                self.control._off()
                self.close()
        if self.uncertain and not isinstance(error, (OSError, WireError)):
            error.add_note(
                "the right to run was given away, and the destination may run: the source was left paused; "
                f"settle session {self.record.session}"
            )
        if self.stage == _Stage.DONE and self.serving is not None:
            error.add_note("the copy runs and lacks pages that only the source has: it waits for them; do not resume")
        elif self.stage == _Stage.DONE:
            error.add_note("the migration is complete: the destination has everything and may run; do not resume")

    def put_back(self, error: BaseException) -> None:
        try:
            # Twice does no harm: a page is dirty or not.
            self.observer.put_back(self.taken)
        except Exception as problem:
            error.add_note(f"what it had taken could not be put back ({problem}): the next one must send everything")

    def tell(self) -> None:
        told, self.told = self.told, True
        if not told and self.stage < _Stage.GIVEN:
            self.sender.channel.refuse("the source gave up")

    def raise_from(self, error: BaseException) -> None:
        """Raise what the caller is told, where it is not `error` itself."""
        rounds = tuple(self.sender.rounds)
        if isinstance(error, NotConverging):
            error.rounds = rounds
            error.session = self.record.session
        elif self.control.cancelled and isinstance(error, (Cancelled, OSError, WireError)):
            raise MigrationError(
                f"the migration was cancelled in round {len(rounds) + 1}", rounds, session=self.record.session
            ) from error
        elif isinstance(error, (OSError, WireError)) and self.serving is not None and self.stage == _Stage.DONE:
            raise MigrationError(
                f"the copy runs, and the line to it broke while it lacked {self.serving.left} of "
                f"{self.serving.granules} pages ({error}): it waits for them and the source must not run, "
                "unless the copy's own status is gone",
                rounds,
                session=self.record.session,
            ) from error
        elif isinstance(error, (OSError, WireError)) and self.stage < _Stage.DONE:
            raise MigrationError(
                f"migration failed in round {len(rounds) + 1}: {error}", rounds, self.uncertain, self.record.session
            ) from error


def send(
    sock: socket.socket,
    memory: Memory | Mapping[str, Memory] | Process,
    observer: Observer,
    *,
    state: object = None,
    policy: Policy | None = None,
    pause: Callable[[], object] | None = None,
    resume: Callable[[], object] | None = None,
    throttle: Callable[[float], object] | None = None,
    progress: Callable[[Round], object] | None = None,
    compress: bool = False,
    channels: int = 1,
    another: Callable[[], socket.socket] | None = None,
    delta_cache: int = 1 << 26,
    postcopy: int | None = None,
    deadline: float | None = None,
    control: Control | None = None,
    reconnect: Callable[[int], socket.socket] | None = None,
    session: str | None = None,
    journal: str | os.PathLike[str] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Result:
    """Send memory to :func:`receive` at the other end while it is written.

    Parameters
    ----------
    sock : socket.socket
        Connected stream socket; give it a timeout if the peer may hang: it bounds each frame as a whole, and how long
        the line may be silent. It stays open and yours.
    memory : array, buffer, mapping of str to them, or Process
        Contiguous; read, never written. Arrays by name arrive by name, with their types, shapes and order. Of a
        process (:func:`dirtylog.attach`), the memory that is watched.
    observer : Observer
        Of a log whose pages are those of `memory`. Best one of its own: its epochs are spent on the migration. Of
        arrays by name each begins at the page boundary after the one before, in their order:
        ``log.attach(track(b), first_page=npages_of_a)``.
    state : object, optional
        What else belongs to it, registers say: dicts, lists, text, numbers and bytes, at most 16 MiB as JSON. Or what
        returns that: called after `pause`. Of a process it says by default where its memory lay.
    policy : Policy, optional
        When to stop and when to give up.
    pause : callable, optional
        Called once, before the last round: returns when nothing writes any more. Without it the memory must not be
        written at all any more when the rounds end, or the copy is not exact.
    resume : callable, optional
        Called if the migration fails after `pause` and the copy has certainly no right to run. Where it may have
        (``MigrationError.uncertain``) the source stays paused: :func:`settle` it.
    throttle : callable, optional
        Called with the fraction of its time the source should stand still, when rounds do not shrink; with 0 at the
        end, however it ends. What it raises after the copy has taken the right to run goes to
        ``Result.problems``.
    progress : callable, optional
        Called with each :class:`Round`. What it raises ends the migration, except after the last round: the copy runs
        by then, and it goes to ``Result.problems``.
    compress : bool
        zstd (needs zstandard) where it makes a window smaller.
    channels : int
        Connections that pages go over side by side, each in a thread of its own; 1 to 64. For lines that are faster
        than one core: with TLS, say.
    another : callable, optional
        Returns one more socket that is connected to the same receiver, which is closed for you:
        ``lambda: connect(address, keys, control=control)``. Needed for more than one channel, and again after a
        broken line.
    delta_cache : int
        Bytes for copies of pages that were sent (64 MiB; 0: none): of a page that is sent again while its copy is
        kept, only what changed goes, where that is less than three quarters of it. Memory that fits is kept from the
        first round on, of larger memory the pages that go again.
    postcopy : int, optional
        Live rounds after which the copy runs before it has everything; 0: at once. What it touches first goes first,
        the rest meanwhile. `memory` must be this process's own. From the switch on only the copy may run, and it needs
        the source until `send` returns: a line that is lost stops it where it lacks pages, until `reconnect` gives
        another one.
    deadline : float, optional
        Give up when the whole migration takes more seconds than this; with `postcopy`, up to the switch.
    control : Control, optional
        Limits its bandwidth, says how far it is, and cancels it, from any thread.
    reconnect : callable, optional
        Called when the line breaks, with how many times it has; returns another connected socket, which is closed for
        you, or raises what ends the migration. Only pages that the copy lacks go again.
    session : str, optional
        32 hexadecimal digits that nobody can guess, and that no other migration has; by default new ones.
    journal : path, optional
        A directory in which :func:`status` finds who may run even if this process is killed.
    clock : callable
        Seconds, monotonic.

    Returns
    -------
    Result
        The copy has everything and has taken the right to run; the source is paused still.

    Raises
    ------
    NotConverging
        After `max_rounds` the rest does not fit the downtime. The source was not paused.
    MigrationError
        The connection ended, or the peer refused or answered nonsense. If it is ``uncertain``, the right to run was
        given away and the destination may run already: `resume` was not called.
    ValueError, TypeError, BackendUnavailable
        Arguments; nothing has been sent or collected.

    Notes
    -----
    On any failure every page this migration has taken from the observer or sent is put back to it: the next try, or
    the next consumer, sees it dirty. A KeyboardInterrupt after the right was given carries a note that says so: the
    copy may run, so the source must not. Allocates a few MiB, `delta_cache`, and 8 bytes per page with `reconnect`. The
    GIL is released during copies, comparisons and system calls.

    References
    ----------
    Clark et al., "Live Migration of Virtual Machines", NSDI 2005.
    """
    policy = policy or Policy()
    page_size = observer.page_size
    if page_size < MIN_PAGE_SIZE:
        raise ValueError(f"the observer's page_size is {page_size}; a migration takes {MIN_PAGE_SIZE} or more")
    source = source_of(memory, page_size)
    npages = source.npages
    if observer.npages != npages:
        raise ValueError(f"the observer has {observer.npages} pages of {page_size} bytes; the memory has {npages}")
    session = new_session() if session is None else check_unused(session, journal)
    if not 1 <= channels <= MAX_CHANNELS or (channels > 1 and another is None):
        raise ValueError(f"channels is {channels}; it must be 1 to {MAX_CHANNELS}, and more than one need another=")
    if state is None:
        state = getattr(source, "state", None)
    if delta_cache < 0:
        raise ValueError(f"delta_cache is {delta_cache}; it must be bytes, 0 or more")
    first, raw = Channel(sock, deadline), bytes.fromhex(session)
    if postcopy is not None:
        _check_postcopy(postcopy, source, first)
    sender = Rounds(
        first, source, layout_of(source), delta_cache, compress, clock, raw, channels, another, postcopy is not None
    )
    sender.state = b"" if callable(state) else encode_state(state)
    if reconnect is not None:
        sender.remember()
    record = Record(session, "source", journal)
    control = control or Control()
    control._begin(session)
    sender.watch(control)
    nothing = DirtyPages._empty(npages, page_size)
    attempt = _Attempt(sender, observer, nothing, resume, throttle, reconnect, record, control)
    begin = clock()
    slow = 0
    take = attempt.take
    try:
        record.set("live")
        control._on(sock)
        attempt.begin()
        with observer.collect() as epoch:
            take(epoch.pages)
        rest = take(DirtyPages._all(npages, page_size, exact=True))
        while postcopy is None or len(sender.rounds) < postcopy:
            attempt.round(rest)
            with observer.collect() as epoch:
                rest = take(epoch.pages)
            # Before it is throttled for nothing, or said not to converge.
            control._check()
            last = sender.rounds[-1]
            slow = slow + 1 if rest.nbytes > last.nbytes / 2 else 0
            if throttle is not None and slow >= policy.throttle_after:
                level = attempt.level
                level = min(level + policy.throttle_step if level else policy.throttle_first, policy.throttle_most)
                # Before it is asked for: what may have begun is taken back, however this ends.
                attempt.level = level
                throttle(level)
                slow = 0
            last = sender.dirtied(rest, attempt.level)
            if progress is not None:
                progress(last)
            # A source that is to go on is not paused first.
            control._check()
            if postcopy is None and last.expected_downtime <= policy.downtime:
                break
            if postcopy is not None and not rest:
                # Another live round would be empty, which the copy takes for no progress.
                break
            if postcopy is None and len(sender.rounds) >= policy.max_rounds:
                if policy.force:
                    break
                raise NotConverging(
                    f"does not converge: after {len(sender.rounds)} rounds {rest.nbytes} bytes are left, which take "
                    f"{last.expected_downtime:.3g} s at {last.bandwidth:.3g} bytes/s; {policy.downtime} s of downtime "
                    f"are allowed and {last.dirty_rate * page_size:.3g} bytes/s are dirtied (throttle it, allow more, "
                    "or force=True)"
                )
        paused = clock()
        attempt.stage = _Stage.PAUSED
        if pause is not None:
            pause()
        with observer.collect() as epoch:
            # What was collected after the last round is still to be sent, and what came until the pause.
            rest = rest | take(epoch.pages)
            if callable(state):
                sender.state = encode_state(state())
            if postcopy is None or not rest:
                attempt.round(rest, final=True)
            else:
                attempt.postpone(rest)
            attempt.commit()
            switched = finished = clock()
            if attempt.serving is not None:
                attempt.serve()
                finished = clock()
        problems = attempt.epilogue(progress)
        rounds = tuple(sender.rounds)
        total = sum(r.nbytes for r in rounds)
        sent = sender.bytes_sent
        control._off()
        attempt.close()
        result = Result(rounds, finished - begin, switched - paused, total, sent, problems, session, attempt.breaks)
        return result  # noqa: RET504  an interrupt just after the call above must find this try
    except BaseException as error:
        try:
            attempt.give_up(error)
        except BaseException as late:
            # Interrupted in the middle of it: whatever is not done yet is done now.
            attempt.give_up(late)
            raise
        attempt.raise_from(error)
        raise


def _check_postcopy(rounds: int, source: Source, channel: Channel) -> None:
    """Refuse what cannot be sent while the copy runs; nothing has been sent yet."""
    if rounds < 0:
        raise ValueError(f"postcopy is {rounds}; it must be a number of live rounds, 0 or more")
    if not isinstance(source, Space):
        raise ValueError("postcopy sends memory of this process alone; send that of another one with its last round")
    if source.page_size < mmap.PAGESIZE:
        raise ValueError(f"the observer's page_size is {source.page_size}; postcopy takes {mmap.PAGESIZE} or more")
    if not channel.plain and not isinstance(channel.sock, ssl.SSLSocket):
        raise ValueError("postcopy needs a socket whose descriptor tells what has come: socket.socket or ssl.SSLSocket")
