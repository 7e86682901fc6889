"""Machines, runtimes and databases as they are shipped: attached to, harvested a hundred times, and none the worse.

A copy of each one's memory, kept up to date by what the harvests report alone, is compared with what the memory is
while the program stands still. What each does between two harvests, and what it answers, is its own check.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

import dirtylog as dl

from ..leaks import descriptors
from ..qemu import FIRMWARE, WRITTEN
from ..sources.test_process import PAGE, Puppet, attach, until_in_call

pytestmark = pytest.mark.stress
HARVESTS = 100


def needed(name, *places):
    """The path of a program, or a skip that names it."""
    path = shutil.which(name) or next((str(found) for place in places for found in sorted(Path("/").glob(place))), None)
    if path is None:
        pytest.skip(f"{name} is not installed")
    return path


@contextmanager
def running(*command, **how):
    with subprocess.Popen(
        [str(word) for word in command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, **how
    ) as program:
        try:
            yield program
        finally:
            program.terminate()
            program.stdin.close()
            program.wait(60)


class Copy:
    """What a sink has that was told of everything at first, and of what was written afterwards."""

    def __init__(self, process):
        self.process = process
        self.pages = {}
        self.take(process.harvest() | self.everything())

    def everything(self):
        runs = [[region.first_page, region.npages] for region in self.process.regions]
        return dl.DirtyPages.from_runs(runs, self.process.npages)

    def take(self, dirty):
        memory = self.process.read(dirty)
        self.pages.update(zip(dirty.indices().tolist(), memory, strict=True))
        return dirty.count

    def compare(self):
        """Stop everything, take what was written last, and compare; return how many pages were compared."""
        pids = {region.pid for region in self.process.regions}
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        try:
            for pid in pids:
                while any(state(pid, tid) not in "TtZX" for tid in os.listdir(f"/proc/{pid}/task")):
                    os.sched_yield()
            self.take(self.process.harvest())
            compared = 0
            for region in self.process.regions:
                with open(f"/proc/{region.pid}/mem", "rb", buffering=0) as memory:
                    for page in range(region.npages):
                        # What a child has as its parent had it at the fork is not reported for the child.
                        if region.pid != self.process.pid and region.first_page + page not in self.pages:
                            continue
                        now = os.pread(memory.fileno(), PAGE, region.start + page * PAGE)
                        assert self.pages[region.first_page + page].tobytes() == now, (region, page)
                        compared += 1
            return compared
        finally:
            for pid in pids:
                os.kill(pid, signal.SIGCONT)


def state(pid, tid):
    try:
        return Path(f"/proc/{pid}/task/{tid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return "X"


def harvested(pid, work, **how):
    """Attach, harvest a hundred times with some work before each, compare, detach; return what the harvests counted."""
    with attach(pid, **how) as process:
        copy = Copy(process)
        counts = []
        for number in range(HARVESTS):
            work(number)
            counts.append(copy.take(process.harvest()))
        assert copy.compare() > 1000
    return counts


@pytest.mark.parametrize("accelerator", ["tcg", "kvm"])
def test_a_guest_of_qemu(tmp_path, accelerator):
    qemu = needed("qemu-system-x86_64")
    if accelerator == "kvm" and not os.access("/dev/kvm", os.R_OK | os.W_OK):
        pytest.skip("/dev/kvm is not there, or not for this user")
    firmware = tmp_path / "firmware"
    firmware.write_bytes(FIRMWARE)
    machine = ["-m", "32", "-display", "none", "-nodefaults", "-bios", firmware, "-accel", accelerator]
    with running(qemu, *machine, "-monitor", "stdio") as program:

        def memory():
            program.stdin.write(b"xp /1hx 0x5e000\n")
            answer = b""
            while b"5e000: " not in answer:
                answer += program.stdout.read(4096)
            while not answer.rstrip(b" ").endswith(b"(qemu)"):
                answer += program.stdout.read(4096)
            return answer.rpartition(b"5e000: ")[2].split()[0]

        before = memory()
        while memory() == before:  # until its first round is over
            time.sleep(0.01)
        with attach(program.pid, select="guest") as process:
            copy = Copy(process)
            ram = max(process.regions, key=lambda region: region.npages)
            found = set()
            for number in range(HARVESTS):
                time.sleep(0.002)
                dirty = process.harvest()
                copy.take(dirty)
                found.update((dirty.indices() - ram.first_page).tolist())
                if number % 10 == 9:
                    # Each page as it is now: a write that was missed is not hidden by the next one.
                    assert copy.compare() >= 32 << 20 >> 12
        # KVM may map a page for writing that was only read, and then reports it: more, and never less.
        assert found >= set(WRITTEN)
        assert accelerator == "kvm" or found == set(WRITTEN)
        before = memory()
        while memory() == before:  # it goes on
            time.sleep(0.01)


def test_node():
    node = needed("node")
    code = (
        "const held = Buffer.alloc(8 << 20); process.stdin.on('data', line => { const n = Number(line);"
        "for (let i = 0; i < 50; i++) held[((n * 50 + i) % 2048) * 4096] = n + 1;"
        "console.log(held[(n * 50 % 2048) * 4096]) })"
    )
    with running(node, "-e", code) as program:

        def work(number):
            program.stdin.write(b"%d\n" % number)
            assert program.stdout.readline() == b"%d\n" % (number + 1)

        work(0)
        counts = harvested(program.pid, work)
        assert min(counts) >= 50
        work(7)


JAVA = """
public class Writer {
    public static void main(String[] words) throws Exception {
        byte[] held = new byte[8 << 20];
        var lines = new java.io.BufferedReader(new java.io.InputStreamReader(System.in));
        for (String line = lines.readLine(); line != null; line = lines.readLine()) {
            int n = Integer.parseInt(line.trim());
            for (int i = 0; i < 50; i++) held[((n * 50 + i) % 2048) * 4096] = (byte) (n + 1);
            System.out.println(held[(n * 50 % 2048) * 4096]);
        }
    }
}
"""


def test_a_java_virtual_machine(tmp_path):
    java, javac = needed("java"), needed("javac")
    (tmp_path / "Writer.java").write_text(JAVA)
    subprocess.run([javac, "-d", tmp_path, tmp_path / "Writer.java"], check=True)
    # Without its file of counters, which it shares: that is reported whole each time.
    with running(java, "-Xmx64m", "-XX:-UsePerfData", "-cp", tmp_path, "Writer") as program:

        def work(number):
            program.stdin.write(b"%d\n" % number)
            assert program.stdout.readline() == b"%d\n" % (number + 1)

        work(0)
        counts = harvested(program.pid, work)
        assert min(counts) >= 50
        work(7)


def test_the_processes_of_postgresql(tmp_path):
    """One shared memory, written by all of them: it is reported whole each time, and the rest exactly."""
    initdb = needed("initdb", "usr/lib/postgresql/*/bin/initdb")
    postgres = Path(initdb).with_name("postgres")
    psql = needed("psql")
    user = "postgres" if os.geteuid() == 0 else None
    data = tmp_path / "data"
    for place in (tmp_path, *tmp_path.parents[:2]):
        place.chmod(0o755)
    data.mkdir()
    if user:
        shutil.chown(data, user)
    subprocess.run([initdb, "-D", data, "-A", "trust", "-N"], check=True, stdout=subprocess.DEVNULL, user=user)
    options = ["-c", "shared_buffers=2MB", "-c", "fsync=off", "-c", "listen_addresses=", "-c", "jit=off"]
    with ExitStack() as stack:
        stack.enter_context(running(postgres, "-D", data, *options, "-k", data, user=user, stderr=subprocess.DEVNULL))
        while not (data / ".s.PGSQL.5432").exists():
            time.sleep(0.05)
        pid = int((data / "postmaster.pid").read_text().split()[0])
        command = [psql, "-h", data, "-X", "-A", "-t", "-q", "-d", "postgres"]
        while subprocess.run(
            [*command, "-c", "create table t (n int, words text)"], user=user, stderr=subprocess.DEVNULL
        ).returncode:
            time.sleep(0.05)
        session = stack.enter_context(running(*command, user=user))

        def ask(text):
            session.stdin.write(text.encode() + b"\n")
            return session.stdout.readline().strip()

        assert ask("select 1;") == b"1"

        def work(number):
            assert ask(f"insert into t values ({number}, repeat('x', 500)); select count(*) from t;") == b"%d" % (
                number + 1
            )

        with pytest.warns(dl.IncompleteLogWarning, match="shares memory"):
            harvested(pid, work, follow_children=True)
        assert ask("select sum(n) from t;") == b"%d" % sum(range(HARVESTS))


# The general registers as one thread has them at rest: asked of the kernel by a tracer that changes nothing.
REGISTERS = """
import ctypes, os, sys
pid = int(sys.argv[1])
libc = ctypes.CDLL(None, use_errno=True)
libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
SEIZE, INTERRUPT, GETREGSET, DETACH = 0x4206, 0x4207, 0x4204, 17
assert libc.ptrace(SEIZE, pid, None, None) == 0, os.strerror(ctypes.get_errno())
assert libc.ptrace(INTERRUPT, pid, None, None) == 0
os.waitpid(pid, 0x40000000)
for kind in (1, 2, 0x202):  # NT_PRSTATUS, NT_PRFPREG, NT_X86_XSTATE
    memory = ctypes.create_string_buffer(1 << 14)
    vector = (ctypes.c_size_t * 2)(ctypes.addressof(memory), len(memory))
    if libc.ptrace(GETREGSET, pid, kind, vector) == 0:
        print(kind, memory.raw[: vector[1]].hex())
assert libc.ptrace(DETACH, pid, None, None) == 0
"""


def registers(pid):
    done = subprocess.run([sys.executable, "-c", REGISTERS, str(pid)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("1 ")
    return done.stdout


def test_a_thousand_attachments_leave_nothing_behind():
    """How long each stop is, ``python -m benchmarks.attach`` says."""

    def mapped(pid):
        return Path(f"/proc/{pid}/maps").read_text()

    with Puppet() as puppet:
        attach(puppet.pid).close()
        puppet.do("gc.disable() if 'gc' in globals() else None")
        before = puppet.do("descriptors()"), mapped(puppet.pid), descriptors()
        # It waits for its next order all the time: in one system call, with the same registers.
        assert until_in_call(puppet, (0,))
        held = registers(puppet.pid)
        for _ in range(1000):
            with dl.attach(puppet.pid) as process:
                assert process.stopped > 0
        assert until_in_call(puppet, (0,))
        assert registers(puppet.pid) == held
        assert (puppet.do("descriptors()"), mapped(puppet.pid), descriptors()) == before
        assert puppet.do("signal.pthread_sigmask(signal.SIG_BLOCK, [])") == set()
