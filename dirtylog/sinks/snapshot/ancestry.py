"""Remembers the chains that this process has followed, so that a diff over a long one costs no more than over a short.

A chain that is being written grows at its end, and what is below the parent was followed when the parent was written.
So before the next diff it is enough to know that nothing has happened to it since:

1. A file that is removed, renamed or replaced changes the time stamps of its directory. While nobody but this process
   has changed the directories of a chain, a few of its files are looked at; otherwise all of them, if they are not
   very many.
2. A file that is cut in place does not change its directory. It is noticed when its turn comes: each diff looks at the
   next few.

Nothing of the parent itself is taken on trust: its footer is read before each diff.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from dirtylog.sinks.snapshot.chain import Layer, Link, follow, settled, still_there
from dirtylog.sinks.snapshot.footer import Footer

__all__ = ["Ancestry", "ancestors", "own_change"]

# How many files of a chain are looked at before a diff over it: if nobody else has changed their directories, and if
# somebody has. The others follow with the next diffs, so the cost of each stays the same.
CALM = 16
DISTURBED = 1024
MAX_CHAINS = 16
MAX_DIRECTORIES = 1024

# Directories as they were when this process saw them last, and a mark that is another one after each foreign change.
_seen: dict[str, tuple[tuple[int, ...], int]] = {}
_marks = itertools.count()


def _state(directory: str) -> tuple[int, ...]:
    status = os.stat(directory)
    return (status.st_dev, status.st_ino, status.st_mtime_ns, status.st_ctime_ns)


def _mark(directory: str) -> int:
    """Return the mark of a directory, a new one if somebody else has changed it."""
    now = _state(directory)
    state, mark = _seen.get(directory, ((), -1))
    if state != now:
        mark = next(_marks)
        if len(_seen) >= MAX_DIRECTORIES:
            _seen.clear()
        _seen[directory] = (now, mark)
    return mark


@contextmanager
def own_change(directory: str) -> Iterator[None]:
    """Let the body change a directory without counting as somebody else.

    What others change at the same moment, or within one tick of a coarse clock, is taken for ours. The looks in turn
    notice it later.
    """
    mark = _mark(directory)
    yield
    # Another thread may have seen a foreign change meanwhile, which must not be forgotten.
    if _seen.get(directory, ((), -1))[1] == mark:
        _seen[directory] = (_state(directory), mark)


@dataclass(slots=True)
class _Chain:
    """A chain that was followed, what its directories' marks were, and which of its files are looked at next.

    `turn` is the first of these, and so many of them as `suspect` says were there before somebody else changed a
    directory.
    """

    links: list[Link]
    marks: dict[str, int]
    turn: int = 0
    suspect: int = 0


@dataclass(frozen=True, slots=True)
class Ancestry:
    """The chain of a parent. `links` grows when the next diff is written; the first `length` are the parent's."""

    links: list[Link]
    length: int
    footer: Footer

    @property
    def tip(self) -> Link:
        """The parent itself."""
        return self.links[self.length - 1]


# By what the children of a chain's tip note of it. One entry for each chain that is being written is enough.
_chains: dict[str, _Chain] = {}


def _followed(path: str, search: Sequence[str]) -> tuple[_Chain, Footer]:
    # Marked first, so that what is changed meanwhile is changed since. Parents are looked for nowhere else.
    places = [os.path.dirname(path), *(place for place in search if os.path.isdir(place))]
    marks = {place: _mark(place) for place in places}
    links, footer = settled(lambda: follow(path, search))
    return _Chain(links, marks), footer


def _unchanged(chain: _Chain) -> bool:
    """Look at files below the tip of a chain, of which the tip itself has just been read."""
    below = len(chain.links) - 1
    try:
        marks = {place: _mark(place) for place in chain.marks}
    except OSError:
        return False
    if marks != chain.marks:
        chain.marks, chain.suspect = marks, below
    width = min(DISTURBED if chain.suspect else CALM, below)
    first = chain.turn if chain.turn < below else 0
    part = chain.links[first : min(first + width, below)]
    part += chain.links[: width - len(part)]
    chain.turn = (first + width) % max(below, 1)
    chain.suspect = max(chain.suspect - width, 0)
    return still_there(part)


def ancestors(path: str, search: Sequence[str]) -> Ancestry:
    """Return the chain of a parent, and the parent's footer.

    Raises
    ------
    SnapshotError
        A file of it is missing, damaged, or not the one that its child was taken over.

    Notes
    -----
    O(1) where this process wrote the parent last, and O(chain) otherwise.
    """
    with Layer(path) as layer:
        footer = layer.footer
        tip = Link(path, layer.place.digest, layer.identity, layer.total, footer.epoch)
    # Taken out while in use: if two diffs over one parent are written at a time, the second follows the chain itself.
    known = _chains.pop(tip.identity, None)
    if known is not None and (known.links[-1].path, known.links[-1].digest) != (tip.path, tip.digest):
        known = None
    if known is None:
        known = _chains.pop(footer.parent_digest or "", None)
        above = os.path.join(os.path.dirname(path), footer.parent or "")
        if known is not None and known.links[-1].path == above:
            known.links.append(tip)
        else:
            known = None
    if known is None or not _unchanged(known):
        known, footer = _followed(path, search)
    answer = Ancestry(known.links, len(known.links), footer)
    for identity in list(_chains)[: len(_chains) + 1 - MAX_CHAINS]:
        _chains.pop(identity, None)
    _chains[answer.tip.identity] = known
    return answer
