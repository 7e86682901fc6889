"""Every way to get the order of a harvest (I2) wrong loses a page, and the right one does not.

Each case has two architectures that let a vCPU store at the same critical point. The
oracle must catch the wrong one, or it proves nothing about the right one.
"""

import threading

import pytest

import dirtylog as dl
from dirtylog.vm import arch, dirty_log
from dirtylog.vm.arch.x86 import X86

PAGE, FRESH_PAGE = 3, 70


class Injecting(X86):
    """x86 with stores by vCPUs at points a test chooses; each happens once."""

    name = "injecting"

    def __init__(self):
        self.stores = []
        self.contents = None

    def inject(self):
        while self.stores:
            vcpu, page, value = self.stores.pop()
            vcpu.store([page], value)


class FlushLeftOut(Injecting):
    def flush_tlbs(self, vm, slot):
        self.inject()


class FlushKept(Injecting):
    def flush_tlbs(self, vm, slot):
        self.inject()
        super().flush_tlbs(vm, slot)


class FlushBeforeProtection(Injecting):
    def protect_masked(self, vm, slot, words, masks):
        vm.mmu.flush()
        self.inject()
        super().protect_masked(vm, slot, words, masks)

    def flush_tlbs(self, vm, slot):
        pass


class FlushAfterProtection(Injecting):
    def protect_masked(self, vm, slot, words, masks):
        self.inject()
        super().protect_masked(vm, slot, words, masks)


class ContentsReadBeforeFlush(Injecting):
    def flush_tlbs(self, vm, slot):
        self.contents = vm.memory_values()
        self.inject()
        super().flush_tlbs(vm, slot)


class ContentsReadAfterFlush(Injecting):
    def flush_tlbs(self, vm, slot):
        self.inject()
        super().flush_tlbs(vm, slot)
        self.contents = vm.memory_values()


class ReadThenZero(Injecting):
    def get_dirty_log(self, vm, slot, out=None):
        with vm.slots_lock:
            read = vm.mmu.peek(slot)
            self.inject()
            vm.mmu.harvest(slot)
            self.flush_tlbs(vm, slot)
            vm.mmu.hand_out(slot)
            return read


class Exchange(Injecting):
    def sync_dirty_log(self, vm, slot):
        super().sync_dirty_log(vm, slot)
        self.inject()


class ExchangeAndStoreAfter(Injecting):
    def flush_tlbs(self, vm, slot):
        self.inject()
        super().flush_tlbs(vm, slot)


class ProtectBeforeSnapshotUnlocked(Injecting):
    def get_dirty_log(self, vm, slot, out=None):
        with vm.slots_lock:
            vm.mmu.protect_region(slot)
            self.inject()
            vm.mmu.harvest(slot, protect=False)
            self.flush_tlbs(vm, slot)
            return vm.mmu.hand_out(slot)


class ProtectAfterSnapshotLocked(Injecting):
    def get_dirty_log(self, vm, slot, out=None):
        self.inject()
        return dirty_log.get_dirty_log(vm, slot, out)


def run(injecting, kit, injected, contents=False):
    """Three harvests: before, in, and after the one that the stores are injected into."""
    vm = dl.VM(injecting, vcpus=2)
    vm.set_memory_region(0, 0, 128)
    oracle = kit.oracle(vm)
    vm.memory_values = oracle.read
    vm.vcpus[0].store([PAGE], 1)
    injecting.stores = [(vm.vcpus[vcpu], page, value) for vcpu, page, value in injected]
    reported = [oracle.check(vm.get_dirty_log(0), 2 if contents else 1, injecting.contents)]
    assert not injecting.stores, "nothing was injected"
    injecting.contents = None
    if not contents:
        vm.vcpus[0].store([PAGE], 2)
    # Twice: a write that the harvest before it missed must be in the next one.
    reported += [oracle.check(vm.get_dirty_log(0), 2) for _ in range(2)]
    return reported


STALE = [(0, PAGE, 1)]
OTHER_VCPU = [(1, PAGE, 1)]
NEW_PAGE = [(1, FRESH_PAGE, 1)]

