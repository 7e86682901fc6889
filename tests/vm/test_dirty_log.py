"""get_dirty_log reports exactly what was written, on every architecture, and loses nothing when it fails."""

import errno

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dirtylog as dl
from dirtylog.vm.arch.x86 import X86


class Workload:
    """A machine and the set of pages it should report."""

    def __init__(self, name, base_gfn, npages, page_size):
        self.vm = dl.VM(name, vcpus=2, page_size=page_size)
        self.vm.set_memory_region(3, base_gfn, npages)
        self.vm.set_memory_region(1, base_gfn + npages, npages)
        self.vm.set_memory_region(2, max(base_gfn - 40, 0), min(base_gfn, 40)) if base_gfn else None
        self.base_gfn, self.npages = base_gfn, npages
        self.dirty = set()

    def write(self, vcpu, page, length):
        page %= self.npages
        length = min(length, (self.npages - page) * self.vm.page_size)
        self.vm.vcpus[vcpu].write((self.base_gfn + page) * self.vm.page_size, b"x" * length)
        self.dirty.update(range(page, page + -(-length // self.vm.page_size)))

    def touch(self, vcpu, pages):
        pages = [page % self.npages for page in pages]
        self.vm.vcpus[vcpu].touch([self.base_gfn + page for page in pages])
        self.dirty.update(pages)

    def neighbour(self, vcpu, page):
        self.vm.vcpus[vcpu].touch([self.base_gfn + self.npages + page % self.npages])

    def harvest(self, with_out):
        out = np.full((self.npages + 63) // 64, 7, np.uint64) if with_out else None
        assert set(self.vm.peek(3)) == self.dirty
        pages = self.vm.get_dirty_log(3, out=out)
        assert set(pages) == self.dirty
        assert pages.exact
        assert (pages.npages, pages.page_size) == (self.npages, self.vm.page_size)
        if with_out:
            np.testing.assert_array_equal(out, pages.words)
        self.dirty = set()


VCPU = st.integers(0, 1)
PAGES = st.integers(0, 5000)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("write"), VCPU, PAGES, st.integers(1, 3000)),
        st.tuples(st.just("touch"), VCPU, st.lists(PAGES, max_size=70)),
        st.tuples(st.just("neighbour"), VCPU, PAGES),
        st.tuples(st.just("harvest"), st.booleans()),
    ),
    max_size=12,
)


@settings(max_examples=30, deadline=None)
@given(
    steps=STEPS,
    base_gfn=st.sampled_from([0, 1, 63, 64, 100, 12345]),
    npages=st.sampled_from([1, 63, 64, 65, 511, 512, 513, 1000, 4097]),
    page_size=st.sampled_from([64, 512]),
)
def test_a_harvest_reports_exactly_the_pages_written(harvesting, steps, base_gfn, npages, page_size):
    workload = Workload(harvesting, base_gfn, npages, page_size)
    for name, *arguments in [*steps, ("harvest", False), ("harvest", True)]:
        getattr(workload, name)(*arguments)


def test_ia64s_log_keeps_its_marks_when_it_grows():
    vm = dl.VM("ia64")
    vm.set_memory_region(0, 5, 100)
    vm.vcpus[0].touch([5, 104])
    vm.set_memory_region(1, 1 << 24, 100)
    vm.vcpus[0].touch([(1 << 24) + 99])
    assert vm.get_dirty_log(0).indices().tolist() == [0, 99]
    assert vm.get_dirty_log(1).indices().tolist() == [99]


def test_a_large_slot_is_harvested_sparse_and_dense(harvesting):
    vm = dl.VM(harvesting, page_size=64)
    vm.set_memory_region(0, 5, 1 << 17)
    pages = np.arange(0, 1 << 17, 4099)
    vm.vcpus[0].touch(5 + pages)
    np.testing.assert_array_equal(vm.get_dirty_log(0).indices(), pages)
    vm.vcpus[0].touch(5 + np.arange(1 << 17))
    assert vm.get_dirty_log(0).count == 1 << 17
    assert vm.get_dirty_log(0).count == 0


def test_the_pages_handed_out_never_change(harvesting, kit):
    vm = kit.machine(harvesting)
    vm.vcpus[0].touch([kit.base_gfn + 5])
    first = vm.get_dirty_log(0)
    vm.vcpus[0].touch(kit.base_gfn + np.arange(512))
    second = vm.get_dirty_log(0)
    assert first.indices().tolist() == [5]
    assert second.count == 512


def test_tlbs_are_flushed_only_when_something_was_dirty(kit):
    for name in ("x86", "arm", "arm64", "ia64", "mips", "powerpc-book3s-pr"):
        vm = kit.machine(name)
        vm.vcpus[0].touch([kit.base_gfn])
        before = vm.mmu.flushes
        vm.get_dirty_log(0)
        assert vm.mmu.flushes == before + 1, name
        vm.get_dirty_log(0)
        assert vm.mmu.flushes == before + 1, name


def test_a_second_write_to_a_reported_page_faults_only_where_faults_mark(kit):
    faults = {}
    for name in ("x86", "arm", "arm64", "ia64", "mips", "powerpc-book3s-pr", "powerpc-book3s-hv", "s390"):
        vm = kit.machine(name)
        for _ in range(3):
            vm.vcpus[0].touch([kit.base_gfn, kit.base_gfn])
            assert vm.get_dirty_log(0).count == 1
        faults[name] = vm.vcpus[0].faults
    assert faults == dict.fromkeys(faults, 3) | {"powerpc-book3s-hv": 0, "s390": 0}


def test_arm_protects_the_range_of_a_mask_and_x86_only_its_bits(kit):
    """stage2_wp_range() makes a clean page between two dirty ones fault again; it is reported only then."""
    for name, again in (("x86", 0), ("arm", 1)):
        vm = kit.machine(name)
        vm.vcpus[0].touch(kit.base_gfn + np.array([1, 2, 3]))
        vm.set_memory_region(0, kit.base_gfn, 512)
        with vm.slots_lock:
            vm.mmu.harvest(0, protect=False)
            vm.mmu.hand_out(0)
        # 1, 2 and 3 are writable with their bits clear: only now does the form matter.
        with vm.slots_lock, vm.mmu_lock:
            vm.mmu.protect(0, np.array([0], np.uint64), np.array([0b1010], np.uint64))
            vm.mmu.flush()
        faults = vm.vcpus[0].faults
        vm.vcpus[0].touch([kit.base_gfn + 2])
        assert vm.vcpus[0].faults == faults + again, name


def test_an_architecture_without_a_log_refuses_with_its_errno(unsupported, kit):
    vm = kit.machine(unsupported)
    code = errno.EINVAL if unsupported == "arm64-stub" else errno.ENOTSUP
    vm.vcpus[0].touch([kit.base_gfn])
    for call in (vm.get_dirty_log, vm.peek, lambda slot: vm.slot(slot).harvest()):
        with pytest.raises(OSError, match=unsupported) as caught:
            call(0)
        assert caught.value.errno == code


def bad_outs():
    readonly = np.zeros(8, np.uint64)
    readonly.flags.writeable = False
    return {
        "read-only": readonly,
        "too small": np.zeros(7, np.uint64),
        "too large": np.zeros(9, np.uint64),
        "of another type": np.zeros(8, np.int64),
        "of bytes": bytearray(64),
        "strided": np.zeros(16, np.uint64)[::2],
        "misaligned": np.zeros(65, np.uint8)[1:].view(np.uint64),
        "of two dimensions": np.zeros((1, 8), np.uint64),
        "a list": [0] * 8,
        "a number": 8,
    }


@pytest.mark.parametrize("kind", bad_outs())
def test_an_output_buffer_that_cannot_take_the_words_is_efault_and_nothing_is_cleared(kind, harvesting, kit):
    vm = kit.machine(harvesting)
    vm.vcpus[0].touch([kit.base_gfn + 9])
    with pytest.raises(OSError, match="uint64 array of 8 words") as caught:
        vm.get_dirty_log(0, out=bad_outs()[kind])
    assert caught.value.errno == errno.EFAULT
    assert vm.get_dirty_log(0).indices().tolist() == [9]


class Failing(X86):
    """x86 with one hook that raises once."""

    def __init__(self, hook):
        self.hook = hook

    def fail(self, hook):
        if hook == self.hook:
            self.hook = None
            raise KeyboardInterrupt

    def sync_dirty_log(self, vm, slot):
        self.fail("sync")
        super().sync_dirty_log(vm, slot)

    def protect_masked(self, vm, slot, words, masks):
        self.fail("protect")
        super().protect_masked(vm, slot, words, masks)

    def flush_tlbs(self, vm, slot):
        self.fail("flush")
        super().flush_tlbs(vm, slot)


@pytest.mark.parametrize("hook", ["sync", "protect", "flush"])
def test_a_harvest_that_fails_in_the_middle_loses_nothing(hook):
    vm = dl.VM(Failing(hook))
    vm.set_memory_region(0, 0, 2000)
    vm.vcpus[0].touch([1, 700, 1999])
    with pytest.raises(KeyboardInterrupt):
        vm.get_dirty_log(0)
    vm.vcpus[0].touch([1, 5])
    assert vm.get_dirty_log(0).indices().tolist() == [1, 5, 700, 1999]
    vm.vcpus[0].touch([1])
    assert vm.get_dirty_log(0).indices().tolist() == [1]
    assert vm.get_dirty_log(0).count == 0


def test_a_slot_is_a_source(harvesting, kit):
    vm = kit.machine(harvesting)
    source = vm.slot(0)
    assert (source.npages, source.page_size, source.base_gfn) == (512, 4096, kit.base_gfn)
    vm.vcpus[0].touch([kit.base_gfn + 3])
    assert source.peek() == source.harvest()
    assert source.harvest().count == 0
    assert harvesting in repr(source)
    vm.set_memory_region(0, 0, 0)
    with pytest.raises(OSError, match="slot 0"):
        source.harvest()
