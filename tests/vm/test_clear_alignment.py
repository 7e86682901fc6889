"""KVM_CLEAR_DIRTY_LOG takes whole words: half a word is EINVAL and clears nothing."""

import errno

import pytest

import dirtylog as dl


@pytest.mark.parametrize(("first", "count"), [(32, 64), (1, 64), (63, 65), (96, 104), (0, 32), (64, 63), (0, 96)])
def test_a_range_of_half_a_word_is_einval_and_clears_nothing(first, count):
    vm = dl.VM(manual_protect=True)
    vm.set_memory_region(0, base_gfn=0, npages=200)
    vm.vcpus[0].touch(range(200))
    dirty = vm.get_dirty_log(0)
    with pytest.raises(OSError, match="multiple of 64") as refused:
        vm.clear_dirty_log(0, first, count, dirty)
    assert refused.value.errno == errno.EINVAL
    assert vm.get_dirty_log(0).count == 200
