"""Backs up the disk of a running QEMU into a store: one array of bytes, of which each backup commits the dirty chunks.

The branch is the record of what was delivered, as the chain of files is in :mod:`dirtylog.sinks.snapshot.disks`. Each
commit notes the bitmap that records since its moment; the next backup begins at the bitmap that the branch's tip notes.
So a commit whose answer was lost is asked for by the next backup, and the bitmap that it replaces is kept until then.
"""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
import threading
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, SupportsIndex

import numpy as np
import numpy.typing as npt

from dirtylog._bits.pages import DirtyPages
from dirtylog._core import zero_pages
from dirtylog.errors import DirtyLogError
from dirtylog.log import Epoch
from dirtylog.sinks.snapshot.chain import Progress, StrPath
from dirtylog.sinks.snapshot.disks import Chain, alone_in, as_image, collected, disk_of, forget, gone_on_with
from dirtylog.sinks.snapshot.footer import SnapshotError
from dirtylog.sinks.snapshot.staged import Staged
from dirtylog.sinks.store.branch import BranchMoved, Version, exists, history, repository, versions
from dirtylog.sinks.store.chunks import ChunkMap
from dirtylog.sinks.store.parts import Part, Task, Written
from dirtylog.sinks.store.sink import Saved, commit_once
from dirtylog.sinks.store.zarrs import create, fits, note, write, zarr_package
from dirtylog.sources._channel import Address
from dirtylog.sources.qemu import QemuDisk, Qmp

__all__ = ["StoredBackup", "back_up", "backups", "prune", "restore_disk", "verify"]

# The array's name.
DISK = "disk"
# A chunk by default has 64 KiB, or more where there would be too many: the list of them is written with each commit.
CHUNK = 1 << 16
CHUNKS = 1 << 18
# What is read of a store at once, in bytes, and the least that is left out of an image where it is zero.
SPAN = 16 << 20
HOLE = 4096


@dataclass(frozen=True, slots=True)
class StoredBackup:
    """What :func:`back_up` did.

    Parameters
    ----------
    saved : Saved
        The snapshot that was committed, and what of the disk was written.
    why_full : str
        Why all of the disk was copied; empty for an incremental backup.
    size, page_size, chunk : int
        Bytes of the disk, of a page of its bitmap, and of a chunk.
    """

    saved: Saved
    why_full: str
    size: int
    page_size: int
    chunk: int


class _Content:
    """The disk as an array of bytes, read when it is indexed, in whatever thread, until it is closed."""

    dtype = np.dtype(np.uint8)

    def __init__(self, disk: QemuDisk) -> None:
        self.shape: tuple[int] = (disk.size,)
        self._disk: QemuDisk | None = disk
        self._lock = threading.Lock()

    def __getitem__(self, place: tuple[slice]) -> npt.NDArray[np.uint8]:
        """Read what lies at a place."""
        out = np.empty(place[0].stop - place[0].start, self.dtype)
        with self._lock:
            if self._disk is None:
                raise ValueError("the backup has ended")
            self._disk.read_bytes(place[0].start, out.data)
        return out

    def close(self) -> None:
        """Read no more: an interrupt leaves zarr's thread where it is."""
        with self._lock:
            self._disk = None


def _noted(version: Version) -> dict[str, Any] | None:
    """Return what a backup notes of the disk; None where the snapshot is something else."""
    found = version.about.get(DISK) if version.transaction else None
    if not isinstance(found, dict) or not all(type(found.get(key)) is int for key in ("size", "page_size", "chunk")):
        return None
    return found if found["chunk"] > 0 else None


def _chain(noted: dict[str, Any]) -> Chain | None:
    return Chain.of(noted, noted["page_size"], noted["size"])


def _opened(where: Any, create: bool = False) -> Any:
    """Open the repository of an address; one that is open is what it is."""
    if not isinstance(where, str | os.PathLike):
        return where
    address = os.fspath(where)
    if not create and not exists(address):
        raise SnapshotError(f"{address} has no backup: there is no repository")
    return repository(address, create=create)


@contextlib.contextmanager
def _workplace(parent: StrPath | None, key: str) -> Iterator[str]:
    """Yield a directory of the backups to one branch alone: a second one at the same time is refused."""
    within = tempfile.gettempdir() if parent is None else os.path.abspath(os.fspath(parent))
    path = os.path.join(within, f"dirtylog-{os.geteuid()}-{key}")
    with contextlib.ExitStack() as held:
        while True:
            with contextlib.suppress(FileExistsError):
                os.mkdir(path, 0o700)
            # The backup before may be removing it.
            with contextlib.suppress(FileNotFoundError):
                status = os.lstat(path)
                if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
                    raise DirtyLogError(f"{path} is not a directory of this user; remove it, or give another scratch=")
                descriptor = held.enter_context(alone_in(path))
                if os.path.samestat(os.fstat(descriptor), os.lstat(path)):
                    break
        try:
            yield path
        finally:
            with contextlib.suppress(OSError):
                os.rmdir(path)


