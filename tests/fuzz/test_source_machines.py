"""Any sequence of operations on shared logs, machines, dirty rings and trackers: they tell what was written, once."""

import errno
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import dirtylog as dl
from dirtylog.errors import BackendUnavailable, DirtyLogError
from dirtylog.sources.kvm import _kvm


class SharedLogMachine(RuleBasedStateMachine):
    """Handles on one log come and go; its bits are those of one set, and a stranger may write past its end."""

    @initialize(npages=st.sampled_from([1, 63, 64, 65, 1000]))
    def start(self, npages):
        self.npages = npages
        self.directory = tempfile.TemporaryDirectory()
        self.path = Path(self.directory.name) / "log"
        self.handles = [dl.SharedLog.create(npages, self.path)]
        self.pages = set()
        self.tail = False

    def handle(self, data):
        return data.draw(st.sampled_from(self.handles))

    @precondition(lambda self: len(self.handles) < 4 and not self.tail)
    @rule(data=st.data(), by=st.sampled_from(["path", "descriptor", "nbytes"]))
    def open_another(self, data, by):
        if by == "path":
            self.handles.append(dl.SharedLog.open(self.path, self.npages))
        elif by == "descriptor":
            self.handles.append(dl.SharedLog.open(self.handle(data).fileno(), self.npages))
        else:
            self.handles.append(dl.SharedLog.open(self.path, nbytes=self.npages * 4096 - 1))

    @precondition(lambda self: len(self.handles) > 1)
    @rule(data=st.data())
    def close_one(self, data):
        handle = self.handle(data)
        self.handles.remove(handle)
        handle.close()
        handle.close()
        with pytest.raises(ValueError, match="closed"):
            handle.mark(0)

    @rule(data=st.data())
    def mark(self, data):
        pages = data.draw(st.sets(st.integers(0, self.npages - 1), max_size=10))
        self.handle(data).mark_pages(list(pages))
        self.pages |= pages

    @rule(data=st.data())
    def mark_a_range(self, data):
        first = data.draw(st.integers(0, self.npages))
        count = data.draw(st.integers(0, self.npages - first))
        self.handle(data).mark_range(first, count)
        self.pages |= set(range(first, first + count))

    @rule(data=st.data())
    def harvest(self, data):
        if self.tail:
            with pytest.raises(DirtyLogError, match="smaller"):
                self.handle(data).harvest()
        else:
            assert set(self.handle(data).harvest()) == self.pages
            self.pages = set()

    @rule(data=st.data())
    def a_page_past_the_end_is_refused(self, data):
        with pytest.raises(IndexError):
            self.handle(data).mark_pages([0, self.npages])

    @precondition(lambda self: self.npages % 64)
    @rule(on=st.booleans())
    def a_stranger_writes_past_the_end(self, on):
        with self.path.open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            last = file.read(1)[0]
            file.seek(-1, os.SEEK_END)
            file.write(bytes([last | 0x80 if on else last & 0x7F]))
        self.tail = on

    @invariant()
    def every_handle_sees_the_same(self):
        if hasattr(self, "tail") and not self.tail:
            assert all(set(handle.peek()) == self.pages for handle in self.handles)

    def teardown(self):
        if hasattr(self, "handles"):
            for handle in self.handles:
                handle.close()
            self.directory.cleanup()


TestSharedLogMachine = SharedLogMachine.TestCase


