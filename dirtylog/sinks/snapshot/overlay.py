"""Lays diffs over a snapshot they were taken over, so that one file holds what a chain held."""

from __future__ import annotations

import os
import secrets
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from dirtylog._bits.pages import DirtyPages
from dirtylog.sinks._bytes.extents import PackedExtents
from dirtylog.sinks._bytes.pageio import write_extents
from dirtylog.sinks.snapshot import footer as footers
from dirtylog.sinks.snapshot.chain import (
    ChainMovedError,
    Info,
    Layer,
    Link,
    Progress,
    StrPath,
    checked_path,
    describe,
    directories_of,
    follow,
    lay,
    settled,
    still_there,
)
from dirtylog.sinks.snapshot.footer import Footer, SnapshotError, hasher
from dirtylog.sinks.snapshot.layout import Layout
from dirtylog.sinks.snapshot.removal import PATIENCE, Removal, announced
from dirtylog.sinks.snapshot.staged import Staged
from dirtylog.sinks.snapshot.writer import digests, seal

__all__ = ["flatten", "join", "orphaned", "rebase", "siblings"]


def siblings(links: Sequence[Link]) -> list[str]:
    """List the diffs beside a chain that are taken over one of its files, the last excepted, and are not part of it."""
    # What is taken over the memory of the last one restores as before: the result holds that memory.
    digests = {digest for link in links[:-1] for digest in (link.digest, link.identity)} - {links[-1].identity}
    ours = {link.digest for link in links}
    found = []
    for directory in sorted({os.path.dirname(link.path) for link in links}):
        with os.scandir(directory) as entries:
            names = sorted(entry.path for entry in entries if footers.plain_name(entry.name) and entry.is_file())
        for path in names:
            try:
                with Layer(path) as layer:
                    if layer.footer.parent_digest in digests and layer.place.digest not in ours:
                        found.append(path)
            except (SnapshotError, OSError):
                continue
    return found


def orphaned(path: str, diffs: Sequence[str], way_out: str) -> SnapshotError:
    """Return the error that names diffs which a change to a file would leave without their parent."""
    return SnapshotError(
        f"{path}: {', '.join(diffs[:3])}{' and more' * (len(diffs) > 3)} could not be restored any more: their parent "
        f"would be gone; {way_out}"
    )


def join(
    path: str, links: Sequence[Link], like: Footer, *, sync: bool, progress: Progress | None, under: Link | None = None
) -> Info:
    """Write what the files `links` hold, one laid over the other, in place of one of them, with a footer like `like`.

    Parameters
    ----------
    path : str
        The file to replace, which is one of `links`.
    links : sequence of Link
        The older come first: of a page that several hold, the newest wins.
    like : Footer
        What does not follow from the pages.
    sync, progress
        As for :func:`rebase`.
    under : Link, optional
        The parent, which must not go away meanwhile.

    Notes
    -----
    Takes the space of the result beside that of `links`, and memory for the result's page set and a window.
    """
    held, exact, state = _union(links, like)
    layout, packed = Layout.of(like.kind), PackedExtents(held, like.nbytes)
    data = layout.data_bytes(like.nbytes, packed.total)
    with Staged(path, data, sync=sync, replace=True, mode=None) as staged:

        def put(part: memoryview, extents: npt.NDArray[np.int64]) -> None:
            write_extents(staged.descriptor, part, layout.within(packed, extents), packed=True, name=path)

        lay(links, put, progress)
        chunks = digests(staged.descriptor, packed, layout, path, hasher(like.algorithm))
        footer = replace(
            like,
            id=secrets.token_hex(16),
            count=held.count,
            rows=len(packed.extents),
            exact=exact,
            state=len(state),
        )
        # What was written over one of these files meanwhile is not lost: it is read, and all of this done again.
        ours = [link for link in links if link.path == path]
        if under is not None and announced(under.path):
            raise SnapshotError(f"{under.path}: it is about to be removed or replaced; try again later")
        if not still_there([*ours, *([] if under is None else [under])]):
            raise ChainMovedError(path)
        own, allocated = seal(staged, footer, held, layout, data, chunks, state)
        return describe(path, footer, own, allocated, footers.decode_state(state, path), durable=staged.durable)


def _union(links: Sequence[Link], like: Footer) -> tuple[DirtyPages, bool, bytes]:
    """Return the pages that any of `links` holds, whether all were sure of them, and the state of the newest."""
    held = DirtyPages.from_runs(np.empty((0, 2), np.int64), like.npages, like.page_size)
    runs: list[npt.NDArray[np.int64]] = []
    exact, state, waiting, least = True, b"", 0, 1 << 16
    for link in links:
        with Layer(link.path, link.digest) as layer:
            exact = exact and layer.footer.exact
            if link is links[-1]:
                state = footers.encode_state(layer.state())
            for block in layer.blocks():
                runs.append(block)
                waiting += len(block)
                if waiting > least:
                    # In batches as large as the set itself: as much memory, and no more than a logarithm of the work.
                    held |= DirtyPages.from_runs(np.concatenate(runs), like.npages, like.page_size)
                    runs, waiting, least = [], 0, max(1 << 16, len(held.runs()))
    if runs:
        held |= DirtyPages.from_runs(np.concatenate(runs), like.npages, like.page_size)
    return held, exact, state


