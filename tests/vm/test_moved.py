"""A slot on the move, and one whose end or whose log's beginning was interrupted: nothing is lost, nothing is left."""

from pathlib import Path

import pytest

import dirtylog as dl


class InterruptError(Exception):
    """What a signal handler raises."""


def interrupted():
    raise InterruptError


def test_a_buffer_that_fills_up_while_a_slot_moves_loses_no_page_of_it(c_program):
    assert c_program(Path(__file__).with_name("moved_slot.c")) == (0, "")


@pytest.mark.parametrize("options", [{}, {"dirty_ring": 128}])
def test_what_an_interrupt_left_of_a_deleted_slot_is_not_the_next_ones(monkeypatch, options):
    vm = dl.VM(**options)
    vm.set_memory_region(0, base_gfn=0, npages=1000)
    vm.vcpus[0].touch([7, 900])
    with monkeypatch.context() as patched:
        # Pages that were taken and not handed out, and then: between the end of the slot and its record.
        vm.owed_by(0, 1000).owe(dl.DirtyPages.from_indices([8], 1000))
        patched.setattr(vm, "_forget", lambda slot: interrupted())
        with pytest.raises(InterruptError):
            vm.set_memory_region(0, base_gfn=0, npages=0)
    vm.set_memory_region(0, base_gfn=0, npages=100)
    assert vm.harvest(0).count == 0
    vm.vcpus[0].touch([3])
    assert vm.harvest(0).indices().tolist() == [3]


class FlushesLater(dl.Arch):
    """x86, interrupted before the flush that makes a log complete."""

    name = "flushes-later"
    interrupt = False

    def flush_tlbs(self, vm, slot):
        if self.interrupt:
            self.interrupt = False
            raise InterruptError
        super().flush_tlbs(vm, slot)


class Interrupts:
    """A lock; an interrupt comes when it has been released for the first time."""

    def __init__(self, lock):
        self.lock, self.interrupt = lock, True

    def __enter__(self):
        return self.lock.__enter__()

    def __exit__(self, *exception):
        self.lock.__exit__(*exception)
        if self.interrupt:
            self.interrupt = False
            raise InterruptError


@pytest.mark.parametrize("where", ["before the flush", "in the flush"])
def test_a_log_whose_beginning_was_interrupted_is_not_there_rather_than_blind(monkeypatch, where):
    vm = dl.VM(arch=FlushesLater())
    vm.set_memory_region(0, base_gfn=0, npages=64, log_dirty=False)
    vm.vcpus[0].touch([5])  # its entry in the TLB permits writes
    with monkeypatch.context() as patched:
        if where == "in the flush":
            vm.arch.interrupt = True
        else:
            patched.setattr(vm, "mmu_lock", Interrupts(vm.mmu_lock))
        with pytest.raises(InterruptError):
            vm.set_memory_region(0, base_gfn=0, npages=64)
    with pytest.raises(OSError, match="keeps no dirty log"):
        vm.get_dirty_log(0)
    vm.set_memory_region(0, base_gfn=0, npages=64)
    vm.vcpus[0].touch([5])
    assert vm.get_dirty_log(0).indices().tolist() == [5]


def test_a_harvest_of_two_calls_that_is_interrupted_between_the_clear_and_its_end_loses_nothing(monkeypatch):
    vm = dl.VM(manual_protect=True)
    vm.set_memory_region(0, base_gfn=0, npages=64)
    vm.vcpus[0].touch([5, 9])
    real = dl.vm.dirty_log.clear_dirty_log

    def clear(*arguments, **options):
        real(*arguments, **options)
        raise InterruptError

    with monkeypatch.context() as patched:
        patched.setattr(dl.vm.dirty_log, "clear_dirty_log", clear)
        with pytest.raises(InterruptError):
            vm.harvest(0)
    assert vm.peek(0).indices().tolist() == [5, 9]
    assert vm.get_dirty_log(0).indices().tolist() == [5, 9]
    vm.vcpus[0].touch([6])
    assert vm.harvest(0).indices().tolist() == [5, 6, 9]
    assert vm.harvest(0).count == 0


def test_what_is_owed_is_cleared_like_what_is_in_the_log():
    vm = dl.VM(manual_protect=True)
    vm.set_memory_region(0, base_gfn=0, npages=128)
    vm.owed_by(0, 128).owe(dl.DirtyPages.from_indices([5, 100], 128))
    pages = vm.get_dirty_log(0)
    assert pages.indices().tolist() == [5, 100]
    vm.clear_dirty_log(0, 0, 64, pages)
    assert vm.get_dirty_log(0).indices().tolist() == [100]


def test_a_signal_handler_that_harvests_during_a_harvest_does_not_wait_for_itself(monkeypatch):
    vm = dl.VM(manual_protect=True)
    vm.set_memory_region(0, base_gfn=0, npages=64)
    vm.vcpus[0].touch([5])
    real, inner = vm.get_dirty_log, []

    def get_dirty_log(slot):
        pages = real(slot)
        if not inner:
            inner.append(None)
            inner.append(vm.harvest(0))
        return pages

    monkeypatch.setattr(vm, "get_dirty_log", get_dirty_log)
    assert 5 in vm.harvest(0) | inner[1]
    assert vm.harvest(0).count == 0


def test_what_the_hardware_has_noted_before_a_clear_is_cleared_with_it():
    vm = dl.VM(arch="powerpc-book3s-hv", manual_protect=True)
    vm.set_memory_region(0, base_gfn=0, npages=64)
    vm.vcpus[0].touch([5])
    pages = vm.get_dirty_log(0)
    vm.vcpus[0].touch([5, 6])
    vm.clear_dirty_log(0, 0, 64, pages)
    # 5 is copied after this, with its second write in it; 6 was not reported before.
    assert vm.get_dirty_log(0).indices().tolist() == [6]
