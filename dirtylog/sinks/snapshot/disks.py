"""Backs up the disk of a running QEMU into a chain of snapshots: full once, then what its dirty bitmap names.

The chain is the record of what was delivered. Each snapshot notes in its state the bitmap that records since its
moment; the next backup begins at that bitmap, whatever became of the process that made the last one, or of QEMU.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import shutil
import subprocess
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import SupportsIndex, TypeVar

import numpy as np
import numpy.typing as npt

from dirtylog._bits.pages import DirtyPages
from dirtylog.errors import BackendUnavailable, DirtyLogError, IncompleteLogWarning
from dirtylog.log import DirtyLog, Epoch
from dirtylog.sinks.snapshot.chain import Info, Progress, StrPath
from dirtylog.sinks.snapshot.footer import Row, SnapshotError, best_digest
from dirtylog.sinks.snapshot.images import restore_image
from dirtylog.sinks.snapshot.reader import info
from dirtylog.sinks.snapshot.staged import rename_new
from dirtylog.sinks.snapshot.upkeep import catalog
from dirtylog.sinks.snapshot.writer import How, parent_link, write
from dirtylog.sources._channel import Address
from dirtylog.sources.qemu import QemuDisk, Qmp

__all__ = [
    "Backup",
    "Chain",
    "alone_in",
    "as_image",
    "back_up",
    "collected",
    "disk_of",
    "forget",
    "gone_on_with",
    "newest",
    "restore_disk",
]

GRANULARITY = 65536
_SUFFIX = ".backup"

_Answer = TypeVar("_Answer")


@dataclass(frozen=True, slots=True)
class Backup:
    """What :func:`back_up` did.

    Parameters
    ----------
    info : Info
        The snapshot that was written.
    why_full : str
        Why all of the disk was copied; empty for an incremental backup.
    """

    info: Info
    why_full: str


class _Space:
    """The disk as the page space of a snapshot."""

    named = False

    def __init__(self, disk: QemuDisk) -> None:
        self._disk = disk
        self.page_size: int = disk.page_size
        self.nbytes: int = disk.size
        self.npages: int = disk.npages

    def rows(self) -> tuple[Row, ...]:
        """Return what the footer says: bytes."""
        return (("", "|u1", (self.nbytes,), "C", 0, self.nbytes),)

    def gather(self, extents: npt.NDArray[np.int64], packed: memoryview) -> None:
        """Read extents one after the other into `packed`."""
        at = 0
        for offset, length in extents.tolist():
            self._disk.read_bytes(offset, packed[at : at + length])
            at += length


@dataclass(frozen=True, slots=True)
class Chain:
    """What a backup notes of the disk, for the next one.

    Parameters
    ----------
    node : str
        The disk's.
    name, bitmap : str
        What the names of its bitmaps begin with, and the one that records since the backup's moment.
    page_size, nbytes : int
        Of the bitmap, and of the disk.
    """

    node: str
    name: str
    bitmap: str
    page_size: int
    nbytes: int

    @classmethod
    def of(cls, note: object, page_size: int, nbytes: int) -> Chain | None:
        """Read what was noted; None if it is something else."""
        parts = [note.get(key) for key in ("node", "name", "bitmap")] if isinstance(note, dict) else [None]
        if not all(isinstance(part, str) for part in parts):
            return None
        node, name, bitmap = map(str, parts)
        return cls(node, name, bitmap, page_size, nbytes)


@dataclass(frozen=True, slots=True)
class _Noted:
    """A backup, and what it notes of the disk."""

    path: str
    info: Info
    chain: Chain

    @property
    def bitmap(self) -> str:
        return self.chain.bitmap


def _noted(path: str) -> _Noted | None:
    about = info(path)
    note = about.state.get("qemu") if isinstance(about.state, dict) else None
    chain = Chain.of(note, about.page_size, about.nbytes)
    return None if chain is None else _Noted(path, about, chain)


def newest(directory: StrPath) -> _Noted | None:
    """Return the newest backup of a directory that can be restored; None where there is none."""
    for entry in reversed(catalog(directory)):
        if entry.problem is None and (found := _noted(entry.path)) is not None:
            return found
    return None


@contextlib.contextmanager
def alone_in(directory: str) -> Iterator[int]:
    """Keep other backups out of the directory, until the block ends or this process does; yield its descriptor."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DirtyLogError(f"another backup into {directory} is under way; wait for its end") from None
        yield descriptor
    finally:
        os.close(descriptor)


