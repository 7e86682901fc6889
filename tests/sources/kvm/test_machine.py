"""The dirty log of a real machine against a real guest: what is reported, what is refused, what a failure leaves."""

import errno
import threading

import numpy as np
import pytest

from dirtylog import BackendUnavailable, DirtyPages
from dirtylog.sources import kvm
from dirtylog.sources.kvm._guest import Guest

from ...leaks import assert_nothing_leaks
from .guests import GFN, PAGE, Failing, anonymous, machine, modes, needs_kvm, pages, refused


@needs_kvm
@modes
def test_every_third_page_of_64_mib_is_reported_exactly(vm, mode):
    npages = (64 << 20) // PAGE
    expected = np.arange(0, npages, 3)
    guest = machine(vm, mode, npages, ring=65536)
    for value in (1, 2):
        guest.write(GFN + expected, value)
        harvested = vm.slot(0).harvest()
        assert harvested.exact
        assert np.array_equal(harvested.indices(), expected)
        assert not vm.slot(0).harvest()


@needs_kvm
@modes
def test_a_reported_page_holds_this_rounds_value_and_others_an_older_one(vm, mode):
    guest = machine(vm, mode, 64)
    memory = vm.slot(0).memory
    generator = np.random.default_rng(1)
    for value in range(1, 20):
        written = generator.choice(64, size=generator.integers(1, 30), replace=False)
        guest.write(GFN + written, value)
        dirty = vm.slot(0).harvest()
        assert [page for page in range(64) if memory[page * PAGE] == value] == pages(dirty)
        assert set(pages(dirty)) == set(written.tolist())


@needs_kvm
def test_get_dirty_log_reports_and_clears(vm):
    guest = machine(vm, "legacy", 100)
    guest.write([GFN + 99, GFN])
    first = vm.get_dirty_log(0)
    assert (pages(first), first.npages, first.page_size, first.exact) == ([0, 99], 100, PAGE, True)
    assert pages(vm.get_dirty_log(0)) == []
    guest.write([GFN + 99])
    assert pages(vm.get_dirty_log(0)) == [99]
    assert pages(first) == [0, 99]


@needs_kvm
def test_the_words_go_to_out_as_well(vm):
    guest = machine(vm, "legacy", 100)
    guest.write([GFN + 64, GFN + 1])
    out = np.full(2, 7, np.uint64)
    assert pages(vm.get_dirty_log(0, out)) == [1, 64]
    assert out.tolist() == [2, 1]


@needs_kvm
def test_an_out_that_cannot_take_the_words_is_refused_before_anything_is_cleared(vm):
    guest = machine(vm, "legacy", 100)
    guest.write([GFN + 5])
    frozen = np.zeros(2, np.uint64)
    frozen.flags.writeable = False
    for out in (np.zeros(1, np.uint64), np.zeros(2, np.int64), np.zeros(4, np.uint64)[::2], frozen, bytearray(16)):
        with pytest.raises(OSError, match="2 words") as caught:
            vm.get_dirty_log(0, out)
        assert caught.value.errno == errno.EFAULT
    assert pages(vm.get_dirty_log(0)) == [5]


@needs_kvm
@pytest.mark.parametrize("out", [7, "words", np.zeros((1, 2), np.uint64), np.zeros(2, ">u8")], ids=str)
def test_an_out_that_is_no_buffer_of_words_is_efault_too(vm, out):
    guest = machine(vm, "legacy", 100)
    guest.write([GFN + 5])
    refused(errno.EFAULT, vm.get_dirty_log, 0, out)
    assert pages(vm.get_dirty_log(0)) == [5]


@needs_kvm
def test_manual_protection_reports_until_cleared_and_clears_only_what_is_named(vm):
    guest = machine(vm, "manual", 200)
    guest.write([GFN + 3, GFN + 70, GFN + 199])
    assert pages(vm.get_dirty_log(0)) == pages(vm.get_dirty_log(0)) == [3, 70, 199]
    guest.write([GFN + 4])
    vm.clear_dirty_log(0, 0, 64, DirtyPages.from_indices([3, 70], 200))
    assert pages(vm.get_dirty_log(0)) == [4, 70, 199]
    vm.clear_dirty_log(0, 64, 136, DirtyPages.from_indices([4, 70, 199], 200))
    assert pages(vm.get_dirty_log(0)) == [4]


@needs_kvm
def test_a_page_is_logged_again_after_it_was_cleared_by_hand(vm):
    guest = machine(vm, "manual", 64)
    guest.write([GFN + 3])
    vm.clear_dirty_log(0, 0, 64, vm.get_dirty_log(0))
    guest.write([GFN + 3])
    assert pages(vm.get_dirty_log(0)) == [3]


