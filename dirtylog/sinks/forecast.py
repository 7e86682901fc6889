"""Forecast of a pre-copy migration: the rounds it would take, from how much gets dirty while one is being sent."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

__all__ = ["Forecast", "Round", "forecast"]

Verdict = Literal["converges", "does not converge", "unknown"]


@dataclass(frozen=True, slots=True)
class Round:
    """One round of pre-copy.

    Attributes
    ----------
    number : int
        1 for the first, which sends everything.
    pages, nbytes : int
        What it sends.
    seconds : float
        How long that takes.
    dirtied : int
        Pages that get dirty meanwhile, which the next round sends.
    """

    number: int
    pages: int
    nbytes: int
    seconds: float
    dirtied: int


@dataclass(frozen=True, slots=True)
class Forecast:
    """How a pre-copy migration would go.

    Attributes
    ----------
    verdict : {"converges", "does not converge", "unknown"}
        Unknown where what was measured ends before the migration does.
    reason : str
        Why, in words.
    rounds : tuple of Round
        While the program runs.
    downtime : float
        Seconds that the rest after the last round takes, with the program paused.
    seconds : float
        All rounds and the downtime together.
    bandwidth : float
        Bytes per second it was made for.
    """

    verdict: Verdict
    reason: str
    rounds: tuple[Round, ...]
    downtime: float
    seconds: float
    bandwidth: float


def forecast(
    npages: int,
    page_size: int,
    dirtied: Callable[[float, float], float | None],
    *,
    bandwidth: float,
    downtime: float,
    max_rounds: int = 30,
) -> Forecast:
    """Forecast a pre-copy migration round by round.

    Parameters
    ----------
    npages, page_size : int
        The memory, in pages of so many bytes; the first round sends all of it.
    dirtied : callable
        ``dirtied(start, seconds)``: how many different pages get dirty in the
        `seconds` after `start` (seconds since the migration began), or None
        where that is not known. Called for one round after the other.
    bandwidth : float
        Bytes per second.
    downtime : float
        Seconds that the program may be paused for.
    max_rounds : int, default 30
        Where it has not converged by then, it does not.

    Returns
    -------
    Forecast
        The verdict, with every round.

    Raises
    ------
    ValueError
        `bandwidth` is not positive and finite, `downtime` is negative, or `max_rounds` is less than 1.
    """
    if not (bandwidth > 0 and math.isfinite(bandwidth)):
        raise ValueError(f"bandwidth is {bandwidth}; it must be a positive number of bytes per second")
    if not downtime >= 0:
        raise ValueError(f"downtime is {downtime}; it must be 0 seconds or more")
    if max_rounds < 1:
        raise ValueError(f"max_rounds is {max_rounds}; it must be 1 or more")
    rounds: list[Round] = []
    rest, clock = npages, 0.0

    def result(verdict: Verdict, reason: str) -> Forecast:
        pause = rest * page_size / bandwidth
        return Forecast(verdict, reason, tuple(rounds), pause, clock + pause, bandwidth)

    while rest * page_size / bandwidth > downtime:
        seconds = rest * page_size / bandwidth
        if len(rounds) == max_rounds:
            return result(
                "does not converge",
                f"after {max_rounds} rounds {rest} pages are left, a pause of {seconds:.3g} s where "
                f"{downtime:.3g} s are allowed",
            )
        fresh = dirtied(clock, seconds)
        if fresh is None:
            return result(
                "unknown",
                f"round {len(rounds) + 1} lasts from {clock:.3g} s to {clock + seconds:.3g} s, "
                "which is more than was measured",
            )
        fresh_pages = min(npages, math.ceil(fresh))
        rounds.append(Round(len(rounds) + 1, rest, rest * page_size, seconds, fresh_pages))
        clock += seconds
        rest = fresh_pages
    return result("converges", f"after {len(rounds)} rounds the rest of {rest} pages fits the downtime")
