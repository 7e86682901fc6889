"""Writes snapshots: a full one, or a diff that holds only what was dirty."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dirtylog._bits.copying import gather
from dirtylog._bits.flat import flat_bytes
from dirtylog._bits.pages import DirtyPages, check_geometry
from dirtylog._core import zero_pages
from dirtylog.sinks._pageio import write_extents
from dirtylog.sinks.extents import WINDOW, PackedExtents
from dirtylog.sinks.snapshot import sidecar as sidecars
from dirtylog.sinks.snapshot.chain import Info, Progress, StrPath, checked_path, describe
from dirtylog.sinks.snapshot.sidecar import Sidecar, SnapshotError, hasher
from dirtylog.sinks.snapshot.staged import Staged, finish

if TYPE_CHECKING:
    from dirtylog._typing import Memory

__all__ = ["save", "save_diff"]


@dataclass(frozen=True, slots=True)
class _How:
    """The options that all writers share."""

    epoch: int | None
    digest: str
    sync: bool
    replace: bool
    progress: Progress | None


def _check_target(path: str, how: _How) -> None:
    hasher(how.digest)
    if how.epoch is not None and not 0 <= how.epoch < 1 << 63:
        raise ValueError(f"epoch is {how.epoch}; it must be between 0 and 2**63 - 1")
    if not how.replace and (os.path.lexists(path) or os.path.lexists(path + sidecars.SUFFIX)):
        raise FileExistsError(17, "a snapshot is not overwritten, for its diffs would lose their parent "
                              "(pass replace=True, or another name)", path)  # fmt: skip


def _save(path: str, view: memoryview, pages: DirtyPages, parent: tuple[str, str] | None, how: _How) -> Info:
    if pages.npages > sidecars.MAX_PAGES:
        raise ValueError(f"the memory has {pages.npages} pages; a snapshot has at most {sidecars.MAX_PAGES}")
    _check_target(path, how)
    finish(path)
    packed = PackedExtents(pages, view.nbytes)
    digest = hasher(how.digest)
    staging = memoryview(bytearray(min(WINDOW, packed.total)))
    chunks = []
    with Staged(path, view.nbytes, sync=how.sync) as staged:
        for begin, end, extents in packed.windows():
            # Copied once, digested and written from the copy: the memory may change all the while.
            part = staging[: end - begin]
            gather(view, extents, part)
            chunks.append(digest(part))
            write_extents(staged.descriptor, part, extents, packed=True, name=path)
            if how.progress is not None:
                how.progress(end, packed.total)
        allocated = os.fstat(staged.descriptor).st_blocks * 512
        sidecar = Sidecar(
            id=staged.id,
            kind="full" if parent is None else "diff",
            page_size=pages.page_size,
            nbytes=view.nbytes,
            count=pages.count,
            exact=pages.exact,
            bitmap=sidecars.pack_pages(pages),
            parent=parent and parent[0],
            parent_digest=parent and parent[1],
            holds=None,
            epoch=how.epoch,
            algorithm=how.digest,
            chunks=tuple(chunks),
        )
        return describe(path, sidecar, staged.commit(sidecar), allocated)


def save(
    path: StrPath,
    memory: Memory,
    *,
    page_size: int = 4096,
    epoch: int | None = None,
    digest: str = "xxh3_128",
    sync: bool = True,
    replace: bool = False,
    progress: Progress | None = None,
) -> Info:
    """Write a full snapshot of memory; pages that are zero become holes.

    Parameters
    ----------
    path : str or path
        The data file; the sidecar is ``path + ".json"``.
    memory : buffer
        C-contiguous memory of any size; the last page may be partial.
    page_size : int
        In bytes.
    epoch : int, optional
        Number to note in the sidecar.
    digest : str
        ``"xxh3_128"`` (needs xxhash) or ``"blake2b_128"``.
    sync : bool
        Survive a power cut (fsync). Without, only the end of this process.
    replace : bool
        Take the place of a snapshot of that name. Its diffs cannot be restored any more.
    progress : callable, optional
        Called with the bytes written and the bytes to write, once a MiB.

    Returns
    -------
    Info

    Raises
    ------
    OSError
        FileExistsError without `replace`; or the disk is full, ... What was there before is there still.
    ValueError, TypeError
        `memory` is no C-contiguous buffer, or the name will not do.

    Notes
    -----
    O(memory). For memory that is written meanwhile, collect the epoch first and save afterwards (I3): what changes
    during the copy is in the next epoch. Allocates 1 MiB and a bitmap. The GIL is released during the copies.

    Examples
    --------
    >>> import tempfile, numpy as np
    >>> from dirtylog import DirtyPages
    >>> memory = np.zeros(1 << 20, np.uint8)
    >>> memory[5000] = 1
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     base = save(directory + "/base", memory)
    ...     memory[9000] = 2
    ...     diff = save_diff(directory + "/diff", memory, DirtyPages.from_indices([2], 256), parent=directory + "/base")
    ...     bool((restore(directory + "/diff") == memory).all()), base.count, diff.count
    (True, 1, 1)
    """
    view = flat_bytes(memory)
    _, page_size = check_geometry(0, page_size)
    zeros = zero_pages(view, page_size)
    held = DirtyPages._all(zeros.npages, page_size, exact=True) - zeros
    return _save(checked_path(path), view, held, None, _How(epoch, digest, sync, replace, progress))


def save_diff(
    path: StrPath,
    memory: Memory,
    pages: DirtyPages,
    *,
    parent: StrPath,
    epoch: int | None = None,
    digest: str = "xxh3_128",
    sync: bool = True,
    replace: bool = False,
    progress: Progress | None = None,
) -> Info:
    """Write the pages that changed since `parent`; the others become holes.

    Parameters
    ----------
    path, memory, epoch, digest, sync, replace, progress
        As for :func:`save`. `memory` is all of it, not only what changed.
    pages : DirtyPages
        What to write; more than changed is fine, less is not.
    parent : str or path
        The snapshot, full or diff, that the pages are dirty against; in the same directory.

    Returns
    -------
    Info

    Raises
    ------
    SnapshotError
        The parent is missing or damaged, or of another geometry.
    ValueError
        `pages` does not describe `memory`, or the parent is elsewhere.
    OSError
        As for :func:`save`.

    Notes
    -----
    O(dirty). Raises before the epoch is committed if called inside ``with observer.collect() as epoch``, so a failure
    leaves the pages dirty for the next try. Clear before copy (I3) holds there because collecting has cleared.
    """
    view = flat_bytes(memory)
    name, parent_path = checked_path(path), checked_path(parent)
    if not isinstance(pages, DirtyPages):
        raise TypeError(f"pages is {type(pages).__name__}; DirtyPages are needed")
    if pages.npages != -(-view.nbytes // pages.page_size):
        raise ValueError(
            f"pages has {pages.npages} pages of {pages.page_size} bytes; the memory of {view.nbytes} bytes has "
            f"{-(-view.nbytes // pages.page_size)}"
        )
    directories = [os.path.dirname(p) or "." for p in (name, parent_path)]
    if not os.path.samefile(*directories):
        raise ValueError(f"the parent is in {directories[1]!r}; it must be in the diff's directory {directories[0]!r}")
    if os.path.basename(name) == os.path.basename(parent_path):
        raise ValueError(f"{name!r} cannot be its own parent; give the diff another name")
    above, parent_digest = sidecars.read(parent_path)
    if (above.nbytes, above.page_size) != (view.nbytes, pages.page_size):
        raise SnapshotError(
            f"{parent_path}: the parent has {above.nbytes} bytes in pages of {above.page_size}; the memory has "
            f"{view.nbytes} in pages of {pages.page_size}"
        )
    link = (os.path.basename(parent_path), parent_digest)
    return _save(name, view, pages, link, _How(epoch, digest, sync, replace, progress))
