"""Reads snapshots: restores the memory of a chain, verifies every byte of it, says what it is."""

from __future__ import annotations

import os
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dirtylog._bits.copying import scatter
from dirtylog._bits.flat import flat_bytes
from dirtylog._bits.pages import DirtyPages
from dirtylog.sinks._pageio import data_extents, read_extents
from dirtylog.sinks.extents import WINDOW, PackedExtents
from dirtylog.sinks.snapshot import sidecar as sidecars
from dirtylog.sinks.snapshot.chain import Info, Layer, Progress, StrPath, checked_path, describe, follow
from dirtylog.sinks.snapshot.sidecar import SnapshotError
from dirtylog.sinks.snapshot.staged import open_data

if TYPE_CHECKING:
    from dirtylog._typing import Memory

__all__ = ["info", "restore", "verify"]


def restore(path: StrPath, *, out: Memory | None = None, limit: int = 1 << 36, progress: Progress | None = None) -> Any:
    """Read the memory of a snapshot back, laying each diff of its chain over what it was taken over.

    Parameters
    ----------
    path : str or path
        The snapshot.
    out : buffer, optional
        Writable C-contiguous memory of exactly the snapshot's size; by default a new uint8 array.
    limit : int
        Refuse to allocate more bytes than this (64 GiB).
    progress : callable, optional
        Called with the bytes read and the bytes to read.

    Returns
    -------
    buffer
        `out`, or the new array.

    Raises
    ------
    SnapshotError
        A file of the chain is missing, damaged or not the one its child was taken over. Sidecars are checked before
        `out` is touched; where data turns out to be damaged, `out` is left half-written.
    ValueError
        `out` has another size; the snapshot is larger than `limit`.

    Notes
    -----
    O(memory + sum of the chain). Every digest is checked on the way.
    """
    chain = follow(checked_path(path))
    nbytes = chain[0][1].nbytes
    if out is None and nbytes > limit:
        raise ValueError(f"{path}: restoring takes {nbytes} bytes, the limit is {limit}; raise limit, or pass out")
    with ExitStack() as stack:
        layers = [stack.enter_context(Layer(name, sidecar)) for name, sidecar, _ in chain]
        if out is None:
            result: Any = np.zeros(nbytes, np.uint8)
            target = flat_bytes(result, writable=True)
        else:
            result = out
            target = flat_bytes(out, writable=True, what="out")
            if target.nbytes != nbytes:
                raise ValueError(f"out has {target.nbytes} bytes; the snapshot has {nbytes}")
            np.frombuffer(target, np.uint8)[:] = 0
        staging = memoryview(bytearray(WINDOW))
        total, done = sum(layer.packed.total for layer in layers), 0
        for layer in layers:

            def lay(part: memoryview, extents: npt.NDArray[np.int64], sound: bool, layer: Layer = layer) -> None:
                nonlocal done
                layer.require(extents, sound)
                scatter(part, extents, target)
                done += part.nbytes
                if progress is not None:
                    progress(done, total)

            layer.read(staging, lay)
    return result


def verify(path: StrPath, *, progress: Progress | None = None) -> Info:
    """Check every byte of every file of a snapshot's chain.

    Parameters
    ----------
    path : str or path
        The snapshot.
    progress : callable, optional
        Called with the bytes checked and the bytes to check.

    Returns
    -------
    Info
        Of the snapshot, which is sound.

    Raises
    ------
    SnapshotError
        It is not; `damage` says where, one line for each place.

    Notes
    -----
    Pages that a file does not hold must read as zeros: a bit that flipped in a hole is found as well. The digests find
    accidents, not an attacker.
    """
    name = checked_path(path)
    chain = follow(name)
    damage: list[str] = []
    staging = memoryview(bytearray(WINDOW))
    with ExitStack() as stack:
        layers = [stack.enter_context(Layer(each, sidecar)) for each, sidecar, _ in chain]
        total, done = sum(layer.packed.total for layer in layers), 0
        for layer in layers:

            def check(part: memoryview, extents: npt.NDArray[np.int64], sound: bool, layer: Layer = layer) -> None:
                nonlocal done
                if not sound:
                    damage.append(f"{layer.where(extents)}: the data does not match its digest")
                done += part.nbytes
                if progress is not None:
                    progress(done, total)

            layer.read(staging, check)
            size = layer.sidecar.page_size
            data = data_extents(layer.descriptor, layer.sidecar.nbytes, name=layer.path)
            first = data[:, 0] // size
            runs = np.stack([first, (data.sum(axis=1) + size - 1) // size - first], axis=1)
            other = DirtyPages.from_runs(runs, layer.sidecar.npages, size) - layer.pages
            for begin, end, extents in PackedExtents(other, layer.sidecar.nbytes).windows():
                part = staging[: end - begin]
                read_extents(layer.descriptor, part, extents, packed=True, name=layer.path)
                if np.frombuffer(part, np.uint8).any():
                    damage.append(f"{layer.where(extents)}: there is data in a page that the snapshot does not hold")
        if damage:
            raise SnapshotError(f"{name}: damaged: {'; '.join(damage[:10])}", tuple(damage))
        return describe(name, *chain[-1][1:], os.fstat(layers[-1].descriptor).st_blocks * 512)


def info(path: StrPath) -> Info:
    """Say what a snapshot is, from its sidecar alone; neither its data nor its parents are read.

    Raises
    ------
    SnapshotError
        There is none, or the sidecar or the data file's size is wrong.
    """
    name = checked_path(path)
    sidecar, digest = sidecars.read(name)
    descriptor = open_data(name, sidecar)
    try:
        return describe(name, sidecar, digest, os.fstat(descriptor).st_blocks * 512)
    finally:
        os.close(descriptor)
