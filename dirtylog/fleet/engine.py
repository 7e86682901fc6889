"""What a fleet asks of whoever runs it: places, objects that live there, and calls to them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, Protocol

__all__ = ["Answer", "Engine", "Handle"]


class Answer(Protocol):
    """What a call will give."""

    def result(self, timeout: float | None = None) -> Any:
        """Wait for it, and raise what it raised; TimeoutError where it takes too long."""


class Handle(Protocol):
    """An object that lives somewhere."""

    def call(self, method: str, *args: Any) -> Answer:
        """Begin a call, without waiting for it."""


class Engine(Protocol):
    """Somebody who runs objects in several places.

    Attributes
    ----------
    same_process : bool
        Whether what they are given is the thing itself, and not a copy that was pickled.
    """

    same_process: bool

    def places(self) -> Sequence[Hashable]:
        """List where objects can live, now."""

    def spawn(self, place: Hashable, factory: Callable[..., Any], *args: Any) -> Answer:
        """Begin to make an object somewhere; the answer's result is its handle."""

    def release(self, handle: Handle) -> None:
        """Let an object go."""
