"""Running a real vCPU: registers, exits, kicks and signals."""

import dataclasses
import errno
import mmap
import os
import signal
import threading
import warnings

import pytest

from dirtylog.sources import kvm

from ... import warm
from .guests import PAGE, needs_kvm

pytestmark = needs_kvm

# A byte that the guest sets when it runs, and the address of its memory.
FLAG = 0x800


def boot(vm, program, mode="real"):
    """Put a program at address 0 of 16 pages of memory and point a new vCPU at it."""
    memory = mmap.mmap(-1, 16 * PAGE)
    memory[: len(program)] = program
    vm.set_memory_region(0, 0, 16, memory=memory)
    cpu = vm.create_vcpu()
    if mode == "real":
        cpu.enter_real_mode(0)
    else:
        cpu.enter_flat32(0)
    return cpu, memory


# mov byte [FLAG], 1; jmp to itself
SPIN = b"\xc6\x06\x00\x08\x01\xeb\xfe"


def wait_for_guest(memory):
    while not memory[FLAG]:
        os.sched_yield()


def run_in_thread(cpu):
    exits = []

    def body():
        try:
            exits.append(cpu.run())
        except Exception as error:
            exits.append(error)

    thread = threading.Thread(target=body)
    thread.start()
    return thread, exits


def test_general_registers_are_what_was_set(vm):
    cpu = vm.create_vcpu()
    names = [field.name for field in dataclasses.fields(kvm.Regs) if field.name != "rflags"]
    regs = kvm.Regs(**{name: 0x1111_2222_3333_0000 + at for at, name in enumerate(names)})
    cpu.set_regs(regs)
    assert cpu.get_regs() == regs


def test_segments_and_control_registers_are_what_was_set(vm):
    cpu = vm.create_vcpu()
    sregs = cpu.get_sregs()
    sregs.ds = kvm.Segment(base=0x1230, limit=0x4567, selector=0x123, type=3)
    sregs.gdt = kvm.Dtable(base=0x7000, limit=0x27)
    sregs.cr2 = 0xDEAD_F000
    cpu.set_sregs(sregs)
    assert cpu.get_sregs() == sregs


def test_a_register_outside_its_width_is_refused(vm):
    cpu = vm.create_vcpu()
    before = cpu.get_regs()
    with pytest.raises(ValueError, match="out of its range"):
        cpu.set_regs(kvm.Regs(rax=1 << 64))
    sregs = cpu.get_sregs()
    sregs.cs.selector = 1 << 16
    with pytest.raises(ValueError, match="selector=65536"):
        cpu.set_sregs(sregs)
    sregs = cpu.get_sregs()
    sregs.cr0 = -1
    with pytest.raises(ValueError, match="control register"):
        cpu.set_sregs(sregs)
    assert cpu.get_regs() == before


@pytest.mark.parametrize("ip", [-1, 0x10000])
def test_real_mode_starts_below_64_kib(vm, ip):
    with pytest.raises(ValueError, match="real mode"):
        vm.create_vcpu().enter_real_mode(ip)


@pytest.mark.parametrize("ip", [-1, 1 << 32])
def test_flat_mode_starts_below_4_gib(vm, ip):
    with pytest.raises(ValueError, match="flat 32-bit"):
        vm.create_vcpu().enter_flat32(ip)


def test_a_guest_in_real_mode_halts(vm):
    cpu, _ = boot(vm, b"\xb8\x34\x12\xf4")  # mov ax, 0x1234; hlt
    assert cpu.run() == kvm.Exit("HLT")
    assert cpu.get_regs().rax & 0xFFFF == 0x1234


def test_a_guest_in_flat_mode_computes_with_32_bits(vm):
    cpu, _ = boot(vm, b"\xb8\x78\x56\x34\x12\x05\x01\x00\x00\x00\xf4", "flat")  # mov eax, 0x12345678; add eax, 1; hlt
    assert cpu.run().reason == "HLT"
    assert cpu.get_regs().rax == 0x12345679


def test_a_vcpu_goes_back_to_real_mode(vm):
    cpu, _ = boot(vm, b"\xb8\x34\x12\xf4", "flat")  # in real mode: mov ax, 0x1234; hlt
    assert cpu.get_sregs().cr0 & 1
    cpu.enter_real_mode(0)
    assert not cpu.get_sregs().cr0 & 1
    assert cpu.run().reason == "HLT"
    assert cpu.get_regs().rip == 4


def test_a_port_write_says_port_size_and_data(vm):
    cpu, _ = boot(vm, b"\xb8\x34\x12\xba\xf8\x03\xef\xf4")  # mov ax, 0x1234; mov dx, 0x3f8; out dx, ax; hlt
    assert cpu.run() == kvm.Exit("IO", port=0x3F8, size=2, count=1, is_write=True, data=b"\x34\x12")
    assert cpu.run().reason == "HLT"