CASES = {
    "flush left out": (FlushLeftOut, FlushKept, STALE, False),
    "flush before write protection": (FlushBeforeProtection, FlushAfterProtection, STALE, False),
    "page contents read before the flush": (ContentsReadBeforeFlush, ContentsReadAfterFlush, [(0, PAGE, 2)], True),
    "read, then zero": (ReadThenZero, Exchange, NEW_PAGE, False),
    "read, then zero; store after": (ReadThenZero, ExchangeAndStoreAfter, NEW_PAGE, False),
    "write protection before the snapshot": (
        ProtectBeforeSnapshotUnlocked,
        ProtectAfterSnapshotLocked,
        OTHER_VCPU,
        False,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_wrong_order_loses_a_page_and_the_oracle_catches_it(case, kit):
    wrong, _, stores, contents = CASES[case]
    with pytest.raises(kit.lost_write):
        run(wrong(), kit, stores, contents)


@pytest.mark.parametrize("case", CASES)
def test_the_right_order_with_the_same_store_loses_nothing(case, kit):
    _, right, stores, contents = CASES[case]
    reported = run(right(), kit, stores, contents)
    assert reported[0] >= 1


def test_a_flush_waits_until_every_vcpu_has_been_out_of_guest_mode(harvesting):
    """Many rounds, since a flush that does not wait may still come second by chance."""
    flushing = threading.Event()
    order = []

    class Flushing(type(arch.find(harvesting))):
        def flush_tlbs(self, vm, slot):
            flushing.set()
            super().flush_tlbs(vm, slot)
            order.append("flushed")

        def sync_dirty_log(self, vm, slot):
            flushing.set()
            super().sync_dirty_log(vm, slot)

    vm = dl.VM(Flushing(), vcpus=3)
    vm.set_memory_region(0, 0, 64)
    waits = harvesting != "s390"  # its keys miss no store: nothing is flushed

    def stay(vcpu):
        with vm.mmu.guest_mode(vcpu):
            inside.set()
            flushing.wait(60)
            order.append("left")

    for turn in range(20):
        vm.vcpus[0].touch([1])
        flushing.clear()
        order.clear()
        inside = threading.Event()
        thread = threading.Thread(target=stay, args=(turn % 3,))
        thread.start()
        inside.wait(60)
        assert vm.get_dirty_log(0).count == 1
        thread.join()
        assert not waits or order == ["left", "flushed"]


GUARDED = {
    "x86": ("x86", {}),
    "arm": ("arm", {}),
    "arm64": ("arm64", {}),
    "manual": ("x86", {"manual_protect": True}),
    "2 MiB mappings": ("x86", {"huge_pages": "on-write", "manual_protect": True, "initially_set": True}),
}


@pytest.mark.parametrize("kind", GUARDED)
def test_whenever_mmu_lock_is_free_a_page_is_protected_or_its_bit_is_set(kind, kit):
    name, options = GUARDED[kind]
    vm = kit.machine(name, npages=1100, base_gfn=512, **options)
    with kit.writers(vm) as writers:
        for _ in range(20):
            writers.next_iteration()
            for step in (
                lambda: vm.harvest(0),
                lambda: vm.set_memory_region(0, 512, 1100, log_dirty=False),
                lambda: vm.set_memory_region(0, 512, 1100),
            ):
                step()
                if vm.region(0).log_dirty:
                    with vm.slots_lock:
                        assert vm.mmu.unguarded(0) == 0


def test_the_invariant_is_seen_broken_when_a_harvest_protects_nothing():
    vm = dl.VM()
    vm.set_memory_region(0, 0, 128)
    vm.vcpus[0].touch([3, 70])
    with vm.slots_lock:
        assert vm.mmu.unguarded(0) == 0
        vm.mmu.harvest(0, protect=False)
        assert vm.mmu.unguarded(0) == 2
        vm.mmu.put_back(0)
        assert vm.mmu.unguarded(0) == 0


def test_a_store_through_a_stale_entry_is_in_this_snapshot(kit):
    """Between steps two and three of I2: the page is protected, the entry still cached."""
    injecting = FlushKept()
    vm = dl.VM(injecting)
    vm.set_memory_region(0, 0, 128)
    vm.vcpus[0].store([PAGE], 1)
    faults = vm.vcpus[0].faults
    injecting.stores = [(vm.vcpus[0], PAGE, 7)]
    assert vm.get_dirty_log(0).indices().tolist() == [PAGE]
    assert vm.vcpus[0].faults == faults, "the store should have used the stale entry"
    assert int(vm.memory(0)[PAGE * 4096]) == 7
    assert vm.get_dirty_log(0).count == 0
