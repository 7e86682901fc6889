from collections.abc import Callable

import numpy as np
import numpy.typing as npt

__all__ = ["available", "write_moment"]

def available() -> bool: ...
def write_moment(descriptor: int, pieces: npt.NDArray[np.int64], taken: Callable[[int], object]) -> int: ...
