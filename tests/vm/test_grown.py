"""What the kernel has grown since: manual protection, initially-all-set, rings, 2 MiB mappings, PML."""

import errno
import pickle

import numpy as np
import pytest

import dirtylog as dl
from dirtylog.vm import rings
from dirtylog.vm.arch.x86 import X86


def refused(code, call, *arguments):
    with pytest.raises(OSError) as caught:  # noqa: PT011
        call(*arguments)
    assert caught.value.errno == code


def pages_of(vm, *pages, npages=512):
    return dl.DirtyPages.from_indices(pages, npages, vm.page_size)


# ---- manual protection ------------------------------------------------------------


@pytest.fixture
def manual(harvesting, kit):
    return kit.machine(harvesting, manual_protect=True)


def test_get_clears_nothing_and_clear_clears_what_was_reported(manual, kit):
    base = kit.base_gfn
    manual.vcpus[0].touch(base + np.array([1, 70, 511]))
    reported = manual.get_dirty_log(0)
    assert reported.indices().tolist() == [1, 70, 511]
    assert manual.get_dirty_log(0) == reported
    manual.clear_dirty_log(0, 64, 64, reported)
    assert manual.get_dirty_log(0).indices().tolist() == [1, 511]
    manual.clear_dirty_log(0, 0, 512, reported)
    assert manual.get_dirty_log(0).count == 0
    manual.vcpus[0].touch(base + np.array([1, 2, 70]))
    assert manual.get_dirty_log(0).indices().tolist() == [1, 2, 70]


def test_a_bit_that_was_never_reported_is_not_cleared(manual, kit):
    manual.vcpus[0].touch([kit.base_gfn + 3])
    manual.get_dirty_log(0)
    manual.vcpus[0].touch([kit.base_gfn + 4])
    manual.clear_dirty_log(0, 0, 512, pages_of(manual, *range(512)))
    assert manual.get_dirty_log(0).indices().tolist() == [4]


def test_a_peek_is_no_report(manual, kit):
    manual.vcpus[0].touch([kit.base_gfn + 3])
    manual.clear_dirty_log(0, 0, 512, manual.peek(0))
    assert manual.get_dirty_log(0).indices().tolist() == [3]


def test_a_write_after_the_clear_is_seen_next_time(manual, kit):
    manual.vcpus[0].touch([kit.base_gfn + 9])
    for _ in range(3):
        reported = manual.get_dirty_log(0)
        assert reported.indices().tolist() == [9]
        manual.clear_dirty_log(0, 0, 512, reported)
        manual.vcpus[0].touch([kit.base_gfn + 9])


def test_clear_follows_kvms_alignment_rules(kit):
    vm = kit.machine("x86", npages=200, manual_protect=True)
    vm.vcpus[0].touch(kit.base_gfn + np.arange(200))
    every = vm.get_dirty_log(0)
    for first, count in [(1, 64), (64, 63), (0, 199), (128, 73), (256, 0), (-64, 64), (0, -64), (63, 137)]:
        refused(errno.EINVAL, vm.clear_dirty_log, 0, first, count, every)
    assert vm.get_dirty_log(0).count == 200
    vm.clear_dirty_log(0, 128, 72, every)
    assert vm.get_dirty_log(0).count == 128
    vm.clear_dirty_log(0, 64, 0, every)
    vm.clear_dirty_log(0, 0, 200, every)
    assert vm.get_dirty_log(0).count == 0


def test_clear_refuses_what_it_cannot_use(kit):
    vm = kit.machine("x86", manual_protect=True)
    vm.vcpus[0].touch([kit.base_gfn])
    reported = vm.get_dirty_log(0)
    refused(errno.EINVAL, vm.clear_dirty_log, 125, 0, 64, reported)
    refused(errno.ENOENT, vm.clear_dirty_log, 3, 0, 64, reported)
    with pytest.raises(ValueError, match="512"):
        vm.clear_dirty_log(0, 0, 64, pages_of(vm, 0, npages=513))
    with pytest.raises(ValueError, match="about 512 of 8192"):
        vm.clear_dirty_log(0, 0, 64, dl.DirtyPages.from_indices([0], 512, 8192))
    for dirty in (reported.words, None):
        with pytest.raises(TypeError, match="DirtyPages"):
            vm.clear_dirty_log(0, 0, 64, dirty)
    assert vm.get_dirty_log(0) == reported
    legacy = kit.machine("x86")
    refused(errno.EINVAL, legacy.clear_dirty_log, 0, 0, 64, reported)