def test_a_port_read_is_answered(vm):
    cpu, _ = boot(vm, b"\xe4\x60\xf4")  # in al, 0x60; hlt
    assert cpu.run() == kvm.Exit("IO", port=0x60, size=1, count=1)
    with pytest.raises(ValueError, match="waits for 1 bytes, not 2"):
        cpu.answer(b"ab")
    cpu.answer(b"\x5a")
    assert cpu.run().reason == "HLT"
    assert cpu.get_regs().rax & 0xFF == 0x5A
    with pytest.raises(ValueError, match="waits for no data"):
        cpu.answer(b"a")


def test_an_access_without_memory_behind_it_is_mmio(vm):
    # mov dword [0x100000], 0x11223344; mov eax, [0x100004]; hlt
    program = b"\xc7\x05\x00\x00\x10\x00\x44\x33\x22\x11\xa1\x04\x00\x10\x00\xf4"
    cpu, _ = boot(vm, program, "flat")
    left = cpu.run()
    assert left == kvm.Exit("MMIO", address=0x100000, size=4, count=1, is_write=True, data=b"\x44\x33\x22\x11")
    assert cpu.run() == kvm.Exit("MMIO", address=0x100004, size=4, count=1)
    cpu.answer(b"\x0d\xf0\xad\x8b")
    assert cpu.run().reason == "HLT"
    assert cpu.get_regs().rax == 0x8BADF00D


def test_a_triple_fault_is_a_shutdown(vm):
    cpu, _ = boot(vm, b"\x0f\x0b", "flat")  # ud2, without an interrupt table
    assert cpu.run().reason == "SHUTDOWN"


def test_a_kick_makes_a_running_guest_return_and_it_can_go_on(vm):
    cpu, memory = boot(vm, SPIN)
    for _ in range(3):
        memory[FLAG] = 0
        cpu.enter_real_mode(0)
        thread, exits = run_in_thread(cpu)
        wait_for_guest(memory)
        cpu.kick()
        thread.join(60)
        assert exits == [kvm.Exit("INTR")]
        assert cpu.get_regs().rip == 5


def test_a_kick_before_the_run_ends_the_next_run_once(vm):
    cpu, _ = boot(vm, b"\xf4")
    cpu.kick()
    cpu.kick()
    assert cpu.run().reason == "INTR"
    assert cpu.run().reason == "HLT"


def test_no_kick_is_lost_whenever_it_comes(vm):
    """Kick and run start together: whichever is first, the run ends."""
    cpu, _ = boot(vm, SPIN)
    for _ in range(300):
        thread, exits = run_in_thread(cpu)
        cpu.kick()
        thread.join(60)
        assert [left.reason for left in exits] == ["INTR"]


def test_a_kick_stays_away_from_pythons_signal_handling(vm):
    cpu, memory = boot(vm, SPIN)
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    os.set_blocking(writing, False)
    before = signal.set_wakeup_fd(writing)
    try:
        thread, exits = run_in_thread(cpu)
        wait_for_guest(memory)
        cpu.kick()
        thread.join(60)
        assert exits == [kvm.Exit("INTR")]
        with pytest.raises(BlockingIOError):
            os.read(reading, 1)
    finally:
        signal.set_wakeup_fd(before)
        os.close(reading)
        os.close(writing)


class AlarmError(Exception):
    """Raised by a test's signal handler."""


@pytest.fixture
def signal_when_running():
    """Send SIGUSR1 to the main thread as soon as the guest runs; the handler is Python's."""
    calls = []
    raising = []

    def handler(number, frame):
        calls.append(number)
        if raising:
            raise AlarmError

    before = signal.signal(signal.SIGUSR1, handler)
    threads = []

    def send(memory):
        def body():
            wait_for_guest(memory)
            signal.pthread_kill(threading.main_thread().ident, signal.SIGUSR1)

        thread = threading.Thread(target=body)
        thread.start()
        threads.append(thread)

    yield send, calls, raising
    for thread in threads:
        thread.join(60)
    signal.signal(signal.SIGUSR1, before)


def test_a_signal_runs_pythons_handler_and_ends_the_run(vm, signal_when_running):
    send, calls, _ = signal_when_running
    cpu, memory = boot(vm, SPIN)
    send(memory)
    assert cpu.run().reason == "INTR"
    assert calls == [signal.SIGUSR1]


