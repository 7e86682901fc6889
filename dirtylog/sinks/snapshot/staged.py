"""A file that appears under its name whole or not at all, whatever interrupts its writer.

1. It is written under a name of its own in the same directory, ``.dirtylog.BOOT.PID.START.RANDOM.part``, and synced.
2. It is renamed to its name, by a rename that replaces nothing unless it is asked to.
3. The directory is synced.

From step 2 on everything goes forward: the file is there, so nothing that fails afterwards may be reported as "not
written". What a file system cannot do (a rename that replaces nothing, a sync of a directory) is tried before step 2.

The name says which process is the writer: which boot and process-id namespace it is in, its id, when it started. So
a part file whose writer is dead is known without a lock, which some file systems do not have; of a writer on another
machine nothing is known, and its part files are left to ``snapshot clean``.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import os
import re
import secrets
import stat
import threading
import warnings
import weakref
from types import TracebackType
from typing import Self

from dirtylog.sinks._bytes.pageio import UNSUPPORTED, rename_noreplace

__all__ = ["Staged", "own_name", "part_files", "rename_new", "tidy", "writer_died"]

_PART = re.compile(r"\.dirtylog\.([0-9a-f]{12})\.(\d{1,10})\.(\d{1,20})\.[0-9a-f]{16}\.part")
_LINK_REFUSED = (*UNSUPPORTED, errno.EPERM, errno.EMLINK, errno.EACCES, errno.EXDEV)

# Which part files this process is writing. Weak, so that one whose writer was interrupted before it could tidy up is
# known to be dead as soon as the writer is collected.
_writing: weakref.WeakValueDictionary[str, Staged] = weakref.WeakValueDictionary()
_lock = threading.Lock()
_said: set[str] = set()


def _say_once(what: str, text: str) -> None:
    """Warn of something that a file system cannot do, once in a process."""
    with _lock:
        if what in _said:
            return
        _said.add(what)
    warnings.warn(text, RuntimeWarning, stacklevel=6)


def rename_new(part: str, path: str) -> None:
    """Give a file, or a directory, a name that nobody has, by the best that the file system offers.

    Raises
    ------
    FileExistsError
        Somebody has the name; nothing has changed.
    OSError
        It has no new name.

    Warns
    -----
    RuntimeWarning
        Once in a process: two writers of one name at the same moment are not told apart here.
    """
    try:
        rename_noreplace(part, path)
        return
    except FileExistsError:
        raise
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
    try:
        os.link(part, path)
    except FileExistsError:
        raise
    except OSError as error:
        if error.errno not in _LINK_REFUSED:
            raise
    else:
        with contextlib.suppress(OSError):
            os.unlink(part)
        return
    _say_once(
        "noreplace",
        f"{os.path.dirname(path)}: this file system has neither a rename that replaces nothing nor links, so two "
        "writers of one name at the same moment are not told apart",
    )
    if os.path.lexists(path):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path)
    os.rename(part, path)


@functools.cache
def _boot() -> str:
    """Name this boot and process-id namespace: process ids mean something within them alone."""
    found = ""
    with contextlib.suppress(OSError):
        with open("/proc/sys/kernel/random/boot_id") as file:
            found = file.read()
        found += os.readlink("/proc/self/ns/pid")
    return hashlib.blake2b((found or os.uname().nodename).encode(), digest_size=6).hexdigest()


def _started(pid: int) -> str:
    """Return when a process started, in clock ticks since the boot; 0 if unknown, none if there is no such process."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[19].decode()
    except FileNotFoundError:
        return "none" if os.path.exists("/proc/self/stat") else "0"
    except OSError:
        return "0"


def own_name() -> str:
    """Return a new name for a part file of this process."""
    return f".dirtylog.{_boot()}.{os.getpid()}.{_started(os.getpid())}.{secrets.token_hex(8)}.part"


def writer_died(name: str, ours: bool) -> bool | None:
    """Say whether the process that a part file names is dead; None if it is on another machine.

    Parameters
    ----------
    name : str
        File name, without the directory.
    ours : bool
        What this process itself knows: whether it still writes that file.
    """
    match = _PART.fullmatch(name)
    if match is None or match[1] != _boot():
        return None
    if int(match[2]) == os.getpid():
        # A child by fork has this id no more, and the parent's part files are not in the child's way.
        return not ours
    started = _started(int(match[2]))
    return started == "none" or (started != match[3] and "0" not in (started, match[3]))


def part_files(directory: str) -> tuple[dict[bool | None, list[str]], int]:
    """List the part files in a directory, by whether their writers are dead (None: elsewhere); count all entries."""
    parts: dict[bool | None, list[str]] = {True: [], False: [], None: []}
    entries = 0
    with os.scandir(directory) as found:
        for entry in found:
            entries += 1
            if entry.name.startswith(".dirtylog.") and _PART.fullmatch(entry.name):
                parts[writer_died(entry.name, entry.path in _writing)].append(entry.path)
    return parts, entries


_seen: dict[str, int] = {}


