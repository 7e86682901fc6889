"""The CRC-32 of the library is zlib's, whatever the length, the place in memory and what came before."""

import zlib

import numpy as np
import pytest

from dirtylog._bits.checksum import crc32


def test_it_is_zlibs_at_every_length_and_alignment():
    data = np.random.default_rng(0).integers(0, 256, 5000, np.uint8)
    for start in range(17):
        for length in [*range(150), 1000, 1023, 1024, 1025, 4096, 4500]:
            part = memoryview(data)[start : start + length]
            assert crc32(part) == zlib.crc32(part), (start, length)


@pytest.mark.parametrize("value", [0, 1, 0x12345678, 0xFFFFFFFF])
def test_it_goes_on_from_what_came_before(value):
    data = np.random.default_rng(1).bytes(3000)
    assert crc32(data, value) == zlib.crc32(data, value)
    assert crc32(data[100:], crc32(data[:100], value)) == zlib.crc32(data, value)
    for same in (bytes(256), b"\xff" * 256):
        assert crc32(same, value) == zlib.crc32(same, value)


def test_what_has_no_bytes_is_refused():
    with pytest.raises(TypeError, match="a buffer of bytes is needed"):
        crc32("text")
    with pytest.raises(ValueError, match="C-contiguous"):
        crc32(np.zeros(9, np.uint8)[::2])
