"""The drain of a dirty ring over plain memory: every state a kernel can leave it in, and some it should not."""

import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dirtylog import DirtyBitmap
from dirtylog.sources.kvm import _kvm

DIRTY, RESET = 1, 2
ENTRY = np.dtype([("flags", "<u4"), ("slot", "<u4"), ("offset", "<u8")])


class FakeRing:
    """Plays the kernel: pushes entries, takes back those that were marked."""

    def __init__(self, size):
        self.entries = np.zeros(size, ENTRY)
        self.size = size
        self.dirty = self.reset_index = 0
        self.ring = _kvm.Ring(self.entries, size)

    def push(self, slot, offset):
        entry = self.dirty % self.size
        self.entries["slot"][entry] = slot
        self.entries["offset"][entry] = offset
        self.entries["flags"][entry] = DIRTY
        self.dirty += 1

    def reset(self):
        before = self.reset_index
        while self.entries["flags"][self.reset_index % self.size] & RESET:
            self.entries["flags"][self.reset_index % self.size] = 0
            self.reset_index += 1
        return self.reset_index - before


def log_of(slots):
    log = _kvm.RingLog()
    for slot, npages in slots.items():
        log.add(slot, DirtyBitmap(npages))
    return log


NOTHING_FOREIGN = (0, 0, 0)


def test_drained_entries_are_the_slots_pages_and_are_marked_for_reset():
    fake = FakeRing(16)
    log = log_of({0: 100, 7: 1000})
    for slot, offset in [(0, 0), (7, 999), (0, 99), (7, 64), (7, 64)]:
        fake.push(slot, offset)
    assert log.drain(fake.ring) == (5, False, NOTHING_FOREIGN)
    assert log[0].harvest().indices().tolist() == [0, 99]
    assert log[7].harvest().indices().tolist() == [64, 999]
    assert fake.entries["flags"].tolist() == [RESET] * 5 + [0] * 11


def test_an_empty_ring_gives_nothing():
    fake = FakeRing(16)
    log = log_of({0: 100})
    assert log.drain(fake.ring) == (0, False, NOTHING_FOREIGN)
    assert log[0].harvest().count == 0


def test_a_drain_goes_on_where_the_last_one_stopped_and_wraps_around():
    fake = FakeRing(8)
    log = log_of({0: 1000})
    for first in range(0, 50, 5):
        for offset in range(first, first + 5):
            fake.push(0, offset)
        assert log.drain(fake.ring) == (5, False, NOTHING_FOREIGN)
        assert fake.reset() == 5
    assert log[0].harvest().indices().tolist() == list(range(50))


def test_a_drain_without_a_reset_reads_no_entry_twice():
    fake = FakeRing(8)
    log = log_of({0: 100})
    fake.push(0, 1)
    log.drain(fake.ring)
    fake.push(0, 2)
    assert log.drain(fake.ring) == (1, False, NOTHING_FOREIGN)


def test_what_is_taken_is_gone_and_what_is_copied_stays():
    fake = FakeRing(8)
    log = log_of({3: 65})
    fake.push(3, 64)
    log.drain(fake.ring)
    assert log[3].peek().indices().tolist() == [64]
    assert log[3].harvest().indices().tolist() == [64]
    assert log[3].harvest().count == 0
    assert log[3].peek().count == 0


def test_pages_handed_out_do_not_change_when_the_ring_is_drained_again():
    fake = FakeRing(8)
    log = log_of({0: 100})
    fake.push(0, 1)
    log.drain(fake.ring)
    copied, taken = log[0].peek(), log[0].harvest()
    fake.push(0, 2)
    log.drain(fake.ring)
    assert copied.indices().tolist() == taken.indices().tolist() == [1]


def test_a_head_that_is_not_contiguous_is_an_overflow():
    fake = FakeRing(16)
    log = log_of({0: 100})
    fake.entries["offset"][5] = 42
    fake.entries["flags"][5] = DIRTY
    assert log.drain(fake.ring) == (0, True, NOTHING_FOREIGN)


def test_a_gap_behind_drained_entries_is_an_overflow_as_well():
    fake = FakeRing(16)
    log = log_of({0: 100})
    fake.push(0, 1)
    fake.entries["flags"][15] = DIRTY
    drained, overflow, _ = log.drain(fake.ring)
    assert (drained, overflow) == (1, True)
    assert log[0].harvest().indices().tolist() == [1]


def test_a_ring_without_a_free_entry_is_an_overflow():
    fake = FakeRing(8)
    log = log_of({0: 100})
    for offset in range(8):
        fake.push(0, offset)
    assert log.drain(fake.ring) == (8, True, NOTHING_FOREIGN)


def test_one_free_entry_is_no_overflow():
    fake = FakeRing(8)
    log = log_of({0: 100})
    for offset in range(7):
        fake.push(0, offset)
    assert log.drain(fake.ring) == (7, False, NOTHING_FOREIGN)


def test_a_full_ring_with_nothing_in_it_is_an_overflow_reported_once():
    fake = FakeRing(8)
    log = log_of({0: 100})
    fake.ring.mark_full()
    assert log.drain(fake.ring) == (0, True, NOTHING_FOREIGN)
    assert log.drain(fake.ring) == (0, False, NOTHING_FOREIGN)


def test_a_full_ring_that_had_entries_is_no_overflow():
    fake = FakeRing(128)
    log = log_of({0: 100})
    for offset in range(64):
        fake.push(0, offset)
    fake.ring.mark_full()
    assert log.drain(fake.ring) == (64, False, NOTHING_FOREIGN)
    assert log.drain(fake.ring) == (0, False, NOTHING_FOREIGN)


