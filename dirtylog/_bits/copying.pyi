import numpy as np
import numpy.typing as npt

from dirtylog._typing import Memory

__all__ = ["copy_extents", "gather", "scatter"]

def copy_extents(source: Memory, target: Memory, extents: npt.NDArray[np.int64]) -> int: ...
def gather(source: Memory, extents: npt.NDArray[np.int64], packed: Memory) -> None: ...
def scatter(packed: Memory, extents: npt.NDArray[np.int64], target: Memory) -> None: ...