def rebase(
    base: StrPath,
    diff: StrPath,
    *,
    orphan: bool = False,
    sync: bool = True,
    patience: float = PATIENCE,
    search: Sequence[StrPath] = (),
    progress: Progress | None = None,
) -> Info:
    """Lay a diff, and what lies between, over one of its ancestors: `base` then holds the memory of `diff`.

    Parameters
    ----------
    base : str or path
        An ancestor of the diff, full or diff itself. It is replaced.
    diff : str or path
        The diff. It stays as it is and can still be restored, and so can what was taken over it. Files between the two
        cannot, and say so.
    orphan : bool
        Go on although other diffs of `base`, or of a file between the two, can then not be restored any more.
    sync : bool
        Survive a power cut (fsync).
    patience : float
        How long to wait for writers that are at work in the base's directory, in seconds.
    search : sequence of str or path
        Directories to look for parents in, after each file's own.
    progress : callable, optional
        Called with the bytes laid and the bytes to lay.

    Returns
    -------
    Info
        Of the new `base`.

    Raises
    ------
    SnapshotError
        `base` is not an ancestor of `diff`; a file between them is missing or damaged; other diffs would lose their
        parent, which are named; or a writer was at work all the time.
    OSError
        The disk is full, ... `base` is what it was.

    Notes
    -----
    The new base is written beside the old one and takes its place when it is whole, so twice its space is needed for a
    moment; laying the diff into the file itself would leave neither old nor new after a crash. After diffs d1 and d2,
    ``rebase(base, d1)`` then ``rebase(base, d2)`` works, with d1 deleted in between too.
    """
    base_path, diff_path = checked_path(base), checked_path(diff)
    directories = directories_of(search)

    def work() -> Info:
        with Layer(base_path) as under, Layer(diff_path) as over:
            target, target_digest = under.footer, under.place.digest
            tip, tip_digest = over.footer, over.place.digest
            first = Link(base_path, target_digest, under.identity, under.total, target.epoch)
            last = Link(diff_path, tip_digest, over.identity, over.total, tip.epoch)
        if target.holds is not None and target.holds == tip.parent_digest:
            # The base is what the diff's parent was; the parent itself may be gone.
            links = [first, last]
        else:
            chain, _ = follow(diff_path, directories)
            ours = [i for i, link in enumerate(chain[:-1]) if link.digest == target_digest]
            if not ours:
                raise SnapshotError(f"{base_path}: {diff_path} was not taken over it, nor over a diff of it")
            links = chain[ours[0] :]
        if (tip.nbytes, tip.page_size) != (target.nbytes, target.page_size):
            raise SnapshotError(f"{base_path}: {diff_path} is of another size")
        orphans = [] if orphan else siblings(links)
        if orphans:
            raise orphaned(base_path, orphans, "restore and save them first, remove them, or pass orphan=True")
        below = follow(base_path, directories)[0][:-1]
        parent = below[-1] if below else None
        like = replace(
            target,
            # What lies under the base may have been laid over with the base's own memory, which it holds no more.
            parent_digest=None if parent is None else parent.identity,
            holds=last.identity,
            time=tip.time,
            epoch=tip.epoch,
            named=tip.named,
            regions=tip.regions,
        )
        return join(base_path, links, like, sync=sync, progress=progress, under=parent)

    place, plain = os.path.split(base_path)
    # What the base holds will be gone, as if it had been removed: no diff over it may appear meanwhile.
    with Removal(place, [plain], patience=patience, sync=sync):
        found: Info = settled(work)
    return found


def flatten(
    path: StrPath, *, sync: bool = True, search: Sequence[StrPath] = (), progress: Progress | None = None
) -> Info:
    """Make a diff a full snapshot in place: it holds what it restored to, and its own diffs restore as before.

    Parameters
    ----------
    path, sync, search, progress
        As for :func:`rebase`.

    Returns
    -------
    Info
        Of the full snapshot.

    Raises
    ------
    SnapshotError, OSError
        A file of its chain is missing or damaged, or the disk is full; the diff is what it was.
    """
    name = checked_path(path)
    directories = directories_of(search)

    def work() -> Info:
        links, tip = follow(name, directories)
        like = replace(tip, kind="full", parent=None, parent_digest=None, holds=links[-1].identity)
        return join(name, links, like, sync=sync, progress=progress)

    found: Info = settled(work)
    return found
