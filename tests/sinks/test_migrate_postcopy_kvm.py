"""A real guest goes on in another process on memory that is still filling, and finds what it had written."""

import json
import socket
from dataclasses import asdict

import pytest

from dirtylog.sinks.migrate import receive, send
from dirtylog.sources import kvm

from .guest import Running
from .test_migrate_kvm import COUNT, NPAGES, PAGE, START, check_memory, departing
from .test_migrate_postcopy import guarded

probed = kvm.probe()
pytestmark = [
    pytest.mark.skipif(not probed.available, reason=probed.reason),
    pytest.mark.skipif(bool(guarded()), reason=guarded()),
]


def go_on():
    """Be the destination: run the guest before its memory is here, and check what it wrote here and there."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        print(server.getsockname()[1], flush=True)
        server.settimeout(100)
        sock, _ = server.accept()
    guests = []
    with sock, kvm.Kvm() as system, system.create_vm() as vm:
        sock.settimeout(100)
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


@pytest.mark.parametrize("rounds", [0, 2])
def test_a_guest_goes_on_while_its_memory_comes(rounds):
    with departing("test_migrate_postcopy_kvm") as here:
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
