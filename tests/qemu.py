"""QEMU's own programs, for tests of several folders: a storage daemon with a disk, who writes to it, and a guest."""

import contextlib
import os
import shutil
import socket
import subprocess

import numpy as np
import pytest

from dirtylog.sources.qemu import NbdClient, Qmp

SIZE = 4 << 20
WRITABLE = {"type": "nbd", "id": "w", "node-name": "disk", "name": "w", "writable": True}
# A sanitizer that is loaded before this process is not for theirs.
ENVIRONMENT = {key: value for key, value in os.environ.items() if key != "LD_PRELOAD"}


def program(name):
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def listening(path):
    """A Unix socket that listens before its server runs: whoever connects waits for it, without asking again.

    It does not block, as one that QEMU opens itself does not: of two threads of QEMU that see one connection, the late
    one would wait in accept() for the next, and the whole monitor with it.
    """
    server = socket.socket(socket.AF_UNIX)
    server.setblocking(False)
    server.bind(str(path))
    server.listen(16)
    return server


# Firmware of our own: a round is a number in every second page of 64 from 0x20000 on, and the next number follows. Real
# mode, so that a KVM that runs guests by emulation (of instructions, or of page tables) takes no minutes to boot one.
ROUNDS = bytes.fromhex("43b800208ec031ff26891d81c7002075f70500103d006072ebebe5")
# A CPU begins sixteen bytes before the end of its firmware: a jump to f000:0000.
FIRMWARE = (ROUNDS.ljust(0xFFF0, b"\0") + bytes.fromhex("ea000000f0")).ljust(0x10000, b"\0")
WRITTEN = range(0x20, 0x60, 2)


@contextlib.contextmanager
def emulated(monitor, *options):
    """A guest of 16 MiB under TCG, whose monitor listens at a path; yields its process, which ends with the block."""
    with listening(monitor) as server:
        command = [
            program("qemu-system-x86_64"), "-accel", "tcg", "-m", "16M", "-nodefaults", "-no-user-config",
            "-display", "none", "-vga", "none", "-chardev", f"socket,id=q,fd={server.fileno()},server=on,wait=off",
            "-mon", "chardev=q,mode=control", *map(str, options),
        ]  # fmt: skip
        process = subprocess.Popen(command, pass_fds=[server.fileno()], env=ENVIRONMENT)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def until_written(qmp, harvest):
    """Let the guest run until it has written all that it ever writes, and stand still; return what was reported."""
    qmp.execute("cont")
    found = set()
    while not found >= set(WRITTEN):
        found |= harvest()
    qmp.execute("stop")
    return found | harvest()


class Daemon:
    """A qemu-storage-daemon over one qcow2 disk, named "disk"; it can be killed and started again."""

    def __init__(self, directory, size=SIZE, nbd=True, disk=True):
        self.directory = directory
        self.size = size
        self.nbd_server = nbd
        self.path = directory / "disk.qcow2"
        self.monitor = directory / "monitor"
        self.nbd = directory / "nbd"
        self.process = None
        self.disk = disk
        if not disk:
            return
        create = [program("qemu-img"), "create", "-q", "-f", "qcow2", str(self.path), str(size)]
        subprocess.run(create, check=True, env=ENVIRONMENT)

    def start(self):
        for path in (self.monitor, self.nbd):
            path.unlink(missing_ok=True)
        with listening(self.monitor) as monitor, listening(self.nbd) as nbd:
            disk = [
                "--blockdev", f"driver=file,node-name=file,filename={self.path},cache.no-flush=on,discard=unmap",
                "--blockdev", "driver=qcow2,node-name=disk,file=file,discard=unmap",
            ]  # fmt: skip
            command = [
                program("qemu-storage-daemon"),
                *(disk if self.disk else []),
                "--chardev", f"socket,id=monitor,fd={monitor.fileno()},server=on,wait=off",
                "--monitor", "chardev=monitor",
            ]  # fmt: skip
            if self.nbd_server:
                command += ["--nbd-server", f"addr.type=fd,addr.str={nbd.fileno()}"]
            self.process = subprocess.Popen(command, pass_fds=(monitor.fileno(), nbd.fileno()), env=ENVIRONMENT)

    def qmp(self):
        return Qmp(self.monitor, timeout=60)

    def kill(self):
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def quit(self):
        """End it as it should end: bitmaps that are persistent are stored in the image."""
        self.process.terminate()
        self.process.wait()
        self.process = None


