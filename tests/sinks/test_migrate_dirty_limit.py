"""vCPUs that are held to so many pages per second, and which of them a migration holds."""

import contextlib
import socket
import threading

import numpy as np
import pytest

from dirtylog import VM, DirtyLog
from dirtylog._bits.dirty_limit import DirtyLimit as OneLimit
from dirtylog.sinks.migrate import Control, DirtyLimit, NotConverging, Policy, receive, send
from dirtylog.sources import kvm

from .guest import PAGE, Running


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


# ---- whole migrations ------------------------------------------------------------------------------------------------


def migrated(memory, observer, **options):
    """Migrate to a thread; return the result or the error, and what arrived."""
    here, there = socket.socketpair()
    arrived = []

    def receives():
        with contextlib.suppress(Exception):
            arrived.append(receive(there))

    with here, there:
        thread = threading.Thread(target=receives)
        thread.start()
        try:
            # What changed in a page would go alone, and fast.
            outcome = send(here, memory, observer, delta_cache=0, **options)
        except NotConverging as error:
            outcome = error
        thread.join()
    return outcome, arrived


class Held(DirtyLimit):
    """Notes after each call which vCPUs are limited."""

    def __init__(self, vcpus, **options):
        super().__init__(vcpus, **options)
        self.vcpus, self.held = vcpus, []

    def __call__(self, fraction):
        super().__call__(fraction)
        self.held.append([vcpu.dirty_limit is not None for vcpu in self.vcpus])


class Time(Clock):
    """In which a line needs time for its bytes, and vCPUs write meanwhile."""

    def __init__(self, vcpus, wanted):
        super().__init__()
        # Each in a time of its own, which goes on while it stands still.
        self.guests = [(vcpu, Clock(), each) for vcpu, each in zip(vcpus, wanted, strict=True)]
        for vcpu, clock, _ in self.guests:
            vcpu._limit = OneLimit(clock, clock.sleep)

    def sleep(self, seconds):
        super().sleep(seconds)
        for vcpu, clock, (first, count, rate) in self.guests:
            while clock.now < self.now:
                vcpu.touch([first + int(clock.now * rate) % count])
                clock.now += 1 / rate


@pytest.mark.parametrize("rings", [0, 4096])
@pytest.mark.parametrize("limited", [False, True])
def test_a_machine_whose_loud_vcpu_is_held_converges_and_its_quiet_one_is_left_alone(limited, rings):
    vm = VM(vcpus=2, dirty_ring=rings)
    vm.set_memory_region(0, 0, 1024)
    memory = vm.memory(0)
    memory[:] = np.random.default_rng(0).integers(1, 256, memory.nbytes, np.uint8)
    # Pages, and touches per second: all of one's pages in less time than they need on the line, and a few now and then.
    time = Time(vm.vcpus, [(0, 768, 2000.0), (900, 64, 20.0)])
    log = DirtyLog()
    log.attach(vm.slot(0))
    throttle = Held(vm.vcpus, clock=time)
    outcome, arrived = migrated(
        memory,
        log.observer("migration"),
        throttle=throttle if limited else None,
        policy=Policy(downtime=0.1),
        pause=time.guests.clear,
        control=Control(4 << 20, clock=time, sleep=time.sleep),
        clock=time,
    )
    if not limited:
        assert isinstance(outcome, NotConverging)
        return
    assert (arrived[0] == memory).all()
    assert len(outcome.rounds) < 30
    # More and more, of one alone; and nobody in the end.
    assert throttle.held == [[True, False]] * (len(throttle.held) - 1) + [[False, False]]
    assert len(throttle.held) > 2


def writes(first, npages, spin):
    """Machine code that writes 1, 2, 3, ... into so many pages round and round, and spins before each write.

    The ring's soft limit allows for a number of instructions in one stay: few of them may write.
    """
    begin, end = ((page * PAGE).to_bytes(4, "little") for page in (first, first + npages))
    return (
        b"\xb8" + spin.to_bytes(4, "little") + b"\x48\x75\xfd"  # mov eax, spin; dec eax; jnz back
        b"\x89\x0e"  # mov [esi], ecx
        b"\x81\xc6\x00\x10\x00\x00"  # add esi, 4096
        b"\x81\xfe" + end + b"\x72\xe8"  # cmp esi, end; jb to the begin
        b"\xbe" + begin + b"\x41\xeb\xe0"  # mov esi, first; inc ecx; jmp to the begin
    )


class Ringing(Running):
    """A guest whose ring may be full."""

    def __init__(self, vm, vcpu):
        self.vm = vm
        super().__init__(vcpu)

    def run(self):
        while not self.stopping and self.reason in ("INTR", "DIRTY_RING_FULL"):
            if self.reason == "DIRTY_RING_FULL":
                # Makes room, and takes nothing from the observer.
                self.vm.slot(0).peek()
            self.reason = self.vcpu.run().reason


class Busy:
    """An observer that collects no sooner than a vCPU has written all of its pages again, unless that one is held."""

    def __init__(self, observer, guest, counter):
        self.observer, self.guest, self.counter = observer, guest, counter
        self.npages, self.page_size, self.put_back = observer.npages, observer.page_size, observer.put_back

    def collect(self):
        guest = self.guest
        for _ in range(2):
            before = int(self.counter[0])
            while guest.vcpu.dirty_limit is None and guest.is_alive() and int(self.counter[0]) == before:
                pass
        return self.observer.collect()


def test_a_guest_of_kvm_whose_loud_vcpu_is_held_by_its_ring_converges():
    if not (probed := kvm.probe()).available:
        pytest.skip(probed.reason)
    npages, loud = 512, 256
    with kvm.Kvm() as system, system.create_vm() as vm, contextlib.ExitStack() as stack:
        vm.enable_dirty_ring(4096)
        vm.set_memory_region(0, 0, npages)
        memory = vm.memory(0)
        memory[:] = np.random.default_rng(0).integers(1, 256, memory.nbytes, np.uint8)
        guests = []
        # One writes to many pages and often, the other now and then to two.
        for at, program in ((0, writes(2, loud, 50)), (1024, writes(400, 2, 50_000))):
            memory[at : at + len(program)] = np.frombuffer(program, np.uint8)
            vcpu = vm.create_vcpu()
            vcpu.enter_flat32(at)
            vcpu.set_regs(kvm.Regs(rip=at, rsi=(400 if at else 2) * PAGE, rcx=1))
            guests.append(Ringing(vm, vcpu))
            stack.callback(guests[-1].stop)
        log = DirtyLog()
        log.attach(vm.slot(0))
        throttle = Held([guest.vcpu for guest in guests])
        observer = Busy(log.observer("migration"), guests[0], memory.view("<u4")[2 * PAGE // 4 :])
        # All of it takes a quarter of a second; a tenth of that may be left, less than what is written meanwhile.
        options = {"control": Control(8 << 20), "pause": stack.close}
        policy = {"downtime": 0.025, "throttle_after": 1, "throttle_first": 0.5, "throttle_step": 0.2}
        outcome, _ = migrated(memory, observer, policy=Policy(**policy, max_rounds=3), **options)
        assert isinstance(outcome, NotConverging)
        options["control"] = Control(8 << 20)
        outcome, arrived = migrated(memory, observer, policy=Policy(**policy), throttle=throttle, **options)
        assert not isinstance(outcome, NotConverging), outcome.rounds
        assert (arrived[0] == memory).all()
        # The loud one was held, and the quiet one never.
        assert throttle.held == [[True, False]] * (len(throttle.held) - 1) + [[False, False]]
        assert len(throttle.held) > 1
