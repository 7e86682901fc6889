"""A machine of KVM that is interrupted, or short of memory, between the kernel's change and the record of it."""

import contextlib
import itertools

import pytest

import dirtylog as dl
from dirtylog.sources import kvm
from dirtylog.sources.kvm import _kvm
from dirtylog.sources.kvm._guest import Guest

from ..leaks import descriptors

GFN = 1024
pytestmark = pytest.mark.skipif(not kvm.probe().available, reason=kvm.probe().reason)


@pytest.fixture
def vm():
    with kvm.Kvm() as system, system.create_vm() as vm:
        yield vm


class Interrupting:
    """A handle on which some calls are interrupted when they have been made, as CPython does after a C function."""

    def __init__(self, handle, request):
        self.handle, self.request = handle, request

    def __getattr__(self, name):
        return getattr(self.handle, name)

    def ioctl(self, request, *arguments, **options):
        answer = self.handle.ioctl(request, *arguments, **options)
        if request == self.request:
            self.request = None
            raise KeyboardInterrupt
        return answer


def test_a_slot_whose_deletion_is_interrupted_is_gone(vm):
    vm.set_memory_region(0, GFN, 64)
    vm._handle = Interrupting(vm._handle, _kvm.SET_USER_MEMORY_REGION)
    with pytest.raises(KeyboardInterrupt):
        vm.set_memory_region(0, GFN, 0)
    with pytest.raises(OSError, match="slot 0 does not exist"):
        vm.get_dirty_log(0)
    vm.set_memory_region(0, GFN, 32)
    assert vm.get_dirty_log(0).npages == 32


def test_a_slot_of_rings_whose_deletion_is_interrupted_can_be_made_again(vm):
    vm.enable_dirty_ring(1024)
    vm.set_memory_region(0, GFN, 64)
    vm._handle = Interrupting(vm._handle, _kvm.SET_USER_MEMORY_REGION)
    with pytest.raises(KeyboardInterrupt):
        vm.set_memory_region(0, GFN, 0)
    assert vm.harvest_rings() == {}
    vm.set_memory_region(0, GFN, 32)
    assert vm.harvest_rings()[0].npages == 32


def test_rings_whose_enabling_is_interrupted_are_enabled(vm):
    vm.set_memory_region(0, GFN, 64)
    vm._handle = Interrupting(vm._handle, _kvm.ENABLE_CAP)
    with pytest.raises(KeyboardInterrupt):
        vm.enable_dirty_ring(1024)
    guest = Guest(vm, gfn=0, capacity=64, padding=64)
    guest.write([GFN + 5])
    assert vm.harvest_rings()[0].indices().tolist() == [5]


def test_manual_protection_whose_enabling_is_interrupted_is_enabled(vm):
    vm.set_memory_region(0, GFN, 64)
    vm._handle = Interrupting(vm._handle, _kvm.ENABLE_CAP)
    with pytest.raises(KeyboardInterrupt):
        vm.enable_manual_protect()
    guest = Guest(vm, gfn=0, capacity=64)
    guest.write([GFN + 5])
    assert vm.slot(0).harvest().indices().tolist() == [5]
    assert not vm.slot(0).harvest()


def test_a_vcpu_whose_making_failed_has_one_ring(vm, monkeypatch):
    vm.enable_dirty_ring(1024)
    vm.set_memory_region(0, GFN, 64)
    with monkeypatch.context() as patch:
        patch.setattr("dirtylog.sources.kvm.machine.Vcpu", lambda *_: (_ for _ in ()).throw(MemoryError))
        with pytest.raises(MemoryError):
            vm.create_vcpu()
    vm.create_vcpu()
    assert len(vm._rings.rings) == len(vm._rings.vcpus) == 1


def test_a_vcpu_whose_making_is_interrupted_is_made_the_next_time(vm):
    vm._handle = Interrupting(vm._handle, _kvm.CREATE_VCPU)
    with pytest.raises(KeyboardInterrupt):
        vm.create_vcpu()
    assert [vm.create_vcpu().index, vm.create_vcpu().index] == [0, 1]


