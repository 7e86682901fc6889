"""Keeps a directory of snapshots in order: what is there, what hangs on what, and what may go.

Every step writes a file of its own, syncs it and renames it; only then is removed what nobody needs any more, children
before their parents. So every snapshot that is left can be restored at any moment, also after a kill.
"""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from dirtylog.sinks._bytes.whole import whole
from dirtylog.sinks.snapshot import footer as footers
from dirtylog.sinks.snapshot import removal
from dirtylog.sinks.snapshot.chain import (
    Info,
    Layer,
    Link,
    Progress,
    StrPath,
    checked_path,
    describe,
    directories_of,
    follow,
    settled,
)
from dirtylog.sinks.snapshot.footer import SnapshotError
from dirtylog.sinks.snapshot.overlay import join, orphaned, siblings
from dirtylog.sinks.snapshot.removal import PATIENCE, Removal
from dirtylog.sinks.snapshot.staged import part_files

__all__ = ["Entry", "Pruned", "catalog", "clean", "merge", "prune", "thin"]


@dataclass(frozen=True, slots=True)
class Entry:
    """One snapshot of a directory, and what hangs on it.

    Parameters
    ----------
    path : str
        File name, absolute.
    info : Info or None
        What its footer says, the state left out; None if it cannot be used.
    parent : str or None
        File that serves as its parent; None for a full snapshot, and where there is none.
    children : tuple of str
        The diffs over it, oldest first.
    depth : int
        How many files are below it.
    problem : str or None
        Why it cannot be restored, as far as footers tell.
    """

    path: str
    info: Info | None
    parent: str | None
    children: tuple[str, ...]
    depth: int
    problem: str | None


Choice = Callable[[list[Entry]], set[str]]


@dataclass(frozen=True, slots=True)
class Pruned:
    """What :func:`prune` did, or would do.

    Parameters
    ----------
    kept, needed, merged, removed : tuple of str
        Snapshots that are kept; those that are not wanted, but needed by several that are kept; which of these took in
        the diffs below them; and what was removed. Absolute file names, oldest first.
    """

    kept: tuple[str, ...]
    needed: tuple[str, ...]
    merged: tuple[str, ...]
    removed: tuple[str, ...]


@dataclass(slots=True)
class _Node:
    path: str
    info: Info | None = None
    identity: str = ""
    noted: str | None = None
    problem: str | None = None
    # The identity that a diff above must have for the parent below to serve it; see chain.follow.
    awaits: str | None = None
    parent: _Node | None = None
    children: list[_Node] = field(default_factory=list)
    depth: int = 0
    time: float = 0.0
    # Beyond the directory: never touched.
    beyond: bool = False

    def order(self) -> tuple[float, int, str]:
        return (self.time, self.depth, self.path)


def _look(path: str, *, beyond: bool) -> _Node | None:
    """Read the footer of a file; None if it does not even end as a snapshot does."""
    node = _Node(path, beyond=beyond)
    try:
        with Layer(path) as layer:
            node.info = describe(path, layer.footer, layer.place.digest, layer.allocated)
            node.time = node.info.time
            node.identity = layer.identity
            node.noted = layer.footer.parent_digest
    except SnapshotError as error:
        node.problem = str(error)
        try:
            with open(path, "rb") as file:
                # What has no size, as files of /proc, has no end to look at either.
                if os.fstat(file.fileno()).st_size < footers.TRAILER.size:
                    return None
                file.seek(-footers.TRAILER.size, os.SEEK_END)
                raw = file.read()
        except FileNotFoundError:
            return None
        # Other files may lie there as well: images, notes. A snapshot that is damaged still ends as one, or begins so.
        if not (raw.startswith(footers.MAGIC) or raw.endswith(footers.END)):
            return None
    return node


def _below(roots: Iterable[_Node]) -> Iterator[_Node]:
    """Go through trees, parents before their children."""
    waiting = list(roots)
    while waiting:
        node = waiting.pop()
        yield node
        waiting += node.children


def _forest(directory: str, search: Sequence[str]) -> list[_Node]:
    """Return the snapshots of some directories, linked to their parents."""
    by_place: dict[tuple[str, str], _Node] = {}
    places = [directory, *(each for each in search if each != directory)]
    for place in places:
        with os.scandir(place) as entries:
            names = sorted(entry.name for entry in entries if footers.plain_name(entry.name) and entry.is_file())
        for name in names:
            node = _look(os.path.join(place, name), beyond=place != directory)
            if node is not None:
                by_place[place, name] = node
    nodes = list(by_place.values())
    for node in nodes:
        if node.info is None or node.info.parent is None:
            continue
        own = os.path.dirname(node.path)
        found = [by_place.get((place, node.info.parent)) for place in [own, *(each for each in places if each != own)]]
        there = [each for each in found if each is not None and each.info is not None and each is not node]
        fitting = [each for each in there if each.info and node.noted in (each.info.digest, each.identity)]
        # A parent that was laid over with the memory of a descendant serves those that have it on their way.
        for parent in (fitting or there)[:1]:
            node.parent = parent
            parent.children.append(node)
            node.awaits = None if fitting else parent.identity
        if node.parent is None:
            node.problem = f"{node.path}: its parent {node.info.parent} is missing or damaged"
    _judge(nodes)
    return nodes


