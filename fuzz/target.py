"""What a fuzz target is: a function of bytes, well-formed inputs to begin with, and the errors it may answer with."""

import os
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path

__all__ = ["Target", "Wrong"]


class Wrong(AssertionError):
    """The code accepted what it should refuse, or answered wrongly."""


class Target(ABC):
    """One parser and its oracle.

    Attributes
    ----------
    name : str
        What it is called on the command line.
    refusals : tuple of exception types
        How the code under test may refuse an input; any other exception is a finding.
    writable : bool
        Whether it may open files of its directory for writing.
    """

    name: str
    writable = False
    refusals: tuple[type[Exception], ...]

    def __init__(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix=f"dirtylog-fuzz-{self.name}-"))

    @abstractmethod
    def seeds(self) -> Iterator[bytes]:
        """Yield inputs that are accepted."""

    @abstractmethod
    def read(self, data: bytes) -> object:
        """Let the code under test read the input; return what it made of it. Runs under the guard."""

    def judge(self, data: bytes, answer: object) -> None:  # noqa: B027
        """Raise `Wrong` if an answer is not what the input says. Runs without the guard."""

    def prepare(self, data: bytes) -> bytes:
        """Turn an input into what is read: repair a digest, write a file. Runs without the guard."""
        return data

    def close(self) -> None:
        """Remove the target's directory."""
        shutil.rmtree(self.directory, ignore_errors=True)

    def listing(self) -> list[tuple[str, int]]:
        """Name what lies in the directory, and how large it is."""
        return sorted((entry.name, entry.stat().st_size) for entry in os.scandir(self.directory))
