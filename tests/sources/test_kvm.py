"""KVM's dirty log against a real guest: what is reported, what is refused, what stays after a failure."""

import doctest
import errno
import gc
import mmap
import os
import signal
import threading
import warnings

import numpy as np
import pytest

from dirtylog import BackendUnavailable, DirtyLogError, DirtyPages, IncompleteLogWarning
from dirtylog.sources import kvm
from dirtylog.sources.kvm import _kvm
from dirtylog.sources.kvm import rings as kvm_rings
from dirtylog.sources.kvm._guest import Guest

probed = kvm.probe()
needs_kvm = pytest.mark.skipif(not probed.available, reason=probed.reason)

PAGE = mmap.PAGESIZE
GFN = 0x10000
# A guest that dirties a page with fewer than 16 instructions runs past a ring's reserve in a software KVM.
PADDING = 40


@pytest.fixture
def vm():
    with kvm.Kvm() as system, system.create_vm() as vm:
        yield vm


def anonymous(npages):
    return mmap.mmap(-1, npages * PAGE)


def machine(vm, mode, npages, ring=4096):
    """Set the VM up for one way of logging and return its guest; slot 0 is at GFN."""
    if mode == "manual":
        vm.enable_manual_protect()
    elif mode == "ring":
        vm.enable_dirty_ring(ring)
    vm.set_memory_region(0, GFN, npages, memory=anonymous(npages))
    return Guest(vm, padding=PADDING)


def pages(dirty):
    return dirty.indices().tolist()


modes = pytest.mark.parametrize("mode", ["legacy", "manual", "ring"])


# ---- the device ---------------------------------------------------------------


def test_a_missing_device_is_unavailable_and_the_message_says_why_and_what_instead():
    with pytest.raises(BackendUnavailable, match=r"open\('/nowhere/kvm'\): ENOENT; load the kvm module") as caught:
        kvm.Kvm("/nowhere/kvm")
    assert isinstance(caught.value, DirtyLogError)


def test_a_device_that_is_not_kvm_is_unavailable():
    with pytest.raises(BackendUnavailable, match="KVM_GET_API_VERSION"):
        kvm.Kvm("/dev/null")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give up its permissions for a moment")
def test_without_permission_the_message_names_the_group(tmp_path):
    device = tmp_path / "kvm"
    device.touch(mode=0o600)
    os.seteuid(65534)
    try:
        with pytest.raises(BackendUnavailable, match="EACCES; join the group"):
            kvm.Kvm(str(device))
    finally:
        os.seteuid(0)


def test_probe_answers_for_a_machine_without_kvm():
    found = kvm.probe("/nowhere/kvm")
    assert (found.available, found.api_version, found.capabilities) == (False, 0, {})
    assert "ENOENT" in found.reason


@needs_kvm
def test_probe_answers_with_version_and_capabilities():
    assert probed.api_version == 12
    assert probed.reason == ""
    assert probed.capabilities["KVM_CAP_USER_MEMORY"] == 1


@needs_kvm
def test_capabilities_are_read_only_and_named_like_the_kernels_constants():
    with kvm.Kvm() as system:
        assert system.capabilities["KVM_CAP_NR_MEMSLOTS"] == system.check(10) > 0
        with pytest.raises(TypeError):
            system.capabilities["KVM_CAP_USER_MEMORY"] = 0


# ---- what is reported -----------------------------------------------------------


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
@modes
def test_a_harvest_runs_while_the_guest_writes_and_no_write_is_lost(vm, mode):
    """The guest writes its rounds' numbers; a copy of what is harvested ends up equal to the memory."""
    guest = machine(vm, mode, 256)
    memory = np.frombuffer(vm.slot(0).memory, np.uint8)[::PAGE]
    copy = np.zeros(256, np.uint8)
    order = np.tile(np.arange(256), 8)

    def harvest():
        dirty = vm.slot(0).harvest().indices()
        copy[dirty] = memory[dirty]

    def body():
        for value in range(1, 4):
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
def test_signals_during_a_harvest_of_the_rings_lose_nothing(vm):
    """KVM stops taking entries back as soon as a signal is pending."""
    guest = machine(vm, "ring", 12000, ring=16384)
    order = np.random.default_rng(3).permutation(12000)
    guest.write(GFN + order)
    calls = []
    before = signal.signal(signal.SIGALRM, lambda *_: calls.append(None))
    signal.setitimer(signal.ITIMER_REAL, 20e-6, 20e-6)
    try:
        harvested = vm.harvest_rings()[0]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert (harvested.count, harvested.exact) == (12000, True)
    assert calls
    guest.write(GFN + order[:100])
    assert pages(vm.harvest_rings()[0]) == sorted(order[:100].tolist())


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
def test_the_example_of_the_module_runs_as_it_stands():
    example = doctest.DocTestParser().get_doctest(
        kvm.__doc__.replace("# doctest: +SKIP", ""), {}, "kvm", kvm.__file__, 0
    )
    assert doctest.DocTestRunner().run(example).failed == 0


@needs_kvm
def test_memory_of_a_slot_is_the_live_guest_memory(vm):
    guest = machine(vm, "legacy", 8)
    memory = vm.memory(0)
    assert memory.nbytes == 8 * PAGE
    guest.write([GFN + 7], 42)
    assert memory[7 * PAGE] == 42
    with pytest.raises(OSError, match="slot 1 does not exist"):
        vm.memory(1)


# ---- what is refused --------------------------------------------------------------


def refused(number, call, *arguments, **named):
    with pytest.raises(OSError, match=r"slot|ring|protect") as caught:
        call(*arguments, **named)
    assert caught.value.errno == number, caught.value


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


