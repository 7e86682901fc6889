"""Where ``dirtylog migrate receive`` puts what arrives: memory, a file, a snapshot, a directory of checkpoints."""

from __future__ import annotations

import argparse
import errno
import os
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Self

from dirtylog.commands._refusal import Misunderstood

if TYPE_CHECKING:
    import mmap

__all__ = ["Arrival", "OutFile", "add_arrivals", "arrays_of", "arrival_of", "digest_of", "nbytes_of", "program_of"]


def add_arrivals(parser: argparse.ArgumentParser) -> None:
    """Declare where the memory may go; nowhere else than into memory by default."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--out", metavar="FILE", help="take the memory in in a file, which appears when it is complete and on the disk"
    )
    group.add_argument(
        "--snapshot", metavar="FILE", help="write a snapshot: arrays by name, and what was sent beside them"
    )
    group.add_argument("--checkpoint", metavar="DIR", help="write the next checkpoint of a directory")
    group.add_argument(
        "--exec",
        dest="program",
        nargs=argparse.REMAINDER,
        metavar="COMMAND",
        help="last: start a program with the memory, whose path is put in the place of {memory} in its words; what was "
        "sent beside it is a JSON text at {about}",
    )
    # A word of the program that is -- ends an option's words, and not the program's.
    parser.add_argument("rest", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)


def program_of(args: argparse.Namespace) -> list[str] | None:
    """Return the words of the program to start; raises `Misunderstood` where there are words that no option takes."""
    program: list[str] | None = args.program
    if program is None:
        if args.rest:
            raise Misunderstood(f"{' '.join(args.rest)}: no option takes that; --exec starts a program, and comes last")
        return None
    return [*program, *args.rest]


def arrays_of(memory: Any) -> dict[str, Any]:
    """Return the arrays by name; none of memory without names."""
    return memory if isinstance(memory, dict) else {}


def nbytes_of(memory: Any) -> int:
    """Return how many bytes there are."""
    from dirtylog._bits.flat import flat_bytes

    return sum(flat_bytes(each).nbytes for each in arrays_of(memory).values() or [memory])


def digest_of(memory: Any) -> str:
    """Say in 32 digits what some memory holds, array after array."""
    from hashlib import blake2b

    from dirtylog._bits.flat import flat_bytes

    found = blake2b(digest_size=16)
    for each in arrays_of(memory).values() or [memory]:
        found.update(flat_bytes(each))
    return found.hexdigest()


class Arrival:
    """Memory that goes nowhere but into this process."""

    path: str | None = None
    out: Any = None
    state: Any = None
    # What it was started with; it has the memory for its own.
    program: Any = None

    def take_state(self, state: Any) -> None:
        """Remember what was sent beside the memory."""
        self.state = state

    def arrived(self, memory: Any) -> None:
        """Keep it, durably; it may not be used yet."""

    def start(self, memory: Any) -> None:
        """Let it be used: the right to run is here."""

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, _type: object, error: BaseException | None, _traceback: object) -> None:
        """Remove what is of no use."""


class _Staged(Arrival):
    """A file that memory arrives in, under a name of its own until the copy has the right to run.

    What is of no use is removed at the end. What is complete stays, under whichever name it has.
    """

    def __init__(self, path: str, part: str) -> None:
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, "there is a file of that name; remove it or choose another", path)
        self.path = path
        directory, name = os.path.split(path)
        self.directory: str = directory or "."
        self.part: str = os.path.join(directory, part.format(name))
        self.keep = False

    def start(self, memory: Any) -> None:
        """Give it its name; a file that has come to be there meanwhile is not replaced."""
        from dirtylog.sinks._bytes.pageio import sync_directory
        from dirtylog.sinks.snapshot.staged import rename_new

        assert self.path is not None
        # The only copy that has the right to run: whatever fails from here on, it stays.
        self.keep = True
        try:
            rename_new(self.part, self.path)
        except OSError as error:
            error.add_note(f"the memory is complete, in {self.part}")
            raise
        self.keep = False
        sync_directory(self.directory)

    def __exit__(self, _type: object, error: BaseException | None, _traceback: object) -> None:
        """Remove what is of no use, or say where the memory is."""
        if getattr(error, "uncertain", False):
            self.keep = True
            if error is not None:
                error.add_note(f"the memory is in {self.part}")
        if not self.keep:
            with suppress(FileNotFoundError):
                os.unlink(self.part)


class OutFile(_Staged):
    """A file of the memory alone, whose place on the disk is certain before a page is sent."""

    def __init__(self, path: str) -> None:
        import secrets

        super().__init__(path, f".{{}}.{secrets.token_hex(8)}.part")
        self.memory: mmap.mmap | None = None
        self.out = self.reserve
        self.descriptor = os.open(self.part, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)

    def reserve(self, nbytes: int) -> mmap.mmap:
        """Map so many bytes whose place on the disk is certain: a full disk is an error now, not SIGBUS later."""
        import mmap

        try:
            os.posix_fallocate(self.descriptor, 0, nbytes)
        except OSError as error:
            raise OSError(error.errno, f"{nbytes} bytes cannot be reserved: {error.strerror}", self.path) from None
        self.memory = mmap.mmap(self.descriptor, nbytes)
        return self.memory

    def arrived(self, memory: Any) -> None:
        """Make it durable, and its own name too."""
        from dirtylog.commands import _terminal
        from dirtylog.sinks._bytes.pageio import sync_directory

        assert self.memory is not None
        if self.state is not None:
            _terminal.show_note(f"{self.path} has the memory alone: for what is sent beside it receive a --snapshot")
        self.memory.flush()
        os.fsync(self.descriptor)
        sync_directory(self.directory)

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        """Remove what is of no use, or say where the memory is."""
        super().__exit__(kind, error, traceback)
        os.close(self.descriptor)


class _SnapshotFile(_Staged):
    """A snapshot, with arrays by name and the state."""

    def __init__(self, path: str) -> None:
        import secrets

        from dirtylog.sinks.snapshot.chain import checked_path

        # In a hidden directory: whoever lists, merges or prunes snapshots takes every one with a plain name.
        super().__init__(checked_path(path), f".{{0}}.{secrets.token_hex(8)}.part/{{0}}")
        if not os.access(self.directory, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, "the directory cannot be written", self.directory)

    def arrived(self, memory: Any) -> None:
        """Write it, durably."""
        self._write(memory, self.state)

    def _write(self, memory: Any, state: Any) -> None:
        from dirtylog.sinks import snapshot
        from dirtylog.sinks._bytes.pageio import sync_directory

        os.mkdir(os.path.dirname(self.part), 0o700)
        snapshot.save(self.part, memory, state=state)
        sync_directory(self.directory)

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        """Remove what is of no use, or say where the memory is."""
        super().__exit__(kind, error, traceback)
        with suppress(OSError):  # it was not made, or keeps what is complete
            os.rmdir(os.path.dirname(self.part))


class _NextCheckpoint(_SnapshotFile):
    """The next checkpoint of a directory: arrays by name; a step and a state where a checkpoint was sent."""

    def __init__(self, directory: str) -> None:
        from dirtylog.sinks.checkpoint.directory import next_path

        os.makedirs(directory, exist_ok=True)
        super().__init__(next_path(directory))

    def arrived(self, memory: Any) -> None:
        """Write it, durably, as what a Checkpoint would have written."""
        from dirtylog.sinks.checkpoint.directory import noted_for

        assert self.path is not None
        self._write(arrays_of(memory) or {"memory": memory}, noted_for(self.path, self.state))


def arrival_of(args: argparse.Namespace) -> Arrival:
    """Return what takes the memory in, as the command line says; of a program that is started see `_new_process`."""
    if args.out is not None:
        return OutFile(args.out)
    if args.snapshot is not None:
        return _SnapshotFile(args.snapshot)
    return Arrival() if args.checkpoint is None else _NextCheckpoint(args.checkpoint)
