"""What the pages of a Parquet file unpack to, read from their headers: the footer's word for it is not enough.

The reader allocates what a page's own header announces, up to 2 GiB, whatever the footer says of its column. So the
headers are gone through before the first page is unpacked. They are Thrift structures in the compact protocol.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

__all__ = ["unpacked_sizes"]

# A header holds a few numbers and the smallest and largest value of the page.
_MAX_HEADER = 1 << 16
_MAX_DEPTH = 8
_BOOLEANS, _BYTE, _INTEGERS, _DOUBLE, _BINARY, _LISTS, _STRUCT = (1, 2), 3, (4, 5, 6), 7, 8, (9, 10), 12
_UNPACKED, _PACKED = 2, 3


class _Cursor:
    """Reads one structure; IndexError past the end, ValueError where it is none."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0

    def byte(self) -> int:
        self.at += 1
        return self.data[self.at - 1]

    def varint(self) -> int:
        value = 0
        for shift in range(0, 70, 7):
            byte = self.byte()
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
        raise ValueError("a number has more than 64 bits")

    def zigzag(self) -> int:
        value = self.varint()
        return (value >> 1) ^ -(value & 1)

    def skip(self, kind: int, depth: int) -> None:
        if depth > _MAX_DEPTH:
            raise ValueError(f"it is nested deeper than {_MAX_DEPTH}")
        if kind in _BOOLEANS:
            return
        if kind == _BYTE:
            self.at += 1
        elif kind in _INTEGERS:
            self.varint()
        elif kind == _DOUBLE:
            self.at += 8
        elif kind == _BINARY:
            length = self.varint()
            self.at += length
        elif kind in _LISTS:
            head = self.byte()
            size = self.varint() if head >> 4 == 15 else head >> 4
            if size > _MAX_HEADER:
                raise ValueError(f"a list has {size} items")
            for _ in range(size):
                # A boolean takes a byte in a list.
                self.skip(_BYTE if head & 15 in _BOOLEANS else head & 15, depth + 1)
        elif kind == _STRUCT:
            self.struct(depth + 1)
        else:
            raise ValueError(f"there is a field of type {kind}")

    def struct(self, depth: int = 0) -> dict[int, int]:
        """Go through a structure; return its numbers by field id."""
        numbers: dict[int, int] = {}
        field = 0
        while (head := self.byte()) != 0:
            field = field + (head >> 4) if head >> 4 else self.zigzag()
            if head & 15 in _INTEGERS:
                numbers[field] = self.zigzag()
            else:
                self.skip(head & 15, depth)
        return numbers


def unpacked_sizes(descriptor: int, start: int, length: int) -> Iterator[int]:
    """Yield how many bytes each page of a column chunk says it unpacks to.

    Parameters
    ----------
    descriptor : int
        Of the file.
    start, length : int
        The chunk, in bytes.

    Raises
    ------
    ValueError
        A header cannot be read, or a page reaches past the chunk.

    Notes
    -----
    One read of at most 64 KiB a page; O(header) memory.

    References
    ----------
    ``PageHeader`` in ``parquet.thrift`` of the Parquet format.
    """
    end = start + length
    while start < end:
        cursor = _Cursor(os.pread(descriptor, min(_MAX_HEADER, end - start), start))
        try:
            numbers = cursor.struct()
            unpacked, packed = numbers[_UNPACKED], numbers[_PACKED]
        except (IndexError, KeyError, ValueError) as error:
            raise ValueError(f"the header of the page at byte {start} cannot be read ({error})") from None
        start += cursor.at + packed
        if unpacked < 0 or packed < 0 or start > end:
            raise ValueError(f"a page of {packed} bytes, {unpacked} unpacked, does not fit its column")
        yield unpacked
