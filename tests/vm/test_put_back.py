"""What a failed harvest took is in the log again at once (I5): a peek shows it, before any other harvest."""

import pytest

import dirtylog as dl


class FailsOnce(dl.Arch):
    """x86 whose next flushes fail, as many as asked for."""

    name = "fails-once"
    failures = 0

    def flush_tlbs(self, vm, slot):
        if self.failures:
            self.failures -= 1
            raise OSError("no interrupt")
        super().flush_tlbs(vm, slot)


def test_a_peek_after_a_failed_harvest_shows_the_pages():
    vm = dl.VM(arch=FailsOnce())
    vm.set_memory_region(0, base_gfn=0, npages=200, log_dirty=True)
    vm.vcpus[0].touch([3, 130])
    vm.arch.failures = 1
    with pytest.raises(OSError, match="no interrupt"):
        vm.get_dirty_log(0)
    assert vm.peek(0).indices().tolist() == [3, 130]
    assert vm.get_dirty_log(0).indices().tolist() == [3, 130]
    assert vm.get_dirty_log(0).count == 0
