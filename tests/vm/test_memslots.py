"""Memslots as KVM checks them, the memory behind them, and every error with nothing half-done."""

import array
import errno
import gc
import mmap
import weakref

import numpy as np
import pytest

import dirtylog as dl
from dirtylog.vm import arch

PAGE = 4096


@pytest.fixture
def vm():
    vm = dl.VM(vcpus=2)
    vm.set_memory_region(0, 0x100, 64)
    return vm


def refused(code, call, *arguments, **options):
    with pytest.raises(OSError) as caught:  # noqa: PT011
        call(*arguments, **options)
    assert caught.value.errno == code, caught.value
    return str(caught.value)


def test_a_slot_id_out_of_range_is_einval(vm):
    for slot in (-1, 125, 1 << 40):
        for call in (vm.get_dirty_log, vm.peek, vm.slot, vm.memory, vm.region):
            assert "slots 0 to 124" in refused(errno.EINVAL, call, slot)
        refused(errno.EINVAL, vm.set_memory_region, slot, 0, 1)


@pytest.mark.parametrize(("name", "slots"), [("x86", 125), ("arm", 32), ("mips", 8), ("s390", 32)])
def test_each_architecture_has_its_number_of_slots(name, slots):
    vm = dl.VM(name)
    vm.set_memory_region(slots - 1, 0, 1)
    refused(errno.EINVAL, vm.set_memory_region, slots, 100, 1)


def test_a_slot_that_does_not_exist_or_keeps_no_log_is_enoent(vm):
    vm.set_memory_region(1, 0x1000, 8, log_dirty=False)
    for slot in (1, 2):
        refused(errno.ENOENT, vm.get_dirty_log, slot)
        refused(errno.ENOENT, vm.peek, slot)
    refused(errno.ENOENT, vm.slot, 2)


@pytest.mark.parametrize(("base", "npages"), [(0x100, 64), (0xFF, 2), (0x13F, 1), (0, 0x1000), (0x120, 3)])
def test_an_overlap_with_another_slot_is_eexist(vm, base, npages):
    assert "overlap slot 0" in refused(errno.EEXIST, vm.set_memory_region, 1, base, npages)
    assert vm.region(0).npages == 64
    refused(errno.ENOENT, vm.region, 1)


def test_neighbours_do_not_overlap(vm):
    vm.set_memory_region(1, 0xFF, 1)
    vm.set_memory_region(2, 0x140, 1)
    vm.vcpus[0].write(0xFF * PAGE, b"\1" * (66 * PAGE))
    assert [vm.get_dirty_log(slot).count for slot in (0, 1, 2)] == [64, 1, 1]


def test_ranges_that_make_no_sense_are_einval(vm):
    for base, npages in [(-1, 1), (0, -1), (0, 1 << 31), (1 << 52, 1), ((1 << 51) - 1, 2)]:
        refused(errno.EINVAL, vm.set_memory_region, 1, base, npages)
    refused(errno.EINVAL, vm.set_memory_region, 1, 0, 0)
    refused(errno.EINVAL, vm.set_memory_region, 0, 0x100, 65)
    refused(errno.EINVAL, vm.set_memory_region, 0, 0x100, 64, memory=bytearray(64 * PAGE))
    refused(errno.EINVAL, dl.VM("ia64").set_memory_region, 0, (1 << 32) - 1, 2)


def test_numbers_of_the_wrong_type_are_type_errors(vm):
    for arguments in [("0", 0, 1), (1, 0.5, 1), (1, 0, "1"), (None, 0, 1)]:
        with pytest.raises(TypeError):
            vm.set_memory_region(*arguments)
    with pytest.raises(TypeError):
        vm.get_dirty_log("0")


