from typing import final

__all__: list[str] = []

def simd_path() -> str: ...
def simd_paths() -> tuple[str, ...]: ...

@final
class Block:
    def __buffer__(self, flags: int, /) -> memoryview: ...
