"""A real guest goes on in another process on memory that is still filling, and finds what it had written."""

import json
from dataclasses import asdict

import pytest

from dirtylog.sinks.migrate import ListenerProcess, connect, receive, send
from dirtylog.sources import kvm

from .guest import Running
from .test_migrate_door import certificate
from .test_migrate_kvm import COUNT, NPAGES, PAGE, START, check_memory, departing
from .test_migrate_postcopy import guarded

probed = kvm.probe()
pytestmark = [
    pytest.mark.skipif(not probed.available, reason=probed.reason),
    pytest.mark.skipif(bool(guarded()), reason=guarded()),
]


def arriving(tls):
    """Say where to connect to, and return who did."""
    # Before a guest runs: what does TLS is a process of its own.
    with ListenerProcess(("127.0.0.1", 0), certificate("receiver") if tls else None, timeout=100) as listener:
        print(listener.address[1], flush=True)
        return listener.accept(100)


def go_on(tls):
    """Be the destination: run the guest before its memory is here, and check what it wrote here and there."""
    guests = []
    with arriving(tls) as sock, kvm.Kvm() as system, system.create_vm() as vm:
        vm.set_memory_region(0, 0, NPAGES)
        memory = vm.memory(0)
        vcpu = vm.create_vcpu()
        vcpu.enter_flat32(0)
        receive(
            sock,
            out=memory,
            state=lambda state: vcpu.set_regs(kvm.Regs(**state)),
            start=lambda _: guests.append(Running(vcpu)),
            postcopy=True,
        )
        numbers = memory.reshape(NPAGES, PAGE).view("<u4")[START:, 0]
        before = numbers.max()
        while numbers.max() <= before + COUNT:
            pass
        guests[0].stop()
        rcx = vcpu.get_regs().rcx
        check_memory(memory, rcx)
        print(json.dumps({"after": rcx}), flush=True)


@pytest.mark.parametrize(("rounds", "tls"), [(0, False), (2, False), (0, True)])
def test_a_guest_goes_on_while_its_memory_comes(rounds, tls):
    def connects(port):
        return connect(("127.0.0.1", port), certificate("sender") if tls else None, timeout=100)

    with departing("test_migrate_postcopy_kvm", f"go_on({tls})", connects) as here:
        while not here.observer.first[0]:
            pass
        result = send(
            here.sock,
            here.memory,
            here.observer,
            pause=here.guest.stop,
            state=lambda: asdict(here.vcpu.get_regs()),
            postcopy=rounds,
        )
        rcx = here.vcpu.get_regs().rcx
        check_memory(here.memory, rcx)
        answer = here.answer()
    assert len(result.rounds) == rounds + 1
    assert result.rounds[-1].pages > 0
    assert answer["after"] > rcx + COUNT