@needs_kvm
def test_initially_all_set_reports_everything_once(vm):
    vm.enable_manual_protect(initially_set=True)
    vm.set_memory_region(0, GFN, 100)
    guest = Guest(vm)
    assert vm.slot(0).peek().count == 100
    assert vm.slot(0).harvest().count == 100
    guest.write([GFN + 42])
    assert pages(vm.slot(0).harvest()) == [42]


@needs_kvm
@modes
def test_a_peek_clears_nothing_and_later_writes_join_it(vm, mode):
    guest = machine(vm, mode, 100)
    source = vm.slot(0)
    guest.write([GFN + 7])
    assert pages(source.peek()) == pages(source.peek()) == [7]
    guest.write([GFN + 9])
    assert pages(source.peek()) == [7, 9]
    assert pages(source.harvest()) == [7, 9]
    assert pages(source.peek()) == pages(source.harvest()) == []


@needs_kvm
def test_a_peek_takes_nothing_from_get_dirty_log(vm):
    guest = machine(vm, "legacy", 100)
    guest.write([GFN + 7])
    vm.slot(0).peek()
    guest.write([GFN + 8])
    assert pages(vm.get_dirty_log(0)) == [7, 8]
    assert pages(vm.get_dirty_log(0)) == []


@needs_kvm
@modes
def test_a_harvest_runs_while_the_guest_writes_and_no_write_is_lost(vm, mode):
    """The guest writes its rounds' numbers; a copy of what is harvested ends up equal to the memory."""
    order, values = np.tile(np.arange(256), 8), range(1, 4)
    # A KVM in software takes a ring's entry for every write, also to a page that is dirty already. All of them have
    # room: however long the harvester has to wait for a CPU, the ring is not full.
    guest = machine(vm, mode, 256, ring=8192)
    assert len(order) * len(values) < 8192 - 64
    memory = np.frombuffer(vm.slot(0).memory, np.uint8)[::PAGE]
    copy = np.zeros(256, np.uint8)

    def harvest():
        dirty = vm.slot(0).harvest().indices()
        copy[dirty] = memory[dirty]

    def body():
        for value in values:
            guest.write(GFN + order, value)

    writer = threading.Thread(target=body)
    writer.start()
    while writer.is_alive():
        harvest()
    writer.join(60)
    harvest()
    assert np.array_equal(copy, memory)
    assert copy.tolist() == [3] * 256


@needs_kvm
def test_a_clear_that_is_not_aligned_or_outside_is_einval(vm):
    machine(vm, "manual", 200)
    nothing = DirtyPages.from_indices([], 200)
    for first, count in [(1, 64), (0, 63), (64, 100), (0, 256), (256, 0), (-64, 64), (0, -64), (1 << 63, 64)]:
        refused(errno.EINVAL, vm.clear_dirty_log, 0, first, count, nothing)
    vm.clear_dirty_log(0, 128, 72, nothing)


@needs_kvm
def test_pages_of_another_slot_cannot_be_cleared(vm):
    machine(vm, "manual", 200)
    with pytest.raises(ValueError, match="has 200 pages"):
        vm.clear_dirty_log(0, 0, 64, DirtyPages.from_indices([], 199))
    with pytest.raises(ValueError, match="dirty is about 200 of 16384"):
        vm.clear_dirty_log(0, 0, 64, DirtyPages.from_indices([], 200, 16384))


@needs_kvm
@pytest.mark.parametrize("wrong", [None, [5], np.zeros(2, np.uint64)], ids=str)
def test_what_is_no_set_of_pages_cannot_be_cleared(vm, wrong):
    guest = machine(vm, "manual", 100)
    guest.write([GFN + 5])
    with pytest.raises(TypeError, match=f"dirty is a {type(wrong).__name__}; pass the DirtyPages"):
        vm.clear_dirty_log(0, 0, 100, wrong)
    assert pages(vm.get_dirty_log(0)) == [5]


class Number:
    """An integer by `__index__` alone."""

    def __init__(self, value):
        self.value = value

    def __index__(self):
        return self.value


@needs_kvm
def test_numbers_are_what_has_an_index_and_nothing_else(vm):
    guest = machine(vm, "manual", 100)
    guest.write([GFN + 5])
    named = vm.get_dirty_log(0)
    for numbers in [(0.0, 0, 100), (0, 0.0, 100), (0, 0, 100.0), (0, 0, "100")]:
        with pytest.raises(TypeError, match="integer"):
            vm.clear_dirty_log(*numbers, named)
    assert pages(vm.get_dirty_log(0)) == [5]
    vm.clear_dirty_log(Number(0), Number(0), Number(100), named)
    assert pages(vm.get_dirty_log(0)) == []
    with kvm.Kvm() as system, system.create_vm() as other:
        for entries in (1024.0, "1024", None):
            with pytest.raises(TypeError, match="integer"):
                other.enable_dirty_ring(entries)
        other.enable_dirty_ring(Number(1024))
        other.set_memory_region(3, GFN, 100)
        assert {slot: dirty.count for slot, dirty in other.harvest_rings().items()} == {3: 0}


