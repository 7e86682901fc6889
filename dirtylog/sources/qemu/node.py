"""A node of QEMU's block graph: commands about it by QMP, and whether the answer to one of them was lost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dirtylog.errors import DirtyLogError
from dirtylog.sources.qemu.qmp import Qmp, QmpError

__all__ = ["Actions", "Node"]

Actions = list[tuple[str, dict[str, Any]]]


class Node:
    """A node, and what has been asked of QEMU about it.

    Parameters
    ----------
    qmp : Qmp
        The monitor. It stays the caller's.
    name : str
        The node's name.

    Attributes
    ----------
    unanswered : bool
        Whether QEMU has been asked for something and nobody knows whether it is done. Whoever asks for several things
        that belong together sets it before the first and clears it after the last.
    """

    def __init__(self, qmp: Qmp, name: str) -> None:
        self.name = name
        self.unanswered: bool = False
        self._qmp = qmp

    def ask(self, command: str, arguments: dict[str, Any] | None = None) -> Any:
        """Give a command. A refusal is an answer: QEMU has done nothing."""
        before, self.unanswered = self.unanswered, True
        try:
            answer = self._qmp.execute(command, arguments)
        except QmpError:
            self.unanswered = before
            raise
        self.unanswered = before
        return answer

    def wait(self, event: str, suits: Callable[[dict[str, Any]], bool]) -> None:
        """Wait for the event that says that what was asked for is done."""
        before, self.unanswered = self.unanswered, True
        self._qmp.wait(event, suits)
        self.unanswered = before

    def names(self) -> set[str]:
        """Return the names of all nodes that QEMU has."""
        return {each.get("node-name", "") for each in self.ask("query-named-block-nodes", {"flat": True})}

    def describe(self) -> dict[str, Any]:
        """Return what QEMU says of the node."""
        for each in self.ask("query-named-block-nodes", {"flat": True}):
            if each.get("node-name") == self.name:
                return dict(each)
        raise DirtyLogError(f"there is no node {self.name!r}; query-named-block-nodes lists those that there are")

    def transaction(self, actions: Actions) -> None:
        """Do all of it at one moment, or nothing. What is about bitmaps is about those of this node."""
        told = []
        for kind, about in actions:
            told.append({"type": kind, "data": {"node": self.name, **about} if "bitmap" in kind else about})
        if told:
            self.ask("transaction", {"actions": told})