def gone_on_with(
    last: Chain | None, node: str, full: bool, granularity: SupportsIndex | None, prefix: str
) -> tuple[str, Chain]:
    """Say whether the next backup can be of what was written since the last one, by what is known before QEMU is asked.

    Parameters
    ----------
    last : Chain, optional
        What the last backup has noted.
    node, full, granularity
        As for :func:`back_up`.
    prefix : str
        By which bitmaps of a backup to this place that was killed, and that none has noted, are known, and removed.

    Returns
    -------
    why_full : str
        Empty if it can.
    chain : Chain
        The bitmaps to use, and the one that the last backup has noted; of 0 bytes if that does not matter.
    """
    why, page_size = "", GRANULARITY if granularity is None else int(granularity.__index__())
    if last is None:
        why = "there is no backup yet"
    elif full:
        why = "it was asked for"
    elif last.node != node:
        why = f"the newest backup is of the node {last.node!r}"
    elif granularity is not None and page_size != last.page_size:
        why = f"the chain has pages of {last.page_size} bytes"
    if last is not None and last.node == node and (granularity is None or page_size == last.page_size):
        # Also where all is copied: if that fails, the chain goes on where it was.
        return why, last
    return why, Chain(node, f"{prefix}-{page_size}", "", page_size, 0)


def _next_path(directory: str) -> str:
    numbers = [
        int(entry.name.removesuffix(_SUFFIX))
        for entry in os.scandir(directory)
        if entry.name.endswith(_SUFFIX) and entry.name.removesuffix(_SUFFIX).isdecimal()
    ]
    return os.path.join(directory, f"{max(numbers, default=0) + 1:08d}{_SUFFIX}")


def back_up(
    directory: StrPath,
    qmp: Qmp,
    node: str,
    *,
    full: bool = False,
    granularity: SupportsIndex | None = None,
    moment: bool = True,
    nbd: Address | None = None,
    sync: bool = True,
    progress: Progress | None = None,
) -> Backup:
    """Copy what was written to a disk since the last backup, while the guest runs.

    Parameters
    ----------
    directory : str or path
        Where the backups are, and nothing else of dirtylog's. It is made if it does not exist.
    qmp : Qmp
        A monitor of the QEMU, or qemu-storage-daemon, that has the disk.
    node : str
        The disk's node name.
    full : bool, default False
        Copy all of it, and begin a new chain. This is so where there is no chain, where QEMU has lost the bitmap, and
        where the disk has another size.
    granularity : int, optional
        Bytes of a page: 65536, or that of the chain. Another one begins a new chain.
    moment : bool, default True
        Copy what the disk held at one moment, as after a power cut. QEMU must be able to write a scratch file in
        `directory`, which takes as much as the guest overwrites meanwhile; without room for
        it QEMU fails the guest's writes. With False each page is copied as it is
        when it is reached, and the backup is of no one moment unless the guest is paused.
    nbd : path-like or (str, int), optional
        Where QEMU's NBD server listens, if one runs already.
    sync : bool, default True
        Survive a power cut (fsync).
    progress : callable, optional
        Called with the bytes written and the bytes to write.

    Returns
    -------
    Backup

    Raises
    ------
    DirtyLogError
        Another backup into the directory is under way; or QEMU refused, or has gone.
    SnapshotError, OSError, ValueError
        As for :func:`~dirtylog.sinks.snapshot.save_diff`.

    Notes
    -----
    Nothing is lost by a failure at any point, of this process or of QEMU: the bitmap that the newest backup names is
    kept until a newer backup is on disk. O(what was written) where QEMU has the bitmap.
    """
    where = os.path.abspath(os.fspath(directory))
    os.makedirs(where, mode=0o700, exist_ok=True)
    with alone_in(where):
        last = newest(where)
        place = os.stat(where)
        prefix = f"dirtylog-{place.st_dev:x}.{place.st_ino:x}"
        why, chain = gone_on_with(None if last is None else last.chain, node, full, granularity, prefix)
        scratch = os.path.join(where, f".{chain.name}.scratch")
        with disk_of(chain, why, qmp, nbd, scratch, moment) as (disk, why):
            done = _copy(_next_path(where), disk, last, why or disk.lost, sync, progress)
        if last is not None:
            forget(qmp, last.chain, chain)
        return done


def _copy(path: str, disk: QemuDisk, last: _Noted | None, why: str, sync: bool, progress: Progress | None) -> Backup:
    """Write one backup; its epoch commits when it is on disk."""
    space = _Space(disk)
    with collected(disk) as epoch:
        note = {"qemu": {"node": disk.node, "name": disk.name, "bitmap": disk.bitmap}}
        how = How(None, best_digest(), sync, False, None, note, progress)
        if why or last is None:
            # Collected first all the same: the copy begins where the new bitmap does (I3).
            return Backup(write(path, space, disk.holds(), None, how), why)
        pages: DirtyPages = epoch.pages
        link, vouch = parent_link(path, last.path, space, how, ())
        return Backup(write(path, space, pages, link, how, vouch), "")


