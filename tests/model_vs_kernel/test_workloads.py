"""The model against the kernel: the same guest writes, the same calls, the same answers."""

import errno

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dirtylog as dl
from dirtylog.sources import kvm
from dirtylog.sources.kvm._guest import Guest

probed = kvm.probe()
pytestmark = pytest.mark.skipif(not probed.available, reason=probed.reason)

PAGE = 4096
# Two slots with a hole between them: slot id, first gfn, pages.
SLOTS = ((0, 1 << 16, 130), (5, (1 << 16) + 200, 64))
GFNS = [gfn for _, base, npages in SLOTS for gfn in range(base, base + npages)]


# How the model is switched to what the kernel does; the last two are inside a machine and change no answer.
MODES = {
    "legacy": {},
    "manual": {"manual_protect": True},
    "ring": {"dirty_ring": 1024},
    "huge-pages": {"huge_pages": "on-write"},
    "pml": {"pml": True},
}


class Model:
    """The model as the tests drive it."""

    def __init__(self, mode):
        self.vm = dl.VM(**MODES[mode])

    def write(self, gfns, value):
        for gfn in gfns:
            self.vm.vcpus[0].write(gfn * PAGE, bytes([value]))

    def memory(self, slot):
        return self.vm.memory(slot)

    def close(self):
        pass


class Kernel:
    """A real machine with a real guest."""

    def __init__(self, mode):
        self.system = kvm.Kvm()
        self.vm = self.system.create_vm()
        if mode == "manual":
            self.vm.enable_manual_protect()
        elif mode == "ring":
            self.vm.enable_dirty_ring(1024)
        # Idle instructions: a KVM in software runs past a ring's reserve without them.
        self.guest = Guest(self.vm, capacity=1024, padding=40)

    def write(self, gfns, value):
        if gfns:
            self.guest.write(gfns, value)

    def memory(self, slot):
        return self.vm.memory(slot)

    def close(self):
        self.system.close()


class Pair:
    """Both, side by side."""

    def __init__(self, mode):
        self.kernel = Kernel(mode)
        self.model = Model(mode)
        for slot in SLOTS:
            self.both(lambda vm, slot=slot: vm.set_memory_region(*slot))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.kernel.close()
        self.model.close()

    def write(self, gfns, value=1):
        self.model.write(gfns, value)
        self.kernel.write(gfns, value)

    def both(self, call, alike=None):
        """Make a call on both; the same outcome: pages of which the kernel may report more, or the same errno."""
        outcomes = []
        for vm in (self.model.vm, self.kernel.vm):
            try:
                outcomes.append(call(vm))
            except OSError as error:
                name = errno.errorcode[error.errno]
                outcomes.append((alike or {}).get(name, name))
        model, kernel = outcomes
        if isinstance(model, dl.DirtyPages) and isinstance(kernel, dl.DirtyPages):
            assert (kernel.npages, kernel.page_size, kernel.exact) == (model.npages, model.page_size, model.exact)
            assert not model - kernel, "the kernel missed pages that the model reports"
        else:
            assert model == kernel
        return model

    def same_memory(self):
        for slot, _, npages in SLOTS:
            firsts = slice(0, npages * PAGE, PAGE)
            ours, theirs = (np.asarray(side.memory(slot)) for side in (self.model, self.kernel))
            assert np.array_equal(ours[firsts], theirs[firsts])


modes = pytest.mark.parametrize("mode", MODES)

writes = st.tuples(st.just("write"), st.lists(st.sampled_from(GFNS), min_size=1, max_size=40), st.integers(0, 255))
asks = st.tuples(st.sampled_from(["harvest", "peek"]), st.sampled_from([slot for slot, _, _ in SLOTS]))


@modes
@settings(max_examples=30, deadline=None)
@given(steps=st.lists(st.one_of(writes, asks), max_size=30))
def test_any_workload_is_reported_by_both(mode, steps):
    with Pair(mode) as pair:
        for step in steps:
            if step[0] == "write":
                pair.write(step[1], step[2])
            else:
                pair.both(lambda vm, step=step: getattr(vm.slot(step[1]), step[0])())
        for slot, _, _ in SLOTS:
            pair.both(lambda vm, slot=slot: vm.slot(slot).harvest())
        pair.same_memory()


@settings(max_examples=20, deadline=None)
@given(steps=st.lists(st.one_of(writes, st.just(("harvest_rings",)), asks), max_size=30))
def test_rings_are_harvested_alike(steps):
    with Pair("ring") as pair:
        for step in [*steps, ("harvest_rings",)]:
            if step[0] == "write":
                pair.write(step[1], step[2])
            elif step[0] == "harvest_rings":
                model, kernel = pair.model.vm.harvest_rings(), pair.kernel.vm.harvest_rings()
                assert model.keys() == kernel.keys()
                for slot, dirty in model.items():
                    assert not dirty - kernel[slot]
            else:
                pair.both(lambda vm, step=step: getattr(vm.slot(step[1]), step[0])())


