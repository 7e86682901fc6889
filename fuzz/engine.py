"""A small coverage-guided fuzzer for where atheris is not installed; pairs of lines of dirtylog's files guide it."""

import math
import random
import struct
import sys
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

__all__ = ["Coverage", "Mutator", "fuzz"]

INTERESTING = (0, 1, 7, 8, 9, 63, 64, 65, 127, 128, 255, 256, 4095, 4096, 32767, 65535, 65536, (1 << 31) - 1, 1 << 31,
               (1 << 32) - 1, 1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)  # fmt: skip
TOKENS = (b"-1", b"0", b"1e9", b"null", b"true", b"NaN", b'"', b"[", b"{", b"}", b"../", b"\\u0000", b"\\ud800",
          b"99999999999999999999", b"9" * 5000, b"[" * 3000)  # fmt: skip
LONGEST = 1 << 15


class Coverage:
    """Which pairs of lines, one run after the other, a call goes through in files whose path contains a word."""

    def __init__(self, part: str) -> None:
        self.part = part
        self.pairs: set[tuple[int, int, int]] = set()
        self._last = 0

    def _trace(self, frame: FrameType, event: str, argument: Any) -> Any:
        if self.part not in frame.f_code.co_filename:
            return None
        return self._line

    def _line(self, frame: FrameType, event: str, argument: Any) -> Any:
        if event == "line":
            line = frame.f_lineno
            self.pairs.add((hash(frame.f_code.co_filename), self._last, line))
            self._last = line
        return self._line

    def of(self, function: Callable[[], object]) -> set[tuple[int, int, int]]:
        """Call a function and return the pairs; what it raises goes on."""
        self.pairs, self._last = set(), 0
        before = sys.gettrace()
        sys.settrace(self._trace)
        try:
            function()
        finally:
            sys.settrace(before)
        return self.pairs


class Mutator:
    """Changes to inputs, drawn from a seeded generator."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def __call__(self, data: bytes, other: bytes) -> bytes:
        """Return a changed copy, of at most 32 KiB."""
        changed = bytearray(data)
        for _ in range(self.random.choice((1, 1, 2, 3, 8))):
            self.random.choice((self._flip, self._number, self._cut, self._repeat, self._token, self._digits))(changed)
        if self.random.random() < 0.1 and other:
            at, end = self._place(changed), self.random.randrange(len(other) + 1)
            changed[at:] = other[self.random.randrange(end + 1) : end]
        return bytes(changed[:LONGEST])

    def _place(self, data: bytearray) -> int:
        # The beginning of an input has the sizes, so it is changed more often.
        near = self.random.random() < 0.3
        return self.random.randrange(min(len(data), 32 if near else len(data)) + 1)

    def _flip(self, data: bytearray) -> None:
        at = self._place(data)
        if at < len(data):
            data[at] ^= 1 << self.random.randrange(8)

    def _number(self, data: bytearray) -> None:
        at, form = self._place(data), self.random.choice("BHIQ")
        value = self.random.choice(INTERESTING) & (1 << 8 * struct.calcsize(form)) - 1
        data[at : at + struct.calcsize(form)] = struct.pack(f"<{form}", value)

    def _cut(self, data: bytearray) -> None:
        at = self._place(data)
        del data[at : at + self.random.choice((1, 2, 8, 16, 100, LONGEST))]

    def _repeat(self, data: bytearray) -> None:
        at, length = self._place(data), self.random.choice((1, 8, 16, 33, 200))
        data[at:at] = data[at : at + length] * self.random.choice((1, 1, 3, 20))

    def _token(self, data: bytearray) -> None:
        at = self._place(data)
        data[at:at] = self.random.choice(TOKENS)

    def _digits(self, data: bytearray) -> None:
        """Put another number in the place of one that is written in digits."""
        digits = [at for at, byte in enumerate(data[:4096]) if 48 <= byte < 58]
        if digits:
            start = end = self.random.choice(digits)
            while end < len(data) and 48 <= data[end] < 58:
                end += 1
            value = self.random.choice((*INTERESTING, self.random.randrange(100), -1))
            data[start:end] = str(value).encode()


def fuzz(
    examine: Callable[[bytes], bool],
    inputs: list[bytes],
    *,
    seconds: float | None = None,
    runs: int | None = None,
    seed: int,
    part: str = "/dirtylog/",
) -> tuple[int, list[bytes]]:
    """Examine mutations of the inputs until the time is over, or so many were examined.

    Returns
    -------
    done : int
        How many inputs were examined.
    found : list of bytes
        Inputs that went where none before them did.

    Raises
    ------
    BaseException
        What an examination raised, with the input as its ``data`` attribute.
    """
    coverage, mutate = Coverage(part), Mutator(seed)
    known: set[tuple[int, int, int]] = set()
    corpus: list[bytes] = []
    found: list[bytes] = []

    def run(data: bytes) -> bool:
        try:
            new = coverage.of(lambda: examine(data)) - known
        except BaseException as error:
            error.data = data  # type: ignore[attr-defined]
            raise
        if new:
            known.update(new)
            corpus.append(data)
        return bool(new)

    for data in inputs:
        run(data)
        corpus.append(data)
    done = 0
    end = math.inf if seconds is None else time.monotonic() + seconds
    while done != runs and time.monotonic() < end:
        data = mutate(mutate.random.choice(corpus), mutate.random.choice(corpus))
        done += 1
        if run(data):
            found.append(data)
    return done, found
