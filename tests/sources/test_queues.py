"""The indices of a virtqueue, in memory that a guest shares: in C, so that a sanitizer looks at them too."""

import pytest

from dirtylog.sources.vhost import _queues


def test_an_index_is_aligned_and_in_memory():
    memory = bytearray(range(8))
    assert _queues.index(memory, 2) == 0x0302
    _queues.publish(memory, 6, 0xABCD)
    _queues.fence()
    assert memory[6:] == b"\xcd\xab"
    for at in (-2, 1, 7, 8):
        with pytest.raises(ValueError, match=f"an index at {at} is not aligned"):
            _queues.index(memory, at)
