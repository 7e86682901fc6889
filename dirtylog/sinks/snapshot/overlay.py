"""Lays diffs over a snapshot they were taken over, so that one file holds what a chain held."""

from __future__ import annotations

import os
from contextlib import ExitStack

import numpy as np
import numpy.typing as npt

from dirtylog.sinks._pageio import read_extents, write_extents
from dirtylog.sinks.extents import WINDOW, PackedExtents
from dirtylog.sinks.snapshot import sidecar as sidecars
from dirtylog.sinks.snapshot.chain import Info, Layer, Progress, StrPath, checked_path, describe, follow
from dirtylog.sinks.snapshot.sidecar import Sidecar, SnapshotError, hasher
from dirtylog.sinks.snapshot.staged import Staged, finish

__all__ = ["rebase"]


def rebase(base: StrPath, diff: StrPath, *, sync: bool = True, progress: Progress | None = None) -> Info:
    """Lay a diff, and what lies between, over one of its ancestors: `base` then holds the memory of `diff`.

    Parameters
    ----------
    base : str or path
        An ancestor of the diff, full or diff itself. It is replaced.
    diff : str or path
        The diff. It stays as it is and can still be restored if `base` was its direct parent; other diffs of the old
        `base` cannot, and say so.
    sync : bool
        Survive a power cut (fsync).
    progress : callable, optional
        Called with the bytes laid and the bytes to lay.

    Returns
    -------
    Info
        Of the new `base`.

    Raises
    ------
    SnapshotError
        `base` is no ancestor of `diff`, or a file between them is missing or damaged.
    OSError
        The disk is full, ... `base` is what it was.

    Notes
    -----
    The new base is written beside the old one and takes its place when it is whole, so twice its space is needed for a
    moment; laying the diff into the file itself would leave neither old nor new after a crash. After diffs d1 and d2,
    ``rebase(base, d1)`` then ``rebase(base, d2)`` works, with d1 deleted in between too.
    """
    base_path, diff_path = checked_path(base), checked_path(diff)
    finish(base_path)
    target, _ = sidecars.read(base_path)
    tip, tip_digest = sidecars.read(diff_path)
    if target.holds is not None and target.holds == tip.parent_digest:
        # The base is what the diff's parent was; the parent itself may be gone.
        chain = [(base_path, target), (diff_path, tip)]
    else:
        files = [(name, sidecar) for name, sidecar, _ in follow(diff_path)]
        ours = [i for i, (_, sidecar) in enumerate(files[:-1]) if sidecar.id == target.id]
        if not ours:
            raise SnapshotError(f"{base_path}: {diff_path} was not taken over it, nor over a diff of it")
        chain = files[ours[0] :]
    if any((s.nbytes, s.page_size) != (target.nbytes, target.page_size) for _, s in chain):
        raise SnapshotError(f"{base_path}: {diff_path} is of another size")
    staging = memoryview(bytearray(WINDOW))
    with ExitStack() as stack:
        layers = [stack.enter_context(Layer(name, sidecar)) for name, sidecar in chain]
        staged = stack.enter_context(Staged(base_path, target.nbytes, sync=sync))
        total, done = sum(layer.packed.total for layer in layers), 0
        held = layers[0].pages
        for layer in layers:

            def lay(part: memoryview, extents: npt.NDArray[np.int64], sound: bool, layer: Layer = layer) -> None:
                nonlocal done
                layer.require(extents, sound)
                write_extents(staged.descriptor, part, extents, packed=True, name=base_path)
                done += part.nbytes
                if progress is not None:
                    progress(done, total)

            layer.read(staging, lay)
            held = held | layer.pages
        chunks = []
        digest = hasher(target.algorithm)
        for begin, end, extents in PackedExtents(held, target.nbytes).windows():
            part = staging[: end - begin]
            read_extents(staged.descriptor, part, extents, packed=True, name=staged.part)
            chunks.append(digest(part))
        allocated = os.fstat(staged.descriptor).st_blocks * 512
        sidecar = Sidecar(
            id=staged.id,
            kind=target.kind,
            page_size=target.page_size,
            nbytes=target.nbytes,
            count=held.count,
            exact=held.exact,
            bitmap=sidecars.pack_pages(held),
            parent=target.parent,
            parent_digest=target.parent_digest,
            holds=tip_digest,
            epoch=tip.epoch,
            algorithm=target.algorithm,
            chunks=tuple(chunks),
        )
        return describe(base_path, sidecar, staged.commit(sidecar), allocated)
