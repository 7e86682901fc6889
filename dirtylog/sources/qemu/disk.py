"""A disk of a running QEMU as a source: its dirty bitmaps, rotated by QMP, read and released by epochs."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import shutil
import tempfile
import threading
import warnings
import zlib
from collections.abc import Callable, Iterable
from typing import Any, SupportsIndex

import numpy as np
import numpy.typing as npt

from dirtylog._bits.pages import DirtyPages, check_geometry
from dirtylog.errors import DirtyLogError, IncompleteLogWarning
from dirtylog.sources._channel import Address, PeerError
from dirtylog.sources._resource import Resource
from dirtylog.sources.qemu.nbd import NbdClient
from dirtylog.sources.qemu.qmp import Qmp, QmpError

__all__ = ["QemuDisk"]

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9._-]{0,99}")
_Actions = list[tuple[str, dict[str, Any]]]
# What the name of a directory begins with in which an NBD server listens for one QemuDisk.
_SERVED = "dirtylog-nbd-"


def _is_served(export: str) -> bool:
    """Whether an export is of an NBD server that a QemuDisk has started, whose process lives."""
    directory = export.partition("-x-")[2]
    if not directory.startswith(_SERVED):
        return False
    try:
        descriptor = os.open(
            os.path.join(tempfile.gettempdir(), directory), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
        )
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        finally:
            os.close(descriptor)
    except FileNotFoundError:
        return False
    except OSError:  # it is locked, or another user's
        return True
    return False


class QemuDisk(Resource):
    """The blocks of a disk that were written, from the dirty bitmaps of a running QEMU or qemu-storage-daemon.

    Parameters
    ----------
    qmp : Qmp
        A monitor of the program. It stays the caller's.
    node : str
        Node name of the disk (``query-named-block-nodes`` lists them), the one that the guest writes to.
    granularity : int, default 65536
        Bytes of a page: a power of two from 512 to 2 GiB.
    persistent : bool, default True
        Store the bitmaps in the image when QEMU ends as it should, so that the next QEMU goes on. Needs qcow2.
    name : str, default "dirtylog"
        What the bitmaps' names begin with. Two programs that track one disk need two names.
    since : str, optional
        The bitmap (see `bitmap`) that must still be there: what the last backup noted. If it is not, every page is
        reported. Without it a disk that has no bitmaps of this name starts clean.
    nbd : path-like, (str, int) or socket, optional
        Where QEMU's NBD server listens, if one runs already: QEMU has at most one. By default one is started, on a
        Unix socket in a private directory, and stopped at the end.
    scratch : path-like, optional
        File for QEMU to write, which must not exist: blocks of the disk are copied there before the guest overwrites
        them, so that `read` gives what they held at the moment of the last harvest. Without it `read` gives what they
        hold now. If there is no room left for it, QEMU fails the guest's writes.

    Attributes
    ----------
    npages, page_size : int
        Pages of `granularity` bytes; the last one may be partial.
    size : int
        Bytes of the disk.
    bitmap : str
        Name of the bitmap that records now: what was written since the last harvest.
    lease : int
        The newest harvest, which `release_lease` ends.
    resumed : bool
        Whether bitmaps of this name were there, and are continued.

    Raises
    ------
    QmpError
        QEMU refused: no such node, another NBD server runs, no room for persistent bitmaps, ...
    ValueError
        `granularity` or `name` will not do; or bitmaps of this name have another granularity.
    OSError, DirtyLogError
        As for :class:`Qmp` and :class:`NbdClient`.

    Notes
    -----
    A harvest is one QMP transaction: a new bitmap begins and the old one is frozen at one moment, so that no write
    falls between them, or into both. The frozen bitmap is removed when every observer of the log has committed an epoch
    with its pages. Until then QEMU keeps it, also when this process ends: the next `QemuDisk` of that name reports its
    pages again.

    Bitmaps that QEMU calls inconsistent (it was killed), or that are gone, make every page reported, with
    ``exact=False`` and a warning (I6). Zero writes, and discards that reach the image, count as writes.

    Thread-safe. A harvest costs some ten messages to QEMU, and O(runs) for the answer.

    References
    ----------
    `docs/interop/bitmaps.rst` of QEMU.

    Examples
    --------
    ::

        with Qmp("/run/vm/monitor") as qmp, QemuDisk(qmp, "disk") as disk:
            log = dirtylog.DirtyLog()
            log.attach(disk)
            with log.observer("backup") as backup, backup.collect() as epoch:
                for first, count in epoch.pages.runs():
                    store(first * disk.page_size, disk.read(first, count))
    """

    __module__ = "dirtylog.sources.qemu"

    def __init__(
        self,
        qmp: Qmp,
        node: str,
        granularity: SupportsIndex = 65536,
        persistent: bool = True,
        *,
        name: str = "dirtylog",
        since: str | None = None,
        nbd: Address | None = None,
        scratch: str | os.PathLike[str] | None = None,
    ) -> None:
        super().__init__()
        self.page_size: int = check_geometry(0, int(granularity.__index__()))[1]
        if not _NAME.fullmatch(name):
            raise ValueError(
                f"name is {name!r}; it must be a letter, then letters, digits, '-', '.' and '_', at most 100"
            )
        self.node: str = node
        self.name: str = name
        self._qmp, self._persistent = qmp, bool(persistent)
        # Re-entrant for a finalizer; a harvest within a harvest is the log's to refuse.
        self._lock = threading.RLock()
        self._nbd, self._nbd_directory, self._nbd_lock = nbd, "", -1
        # QEMU's node names have at most 31 bytes, bitmaps and exports more.
        self._overlay = f"dirtylog-{zlib.crc32(name.encode()):08x}"
        self._scratch = None if scratch is None else os.path.abspath(os.fspath(scratch))
        self._moment = False
        self._reader: NbdClient | None = None
        self._number = -1
        self.lease: int = 0
        # Frozen bitmaps: not handed out yet; handed out in these leases, which are not released.
        self._unread: list[str] = []
        self._owed: dict[str, set[int]] = {}
        # Whether QEMU has been asked for something and nobody knows whether it is done; bitmaps that this removes.
        self._unanswered = False
        self._leaving: set[str] = set()
        self._lost = ""
        image, _ = self._look()
        self.size: int = int(image)
        self.npages: int = check_geometry(-(-self.size // self.page_size), self.page_size)[0]
        try:
            if nbd is None:
                self._serve()
            self._tidy()
            self.resumed: bool = self._resume(self._look()[1], since)
        except BaseException:
            self._stop_serving()
            raise
        self._closed = False

    def __repr__(self) -> str:
        """Name the disk, its size and its pages."""
        state = "closed " if self.closed else ""
        return f"<{state}QemuDisk {self.node!r}: {self.npages} pages of {self.page_size} bytes>"

    @property
    def bitmap(self) -> str:
        """Name of the bitmap that records now."""
        return f"{self.name}-{self._number}"

    @property
    def lost(self) -> str:
        """Why the next harvest reports every page; empty where it does not."""
        return self._lost

    # What is there --------------------------------------------------------------------------------------------------

    def _ask(self, command: str, arguments: dict[str, Any] | None = None) -> Any:
        """Give a command. If no answer comes, what became of it is looked for at the next harvest."""
        before, self._unanswered = self._unanswered, True
        try:
            answer = self._qmp.execute(command, arguments)
        except QmpError:
            self._unanswered = before
            raise
        self._unanswered = before
        return answer

    def _wait(self, event: str, suits: Callable[[dict[str, Any]], bool]) -> None:
        before, self._unanswered = self._unanswered, True
        self._qmp.wait(event, suits)
        self._unanswered = before

    def _node(self) -> dict[str, Any]:
        """Return what QEMU says of the disk."""
        for each in self._ask("query-named-block-nodes", {"flat": True}):
            if each.get("node-name") == self.node:
                return dict(each)
        raise DirtyLogError(f"there is no node {self.node!r}; query-named-block-nodes lists those that there are")

    def _look(self) -> tuple[int, list[dict[str, Any]]]:
        """Return the size of the disk, and its bitmaps of our name, the oldest first."""
        node = self._node()
        pattern = re.compile(re.escape(self.name) + r"-(\d{1,18})")
        ours = [each for each in node.get("dirty-bitmaps", []) if pattern.fullmatch(each.get("name", ""))]
        ours.sort(key=lambda bitmap: int(bitmap["name"].rpartition("-")[2]))
        return node["image"]["virtual-size"], ours

    def _tidy(self) -> None:
        """End what a process that died has left in QEMU: its exports, its copy-before-write job, its scratch nodes."""
        mine = f"{self.name}-x-"
        for export in self._ask("query-block-exports"):
            if export["id"] in (f"{mine}bits", f"{mine}read") and export["node-name"] in (self.node, self._overlay):
                self._end_export(export["id"])
        for job in self._ask("query-jobs"):
            if job["id"] == f"{mine}job":
                self._end_job(job["id"])
            elif job["id"] == f"{mine}create":
                self._end_creation()
        self._drop_overlay()
        if f"{mine}peek" in [each.get("name") for each in self._node().get("dirty-bitmaps", [])]:
            self._transaction([("block-dirty-bitmap-remove", {"name": f"{mine}peek"})])

    def _resume(self, bitmaps: list[dict[str, Any]], since: str | None) -> bool:
        """Go on with the bitmaps that are there, or begin with one."""
        self._number = max((int(each["name"].rpartition("-")[2]) for each in bitmaps), default=-1)
        names = [each["name"] for each in bitmaps]
        other = [each for each in bitmaps if each["granularity"] != self.page_size]
        if other:
            raise ValueError(
                f"granularity is {self.page_size}; the bitmap {other[0]['name']!r} of {self.node!r} has "
                f"{other[0]['granularity']}: pass that, or another name"
            )
        if any(each.get("inconsistent") for each in bitmaps):
            self._lost = "QEMU calls the bitmap inconsistent: it was not stored when QEMU ended"
        elif since is not None and since not in names:
            self._lost = f"the bitmap {since!r} is not there any more"
        elif bitmaps and [each["recording"] for each in bitmaps] != [False] * (len(bitmaps) - 1) + [True]:
            self._lost = (
                "the bitmaps are not those that dirtylog leaves: the last one should be recording, and no other"
            )
        stale = names if self._lost else names[: names.index(since)] if since is not None else []
        self._transaction([("block-dirty-bitmap-remove", {"name": name}) for name in stale])
        kept = [name for name in names if name not in stale]
        if not kept:
            # A number that no bitmap had: whoever noted one that is lost would take a later one of its name for it, and
            # what was written before that one would be in no answer.
            self._number = secrets.randbelow(10**17) if self._lost else self._number + 1
            self._transaction([self._adding(self.bitmap)])
        self._unread = kept[:-1]
        return bool(kept)

    def _settle(self) -> None:
        """Find out what QEMU has done of that of which no answer came: as the next process would, of this one (I5)."""
        if not self._unanswered:
            return
        self._let_go()
        self._tidy()
        bitmaps = self._look()[1]
        names = [each["name"] for each in bitmaps]
        gone = sorted({*self._owed, *self._unread, self.bitmap} - self._leaving - set(names))
        # What was handed out and is not released yet is reported once more.
        self._owed = {}
        self._resume(bitmaps, gone[0] if gone else names[0])
        self._leaving, self._unanswered = set(), False

    def _adding(self, name: str, **more: Any) -> tuple[str, dict[str, Any]]:
        about = {"name": name, "granularity": self.page_size, "persistent": self._persistent, **more}
        return ("block-dirty-bitmap-add", about)

    def _transaction(self, actions: _Actions) -> None:
        """Do all of it at one moment, or nothing. What is about bitmaps is about those of our node."""
        told = []
        for kind, about in actions:
            told.append({"type": kind, "data": {"node": self.node, **about} if "bitmap" in kind else about})
        if told:
            self._ask("transaction", {"actions": told})

    # Exports --------------------------------------------------------------------------------------------------------

    def _serve(self) -> None:
        """Start QEMU's NBD server for us alone."""
        directory = tempfile.mkdtemp(prefix=_SERVED)
        path = os.path.join(directory, "nbd")
        start = ("nbd-server-start", {"addr": {"type": "unix", "data": {"path": path}}})
        try:
            # Held for as long as this process lives: so others know whether the server is anybody's.
            self._nbd_lock = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            fcntl.flock(self._nbd_lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            try:
                self._ask(*start)
            except QmpError as error:
                ids = [each["id"] for each in self._ask("query-block-exports") if each["type"] == "nbd"]
                if "already running" not in error.description or not ids or not all("-x-" in each for each in ids):
                    error.add_note("pass nbd=, the address at which QEMU's NBD server listens, if it runs already")
                    raise
                if any(map(_is_served, ids)):
                    error.add_note("it is that of another QemuDisk, which is in use: wait for its end")
                    raise
                # Of a process that died: its exports are the only ones.
                self._ask("nbd-server-stop")
                self._ask(*start)
        except QmpError:
            # QEMU's server, if it has one, is somebody else's.
            self._close_nbd_lock()
            shutil.rmtree(directory, ignore_errors=True)
            raise
        except BaseException:
            self._nbd_directory = directory
            raise
        self._nbd, self._nbd_directory = path, directory
        # By which the next process knows the server, if this one dies.
        export = f"{self.name}-x-{os.path.basename(directory)}"
        self._ask("block-export-add", {"type": "nbd", "id": export, "node-name": self.node, "name": export})

    def _close_nbd_lock(self) -> None:
        lock, self._nbd_lock = self._nbd_lock, -1
        if lock >= 0:
            os.close(lock)

    def _stop_serving(self) -> None:
        if self._nbd_directory:
            with contextlib.suppress(OSError, DirtyLogError, ValueError):
                self._qmp.execute("nbd-server-stop")
            self._close_nbd_lock()
            shutil.rmtree(self._nbd_directory, ignore_errors=True)
            self._nbd_directory = ""

    def _export(self, what: str, node: str, bitmap: str | None = None) -> NbdClient:
        """Export a node, to read, and open the export."""
        export = f"{self.name}-x-{what}"
        about: dict[str, Any] = {"type": "nbd", "id": export, "node-name": node, "name": export}
        contexts = []
        if bitmap is not None:
            about["bitmaps"] = [bitmap]
            contexts = [f"qemu:dirty-bitmap:{bitmap}"]
        else:
            contexts = ["base:allocation"]
        self._ask("block-export-add", about)
        try:
            assert self._nbd is not None
            client = NbdClient(self._nbd, export, contexts)
            if client.size != self.size:
                client.close()
                raise DirtyLogError(
                    f"the disk {self.node!r} was resized from {self.size} to {client.size} bytes; detach it, make "
                    "another QemuDisk, and begin with a full copy"
                )
            return client
        except BaseException:
            self._end_export(export)
            raise

    def _end_export(self, export: str) -> None:
        self._ask("block-export-del", {"id": export, "mode": "hard"})
        # Until then its bitmap is busy.
        self._wait("BLOCK_EXPORT_DELETED", lambda data: data.get("id") == export)

    def _read_bitmap(self, bitmap: str) -> DirtyPages:
        client = self._export("bits", self.node, bitmap)
        try:
            with client:
                extents = client.extents(client.contexts[0])
        finally:
            self._end_export(f"{self.name}-x-bits")
        dirty = extents[(extents[:, 2] & 1) != 0]
        ends = dirty[:, 0] + dirty[:, 1]
        if (dirty[:, 0] % self.page_size).any() or (ends[ends != self.size] % self.page_size).any():
            raise PeerError(f"QEMU reports pieces of {bitmap!r} that are not multiples of {self.page_size} bytes")
        return self._pages(dirty)

    def _pages(self, extents: npt.NDArray[np.int64]) -> DirtyPages:
        """Return the pages that some extents touch."""
        first = extents[:, 0] // self.page_size
        runs = np.stack([first, -(-(extents[:, 0] + extents[:, 1]) // self.page_size) - first], axis=1)
        return DirtyPages.from_runs(runs, self.npages, self.page_size)

    # What a source does ---------------------------------------------------------------------------------------------

    def harvest(self) -> DirtyPages:
        """Get and clear what was written since the last harvest.

        Returns
        -------
        DirtyPages
            In pages of `page_size` bytes.

        Warns
        -----
        IncompleteLogWarning
            QEMU has lost the bitmap: all pages are reported.

        Raises
        ------
        QmpError, OSError, DirtyLogError, ValueError
            QEMU refused or has gone, or the source is closed. What was frozen and not handed out is in the next
            harvest (I5).
        """
        with self._lock:
            self._check_open()
            self._settle()
            self._rotate()
            if self._lost:
                pages = DirtyPages._all(self.npages, self.page_size, exact=False)
            else:
                pages = DirtyPages._empty(self.npages, self.page_size)
                for bitmap in self._unread:
                    pages |= self._read_bitmap(bitmap)
            self._join()
            if self._lost:
                warnings.warn(
                    f"all {self.npages} pages of the disk {self.node!r} are reported: {self._lost}",
                    IncompleteLogWarning,
                    stacklevel=2,
                )
            self._lost = ""
            return pages

    def _rotate(self) -> None:
        """Begin a bitmap and freeze the one that records, at one moment; with a scratch file, hold that moment."""
        recording = self.bitmap
        successor = f"{self.name}-{self._number + 1}"
        actions: _Actions = [self._adding(successor), ("block-dirty-bitmap-disable", {"name": recording})]
        self._thaw()
        if self._scratch is not None:
            self._prepare_scratch()
            device = {"device": self.node, "job-id": f"{self.name}-x-job", "target": self._overlay}
            actions.append(("blockdev-backup", {**device, "sync": "none"}))
        self._unanswered = True
        try:
            self._transaction(actions)
            self._unread.append(recording)
        except QmpError:
            self._unanswered = False
            _, bitmaps = self._look()
            sound = [each["name"] for each in bitmaps if not each.get("inconsistent")]
            if {recording, *self._unread} <= set(sound):
                self._thaw()
                raise
            # Somebody has removed it: nobody knows what was written.
            self._lost = f"the bitmap {recording!r} is not there any more"
            self._transaction([actions[0], *actions[2:]])
        self._number += 1
        self._unanswered = False

    def _join(self) -> None:
        """Keep what was handed out in one frozen bitmap, the oldest: whoever noted its name finds all that is since."""
        if not self._unread:
            return
        self.lease += 1
        oldest, *newer = [*self._owed, *self._unread]
        if newer:
            actions: _Actions = [("block-dirty-bitmap-merge", {"target": oldest, "bitmaps": newer})]
            actions += [("block-dirty-bitmap-remove", {"name": name}) for name in newer]
            self._removing(newer, actions)
        self._owed = {oldest: {self.lease}.union(*self._owed.values())}
        self._unread = []
        self._unanswered = False

    def _removing(self, names: Iterable[str], actions: _Actions) -> None:
        """Do what removes bitmaps; that it is done is known when the caller says so."""
        self._leaving, self._unanswered = set(names), True
        try:
            self._transaction(actions)
        except QmpError:
            self._leaving, self._unanswered = set(), False
            raise

    def release_lease(self, lease: int) -> None:
        """Forget a harvest: every observer has committed its pages. The log calls this.

        Parameters
        ----------
        lease : int
            What `lease` was after that harvest. One that is unknown changes nothing.

        Raises
        ------
        QmpError, OSError, DirtyLogError
            QEMU refused or has gone. The bitmap stays, and its pages are reported once more by the next `QemuDisk` of
            this name.
        """
        with self._lock:
            if self.closed or self._inherited:  # the child of a fork holds nothing of QEMU's
                return
            if self._unanswered:
                # What is not handed out yet may have been joined to what was: the next harvest reports both.
                return
            for name, leases in list(self._owed.items()):
                leases.discard(lease)
                if not leases:
                    self._removing([name], [("block-dirty-bitmap-remove", {"name": name})])
                    del self._owed[name]
                    self._unanswered = False

    def peek(self) -> DirtyPages:
        """Copy what the next harvest would report, and clear nothing.

        Returns
        -------
        DirtyPages

        Raises
        ------
        QmpError, OSError, DirtyLogError, ValueError
            As for :meth:`harvest`.
        """
        with self._lock:
            self._check_open()
            self._settle()
            if self._lost:
                return DirtyPages._all(self.npages, self.page_size, exact=False)
            copy = f"{self.name}-x-peek"
            self._transaction(
                [
                    self._adding(copy, disabled=True, persistent=False),
                    ("block-dirty-bitmap-merge", {"target": copy, "bitmaps": [*self._unread, self.bitmap]}),
                ]
            )
            try:
                return self._read_bitmap(copy)
            finally:
                if not self._unanswered:  # else it may be in use, and goes with what else is left
                    self._transaction([("block-dirty-bitmap-remove", {"name": copy})])

    # Content --------------------------------------------------------------------------------------------------------

    def read(self, first: SupportsIndex, count: SupportsIndex = 1) -> npt.NDArray[np.uint8]:
        """Read pages of the disk: as they are now, or, with a scratch file, as they were at the last harvest.

        Parameters
        ----------
        first, count : int
            Pages.

        Returns
        -------
        uint8 array
            Their bytes; fewer where the last page is partial.

        Raises
        ------
        IndexError
            There are no such pages.
        QmpError, OSError, DirtyLogError, ValueError
            QEMU refused or has gone, the disk could not be read, or the source is closed.

        Notes
        -----
        Read after the harvest (I3): a write since is in the next one.
        """
        begin, number = int(first.__index__()), int(count.__index__())
        if begin < 0 or number < 0 or begin + number > self.npages:
            raise IndexError(f"pages {begin} to {begin + number} are not on the disk, which has {self.npages} pages")
        start = begin * self.page_size
        out = np.empty(max(min(number * self.page_size, self.size - start), 0), np.uint8)
        self.read_bytes(start, out.data)
        return out

    def read_bytes(self, offset: int, out: memoryview) -> None:
        """Read bytes of the disk into `out`; as :meth:`read`."""
        with self._lock:
            self._client().read(offset, len(out), out)

    def holds(self) -> DirtyPages:
        """Say which pages may hold something else than zeros; the others are holes of the image, or zero.

        Returns
        -------
        DirtyPages

        Raises
        ------
        QmpError, OSError, DirtyLogError, ValueError
            As for :meth:`read`.
        """
        with self._lock:
            extents = self._client().extents("base:allocation")
        return self._pages(extents[(extents[:, 2] & 2) == 0])

    def _client(self) -> NbdClient:
        self._check_open()
        if self._reader is None:
            self._reader = self._export("read", self._overlay if self._moment else self.node)
        return self._reader

    def _prepare_scratch(self) -> None:
        """Make an empty overlay of the disk, for what the guest is about to overwrite."""
        assert self._scratch is not None
        mine = f"{self.name}-x-"
        with open(self._scratch, "xb"):
            self._moment = True
        self._ask("blockdev-add", {"driver": "file", "filename": self._scratch, "node-name": f"{self._overlay}-file"})
        about = {"driver": "qcow2", "file": f"{self._overlay}-file", "size": self.size}
        self._ask("blockdev-create", {"job-id": f"{mine}create", "options": about})
        if error := self._end_creation():
            raise QmpError("blockdev-create", "GenericError", error)
        overlay = {"driver": "qcow2", "node-name": self._overlay, "file": f"{self._overlay}-file", "backing": self.node}
        self._ask("blockdev-add", overlay)

    def _end_creation(self) -> str:
        """Wait until the empty overlay is made; return what went wrong."""
        name = f"{self.name}-x-create"
        while True:
            (job,) = [each for each in self._ask("query-jobs") if each["id"] == name]
            if job["status"] == "concluded":
                break
            self._wait("JOB_STATUS_CHANGE", lambda data: data.get("id") == name)
        self._ask("job-dismiss", {"id": name})
        return str(job.get("error", ""))

    def _end_job(self, job: str) -> None:
        self._ask("block-job-cancel", {"device": job, "force": True})
        self._wait("JOB_STATUS_CHANGE", lambda data: data.get("id") == job and data.get("status") == "null")

    def _drop_overlay(self) -> None:
        """Remove the scratch nodes, those that are there."""
        nodes = {each.get("node-name") for each in self._ask("query-named-block-nodes", {"flat": True})}
        for left in (self._overlay, f"{self._overlay}-file"):
            if left in nodes:
                self._ask("blockdev-del", {"node-name": left})

    def _thaw(self) -> None:
        """Let go of the moment, and of the export that reads."""
        reader, self._reader = self._reader, None
        if reader is not None:
            reader.close()
            self._end_export(f"{self.name}-x-read")
        if not self._moment:
            return
        job = f"{self.name}-x-job"
        if any(each["id"] == job for each in self._ask("query-jobs")):
            self._end_job(job)
        self._drop_overlay()
        self._drop_scratch()

    def _drop_scratch(self) -> None:
        if self._moment and self._scratch is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._scratch)
        self._moment = False

    def _let_go(self) -> None:
        """Forget the reader and the moment, whatever QEMU still has of them."""
        reader, self._reader = self._reader, None
        if reader is not None:
            reader.close()
        self._drop_scratch()

    def forget(self) -> None:
        """Stop tracking: remove the bitmaps of this name from the disk, and close.

        Raises
        ------
        QmpError, OSError, DirtyLogError, ValueError
            QEMU refused or has gone, or the source is closed.
        """
        with self._lock:
            self._check_open()
            self._settle()
            self._thaw()
            self._transaction([("block-dirty-bitmap-remove", {"name": each["name"]}) for each in self._look()[1]])
            self.close()

    def _release(self) -> None:
        if self._inherited:
            return
        # QEMU keeps what was not committed, and goes on recording. If it has gone, there is nothing to give back.
        with contextlib.suppress(OSError, DirtyLogError, ValueError):
            self._thaw()
        with contextlib.suppress(OSError):
            self._drop_scratch()
        self._stop_serving()