def test_a_vcpu_that_finds_no_memory_is_made_the_next_time(vm, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("dirtylog.sources.kvm.machine.Vcpu", lambda *_: (_ for _ in ()).throw(MemoryError))
        with pytest.raises(MemoryError):
            vm.create_vcpu()
    assert vm.create_vcpu().index == 0


def test_an_interrupt_during_a_harvest_of_rings_is_no_overflow(vm, interrupt_class):
    vm.enable_dirty_ring(1024)
    vm.set_memory_region(0, GFN, 64)
    guest = Guest(vm, gfn=0, capacity=64, padding=64)
    for n in itertools.count(1):
        guest.write([GFN + 5])
        taken = []
        interrupt = interrupt_class(n, "kvm/rings.py", "kvm/machine.py")
        with contextlib.suppress(KeyboardInterrupt), interrupt.active():
            taken.append(vm.harvest_rings()[0])
        if not interrupt.where:
            break
        guest.write([GFN + 7])
        harvested = vm.harvest_rings()[0]
        assert harvested.exact
        assert harvested.indices().tolist() == ([7] if taken else [5, 7]), interrupt.where
    assert n > 10
    assert not vm._rings._lost


def peeked(vm):
    vm.set_memory_region(0, GFN, 64)
    guest = Guest(vm, gfn=0, capacity=64)
    slot = vm.slot(0)
    slot.harvest()
    guest.write([GFN + 5])
    assert slot.peek().indices().tolist() == [5]
    guest.write([GFN + 7])
    return slot


@pytest.mark.parametrize("how", ["harvest", "peek", "get_dirty_log"])
def test_a_signal_while_the_kernel_is_asked_loses_no_page(vm, raising_signal, how):
    slot = peeked(vm)
    region = vm._regions[0]
    with pytest.raises(KeyboardInterrupt):
        vm._handle.get_dirty_log(raising_signal, region.pinned, region.npages, 4096, region.owed, how == "peek")
    assert slot.peek().indices().tolist() == [5, 7]
    assert vm.get_dirty_log(0).indices().tolist() == [5, 7]
    assert not slot.harvest()


def test_words_that_cannot_be_written_lose_no_page(vm, monkeypatch):
    slot = peeked(vm)

    class Words:
        def __setitem__(self, *_):
            raise MemoryError

    monkeypatch.setattr("dirtylog.sources.kvm.machine.check_out", lambda *_: Words())
    with pytest.raises(MemoryError):
        vm.get_dirty_log(0, out=bytearray(8))
    assert slot.harvest().indices().tolist() == [5, 7]


def test_what_is_cleared_is_owed_no_longer(vm):
    vm.enable_manual_protect()
    vm.set_memory_region(0, GFN, 128)
    vm._regions[0].owed.owe(dl.DirtyPages.from_indices([3, 70], 128))
    vm.clear_dirty_log(0, 0, 64, dl.DirtyPages.from_indices([3, 70], 128))
    assert vm.get_dirty_log(0).indices().tolist() == [70]
    assert vm.slot(0).harvest().indices().tolist() == [70]
    assert not vm.slot(0).harvest()


def test_a_machine_whose_making_is_interrupted_leaves_no_descriptor():
    with kvm.Kvm() as system:
        handle = system._handle
        system.create_vm().close()
        before = descriptors()
        system._handle = Interrupting(handle, _kvm.CREATE_VM)
        with pytest.raises(KeyboardInterrupt):
            system.create_vm()
        system._handle = handle
        assert descriptors() == before


class Left:
    """A vCPU's handle on which a run is interrupted when the guest has left."""

    def __init__(self, handle):
        self.handle = handle

    def __getattr__(self, name):
        return getattr(self.handle, name)

    def run(self, *left):
        self.handle.run(*left)
        raise KeyboardInterrupt


def test_why_a_guest_left_is_said_by_the_next_run_when_an_interrupt_came_first(vm):
    vm.set_memory_region(0, 0, 16)
    program = b"\xb0\x5a\xe6\x80\xe4\x60\xf4"  # mov al, 0x5a; out 0x80, al; in al, 0x60; hlt
    vm.memory(0)[: len(program)] = list(program)
    cpu = vm.create_vcpu()
    cpu.enter_real_mode(0)
    real = cpu._handle
    exits = []
    for _ in range(3):
        cpu._handle = Left(real)
        with pytest.raises(KeyboardInterrupt):
            cpu.run()
        cpu._handle = real
        exits.append(cpu.run())
        if exits[-1].reason == "IO" and not exits[-1].is_write:
            cpu.answer(b"\x77")
    assert [(each.reason, each.port, each.data) for each in exits] == [
        ("IO", 0x80, b"\x5a"), ("IO", 0x60, b""), ("HLT", 0, b""),
    ]  # fmt: skip
    assert cpu.get_regs().rax & 0xFF == 0x77