@pytest.mark.parametrize(
    ("slot", "offset"), [(1, 0), (0, 100), (0, 2**64 - 1), (2**32 - 1, 0), ((1 << 16) | 5, 100), (5, 0)]
)
def test_an_entry_for_no_page_of_ours_is_reported_and_writes_nowhere(slot, offset):
    fake = FakeRing(8)
    log = log_of({0: 100, (1 << 16) | 5: 100})
    fake.push(0, 1)
    fake.push(slot, offset)
    fake.push(0, 2)
    assert log.drain(fake.ring) == (3, False, (1, slot, offset))
    assert log[0].harvest().indices().tolist() == [1, 2]
    assert log[(1 << 16) | 5].harvest().count == 0


def test_a_slot_of_a_second_address_space_is_a_slot_of_its_own():
    fake = FakeRing(8)
    log = log_of({5: 100, (1 << 16) | 5: 100})
    fake.push((1 << 16) | 5, 7)
    fake.push(5, 8)
    log.drain(fake.ring)
    assert log[5].harvest().indices().tolist() == [8]
    assert log[(1 << 16) | 5].harvest().indices().tolist() == [7]


def test_a_removed_slot_is_unknown():
    log = log_of({1: 10, 2: 20, 3: 30})
    log.remove(2)
    fake = FakeRing(8)
    fake.push(1, 9)
    fake.push(3, 29)
    fake.push(2, 0)
    assert log.drain(fake.ring) == (3, False, (1, 2, 0))
    assert log[1].harvest().indices().tolist() == [9]
    assert log[3].harvest().indices().tolist() == [29]
    with pytest.raises(KeyError):
        log[2].harvest()
    with pytest.raises(KeyError):
        log.remove(2)


@pytest.mark.parametrize("entries", [0, 3, 12, 1000])
def test_a_ring_size_that_is_no_power_of_two_is_refused(entries):
    with pytest.raises(ValueError, match="power of two"):
        _kvm.Ring(np.zeros(1024, ENTRY), entries)


def test_memory_that_is_too_small_misaligned_or_read_only_is_refused():
    with pytest.raises(ValueError, match="256 bytes"):
        _kvm.Ring(np.zeros(15, ENTRY), 16)
    buffer = np.zeros(1024, np.uint8)
    start = -buffer.ctypes.data % 16
    with pytest.raises(ValueError, match="16-byte boundary"):
        _kvm.Ring(buffer[start + 8 :], 16)
    with pytest.raises(BufferError):
        _kvm.Ring(bytes(1024), 16)


def test_a_slot_is_added_once():
    log = log_of({1: 10})
    assert 1 in log
    assert 2 not in log
    with pytest.raises(ValueError, match="slot 1 is known already"):
        log.add(1, DirtyBitmap(20))


def test_a_closed_ring_cannot_be_drained():
    fake = FakeRing(8)
    fake.ring.close()
    fake.ring.close()
    with pytest.raises(ValueError, match="ring is closed"):
        log_of({0: 1}).drain(fake.ring)


operations = st.lists(
    st.one_of(
        st.tuples(st.just("push"), st.sampled_from([0, 2, 9]), st.integers(0, 299)),
        st.just(("drain",)),
        st.just(("reset",)),
        st.tuples(st.just("take"), st.sampled_from([0, 2, 9])),
    ),
    max_size=80,
)


@given(operations)
def test_every_pushed_page_is_handed_out_exactly_as_often_as_the_oracle_says(steps):
    sizes = {0: 64, 2: 65, 9: 300}
    fake = FakeRing(32)
    log = log_of(sizes)
    in_ring, drained = [], {slot: set() for slot in sizes}
    for step in steps:
        if step[0] == "push":
            slot, offset = step[1], step[2] % sizes[step[1]]
            # The kernel stops the vCPU before the ring has no free entry.
            if fake.dirty - fake.reset_index < fake.size - 1:
                fake.push(slot, offset)
                in_ring.append((slot, offset))
        elif step[0] == "drain":
            assert log.drain(fake.ring) == (len(in_ring), False, NOTHING_FOREIGN)
            for slot, offset in in_ring:
                drained[slot].add(offset)
            in_ring = []
        elif step[0] == "reset":
            fake.reset()
        else:
            assert set(log[step[1]].harvest()) == drained[step[1]]
            drained[step[1]] = set()


def test_nothing_is_lost_while_a_vcpu_fills_the_ring_during_the_drains():
    """The kernel's side runs in another thread; the drains hold no GIL, so the two overlap."""
    total, fake = 20_000, FakeRing(256)
    log = log_of({0: total})
    seen, lost = set(), []
    resetting = threading.Lock()

    def vcpu():
        pushed = 0
        while pushed < total:
            with resetting:
                room = fake.size - 64 - (fake.dirty - fake.reset_index)
            for _ in range(min(room, total - pushed)):
                fake.push(0, pushed)
                pushed += 1

    producer = threading.Thread(target=vcpu)
    producer.start()
    try:
        while producer.is_alive() or fake.entries["flags"].any():
            _, overflow, foreign = log.drain(fake.ring)
            if overflow or foreign != NOTHING_FOREIGN:
                lost.append((overflow, foreign))
                break
            with resetting:
                fake.reset()
            seen.update(log[0].harvest().indices().tolist())
    finally:
        producer.join(60)
    assert not lost
    assert len(seen) == total
