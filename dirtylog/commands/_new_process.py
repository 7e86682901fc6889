"""Where ``dirtylog migrate receive --exec`` puts what arrives: into memory of a program that is started with it."""

from __future__ import annotations

import mmap
import os
import shutil
import subprocess
import threading
from typing import Any

from dirtylog.commands import _terminal
from dirtylog.commands._arrivals import Arrival, arrays_of
from dirtylog.commands._refusal import Misunderstood

__all__ = ["MEMORY", "NewProcess", "Room"]

MEMORY, ABOUT = "{memory}", "{about}"


class Room:
    """Makes the memory when its size is known, as what other processes can map: all of it zero."""

    # Pages that are zero need not be looked at, and are never committed.
    zeros = True

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.memory: mmap.mmap | None = None

    def __call__(self, nbytes: int) -> mmap.mmap:
        """Map so many bytes."""
        os.ftruncate(self.descriptor, nbytes)
        self.memory = mmap.mmap(self.descriptor, nbytes)
        return self.memory


class NewProcess(Arrival):
    """A program that is started when the copy has the right to run.

    Parameters
    ----------
    command : list of str
        Its words; in each, ``{memory}`` becomes a path of the memory, and ``{about}`` one of a JSON text that says
        which arrays are where in it, and what was sent beside it.

    Raises
    ------
    Misunderstood
        There is no program, or it would not get the memory.

    Notes
    -----
    Whether a program can be executed is known when it is. By then nobody else has the memory: where it cannot, the
    memory is kept until the command is ended, and it is said where.
    """

    def __init__(self, command: list[str]) -> None:
        if not any(MEMORY in word for word in command[1:]):
            raise Misunderstood(
                f"--exec {' '.join(command)}: no word of it has {MEMORY}, which becomes the path of the memory; "
                f"--exec ./vmm --memory={MEMORY}"
            )
        # Before anybody comes: later the memory would be lost.
        if shutil.which(command[0]) is None:
            raise Misunderstood(f"--exec {command[0]}: there is no such program; give its path")
        self.command = command
        self.program: subprocess.Popen[bytes] | None = None
        self.refused: OSError | None = None
        self.descriptors = [os.memfd_create(name, os.MFD_CLOEXEC) for name in ("dirtylog-memory", "dirtylog-about")]
        self.out = self.room = Room(self.descriptors[0])

    def arrived(self, memory: Any) -> None:
        """Write down what is where, while nobody waits for the program yet."""
        import json

        import numpy as np

        from dirtylog.sinks.snapshot.footer import encode_state

        assert self.room.memory is not None
        base = np.frombuffer(self.room.memory, np.uint8).ctypes.data
        arrays = {
            name: {"offset": each.ctypes.data - base, "dtype": each.dtype.str, "shape": each.shape,
                   "order": "C" if each.flags.c_contiguous else "F"}
            for name, each in arrays_of(memory).items()
        }  # fmt: skip
        about = {
            "nbytes": len(self.room.memory),
            "arrays": arrays,
            "state": json.loads(encode_state(self.state) or "null"),
        }
        with open(self.descriptors[1], "wb", closefd=False) as file:
            file.write(json.dumps(about).encode())

    def start(self, memory: Any) -> None:
        """Start it."""
        paths = [f"/proc/self/fd/{each}" for each in self.descriptors]
        words = [word.replace(MEMORY, paths[0]).replace(ABOUT, paths[1]) for word in self.command]
        try:
            self.program = subprocess.Popen(words, pass_fds=self.descriptors)
        except OSError as error:
            self.refused = error
            raise

    def __exit__(self, _type: object, error: BaseException | None, _traceback: object) -> None:
        """Let go of the memory, which is the program's."""
        try:
            if self.refused is not None:
                self._keep(self.refused)
        finally:
            for each in self.descriptors:
                os.close(each)
        if error is not None and self.program is not None:
            # It has the right to run: it is not left alone, and not ended.
            self.program.wait()

    def _keep(self, error: OSError) -> None:
        memory, about = (f"/proc/{os.getpid()}/fd/{each}" for each in self.descriptors)
        _terminal.show_note(
            f"{self.command[0]} could not be started: {error.strerror}. Nobody else has the memory now. It is in "
            f"{memory}, and what is about it in {about}, until this command is ended: start a program with them, or "
            "copy them, then end it"
        )
        threading.Event().wait()