@contextlib.contextmanager
def disk_of(
    chain: Chain, why: str, qmp: Qmp, nbd: Address | None, scratch: str, moment: bool
) -> Iterator[tuple[QemuDisk, str]]:
    """Open the disk of a chain until the block ends; yield it, and why all of it is to be copied, its size included.

    Parameters
    ----------
    chain, why
        As :func:`gone_on_with` answers.
    qmp, nbd, moment
        As for :func:`back_up`.
    scratch : str
        The file in which QEMU keeps what is overwritten meanwhile.
    """
    within = scratch if moment else None
    disk = QemuDisk(qmp, chain.node, chain.page_size, name=chain.name, since=chain.bitmap, nbd=nbd, scratch=within)
    with disk:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(scratch)  # of a backup that was killed
        if not why and disk.size != chain.nbytes:
            why = f"the disk had {chain.nbytes} bytes, and has {disk.size}"
        yield disk, why


@contextlib.contextmanager
def collected(disk: QemuDisk) -> Iterator[Epoch]:
    """Collect what was written to a disk; the epoch commits when the block ends, and what it holds is delivered."""
    log = DirtyLog()
    log.attach(disk)
    with log.observer("backup") as observer, warnings.catch_warnings():
        # A bitmap that is lost is the reason of a full backup, and said in its answer.
        warnings.simplefilter("ignore", IncompleteLogWarning)
        with observer.collect() as epoch:
            yield epoch


def forget(qmp: Qmp, last: Chain, chain: Chain) -> None:
    """Remove the bitmaps of a chain if another is gone on with; one that is gone, or on another disk, is no matter."""
    if (last.name, last.node) == (chain.name, chain.node):
        return
    for node in qmp.execute("query-named-block-nodes", {"flat": True}):
        if node.get("node-name") == last.node:
            for bitmap in node.get("dirty-bitmaps", []):
                if str(bitmap.get("name", "")).startswith(f"{last.name}-"):
                    with contextlib.suppress(DirtyLogError):
                        qmp.execute("block-dirty-bitmap-remove", {"node": last.node, "name": bitmap["name"]})


def restore_disk(backup: StrPath, image: StrPath, *, format: str = "raw", progress: Progress | None = None) -> Info:
    """Write the disk of a backup to an image.

    Parameters
    ----------
    backup : str or path
        A backup, or a directory of them: its newest.
    image : str or path
        File to write; it must not exist, and appears whole or not at all.
    format : str, default "raw"
        Or "qcow2", "vmdk", "vhdx", ...: what ``qemu-img convert -O`` makes.
    progress : callable, optional
        Called with the bytes written and the bytes to write.

    Returns
    -------
    Info
        Of the backup.

    Raises
    ------
    FileExistsError
        There is a file of the image's name.
    BackendUnavailable
        Another format than raw needs qemu-img.
    SnapshotError, OSError
        There is no backup, it is damaged, or the image cannot be written.
    """
    path = os.fspath(backup)
    if os.path.isdir(path):
        last = newest(path)
        if last is None:
            raise SnapshotError(f"{path}: there is no backup in it that can be restored")
        path = last.path
    return as_image(image, format, lambda raw: restore_image(path, raw, progress=progress))


def as_image(image: StrPath, format: str, write_raw: Callable[[str], _Answer]) -> _Answer:
    """Make an image of a format by a function that makes a raw one; as :func:`restore_disk`."""
    target = os.path.abspath(os.fspath(image))
    if os.path.lexists(target):
        raise FileExistsError(errno.EEXIST, "an image is not overwritten; remove it, or give another name", target)
    if format == "raw":
        return write_raw(target)
    program = shutil.which("qemu-img")
    if program is None:
        raise BackendUnavailable(f"an image of format {format}", "qemu-img is not on PATH", "restore a raw image")
    stem = os.path.join(os.path.dirname(target), f".{secrets.token_hex(8)}")
    raw, made = f"{stem}.raw", f"{stem}.image"
    try:
        answer = write_raw(raw)
        command = [program, "convert", "-f", "raw", "-O", format, raw, made]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        if done.returncode:
            raise DirtyLogError(f"qemu-img could not make the image: {done.stderr.strip()[:1000]}")
        with open(made, "rb") as file:
            os.fsync(file.fileno())
        rename_new(made, target)
        return answer
    finally:
        for left in (raw, made):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(left)
