"""A harvest of rings makes running guests leave, so that what hardware keeps to itself is in it."""

import signal
import subprocess
import threading
from pathlib import Path

import pytest

import dirtylog as dl
from dirtylog.sources import kvm
from dirtylog.sources.kvm import _kvm

from .guests import needs_kvm
from .test_vcpu import FLAG, SPIN, boot, run_in_thread, wait_for_guest


@pytest.fixture(scope="module")
def hidden_entries(c_compiler, tmp_path_factory):
    """A kernel, played by a program, whose vCPUs hold entries back until they leave the guest."""
    program = tmp_path_factory.mktemp("hidden") / "hidden_entries"
    include = [f"-I{Path(dl.__file__).parent}", f"-I{dl.get_include()}"]
    source = Path(__file__).with_name("hidden_entries.c")
    flags = ["-O1", "-g", "-std=gnu11", "-Wall", "-Wextra", "-Werror", "-pthread"]
    subprocess.run([c_compiler, *flags, *include, source, "-o", program], check=True)
    return program


def test_entries_that_hardware_holds_back_are_in_the_harvest(hidden_entries):
    done = subprocess.run([hidden_entries], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "0 missed\n")


def test_without_a_kick_they_are_missed(hidden_entries):
    done = subprocess.run([hidden_entries, "no-kick"], capture_output=True, text=True, check=False)
    assert done.returncode == 1


@pytest.fixture
def spinning(vm):
    """A guest with a ring that runs in a thread until it is kicked: (vCPU, thread, what its run returned)."""
    vm.enable_dirty_ring(1024)
    cpu, memory = boot(vm, SPIN)
    thread, exits = run_in_thread(cpu)
    wait_for_guest(memory)
    yield cpu, thread, exits
    if not cpu.closed:
        cpu.kick()
    thread.join(60)
    assert exits == [kvm.Exit("INTR")]


@needs_kvm
@pytest.mark.parametrize("how", ["harvest_rings", "harvest", "peek"])
def test_a_running_guest_leaves_once_and_its_run_goes_on(vm, spinning, how):
    cpu, _, exits = spinning
    ask = vm.harvest_rings if how == "harvest_rings" else getattr(vm.slot(0), how)
    ask()
    assert cpu._handle.exits == 1
    # Whether the guest is back by the next harvest is the scheduler's business; it comes back.
    assert any(ask() is not None and cpu._handle.exits >= 5 for _ in range(100_000))
    assert exits == []


@needs_kvm
def test_a_vcpu_that_does_not_run_is_left_alone(vm):
    vm.enable_dirty_ring(1024)
    cpu, memory = boot(vm, b"\xc6\x06\x00\x08\x01\xf4")  # mov byte [FLAG], 1; hlt
    vm.harvest_rings()
    assert cpu.run().reason == "HLT"
    assert memory[FLAG]
    assert vm.harvest_rings()[0].indices().tolist() == [0]
    assert cpu._handle.exits == 1


@needs_kvm
def test_a_kick_that_meets_a_harvest_ends_the_run(vm, spinning):
    """The harvest asks for an exit and a kick for an end, of the same run, whichever of them is first."""
    cpu, thread, exits = spinning
    kicker = threading.Thread(target=cpu.kick)
    kicker.start()
    while thread.is_alive():
        vm.harvest_rings()
    kicker.join(60)
    assert exits == [kvm.Exit("INTR")]


@needs_kvm
def test_a_kick_before_the_run_is_kept_over_a_harvest(vm):
    vm.enable_dirty_ring(1024)
    cpu, _ = boot(vm, SPIN)
    cpu.kick()
    vm.harvest_rings()
    assert cpu.run().reason == "INTR"


@needs_kvm
def test_a_closed_vcpu_is_not_asked(vm, spinning):
    cpu, thread, _ = spinning
    closer = threading.Thread(target=cpu.close)
    closer.start()
    while thread.is_alive():
        vm.harvest_rings()
    closer.join(60)
    assert vm.harvest_rings()[0].exact


@needs_kvm
@pytest.mark.thread_unsafe(reason="signal handlers belong to the process")
def test_a_signal_handler_may_harvest_in_the_thread_that_runs_the_guest(vm):
    vm.enable_dirty_ring(1024)
    cpu, memory = boot(vm, SPIN)
    found = []
    before = signal.signal(signal.SIGUSR1, lambda *_: found.append(vm.harvest_rings()[0].indices().tolist()))
    try:
        sender = threading.Thread(
            target=lambda: (wait_for_guest(memory), signal.pthread_kill(threading.main_thread().ident, signal.SIGUSR1))
        )
        sender.start()
        assert cpu.run().reason == "INTR"
        sender.join(60)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert found == [[0]]


class AlarmError(Exception):
    """Raised by a test's signal handler."""


@needs_kvm
@pytest.mark.thread_unsafe(reason="signal handlers belong to the process")
def test_a_handler_that_raises_ends_a_run_that_harvests_interrupt(vm):
    vm.enable_dirty_ring(1024)
    cpu, memory = boot(vm, SPIN)

    def handler(*_):
        raise AlarmError

    harvests, ended = [], threading.Event()

    def harvest():
        wait_for_guest(memory)
        vm.harvest_rings()
        signal.pthread_kill(threading.main_thread().ident, signal.SIGUSR1)
        while not ended.is_set():
            harvests.append(vm.harvest_rings())

    before = signal.signal(signal.SIGUSR1, handler)
    harvester = threading.Thread(target=harvest)
    harvester.start()
    try:
        with pytest.raises(AlarmError):
            cpu.run()
    finally:
        ended.set()
        harvester.join(60)
        signal.signal(signal.SIGUSR1, before)
    assert all(harvest[0].exact for harvest in harvests)


def test_no_vcpus_are_asked_at_once():
    _kvm.leave_guest([])
