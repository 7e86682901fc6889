"""Removes snapshots of a directory while others may be writing diffs over them, without a lock.

1. What is to be removed is announced, in a file in ``.dirtylog.removing/`` that names the process.
2. The part files that are there are waited for: their writers may not have seen it.
3. The directory is looked at again, and whatever has got a diff meanwhile stays.
4. The files are removed, children before their parents, and the announcement last.

A writer of a diff makes its part file first and looks for an announcement of its parent just before it gives the file
its name: so either it sees the announcement and gives up, or its part file is seen and waited for (the same order as
that of a marker and a harvester, I4). Killed anywhere, a remover leaves every chain whole, and an announcement that
nobody believes.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import time
from collections.abc import Collection
from types import TracebackType
from typing import Self

from dirtylog.sinks._bytes.pageio import sync_directory
from dirtylog.sinks.snapshot.footer import SnapshotError
from dirtylog.sinks.snapshot.staged import own_name, part_files, writer_died

__all__ = ["PATIENCE", "Removal", "announced", "clear", "clear_last", "stale"]

ANNOUNCEMENTS = ".dirtylog.removing"
UNFINISHED = ".new"
MAX_BYTES = 64 << 20
# How often the part files are looked at while they are waited for, in seconds.
INTERVAL = 0.005
# How long writers are waited for, in seconds, unless it is said.
PATIENCE = 10.0
# After how many seconds without a write a part file of a writer elsewhere, or before the last boot, is not waited for.
REST = 3600

# The announcements of this process that have not been withdrawn.
_ours: set[str] = set()


def _announcements(directory: str) -> list[str]:
    try:
        return os.listdir(os.path.join(directory, ANNOUNCEMENTS))
    except (FileNotFoundError, NotADirectoryError):
        return []


def _names(path: str) -> frozenset[str] | None:
    """Return the names that an announcement names; None if it has been withdrawn."""
    try:
        with open(path, "rb") as file:
            return frozenset(json.loads(file.read(MAX_BYTES)))
    except OSError:
        return None
    except (ValueError, TypeError, RecursionError):
        return frozenset()


def announced(path: str) -> bool:
    """Say whether a process that may be alive is about to remove a snapshot."""
    directory, plain = os.path.split(path)
    return any(
        writer_died(name, name in _ours) is not True
        and plain in (_names(os.path.join(directory, ANNOUNCEMENTS, name)) or ())
        for name in _announcements(directory)
        if not name.endswith(UNFINISHED)
    )


def stale(directory: str, *, elsewhere: bool = False) -> list[str]:
    """List the announcements that dead processes have left, and with `elsewhere` those of processes elsewhere."""
    left = []
    for name in _announcements(directory):
        plain = name.removesuffix(UNFINISHED)
        died = writer_died(plain, plain in _ours)
        if died or (died is None and elsewhere):
            left.append(os.path.join(directory, ANNOUNCEMENTS, name))
    return left


def clear(path: str) -> None:
    """Remove an announcement, and the directory of announcements if it was the last."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    clear_last(os.path.dirname(os.path.dirname(path)))


def clear_last(directory: str) -> None:
    """Remove the directory of announcements if it is empty: whoever removed the last may have been interrupted."""
    try:
        os.rmdir(os.path.join(directory, ANNOUNCEMENTS))
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT, errno.ENOTDIR):
            raise


class Removal:
    """An announcement that some snapshots of a directory will be removed.

    Parameters
    ----------
    directory : str
        Absolute path.
    names : collection of str
        File names of the snapshots.
    patience : float
        How long to wait for writers that are at work, in seconds.
    sync : bool
        Sync the directory after each file, so that a power cut leaves no child without its parent.

    Raises
    ------
    SnapshotError
        Writers were at work all the time.

    Notes
    -----
    A context manager; while it is entered, no diff over one of the snapshots appears.
    """

    # Of one that an interrupt kept from getting a name, and so from announcing anything.
    name: str = ""

    def __init__(self, directory: str, names: Collection[str], *, patience: float, sync: bool) -> None:
        self.name = own_name()
        self.directory = directory
        self.sync = sync
        self.path: str = os.path.join(directory, ANNOUNCEMENTS, self.name)
        self._text: bytes = json.dumps(sorted(names)).encode("ascii")
        self._patience = patience
        self._begun = False

    def _announce(self) -> None:
        _ours.add(self.name)
        for left in stale(self.directory):
            clear(left)
        # Whole before it has a name that is looked at.
        staging = self.path + UNFINISHED
        while True:
            with contextlib.suppress(FileExistsError):
                os.mkdir(os.path.dirname(self.path), 0o700)
            try:
                with open(staging, "xb") as file:
                    file.write(self._text)
                    if self.sync:
                        file.flush()
                        os.fsync(file.fileno())
                os.rename(staging, self.path)
            except FileNotFoundError:
                continue  # another remover has just ended and taken the directory along
            except OSError as error:
                if error.errno is None:  # a signal handler's TimeoutError, say
                    raise
                # Of a file that nobody asked for, and a write does not name it at all.
                raise OSError(error.errno, os.strerror(error.errno), self.directory) from None
            return

    def _recent(self, path: str) -> bool:
        """Say whether a writer elsewhere may be at work; not on what has rested for an hour by the disk's clock."""
        try:
            return os.stat(path).st_mtime > os.stat(self.path).st_mtime - REST
        except FileNotFoundError:
            return False

    def _wait(self) -> None:
        end = time.monotonic() + self._patience
        waiting: set[str] | None = None
        while True:
            parts, _ = part_files(self.directory)
            there = {*parts[False], *(path for path in parts[None] if self._recent(path))}
            waiting = there if waiting is None else waiting & there
            if not waiting:
                return
            if time.monotonic() > end:
                raise SnapshotError(
                    f"{self.directory}: a writer is at work there ({sorted(waiting)[0]}) and may need what is to be "
                    f"removed; waited {self._patience:g} s: try again later, or pass more patience"
                )
            time.sleep(INTERVAL)

    def remove(self, path: str) -> bool:
        """Remove one of the snapshots; children come before their parents. Say whether it was there."""
        if self.sync and not self._begun:
            # What took its place is there for good, also on a file system where the writer could not see to it.
            sync_directory(self.directory)
            self._begun = True
        try:
            os.unlink(path)
        except FileNotFoundError:
            return False
        if self.sync:
            sync_directory(self.directory)
        return True

    def __enter__(self) -> Self:
        """Announce, and wait for whoever may not have seen it."""
        try:
            self._announce()
            self._wait()
        except BaseException:
            self._withdraw()
            raise
        return self

    def _withdraw(self) -> None:
        try:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.path + UNFINISHED)
            clear(self.path)
        finally:
            _ours.discard(self.name)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Withdraw the announcement."""
        self._withdraw()

    def __del__(self) -> None:
        """Withdraw what an interrupt kept from being withdrawn: it would be believed as long as this process lives."""
        if self.name in _ours:
            with contextlib.suppress(OSError):
                self._withdraw()