def test_a_handler_that_raises_ends_the_run_with_its_exception_and_the_guest_goes_on(vm, signal_when_running):
    send, calls, raising = signal_when_running
    raising.append(True)
    cpu, memory = boot(vm, SPIN)
    send(memory)
    with pytest.raises(AlarmError):
        cpu.run()
    assert calls == [signal.SIGUSR1]
    assert vm.get_dirty_log(0).indices().tolist() == [0]
    memory[5] = 0xF4
    assert cpu.run().reason == "HLT"


def test_a_vcpu_runs_in_one_thread_at_a_time(vm):
    cpu, memory = boot(vm, SPIN)
    thread, exits = run_in_thread(cpu)
    wait_for_guest(memory)
    with pytest.raises(RuntimeError, match="vCPU 0 is running in another thread"):
        cpu.run()
    cpu.kick()
    thread.join(60)
    assert exits == [kvm.Exit("INTR")]


@pytest.mark.parametrize("owner", ["vcpu", "vm", "kvm"])
def test_closing_ends_a_run_under_way(owner):
    system = kvm.Kvm()
    vm = system.create_vm()
    cpu, memory = boot(vm, SPIN)
    thread, exits = run_in_thread(cpu)
    wait_for_guest(memory)
    {"vcpu": cpu, "vm": vm, "kvm": system}[owner].close()
    thread.join(60)
    assert exits == [kvm.Exit("INTR")]
    assert cpu.closed
    for each in (cpu, vm, system):
        each.close()


@pytest.mark.parametrize("end", ["cpu.kick()", "cpu.close()", "vm.close()"])
def test_a_thread_that_blocks_all_signals_can_be_made_to_return(end):
    """In a process of its own: where a kick does not arrive, neither does a close."""
    code = f"""
import mmap, os, signal, threading
from dirtylog.sources import kvm
signal.alarm(60)
everything = signal.valid_signals() - {{signal.SIGALRM}}
with kvm.Kvm() as system, system.create_vm() as vm:
    memory = mmap.mmap(-1, 16 * mmap.PAGESIZE)
    memory[:{len(SPIN)}] = {SPIN}
    vm.set_memory_region(0, 0, 16, memory=memory)
    cpu = vm.create_vcpu()
    cpu.enter_real_mode(0)
    def body():
        before = signal.pthread_sigmask(signal.SIG_BLOCK, everything)
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [])
        print(cpu.run().reason, signal.pthread_sigmask(signal.SIG_BLOCK, []) == blocked != before)
    thread = threading.Thread(target=body)
    thread.start()
    while not memory[{FLAG}]:
        os.sched_yield()
    {end}
    thread.join()
"""
    done = warm.run(code)
    assert (done.returncode, done.stdout) == (0, "INTR True\n"), done.stderr


def test_a_closed_vcpu_says_so(vm):
    cpu = vm.create_vcpu()
    cpu.close()
    cpu.close()
    assert cpu.closed
    for call in (cpu.run, cpu.kick, cpu.get_regs, cpu.get_sregs):
        with pytest.raises(ValueError, match="vCPU 0 is closed"):
            call()
    with pytest.raises(ValueError, match="closed"), cpu:
        pass


def test_a_vcpu_that_nobody_holds_is_closed_with_its_vm():
    with kvm.Kvm() as system, system.create_vm() as vm:
        descriptor = vm.create_vcpu()._handle.fileno()
        assert os.readlink(f"/proc/self/fd/{descriptor}") == "anon_inode:kvm-vcpu:0"
    assert not os.path.exists(f"/proc/self/fd/{descriptor}")


def test_a_forked_child_is_refused_and_closes_without_waiting_for_its_parents_threads(vm):
    cpu, memory = boot(vm, SPIN)
    source = vm.slot(0)
    thread, exits = run_in_thread(cpu)
    wait_for_guest(memory)
    with warnings.catch_warnings(), vm._lock:
        # Newer Pythons advise against forks beside threads: these are what is tested.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
        if child == 0:
            status = 1
            try:
                refused = 0
                for call in (source.harvest, cpu.run, cpu.kick, vm.create_vcpu, lambda: vm.get_dirty_log(0)):
                    try:
                        call()
                    except OSError as error:
                        refused += error.errno == errno.EIO
                vm.close()
                vm.close()
                cpu.close()
                status = 0 if refused == 5 and vm.closed and cpu.closed else 2
            finally:
                os._exit(status)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    cpu.kick()
    thread.join(60)
    assert exits == [kvm.Exit("INTR")]
    assert source.harvest().indices().tolist() == [0]


def test_the_run_page_is_not_read_outside(vm):
    cpu = vm.create_vcpu()
    with pytest.raises(IndexError, match="outside the run page"):
        cpu._handle.load(1 << 20, 8)
    with pytest.raises(IndexError, match="outside the run page"):
        cpu._handle.store((1 << 64) - 8, b"12345678")
