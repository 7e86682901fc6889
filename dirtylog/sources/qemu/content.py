"""The bytes of a disk: as they are now or, by QEMU's copy-before-write into a scratch file, at one moment."""

from __future__ import annotations

import contextlib
import os

from dirtylog.sources.qemu.exports import Exports
from dirtylog.sources.qemu.nbd import NbdClient
from dirtylog.sources.qemu.node import Actions, Node
from dirtylog.sources.qemu.qmp import QmpError

__all__ = ["Content"]


class Content:
    """What can be read of one disk.

    A moment is held by a transaction with what `hold` returns, and let go by `thaw`. Blocks that the guest overwrites
    in between go to an overlay of the disk first, which is exported in the disk's place.

    Parameters
    ----------
    node : Node
        The disk.
    exports : Exports
        Of it.
    size : int
        Bytes of the disk.
    prefix : str
        What the names of jobs begin with.
    overlay : str
        Name of the node that holds a moment.
    scratch : str, optional
        File for QEMU to write. Without it no moment is held, and what is read is what the disk holds now.
    """

    def __init__(self, node: Node, exports: Exports, size: int, prefix: str, overlay: str, scratch: str | None) -> None:
        self._node, self._exports, self._size = node, exports, size
        self._job, self._creation = f"{prefix}job", f"{prefix}create"
        self._overlay, self._scratch = overlay, scratch
        self._held = False
        self._reader: NbdClient | None = None

    def client(self) -> NbdClient:
        """Return the client that reads."""
        if self._reader is None:
            self._reader = self._exports.open("read", self._overlay if self._held else self._node.name)
        return self._reader

    def hold(self) -> Actions:
        """Make an empty overlay of the disk; return what begins to fill it, at the moment of a transaction with it."""
        if self._scratch is None:
            return []
        with open(self._scratch, "xb"):
            self._held = True
        ask, overlay = self._node.ask, self._overlay
        ask("blockdev-add", {"driver": "file", "filename": self._scratch, "node-name": f"{overlay}-file"})
        about = {"driver": "qcow2", "file": f"{overlay}-file", "size": self._size}
        ask("blockdev-create", {"job-id": self._creation, "options": about})
        if error := self._end_creation():
            raise QmpError("blockdev-create", "GenericError", error)
        about = {"driver": "qcow2", "node-name": overlay, "file": f"{overlay}-file", "backing": self._node.name}
        ask("blockdev-add", about)
        device = {"device": self._node.name, "job-id": self._job, "target": overlay}
        return [("blockdev-backup", {**device, "sync": "none"})]

    def thaw(self) -> None:
        """Let go of the moment, and of the export that reads."""
        reader, self._reader = self._reader, None
        if reader is not None:
            reader.close()
            self._exports.end("read")
        if not self._held:
            return
        if any(each["id"] == self._job for each in self._node.ask("query-jobs")):
            self._end_job()
        self._drop_overlay()
        self.drop_scratch()

    def let_go(self) -> None:
        """Forget the reader and the moment, whatever QEMU still has of them."""
        reader, self._reader = self._reader, None
        if reader is not None:
            reader.close()
        self.drop_scratch()

    def drop_scratch(self) -> None:
        """Remove the scratch file."""
        if self._held and self._scratch is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._scratch)
        self._held = False

    def tidy(self) -> None:
        """End what a process that died has left in QEMU: the job that copies before write, and the scratch nodes."""
        for job in self._node.ask("query-jobs"):
            if job["id"] == self._job:
                self._end_job()
            elif job["id"] == self._creation:
                self._end_creation()
        self._drop_overlay()

    def _end_creation(self) -> str:
        """Wait until the empty overlay is made; return what went wrong."""
        name = self._creation
        while True:
            (job,) = [each for each in self._node.ask("query-jobs") if each["id"] == name]
            if job["status"] == "concluded":
                break
            self._node.wait("JOB_STATUS_CHANGE", lambda data: data.get("id") == name)
        self._node.ask("job-dismiss", {"id": name})
        return str(job.get("error", ""))

    def _end_job(self) -> None:
        name = self._job
        self._node.ask("block-job-cancel", {"device": name, "force": True})
        self._node.wait("JOB_STATUS_CHANGE", lambda data: data.get("id") == name and data.get("status") == "null")

    def _drop_overlay(self) -> None:
        """Remove the scratch nodes, those that are there."""
        nodes = self._node.names()
        for left in (self._overlay, f"{self._overlay}-file"):
            if left in nodes:
                self._node.ask("blockdev-del", {"node-name": left})