@needs_kvm
def test_what_the_kernel_does_not_offer_is_unavailable(vm):
    vm.capabilities = dict.fromkeys(vm.capabilities, 0)
    for call in (vm.enable_manual_protect, lambda: vm.enable_dirty_ring(1024), vm.create_vcpu):
        with pytest.raises(BackendUnavailable, match="KVM_CAP_"):
            call()


@needs_kvm
def test_pages_survive_a_clear_that_fails(vm):
    guest = machine(vm, "manual", 100)
    guest.write([GFN + 5])
    vm._handle = Failing(vm._handle, "clear_dirty_log", [OSError(errno.EFAULT, "half way")])
    with pytest.raises(OSError, match="half way"):
        vm.slot(0).harvest()
    # As if the kernel had cleared the bit before it failed.
    vm.clear_dirty_log(0, 0, 100, DirtyPages.from_indices([], 100))
    vm._handle.clear_dirty_log(0, 0, 100, DirtyPages.from_indices([5], 100).words)
    assert pages(vm.get_dirty_log(0)) == [5]
    assert pages(vm.slot(0).peek()) == [5]
    assert pages(vm.slot(0).harvest()) == [5]
    assert pages(vm.slot(0).harvest()) == []


@needs_kvm
def test_clearing_by_hand_takes_kept_pages_away_too(vm):
    guest = machine(vm, "manual", 100)
    guest.write([GFN + 5, GFN + 99])
    vm._handle = Failing(vm._handle, "clear_dirty_log", [OSError(errno.EFAULT, "half way")])
    with pytest.raises(OSError, match="half way"):
        vm.slot(0).harvest()
    vm.clear_dirty_log(0, 0, 64, vm.get_dirty_log(0))
    assert pages(vm.get_dirty_log(0)) == [99]
    vm.clear_dirty_log(0, 64, 36, vm.get_dirty_log(0))
    assert pages(vm.get_dirty_log(0)) == []


class SlowPeek:
    """A handle on which another thread asks for the log while the first has the kernel's answer, and no more."""

    def __init__(self, handle, start):
        self._handle, self._start, self._asked = handle, start, threading.Event()

    def __getattr__(self, name):
        return getattr(self._handle, name)

    def get_dirty_log(self, *arguments):
        pages = self._handle.get_dirty_log(*arguments)
        if self._start:
            start, self._start = self._start, None
            start()
            assert self._asked.wait(60)
        else:
            self._asked.set()
        return pages


@needs_kvm
def test_what_a_peek_under_way_has_taken_is_in_a_get_at_the_same_time(vm):
    guest = machine(vm, "legacy", 100)
    guest.write([GFN + 5])
    got = []
    getter = threading.Thread(target=lambda: got.append(pages(vm.get_dirty_log(0))))
    vm._handle = SlowPeek(vm._handle, getter.start)
    assert pages(vm.slot(0).peek()) == [5]
    getter.join(60)
    assert got == [[5]]


@needs_kvm
def test_after_close_every_call_is_a_value_error():
    with kvm.Kvm() as system:
        vm = system.create_vm()
        vm.set_memory_region(0, 0, 1)
        source = vm.slot(0)
        vm.close()
        vm.close()
        assert vm.closed
        for call in (
            lambda: vm.get_dirty_log(0),
            lambda: vm.slot(0),
            lambda: vm.set_memory_region(1, 10, 1),
            vm.create_vcpu,
            vm.harvest_rings,
            source.harvest,
            source.peek,
            vm.__enter__,
        ):
            with pytest.raises(ValueError, match="closed"):
                call()
    system.close()
    assert system.closed
    with pytest.raises(ValueError, match="closed"):
        system.create_vm()


def make_and_close(count):
    memory = anonymous(4)
    with kvm.Kvm() as system:
        for at in range(count):
            with system.create_vm() as vm:
                if at % 2:
                    vm.enable_dirty_ring(1024)
                vm.set_memory_region(0, 0, 4, memory=memory)
                vm.set_memory_region(1, 4, 4)
                cpu = vm.create_vcpu()
                cpu.kick()
                assert cpu.run().reason == "INTR"
                assert vm.slot(0).harvest().count == 0
    memory.close()


@needs_kvm
def test_hundreds_of_machines_leave_no_descriptor_mapping_thread_or_memory(sanitized):
    assert_nothing_leaks(make_and_close, rounds=400, memory=not sanitized)


def harvest_and_peek(count):
    with kvm.Kvm() as system, system.create_vm() as vm:
        vm.set_memory_region(0, 0, 1 << 18)
        for _ in range(count):
            vm.get_dirty_log(0)
            vm.slot(0).peek()
            vm.slot(0).harvest()


@needs_kvm
def test_harvests_leave_no_memory_behind(sanitized):
    assert_nothing_leaks(harvest_and_peek, memory=not sanitized)
