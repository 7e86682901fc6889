"""Refusals at the edge of what is allowed: four bytes off alignment, and a consumer that wants to write live words."""

import io

import numpy as np
import pytest

import dirtylog as dl


@pytest.mark.parametrize("offset", [1, 2, 4, 7])
def test_memory_that_begins_between_words_is_refused(offset):
    memory = np.zeros(10, np.uint64).view(np.uint8)[offset : offset + 64]
    with pytest.raises(ValueError, match="multiple of 8"):
        dl.DirtyBitmap.from_buffer(memory)


def test_nobody_is_given_the_live_words_to_write():
    bitmap = dl.DirtyBitmap(64)
    with pytest.raises((BufferError, TypeError)):
        io.BytesIO(b"\xff" * 8).readinto(bitmap)
    assert bitmap.count() == 0