def back_up(
    where: Any,
    qmp: Qmp,
    node: str,
    *,
    branch: str = "main",
    full: bool = False,
    granularity: SupportsIndex | None = None,
    chunk: SupportsIndex | None = None,
    moment: bool = True,
    scratch: StrPath | None = None,
    nbd: Address | None = None,
    progress: Progress | None = None,
) -> StoredBackup:
    """Commit what was written to a disk since the last backup, while the guest runs.

    Parameters
    ----------
    where : str, path or icechunk.Repository
        The store, or its address: see :func:`~dirtylog.sinks.store.repository`. It is made if it is not there.
    qmp : Qmp
        A monitor of the QEMU, or qemu-storage-daemon, that has the disk.
    node : str
        The disk's node name.
    branch : str, default "main"
        Of the repository: one for each disk.
    full : bool, default False
        Copy all of it. This is so where there is no backup, where QEMU has lost the bitmap, and where the disk, its
        pages or its chunks have another size.
    granularity : int, optional
        Bytes of a page: 65536, or that of the last backup.
    chunk : int, optional
        Bytes of a chunk: that of the last backup; or 64 KiB, and more for a disk of more than 16 GiB, so that there are
        at most 262144. A chunk is written whole if any page of it is dirty.
    moment : bool, default True
        Copy what the disk held at one moment, as after a power cut. QEMU must be able to write a scratch file in
        `scratch`, which takes as much as the guest overwrites meanwhile; without room for
        it QEMU fails the guest's writes. With False each chunk is copied as it is when
        it is reached, and the backup is of no one moment unless the guest is paused.
    scratch : path-like, optional
        A directory: that for temporary files by default.
    nbd : path-like or (str, int), optional
        Where QEMU's NBD server listens, if one runs already.
    progress : callable, optional
        Called with the bytes written and the bytes to write, from another thread.

    Returns
    -------
    StoredBackup

    Raises
    ------
    DirtyLogError
        Another backup to the branch is under way; or QEMU refused, or has gone.
    BranchMoved
        The newest snapshot of the branch is not a backup of a disk, or somebody else has committed meanwhile.
    InDoubt
        The answer to the commit was lost, and the store does not say whether it is there.
    ValueError, BackendUnavailable, OSError
        As for :class:`~dirtylog.sinks.store.StoreSink` and :class:`~dirtylog.sources.qemu.QemuDisk`.
    Exception
        What the store raised; nothing is committed.

    Notes
    -----
    Nothing is lost by a failure at any point, of this process, of QEMU or of the store: the bitmap that the branch's
    tip notes is kept until a newer backup is committed. Where a commit lands so late that the next backup has begun,
    that one is committed over it: its pages are those written since the same bitmap.

    The disk is the array ``"disk"`` of bytes. Chunks of zeros are not stored. O(what was written) where QEMU has the
    bitmap.
    """
    extent = 0 if chunk is None else int(chunk.__index__())
    if chunk is not None and not 512 <= extent <= 1 << 30:
        raise ValueError(f"chunk is {extent}; it must be from 512 bytes to 1 GiB")
    repo = _opened(where, create=True)
    key = blake2b(f"{repo.storage} {branch}".encode(), digest_size=8).hexdigest()
    with _workplace(scratch, key) as directory:
        session = repo.writable_session(branch)
        tip = next(versions(repo, snapshot_id=session.snapshot_id))
        said = _noted(tip)
        last = None if said is None else _chain(said)
        if last is None and not full and (tip.parent is not None or tip.transaction):
            raise BranchMoved(
                f"the newest snapshot of {branch!r}, {tip.snapshot}, is not a backup of a disk: pass full=True "
                "(--full) to write all of the disk over it, or another branch"
            )
        why, chain = gone_on_with(last, node, full, granularity, f"dirtylog-{key}")
        if not why and said is not None and extent not in (0, said["chunk"]):
            why = f"the last backup has chunks of {said['chunk']} bytes"
        file = os.path.join(directory, "scratch")
        with disk_of(chain, why, qmp, nbd, file, moment) as (disk, why):
            extent = extent or (said["chunk"] if said else 0) or _chunk(disk)
            with contextlib.closing(_Content(disk)) as content:
                part = Part(DISK, content, "|u1", ChunkMap((disk.size,), (extent,), 1), sparse=True)
                if not why and not fits(session.store, part):
                    why = f"the array of the newest snapshot is not of {disk.size} bytes in chunks of {extent}"
                why = why or disk.lost
                with collected(disk) as epoch:
                    done = _Copy(repo, branch, session, disk, chain.bitmap, part, progress).deliver(epoch, why)
        if last is not None:
            forget(qmp, last, chain)
        return done


