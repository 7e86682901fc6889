"""A guest behind /dev/kvm and a tracked program migrate to another process over TLS on a line that is cut 20 times."""

import contextlib
import json
import os
import random
import socket
import subprocess
import sys
import threading
from dataclasses import asdict
from hashlib import blake2b
from pathlib import Path

import numpy as np
import pytest

import dirtylog as dl
from dirtylog.sinks.migrate import Listener, Policy, connect, receive, send
from dirtylog.sources import kvm

from .guest import Running, writer
from .test_migrate_door import certificate

PAGE = 4096
NPAGES = 4096
CUTS = 20
# So little is under way when the line is cut: the system makes it twice as much.
BUFFER = 1 << 15


def digest(memory):
    return blake2b(memory, digest_size=16).hexdigest()


# ---- the other process ----------------------------------------------------------------------------------------------


def destination(guest):
    """Take in two migrations, say what arrived, and let a guest run on with its registers."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(Listener(("127.0.0.1", 0), certificate("receiver"), timeout=60))
        print(listener.address[1], flush=True)

        def accept(breaks=0):
            sock = listener.accept(60)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER)
            return sock

        for _ in range(2):
            options, vcpu = {}, None
            with contextlib.ExitStack() as one:
                if guest:
                    vm = one.enter_context(one.enter_context(kvm.Kvm()).create_vm())
                    vm.set_memory_region(0, 0, NPAGES)
                    vcpu = vm.create_vcpu()
                    vcpu.enter_flat32(0)
                    options["out"] = vm.memory(0)
                    # Before it may run.
                    options["state"] = lambda state, vcpu=vcpu: vcpu.set_regs(kvm.Regs(**state))
                breaks = []
                with accept() as sock:
                    memory = receive(sock, reconnect=lambda n, breaks=breaks: breaks.append(n) or accept(), **options)
                print(json.dumps({"digest": digest(memory), "breaks": len(breaks)}), flush=True)
                if vcpu is not None:
                    assert goes_on(vcpu, memory.view("<u4")[PAGE // 4 :])


def goes_on(vcpu, counter):
    """Run a guest until it has written all of its pages again."""
    before = vcpu.get_regs().rcx
    running = Running(vcpu)
    while running.is_alive() and counter[0] < before + 2:
        pass
    running.stop()
    return running.reason == "INTR"


@contextlib.contextmanager
def other_process(guest):
    """Start the other process; yield it and the port at which it listens."""
    root = str(Path(__file__).parents[2])
    code = f"from tests.sinks import test_migrate_cut_lines as t; t.destination({guest})"
    paths = os.pathsep.join([root, *(path for path in sys.path if path)])
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": paths}
    ) as process:
        try:
            yield process, int(process.stdout.readline())
            assert process.wait(timeout=100) == 0
        finally:
            process.kill()


# ---- the line -------------------------------------------------------------------------------------------------------


class Line:
    """Carries bytes to a port, and hangs up on both ends whenever so many have gone forth."""

    def __init__(self, port, cuts=()):
        self.port, self.cuts, self.carried = port, list(cuts), 0
        self.server = socket.socket()
        self.server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER)
        self.server.bind(("127.0.0.1", 0))
        self.server.listen()
        self.address = self.server.getsockname()
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self):
        while True:
            try:
                here, _ = self.server.accept()
            except OSError:
                return
            with here, socket.socket() as there:
                there.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER)
                try:
                    there.connect(("127.0.0.1", self.port))
                except OSError:
                    return
                back = threading.Thread(target=self._back, args=(there, here))
                back.start()
                with contextlib.suppress(OSError):
                    self._forth(here, there)
                for sock in (here, there):
                    with contextlib.suppress(OSError):
                        sock.shutdown(socket.SHUT_RDWR)
                back.join()

    def _forth(self, here, there):
        while data := here.recv(1 << 15):
            if self.cuts and self.carried + len(data) >= self.cuts[0]:
                part = data[: self.cuts.pop(0) - self.carried]
                self.carried += len(part)
                there.sendall(part)
                return
            there.sendall(data)
            self.carried += len(data)

    def _back(self, there, here):
        with contextlib.suppress(OSError):
            while data := there.recv(1 << 15):
                here.sendall(data)
            here.shutdown(socket.SHUT_WR)

    def connect(self, breaks=0):
        sock = connect(self.address, certificate("sender"), timeout=60)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER)
        return sock

    def close(self):
        self.server.shutdown(socket.SHUT_RDWR)
        self.thread.join()
        self.server.close()


# ---- the two sources ------------------------------------------------------------------------------------------------


class Guest:
    """Writes 1, 2, 3, ... into all of its pages but the first, round and round."""

    def __init__(self, stack):
        vm = stack.enter_context(stack.enter_context(kvm.Kvm()).create_vm())
        vm.set_memory_region(0, 0, NPAGES)
        self.memory = vm.memory(0)
        self.memory[:] = np.random.default_rng(0).integers(0, 256, self.memory.nbytes, np.uint8)
        program = writer(1, NPAGES)
        self.memory[: len(program)] = np.frombuffer(program, np.uint8)
        self.log = dl.DirtyLog()
        self.log.attach(vm.slot(0))
        self.vcpu = vm.create_vcpu()
        self.vcpu.enter_flat32(0)
        self.vcpu.set_regs(kvm.Regs(rip=0, rsi=PAGE, rcx=1))
        self.running = Running(self.vcpu)
        stack.callback(self.pause)
        self.state = lambda: asdict(self.vcpu.get_regs())

    def during(self):
        """Wait until it has come to its first page twice: in between it has written all of them."""
        first = self.memory.view("<u4")[PAGE // 4 :]
        for _ in range(2):
            before = int(first[0])
            while self.running.is_alive() and not self.running.stopping and int(first[0]) == before:
                pass

    def pause(self):
        self.during()
        self.running.stop()


class Program:
    """An array that is tracked, and written in all of its pages during each round."""

    state = None

    def __init__(self, stack):
        self.memory = dl.zeros(NPAGES * PAGE, np.uint8)
        self.memory[:] = np.random.default_rng(1).integers(0, 256, self.memory.nbytes, np.uint8)
        tracker = stack.enter_context(dl.track(self.memory))
        self.log = dl.DirtyLog()
        self.log.attach(tracker)
        self.paused = False

    def during(self):
        if not self.paused:
            self.memory[:: PAGE // 2] += 1

    def pause(self):
        self.during()
        self.paused = True


class Watched:
    """An observer that lets the source write just before it collects."""

    def __init__(self, observer, during):
        self.observer, self.during = observer, during
        self.npages, self.page_size, self.put_back = observer.npages, observer.page_size, observer.put_back

    def collect(self):
        self.during()
        return self.observer.collect()


@pytest.mark.parametrize("kind", [Guest, pytest.param(Program, marks=pytest.mark.stress)])
def test_twenty_cuts_at_random_lose_nothing_and_cost_a_fifth_at_most(kind):
    if kind is Guest and not (probed := kvm.probe()).available:
        pytest.skip(probed.reason)
    if kind is Program:
        try:
            dl.track(np.zeros(1 << 16, np.uint8)).close()
        except dl.BackendUnavailable as error:
            pytest.skip(str(error))
    rng = random.Random(11)
    cuts, sent = [], []
    with other_process(kind is Guest) as (process, port):
        for breaks in (0, CUTS):
            with contextlib.ExitStack() as stack:
                source = kind(stack)
                line = Line(port, cuts)
                stack.callback(line.close)
                observer = Watched(source.log.observer("migration"), source.during)
                with line.connect() as sock:
                    result = send(
                        sock,
                        source.memory,
                        observer,
                        state=source.state,
                        pause=source.pause,
                        # It never rests: so many rounds, of all of its pages each.
                        policy=Policy(downtime=0.0, max_rounds=3, force=True),
                        reconnect=line.connect,
                        # What changed would go alone, and there would be little to cut.
                        delta_cache=0,
                    )
                arrived = json.loads(process.stdout.readline())
                assert arrived == {"digest": digest(source.memory), "breaks": breaks}
                assert result.breaks == breaks
                sent.append(result.wire_bytes)
                # Anywhere in all that goes over the line, in any frame and at any byte.
                cuts = sorted(rng.randrange(1000, line.carried) for _ in range(CUTS))
    assert sent[0] > 4 * (NPAGES - 1) * PAGE
    assert sent[1] <= 1.2 * sent[0], sent
