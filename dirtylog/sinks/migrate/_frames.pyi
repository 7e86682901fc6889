from collections.abc import Callable, Sequence
from typing import final

import numpy as np
import numpy.typing as npt

from dirtylog._typing import Memory as _Memory

__all__ = ["ENDED", "FOREIGN", "LATE", "ODD", "OVER", "PAUSE", "Packer", "Taker"]

PAUSE: int
FOREIGN: int
ODD: int
LATE: int
OVER: int
ENDED: int

class Memory: ...

@final
class Packer(Memory):
    sent: int
    def __init__(
        self,
        regions: Sequence[tuple[int, _Memory]],
        nbytes: int,
        granule: int,
        data: _Memory,
        pages: npt.NDArray[np.int64],
        frames: npt.NDArray[np.int64],
        room: int,
        share: tuple[int, int, int] = (0, 1, 64),
    ) -> None: ...
    def remember(self, frames: npt.NDArray[np.uint64]) -> None: ...
    def begin(self, extents: npt.NDArray[np.int64], older: int, packed: _Memory | None = None) -> None: ...
    def pack(self) -> tuple[int, tuple[int, int], list[tuple[int, int, bytes, memoryview]]] | None: ...
    def send(
        self,
        fd: int,
        sequence: int,
        enough: int,
        patience: float,
        left: float,
        look: Callable[[], object] | None = None,
    ) -> tuple[int, int, int, int]: ...
    @property
    def gone(self) -> tuple[int, int, bytes, bool]: ...

@final
class Taker(Memory):
    round: int
    left: int
    def __init__(
        self,
        regions: Sequence[tuple[int, _Memory]],
        nbytes: int,
        granule: int,
        seen: npt.NDArray[np.uint64],
        filled: npt.NDArray[np.uint64] | None = None,
        share: tuple[int, int, int] = (0, 1, 64),
    ) -> None: ...
    @property
    def done(self) -> int: ...
    @property
    def applied(self) -> int: ...
    @property
    def cleared(self) -> int: ...
    def apply(self, kind: int, table: _Memory, data: _Memory = b"") -> None: ...
    def receive(
        self,
        fd: int,
        before: bytes,
        sequence: int,
        enough: int,
        first: float,
        patience: float,
        left: float,
        look: Callable[[], object] | None = None,
    ) -> tuple[int, bytes, int, int, bytes]: ...