def _chunk(disk: QemuDisk) -> int:
    extent = max(CHUNK, disk.page_size)
    while extent * CHUNKS < disk.size:
        extent *= 2
    return extent


class _Copy:
    """One backup, from its moment to its commit."""

    def __init__(
        self, repo: Any, branch: str, session: Any, disk: QemuDisk, since: str, part: Part, progress: Progress | None
    ) -> None:
        self.repo = repo
        self.branch = branch
        self.session = session
        self.disk = disk
        self.since = since
        self.part = part
        self.progress = progress

    def deliver(self, epoch: Epoch, why: str) -> StoredBackup:
        """Commit what an epoch holds, or all of the disk."""
        disk, part = self.disk, self.part
        # Of all the disk what it holds, collected first all the same: the copy begins where the new bitmap does (I3).
        pages = disk.holds() if why else epoch.pages
        task = Task(part, part.chunks.of_pages(pages))
        work = [task] if task.count else []
        chunk = part.chunks.chunks[0]
        written = Written(
            epoch=epoch.number,
            pages=pages.count,
            dirty_bytes=min(pages.nbytes, disk.size),
            exact=pages.exact,
            chunks=task.count,
            nbytes=task.nbytes,
            whole=(DISK,) if task.whole else (),
        )
        about = {
            "transaction": uuid.uuid4().hex,
            "observer": "backup",
            "epoch": epoch.number,
            "step": None,
            "pages": written.pages,
            "exact": written.exact,
            "chunks": written.chunks,
            "bytes": written.nbytes,
            "arrays": [DISK],
            DISK: {
                "node": disk.node,
                "name": disk.name,
                "bitmap": disk.bitmap,
                "since": self.since,
                "size": disk.size,
                "page_size": disk.page_size,
                "chunk": chunk,
                "why_full": why,
            },
        }
        while True:
            store = self.session.store
            if why:
                create(store, part, part.array.shape, _codec())
            write(store, work, self.progress)
            # A backup of a disk that nobody has written to is one all the same.
            note(store, {"transaction": about["transaction"], "state": ""})
            try:
                said = f"backup of {disk.node}, epoch {epoch.number}"
                snapshot, adopted = commit_once(self.repo, self.branch, self.session, said, about)
                break
            except BranchMoved:
                if not self._late(why):
                    raise
        return StoredBackup(Saved.of(written, snapshot, adopted), why, disk.size, disk.page_size, chunk)

    def _late(self, why: str) -> bool:
        """Go on from the branch's tip, if what was committed meanwhile are backups that were given up too early.

        They begin at the bitmap at which ours begins, and ended before: of what was written since their moment ours
        leaves out nothing.
        """
        base, session = self.session.snapshot_id, self.repo.writable_session(self.branch)
        for version in versions(self.repo, snapshot_id=session.snapshot_id):
            if version.snapshot == base:
                self.session = session
                return bool(why) or fits(session.store, self.part)
            noted = _noted(version) or {}
            theirs = [noted.get(key) for key in ("node", "name", "since")]
            if theirs != [self.disk.node, self.disk.name, self.since]:
                return False
        return False


def _codec() -> Any:
    """Zstandard with a checksum, so that a chunk that was damaged is not restored."""
    zarr_package()
    from zarr.codecs import ZstdCodec

    return ZstdCodec(checksum=True)


def backups(where: Any, *, branch: str = "main") -> list[Version]:
    """List the backups of a branch, oldest first.

    Parameters
    ----------
    where : str, path or icechunk.Repository
        The store, or its address.
    branch : str, default "main"
        Of the repository.

    Returns
    -------
    list of Version
        ``version.about["disk"]`` has the disk's size and what else was noted of it.
    """
    return [version for version in history(_opened(where), branch) if _noted(version) is not None]


def _chosen(repo: Any, branch: str, snapshot: str | None) -> Version:
    """Return a backup by its name, or the newest."""
    found = backups(repo, branch=branch)
    for version in reversed(found):
        if snapshot is None or version.snapshot == snapshot:
            return version
    there = "there is none" if not found else f"the newest is {found[-1].snapshot}"
    raise SnapshotError(f"{branch!r} has no backup{f' {snapshot}' if snapshot else ''}; {there}")


