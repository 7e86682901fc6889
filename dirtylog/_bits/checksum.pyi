from dirtylog._typing import Memory

__all__ = ["crc32"]

def crc32(data: Memory, value: int = 0) -> int: ...
