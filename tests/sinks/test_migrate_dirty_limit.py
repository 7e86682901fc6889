"""vCPUs that are held to so many pages per second, and which of them a migration holds."""

import threading

import numpy as np
import pytest

from dirtylog import VM
from dirtylog._bits.dirty_limit import DirtyLimit as OneLimit
from dirtylog.sinks.migrate import DirtyLimit
from dirtylog.sources import kvm


class Clock:
    """Time that passes when somebody sleeps."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


@pytest.fixture
def clock():
    return Clock()


def machine(clock, vcpus=3, **options):
    vm = VM(vcpus=vcpus, **options)
    vm.set_memory_region(0, 0, 4096)
    for vcpu in vm.vcpus:
        vcpu._limit = OneLimit(clock, clock.sleep)
    return vm


@pytest.mark.parametrize("rings", [0, 4096])
def test_a_vcpu_dirties_no_more_pages_in_a_second_than_it_may(clock, rings):
    vm = machine(clock, dirty_ring=rings)
    vcpu = vm.vcpus[1]
    vcpu.dirty_limit = 100
    for number in range(20):
        vcpu.touch(np.arange(50) + 50 * number)
    assert vcpu.dirtied == 1000
    # It stands still before the next store for what the last one did.
    assert 950 <= clock.now * 100 <= 1000
    vm.vcpus[0].touch(range(2000, 3000))
    vm.vcpus[0].write(0, b"x")
    # The others do not stand still, and pages that are dirty already cost nothing.
    before = clock.now
    for _ in range(9):
        vm.vcpus[0].touch(range(2000, 3000))
    assert clock.now == before
    vcpu.dirty_limit = None
    vcpu.touch(range(3000, 4000))
    vcpu.touch(range(3000, 4000))
    assert clock.now == before


def test_a_rest_is_saved_up_for_a_moment_only(clock):
    limit = OneLimit(clock, clock.sleep)
    limit.hold(1000, 0)
    clock.now = 100
    limit.wait(0)
    limit.wait(100)
    assert clock.now == 100
    limit.wait(200)
    assert clock.now == pytest.approx(100.1)


def test_what_was_dirtied_before_there_was_a_limit_costs_nothing(clock):
    vcpu = machine(clock).vcpus[0]
    vcpu.touch(range(4096))
    vcpu.dirty_limit = 100
    vcpu.touch([0])
    assert clock.now == 0


def test_another_limit_ends_no_pause(clock):
    limit = OneLimit(clock, lambda seconds: (clock.sleep(seconds), limit.hold(1000, 1000)))
    limit.hold(1, 0)
    limit.wait(1000)
    assert 0.9 <= clock.now <= 1.1


def test_a_pause_ends_when_the_limit_is_lifted_or_somebody_kicks(clock):
    limit = OneLimit(clock, lambda seconds: (clock.sleep(seconds), limit.hold(None, 1000)))
    limit.hold(1, 0)
    limit.wait(1000)
    assert clock.now < 1
    limit = OneLimit(clock, clock.sleep)
    limit.hold(1, 0)
    limit.wait(1000, kicked=lambda: True)
    assert clock.now < 1
    for wrong in (0, -1, float("nan")):
        with pytest.raises(ValueError, match="must be a positive number of pages per second"):
            limit.hold(wrong, 0)


class Counted:
    """A vCPU that says what it has dirtied."""

    dirty_limit = None

    def __init__(self):
        self.dirtied = 0


def test_what_has_to_go_is_taken_from_those_that_write_most(clock):
    vcpus = [Counted() for _ in range(4)]
    throttle = DirtyLimit(vcpus, clock=clock)

    def second(*dirtied):
        clock.now += 1
        for vcpu, pages in zip(vcpus, dirtied, strict=True):
            vcpu.dirtied += pages
        return [vcpu.dirty_limit for vcpu in vcpus]

    second(1000, 200, 10, 0)
    throttle(0.25)
    assert second(700, 200, 10, 0) == [697.5, None, None, None]
    # Of what they want, not of what they are left.
    throttle(0.9)
    assert second(55, 55, 10, 0) == [pytest.approx(55.5), pytest.approx(55.5), None, None]
    throttle(0.99)
    limits = [vcpu.dirty_limit for vcpu in vcpus]
    assert limits[:2] == [pytest.approx(12.1 / 3)] * 2
    assert limits[2:] == [pytest.approx(12.1 / 3), None]
    # Without a moment between there is nothing to measure.
    throttle(0.25)
    assert [vcpu.dirty_limit for vcpu in vcpus] == [697.5, None, None, None]
    throttle(0)
    assert [vcpu.dirty_limit for vcpu in vcpus] == [None] * 4
    with pytest.raises(ValueError, match="fraction is 1; it must be 0 or more, and less than 1"):
        throttle(1)
    DirtyLimit([])(0.5)


def test_a_guest_of_kvm_is_held_by_its_ring_and_kicked_out_of_its_pause():
    if not (probed := kvm.probe()).available:
        pytest.skip(probed.reason)
    with kvm.Kvm() as system:
        with system.create_vm() as vm, pytest.raises(ValueError, match="vCPU 0 has no dirty ring"):
            vm.create_vcpu().dirty_limit = 5
        with system.create_vm() as vm:
            vm.enable_dirty_ring(4096)
            vm.set_memory_region(0, 0, 512)
            vm.memory(0)[:13] = np.frombuffer(
                b"\xc6\x07\x01"  # mov byte [edi], 1
                b"\x81\xc7\x00\x10\x00\x00"  # add edi, 4096
                b"\xe2\xf5"  # loop to the begin
                b"\xf4\xf4",  # hlt
                np.uint8,
            )
            vcpu = vm.create_vcpu()
            clock = Clock()
            vcpu._limit = OneLimit(clock, clock.sleep)
            vcpu.dirty_limit = 100
            for number in range(3):
                vcpu.enter_flat32(0)
                vcpu.set_regs(kvm.Regs(rip=0, rdi=4096, rcx=60))
                assert vcpu.run().reason == "HLT"
                assert clock.now == pytest.approx(vcpu.dirtied / 100, abs=0.01)
                vm.harvest_rings()
                assert vcpu.dirtied >= 60 * (number + 1)
            asleep = threading.Event()

            def sleep(seconds):
                # Nobody wakes it but a kick.
                asleep.set()

            vcpu._limit._sleep = sleep
            reasons = []
            thread = threading.Thread(target=lambda: reasons.append(vcpu.run().reason))
            thread.start()
            assert asleep.wait(30)
            vcpu.kick()
            thread.join()
            assert reasons == ["INTR"]
            # Nor one that is closed meanwhile.
            asleep.clear()
            thread = threading.Thread(target=lambda: reasons.append(vcpu.run().reason))
            thread.start()
            assert asleep.wait(30)
            vcpu.close()
            thread.join()
            assert reasons == ["INTR", "INTR"]
            with pytest.raises(ValueError, match="closed"):
                vcpu.run()