def _spans(repo: Any, version: Version) -> Iterator[tuple[int, npt.NDArray[np.uint8]]]:
    """Read the disk of a backup, a stretch of chunks at a time."""
    zarr = zarr_package()
    at = end = 0
    try:
        stored = zarr.open_array(repo.readonly_session(snapshot_id=version.snapshot).store, path=DISK, mode="r")
        if stored.shape != (version.about[DISK]["size"],) or stored.dtype != np.uint8:
            raise ValueError(f"the array is {stored.dtype} of shape {stored.shape}")
        step = -(-SPAN // stored.chunks[0]) * stored.chunks[0]
        for at in range(0, stored.shape[0], step):
            end = min(at + step, stored.shape[0])
            yield at, np.ascontiguousarray(stored[at:end])
    except (SnapshotError, OSError):
        raise
    except Exception as error:
        raise SnapshotError(
            f"the backup {version.snapshot} cannot be read, at bytes {at} to {end}: {str(error).strip()[:500]}"
        ) from error


def verify(where: Any, snapshot: str | None = None, *, branch: str = "main", progress: Progress | None = None) -> None:
    """Read all of a backup; each chunk has a checksum.

    Parameters
    ----------
    where, branch
        As for :func:`backups`.
    snapshot : str, optional
        Which one; the newest by default.
    progress : callable, optional
        Called with the bytes read and the bytes to read.

    Raises
    ------
    SnapshotError
        It is not there, or damaged.
    """
    repo = _opened(where)
    version = _chosen(repo, branch, snapshot)
    for at, part in _spans(repo, version):
        if progress is not None:
            progress(at + len(part), version.about[DISK]["size"])


def restore_disk(
    where: Any,
    image: StrPath,
    snapshot: str | None = None,
    *,
    branch: str = "main",
    format: str = "raw",
    progress: Progress | None = None,
) -> Version:
    """Write the disk of a backup to an image.

    Parameters
    ----------
    where, branch
        As for :func:`backups`.
    image : str or path
        File to write; it must not exist, and appears whole or not at all. Zeros are holes.
    snapshot : str, optional
        Which one; the newest by default.
    format : str, default "raw"
        Or "qcow2", "vmdk", "vhdx", ...: what ``qemu-img convert -O`` makes.
    progress : callable, optional
        Called with the bytes written and the bytes to write.

    Returns
    -------
    Version
        The backup.

    Raises
    ------
    FileExistsError
        There is a file of the image's name.
    BackendUnavailable
        Another format than raw needs qemu-img.
    SnapshotError, OSError
        There is no such backup, it is damaged, or the image cannot be written.
    """
    repo = _opened(where)
    version = _chosen(repo, branch, snapshot)
    size = version.about[DISK]["size"]

    def write_raw(path: str) -> Version:
        with Staged(path, size, sync=True, replace=False, mode=None) as staged:
            for at, part in _spans(repo, version):
                zeros = zero_pages(part, HOLE)
                written = DirtyPages._all(zeros.npages, HOLE, exact=True) - zeros
                for first, count in (written.runs() * HOLE).tolist():
                    staged.write(part[first : first + count].data, at + first)
                if progress is not None:
                    progress(at + len(part), size)
            staged.publish()
        return version

    return as_image(image, format, write_raw)


def prune(
    where: Any, keep_last: int, *, branch: str = "main", dry_run: bool = False
) -> tuple[list[Version], list[Version]]:
    """Remove all backups but the newest.

    Parameters
    ----------
    where, branch
        As for :func:`backups`.
    keep_last : int
        How many to keep, at least 1.
    dry_run : bool, default False
        Only say which.

    Returns
    -------
    removed, kept : list of Version
        Oldest first.

    Raises
    ------
    ValueError
        `keep_last` is less than 1; or the repository has other branches or tags, whose snapshots would expire too.
    """
    if keep_last < 1:
        raise ValueError(f"keep_last is {keep_last}; it must be at least 1")
    repo = _opened(where)
    others = [*sorted({*repo.list_branches()} - {branch}), *sorted(repo.list_tags())]
    if others:
        raise ValueError(
            f"the repository has other branches or tags ({', '.join(others)}), whose snapshots would expire too; call "
            "expire_snapshots and garbage_collect of the repository yourself"
        )
    found = backups(repo, branch=branch)
    removed, kept = found[:-keep_last], found[-keep_last:]
    if removed and not dry_run:
        repo.expire_snapshots(kept[0].time)
        repo.garbage_collect(kept[0].time)
    return removed, kept
