"""A data file and its sidecar, replaced together: whatever interrupts it, the old pair or the new one is there.

1. The data is written under the name ``.NAME.ID.part`` and synced.
2. The sidecar, which names ID, is written under a temporary name and synced; the directory is synced.
3. The sidecar is renamed into place and the directory synced: from here on the new pair is the snapshot. A reader that
   finds the part file of the sidecar's ID uses that, and ``NAME`` itself only if there is none.
4. The part file is renamed to ``NAME``.

Renaming the data first would leave the old sidecar with the new data if the machine stopped in between; so would
leaving out the sync between 3 and 4, because a directory's changes may reach the disk in any order.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import stat
from types import TracebackType
from typing import Self

from dirtylog.sinks.snapshot.sidecar import SUFFIX, Sidecar, SnapshotError, encode, read

__all__ = ["Staged", "finish", "open_data"]


def _part(path: str, identity: str) -> str:
    directory, name = os.path.split(path)
    return os.path.join(directory, f".{name}.{identity}.part")


def _sync_directory(path: str) -> None:
    descriptor = os.open(os.path.dirname(path) or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def open_data(path: str, sidecar: Sidecar) -> int:
    """Open the data file that belongs to a sidecar and check its size; the caller closes the descriptor.

    Raises
    ------
    SnapshotError
        It is missing, no regular file, or of another size than the sidecar says.
    """
    for name in (_part(path, sidecar.id), path):
        try:
            descriptor = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except FileNotFoundError:
            continue
        status = os.fstat(descriptor)
        if stat.S_ISREG(status.st_mode) and status.st_size == sidecar.nbytes:
            return descriptor
        os.close(descriptor)
        raise SnapshotError(f"{name}: the data is no file of {sidecar.nbytes} bytes but has {status.st_size}")
    raise SnapshotError(f"{path}: the sidecar is there and the data file is not")


def finish(path: str) -> None:
    """Do step 4 of a writer that was interrupted before it, and remove what dead writers left of earlier steps."""
    directory, name = os.path.split(path)
    try:
        os.rename(_part(path, read(path)[0].id), path)
    except FileNotFoundError:
        pass
    except SnapshotError:
        # A damaged sidecar may still name a part file that somebody wants to rescue.
        if os.path.lexists(path + SUFFIX):
            return
    with os.scandir(directory or ".") as entries:
        left = [e.path for e in entries if e.name.startswith(f".{name}.") and e.name.endswith(".part")]
    for part in left:
        try:
            descriptor = os.open(part, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError:
            continue
        try:
            # A living writer holds the lock; a dead one's is gone with it.
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove(part)
            _remove(part.removesuffix(".part") + SUFFIX)
        except BlockingIOError:
            pass
        finally:
            os.close(descriptor)


class Staged:
    """A data file being written; nothing of it is visible before :meth:`commit`.

    Parameters
    ----------
    path : str
        The name it shall have.
    nbytes : int
        Its size. It begins as one hole.
    sync : bool
        Make it survive a power cut (fsync), not only the end of this process.

    Notes
    -----
    A context manager: left without a commit, it removes what it wrote. Not thread-safe.
    """

    def __init__(self, path: str, nbytes: int, *, sync: bool) -> None:
        self.path = path
        self.sync = sync
        self.id: str = secrets.token_hex(16)
        self.part: str = _part(path, self.id)
        self.descriptor: int = os.open(self.part, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(self.descriptor, nbytes)
        except BaseException as error:
            self.close()
            if isinstance(error, OSError):
                raise OSError(error.errno or errno.EIO, os.strerror(error.errno or errno.EIO), self.part) from None
            raise

    def commit(self, sidecar: Sidecar) -> str:
        """Make data and sidecar the snapshot at the path; return the sidecar's digest."""
        text, digest = encode(sidecar)
        temporary = self.part.removesuffix(".part") + SUFFIX
        with open(temporary, "xb") as file:
            try:
                file.write(text)
                file.flush()
                if self.sync:
                    os.fsync(self.descriptor)
                    os.fsync(file.fileno())
                    _sync_directory(self.path)
                os.rename(temporary, self.path + SUFFIX)
            except BaseException:
                _remove(temporary)
                raise
        if self.sync:
            _sync_directory(self.path)
        os.rename(self.part, self.path)
        descriptor, self.descriptor = self.descriptor, -1
        os.close(descriptor)
        return digest

    def close(self) -> None:
        """Remove what was not committed; does nothing after a commit or a second time."""
        if self.descriptor < 0:
            return
        # Between the two renames of a commit the part file IS the snapshot's data.
        try:
            committed = read(self.path)[0].id == self.id
        except (SnapshotError, OSError):
            committed = False
        if not committed:
            _remove(self.part)
        descriptor, self.descriptor = self.descriptor, -1
        os.close(descriptor)

    def __enter__(self) -> Self:
        """Return the staged file."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove what was not committed."""
        self.close()