def _judge(nodes: list[_Node]) -> None:
    """Say of each node whether it can be restored, and how deep it lies."""
    seen = set()
    for node in _below(node for node in nodes if node.parent is None):
        seen.add(id(node))
        node.children.sort(key=_Node.order)
        if node.parent is not None:
            node.depth = node.parent.depth + 1
            # No diff is older than what it was taken over, whatever the clocks said.
            node.time = max(node.time, node.parent.time)
            if (node.parent.problem and node.parent.awaits is None) or (node.parent.awaits and node.awaits):
                node.problem = f"{node.path}: its parent cannot be used: {node.parent.problem}"
                node.awaits = None
            else:
                node.awaits = node.awaits or node.parent.awaits
            if node.awaits == node.identity:
                node.awaits = None
            if node.awaits is not None and node.problem is None:
                node.problem = f"{node.path}: its parent {node.parent.path} is not the one it was taken over"
    for node in nodes:
        if id(node) not in seen:
            node.problem = f"{node.path}: its chain comes back to it"


def _entry(node: _Node) -> Entry:
    return Entry(
        path=node.path,
        info=node.info,
        parent=None if node.parent is None else node.parent.path,
        children=tuple(child.path for child in node.children),
        depth=node.depth,
        problem=node.problem,
    )


def catalog(directory: StrPath = ".", *, search: Sequence[StrPath] = ()) -> list[Entry]:
    """List the snapshots of a directory, oldest first, and what hangs on what; only footers are read.

    Parameters
    ----------
    directory : str or path
        Where they are. Other files there are left out.
    search : sequence of str or path
        Directories where parents and diffs of these snapshots may be.

    Returns
    -------
    list of Entry

    Raises
    ------
    OSError
        The directory cannot be read.

    Notes
    -----
    O(sum of the footers). Safe beside writers: each footer is of one moment, the list is not.

    Examples
    --------
    >>> import tempfile, numpy as np
    >>> from dirtylog.sinks import snapshot
    >>> memory = np.ones(8192, np.uint8)
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     base = snapshot.save(directory + "/base", memory)
    ...     [(entry.info.kind, entry.depth, entry.problem) for entry in catalog(directory)]
    [('full', 0, None)]
    """
    nodes = [node for node in _forest(os.path.abspath(os.fspath(directory)), directories_of(search)) if not node.beyond]
    return [_entry(node) for node in sorted(nodes, key=_Node.order)]


def _wanted(entries: Sequence[Entry], last: int | None, daily: int | None) -> set[str]:
    """Choose what is kept, from snapshots that can be restored, oldest first."""
    kept = {entry.path for entry in entries[len(entries) - min(last or 0, len(entries)) :]}
    days: dict[datetime.date, str] = {}
    for entry in entries:
        if entry.info is not None:
            # Later ones of a day take its place. No diff notes a time before that of what it was taken over.
            days[datetime.datetime.fromtimestamp(entry.info.time).date()] = entry.path
    newest = sorted(days, reverse=True)[: daily or 0]
    return kept | {days[day] for day in newest}


@dataclass(slots=True)
class _Plan:
    kept: list[_Node]
    # What takes in which of the diffs below it, the oldest first.
    merges: list[tuple[_Node, list[_Node]]]
    needed: list[_Node]
    removed: list[_Node]


def _planned(nodes: list[_Node], choose: Choice) -> _Plan:
    sound = sorted((n for n in nodes if n.problem is None and not n.beyond), key=_Node.order)
    kept = choose([_entry(node) for node in sound])
    alive: dict[int, list[_Node]] = {}
    absorbed: dict[int, _Node] = {}
    plan = _Plan([node for node in sound if node.path in kept], [], [], [])
    for node in reversed(list(_below(n for n in nodes if n.parent is None))):
        above = [child for child in node.children if id(child) in alive]
        # What cannot be restored is not ours to remove, and whatever it hangs on stays: somebody may yet mend it.
        if node.beyond or node.path in kept or node.problem is not None:
            alive[id(node)] = above
        elif not above:
            plan.removed.append(node)
        elif len(above) == 1 and not above[0].beyond and above[0].problem is None and node.info is not None:
            alive[id(node)] = above
            absorbed[id(node)] = above[0]
        else:
            alive[id(node)] = above
            plan.needed.append(node)
    for node in sound:
        if id(node) in alive and id(node) not in absorbed:
            taken: list[_Node] = []
            below = node.parent
            while below is not None and id(below) in absorbed:
                taken.append(below)
                below = below.parent
            if taken:
                plan.merges.append((node, taken[::-1]))
                plan.removed += taken
    plan.removed.sort(key=lambda node: -node.depth)
    return plan


