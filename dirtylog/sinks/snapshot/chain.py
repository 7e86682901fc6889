"""The files of a snapshot, from its base to the diff asked for: opened and checked, to be read in windows."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from dirtylog._bits.pages import DirtyPages
from dirtylog.sinks._pageio import read_extents
from dirtylog.sinks.extents import WINDOW, PackedExtents
from dirtylog.sinks.snapshot import sidecar as sidecars
from dirtylog.sinks.snapshot.sidecar import Sidecar, SnapshotError, hasher
from dirtylog.sinks.snapshot.staged import open_data

__all__ = ["Info", "Layer", "Progress", "StrPath", "checked_path", "describe", "follow"]

Progress = Callable[[int, int], object]
StrPath = str | os.PathLike[str]

# What a chain may make a reader hold in sidecars.
MAX_CHAIN = 1024
MAX_CHAIN_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class Info:
    """What a snapshot is, from its sidecar.

    Parameters
    ----------
    path, kind : str
        File name; ``"full"`` or ``"diff"``.
    nbytes, page_size, npages : int
        Size of the memory in bytes, page size in bytes, size in pages.
    count, exact : int, bool
        How many pages the file holds, and whether the source that reported them was sure.
    parent : str or None
        Name of the parent, in the same directory.
    epoch : int or None
        Number of the epoch the pages came from.
    algorithm, digest : str
        How the digests were made; the sidecar's own.
    allocated : int
        Bytes the data file takes on disk.
    """

    path: str
    kind: str
    nbytes: int
    page_size: int
    npages: int
    count: int
    exact: bool
    parent: str | None
    epoch: int | None
    algorithm: str
    digest: str
    allocated: int


def checked_path(path: StrPath) -> str:
    """Return the path of a snapshot as a str.

    Raises
    ------
    ValueError
        A sidecar could not name the file, or the file would be taken for a sidecar.
    """
    name = os.fspath(path)
    if not isinstance(name, str):
        raise TypeError(f"path is {type(name).__name__}; a str or a path is needed")
    plain = os.path.basename(name)
    if not sidecars.plain_name(plain) or plain.endswith(sidecars.SUFFIX):
        raise ValueError(
            f"the file name {plain!r} will not do for a snapshot: it must be of 1 to {sidecars.MAX_NAME} printable "
            f"characters, begin with no dot and not end in {sidecars.SUFFIX}"
        )
    return name


def describe(path: str, sidecar: Sidecar, digest: str, allocated: int) -> Info:
    """Return what a checked sidecar says."""
    return Info(
        path, sidecar.kind, sidecar.nbytes, sidecar.page_size, sidecar.npages, sidecar.count, sidecar.exact,
        sidecar.parent, sidecar.epoch, sidecar.algorithm, digest, allocated,
    )  # fmt: skip


class Layer:
    """One file of a chain, open, with its sidecar checked and its pages unpacked."""

    def __init__(self, path: str, sidecar: Sidecar) -> None:
        self.path = path
        self.sidecar = sidecar
        self.pages: DirtyPages = sidecar.pages()
        self.packed: PackedExtents = PackedExtents(self.pages, sidecar.nbytes)
        if len(sidecar.chunks) != -(-self.packed.total // WINDOW):
            raise SnapshotError(f"{path}: {len(sidecar.chunks)} digests do not cover {self.packed.total} bytes")
        self.descriptor: int = open_data(path, sidecar)

    def __enter__(self) -> Self:
        """Return the open layer."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the data file."""
        os.close(self.descriptor)

    def read(self, staging: memoryview, use: Callable[[memoryview, npt.NDArray[np.int64], bool], object]) -> None:
        """Read the held pages window by window into `staging` and call ``use(bytes, extents, sound)`` for each."""
        digest = hasher(self.sidecar.algorithm)
        for (begin, end, extents), expected in zip(self.packed.windows(), self.sidecar.chunks, strict=True):
            part = staging[: end - begin]
            read_extents(self.descriptor, part, extents, packed=True, name=self.path)
            use(part, extents, digest(part) == expected)

    def where(self, extents: npt.NDArray[np.int64]) -> str:
        """Name the file and the pages of a window."""
        size = self.sidecar.page_size
        return f"{self.path}: pages {extents[0, 0] // size} to {(int(extents[-1].sum()) - 1) // size}"

    def require(self, extents: npt.NDArray[np.int64], sound: bool) -> None:
        """Raise unless a window matched its digest."""
        if not sound:
            place = self.where(extents)
            raise SnapshotError(f"{place}: the data does not match its digest", (place,))


def follow(path: str) -> list[tuple[str, Sidecar, str]]:
    """Follow the parents from `path` to the full snapshot; the base comes first."""
    chain: list[tuple[str, Sidecar, str]] = []
    size = 0
    while True:
        try:
            sidecar, digest = sidecars.read(path)
        except SnapshotError as error:
            if not chain:
                raise
            raise SnapshotError(f"{chain[-1][0]}: its parent cannot be used: {error}", error.damage) from None
        if chain:
            name, below, below_digest = chain[-1]
            if below.parent_digest != digest and sidecar.holds != below_digest:
                raise SnapshotError(f"{name}: its parent {path} is not the one it was taken over")
            if (below.nbytes, below.page_size) != (sidecar.nbytes, sidecar.page_size):
                raise SnapshotError(f"{name}: its parent {path} is of another size")
        chain.append((path, sidecar, digest))
        size += len(sidecar.bitmap) + 32 * len(sidecar.chunks)
        if len(chain) > MAX_CHAIN or size > MAX_CHAIN_BYTES:
            raise SnapshotError(
                f"{chain[0][0]}: its chain is longer than {MAX_CHAIN} files or {MAX_CHAIN_BYTES} bytes of sidecars; "
                "rebase, or write a full snapshot now and then"
            )
        if sidecar.parent is None:
            return chain[::-1]
        path = os.path.join(os.path.dirname(path), sidecar.parent)
