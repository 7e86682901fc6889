"""The sending end: rounds over a socket while the memory is written, until the rest fits the downtime."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from dirtylog._bits.copying import gather
from dirtylog._bits.flat import flat_bytes
from dirtylog._bits.pages import DirtyPages
from dirtylog._core import zero_pages
from dirtylog.sinks.extents import WINDOW, PackedExtents
from dirtylog.sinks.migrate.payloads import HELLO, MIN_PAGE_SIZE, PAGES, RAW, ROUND, ZSTD, compressor, granule_offsets
from dirtylog.sinks.migrate.policy import MigrationError, NotConverging, Policy, Result, Round
from dirtylog.sinks.migrate.wire import Channel, Kind, Refusal, WireError

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from dirtylog._typing import Memory
    from dirtylog.log import Observer

__all__ = ["send"]


def _joined(offsets: npt.NDArray[np.int64], granule: int, end: int) -> npt.NDArray[np.int64]:
    """Return ascending granules as extents, neighbours joined, nothing past `end`."""
    starts = np.flatnonzero(np.diff(offsets, prepend=-2 * granule) != granule)
    lengths = np.diff(starts, append=len(offsets)) * granule
    extents = np.stack([offsets[starts], lengths], axis=1)
    extents[-1, 1] = min(extents[-1, 1], end - extents[-1, 0])
    return extents


@dataclass(slots=True)
class _Sender:
    """One migration under way, seen from the source."""

    channel: Channel
    view: memoryview
    page_size: int
    compress: Callable[[Buffer], bytes] | None
    clock: Callable[[], float]
    rounds: list[Round] = field(default_factory=list)
    staging: memoryview = field(default_factory=lambda: memoryview(bytearray(WINDOW)))
    packing: memoryview = field(default_factory=lambda: memoryview(bytearray(WINDOW)))

    def hello(self) -> None:
        codec = ZSTD if self.compress else RAW
        self.channel.send(Kind.HELLO, HELLO.pack(self.view.nbytes, self.page_size, codec))
        self.channel.receive(Kind.READY, counted=False)

    def round(self, pages: DirtyPages, final: bool = False) -> None:
        number = len(self.rounds) + 1
        begin, before = self.clock(), self.channel.bytes_sent
        self.channel.send(Kind.ROUND, ROUND.pack(number))
        packed = PackedExtents(pages, self.view.nbytes)
        zeros = 0
        for start, end, extents in packed.windows():
            zeros += self.window(extents, end - start)
        seconds = self.clock() - begin
        self.rounds.append(
            Round(
                number=number,
                final=final,
                pages=pages.count,
                zero_pages=zeros // max(self.page_size // WINDOW, 1),
                nbytes=packed.total,
                wire_bytes=self.channel.bytes_sent - before,
                seconds=seconds,
                bandwidth=packed.total / seconds if seconds > 0 else float("inf"),
            )
        )

    def window(self, extents: npt.NDArray[np.int64], nbytes: int) -> int:
        """Send one window; return how many of its granules were zero."""
        part = self.staging[:nbytes]
        # Copied once: zero or not is asked of the bytes that are sent.
        gather(self.view, extents, part)
        granule = min(self.page_size, WINDOW)
        zeros = zero_pages(part, granule)
        if not zeros:
            self.data(extents, part)
            return 0
        offsets = granule_offsets(extents, granule)
        zero = zeros.indices()
        self.channel.send(Kind.ZEROS, _joined(offsets[zero], granule, self.view.nbytes).astype("<i8").tobytes())
        other = (DirtyPages._all(zeros.npages, granule, exact=True) - zeros).indices()
        if len(other):
            within = _joined(other * granule, granule, nbytes)
            packed = self.packing[: int(within[:, 1].sum())]
            gather(part, within, packed)
            self.data(_joined(offsets[other], granule, self.view.nbytes), packed)
        return zeros.count

    def data(self, extents: npt.NDArray[np.int64], part: memoryview) -> None:
        codec, payload = RAW, part
        if self.compress:
            smaller = self.compress(part)
            if len(smaller) < part.nbytes:
                codec, payload = ZSTD, memoryview(smaller)
        table = extents.astype("<i8").tobytes()
        self.channel.send(Kind.PAGES, PAGES.pack(len(extents), codec), table, payload)

    def dirtied(self, pages: DirtyPages, throttle: float) -> Round:
        """Complete the last round with what was dirtied during it."""
        last = self.rounds[-1]
        self.rounds[-1] = replace(
            last,
            dirtied=pages.count,
            dirty_rate=pages.count / last.seconds if last.seconds > 0 else 0.0,
            expected_downtime=pages.nbytes / last.bandwidth if last.bandwidth > 0 else float("inf"),
            throttle=throttle,
        )
        return self.rounds[-1]


class _Stage(IntEnum):
    """How far a migration has come, as far as it decides who may run."""

    LIVE = 0
    """The source runs."""
    PAUSED = 1
    """The source may be paused; the copy is certainly not complete."""
    SENT = 2
    """The end may be out: the receiver may hold a complete copy. Only its own word says that it does not."""
    DONE = 3
    """The receiver has said that it has everything."""


@dataclass(slots=True)
class _Attempt:
    """What a migration owes, however it ends: pages to the observer, a running source, no throttle, a word to the peer.

    Each of these is crossed off when it is done, so that `give_up` can be interrupted and called again.
    """

    sender: _Sender
    observer: Observer
    taken: DirtyPages
    resume: Callable[[], object] | None
    throttle: Callable[[float], object] | None
    stage: _Stage = _Stage.LIVE
    level: float = 0.0
    certain: bool = False
    resumed: bool = False
    told: bool = False

    def take(self, pages: DirtyPages) -> DirtyPages:
        """Remember what has to go back if this fails."""
        self.taken = self.taken | pages
        return pages

    @property
    def uncertain(self) -> bool:
        return self.stage == _Stage.SENT and not self.certain

    def epilogue(self, progress: Callable[[Round], object] | None) -> tuple[Exception, ...]:
        """Call what is called after the end; what that raises is not a failure of the migration."""
        problems: list[Exception] = []
        try:
            self.unthrottle()
        except Exception as problem:
            problems.append(problem)
        try:
            if progress is not None:
                progress(self.sender.rounds[-1])
        except Exception as problem:
            problems.append(problem)
        return tuple(problems)

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
            if self.stage in (_Stage.PAUSED, _Stage.SENT) and not self.uncertain and not self.resumed:
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
        if self.uncertain and not isinstance(error, (OSError, WireError)):
            error.add_note("the destination may hold a complete copy and run: the source was left paused")
        if self.stage == _Stage.DONE:
            error.add_note("the migration is complete: the destination has everything and may run; do not resume")

    def put_back(self, error: BaseException) -> None:
        try:
            # Twice does no harm: a page is dirty or not.
            self.observer.put_back(self.taken)
        except Exception as problem:
            error.add_note(f"what it had taken could not be put back ({problem}): the next one must send everything")

    def tell(self) -> None:
        told, self.told = self.told, True
        if not told and self.stage < _Stage.DONE:
            self.sender.channel.refuse("the source gave up")

    def raise_from(self, error: BaseException) -> None:
        """Raise what the caller is told, where it is not `error` itself."""
        rounds = tuple(self.sender.rounds)
        if isinstance(error, NotConverging):
            error.rounds = rounds
        elif isinstance(error, (OSError, WireError)) and self.stage < _Stage.DONE:
            raise MigrationError(
                f"migration failed in round {len(rounds) + 1}: {error}", rounds, self.uncertain
            ) from error


def send(
    sock: socket.socket,
    memory: Memory,
    observer: Observer,
    *,
    policy: Policy | None = None,
    pause: Callable[[], object] | None = None,
    resume: Callable[[], object] | None = None,
    throttle: Callable[[float], object] | None = None,
    progress: Callable[[Round], object] | None = None,
    compress: bool = False,
    deadline: float | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Result:
    """Send memory to :func:`receive` at the other end while it is written.

    Parameters
    ----------
    sock : socket.socket
        Connected stream socket; give it a timeout if the peer may hang: it bounds each frame as a whole. It stays
        open and yours.
    memory : buffer
        C-contiguous; read, never written.
    observer : Observer
        Of a log whose pages are those of `memory`. Best one of its own: its epochs are spent on the migration.
    policy : Policy, optional
        When to stop and when to give up.
    pause : callable, optional
        Called once, before the last round: returns when nothing writes any more. Without it the memory must not be
        written at all any more when the rounds end, or the copy is not exact.
    resume : callable, optional
        Called if the migration fails after `pause` and the copy is certainly not complete. Where it may be
        (``MigrationError.uncertain``) the source stays paused, and the caller decides.
    throttle : callable, optional
        Called with the fraction of its time the source should stand still, when rounds do not shrink; with 0 at the
        end, however it ends. What it raises after the receiver has said that it has everything goes to
        ``Result.problems``.
    progress : callable, optional
        Called with each :class:`Round`. What it raises ends the migration, except after the last round: the receiver
        has everything by then, and it goes to ``Result.problems``.
    compress : bool
        zstd (needs zstandard) where it makes a window smaller.
    deadline : float, optional
        Give up when the whole migration takes more seconds than this.
    clock : callable
        Seconds, monotonic.

    Returns
    -------
    Result
        The receiver has said that it has everything; the source is paused still.

    Raises
    ------
    NotConverging
        After `max_rounds` the rest does not fit the downtime. The source was not paused.
    MigrationError
        The connection ended, or the peer refused or answered nonsense. If it is ``uncertain``, the destination may
        run already: `resume` was not called.
    ValueError, TypeError, BackendUnavailable
        Arguments; nothing has been sent or collected.

    Notes
    -----
    On any failure every page this migration has taken from the observer or sent is put back to it: the next try, or
    the next consumer, sees it dirty. A KeyboardInterrupt after the receiver's last word carries a note that says so:
    the copy may run, so the source must not. Allocates a few MiB. The GIL is released during copies and system calls.

    References
    ----------
    Clark et al., "Live Migration of Virtual Machines", NSDI 2005.
    """
    view = flat_bytes(memory)
    policy = policy or Policy()
    page_size = observer.page_size
    npages = -(-view.nbytes // page_size)
    if page_size < MIN_PAGE_SIZE:
        raise ValueError(f"the observer's page_size is {page_size}; a migration takes {MIN_PAGE_SIZE} or more")
    if observer.npages != npages:
        raise ValueError(f"the observer has {observer.npages} pages of {page_size} bytes; the memory has {npages}")
    sender = _Sender(Channel(sock, deadline), view, page_size, compressor() if compress else None, clock)
    attempt = _Attempt(sender, observer, DirtyPages._empty(npages, page_size), resume, throttle)
    begin = clock()
    slow = 0
    take = attempt.take
    try:
        sender.hello()
        with observer.collect() as epoch:
            take(epoch.pages)
        rest = take(DirtyPages._all(npages, page_size, exact=True))
        while True:
            sender.round(rest)
            with observer.collect() as epoch:
                rest = take(epoch.pages)
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
            if last.expected_downtime <= policy.downtime:
                break
            if len(sender.rounds) >= policy.max_rounds:
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
            sender.round(rest | take(epoch.pages), final=True)
            digest = sender.channel.digest()
            # Before it is sent: an interrupt may come between the last byte and the next line.
            attempt.stage = _Stage.SENT
            sender.channel.send(Kind.END, digest)
            _, answer = sender.channel.receive(Kind.DONE, counted=False)
            if answer != digest:
                raise WireError("the receiver's digest differs: it has not seen what was sent")
            # From here on nothing turns this into a migration that failed.
            attempt.stage = _Stage.DONE
        finished = clock()
        problems = attempt.epilogue(progress)
        rounds = tuple(sender.rounds)
        total = sum(r.nbytes for r in rounds)
        result = Result(rounds, finished - begin, finished - paused, total, sender.channel.bytes_sent, problems)
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
