"""Dirty rings of a real machine: harvested slot by slot, and distrusted where they have lost an entry."""

import errno
import warnings

import numpy as np
import pytest

from dirtylog import DirtyLogError, IncompleteLogWarning
from dirtylog.sources import kvm
from dirtylog.sources.kvm import _kvm
from dirtylog.sources.kvm._guest import Guest

from ...signals import signalled
from .guests import GFN, PADDING, Failing, machine, needs_kvm, pages, refused


@needs_kvm
def test_rings_of_all_vcpus_are_harvested_slot_by_slot(vm):
    vm.enable_dirty_ring(1024)
    vm.set_memory_region(0, GFN, 64)
    vm.set_memory_region(1, GFN + 64, 200)
    vm.set_memory_region(2, GFN + 1000, 10, log_dirty=False)
    guests = [Guest(vm, gfn=1024 * at, slot=90 + at, padding=PADDING) for at in range(2)]
    guests[0].write([GFN + 1, GFN + 64, GFN + 1000])
    guests[1].write([GFN + 2, GFN + 64 + 199])
    harvested = vm.harvest_rings()
    assert {slot: pages(dirty) for slot, dirty in harvested.items()} == {0: [1, 2], 1: [0, 199]}
    assert not any(vm.harvest_rings().values())


@needs_kvm
def test_harvesting_one_slot_from_the_rings_keeps_the_others_pages(vm):
    vm.enable_dirty_ring(1024)
    vm.set_memory_region(0, GFN, 64)
    vm.set_memory_region(1, GFN + 64, 64)
    guest = Guest(vm, padding=PADDING)
    guest.write([GFN + 1, GFN + 66])
    assert pages(vm.slot(0).harvest()) == [1]
    assert pages(vm.slot(1).peek()) == [2]
    assert pages(vm.harvest_rings()[1]) == [2]


@needs_kvm
def test_a_ring_goes_round_many_times(vm):
    guest = machine(vm, "ring", 64, ring=1024)
    for round_ in range(40):
        guest.write(GFN + np.arange(64), 1 + round_)
        assert vm.harvest_rings()[0].count == 64


@needs_kvm
def test_signals_during_a_harvest_of_the_rings_lose_nothing(vm):
    """KVM stops taking entries back as soon as a signal is pending."""
    guest = machine(vm, "ring", 12000, ring=16384)
    order = np.random.default_rng(3).permutation(12000)
    guest.write(GFN + order)
    calls = []
    with signalled(lambda *_: calls.append(None)):
        harvested = vm.harvest_rings()[0]
    assert (harvested.count, harvested.exact) == (12000, True)
    assert calls
    guest.write(GFN + order[:100])
    assert pages(vm.harvest_rings()[0]) == sorted(order[:100].tolist())


@needs_kvm
@pytest.mark.parametrize("entries", [0, -4, 1000, 3 << 10, 1 << 17, 2])
def test_a_ring_size_that_kvm_does_not_know_is_einval(vm, entries):
    refused(errno.EINVAL, vm.enable_dirty_ring, entries)


@needs_kvm
def test_a_ring_comes_before_the_first_vcpu_and_once(vm):
    vm.enable_dirty_ring(1024)
    refused(errno.EINVAL, vm.enable_dirty_ring, 1024)
    with kvm.Kvm() as system, system.create_vm() as late:
        late.create_vcpu()
        refused(errno.EINVAL, late.enable_dirty_ring, 1024)
        refused(errno.EINVAL, late.harvest_rings)


@needs_kvm
def test_rings_and_manual_protection_exclude_each_other(vm):
    vm.enable_dirty_ring(1024)
    refused(errno.EINVAL, vm.enable_manual_protect)
    with kvm.Kvm() as system, system.create_vm() as other:
        other.enable_manual_protect()
        refused(errno.EINVAL, other.enable_dirty_ring, 1024)


@needs_kvm
def test_get_dirty_log_with_rings_is_refused(vm):
    machine(vm, "ring", 64)
    refused(errno.ENXIO, vm.get_dirty_log, 0)


def guest_after_a_reset_that_failed(vm):
    """Return a guest whose page 5 was read from the ring, and not taken back by KVM."""
    guest = machine(vm, "ring", 100)
    guest.write([GFN + 5])
    vm._handle = Failing(vm._handle, "reset_rings", [OSError(errno.EIO, "no reset")])
    with pytest.raises(OSError, match="no reset"):
        vm.harvest_rings()
    return guest


