"""A disk of a running QEMU as a source: its dirty bitmaps, rotated by QMP, read and released by epochs."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import threading
import warnings
import zlib
from collections.abc import Iterable
from typing import Any, SupportsIndex

import numpy as np
import numpy.typing as npt

from dirtylog._bits.pages import DirtyPages, check_geometry
from dirtylog.errors import DirtyLogError, IncompleteLogWarning
from dirtylog.sources._channel import Address, PeerError
from dirtylog.sources._resource import Resource
from dirtylog.sources.qemu.content import Content
from dirtylog.sources.qemu.exports import Exports
from dirtylog.sources.qemu.nbd import NbdClient
from dirtylog.sources.qemu.node import Actions, Node
from dirtylog.sources.qemu.qmp import Qmp, QmpError

__all__ = ["QemuDisk"]

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9._-]{0,99}")


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
        self._node, self._persistent = Node(qmp, node), bool(persistent)
        # Re-entrant for a finalizer; a harvest within a harvest is the log's to refuse.
        self._lock = threading.RLock()
        self._number = -1
        self.lease: int = 0
        # Frozen bitmaps: not handed out yet; handed out in these leases, which are not released.
        self._unread: list[str] = []
        self._owed: dict[str, set[int]] = {}
        # Bitmaps that go with what QEMU has been asked for, and nobody knows whether it is done.
        self._leaving: set[str] = set()
        self._lost = ""
        image, _ = self._look()
        self.size: int = int(image)
        self.npages: int = check_geometry(-(-self.size // self.page_size), self.page_size)[0]
        # QEMU's node names have at most 31 bytes, bitmaps and exports more.
        self._prefix, self._overlay = f"{name}-x-", f"dirtylog-{zlib.crc32(name.encode()):08x}"
        self._exports = Exports(self._node, self._prefix, self.size, nbd)
        file = None if scratch is None else os.path.abspath(os.fspath(scratch))
        self._content = Content(self._node, self._exports, self.size, self._prefix, self._overlay, file)
        try:
            if nbd is None:
                self._exports.serve()
            self._tidy()
            self.resumed: bool = self._resume(self._look()[1], since)
        except BaseException:
            self._exports.stop()
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

    def _look(self) -> tuple[int, list[dict[str, Any]]]:
        """Return the size of the disk, and its bitmaps of our name, the oldest first."""
        node = self._node.describe()
        pattern = re.compile(re.escape(self.name) + r"-(\d{1,18})")
        ours = [each for each in node.get("dirty-bitmaps", []) if pattern.fullmatch(each.get("name", ""))]
        ours.sort(key=lambda bitmap: int(bitmap["name"].rpartition("-")[2]))
        return node["image"]["virtual-size"], ours

    def _tidy(self) -> None:
        """End what a process that died has left in QEMU: its exports, what held a moment, its copy of bitmaps."""
        self._exports.tidy(("bits", "read"), (self.node, self._overlay))
        self._content.tidy()
        copy = f"{self._prefix}peek"
        if copy in [each.get("name") for each in self._node.describe().get("dirty-bitmaps", [])]:
            self._node.transaction([("block-dirty-bitmap-remove", {"name": copy})])

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
        self._node.transaction([("block-dirty-bitmap-remove", {"name": name}) for name in stale])
        kept = [name for name in names if name not in stale]
        if not kept:
            # A number that no bitmap had: whoever noted one that is lost would take a later one of its name for it, and
            # what was written before that one would be in no answer.
            self._number = secrets.randbelow(10**17) if self._lost else self._number + 1
            self._node.transaction([self._adding(self.bitmap)])
        self._unread = kept[:-1]
        return bool(kept)

    def _settle(self) -> None:
        """Find out what QEMU has done of that of which no answer came: as the next process would, of this one (I5)."""
        if not self._node.unanswered:
            return
        self._content.let_go()
        self._tidy()
        bitmaps = self._look()[1]
        names = [each["name"] for each in bitmaps]
        gone = sorted({*self._owed, *self._unread, self.bitmap} - self._leaving - set(names))
        # What was handed out and is not released yet is reported once more.
        self._owed = {}
        self._resume(bitmaps, gone[0] if gone else names[0])
        self._leaving, self._node.unanswered = set(), False

    def _adding(self, name: str, **more: Any) -> tuple[str, dict[str, Any]]:
        about = {"name": name, "granularity": self.page_size, "persistent": self._persistent, **more}
        return ("block-dirty-bitmap-add", about)

    def _read_bitmap(self, bitmap: str) -> DirtyPages:
        client = self._exports.open("bits", self.node, bitmap)
        try:
            with client:
                extents = client.extents(client.contexts[0])
        finally:
            self._exports.end("bits")
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
        actions: Actions = [self._adding(successor), ("block-dirty-bitmap-disable", {"name": recording})]
        self._content.thaw()
        actions += self._content.hold()
        self._node.unanswered = True
        try:
            self._node.transaction(actions)
            self._unread.append(recording)
        except QmpError:
            self._node.unanswered = False
            _, bitmaps = self._look()
            sound = [each["name"] for each in bitmaps if not each.get("inconsistent")]
            if {recording, *self._unread} <= set(sound):
                self._content.thaw()
                raise
            # Somebody has removed it: nobody knows what was written.
            self._lost = f"the bitmap {recording!r} is not there any more"
            self._node.transaction([actions[0], *actions[2:]])
        self._number += 1
        self._node.unanswered = False

    def _join(self) -> None:
        """Keep what was handed out in one frozen bitmap, the oldest: whoever noted its name finds all that is since."""
        if not self._unread:
            return
        self.lease += 1
        oldest, *newer = [*self._owed, *self._unread]
        if newer:
            actions: Actions = [("block-dirty-bitmap-merge", {"target": oldest, "bitmaps": newer})]
            actions += [("block-dirty-bitmap-remove", {"name": name}) for name in newer]
            self._removing(newer, actions)
        self._owed = {oldest: {self.lease}.union(*self._owed.values())}
        self._unread = []
        self._node.unanswered = False

    def _removing(self, names: Iterable[str], actions: Actions) -> None:
        """Do what removes bitmaps; that it is done is known when the caller says so."""
        self._leaving, self._node.unanswered = set(names), True
        try:
            self._node.transaction(actions)
        except QmpError:
            self._leaving, self._node.unanswered = set(), False
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
            if self._node.unanswered:
                # What is not handed out yet may have been joined to what was: the next harvest reports both.
                return
            for name, leases in list(self._owed.items()):
                leases.discard(lease)
                if not leases:
                    self._removing([name], [("block-dirty-bitmap-remove", {"name": name})])
                    del self._owed[name]
                    self._node.unanswered = False

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
            copy = f"{self._prefix}peek"
            self._node.transaction(
                [
                    self._adding(copy, disabled=True, persistent=False),
                    ("block-dirty-bitmap-merge", {"target": copy, "bitmaps": [*self._unread, self.bitmap]}),
                ]
            )
            try:
                return self._read_bitmap(copy)
            finally:
                if not self._node.unanswered:  # else it may be in use, and goes with what else is left
                    self._node.transaction([("block-dirty-bitmap-remove", {"name": copy})])

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
        return self._content.client()

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
            self._content.thaw()
            self._node.transaction([("block-dirty-bitmap-remove", {"name": each["name"]}) for each in self._look()[1]])
            self.close()

    def _release(self) -> None:
        if self._inherited:
            return
        # QEMU keeps what was not committed, and goes on recording. If it has gone, there is nothing to give back.
        with contextlib.suppress(OSError, DirtyLogError, ValueError):
            self._content.thaw()
        with contextlib.suppress(OSError):
            self._content.drop_scratch()
        self._exports.stop()
