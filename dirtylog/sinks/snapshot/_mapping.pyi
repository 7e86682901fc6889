from typing import Self, final

import numpy as np
import numpy.typing as npt

from dirtylog._typing import Memory as MemoryLike

__all__ = ["Memory", "read_parts"]

def read_parts(
    path: str, digest: bytes, footer: int, buffer: MemoryLike, begin: int, pieces: npt.NDArray[np.int64]
) -> bool: ...

@final
class Memory:
    @property
    def nbytes(self) -> int: ...
    @property
    def address(self) -> int: ...
    @property
    def mapped(self) -> int: ...
    def __new__(cls, nbytes: int, page_bytes: int) -> Self: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...
    def lay(
        self, path: str, digest: bytes, footer: int, whole: npt.NDArray[np.int64], parts: npt.NDArray[np.int64]
    ) -> bool: ...
    def forget(self, extents: npt.NDArray[np.int64]) -> None: ...
