"""Slots of a real machine: which are refused, the memory that they borrow, what a change of one does to its log."""

import errno

import numpy as np
import pytest

from dirtylog import DirtyPages
from dirtylog.sources import kvm

from ...leaks import assert_nothing_leaks
from .guests import GFN, PAGE, anonymous, machine, modes, needs_kvm, pages, refused


@needs_kvm
def test_a_slot_that_is_moved_keeps_its_log(vm):
    guest = machine(vm, "legacy", 64)
    guest.write([GFN + 4])
    assert pages(vm.slot(0).peek()) == [4]
    guest.write([GFN + 5])
    vm.set_memory_region(0, GFN + 1000, 64)
    guest.write([GFN + 1006])
    assert pages(vm.get_dirty_log(0)) == [4, 5, 6]


@needs_kvm
@modes
def test_a_log_that_was_switched_off_starts_anew(vm, mode):
    guest = machine(vm, mode, 64)
    guest.write([GFN + 5])
    vm.slot(0).peek()
    vm.set_memory_region(0, GFN, 64, log_dirty=False)
    guest.write([GFN + 6])
    vm.set_memory_region(0, GFN, 64)
    guest.write([GFN + 7])
    assert pages(vm.slot(0).harvest()) == [7]


@needs_kvm
def test_memory_of_a_slot_is_the_live_guest_memory(vm):
    guest = machine(vm, "legacy", 8)
    memory = vm.memory(0)
    assert memory.nbytes == 8 * PAGE
    guest.write([GFN + 7], 42)
    assert memory[7 * PAGE] == 42
    with pytest.raises(OSError, match="slot 1 does not exist"):
        vm.memory(1)


@needs_kvm
def test_a_slot_that_keeps_no_log_or_does_not_exist_is_enoent(vm):
    vm.set_memory_region(3, GFN, 10, log_dirty=False)
    refused(errno.ENOENT, vm.get_dirty_log, 3)
    refused(errno.ENOENT, vm.slot(3).harvest)
    refused(errno.ENOENT, vm.slot(3).peek)
    refused(errno.ENOENT, vm.clear_dirty_log, 3, 0, 10, DirtyPages.from_indices([], 10))
    refused(errno.ENOENT, vm.get_dirty_log, 4)
    refused(errno.ENOENT, vm.slot, 4)


@needs_kvm
@pytest.mark.parametrize("slot", [-1, 32764 + 1, 1 << 40])
def test_a_slot_id_out_of_range_is_einval(vm, slot):
    refused(errno.EINVAL, vm.get_dirty_log, slot)
    refused(errno.EINVAL, vm.set_memory_region, slot, 0, 1)


@needs_kvm
def test_overlapping_slots_are_refused_and_nothing_has_changed(vm):
    vm.set_memory_region(0, GFN, 10)
    refused(errno.EEXIST, vm.set_memory_region, 1, GFN + 9, 10)
    refused(errno.ENOENT, vm.slot, 1)
    vm.set_memory_region(1, GFN + 10, 10)


@needs_kvm
def test_a_change_of_size_is_refused_until_the_slot_is_deleted(vm):
    vm.set_memory_region(0, GFN, 10)
    refused(errno.EINVAL, vm.set_memory_region, 0, GFN, 9)
    refused(errno.EINVAL, vm.set_memory_region, 0, GFN, 11)
    refused(errno.EINVAL, vm.set_memory_region, 0, GFN, 10, memory=anonymous(10))
    source = vm.slot(0)
    assert source.npages == 10
    vm.set_memory_region(0, GFN, 0)
    refused(errno.ENOENT, vm.slot, 0)
    vm.set_memory_region(0, GFN, 9)
    refused(errno.ENOENT, source.harvest)


@needs_kvm
def test_words_for_a_deleted_slot_are_never_filled_from_a_larger_one(vm):
    """Another thread may delete a slot between the look-up of its size and the ioctl."""
    vm.set_memory_region(0, GFN, 64)
    pinned = vm._regions[0].pinned
    vm.set_memory_region(0, GFN, 0)
    vm.set_memory_region(0, GFN, 1 << 16)
    refused(errno.ENOENT, vm._handle.get_dirty_log, 0, pinned, 64, PAGE)


