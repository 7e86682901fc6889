"""When a migration stops and when it gives up; what it did, round by round; how it fails."""

from __future__ import annotations

from dataclasses import dataclass

from dirtylog.errors import DirtyLogError

__all__ = ["MigrationError", "NotConverging", "Policy", "Result", "Round"]


@dataclass(frozen=True, slots=True)
class Policy:
    """When to stop, and when to give up.

    Parameters
    ----------
    downtime : float
        Seconds that the source may be paused for the last round, as far as the bandwidth measured tells.
    max_rounds : int
        Live rounds, the first included, before the migration ends as not converging.
    force : bool
        After `max_rounds` pause and send the rest, however long it takes, rather than fail.
    throttle_after : int
        Ask for throttling once in so many rounds each dirtied more than half of what was sent.
    throttle_first, throttle_step, throttle_most : float
        Fractions of its time the source is asked to stand still: the first, what is added each time, the largest.
    """

    downtime: float = 0.3
    max_rounds: int = 30
    force: bool = False
    throttle_after: int = 2
    throttle_first: float = 0.2
    throttle_step: float = 0.1
    throttle_most: float = 0.99

    def __post_init__(self) -> None:
        """Refuse numbers that no migration can go by."""
        if not self.downtime >= 0:
            raise ValueError(f"downtime is {self.downtime}; it must be seconds, 0 or more")
        if self.max_rounds < 1 or self.throttle_after < 1:
            raise ValueError(
                f"max_rounds is {self.max_rounds} and throttle_after {self.throttle_after}; both must be 1 or more"
            )
        if not 0 <= self.throttle_first <= self.throttle_most < 1 or self.throttle_step < 0:
            raise ValueError(
                f"throttle_first is {self.throttle_first}, throttle_most {self.throttle_most} and throttle_step "
                f"{self.throttle_step}; they must satisfy 0 <= throttle_first <= throttle_most < 1, throttle_step >= 0"
            )


@dataclass(frozen=True, slots=True)
class Round:
    """What one round did.

    Parameters
    ----------
    number : int
        From 1.
    final : bool
        The source was paused.
    pages, zero_pages, delta_pages : int
        Pages of the round; how many of them were zero and went without data; of how many only what changed went.
    nbytes, wire_bytes : int
        Bytes of the pages; bytes that went over the socket for them.
    seconds, bandwidth : float
        How long it took; page bytes per second.
    dirtied : int
        Pages that were dirtied during it (0 for the final round).
    dirty_rate : float
        Pages per second.
    expected_downtime : float
        Seconds it would take to send what was dirtied at this bandwidth.
    throttle : float
        Fraction of its time that the source is asked to stand still from here on.
    """

    number: int
    final: bool
    pages: int
    zero_pages: int
    nbytes: int
    wire_bytes: int
    seconds: float
    bandwidth: float
    dirtied: int = 0
    dirty_rate: float = 0.0
    expected_downtime: float = 0.0
    throttle: float = 0.0
    delta_pages: int = 0


@dataclass(frozen=True, slots=True)
class Result:
    """What a migration that arrived did.

    Parameters
    ----------
    rounds : tuple of Round
        The last one is final.
    seconds, downtime : float
        All of it; from before `pause` to the receiver's answer.
    nbytes, wire_bytes : int
        Bytes of pages sent, over all rounds; bytes that went over the socket.
    problems : tuple of Exception
        What `throttle` or `progress` raised, or the journal, after the copy had taken the right to run. The migration
        is complete all the same, so nothing of that is an error of it.
    session : str
        Its identifier, for :func:`status`.
    breaks : int
        How many times the line broke and was replaced.
    """

    rounds: tuple[Round, ...]
    seconds: float
    downtime: float
    nbytes: int
    wire_bytes: int
    problems: tuple[Exception, ...] = ()
    session: str = ""
    breaks: int = 0


class MigrationError(DirtyLogError):
    """A migration that is not known to have arrived; the source is intact, every page it had taken is dirty again.

    Attributes
    ----------
    rounds : tuple of Round
        What was done before.
    uncertain : bool
        Only the other end knows who may run. Of `send`: the right to run was given away and the answer was lost; the
        source is paused still. Of `receive`: the copy is complete, and was not told to run before the line broke.
        :func:`settle` asks the other end, :func:`status` says how far this one is.
    session : str
        The identifier, for these two; empty where the ends had not met.
    """

    def __init__(
        self, message: str, rounds: tuple[Round, ...] = (), uncertain: bool = False, session: str = ""
    ) -> None:
        super().__init__(message)
        self.rounds = rounds
        self.uncertain = uncertain
        self.session = session


class NotConverging(MigrationError):
    """The memory is dirtied faster than it can be sent; `rounds` shows by how much."""