def prune(
    directory: StrPath = ".",
    *,
    keep_last: int | None = None,
    keep_daily: int | None = None,
    dry_run: bool = False,
    sync: bool = True,
    patience: float = PATIENCE,
    search: Sequence[StrPath] = (),
    progress: Progress | None = None,
) -> Pruned:
    """Remove the snapshots of a directory that are not to be kept; what is kept can be restored all the while.

    Parameters
    ----------
    directory : str or path
        Where they are.
    keep_last : int, optional
        Keep the newest so many, by the time that each noted.
    keep_daily : int, optional
        Keep the newest of each of the last so many days (local time) that have one.
    dry_run : bool
        Only say what would be done.
    sync : bool
        Survive a power cut (fsync) at every moment, not only the end of this process.
    patience : float
        How long to wait for writers that are at work in the directory, in seconds.
    search : sequence of str or path
        Directories where diffs of these snapshots may be: what those need stays. Nothing is removed there.
    progress : callable, optional
        Called with the bytes merged and the bytes to merge, for each file that is rewritten.

    Returns
    -------
    Pruned

    Raises
    ------
    ValueError
        Nothing would be kept, or a number is out of range.
    SnapshotError
        A writer was at work all the time, or what is to be merged is damaged. What was not removed is there.
    OSError
        The disk is full, ...

    Notes
    -----
    A diff that is not kept is merged into the one above it, so a chain gets as long as what is kept; a diff that
    several kept ones share stays. Rewriting takes the space of the new file until the old ones are removed. Snapshots
    that cannot be restored, and what they hang on, are left alone. Safe beside readers and writers, and beside another
    prune: a diff that appears meanwhile keeps what it needs, and a writer that is about to begin one over what goes is
    told.
    """
    last, daily = (
        None if number is None else whole(number, name, 1, way_out=", or None")
        for name, number in (("keep_last", keep_last), ("keep_daily", keep_daily))
    )
    if last is None and daily is None:
        raise ValueError("nothing would be kept: pass keep_last, keep_daily, or both")
    return thin(
        directory,
        lambda entries: _wanted(entries, last, daily),
        dry_run=dry_run,
        sync=sync,
        patience=patience,
        search=search,
        progress=progress,
    )


def thin(
    directory: StrPath,
    choose: Choice,
    *,
    dry_run: bool = False,
    sync: bool = True,
    patience: float = PATIENCE,
    search: Sequence[StrPath] = (),
    progress: Progress | None = None,
) -> Pruned:
    """Remove all snapshots but those whose paths `choose` returns of all that can be restored; as :func:`prune`."""
    place = os.path.abspath(os.fspath(directory))
    directories = directories_of(search)

    def said(plan: _Plan, removed: Iterable[_Node]) -> Pruned:
        merged = [node for node, _ in plan.merges]
        return Pruned(
            *(
                tuple(n.path for n in sorted(part, key=_Node.order))
                for part in (plan.kept, plan.needed, merged, removed)
            )
        )

    first = _planned(_forest(place, directories), choose)
    if dry_run or not first.removed:
        return said(first, first.removed)
    names = {os.path.basename(node.path) for node in first.removed}
    with Removal(place, names, patience=patience, sync=sync) as announced:
        # Again, now that nothing new can appear over what was announced. What was written meanwhile may want more.
        plan = _planned(_forest(place, directories), choose)
        removable = {id(node) for node in plan.removed if os.path.basename(node.path) in names}
        plan.merges = [(node, taken) for node, taken in plan.merges if all(id(below) in removable for below in taken)]
        for node, taken in plan.merges:
            _merged(node.path, taken[0].path, directories, sync=sync, progress=progress)
        # The newest that was taken in is not the parent of the one that took it in any more.
        left = {id(taken[-1]): id(node) for node, taken in plan.merges}
        removed: list[_Node] = []
        gone: set[int] = set()
        for node in plan.removed:
            if id(node) in removable and gone.issuperset({id(each) for each in node.children} - {left.get(id(node))}):
                announced.remove(node.path)
                removed.append(node)
                gone.add(id(node))
    return said(plan, removed)