@needs_kvm
def test_deleting_what_does_not_exist_and_addresses_past_64_bits_are_refused(vm):
    refused(errno.EINVAL, vm.set_memory_region, 0, 0, 0)
    refused(errno.EINVAL, vm.set_memory_region, 0, -1, 1)
    refused(errno.EINVAL, vm.set_memory_region, 0, 0, -1)
    refused(errno.EINVAL, vm.set_memory_region, 0, 1 << 52, 1)


@needs_kvm
def test_memory_has_to_be_aligned_large_enough_and_writable(vm):
    memory = anonymous(4)
    view = memoryview(memory)
    with pytest.raises(ValueError, match="starts 8 bytes into a page"):
        vm.set_memory_region(0, 0, 1, memory=view[8:])
    with pytest.raises(ValueError, match="5 pages need 20480 bytes of memory, got 16384"):
        vm.set_memory_region(0, 0, 5, memory=view)
    with pytest.raises(ValueError, match="writable and contiguous"):
        vm.set_memory_region(0, 0, 1, memory=view.toreadonly())
    with pytest.raises(ValueError, match="writable and contiguous"):
        vm.set_memory_region(0, 0, 1, memory=np.frombuffer(memory, np.uint8)[::2])
    with pytest.raises(TypeError):
        vm.set_memory_region(0, 0, 1, memory=3)
    refused(errno.ENOENT, vm.slot, 0)
    del view
    memory.close()


@needs_kvm
def test_memory_cannot_be_unmapped_while_a_slot_uses_it(vm):
    memory = anonymous(4)
    vm.set_memory_region(0, 0, 4, memory=memory)
    with pytest.raises(BufferError):
        memory.close()
    with pytest.raises(BufferError):
        memory.resize(PAGE)
    vm.set_memory_region(0, 0, 0)
    memory.close()


@needs_kvm
def test_closing_the_vm_gives_the_memory_back():
    memory = anonymous(4)
    with kvm.Kvm() as system, system.create_vm() as vm:
        vm.set_memory_region(0, 0, 4, memory=memory)
        source = vm.slot(0)
    memory.close()
    with pytest.raises(ValueError, match="closed"):
        source.harvest()


@needs_kvm
@pytest.mark.parametrize("done", [False, True], ids=["before", "after"])
def test_an_interrupt_while_a_slot_is_made_leaves_no_slot(vm, done):
    machine(vm, "ring", 100)
    vm._handle = Interrupted(vm._handle, done)
    with pytest.raises(KeyboardInterrupt):
        vm.set_memory_region(1, GFN + 100, 10)
    refused(errno.ENOENT, vm.memory, 1)
    vm.set_memory_region(1, GFN + 105, 20)
    assert sorted(vm.harvest_rings()) == [0, 1]


@needs_kvm
@pytest.mark.parametrize("done", [False, True], ids=["before", "after"])
def test_an_interrupt_while_a_log_is_switched_off_reports_every_page_and_logs_on(vm, done):
    guest = machine(vm, "legacy", 100)
    guest.write([GFN + 5])
    vm._handle = Interrupted(vm._handle, done)
    with pytest.raises(KeyboardInterrupt):
        vm.set_memory_region(0, GFN, 100, log_dirty=False)
    reported = vm.get_dirty_log(0)
    assert (reported.count, reported.exact) == (100, False)
    guest.write([GFN + 6])
    assert pages(vm.get_dirty_log(0)) == [6]


class Interrupted:
    """A handle whose next ioctl ends in Ctrl-C, before or after it was done."""

    def __init__(self, handle, done):
        self._handle, self._done, self._armed = handle, done, True

    def __getattr__(self, name):
        return getattr(self._handle, name)

    def ioctl(self, *arguments):
        armed, self._armed = self._armed, False
        if armed and not self._done:
            raise KeyboardInterrupt
        answer = self._handle.ioctl(*arguments)
        if armed:
            raise KeyboardInterrupt
        return answer


def make_and_delete_slots(count):
    with kvm.Kvm() as system, system.create_vm() as vm:
        for _ in range(count):
            vm.set_memory_region(0, 0, 7)
            assert np.frombuffer(vm.slot(0).memory, np.uint8).ctypes.data % PAGE == 0
            vm.set_memory_region(0, 0, 0)


@needs_kvm
def test_anonymous_memory_goes_with_its_slot(sanitized):
    assert_nothing_leaks(make_and_delete_slots, memory=not sanitized)