@needs_kvm
def test_what_the_kernel_does_not_offer_is_unavailable(vm):
    vm.capabilities = dict.fromkeys(vm.capabilities, 0)
    for call in (vm.enable_manual_protect, lambda: vm.enable_dirty_ring(1024), vm.create_vcpu):
        with pytest.raises(BackendUnavailable, match="KVM_CAP_"):
            call()


# ---- what a failure leaves behind ----------------------------------------------------


class Failing:
    """A handle on which one call fails as often as wanted."""

    def __init__(self, handle, call, answers):
        self._handle, self._call, self._answers = handle, call, answers

    def __getattr__(self, name):
        if name == self._call and self._answers:
            return self._fail
        return getattr(self._handle, name)

    def _fail(self, *arguments):
        answer = self._answers.pop()
        if isinstance(answer, Exception):
            raise answer
        return answer


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


@needs_kvm
def test_pages_survive_a_reset_of_the_rings_that_fails(vm):
    guest = machine(vm, "ring", 100)
    guest.write([GFN + 5])
    vm._handle = Failing(vm._handle, "reset_rings", [OSError(errno.EIO, "no reset")])
    with pytest.raises(OSError, match="no reset"):
        vm.harvest_rings()
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
    """In place of DirtyPages: none can be made."""

    def __getattr__(self, name):
        raise MemoryError


@needs_kvm
def test_without_memory_for_the_answer_every_page_is_still_reported_by_the_next_harvest(vm, monkeypatch):
    machine(vm, "ring", 100)
    entries = fake_ring(vm)
    entries[0] = (1, 7, 0)
    vm._handle = Failing(vm._handle, "reset_rings", [1])
    with monkeypatch.context() as patch:
        patch.setattr(kvm_rings, "DirtyPages", NoMemory())
        with pytest.warns(IncompleteLogWarning), pytest.raises(MemoryError):
            vm.slot(0).harvest()
    with pytest.warns(IncompleteLogWarning):
        assert vm.slot(0).harvest().count == 100


class FailingLog:
    """A ring log that has no memory left for one slot, once."""

    def __init__(self, log, slot):
        self._log, self._slot = log, slot

    def __getattr__(self, name):
        return getattr(self._log, name)

    def take(self, slot, page_size):
        if slot == self._slot:
            self._slot = None
            raise MemoryError
        return self._log.take(slot, page_size)


@needs_kvm
def test_a_slot_that_cannot_be_taken_takes_nothing_from_the_others(vm):
    guest = machine(vm, "ring", 100)
    vm.set_memory_region(1, GFN + 100, 10)
    guest.write([GFN + 5, GFN + 105])
    vm._rings._log = FailingLog(vm._rings._log, 1)
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


# ---- who closes what ---------------------------------------------------------------------


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


@needs_kvm
def test_closing_kvm_closes_its_machines():
    with kvm.Kvm() as system:
        vm = system.create_vm()
    assert vm.closed


@needs_kvm
@pytest.mark.parametrize("name", ["Kvm", "VM"])
def test_what_is_forgotten_is_closed_with_a_warning(name):
    if name == "Kvm":
        forgotten = [kvm.Kvm()]
        descriptor = forgotten[0]._handle.fileno()
        with pytest.warns(ResourceWarning, match="unclosed <Kvm /dev/kvm, open>"):
            forgotten.clear()
    else:
        with kvm.Kvm() as system:
            forgotten = [system.create_vm()]
            descriptor = forgotten[0]._handle.fileno()
            with pytest.warns(ResourceWarning, match=r"unclosed <kvm.VM 0"):
                forgotten.clear()
    assert not os.path.exists(f"/proc/self/fd/{descriptor}")


def footprint():
    with open("/proc/self/maps") as maps:
        lines = maps.readlines()
    return len(os.listdir("/proc/self/fd")), sum("anon_inode:kvm" in line for line in lines), threading.active_count()


@needs_kvm
def test_a_thousand_rounds_leave_no_descriptor_mapping_or_thread():
    gc.collect()
    before = footprint()
    memory = anonymous(4)
    with kvm.Kvm() as system:
        for at in range(1000):
            with system.create_vm() as vm:
                if at % 2:
                    vm.enable_dirty_ring(1024)
                vm.set_memory_region(0, 0, 4, memory=memory)
                vm.set_memory_region(1, 4, 4)
                cpu = vm.create_vcpu()
                cpu.kick()
                assert cpu.run().reason == "INTR"
                assert vm.slot(0).harvest().count == 0
    assert footprint() == before
    memory.close()


@needs_kvm
def test_anonymous_memory_goes_with_its_slot():
    with kvm.Kvm() as system, system.create_vm() as vm:
        mappings = set()
        for _ in range(50):
            vm.set_memory_region(0, 0, 7)
            address = np.frombuffer(vm.slot(0).memory, np.uint8).ctypes.data
            with open("/proc/self/maps") as maps:
                mappings.add(sum(1 for _ in maps))
            vm.set_memory_region(0, 0, 0)
        assert address % PAGE == 0
        assert max(mappings) - min(mappings) < 10


@needs_kvm
def test_harvests_leave_no_memory_behind(sanitized):
    import resource

    if sanitized:
        pytest.skip("a sanitizer keeps what was freed, to see it used; it reports what was not freed")

    with kvm.Kvm() as system, system.create_vm() as vm:
        vm.set_memory_region(0, 0, 1 << 18)
        for _ in range(1000):
            vm.get_dirty_log(0)
            vm.slot(0).peek()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for _ in range(3000):
            vm.get_dirty_log(0)
            vm.slot(0).peek()
            vm.slot(0).harvest()
        # 6000 leaked bitmaps of 32 KiB would be 188 MiB.
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 16 << 10
