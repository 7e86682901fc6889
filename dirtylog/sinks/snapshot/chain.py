"""The files of a snapshot, from its base to the diff asked for: found, checked, and read in windows one at a time."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from dirtylog._bits.pages import DirtyPages
from dirtylog.sinks._bytes.extents import WINDOW, PackedExtents
from dirtylog.sinks._bytes.pageio import read_extents
from dirtylog.sinks.snapshot import footer as footers
from dirtylog.sinks.snapshot.footer import DIGEST_BYTES, Footer, Place, SnapshotError, hasher

__all__ = [
    "MAX_CHAIN",
    "ChainMovedError",
    "Info",
    "Layer",
    "Link",
    "Progress",
    "StrPath",
    "checked_path",
    "describe",
    "directories_of",
    "find",
    "follow",
    "lay",
    "settled",
    "still_there",
]

Progress = Callable[[int, int], object]
StrPath = str | os.PathLike[str]
Use = Callable[[memoryview, npt.NDArray[np.int64], bool], object]

# A forged chain may be endless only as far as there are files: a file cannot have its own digest as its parent's.
MAX_CHAIN = 1_000_000
# How often a reader starts again because writers replaced what it was reading.
RETRIES = 100


class ChainMovedError(Exception):
    """A file of a chain was replaced between two looks at it; the reader starts again."""


@dataclass(frozen=True, slots=True)
class Info:
    """What a snapshot is, from its footer.

    Parameters
    ----------
    path, kind : str
        File name, absolute; ``"full"`` or ``"diff"``.
    nbytes, page_size, npages : int
        Size of the memory in bytes, page size in bytes, size in pages.
    count, exact : int, bool
        How many pages the file holds, and whether the source that reported them was sure.
    parent : str or None
        Name of the parent.
    epoch : int or None
        Number of the epoch the pages came from.
    algorithm, digest : str
        How the windows' digests were made; the snapshot's own digest.
    allocated : int
        Bytes that the file takes on disk.
    names : tuple of str
        Names of the arrays; empty where the memory was given without a name.
    state : object
        What the caller saved beside the memory; tuples have become lists.
    durable : bool
        Whether it was synced, so that it survives a power cut; True of what was read back.
    time : float
        When the memory was as it is, in seconds since 1970; after the newest that lay in the directory, if the clock
        was put back.
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
    names: tuple[str, ...] = ()
    state: Any = None
    durable: bool = True
    time: float = 0.0


def checked_path(path: StrPath) -> str:
    """Return the absolute path of a snapshot.

    Raises
    ------
    ValueError
        A footer could not name the file.
    """
    name = os.fspath(path)
    if not isinstance(name, str):
        raise TypeError(f"path is {type(name).__name__}; a str or a path is needed")
    plain = os.path.basename(name)
    if not footers.plain_name(plain):
        raise ValueError(
            f"the file name {plain!r} will not do for a snapshot: it must be of 1 to {footers.MAX_NAME} printable "
            "characters and begin with no dot"
        )
    # Made absolute once: a change of directory meanwhile is no matter of ours.
    return os.path.abspath(name)


def directories_of(search: Sequence[StrPath]) -> list[str]:
    """Return the absolute paths of directories to look for parents in, after each file's own."""
    return [os.path.abspath(os.fspath(each)) for each in search]


def describe(
    path: str, footer: Footer, digest: str, allocated: int, state: Any = None, *, durable: bool = True
) -> Info:
    """Return what a checked footer says."""
    return Info(
        path, footer.kind, footer.nbytes, footer.page_size, footer.npages, footer.count, footer.exact,
        footer.parent, footer.epoch, footer.algorithm, digest, allocated,
        tuple(region[0] for region in footer.regions) if footer.named else (), state, durable,
        footer.time / 1e9,
    )  # fmt: skip