def _position(links: Sequence[Link], path: str) -> int:
    """Return the place of a file below the last of a chain.

    Raises
    ------
    SnapshotError
        It is not there.
    """
    for i, link in enumerate(links[:-1]):
        if link.path == path:
            return i
    raise SnapshotError(f"{links[-1].path}: it was not taken over {path}, nor over a diff of it")


def _merged(
    path: str, first: str, directories: Sequence[str], *, sync: bool, progress: Progress | None
) -> tuple[Info, list[Link]]:
    """Let `path` take in the diffs from `first` on; return what it is, and the files that it does not need any more."""

    def work() -> tuple[Info, list[Link]]:
        links, tip = follow(path, directories)
        at = _position(links, first)
        under = links[at - 1] if at else None
        with Layer(first, links[at].digest) as layer:
            oldest = layer.footer
        like = replace(
            tip,
            kind=oldest.kind,
            parent=oldest.parent,
            # What lies under it may hold the memory of one that is taken in: what it holds now is what counts.
            parent_digest=None if under is None else under.identity,
            holds=links[-1].identity,
        )
        taken = links[at:]
        return join(path, taken, like, sync=sync, progress=progress, under=under), taken[:-1]

    found: tuple[Info, list[Link]] = settled(work)
    return found


def merge(
    first: StrPath,
    last: StrPath,
    *,
    keep: bool = False,
    sync: bool = True,
    patience: float = PATIENCE,
    search: Sequence[StrPath] = (),
    progress: Progress | None = None,
) -> Info:
    """Make one diff of a piece of a chain: `last` takes in all from `first` on, of each page the newest.

    Parameters
    ----------
    first, last : str or path
        The oldest and the newest of the piece. If `first` is full, `last` becomes full.
    keep : bool
        Leave the others of the piece where they are, restorable as before.
    sync, search, progress
        As for :func:`rebase`.
    patience : float
        How long to wait for writers in the directory before the others are removed, in seconds.

    Returns
    -------
    Info
        Of the new `last`. What it restored to, it restores to, and so do the diffs over it.

    Raises
    ------
    SnapshotError
        `last` is not a descendant of `first`; a file between them is missing or damaged; other diffs need one that
        would be removed (nothing has changed then: pass keep=True).
    OSError
        The disk is full, ... `last` is what it was.

    Notes
    -----
    Streamed, a window of 1 MiB at a time. Takes the space of the new file until the others are removed.
    """
    oldest, newest = checked_path(first), checked_path(last)
    directories = directories_of(search)
    if oldest == newest:
        raise ValueError(f"{newest!r} is both the first and the last; merge at least two snapshots")

    def others() -> list[str]:
        links, _ = follow(newest, directories)
        piece = links[_position(links, oldest) :]
        needed = siblings(piece)
        if needed:
            raise orphaned(newest, needed, "merge them as well, or pass keep=True")
        return [link.path for link in piece[:-1]]

    if keep:
        return _merged(newest, oldest, directories, sync=sync, progress=progress)[0]
    going: list[str] = settled(others)
    places = {os.path.dirname(path) for path in going}
    with contextlib.ExitStack() as stack:
        announced = {
            place: stack.enter_context(
                Removal(
                    place,
                    [os.path.basename(path) for path in going if os.path.dirname(path) == place],
                    patience=patience,
                    sync=sync,
                )
            )
            for place in sorted(places)
        }
        settled(others)
        about, taken = _merged(newest, oldest, directories, sync=sync, progress=progress)
        for link in reversed(taken):
            if link.path in going:
                announced[os.path.dirname(link.path)].remove(link.path)
    return about


def clean(directory: StrPath = ".", *, elsewhere: bool = False, dry_run: bool = False) -> list[str]:
    """Remove what dead writers left in a directory: their part files, and what they had announced to remove.

    Parameters
    ----------
    directory : str or path
        Where.
    elsewhere : bool
        That of writers on other machines too, or before the last boot: none of them may be alive.
    dry_run : bool
        Only list it.

    Returns
    -------
    list of str
        What was removed. Nothing that a living process of this machine writes is.

    Raises
    ------
    OSError
        The directory cannot be read, or a file cannot be removed.
    """
    place = os.path.abspath(os.fspath(directory))
    parts, _ = part_files(place)
    left = parts[True] + parts[None] * elsewhere
    announcements = removal.stale(place, elsewhere=elsewhere)
    if not dry_run:
        for path in left:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
        for path in announcements:
            removal.clear(path)
        removal.clear_last(place)
    return sorted([*left, *announcements])
