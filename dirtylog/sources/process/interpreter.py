"""Tells from outside where a Python program is: its interpreter sets itself up, runs it, or takes itself down."""

from __future__ import annotations

import functools
import os
import struct

import numpy as np

from dirtylog.sources.process._remote import read_memory

__all__ = ["Interpreter"]

# Of ELF files, in elf(5).
_DYNAMIC_SYMBOLS, _LOADED = 11, 1
_SYMBOL = np.dtype(
    [("name", "<u4"), ("info", "u1"), ("other", "u1"), ("section", "<u2"), ("value", "<u8"), ("size", "<u8")]
)
# Where `_finalizing` is in CPython's _PyRuntimeState: of 3.11 and 3.12 by their pycore_runtime.h, of later versions as
# they say themselves in _Py_DebugOffsets. `initialized` lies eight bytes before it in all of them.
_FINALIZING = {(3, 11): 24, (3, 12): 24}
_COOKIE, _SAID_AT = b"xdebugpy", 32


class Interpreter:
    """Where the CPython of a process is, read from its memory: no code of ours runs in it.

    Notes
    -----
    CPython of 3.11 and later on a little-endian 64-bit machine, in the program itself or in a
    ``libpython``, that exports ``_PyRuntime``: as every build does that loads extension modules. Of
    another program nothing is known, and nothing is said.

    Asked of a process that has ended, through a keeper of its memory, it says where it was at last.

    References
    ----------
    ``Py_FinalizeEx`` in CPython's ``Python/pylifecycle.c``: threads and ``atexit`` first, then
    ``_PyRuntimeState_SetFinalizing``, then the modules are taken down.
    """

    def __init__(self) -> None:
        self._pid = 0
        self._address = 0

    def _state(self, pid: int) -> tuple[int, int] | None:
        """Whether it is set up, and whether it takes itself down."""
        if pid != self._pid or not self._address:  # another program by now; or its library was not loaded yet
            self._pid, self._address = pid, _find(pid)
        words = _read(pid, self._address, 16) if self._address else b""
        if len(words) < 16:
            return None
        ready, _, finalizing = struct.unpack("<iiQ", words)
        return ready, finalizing

    def starting(self, pid: int) -> bool:
        """Whether there is one that is not set up yet."""
        state = self._state(pid)
        return state is not None and not state[0] and not state[1]

    def ending(self, pid: int) -> bool:
        """Whether there is one that takes itself down: its program's own code is over, ``atexit`` included."""
        state = self._state(pid)
        return state is not None and bool(state[1])


def _read(pid: int, address: int, length: int) -> bytes:
    out = np.zeros(length, np.uint8)
    try:
        missing = read_memory(pid, np.array([[address, length, 0]], np.int64), out)
    except OSError:
        return b""
    return b"" if missing else out.tobytes()


def _find(pid: int) -> int:
    """Return the address of `initialized` in a process's _PyRuntime; 0 if it has none that is known."""
    try:
        with open(f"/proc/{pid}/maps", encoding="utf-8", errors="surrogateescape") as lines:
            first = [line.split(maxsplit=5) for line in lines]
    except OSError:
        return 0
    for span, _, offset, _, _, *path in first:
        if not path or int(offset, 16) or "python" not in os.path.basename(path[0]):
            continue
        begin = int(span.partition("-")[0], 16)
        # As the process sees it, also out of a container.
        file = f"/proc/{pid}/root{path[0].rstrip()}"
        try:
            about = os.stat(file)
            found = _symbols(file, about.st_dev, about.st_ino, about.st_mtime_ns)
        except (OSError, ValueError, struct.error):
            continue
        if found is None:
            continue
        runtime, version, lowest = found
        runtime, version = runtime + begin - lowest, version + begin - lowest
        head = _read(pid, runtime, _SAID_AT + 8)
        number = _read(pid, version, 4)
        if not head or not number:
            continue
        said = int.from_bytes(head[_SAID_AT:], "little") if head.startswith(_COOKIE) else 0
        at = said or _FINALIZING.get((number[3], number[2]), 0)
        if 8 <= at < 1 << 20:
            return runtime + at - 8
    return 0


@functools.lru_cache(maxsize=32)
def _symbols(path: str, *_: int) -> tuple[int, int, int] | None:
    """Return the values of _PyRuntime and Py_Version in an ELF file, and of its lowest address; None if it has none."""
    with open(path, "rb", buffering=0) as file:

        def part(offset: int, length: int) -> bytes:
            return os.pread(file.fileno(), min(length, 1 << 26), offset)

        header = part(0, 64)
        if header[:6] != b"\x7fELF\x02\x01":  # 64-bit, little-endian
            return None
        programs, sections, _, _, size, count, each, many, _ = struct.unpack("<QQIHHHHHH", header[32:64])
        loaded = [struct.unpack_from("<IIQQ", part(programs, size * count), i * size) for i in range(count)]
        lowest = min(address - offset for kind, _, offset, address in loaded if kind == _LOADED)
        table = [struct.unpack_from("<IIQQQQIIQQ", part(sections, each * many), i * each) for i in range(many)]
        for _, kind, _, _, offset, length, link, _, _, _ in table:
            if kind != _DYNAMIC_SYMBOLS:
                continue
            texts = part(table[link][4], table[link][5])
            symbols = np.frombuffer(part(offset, length // _SYMBOL.itemsize * _SYMBOL.itemsize), _SYMBOL)
            values: list[int] = []
            for name in (b"\0_PyRuntime\0", b"\0Py_Version\0"):
                at = texts.find(name) + 1
                values += symbols["value"][(symbols["name"] == at) & (symbols["value"] != 0)][:1].tolist() if at else []
            return (values[0], values[1], lowest) if len(values) == 2 else None
    return None