class Layer:
    """One file of a chain, open, with its footer checked.

    Parameters
    ----------
    path : str
        The file.
    expected : str, optional
        The digest it had when the chain was followed.

    Raises
    ------
    SnapshotError
        It is missing, no regular file, or its footer cannot be used.
    ChainMovedError
        It has another digest than `expected`.
    """

    descriptor: int = -1

    def __init__(self, path: str, expected: str | None = None) -> None:
        self.path = path
        try:
            # Not blocking, and a regular file only: a name in a directory somebody else fills may be a pipe.
            self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except FileNotFoundError:
            if expected is not None:
                raise ChainMovedError(path) from None
            raise SnapshotError(f"{path}: there is no such snapshot") from None
        try:
            status = os.fstat(self.descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise SnapshotError(f"{path}: the footer cannot be used: it is not a regular file")
            self.allocated: int = status.st_blocks * 512
            self.footer: Footer
            self.place: Place
            self.footer, self.place = footers.read(self.descriptor, path)
            if expected is not None and self.place.digest != expected:
                raise ChainMovedError(path)
            self.total: int = self.place.held
        except BaseException:
            self.close()
            raise

    @property
    def identity(self) -> str:
        """What a child notes of its parent: the digest, or that of the snapshot whose memory the file now holds.

        So a file can be merged, flattened or laid over any number of times: as long as it holds the memory that a
        child was taken over, it serves as that child's parent.
        """
        return self.footer.holds or self.place.digest

    def close(self) -> None:
        """Close the file."""
        descriptor, self.descriptor = self.descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def __enter__(self) -> Self:
        """Return the open layer."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the file."""
        self.close()

    def state(self) -> Any:
        """Read the user's state."""
        text = footers.read_whole(self.descriptor, self.place.state, self.footer.state, self.path)
        return footers.decode_state(text, self.path)

    def blocks(self) -> Iterator[npt.NDArray[np.int64]]:
        """Read the runs of held pages in blocks."""
        return footers.page_blocks(self.descriptor, self.footer, self.place.pages, self.path)

    def pages(self) -> DirtyPages:
        """Return the set of held pages."""
        runs = [np.empty((0, 2), np.int64), *self.blocks()]
        footer = self.footer
        return DirtyPages.from_runs(np.concatenate(runs), footer.npages, footer.page_size, exact=footer.exact)

    def pieces(self) -> Iterator[npt.NDArray[np.int64]]:
        """Go through the held pages in blocks: offset in memory, length and offset in the file of each run."""
        at = 0
        for block in self.blocks():
            extents = extents_of_runs(block, self.footer.page_size, self.footer.nbytes)
            yield self.place.layout.pieces(at, extents)
            at += int(extents[:, 1].sum())

    def windows(self) -> Iterator[tuple[int, npt.NDArray[np.int64]]]:
        """Go through the held pages in windows: how many bytes, and the extents of the memory they are of."""
        return windows(self.blocks(), self.footer.page_size, self.footer.nbytes)

    def read(self, staging: memoryview, use: Use) -> None:
        """Read the held pages window by window into `staging` and call ``use(bytes, extents, sound)`` for each."""
        digest = hasher(self.footer.algorithm)
        at = self.place.digests
        expected = b""
        begin = 0
        for size, extents in self.windows():
            part = staging[:size]
            places = self.place.layout.window(begin, extents)
            read_extents(self.descriptor, part, places, packed=True, name=self.path)
            begin += size
            if not expected:
                length = min(footers.BLOCK, self.place.state - at)
                expected = footers.read_whole(self.descriptor, at, length, self.path)
                at += len(expected)
            use(part, extents, digest(part) == expected[:DIGEST_BYTES])
            expected = expected[DIGEST_BYTES:]

    def where(self, extents: npt.NDArray[np.int64]) -> str:
        """Name the file and the pages of a window."""
        size = self.footer.page_size
        return f"{self.path}: pages {extents[0, 0] // size} to {(int(extents[-1].sum()) - 1) // size}"

    def require(self, extents: npt.NDArray[np.int64], sound: bool) -> None:
        """Raise unless a window matched its digest."""
        if not sound:
            place = self.where(extents)
            raise SnapshotError(f"{place}: the data does not match its digest", (place,))


def extents_of_runs(runs: npt.NDArray[np.int64], page_size: int, nbytes: int) -> npt.NDArray[np.int64]:
    """Return where ascending runs of pages lie in memory of so many bytes, which may end within a page."""
    # I9: page i is bytes [i * page_size, (i + 1) * page_size) of the page space.
    extents = runs * np.int64(page_size)
    extents[-1, 1] -= max(int(extents[-1].sum()) - nbytes, 0)
    return extents


def windows(
    blocks: Iterator[npt.NDArray[np.int64]], page_size: int, nbytes: int
) -> Iterator[tuple[int, npt.NDArray[np.int64]]]:
    """Cut blocks of runs into windows: as :meth:`PackedExtents.windows`, without holding all the runs at once."""
    left = np.empty((0, 2), np.int64)
    for block in blocks:
        extents = extents_of_runs(block, page_size, nbytes)
        packed = PackedExtents.of_extents(np.concatenate([left, extents]) if len(left) else extents)
        whole = packed.total // WINDOW * WINDOW
        for begin in range(0, whole, WINDOW):
            yield WINDOW, packed.window(begin, begin + WINDOW)
        left = packed.window(whole, packed.total) if packed.total > whole else np.empty((0, 2), np.int64)
    if len(left):
        yield int(left[:, 1].sum()), left


@dataclass(frozen=True, slots=True)
class Link:
    """One file of a chain, as far as it is kept while the chain is read.

    Parameters
    ----------
    path, digest, identity : str
        The file, its digest, and what its children note of it.
    total : int
        Bytes of the pages it holds.
    epoch : int or None
        The epoch it noted.
    """

    path: str
    digest: str
    identity: str
    total: int
    epoch: int | None


def find(name: str, digest: str, holds: set[str], directories: Sequence[str]) -> tuple[str, Layer | None, str | None]:
    """Look for a parent: its path, open if it is the right one, and else the reason of the first that is there."""
    reason = None
    for directory in directories:
        path = os.path.join(directory, name)
        try:
            layer = Layer(path)
        except SnapshotError as error:
            if os.path.lexists(path) or reason is None:
                reason = f"its parent cannot be used: {error}"
            continue
        if digest in (layer.place.digest, layer.footer.holds) or layer.footer.holds in holds:
            return path, layer, None
        layer.close()
        reason = f"its parent {path} is not the one it was taken over"
    return os.path.join(directories[0], name), None, reason


def follow(path: str, search: Sequence[str] = ()) -> tuple[list[Link], Footer]:
    """Follow the parents from `path` to the full snapshot; the base comes first. One file is open at a time.

    Parameters
    ----------
    path : str
        Absolute path of the snapshot.
    search : sequence of str
        Directories to look for parents in, after the child's own.

    Returns
    -------
    list of Link, Footer
        The chain, and the footer of `path`.

    Raises
    ------
    SnapshotError
        A file is missing, damaged, or not the one its child was taken over.

    Notes
    -----
    After a rebase a base holds the memory of one of its former descendants. It serves as the parent if that descendant
    is on the way, or is the very parent that is looked for: laying the same pages over it once more changes nothing.
    """
    chain: list[Link] = []
    digests: set[str] = set()
    identities: set[str] = set()
    layer: Layer | None = Layer(path)
    tip = below = None
    while layer is not None:
        with layer:
            footer, digest = layer.footer, layer.place.digest
            if below is None:
                tip = footer
            elif (below.nbytes, below.page_size) != (footer.nbytes, footer.page_size):
                raise SnapshotError(f"{chain[-1].path}: its parent {path} is of another size")
            if digest in digests or len(chain) >= MAX_CHAIN:
                raise SnapshotError(
                    f"{chain[0].path}: its chain comes back to {path}, or is longer than {MAX_CHAIN} files"
                )
            digests.add(digest)
            identities.update((digest, layer.identity))
            chain.append(Link(path, digest, layer.identity, layer.total, footer.epoch))
            below = footer
        if footer.parent is None or footer.parent_digest is None:
            break
        child = path
        directories = [os.path.dirname(path), *search]
        path, layer, reason = find(footer.parent, footer.parent_digest, identities, directories)
        if reason is not None:
            # Upkeep replaces a child, then removes its old parents: a reader that has the old child looks again.
            if not still_there(chain):
                raise ChainMovedError(child)
            raise SnapshotError(f"{child}: {reason}")
    assert tip is not None
    return chain[::-1], tip


def still_there(links: Sequence[Link]) -> bool:
    """Say whether files are what they were when they were followed, by a look at their trailers."""
    for link in links:
        try:
            descriptor = os.open(link.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            try:
                end = os.fstat(descriptor).st_size - footers.TRAILER.size
                raw = os.pread(descriptor, footers.TRAILER.size, max(end, 0))
            finally:
                os.close(descriptor)
        except OSError:
            return False
        fields = footers.TRAILER.unpack(raw) if len(raw) == footers.TRAILER.size else None
        if fields is None or fields[5].hex() != link.digest or fields[2] + fields[4] != end:
            return False
    return True


def lay(
    links: Sequence[Link],
    put: Callable[[memoryview, npt.NDArray[np.int64]], object],
    progress: Progress | None = None,
) -> None:
    """Read the files of a chain, base first, one open at a time, and call ``put(bytes, extents)`` for each window."""
    staging = memoryview(bytearray(WINDOW))
    total, done = sum(link.total for link in links), 0
    for link in links:
        with Layer(link.path, link.digest) as layer:

            def use(part: memoryview, extents: npt.NDArray[np.int64], sound: bool, layer: Layer = layer) -> None:
                nonlocal done
                layer.require(extents, sound)
                put(part, extents)
                done += part.nbytes
                if progress is not None:
                    progress(done, total)

            layer.read(staging, use)


def settled(work: Callable[[], Any]) -> Any:
    """Do `work` again for as long as writers replace files of the chain in between.

    Raises
    ------
    SnapshotError
        They did it a hundred times.
    """
    for _ in range(RETRIES):
        try:
            return work()
        except ChainMovedError as error:
            moved = error
    raise SnapshotError(f"{moved}: writers replaced it {RETRIES} times while it was read; try again")
