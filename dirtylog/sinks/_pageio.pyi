import numpy as np
import numpy.typing as npt

from dirtylog._typing import Memory

__all__ = ["data_extents", "read_extents", "write_extents"]

def write_extents(fd: int, buffer: Memory, extents: npt.NDArray[np.int64], *, packed: bool, name: str) -> None: ...
def read_extents(fd: int, buffer: Memory, extents: npt.NDArray[np.int64], *, packed: bool, name: str) -> None: ...
def data_extents(fd: int, end: int, *, name: str) -> npt.NDArray[np.int64]: ...
