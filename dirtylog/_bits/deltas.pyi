import numpy as np
import numpy.typing as npt

from dirtylog._typing import Memory

__all__ = ["DELTA", "WHOLE", "ZERO", "lay_deltas", "sort_pages"]

ZERO: int
WHOLE: int
DELTA: int

def sort_pages(
    window: Memory,
    numbers: npt.NDArray[np.int64],
    copies: Memory,
    held: npt.NDArray[np.int64],
    frames: npt.NDArray[np.int64],
    page_size: int,
    *,
    older: int,
    out: Memory,
) -> tuple[npt.NDArray[np.uint8], int]: ...
def lay_deltas(data: Memory, extents: npt.NDArray[np.int64], page_size: int, target: Memory) -> None: ...
