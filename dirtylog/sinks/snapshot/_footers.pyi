from collections.abc import Iterable
from typing import Self, final

import numpy as np
import numpy.typing as npt

__all__ = ["RunTable", "check_runs", "diff_header", "follow_diffs"]

def check_runs(block: bytes, npages: int, past: int) -> tuple[int, int] | None: ...
def diff_header(
    text: bytes, nbytes: int, size: bytes, regions: bytes
) -> tuple[int, int, str, str, str | None, int] | None: ...
def follow_diffs(
    table: RunTable,
    directory: str,
    parent: tuple[str, str],
    geometry: tuple[int, int, int, int, int],
    alike: tuple[bytes, bytes],
    files: list[tuple[str, str, int]],
    digests: set[str],
    identities: set[str],
    most: int,
) -> tuple[str, str]: ...

@final
class RunTable:
    @property
    def full(self) -> bool: ...
    def __new__(cls, most: int) -> Self: ...
    def take(
        self, text: bytes, at: int, rows: int, npages: int, file: int, packed: bool = False
    ) -> tuple[int, int] | None: ...
    def add(self, blocks: Iterable[npt.NDArray[np.int64]], file: int, packed: bool = False) -> None: ...
    def composed(self) -> npt.NDArray[np.int64]: ...
