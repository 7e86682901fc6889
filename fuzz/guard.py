"""What reading untrusted bytes may do: use so much memory, write in one directory, and execute nothing."""

import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["Guard", "Violation", "limit_memory"]

# Audit events of the interpreter that no parser of ours has a reason to raise.
FORBIDDEN = (
    "builtins.input", "code.__new__", "compile", "cpython.run_", "ctypes.", "exec", "fcntl.", "ftp", "gc.", "glob.",
    "http", "import", "marshal.", "os.chmod", "os.chown", "os.exec", "os.fork", "os.forkpty", "os.kill", "os.link",
    "os.mkdir", "os.posix_spawn", "os.putenv", "os.remove", "os.rename", "os.rmdir", "os.spawn", "os.symlink",
    "os.system", "os.truncate", "os.utime", "pickle.find_class", "pty.", "shutil.", "socket.bind", "socket.connect",
    "socket.getaddrinfo", "socket.sendto", "subprocess.", "tempfile.", "urllib.", "webbrowser.",
)  # fmt: skip
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Violation(BaseException):
    """The code under test did what reading must not do. Not an Exception: no handler of the code hides it."""


class Guard:
    """Watch the interpreter's audit events while armed.

    An audit hook cannot be removed, so there is one guard a process, made once everything is imported.
    """

    def __init__(self) -> None:
        self._directory = ""
        self._armed = False
        self._writable = False
        sys.addaudithook(self._hook)

    @contextmanager
    def armed(self, directory: Path, *, writable: bool = False) -> Iterator[None]:
        """Raise `Violation` from anything forbidden while the block runs; files are opened in `directory` only."""
        self._directory, self._writable = os.path.realpath(directory) + os.sep, writable
        self._armed = True
        try:
            yield
        finally:
            self._armed = False

    def _hook(self, event: str, arguments: tuple[object, ...]) -> None:
        if not self._armed:
            return
        if event == "open":
            path, mode, flags = arguments
            if isinstance(path, int):
                return
            place = os.path.realpath(os.fsdecode(path))
            writes = isinstance(flags, int) and flags & WRITING
            if not place.startswith(self._directory) or (writes and not self._writable):
                self._armed = False
                raise Violation(f"opens {path!r}, mode {mode!r}, flags {flags!r}")
        elif event.startswith(FORBIDDEN):
            self._armed = False
            raise Violation(f"{event}{arguments!r:.200}")


def limit_memory(more: int) -> None:
    """Let this process map `more` bytes than it does now; what asks for more gets MemoryError: a finding."""
    with open("/proc/self/statm") as file:
        mapped = int(file.read().split()[0]) * resource.getpagesize()
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (mapped + more, hard))