clears = st.tuples(
    st.just("clear"),
    st.sampled_from([0, 5, 7]),
    st.sampled_from([0, 64, 128, 192, 1, -64]),
    st.sampled_from([0, 2, 63, 64, 66, 128, 130]),
    st.integers(0, 2**64 - 1),
)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.one_of(writes, clears, st.tuples(st.just("get"), st.sampled_from([0, 5, 7]))), max_size=30))
def test_manual_protection_reports_clears_and_fails_alike(steps):
    sizes = {slot: npages for slot, _, npages in SLOTS}
    with Pair("manual") as pair:
        reported = {slot: dl.DirtyPages.from_indices([], npages) for slot, npages in {**sizes, 7: 1}.items()}
        for step in steps:
            if step[0] == "write":
                pair.write(step[1], step[2])
            elif step[0] == "get":
                answer = pair.both(lambda vm, step=step: vm.get_dirty_log(step[1]))
                if isinstance(answer, dl.DirtyPages):
                    reported[step[1]] = answer
            else:
                _, slot, first, count, chosen = step
                # Some of what was reported, whatever has been written to it since.
                some = [page for page in reported[slot].indices().tolist() if chosen >> page % 64 & 1]
                dirty = dl.DirtyPages.from_indices(some, reported[slot].npages)
                pair.both(lambda vm, args=(slot, first, count, dirty): vm.clear_dirty_log(*args))


bases = st.sampled_from([1 << 16, (1 << 16) + 10, (1 << 16) + 100, (1 << 16) + 200, (1 << 16) + 400])
calls = st.one_of(
    writes,
    asks,
    st.tuples(st.just("get"), st.sampled_from([0, 1, 5, -1, 1 << 20])),
    st.tuples(
        st.just("set"), st.sampled_from([0, 1, 5, -1, 1 << 20]), bases, st.sampled_from([0, 10, 64, 130]), st.booleans()
    ),
)


def perform(vm, call):
    if call[0] == "get":
        return vm.get_dirty_log(call[1])
    if call[0] == "set":
        slot, base, npages, log_dirty = call[1:]
        # A deletion has no place: old kernels look at it all the same, new ones do not.
        return vm.set_memory_region(slot, base if npages else 0, npages, log_dirty=log_dirty)
    return getattr(vm.slot(call[1]), call[0])()


@settings(max_examples=60, deadline=None)
@given(st.lists(calls, max_size=30))
def test_slots_come_go_move_and_fail_alike(steps):
    """Legacy mode: creating, moving, resizing, deleting, overlapping, asking for what is not there."""
    with Pair("legacy") as pair:
        for step in steps:
            mapped = {slot: guest_frames(pair.model.vm, slot) for slot in (0, 1, 5)}
            if step[0] == "write":
                # Only where both have memory: a store elsewhere is an error in one and device I/O in the other.
                pair.write([gfn for gfn in step[1] if any(gfn in frames for frames in mapped.values())], step[2])
            else:
                # Kernels differ in which they find first: a size that changes, or an overlap.
                alike = {"EEXIST": "EINVAL"} if step[0] == "set" else {}
                pair.both(lambda vm, step=step: perform(vm, step), alike)


def guest_frames(vm, slot):
    try:
        region = vm.region(slot)
    except OSError:
        return range(0)
    return range(region.base_gfn, region.base_gfn + region.npages)


def test_the_same_code_runs_on_either_machine():
    """What a user writes against the model works against the kernel, errors included."""

    def session(vm, write):
        answers = []
        vm.set_memory_region(0, 1 << 16, 100)
        write([(1 << 16) + 3, (1 << 16) + 99])
        answers.append(vm.slot(0).peek().indices().tolist())
        answers.append(vm.get_dirty_log(0).indices().tolist())
        answers.append(vm.get_dirty_log(0).count)
        out = np.full(2, 9, np.uint64)
        write([1 << 16])
        vm.get_dirty_log(0, out)
        answers.append(out.tolist())
        for slot, buffer in ((0, np.zeros(1, np.uint64)), (1, None), (-1, None)):
            with pytest.raises(OSError, match=r"slot|out") as caught:
                vm.get_dirty_log(slot, buffer)
            answers.append(caught.value.errno)
        vm.set_memory_region(0, 1 << 16, 0)
        return answers

    model, kernel = Model("legacy"), Kernel("legacy")
    try:
        ours = session(model.vm, lambda gfns: model.write(gfns, 1))
        theirs = session(kernel.vm, lambda gfns: kernel.write(gfns, 1))
    finally:
        kernel.close()
    assert ours == theirs == [[3, 99], [3, 99], 0, [1, 0], errno.EFAULT, errno.ENOENT, errno.EINVAL]


REFUSED = {
    "out: a number": lambda vm: vm.get_dirty_log(5, out=5),
    "out: one word too many": lambda vm: vm.get_dirty_log(5, out=np.zeros(2, np.uint64)),
    "out: two dimensions": lambda vm: vm.get_dirty_log(5, out=np.zeros((1, 1), np.uint64)),
    "dirty: nothing": lambda vm: vm.clear_dirty_log(5, 0, 64, None),
    "dirty: of another size": lambda vm: vm.clear_dirty_log(5, 0, 64, dl.DirtyPages.from_indices([1], 65)),
    "dirty: pages of another size": lambda vm: vm.clear_dirty_log(5, 0, 64, dl.DirtyPages.from_indices([1], 64, 8192)),
    "a number: a float": lambda vm: vm.clear_dirty_log(5, 0.0, 64, dl.DirtyPages.from_indices([1], 64)),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_used_is_refused_by_both_with_the_same_words(kind):
    with Pair("manual") as pair:
        errors = []
        for vm in (pair.model.vm, pair.kernel.vm):
            with pytest.raises((OSError, TypeError, ValueError)) as caught:
                REFUSED[kind](vm)
            errors.append((caught.type, getattr(caught.value, "errno", None), str(caught.value)))
        assert errors[0] == errors[1]
