"""Plain images of memory, without a footer, such as VMMs write: saved as snapshots, and written from them.

They are read and written by system calls, never through a mapping: a file that is cut meanwhile, or a disk that is
full, is then an error and not a signal that ends the process.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt

from dirtylog._bits.pages import DirtyPages, check_geometry
from dirtylog._core import compare_pages, zero_pages
from dirtylog.sinks._bytes.pageio import read_extents, write_extents
from dirtylog.sinks.snapshot import footer as footers
from dirtylog.sinks.snapshot.chain import Info, Progress, StrPath, checked_path, directories_of, follow, lay, settled
from dirtylog.sinks.snapshot.footer import Row, best_digest
from dirtylog.sinks.snapshot.reader import info, restore
from dirtylog.sinks.snapshot.staged import Staged
from dirtylog.sinks.snapshot.writer import How, parent_link, write

__all__ = ["diff_image", "restore_image", "save_image"]

SPAN = 1 << 24


class Image:
    """A file that holds memory, as the page space of a snapshot; nothing of it is kept."""

    named = False

    def __init__(self, path: str, descriptor: int, page_size: int) -> None:
        self.page_size: int = check_geometry(0, page_size)[1]
        self.path = path
        self.descriptor = descriptor
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{path} is not a regular file")
        self.nbytes: int = status.st_size
        if not self.nbytes:
            raise ValueError(f"{path} is empty: an image has at least 1 byte")
        self.npages: int = -(-self.nbytes // self.page_size)
        if not footers.MIN_PAGE_SIZE <= self.page_size <= SPAN or self.npages > footers.MAX_PAGES:
            raise ValueError(
                f"page_size is {self.page_size}; pages of an image have {footers.MIN_PAGE_SIZE} to {SPAN} bytes"
            )

    def rows(self) -> tuple[Row, ...]:
        """Return what the footer says: bytes."""
        return (("", "|u1", (self.nbytes,), "C", 0, self.nbytes),)

    def gather(self, extents: npt.NDArray[np.int64], packed: memoryview) -> None:
        """Read extents one after the other into `packed`."""
        try:
            read_extents(self.descriptor, packed, extents, packed=True, name=self.path)
        except OSError as error:
            if error.errno != errno.ENODATA:
                raise
            raise OSError(errno.ENODATA, "the image was cut while it was read", self.path) from None

    def spans(self) -> Iterator[tuple[int, memoryview]]:
        """Read all of it, a span at a time."""
        buffer = memoryview(bytearray(min(SPAN, self.nbytes)))
        for at in range(0, self.nbytes, SPAN):
            part = buffer[: min(SPAN, self.nbytes - at)]
            self.gather(np.array([[at, len(part)]]), part)
            yield at, part

    def joined(self, parts: list[tuple[int, DirtyPages]]) -> DirtyPages:
        """Join pages of spans to pages of the image."""
        runs = [pages.runs() + np.array([at // self.page_size, 0]) for at, pages in parts]
        return DirtyPages.from_runs(np.concatenate(runs), self.npages, self.page_size)


@contextmanager
def _opened(path: StrPath, page_size: int) -> Iterator[Image]:
    name = os.path.abspath(os.fspath(path))
    descriptor = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        yield Image(name, descriptor, page_size)
    finally:
        os.close(descriptor)


def save_image(
    path: StrPath,
    image: StrPath,
    *,
    page_size: int = 4096,
    epoch: int | None = None,
    sync: bool = True,
    replace: bool = False,
    progress: Progress | None = None,
) -> Info:
    """Write a full snapshot of an image; parameters as for :func:`~dirtylog.sinks.snapshot.save`."""
    name = checked_path(path)
    with _opened(image, page_size) as source:
        parts = []
        for at, part in source.spans():
            zeros = zero_pages(part, source.page_size)
            parts.append((at, DirtyPages._all(zeros.npages, zeros.page_size, exact=True) - zeros))
        how = How(epoch, best_digest(), sync, replace, None, None, progress)
        return write(name, source, source.joined(parts), None, how)


def diff_image(
    path: StrPath,
    image: StrPath,
    *,
    parent: StrPath,
    bitmap: StrPath | None = None,
    epoch: int | None = None,
    sync: bool = True,
    replace: bool = False,
    search: Sequence[StrPath] = (),
    progress: Progress | None = None,
) -> Info:
    """Write what differs between an image and a snapshot, or the pages that a bitmap names.

    Parameters
    ----------
    path, image, parent, epoch, sync, replace, search, progress
        As for :func:`~dirtylog.sinks.snapshot.save_diff`.
    bitmap : str or path, optional
        File of little-endian words; without it every page is compared.
    """
    name = checked_path(path)
    above = info(parent)
    with _opened(image, above.page_size) as source:
        if source.nbytes != above.nbytes:
            raise ValueError(
                f"{source.path} has {source.nbytes} bytes, its parent {os.fspath(parent)} {above.nbytes}: "
                "a diff is taken of memory of the same size; save a full snapshot instead"
            )
        if bitmap is None:
            there = np.asarray(restore(parent, search=search)).reshape(-1).view(np.uint8)
            pages = source.joined(
                [(at, compare_pages(part, there[at : at + len(part)], source.page_size)) for at, part in source.spans()]
            )
        else:
            with open(bitmap, "rb") as file:
                words = file.read()
            try:
                pages = DirtyPages.from_bytes(words, above.npages, above.page_size)
            except ValueError as error:
                raise ValueError(f"{os.fspath(bitmap)}: {error}") from error
        how = How(epoch, best_digest(), sync, replace, None, None, progress)
        link, vouch = parent_link(name, parent, source, how, search)
        return write(name, source, pages, link, how, vouch)


def restore_image(
    path: StrPath, image: StrPath, *, search: Sequence[StrPath] = (), progress: Progress | None = None
) -> Info:
    """Write the memory of a snapshot and its chain to a plain image, which appears whole or not at all.

    Raises
    ------
    FileExistsError
        There is a file of the image's name.
    SnapshotError, OSError
        As for :func:`~dirtylog.sinks.snapshot.restore`; or the disk is full, ... There is no image then.
    """
    name = checked_path(path)
    target = os.path.abspath(os.fspath(image))
    if os.path.lexists(target):  # said here for its message, and before the work; the rename makes it so
        raise FileExistsError(errno.EEXIST, "an image is not overwritten; remove it, or give another name", target)
    directories = directories_of(search)

    def work() -> Info:
        links, footer = follow(name, directories)
        with Staged(target, footer.nbytes, sync=True, replace=False, mode=None) as staged:

            def put(part: memoryview, extents: npt.NDArray[np.int64]) -> None:
                write_extents(staged.descriptor, part, extents, packed=True, name=target)

            lay(links, put, progress)
            about = info(name)
            staged.publish()
        return about

    found: Info = settled(work)
    return found