class VMMachine(RuleBasedStateMachine):
    """Slots come, move, stop and start their logs and go; every log is the set of pages written since it was asked."""

    @initialize(
        how=st.sampled_from(
            [
                {"arch": "x86"},
                {"arch": "x86", "manual_protect": True},
                {"arch": "x86", "pml": True},
                {"arch": "x86", "huge_pages": "eager"},
                {"arch": "arm64"},
                {"arch": "mips"},
                {"arch": "powerpc-book3s-hv"},
                {"arch": "s390"},
                {"arch": "x86", "dirty_ring": 4096},
            ]
        )
    )
    def start(self, how):
        self.vm = dl.VM(vcpus=2, **how)
        # slot: (place, npages, set of dirty pages or None); places are a thousand frames apart.
        self.slots = {}

    def base(self, place):
        return 100 + 1000 * place

    @rule(slot=st.integers(0, 3), place=st.integers(0, 3), npages=st.sampled_from([1, 64, 65, 700]), log=st.booleans())
    def make_move_or_switch(self, slot, place, npages, log):
        taken = {each[0] for number, each in self.slots.items() if number != slot}
        if place in taken:
            npages = self.slots[slot][1] if slot in self.slots else npages
            with pytest.raises(FileExistsError):
                self.vm.set_memory_region(slot, self.base(place), npages, log)
            return
        old = self.slots.get(slot)
        if old is not None and old[1] != npages:
            with pytest.raises(OSError, match="pages") as refused:
                self.vm.set_memory_region(slot, self.base(place), npages, log)
            assert refused.value.errno == errno.EINVAL
            return
        self.vm.set_memory_region(slot, self.base(place), npages, log)
        dirty = None if not log else set() if old is None or old[2] is None else old[2]
        self.slots[slot] = [place, npages, dirty]

    @rule(data=st.data())
    def delete(self, data):
        assume(self.slots)
        slot = data.draw(st.sampled_from(sorted(self.slots)))
        self.vm.set_memory_region(slot, 0, 0)
        del self.slots[slot]

    @rule(data=st.data(), vcpu=st.integers(0, 1), store=st.booleans())
    def write(self, data, vcpu, store):
        assume(self.slots)
        slot = data.draw(st.sampled_from(sorted(self.slots)))
        place, npages, dirty = self.slots[slot]
        pages = data.draw(st.sets(st.integers(0, npages - 1), min_size=1, max_size=12))
        if store:
            for page in pages:
                self.vm.vcpus[vcpu].write((self.base(place) + page) * 4096 + 17, bytes([page % 256]))
                assert self.vm.memory(slot)[page * 4096 + 17] == page % 256
        else:
            self.vm.vcpus[vcpu].touch([self.base(place) + page for page in pages])
        if dirty is not None:
            dirty |= pages

    @rule(vcpu=st.integers(0, 1))
    def a_page_of_no_slot_is_a_fault(self, vcpu):
        with pytest.raises(OSError, match="memslot") as refused:
            self.vm.vcpus[vcpu].write(self.base(9) * 4096, b"x")
        assert refused.value.errno == errno.EFAULT

    @rule(data=st.data())
    def harvest(self, data):
        assume(self.slots)
        slot = data.draw(st.sampled_from(sorted(self.slots)))
        dirty = self.slots[slot][2]
        if dirty is None:
            with pytest.raises(FileNotFoundError):
                self.vm.slot(slot).harvest()
            return
        assert set(self.vm.slot(slot).harvest()) == dirty
        dirty.clear()

    @precondition(lambda self: self.vm.manual_protect)
    @rule(data=st.data())
    def clear_some_of_what_was_reported(self, data):
        logging = [slot for slot, each in sorted(self.slots.items()) if each[2] is not None]
        assume(logging)
        slot = data.draw(st.sampled_from(logging))
        _, npages, dirty = self.slots[slot]
        reported = self.vm.get_dirty_log(slot)
        assert set(reported) == dirty
        first = 64 * data.draw(st.integers(0, (npages - 1) // 64))
        count = data.draw(st.sampled_from([min(64, npages - first), npages - first]))
        self.vm.clear_dirty_log(slot, first, count, reported)
        dirty -= set(range(first, first + count))

    @invariant()
    def a_look_changes_nothing(self):
        for slot, (_, _, dirty) in getattr(self, "slots", {}).items():
            if dirty is not None:
                assert set(self.vm.slot(slot).peek()) == dirty


TestVMMachine = VMMachine.TestCase

ENTRY = np.dtype([("flags", "<u4"), ("slot", "<u4"), ("offset", "<u8")])


class RingMachine(RuleBasedStateMachine):
    """A kernel that pushes what it likes, drains, resets, and slots that come and go."""

    SIZE = 16

    def __init__(self):
        super().__init__()
        self.entries = np.zeros(self.SIZE, ENTRY)
        self.ring, self.log = _kvm.Ring(self.entries, self.SIZE), _kvm.RingLog()
        self.pushed = self.read = self.reset = 0
        self.waiting = []
        self.slots = {}

    @rule(slot=st.integers(0, 5), npages=st.integers(1, 200))
    def add(self, slot, npages):
        if slot in self.slots:
            with pytest.raises(ValueError, match="known already"):
                self.log.add(slot, dl.DirtyBitmap(npages))
        else:
            self.log.add(slot, dl.DirtyBitmap(npages))
            self.slots[slot] = (npages, set())

    @rule(slot=st.integers(0, 5))
    def remove(self, slot):
        if slot in self.slots:
            self.log.remove(slot)
            del self.slots[slot]
        else:
            with pytest.raises(KeyError):
                self.log.remove(slot)

    @precondition(lambda self: self.pushed - self.reset < self.SIZE - 1)
    @rule(slot=st.integers(0, 6), offset=st.one_of(st.integers(0, 220), st.integers(0, (1 << 64) - 1)))
    def push(self, slot, offset):
        self.entries[self.pushed % self.SIZE] = (1, slot, offset)
        self.pushed += 1
        self.waiting.append((slot, offset))

    @rule()
    def drain(self):
        strange = 0
        for slot, offset in self.waiting:
            npages, pages = self.slots.get(slot, (0, None))
            if offset < npages:
                pages.add(offset)
            else:
                strange += 1
        drained, overflow, (foreign, *_) = self.log.drain(self.ring)
        assert (drained, overflow, foreign) == (len(self.waiting), False, strange)
        self.read += drained
        self.waiting = []

    @rule(count=st.integers(0, 16))
    def reset_some(self, count):
        for _ in range(min(count, self.read - self.reset)):
            assert self.entries["flags"][self.reset % self.SIZE] == 2
            self.entries["flags"][self.reset % self.SIZE] = 0
            self.reset += 1

    @rule(slot=st.integers(0, 5))
    def take(self, slot):
        if slot in self.slots:
            assert set(self.log[slot].peek()) == self.slots[slot][1]
            assert set(self.log[slot].harvest()) == self.slots[slot][1]
            self.slots[slot][1].clear()
        else:
            with pytest.raises(KeyError):
                self.log[slot]


TestRingMachine = RingMachine.TestCase


class TrackerMachine(RuleBasedStateMachine):
    """Trackers over parts of one array, opened and closed in any order: each tells what was written to its part."""

    backend = "compare"
    NPAGES = 12
    PAGE = 4096

    @initialize()
    def start(self):
        self.array = dl.zeros(self.NPAGES * self.PAGE, np.uint8)
        self.trackers = []
        self.value = 0

    @precondition(lambda self: len(self.trackers) < 3)
    @rule(first=st.integers(0, NPAGES - 1), count=st.integers(1, NPAGES))
    def track(self, first, count):
        last = min(first + count, self.NPAGES)
        tracker = dl.track(self.array[first * self.PAGE : last * self.PAGE], self.backend)
        self.trackers.append((tracker, first, last, set()))

    @rule(pages=st.sets(st.integers(0, NPAGES - 1), min_size=1), at=st.integers(0, PAGE - 1))
    def write(self, pages, at):
        self.value += 1
        for page in pages:
            # Every byte changes with every write: what compares must see it.
            self.array[page * self.PAGE + at] = (int(self.array[page * self.PAGE + at]) + 1) % 256
            for _, first, last, dirty in self.trackers:
                if first <= page < last:
                    dirty.add(page - first)

    @rule()
    def read(self):
        assert self.array.sum() >= 0

    @rule(data=st.data())
    def harvest(self, data):
        assume(self.trackers)
        tracker, _, _, dirty = data.draw(st.sampled_from(self.trackers))
        assert set(tracker.peek()) == dirty
        assert set(tracker.harvest()) == dirty
        dirty.clear()

    @rule(data=st.data())
    def close(self, data):
        assume(self.trackers)
        place = data.draw(st.integers(0, len(self.trackers) - 1))
        tracker, *_ = self.trackers.pop(place)
        tracker.close()
        with pytest.raises(ValueError, match="closed"):
            tracker.harvest()

    def teardown(self):
        for tracker, _, _, dirty in getattr(self, "trackers", ()):
            assert set(tracker.harvest()) == dirty
            tracker.close()


@pytest.mark.parametrize("backend", ["userfaultfd", "mprotect", "compare"])
def test_trackers_in_any_order(backend):
    from hypothesis.stateful import run_state_machine_as_test

    try:
        dl.track(dl.zeros(4096, np.uint8), backend).close()
    except BackendUnavailable as missing:
        pytest.skip(str(missing))
    machine = type(f"TrackerMachine_{backend}", (TrackerMachine,), {"backend": backend})
    run_state_machine_as_test(machine, settings=settings(max_examples=40, stateful_step_count=30))
