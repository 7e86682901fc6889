import numpy as np
import numpy.typing as npt

from dirtylog._typing import Memory

__all__ = ["DELTA", "WHOLE", "ZERO", "extents_of", "lay_deltas", "sort_pages"]

ZERO: int
WHOLE: int
DELTA: int

def sort_pages(
    window: Memory,
    extents: npt.NDArray[np.int64],
    copies: Memory,
    held: npt.NDArray[np.int64],
    frames: npt.NDArray[np.int64],
    page_size: int,
    *,
    older: int,
    out: Memory,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint8], int]: ...
def extents_of(
    numbers: npt.NDArray[np.int64], kinds: npt.NDArray[np.uint8], kind: int, page_size: int, end: int
) -> npt.NDArray[np.int64]: ...
def lay_deltas(data: Memory, extents: npt.NDArray[np.int64], page_size: int, target: Memory) -> None: ...