class Writer:
    """A qemu-io that writes to an export, one command after the other."""

    def __init__(self, nbd, export):
        command = [program("qemu-io"), "-f", "raw", f"nbd+unix:///{export}?socket={nbd}"]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=ENVIRONMENT
        )
        self._until_prompt()

    def _until_prompt(self):
        said = b""
        while not said.endswith(b"qemu-io> "):
            piece = self.process.stdout.read1(4096)
            assert piece, said
            said += piece
        return said

    def __call__(self, command):
        self.process.stdin.write(command.encode() + b"\n")
        self.process.stdin.flush()
        said = self._until_prompt()
        assert b"failed" not in said, said
        return said

    def write(self, offset, length, value):
        self(f"write -q -P {value} {offset} {length}")

    def close(self):
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


def content(nbd, export="w"):
    with NbdClient(nbd, export) as client:
        return bytes(client.read(0, client.size))


def bitmaps(qmp, name="dirtylog"):
    """Names of the disk's bitmaps that begin with a name."""
    (disk,) = [each for each in qmp.execute("query-named-block-nodes", {"flat": True}) if each["node-name"] == "disk"]
    names = [each["name"] for each in disk.get("dirty-bitmaps", []) if "name" in each]  # a job's own have none
    return sorted(each for each in names if each.startswith(name))


class Machine:
    """A daemon whose disk is written at random through qemu-io, and can be killed."""

    def __init__(self, directory, seed=1, size=SIZE):
        self.daemon = Daemon(directory, size)
        self.seed = seed
        self.chance = np.random.default_rng(seed)
        self.size = size
        self.start()

    @property
    def nbd(self):
        return self.daemon.nbd

    def start(self):
        self.daemon.start()
        self.qmp = self.daemon.qmp()
        self.qmp.execute("block-export-add", WRITABLE)
        self.writer = Writer(self.nbd, "w")

    def write(self, times):
        for _ in range(times):
            length = int(self.chance.integers(1, 60_000))
            at = int(self.chance.integers(0, self.size - length))
            if self.chance.random() < 0.1:
                self.writer(f"write -q -z {at} {length}")
            else:
                self.writer.write(at, length, int(self.chance.integers(256)))

    def end(self, kill):
        self.writer.close()
        self.qmp.close()
        (self.daemon.kill if kill else self.daemon.quit)()

    def restart(self, kill):
        self.end(kill)
        self.start()

    def content(self):
        return content(self.nbd)

    def clear(self):
        """Make it as it was at first: what a test has left in the daemon is removed, and the disk is empty."""
        if self.qmp.closed:
            self.qmp = self.daemon.qmp()
        qmp = self.qmp
        for export in qmp.execute("query-block-exports"):
            if export["id"] != WRITABLE["id"]:
                qmp.execute("block-export-del", {"id": export["id"], "mode": "hard"})
                qmp.wait("BLOCK_EXPORT_DELETED", lambda data, gone=export["id"]: data["id"] == gone)
        assert qmp.execute("query-jobs") == []
        nodes = [each["node-name"] for each in qmp.execute("query-named-block-nodes", {"flat": True})]
        for node in nodes:
            if node not in ("disk", "file"):
                qmp.execute("blockdev-del", {"node-name": node})
        for name in bitmaps(qmp, ""):
            qmp.execute("block-dirty-bitmap-remove", {"node": "disk", "name": name})
        self.writer(f"write -q -z -u 0 {self.size}")
        self.chance = np.random.default_rng(self.seed)


class Machines:
    """A machine for one test after the other; a test that leaves more in it than can be cleared costs another one."""

    def __init__(self, make):
        self.make = make
        self.there = None

    def lend(self):
        if self.there is None:
            self.there = self.make()
        return self.there

    def take_back(self):
        try:
            self.there.clear()
        except Exception:
            self.end()

    def end(self):
        there, self.there = self.there, None
        if there is not None:
            there.end(kill=True)


@pytest.fixture(scope="module")
def machines(tmp_path_factory):
    lent = Machines(lambda: Machine(tmp_path_factory.mktemp("machine")))
    yield lent
    lent.end()


@pytest.fixture
def machine(machines):
    yield machines.lend()
    machines.take_back()
