"""A real guest moves from one process to another while it runs, and goes on there as if nothing had been."""

import json
import os
import socket
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from dirtylog import DirtyLog
from dirtylog.sinks.migrate import Policy, receive, send
from dirtylog.sources import kvm

from .guest import Running, writer

PAGE = 4096
START, COUNT = 16, 2048
NPAGES = START + COUNT

probed = kvm.probe()
pytestmark = pytest.mark.skipif(not probed.available, reason=probed.reason)


def check_memory(memory, rcx):
    """Every page holds the last number that the guest can have written there, by its own count."""
    pages = memory.reshape(NPAGES, PAGE).view("<u4")
    numbers = pages[START:, 0].astype(np.int64)
    assert not pages[START:, 1:].any()
    # It may have stopped between the store of a number and the step to the next.
    last = rcx if numbers[(rcx - 1) % COUNT] == rcx else rcx - 1
    k = np.arange(COUNT)
    assert (numbers == np.where(k < last, k + 1 + (last - 1 - k) // COUNT * COUNT, 0)).all()


class Patient:
    """An observer that collects no sooner than the guest has got on, so that no round is without its writes."""

    def __init__(self, observer, guest, first):
        self.observer, self.guest, self.first = observer, guest, first
        self.npages, self.page_size, self.put_back = observer.npages, observer.page_size, observer.put_back

    def collect(self):
        before = self.first[0]
        while not self.guest.stopping and self.first[0] == before:
            pass
        return self.observer.collect()


def go_on():
    """Be the destination: take the guest in, let it run on, and check what it wrote here and there."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        print(server.getsockname()[1], flush=True)
        server.settimeout(100)
        sock, _ = server.accept()
    with sock, kvm.Kvm() as system, system.create_vm() as vm:
        sock.settimeout(100)
        vm.set_memory_region(0, 0, NPAGES)
        memory = vm.memory(0)
        receive(sock, out=memory)
        with sock.makefile("r") as file:
            state = json.loads(file.readline())
        check_memory(memory, state["rcx"])
        vcpu = vm.create_vcpu()
        vcpu.enter_flat32(0)
        vcpu.set_regs(kvm.Regs(**state))
        guest = Running(vcpu)
        number = memory.reshape(NPAGES, PAGE).view("<u4")[START + (state["rcx"] - 1) % COUNT]
        before = state["rcx"]
        while number[0] <= before:
            pass
        guest.stop()
        rcx = vcpu.get_regs().rcx
        check_memory(memory, rcx)
        print(json.dumps({"before": before, "after": rcx}), flush=True)


def plain(port):
    """Connect to this port."""
    return socket.create_connection(("127.0.0.1", port), timeout=100)


@contextmanager
def departing(destination, go_on="go_on()", connect=plain):
    """Run a guest here until the block ends, and beside it the process in which `destination`.go_on() takes it in."""
    root = str(Path(__file__).parents[2])
    process = subprocess.Popen(
        [sys.executable, "-c", f"from tests.sinks import {destination} as t; t.{go_on}"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([root, *(p for p in sys.path if p)])},
    )  # fmt: skip

    def answer():
        output, complaint = process.communicate(timeout=100)
        assert process.returncode == 0, complaint
        return json.loads(output)

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
        with connect(port) as sock:
            guest = Running(vcpu)
            observer = Patient(log.observer("migration"), guest, memory.view("<u4")[START * PAGE // 4 :])
            try:
                yield SimpleNamespace(
                    sock=sock, vcpu=vcpu, guest=guest, memory=memory, observer=observer, answer=answer
                )
            finally:
                guest.stop()


def test_a_running_guest_migrates_into_another_process_and_goes_on():
    with departing("test_migrate_kvm") as here:
        # It never rests, so that the last round is forced.
        policy = Policy(downtime=0.0, max_rounds=4, force=True)
        result = send(here.sock, here.memory, here.observer, policy=policy, pause=here.guest.stop)
        state = here.vcpu.get_regs()
        here.sock.sendall(json.dumps(asdict(state)).encode() + b"\n")
        check_memory(here.memory, state.rcx)
        answer = here.answer()
    assert len(result.rounds) == 5
    assert all(r.dirtied for r in result.rounds[:-1])
    assert answer["before"] == state.rcx
    assert answer["after"] > state.rcx + COUNT // 2
