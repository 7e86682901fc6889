from collections.abc import Iterable
from typing import Self, final

import numpy as np
import numpy.typing as npt

from dirtylog._typing import Memory as MemoryLike

__all__ = ["Memory", "RunTable", "diff_header", "follow_diffs", "read_parts"]

def diff_header(
    text: bytes, nbytes: int, size: bytes, regions: bytes
) -> tuple[int, int, str, str, str | None, int] | None: ...
def follow_diffs(
    table: RunTable,
    directory: str,
    parent: tuple[str, str],
    geometry: tuple[int, int, int, int, int],
    alike: tuple[bytes, bytes],
    files: list[tuple[str, str]],
    digests: set[str],
    identities: set[str],
    most: int,
) -> tuple[str, str]: ...
def read_parts(
    path: str, digest: bytes, footer: int, buffer: MemoryLike, begin: int, extents: npt.NDArray[np.int64]
) -> bool: ...

@final
class RunTable:
    @property
    def full(self) -> bool: ...
    def __new__(cls, most: int) -> Self: ...
    def take(self, text: bytes, at: int, rows: int, npages: int, file: int) -> tuple[int, int] | None: ...
    def add(self, blocks: Iterable[npt.NDArray[np.int64]], file: int) -> None: ...
    def composed(self) -> npt.NDArray[np.int64]: ...

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