@needs_kvm
def test_pages_survive_a_reset_of_the_rings_that_fails(vm):
    guest = guest_after_a_reset_that_failed(vm)
    guest.write([GFN + 6])
    harvested = vm.harvest_rings()[0]
    assert (pages(harvested), harvested.exact) == ([5, 6], True)
    guest.write([GFN + 5])
    assert pages(vm.harvest_rings()[0]) == [5]


@needs_kvm
def test_a_reset_that_takes_back_too_few_entries_is_an_overflow_for_good(vm):
    guest = machine(vm, "ring", 100)
    guest.write([GFN + 5])
    vm._handle = Failing(vm._handle, "reset_rings", [0])
    for _ in range(2):
        with pytest.warns(IncompleteLogWarning, match="slot 0: KVM took back 0 of 1 ring entries"):
            harvested = vm.harvest_rings()[0]
        assert (harvested.count, harvested.exact) == (100, False)
    with pytest.warns(IncompleteLogWarning):
        assert vm.slot(0).peek().count == 100
    with pytest.raises(DirtyLogError, match="can no longer track"):
        vm._rings.note_full(vm._rings.rings[0], vm._rings.harvests)


def fake_ring(vm, size=16):
    entries = np.zeros(size, np.dtype([("flags", "<u4"), ("slot", "<u4"), ("offset", "<u8")]))
    vm._rings.rings.append(_kvm.Ring(entries, size))
    return entries


@needs_kvm
def test_a_full_ring_with_nothing_in_it_reports_everything(vm):
    machine(vm, "ring", 100)
    fake_ring(vm)
    vm._rings.note_full(vm._rings.rings[1], vm._rings.harvests)
    with pytest.warns(IncompleteLogWarning, match=r"vCPU 1 \(16 entries\) overflowed"):
        assert vm.slot(0).harvest().count == 100


@needs_kvm
def test_a_ring_that_was_harvested_since_it_was_full_is_not_stuck(vm):
    machine(vm, "ring", 100)
    fake_ring(vm)
    before = vm._rings.harvests
    vm.harvest_rings()
    vm._rings.note_full(vm._rings.rings[1], before)
    assert vm.harvest_rings()[0].exact


@needs_kvm
def test_a_ring_called_full_by_a_run_that_began_during_a_harvest_is_not_stuck(vm):
    """A vCPU that a harvest has made leave is back before KVM has taken the entries back, and finds its ring full."""
    machine(vm, "ring", 100)
    entries = fake_ring(vm)
    entries[0] = (1, 0, 5)
    before = []
    vm._handle = Failing(vm._handle, "reset_rings", [lambda: before.append(vm._rings.harvests) or 1])
    assert pages(vm.harvest_rings()[0]) == [5]
    vm._rings.note_full(vm._rings.rings[1], *before)
    assert vm.harvest_rings()[0].exact


@needs_kvm
def test_a_ring_that_is_full_of_what_kvm_has_not_taken_back_is_not_stuck(vm):
    guest_after_a_reset_that_failed(vm)
    vm._rings.note_full(vm._rings.rings[0], vm._rings.harvests)
    harvested = vm.harvest_rings()[0]
    assert (pages(harvested), harvested.exact) == ([5], True)


@needs_kvm
@pytest.mark.parametrize(("slot", "offset"), [(7, 0), (0, 100), (99, 0), (0, 1 << 63)])
def test_a_foreign_ring_entry_reports_every_page_once(vm, slot, offset):
    guest = machine(vm, "ring", 100)
    entries = fake_ring(vm)
    entries[0] = (1, slot, offset)
    # KVM does not know this ring, so it cannot take the entry back.
    vm._handle = Failing(vm._handle, "reset_rings", [1])
    with pytest.warns(IncompleteLogWarning, match=f"named offset {offset} of slot {slot}"):
        harvested = vm.harvest_rings()[0]
    assert (harvested.count, harvested.exact) == (100, False)
    guest.write([GFN + 5])
    harvested = vm.harvest_rings()[0]
    assert (pages(harvested), harvested.exact) == ([5], True)


