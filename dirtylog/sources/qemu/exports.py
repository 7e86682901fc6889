"""Exports of a disk by NBD, to read it and its bitmaps; and the server that QEMU starts for them where none runs."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Container
from typing import Any

from dirtylog.errors import DirtyLogError
from dirtylog.sources._channel import Address
from dirtylog.sources.qemu.nbd import NbdClient
from dirtylog.sources.qemu.node import Node
from dirtylog.sources.qemu.qmp import QmpError

__all__ = ["Exports"]

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


class Exports:
    """What QEMU exports of one disk for us.

    Parameters
    ----------
    node : Node
        The disk.
    prefix : str
        What the names of the exports begin with.
    size : int
        Bytes of the disk, and so of every export.
    address : path-like, (str, int), socket or None
        Where QEMU's NBD server listens; None where `serve` is to start one.
    """

    def __init__(self, node: Node, prefix: str, size: int, address: Address | None) -> None:
        self._node, self._prefix, self._size, self._address = node, prefix, size, address
        self._directory, self._lock = "", -1

    def serve(self) -> None:
        """Start QEMU's NBD server for us alone."""
        directory = tempfile.mkdtemp(prefix=_SERVED)
        path = os.path.join(directory, "nbd")
        start = ("nbd-server-start", {"addr": {"type": "unix", "data": {"path": path}}})
        try:
            # Held for as long as this process lives: so others know whether the server is anybody's.
            self._lock = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            try:
                self._node.ask(*start)
            except QmpError as error:
                ids = [each["id"] for each in self._node.ask("query-block-exports") if each["type"] == "nbd"]
                if "already running" not in error.description or not ids or not all("-x-" in each for each in ids):
                    error.add_note("pass nbd=, the address at which QEMU's NBD server listens, if it runs already")
                    raise
                if any(map(_is_served, ids)):
                    error.add_note("it is that of another QemuDisk, which is in use: wait for its end")
                    raise
                # Of a process that died: its exports are the only ones.
                self._node.ask("nbd-server-stop")
                self._node.ask(*start)
        except QmpError:
            # QEMU's server, if it has one, is somebody else's.
            self._unlock()
            shutil.rmtree(directory, ignore_errors=True)
            raise
        except BaseException:
            self._directory = directory
            raise
        self._address, self._directory = path, directory
        # By which the next process knows the server, if this one dies.
        self._add(os.path.basename(directory), self._node.name)

    def stop(self) -> None:
        """Stop the server, if it was started for us."""
        if self._directory:
            with contextlib.suppress(OSError, DirtyLogError, ValueError):
                self._node.ask("nbd-server-stop")
            self._unlock()
            shutil.rmtree(self._directory, ignore_errors=True)
            self._directory = ""

    def _unlock(self) -> None:
        lock, self._lock = self._lock, -1
        if lock >= 0:
            os.close(lock)

    def _add(self, what: str, node: str, **more: Any) -> str:
        export = f"{self._prefix}{what}"
        self._node.ask("block-export-add", {"type": "nbd", "id": export, "node-name": node, "name": export, **more})
        return export

    def open(self, what: str, node: str, bitmap: str | None = None) -> NbdClient:
        """Export a node, to read, or one of its bitmaps, and open the export; `end` is the caller's to call."""
        if bitmap is not None:
            export = self._add(what, node, bitmaps=[bitmap])
            contexts = [f"qemu:dirty-bitmap:{bitmap}"]
        else:
            export = self._add(what, node)
            contexts = ["base:allocation"]
        try:
            assert self._address is not None
            client = NbdClient(self._address, export, contexts)
            if client.size != self._size:
                client.close()
                raise DirtyLogError(
                    f"the disk {self._node.name!r} was resized from {self._size} to {client.size} bytes; detach it, "
                    "make another QemuDisk, and begin with a full copy"
                )
            return client
        except BaseException:
            self.end(what)
            raise

    def end(self, what: str) -> None:
        """End an export, and wait until it has: until then its bitmap is busy."""
        export = f"{self._prefix}{what}"
        self._node.ask("block-export-del", {"id": export, "mode": "hard"})
        self._node.wait("BLOCK_EXPORT_DELETED", lambda data: data.get("id") == export)

    def tidy(self, what: Container[str], nodes: Container[str]) -> None:
        """End those exports of these nodes that a process which died has left."""
        for export in self._node.ask("query-block-exports"):
            left = export["id"].removeprefix(self._prefix)
            if left != export["id"] and left in what and export["node-name"] in nodes:
                self.end(left)