def test_memory_that_cannot_be_used_is_refused_with_the_reason(vm):
    for memory, error, reason in [
        (bytes(8 * PAGE), ValueError, "read-only"),
        (bytearray(8 * PAGE - 1), ValueError, "need 32768"),
        (np.zeros((8, 2 * PAGE), np.uint8)[:, ::2], ValueError, "contiguous"),
        (12, TypeError, "bytes-like"),
    ]:
        with pytest.raises(error, match=reason):
            vm.set_memory_region(1, 0, 8, memory=memory)
        refused(errno.ENOENT, vm.region, 1)


@pytest.mark.parametrize(
    "make",
    [
        lambda: bytearray(8 * PAGE),
        lambda: np.zeros((8, PAGE // 8)),
        lambda: mmap.mmap(-1, 8 * PAGE),
        lambda: array.array("Q", bytes(9 * PAGE)),
    ],
)
def test_the_guest_writes_into_the_memory_it_was_given(vm, make):
    memory = make()
    vm.set_memory_region(1, 0, 8, memory=memory)
    vm.vcpus[0].write(3 * PAGE + 5, b"hello")
    assert bytes(memoryview(memory).cast("B")[3 * PAGE + 5 : 3 * PAGE + 10]) == b"hello"
    assert vm.vcpus[1].read(3 * PAGE + 5, 5) == b"hello"
    vm.set_memory_region(1, 0, 0)


def test_a_slot_may_be_changed_with_the_memory_it_has():
    memory = bytearray(8 * PAGE)
    vm = dl.VM()
    vm.set_memory_region(1, 0, 8, memory=memory)
    vm.set_memory_region(1, 16, 8, memory=memory)
    vm.vcpus[0].touch([16])
    assert memory[0] == 1


def test_memory_is_held_until_its_slot_is_deleted_and_no_longer():
    vm = dl.VM()
    memory = bytearray(PAGE)
    vm.set_memory_region(0, 0, 1, memory=memory)
    with pytest.raises(BufferError):
        memory.append(0)
    vm.set_memory_region(0, 0, 0)
    memory.append(0)


def test_a_machine_goes_away_with_its_last_reference():
    class Memory(np.ndarray):
        pass

    memory = np.zeros(PAGE, np.uint8).view(Memory)
    vm = dl.VM()
    vm.set_memory_region(0, 0, 1, memory=memory)
    alive = weakref.ref(memory)
    vcpu = vm.vcpus[0]
    del vm, memory
    gc.collect()
    vcpu.touch([0])
    del vcpu
    gc.collect()
    assert alive() is None


def test_a_view_of_the_memory_outlives_the_slot(vm):
    view = vm.memory(0)
    vm.vcpus[0].touch([0x100])
    vm.set_memory_region(0, 0, 0)
    assert view[0] == 1
    view[0] = 5


def test_deleting_a_slot_takes_its_pages_away_from_the_vcpus(harvesting, kit):
    vm = kit.machine(harvesting)
    vm.vcpus[0].touch([kit.base_gfn])
    vm.set_memory_region(0, 0, 0)
    assert f"{kit.base_gfn:#x}" in refused(errno.EFAULT, vm.vcpus[0].touch, [kit.base_gfn])
    vm.set_memory_region(0, kit.base_gfn, 10)
    assert vm.get_dirty_log(0).count == 0
    vm.vcpus[0].touch([kit.base_gfn])
    assert vm.memory(0)[0] == 1
    assert vm.get_dirty_log(0).count == 1


def test_a_moved_slot_keeps_memory_log_and_numbers(harvesting, kit):
    vm = kit.machine(harvesting, npages=100)
    vm.vcpus[0].touch(kit.base_gfn + np.array([1, 64, 99]))
    vm.set_memory_region(0, kit.base_gfn + 50, 100)
    vm.vcpus[1].touch(kit.base_gfn + 50 + np.array([2, 64]))
    assert vm.get_dirty_log(0).indices().tolist() == [1, 2, 64, 99]
    assert vm.get_dirty_log(0).count == 0
    assert vm.memory(0)[64 * PAGE] == 2
    refused(errno.EFAULT, vm.vcpus[0].touch, [kit.base_gfn + 49])


def test_logging_switched_on_reports_what_is_written_from_then_on(harvesting, kit):
    vm = kit.machine(harvesting)
    base = kit.base_gfn
    vm.set_memory_region(0, base, 512, log_dirty=False)
    vm.vcpus[0].touch([base, base + 1])
    vm.set_memory_region(0, base, 512, log_dirty=True)
    assert vm.get_dirty_log(0).count == 0
    vm.vcpus[0].touch([base + 1, base + 5])
    assert vm.get_dirty_log(0).indices().tolist() == [1, 5]
    vm.vcpus[0].touch([base + 2])
    vm.set_memory_region(0, base, 512, log_dirty=True)
    assert vm.get_dirty_log(0).indices().tolist() == [2]


def test_a_store_outside_every_slot_is_efault_and_stores_nothing(vm):
    vcpu = vm.vcpus[0]
    before = vm.memory(0).copy()
    refused(errno.EFAULT, vcpu.touch, [0x100, 0x101, 0x140])
    refused(errno.EFAULT, vcpu.store, [0x101, 0xFF], 7)
    refused(errno.EFAULT, vcpu.write, 0x13F * PAGE + PAGE - 2, b"abc")
    refused(errno.EFAULT, vcpu.read, 0x140 * PAGE - 1, 2)
    np.testing.assert_array_equal(vm.memory(0), before)
    assert vm.get_dirty_log(0).count == 0


def test_addresses_that_make_no_sense_are_index_errors(vm):
    vcpu = vm.vcpus[0]
    for call in (lambda: vcpu.touch([0x100, -1]), lambda: vcpu.write(-1, b"x"), lambda: vcpu.read(1 << 63, 1)):
        with pytest.raises(IndexError):
            call()
    for call in (lambda: vcpu.touch([1.5]), lambda: vcpu.touch(["a"]), lambda: vcpu.write(0x100000, "text")):
        with pytest.raises(TypeError):
            call()
    with pytest.raises(ValueError, match="negative"):
        vcpu.read(0x100000, -1)
    with pytest.raises(OverflowError):
        vcpu.store([0x100], -1)
    assert vm.get_dirty_log(0).count == 0
    assert vcpu.touch([]) == 0
    vcpu.write(0, b"")
    assert vcpu.read(0, 0) == b""


def test_machines_that_make_no_sense_are_refused():
    for options in [{"vcpus": 0}, {"vcpus": 1025}, {"page_size": 1000}, {"page_size": 32}, {"page_size": 1 << 31}]:
        with pytest.raises(ValueError, match=r"out of range|power of two"):
            dl.VM(**options)
    with pytest.raises(ValueError, match=r"choose one of .*x86"):
        dl.VM("vax")
    with pytest.raises(TypeError):
        dl.VM(arch.Arch)
    with pytest.raises(IndexError):
        dl.VM().vcpus[1]


def test_the_mechanism_refuses_to_work_without_its_lock(vm):
    with pytest.raises(RuntimeError, match="slots_lock"):
        vm.mmu.harvest(0)
    with pytest.raises(RuntimeError, match="slots_lock"):
        vm.mmu.slots()
    with vm.slots_lock, pytest.raises(RuntimeError, match="mmu_lock"):
        vm.mmu.stop_log(0)
    with vm.slots_lock, pytest.raises(IndexError, match="word 1"):
        vm.mmu.protect(0, np.array([1], np.uint64), np.array([1], np.uint64))
    with vm.slots_lock, pytest.raises(ValueError, match="pairs"):
        vm.mmu.protect(0, np.array([0], np.uint64), np.array([], np.uint64))
    with vm.slots_lock, pytest.raises(ValueError, match="shadow"):
        vm.mmu.flush_shadow(0)