@needs_kvm
def test_a_warning_turned_into_an_error_takes_nothing(vm):
    machine(vm, "ring", 100)
    entries = fake_ring(vm)
    entries[0] = (1, 7, 0)
    vm._handle = Failing(vm._handle, "reset_rings", [1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(IncompleteLogWarning):
            vm.slot(0).peek()
        with pytest.raises(IncompleteLogWarning):
            vm.harvest_rings()
        assert not vm.slot(0).peek().exact
        assert not vm.harvest_rings()[0].exact
        assert vm.harvest_rings()[0].exact


@needs_kvm
def test_where_warnings_are_errors_every_other_harvest_of_a_lost_ring_has_all_slots(vm):
    guest = machine(vm, "ring", 100)
    vm.set_memory_region(1, GFN + 100, 10)
    guest.write([GFN + 5])
    vm._handle = Failing(vm._handle, "reset_rings", [0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            with pytest.raises(IncompleteLogWarning):
                vm.harvest_rings()
            assert {slot: dirty.count for slot, dirty in vm.harvest_rings().items()} == {0: 100, 1: 10}
        for _ in range(2):
            with pytest.raises(IncompleteLogWarning):
                vm.slot(1).harvest()
            assert vm.slot(1).harvest().count == 10


@needs_kvm
def test_the_warning_of_a_lost_ring_names_the_callers_line(vm):
    guest = machine(vm, "ring", 100)
    guest.write([GFN + 5])
    vm._handle = Failing(vm._handle, "reset_rings", [0])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for call in (vm.harvest_rings, vm.slot(0).harvest, vm.slot(0).peek):
            call()
    assert [warning.filename for warning in caught] == [__file__] * 3


class NoMemory:
    """In place of a slot's bitmap: its first harvest finds no memory."""

    def __init__(self, bitmap):
        self.bitmap, self.harvests = bitmap, iter([MemoryError])

    def peek(self):
        return self.bitmap.peek()

    def harvest(self):
        for error in self.harvests:
            raise error
        return self.bitmap.harvest()


@needs_kvm
def test_without_memory_for_the_answer_every_page_is_still_reported_by_the_next_harvest(vm):
    machine(vm, "ring", 100)
    entries = fake_ring(vm)
    entries[0] = (1, 7, 0)
    vm._handle = Failing(vm._handle, "reset_rings", [1])
    collected = vm._rings._slots[0]
    collected.bitmap = NoMemory(collected.bitmap)
    with pytest.raises(MemoryError):
        vm.slot(0).harvest()
    with pytest.warns(IncompleteLogWarning):
        assert vm.slot(0).harvest().count == 100


@needs_kvm
def test_a_slot_that_cannot_be_taken_takes_nothing_from_the_others(vm):
    guest = machine(vm, "ring", 100)
    vm.set_memory_region(1, GFN + 100, 10)
    guest.write([GFN + 5, GFN + 105])
    collected = vm._rings._slots[1]
    collected.bitmap = NoMemory(collected.bitmap)
    with pytest.raises(MemoryError):
        vm.harvest_rings()
    guest.write([GFN + 6])
    assert pages(vm.slot(0).peek()) == [5, 6]
    assert {slot: pages(dirty) for slot, dirty in vm.harvest_rings().items()} == {0: [5, 6], 1: [5]}
    assert {slot: pages(dirty) for slot, dirty in vm.harvest_rings().items()} == {0: [], 1: []}


@needs_kvm
@pytest.mark.parametrize("change", ["delete", "log off"])
def test_a_slot_whose_rings_cannot_be_reset_is_gone_all_the_same(vm, change):
    guest = machine(vm, "ring", 100)
    guest.write([GFN + 5])
    vm._handle = Failing(vm._handle, "reset_rings", [OSError(errno.EIO, "no reset")])
    with pytest.raises(OSError, match="no reset"):
        vm.set_memory_region(0, GFN, 0 if change == "delete" else 100, log_dirty=False)
    if change == "delete":
        refused(errno.EINVAL, vm.set_memory_region, 0, 0, 0)
        refused(errno.ENOENT, vm.memory, 0)
    assert vm.harvest_rings() == {}
    vm.set_memory_region(0, GFN, 100)
    assert pages(vm.harvest_rings()[0]) == []
    guest.write([GFN + 6])
    assert pages(vm.harvest_rings()[0]) == [6]


@needs_kvm
def test_entries_of_a_slot_deleted_since_are_not_foreign(vm):
    guest = machine(vm, "ring", 100)
    vm.set_memory_region(1, GFN + 100, 10)
    guest.write([GFN + 5, GFN + 105])
    vm.set_memory_region(1, 0, 0)
    assert {slot: pages(dirty) for slot, dirty in vm.harvest_rings().items()} == {0: [5]}


@needs_kvm
def test_a_slot_that_kvm_refuses_leaves_the_ring_log_as_it_was(vm):
    guest = machine(vm, "ring", 100)
    refused(errno.EEXIST, vm.set_memory_region, 1, GFN, 10)
    vm.set_memory_region(1, GFN + 100, 10)
    guest.write([GFN + 109])
    assert pages(vm.slot(1).harvest()) == [9]