def test_get_with_an_output_buffer_in_manual_mode(kit):
    vm = kit.machine("x86", manual_protect=True)
    vm.vcpus[0].touch([kit.base_gfn + 65])
    out = np.zeros(8, np.uint64)
    assert vm.get_dirty_log(0, out=out).count == 1
    assert out.tolist() == [0, 2, 0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("hook", ["protect_masked", "flush_tlbs"])
def test_a_clear_that_fails_in_a_hook_loses_nothing_and_adds_nothing(hook, kit):
    class Failing(X86):
        failing = True

        def protect_masked(self, vm, slot, words, masks):
            if hook == "protect_masked" and self.failing:
                raise KeyboardInterrupt
            super().protect_masked(vm, slot, words, masks)

        def flush_tlbs(self, vm, slot):
            if hook == "flush_tlbs" and self.failing:
                raise KeyboardInterrupt
            super().flush_tlbs(vm, slot)

    arch = Failing()
    vm = dl.VM(arch, manual_protect=True)
    vm.set_memory_region(0, 0, 512)
    vm.vcpus[0].touch([5, 100])
    reported = vm.get_dirty_log(0)
    # More than was dirty is named: what nobody wrote is not dirty when it fails.
    with pytest.raises(KeyboardInterrupt):
        vm.clear_dirty_log(0, 64, 64, pages_of(vm, *range(512)))
    assert vm.get_dirty_log(0) == reported
    arch.failing = False
    vm.clear_dirty_log(0, 64, 64, reported)
    assert vm.get_dirty_log(0).indices().tolist() == [5]
    vm.vcpus[0].touch([100])
    assert vm.get_dirty_log(0).indices().tolist() == [5, 100]


def test_the_first_report_is_all_ones_when_initially_set(harvesting, kit):
    vm = kit.machine(harvesting, npages=300, manual_protect=True, initially_set=True)
    base = kit.base_gfn
    first = vm.get_dirty_log(0)
    assert first.count == 300
    vm.clear_dirty_log(0, 0, 300, first)
    assert vm.get_dirty_log(0).count == 0
    vm.vcpus[0].touch([base + 299])
    assert vm.get_dirty_log(0).indices().tolist() == [299]
    vm.set_memory_region(0, base, 300, log_dirty=False)
    vm.vcpus[0].touch(base + np.arange(300))
    vm.set_memory_region(0, base, 300)
    again = vm.get_dirty_log(0)
    assert again.count == 300
    vm.clear_dirty_log(0, 0, 64, again)
    vm.vcpus[0].touch(base + np.arange(64))
    vm.clear_dirty_log(0, 64, 236, again)
    assert vm.get_dirty_log(0).indices().tolist() == list(range(64))


def test_initially_set_protects_nothing_when_logging_starts(kit):
    faults = {}
    for initially_set in (False, True):
        vm = kit.machine("x86", manual_protect=True, initially_set=initially_set)
        vm.set_memory_region(0, kit.base_gfn, 512, log_dirty=False)
        vm.vcpus[0].touch([kit.base_gfn])
        vm.set_memory_region(0, kit.base_gfn, 512)
        before = vm.vcpus[0].faults
        vm.vcpus[0].touch([kit.base_gfn])
        faults[initially_set] = vm.vcpus[0].faults - before
    assert faults == {False: 1, True: 0}


# ---- dirty rings ----------------------------------------------------------------------


@pytest.fixture(params=["x86", "arm", "arm64"])
def ringed(request, kit):
    return kit.machine(request.param, dirty_ring=128, npages=1000)


def test_rings_are_harvested_slot_by_slot(ringed, kit):
    base = kit.base_gfn
    ringed.set_memory_region(4, 5000, 64)
    ringed.vcpus[0].touch([base + 5, base + 5, 5003])
    ringed.vcpus[1].touch([base + 5, base + 999])
    pages = ringed.harvest_rings()
    assert {slot: found.indices().tolist() for slot, found in pages.items()} == {0: [5, 999], 4: [3]}
    assert {slot: found.count for slot, found in ringed.harvest_rings().items()} == {0: 0, 4: 0}
    ringed.vcpus[1].touch([base + 5])
    assert ringed.harvest_rings()[0].indices().tolist() == [5]


def test_a_slot_of_a_ringed_machine_is_a_source(ringed, kit):
    ringed.set_memory_region(4, 5000, 64)
    ringed.vcpus[0].touch([kit.base_gfn + 5, 5003])
    first, other = ringed.slot(0), ringed.slot(4)
    assert first.peek().indices().tolist() == [5]
    assert first.harvest().indices().tolist() == [5]
    assert first.harvest().count == 0
    assert other.harvest().indices().tolist() == [3]
    ringed.vcpus[0].touch([kit.base_gfn + 5])
    assert first.harvest().indices().tolist() == [5]


def test_a_vcpu_leaves_at_the_soft_limit_and_goes_on_after_a_harvest(ringed, kit):
    vcpu, gfns = ringed.vcpus[0], kit.base_gfn + np.arange(200)
    with pytest.raises(rings.DirtyRingFull, match="harvest_rings") as caught:
        vcpu.touch(gfns)
    assert caught.value.done == 128 - 64
    with pytest.raises(rings.DirtyRingFull) as again:
        vcpu.write(int(gfns[0]) * 4096, b"x" * 5000)
    assert again.value.done == 0
    ringed.vcpus[1].touch(gfns[100:150])
    found = ringed.harvest_rings()[0]
    assert found.indices().tolist() == [*range(64), *range(100, 150)]
    assert vcpu.touch(gfns[64:100]) == 36
    assert ringed.harvest_rings()[0].indices().tolist() == list(range(64, 100))
    assert pickle.loads(pickle.dumps(caught.value)).done == 64


def test_a_ring_that_wraps_many_times_loses_nothing(ringed, kit):
    random = np.random.default_rng(1)
    for _ in range(40):
        pages = np.unique(random.integers(0, 1000, 50))
        ringed.vcpus[0].touch(kit.base_gfn + pages)
        np.testing.assert_array_equal(ringed.harvest_rings()[0].indices(), pages)


def test_a_reset_coalesces_neighbours_into_one_mask(kit):
    vm = kit.machine("x86", dirty_ring=128)
    for pages, masks in [
        ([5, 6, 7], [(5, 0b111)]),
        ([7, 6, 5], [(5, 0b111)]),
        ([60, 70], [(60, 1 | 1 << 10)]),
        ([0, 63], [(0, 1 | 1 << 63)]),
        ([0, 64], [(0, 1), (64, 1)]),
        ([100, 200, 101], [(100, 1), (200, 1), (101, 1)]),
        ([100, 163, 99], [(100, 1 | 1 << 63), (99, 1)]),
    ]:
        vm.vcpus[0].touch(kit.base_gfn + np.array(pages))
        with vm.slots_lock:
            slots, offsets = vm.mmu.ring_entries()
            assert (slots.tolist(), offsets.tolist()) == ([0] * len(pages), pages)
            rows = vm.mmu.ring_masks(slots.size).tolist()
        assert rows == [[0, first, mask] for first, mask in masks]
        assert set(vm.harvest_rings()[0]) == set(pages)


def test_a_ring_is_reset_by_an_architecture_written_in_python(kit):
    class Python(X86):
        calls = ()
        failing = False

        def protect_masked(self, vm, slot, words, masks):
            assert vm.mmu_lock.held
            if self.failing:
                raise KeyboardInterrupt
            self.calls = (words.tolist(), masks.tolist())
            super().protect_masked(vm, slot, words, masks)

    arch = Python()
    vm = dl.VM(arch, dirty_ring=128)
    vm.set_memory_region(0, 0, 512)
    vm.vcpus[0].touch([62, 63, 64])
    arch.failing = True
    with pytest.raises(KeyboardInterrupt):
        vm.harvest_rings()
    arch.failing = False
    vm.vcpus[0].touch([64, 300])
    assert vm.harvest_rings()[0].indices().tolist() == [62, 63, 64, 300]
    assert arch.calls == ([0, 4, 1], [3 << 62, 1 << 44, 1])
    vm.vcpus[0].touch([64])
    assert vm.harvest_rings()[0].indices().tolist() == [64]


def test_a_deleted_slot_leaves_nothing_in_the_rings(ringed, kit):
    ringed.vcpus[0].touch([kit.base_gfn + 900])
    ringed.set_memory_region(0, kit.base_gfn, 0)
    ringed.set_memory_region(0, kit.base_gfn, 10)
    assert ringed.harvest_rings()[0].count == 0
    assert ringed.slot(0).harvest().count == 0


class FailingFlush(X86):
    failing = False

    def flush_tlbs(self, vm, slot):
        if self.failing:
            raise OSError("no interrupt")
        super().flush_tlbs(vm, slot)


def test_a_slot_deleted_when_no_tlb_can_be_flushed_leaves_the_rings_in_order():
    arch = FailingFlush()
    vm = dl.VM(arch, dirty_ring=128)
    vm.set_memory_region(0, 0, 64)
    vm.set_memory_region(1, 100, 64)
    vm.vcpus[0].touch([60, 103])
    arch.failing = True
    # Fetched and not released: another drain finds them.
    with pytest.raises(OSError, match="no interrupt"):
        vm.harvest_rings()
    vm.vcpus[0].touch([61])
    vm.set_memory_region(0, 0, 0)
    vm.set_memory_region(0, 0, 8)
    arch.failing = False
    assert {slot: found.indices().tolist() for slot, found in vm.harvest_rings().items()} == {0: [], 1: [3]}
    vm.vcpus[0].touch([7])
    assert vm.harvest_rings()[0].indices().tolist() == [7]


def test_a_slot_without_a_log_has_no_pages_in_the_rings(ringed, kit):
    ringed.vcpus[0].touch([kit.base_gfn + 5])
    assert ringed.slot(0).peek().count == 1, "fetched"
    ringed.vcpus[0].touch([kit.base_gfn + 6])
    ringed.set_memory_region(0, kit.base_gfn, 1000, log_dirty=False)
    assert ringed.harvest_rings() == {}
    ringed.vcpus[0].touch([kit.base_gfn + 7])
    ringed.set_memory_region(0, kit.base_gfn, 1000)
    assert ringed.harvest_rings()[0].count == 0
    ringed.vcpus[0].touch([kit.base_gfn + 7])
    assert ringed.harvest_rings()[0].indices().tolist() == [7]


def test_rings_and_the_dirty_log_exclude_each_other(ringed, kit):
    ringed.vcpus[0].touch([kit.base_gfn])
    refused(errno.ENXIO, ringed.get_dirty_log, 0)
    refused(errno.ENXIO, ringed.clear_dirty_log, 0, 0, 64, pages_of(ringed, 0, npages=1000))
    refused(errno.EINVAL, kit.machine("x86").harvest_rings)
    assert ringed.harvest_rings()[0].count == 1


# ---- 2 MiB mappings ----------------------------------------------------------------------


def huge_machine(**options):
    vm = dl.VM("x86", page_size=64, **options)
    vm.set_memory_region(0, 1024, 1300, log_dirty=False)
    vm.vcpus[0].touch([1024 + page for page in (3, 4, 600, 1299)])
    return vm


def mappings(vm, slot=0):
    with vm.slots_lock:
        return vm.mmu.huge_mappings(slot)


def test_pages_that_are_not_logged_are_mapped_512_at_once(kit):
    vm = huge_machine(huge_pages="eager")
    assert mappings(vm) == 2
    assert vm.vcpus[0].faults == 3, "one for each whole 512 pages, one for the page after them"
    vm.vcpus[0].touch(1024 + np.arange(1024))
    assert vm.vcpus[0].faults == 3
    assert mappings(huge_machine()) == 0


@pytest.mark.parametrize(("split", "left", "after"), [("eager", 0, 0), ("on-write", 2, 1)])
def test_logging_divides_large_mappings_at_once_or_at_the_first_write(split, left, after):
    vm = huge_machine(huge_pages=split)
    vm.set_memory_region(0, 1024, 1300)
    assert mappings(vm) == left
    vm.vcpus[0].touch([1024 + 5])
    assert mappings(vm) == after
    assert vm.get_dirty_log(0).indices().tolist() == [5]
    vm.vcpus[0].touch(1024 + np.array([5, 6, 1023, 1299]))
    assert vm.get_dirty_log(0).indices().tolist() == [5, 6, 1023, 1299]
    vm.vcpus[0].touch(1024 + np.arange(1300))
    assert vm.get_dirty_log(0).count == 1300


@pytest.mark.parametrize("split", ["eager", "on-write"])
@pytest.mark.parametrize("pml", [False, True])
def test_large_mappings_stay_until_cleared_when_initially_set(split, pml):
    vm = huge_machine(huge_pages=split, manual_protect=True, initially_set=True, pml=pml)
    vm.set_memory_region(0, 1024, 1300)
    assert mappings(vm) == 2
    every = vm.get_dirty_log(0)
    vm.clear_dirty_log(0, 0, 64, every)
    vm.vcpus[0].touch(1024 + np.array([1, 65, 700]))
    assert mappings(vm) == 1
    assert 1 in vm.get_dirty_log(0)
    vm.clear_dirty_log(0, 0, 1300, vm.get_dirty_log(0))
    vm.vcpus[0].touch(1024 + np.array([2, 65, 700]))
    assert vm.get_dirty_log(0).indices().tolist() == [2, 65, 700]


def test_an_architecture_in_python_need_not_know_of_large_mappings():
    class Python(X86):
        def protect_masked(self, vm, slot, words, masks):
            for word, mask in zip(words.tolist(), masks.tolist(), strict=True):
                assert mask
                assert word < 16

    vm = dl.VM(Python(), page_size=64, huge_pages="on-write", manual_protect=True, initially_set=True)
    vm.set_memory_region(0, 0, 1024, log_dirty=False)
    vm.vcpus[0].touch([3])
    vm.set_memory_region(0, 0, 1024)
    vm.clear_dirty_log(0, 0, 1024, vm.get_dirty_log(0))
    vm.vcpus[0].touch([3, 4])
    assert vm.get_dirty_log(0).indices().tolist() == [3, 4]


def test_a_slot_that_does_not_begin_at_a_large_page_has_small_mappings():
    vm = dl.VM("x86", page_size=64, huge_pages="eager")
    vm.set_memory_region(0, 1025, 1300, log_dirty=False)
    vm.vcpus[0].touch([1025])
    assert mappings(vm) == 0


# ---- page-modification log -----------------------------------------------------------------


def test_pml_notes_what_write_faults_would_have_marked(kit):
    vm = kit.machine("x86", npages=2000, pml=True)
    gfns = kit.base_gfn + np.arange(2000)
    vm.vcpus[0].touch(gfns)
    assert vm.get_dirty_log(0).count == 2000
    faults = vm.vcpus[0].faults
    for pages in ([5], [5, 6, 1999], range(1500)):
        vm.vcpus[0].touch(gfns[list(pages)])
        assert vm.get_dirty_log(0).indices().tolist() == list(pages)
        assert vm.get_dirty_log(0).count == 0
    assert vm.vcpus[0].faults == faults, "pages stay writable"


def test_pml_buffers_are_emptied_before_a_harvest_and_when_they_are_full(kit):
    vm = kit.machine("x86", npages=2000, pml=True)
    gfns = kit.base_gfn + np.arange(2000)
    vm.vcpus[0].touch(gfns)
    vm.get_dirty_log(0)
    vm.vcpus[0].touch(gfns[:600])
    vm.vcpus[1].touch(gfns[600:700])
    with vm.slots_lock:
        assert vm.mmu.peek(0).count == 512, "one buffer was full; the rest is not in the log yet"
    assert vm.get_dirty_log(0).count == 700


def test_pml_starts_clean_when_logging_is_switched_on(kit):
    vm = kit.machine("x86", pml=True)
    vm.vcpus[0].touch([kit.base_gfn + 1])
    vm.get_dirty_log(0)
    vm.set_memory_region(0, kit.base_gfn, 512, log_dirty=False)
    vm.vcpus[0].touch(kit.base_gfn + np.array([1, 2]))
    vm.set_memory_region(0, kit.base_gfn, 512)
    assert vm.get_dirty_log(0).count == 0
    vm.vcpus[0].touch(kit.base_gfn + np.array([2, 3]))
    assert vm.get_dirty_log(0).indices().tolist() == [2, 3]


def test_a_moved_slot_keeps_what_pml_noted(kit):
    vm = kit.machine("x86", pml=True)
    vm.vcpus[0].touch([kit.base_gfn + 1])
    vm.get_dirty_log(0)
    vm.vcpus[0].touch([kit.base_gfn + 1])
    vm.set_memory_region(0, 9000, 512)
    assert vm.get_dirty_log(0).indices().tolist() == [1]


# ---- all of them under the value oracle -------------------------------------------------------

GROWN = {
    "manual": {"manual_protect": True},
    "initially set": {"manual_protect": True, "initially_set": True},
    "pml": {"pml": True},
    "pml, manual": {"pml": True, "manual_protect": True},
    "ring": {"dirty_ring": 4096},
    "ring that fills up": {"dirty_ring": 256},
    "2 MiB mappings": {"huge_pages": "on-write", "manual_protect": True, "initially_set": True},
}


@pytest.mark.parametrize("grown", GROWN)
def test_the_value_oracle_agrees_while_two_vcpus_store(grown, kit):
    vm = kit.machine("x86", npages=1300, base_gfn=512, **GROWN[grown])
    vm.harvest(0)
    # Every page holds a number, or those reported because they are initially set would hold none.
    for pages in np.array_split(512 + np.arange(1300), 10):
        vm.vcpus[0].store(pages, 1)
        vm.harvest(0)
    oracle = kit.oracle(vm)
    with kit.writers(vm, pages_at_once=300) as writers:
        for _ in range(25):
            iteration = writers.next_iteration()
            oracle.check(vm.harvest(0), iteration)
    oracle.check(vm.harvest(0), writers.iteration)
    assert not oracle.pending.any()


def test_copying_by_the_rings_while_two_vcpus_store_ends_in_equal_memory(kit):
    vm = kit.machine("x86", npages=300, dirty_ring=128)
    source = vm.memory(0).reshape(300, -1)
    replica = np.zeros_like(source)

    def copy():
        for pages in vm.harvest_rings().values():
            replica[pages.indices()] = source[pages.indices()]

    def store(vcpu, gfns, value):
        while gfns.size:
            try:
                vcpu.store(gfns, value)
                return
            except rings.DirtyRingFull as full:
                gfns = gfns[full.done :]
                copy()

    random = np.random.default_rng(3)
    for value in range(1, 200):
        store(vm.vcpus[value % 2], kit.base_gfn + random.integers(0, 300, 50), value)
        if value % 7 == 0:
            copy()
    copy()
    np.testing.assert_array_equal(replica, source)


@pytest.mark.parametrize(
    ("arch", "options", "reason"),
    [
        ("x86", {"initially_set": True}, "manual_protect"),
        ("x86", {"dirty_ring": 100}, "power of two"),
        ("x86", {"dirty_ring": 64}, "power of two"),
        ("x86", {"dirty_ring": 1 << 17}, "power of two"),
        ("x86", {"dirty_ring": 128, "pml": True}, "excludes"),
        ("x86", {"dirty_ring": 128, "manual_protect": True}, "excludes"),
        ("x86", {"huge_pages": "later"}, "on-write"),
        ("s390", {"dirty_ring": 128}, "write faults"),
        ("mips", {"huge_pages": "eager"}, "write faults"),
        ("arm", {"pml": True}, "x86"),
    ],
)
def test_what_a_machine_cannot_do_is_refused_with_the_reason(arch, options, reason):
    with pytest.raises(ValueError, match=reason):
        dl.VM(arch, **options)


def test_a_slot_that_is_made_anew_during_a_harvest_is_harvested_afterwards(monkeypatch):
    vm = dl.VM(manual_protect=True)
    vm.set_memory_region(0, 0, 128)
    get = type(vm).get_dirty_log

    def made_anew(machine, slot):
        pages = get(machine, slot)
        monkeypatch.undo()
        machine.set_memory_region(0, 0, 0)
        machine.set_memory_region(0, 0, 64)
        return pages

    monkeypatch.setattr(type(vm), "get_dirty_log", made_anew)
    # What the one before had is of another size: it is refused, and not kept for this one.
    with pytest.raises(ValueError, match="128"):
        vm.harvest(0)
    vm.vcpus[0].touch([5])
    assert vm.harvest(0).indices().tolist() == [5]
