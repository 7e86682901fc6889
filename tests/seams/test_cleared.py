"""Bits that are cleared on request come back if nobody hears that they are: interrupts wherever Python looks."""

import contextlib
import itertools

import pytest

import dirtylog as dl
from dirtylog.sources import kvm

pytestmark = pytest.mark.thread_unsafe(reason="traces belong to the process")
NPAGES = 128
NAMED = dl.DirtyPages.from_indices([5, 9, 20, 70], NPAGES)


def interrupted_everywhere(interrupt_class, vm_of, file):
    """Clear pages 5 and 9, of which nobody knows but the log, and 20, which is owed; yield the machine each time."""
    for place in itertools.count(1):
        vm, owed = vm_of()
        owed.owe(dl.DirtyPages.from_indices([20, 70], NPAGES))
        interrupt = interrupt_class(place, file)
        try:
            with interrupt.active():
                vm.clear_dirty_log(0, 0, 64, NAMED)
        except KeyboardInterrupt:
            yield vm, interrupt.where
        else:
            assert vm.get_dirty_log(0).indices().tolist() == [70]
            # A machine that is cleared at all was looked at.
            assert place > 5
            return


def test_a_clear_of_the_models_log_that_is_interrupted_loses_nothing(interrupt_class):
    def made():
        vm = dl.VM(manual_protect=True)
        vm.set_memory_region(0, base_gfn=0, npages=NPAGES)
        vm.vcpus[0].touch([5, 9])
        vm.get_dirty_log(0)
        return vm, vm.owed_by(0, NPAGES)

    for vm, where in interrupted_everywhere(interrupt_class, made, "vm/dirty_log.py"):
        assert vm.get_dirty_log(0).indices().tolist() == [5, 9, 20, 70], where
        vm.vcpus[0].touch([6])
        assert vm.harvest(0).indices().tolist() == [5, 6, 9, 20, 70], where


def test_a_slot_that_is_deleted_just_after_its_clear_leaves_nothing_to_the_next(monkeypatch):
    vm = dl.VM(manual_protect=True)
    vm.set_memory_region(0, base_gfn=0, npages=NPAGES)
    vm.vcpus[0].touch([5, 9])
    pages = vm.get_dirty_log(0)

    class Deleting:
        """A lock; when it has been released the slot goes, and an interrupt comes."""

        def __init__(self, lock):
            self.lock = lock

        def __enter__(self):
            return self.lock.__enter__()

        def __exit__(self, *exception):
            self.lock.__exit__(*exception)
            patched.undo()
            vm.set_memory_region(0, base_gfn=0, npages=0)
            vm.set_memory_region(0, base_gfn=0, npages=64)
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(vm, "slots_lock", Deleting(vm.slots_lock))
        with pytest.raises(KeyboardInterrupt):
            vm.clear_dirty_log(0, 0, NPAGES, pages)
    assert vm.harvest(0).count == 0


@pytest.mark.skipif(not kvm.probe().available, reason=kvm.probe().reason)
def test_a_clear_of_kvms_log_that_is_interrupted_loses_nothing(interrupt_class):
    with contextlib.ExitStack() as stack:

        def made():
            system = stack.enter_context(kvm.Kvm())
            vm = stack.enter_context(system.create_vm())
            # All of it is reported the first time, and so nothing has to run.
            vm.enable_manual_protect(initially_set=True)
            vm.set_memory_region(0, 1024, NPAGES)
            vm.get_dirty_log(0)
            every = dl.DirtyPages.from_indices(range(NPAGES), NPAGES)
            vm.clear_dirty_log(0, 0, NPAGES, every - dl.DirtyPages.from_indices([5, 9], NPAGES))
            return vm, vm._regions[0].owed

        for vm, where in interrupted_everywhere(interrupt_class, made, "kvm/machine.py"):
            assert vm.get_dirty_log(0).indices().tolist() == [5, 9, 20, 70], where