def tidy(directory: str) -> None:
    """Remove what dead writers left, before a write; a large directory is looked through once in a while."""
    left = _seen.get(directory, 0)
    if left > 0:
        _seen[directory] = left - 1
        return
    parts, entries = part_files(directory)
    for path in parts[True]:
        with contextlib.suppress(OSError):
            os.unlink(path)
    if len(_seen) > 1000:
        _seen.clear()
    # 256 entries for each write, so that a chain of any length costs in proportion to its length.
    _seen[directory] = entries // 256


class Staged:
    """A file being written; nothing of it is visible before :meth:`publish`.

    Parameters
    ----------
    path : str
        The name it shall have, absolute.
    nbytes : int
        Its size. It begins as one hole.
    sync : bool
        Make it survive a power cut (fsync), not only the end of this process.
    replace : bool
        Take the place of a file of that name, and its mode.
    mode : int or None
        Permissions; None is 0600, for memory holds secrets, or those of what is replaced.

    Notes
    -----
    A context manager: left without :meth:`publish`, it removes what it wrote. Not thread-safe.
    """

    descriptor: int = -1
    # Until there is a name, there is nothing to remove.
    closed: bool = True

    def __init__(self, path: str, nbytes: int, *, sync: bool, replace: bool, mode: int | None) -> None:
        self.path = path
        self.sync = sync
        self.replace = replace
        self.durable: bool = sync
        self.published: bool = False
        self.owner: int = os.getpid()
        self.directory: str = os.path.dirname(path)
        if mode is None:
            mode = 0o600
            with contextlib.suppress(FileNotFoundError):
                if replace:
                    mode = stat.S_IMODE(os.stat(path, follow_symlinks=False).st_mode) & 0o777
        self.part: str = os.path.join(self.directory, own_name())
        self.closed = False
        _writing[self.part] = self
        tidy(self.directory)
        try:
            self.descriptor = os.open(self.part, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            if mode != 0o600:
                os.fchmod(self.descriptor, mode)
            os.ftruncate(self.descriptor, nbytes)
        except BaseException as error:
            self.close()
            if isinstance(error, OSError) and error.errno is not None:
                raise OSError(error.errno, os.strerror(error.errno), path) from None
            raise

    def write(self, data: bytes | memoryview, offset: int) -> None:
        """Write bytes at an offset."""
        left = memoryview(data)
        while left:
            try:
                done = os.pwrite(self.descriptor, left, offset)
            except OSError as error:
                if error.errno is None:  # a signal handler's TimeoutError, say
                    raise
                raise OSError(error.errno, os.strerror(error.errno), self.path) from None
            left, offset = left[done:], offset + done

    def _sync_directory(self, descriptor: int) -> None:
        if descriptor < 0:
            return
        try:
            os.fsync(descriptor)
        except OSError as error:
            if not self.published and error.errno in UNSUPPORTED:
                self.durable = False
                _say_once(
                    "directory",
                    f"{self.directory}: this file system cannot sync a directory (fsync answered {error.strerror}), so "
                    "a power cut may take back the newest snapshot; the end of the process cannot",
                )
                return
            raise

    def publish(self) -> None:
        """Give the file its name. If this raises an error of the file system, there is none of that name from here."""
        directory = -1
        try:
            if not self.sync:
                # A network file system may tell of a write that failed when a descriptor of the file is closed.
                os.close(os.dup(self.descriptor))
            else:
                os.fsync(self.descriptor)
                # Opened and tried beforehand: what this file system cannot do is said while nothing has changed.
                directory = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                self._sync_directory(directory)
            if self.replace:
                os.rename(self.part, self.path)
            else:
                rename_new(self.part, self.path)
            self.published = True
            if self.durable:
                try:
                    self._sync_directory(directory)
                except OSError as error:
                    self.durable = False
                    # The file is there. A warning that is an error must not say otherwise.
                    with contextlib.suppress(RuntimeWarning):
                        warnings.warn(
                            f"{self.path} is written, but its directory could not be synced ({error.strerror}): a "
                            "power cut may take it back", RuntimeWarning, stacklevel=4,
                        )  # fmt: skip
        except OSError as error:
            if isinstance(error, FileExistsError):
                raise FileExistsError(
                    errno.EEXIST,
                    "a file of this name was written meanwhile (pass replace=True, or another name)",
                    self.path,
                ) from None
            if error.errno is None:
                raise
            raise OSError(error.errno, os.strerror(error.errno), self.path) from None
        finally:
            if directory >= 0:
                with contextlib.suppress(OSError):
                    os.close(directory)

    def close(self) -> None:
        """Remove what was not published; does nothing a second time."""
        if self.closed:
            return
        # First, and once: a part file that cannot be removed, now or ever, keeps no descriptor and no room.
        descriptor, self.descriptor = self.descriptor, -1
        if descriptor >= 0:
            # Closed it is, whatever the answer. What was published is there, and of the rest nothing is wanted.
            with contextlib.suppress(OSError):
                os.close(descriptor)
        # A child by fork has a copy of this object, and leaves the file to its parent.
        # After an interrupt in the middle of a rename the part file is simply not there any more.
        if not self.published and self.owner == os.getpid():
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.part)
        self.closed = True

    def __del__(self) -> None:
        """Remove what an interrupt kept :meth:`close` from removing."""
        with contextlib.suppress(OSError):
            self.close()

    def __enter__(self) -> Self:
        """Return the staged file."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove what was not published."""
        self.close()
