"""Memory whose owner vouches that nobody else writes it: what maps files that are never written says so here."""

from __future__ import annotations

__all__ = ["forget_range", "vouch_for_range", "vouched_ranges"]

_vouched: dict[int, int] = {}


def vouch_for_range(address: int, nbytes: int) -> None:
    """Say that the files that a range maps privately are never written in place, so that nobody but us changes it.

    For memory whose owner knows, such as that of a committed snapshot; until :func:`forget_range`.
    """
    _vouched[address] = address + nbytes


def forget_range(address: int) -> None:
    """Take back what :func:`vouch_for_range` said; does nothing a second time."""
    _vouched.pop(address, None)


def vouched_ranges() -> list[tuple[int, int]]:
    """List the ranges: first address and the one after the last."""
    return list(_vouched.items())
