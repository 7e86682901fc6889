from collections.abc import Sequence
from typing import final

import numpy as np
import numpy.typing as npt

from dirtylog._typing import Memory as _Memory
from dirtylog.sinks.migrate._frames import Memory

__all__ = ["FILLED", "GOES_ON", "ODD", "Faults"]

GOES_ON: int
FILLED: int
ODD: int

@final
class Faults(Memory):
    def __init__(
        self,
        regions: Sequence[tuple[int, _Memory]],
        nbytes: int,
        granule: int,
        missing: npt.NDArray[np.uint64],
        session: bytes,
    ) -> None: ...
    @property
    def user_mode_only(self) -> bool: ...
    @property
    def left(self) -> int: ...
    @property
    def applied(self) -> int: ...
    def start(self) -> None: ...
    def line(self, fd: int, received: int, sent: int, patience: float) -> None: ...
    def wait(self, seconds: float) -> int: ...
    def stop(self) -> None: ...
    def release(self) -> None: ...
