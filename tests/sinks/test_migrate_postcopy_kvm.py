"""A real guest goes on in another process on memory that is still filling, and finds what it had written."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from dirtylog import DirtyLog
from dirtylog.sinks.migrate import receive, send
from dirtylog.sources import kvm

from .guest import Running, writer
from .test_migrate_kvm import COUNT, NPAGES, PAGE, START, Patient, check_memory
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
    root = str(Path(__file__).parents[2])
    process = subprocess.Popen(
        [sys.executable, "-c", "from tests.sinks import test_migrate_postcopy_kvm as t; t.go_on()"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([root, *(p for p in sys.path if p)])},
    )  # fmt: skip
    with process, kvm.Kvm() as system, system.create_vm() as vm:
        vm.set_memory_region(0, 0, NPAGES)
        memory = vm.memory(0)
        program = writer(START, NPAGES)
        memory[: len(program)] = np.frombuffer(program, np.uint8)
        log = DirtyLog()
        log.attach(vm.slot(0))
        vcpu = vm.create_vcpu()
        vcpu.enter_flat32(0)
        vcpu.set_regs(kvm.Regs(rip=0, rsi=START * PAGE, rcx=1))
        port = int(process.stdout.readline())
        with socket.create_connection(("127.0.0.1", port), timeout=100) as sock:
            guest = Running(vcpu)
            numbers = memory.view("<u4")[START * PAGE // 4 :]
            try:
                while not numbers[0]:
                    pass
                result = send(
                    sock,
                    memory,
                    Patient(log.observer("migration"), guest, numbers),
                    pause=guest.stop,
                    state=lambda: asdict(vcpu.get_regs()),
                    postcopy=rounds,
                )
            finally:
                guest.stop()
        rcx = vcpu.get_regs().rcx
        check_memory(memory, rcx)
        output, complaint = process.communicate(timeout=100)
        assert process.returncode == 0, complaint
    assert len(result.rounds) == rounds + 1
    assert result.rounds[-1].pages > 0
    assert json.loads(output)["after"] > rcx + COUNT
