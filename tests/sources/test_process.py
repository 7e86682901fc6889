"""Attaching to another process: what it writes is seen, and it never notices."""

import array
import errno
import mmap
import os
import resource
import select
import signal
import subprocess
import sys
import time
from ast import literal_eval
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

import dirtylog as dl
from dirtylog.errors import BackendUnavailable, IncompleteLogWarning
from dirtylog.sources.process import _remote, attaching, handover, inside, stretches
from dirtylog.sources.process.members import children
from dirtylog.sources.process.regions import mappings

from .. import warm
from ..leaks import descriptors

pytestmark = pytest.mark.usefixtures("plain_programs")
PUPPET = Path(__file__).with_name("puppet.py")
PAGE = mmap.PAGESIZE
MIB_PAGES = (1 << 20) // PAGE


class Puppet:
    """A process that does what it is told."""

    def __init__(self, *, user=None, prefix=()):
        environment = {**os.environ, "PYTHONPATH": str(Path(dl.__file__).parents[1])}
        self.process = subprocess.Popen(
            [*prefix, sys.executable, str(PUPPET)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            user=user,
        )
        self.pid = literal_eval(self.answer())

    def tell(self, expression):
        self.process.stdin.write(expression + "\n")
        self.process.stdin.flush()

    def answer(self):
        return self.process.stdout.readline()

    def do(self, expression):
        self.tell(expression)
        return literal_eval(self.answer())

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()


def attach(pid, **how):
    try:
        return dl.attach(pid, **how)
    except (BackendUnavailable, PermissionError) as missing:
        pytest.skip(f"attaching does not work here: {missing}")


def status(pid):
    try:
        return Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return ""


@pytest.fixture
def puppet():
    with Puppet() as one:
        yield one


def pages_at(process, dirty, address, npages):
    """The dirty pages of one mapping, numbered from its start."""
    found = set()
    for region in process.regions:
        shift = (region.start - address) // PAGE - region.first_page
        inside = dirty & dl.DirtyPages.from_runs([[region.first_page, region.npages]], dirty.npages)
        found.update(page + shift for page in inside if 0 <= page + shift < npages)
    return found


def until_in_call(puppet, numbers):
    """Wait until its main thread is in one of some system calls: asked of the kernel, not slept for.

    False if it has answered instead: on a busy machine a call that times out may be over before it was seen.
    """
    while True:
        word = Path(f"/proc/{puppet.pid}/syscall").read_text().split()[0]
        if word != "running" and int(word) in numbers:
            return True
        if select.select([puppet.process.stdout], [], [], 0)[0]:
            return False
        os.sched_yield()


# ---- what is seen -------------------------------------------------------------------------------------


def test_what_the_process_writes_is_reported_once_and_nothing_else_of_that_mapping(puppet):
    address = puppet.do("new(1024)")
    puppet.do(f"poke({address}, *range(1024))")
    with attach(puppet.pid) as process:
        assert pages_at(process, process.harvest(), address, 1024) == set()
        puppet.do(f"poke({address}, 3, 100, 101, 1023)")
        assert pages_at(process, process.peek(), address, 1024) == {3, 100, 101, 1023}
        dirty = process.harvest()
        assert pages_at(process, dirty, address, 1024) == {3, 100, 101, 1023}
        assert dirty.exact
        assert pages_at(process, process.harvest(), address, 1024) == set()


def test_pages_are_read_as_they_are(puppet):
    address = puppet.do("new(600)")
    with attach(puppet.pid) as process:
        puppet.do(f"poke({address}, 5, 6, 599)")
        puppet.do(f"poke({address}, 6)")
        dirty = process.harvest()
        region = next(region for region in process.regions if region.start <= address < region.end)
        first = region.first_page + (address - region.start) // PAGE
        some = dl.DirtyPages.from_indices([first + 5, first + 6, first + 7, first + 599], process.npages)
        memory = process.read(some)
        assert memory[:, 7].tolist() == [1, 2, 0, 1]
        assert memory.sum() == 4
        out = np.full_like(memory, 255)
        assert process.read(some, out) is out
        assert (out == memory).all()
        assert (dirty & some).count == 3


def test_memory_that_is_mapped_later_is_watched_and_what_it_holds_is_reported(puppet):
    with attach(puppet.pid) as process:
        process.harvest()
        address = puppet.do("new(700)")
        puppet.do(f"poke({address}, 1, 699)")
        assert pages_at(process, process.harvest(), address, 700) == {1, 699}
        puppet.do(f"poke({address}, 2)")
        assert pages_at(process, process.harvest(), address, 700) == {2}


@pytest.mark.parametrize("then", ["", "read", "written"])
def test_a_page_of_a_file_whose_private_copy_is_taken_away_is_reported(puppet, tmp_path, then):
    path = tmp_path / "image"
    path.write_bytes(bytes(512 * PAGE))
    address = puppet.do(f"new(512, flags=mmap.MAP_PRIVATE, file=os.open({str(path)!r}, os.O_RDONLY))")
    puppet.do(f"poke({address}, 20, 25)")  # copies from before

    def drop(page):
        puppet.do(f"call('madvise', ctypes.c_void_p({address + page * PAGE}), PAGE, mmap.MADV_DONTNEED)")

    with attach(puppet.pid) as process:
        puppet.do(f"poke({address}, 7, 9)")
        drop(25)
        assert pages_at(process, process.harvest(), address, 512) == {7, 9, 25}
        for page in (7, 20, 30):
            drop(page)
        if then:
            for page in (7, 20):
                puppet.do(f"{'peek' if then == 'read' else 'poke'}({address}, {page})")
        assert pages_at(process, process.peek(), address, 512) == {7, 20}
        assert pages_at(process, process.harvest(), address, 512) == {7, 20}
        assert pages_at(process, process.harvest(), address, 512) == set()
        puppet.do(f"poke({address}, 7)")
        assert pages_at(process, process.harvest(), address, 512) == {7}


def test_memory_that_moves_is_reported_whole_where_it_is_now(puppet):
    address = puppet.do("new(512)")
    puppet.do(f"poke({address}, *range(512))")
    with attach(puppet.pid) as process:
        process.harvest()
        moved = puppet.do(f"libc.mremap({address}, 512 * PAGE, 4096 * PAGE, 1)")
        assert moved != address or puppet.do(f"new(1, at={address}) == {address}")
        dirty = process.harvest()
        if moved != address:
            assert pages_at(process, dirty, moved, 512) == set(range(512))
        puppet.do(f"poke({moved}, 4000)")
        assert 4000 in pages_at(process, process.harvest(), moved, 4096)


def test_memory_that_is_replaced_at_its_address_is_reported_whole(puppet):
    address = puppet.do("new(512)")
    with attach(puppet.pid) as process:
        process.harvest()
        assert puppet.do(f"new(512, at={address})") == address
        puppet.do(f"poke({address}, 9)")
        assert 9 in pages_at(process, process.harvest(), address, 512)
        puppet.do(f"poke({address}, 10)")
        assert pages_at(process, process.harvest(), address, 512) == {10}


def test_memory_that_is_gone_is_not_reported_and_reads_as_zeros(puppet):
    address = puppet.do("new(512)")
    with attach(puppet.pid) as process:
        region = next(region for region in process.regions if region.start <= address < region.end)
        page = region.first_page + (address - region.start) // PAGE
        puppet.do(f"poke({address}, *range(512))")
        puppet.do(f"libc.munmap({address}, 512 * PAGE)")
        dirty = process.harvest()
        gone = dl.DirtyPages.from_runs([[page, 512]], process.npages)
        assert not (dirty & gone)
        assert not process.read(gone).any()


def test_pages_of_gone_memory_are_given_away_only_when_all_others_are_used(puppet):
    first = puppet.do("new(512)")
    with attach(puppet.pid, spare=600) as process:
        puppet.do(f"libc.munmap({first}, 512 * PAGE)")
        process.harvest()
        second, third = puppet.do("new(512)"), puppet.do("new(512, at=held.setdefault('third', 0x7e0000000000))")
        puppet.do(f"poke({second}, 1), poke({third}, 2)")
        dirty = process.harvest()
        # One of the two has numbers that the first mapping had, whose content a copy still holds: reported whole.
        counts = sorted(len(pages_at(process, dirty, address, 512)) for address in (second, third))
        assert counts == [1, 512]
        puppet.do("held.update(more=[new(512, at=0x7d0000000000 + i * (4 << 20)) for i in range(3)])")
        with pytest.raises(dl.DirtyLogError, match=r"attach again, with spare="):
            process.harvest()


def test_the_parent_of_a_fork_stays_watched(puppet):
    address = puppet.do("new(512)")
    puppet.do(f"poke({address}, *range(512))")
    with attach(puppet.pid) as process:
        process.harvest()
        assert puppet.do(f"fork_and_write({address}, 1, 2)") == 0
        assert not pages_at(process, process.harvest(), address, 512) & {1, 2}
        puppet.do(f"poke({address}, 3)")
        assert pages_at(process, process.harvest(), address, 512) == {3}


def test_an_end_and_an_exec_are_errors_not_silence():
    for last in ("os._exit(0)", "os.execv('/bin/cat', ['cat'])"):
        with Puppet() as puppet, attach(puppet.pid) as process:
            process.harvest()
            assert process.alive
            puppet.tell(last)
            if "exec" in last:
                while Path(f"/proc/{puppet.pid}/comm").read_text() != "cat\n":
                    os.sched_yield()
                puppet.tell("done")
                assert puppet.answer() == "done\n"
            else:
                puppet.process.wait()
            for _ in range(2):
                with pytest.raises(dl.DirtyLogError, match="has ended, or has executed another program"):
                    process.harvest()
            assert not process.alive
            if "exec" not in last:
                with pytest.raises(dl.DirtyLogError, match="has ended"):
                    process.read(dl.DirtyPages.from_runs([[0, process.npages]], process.npages))


class Gone:
    """A watch whose scan is the first to meet the end of the memory."""

    def __init__(self, watch):
        self._watch = watch

    def __getattr__(self, name):
        return getattr(self._watch, name)

    def scan(self, *_):
        raise ProcessLookupError(3, "ioctl(PAGEMAP_SCAN)")


def test_an_end_that_comes_during_the_scan_is_said_as_any_other(puppet):
    with attach(puppet.pid) as process:
        member = process._first
        watch, member.watch = member.watch, Gone(member.watch)
        with pytest.raises(dl.DirtyLogError, match="has ended, or has executed another program"):
            process.harvest()
        member.watch = watch


def test_shared_memory_is_reported_whole_and_says_so_unless_it_is_trusted(puppet):
    address = puppet.do("new(512, flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS)")
    with attach(puppet.pid) as process:
        with pytest.warns(IncompleteLogWarning, match="trust_shared=True"):
            dirty = process.harvest()
        assert not dirty.exact
        assert pages_at(process, dirty, address, 512) == set(range(512))
        assert {region.kind for region in process.regions if region.start <= address < region.end} == {"shared"}
    with attach(puppet.pid, trust_shared=True) as process:
        process.harvest()
        puppet.do(f"poke({address}, 7)")
        dirty = process.harvest()
        assert dirty.exact
        assert pages_at(process, dirty, address, 512) == {7}


def test_a_selection_by_function_and_all_of_it(puppet):
    address = puppet.do("new(3)")
    small = puppet.do("new(2)")
    with attach(puppet.pid, select="all") as process:
        kinds = {region.kind for region in process.regions}
        assert {"stack", "heap", "anonymous"} <= kinds
        puppet.do(f"poke({address}, 1)")
        assert pages_at(process, process.harvest(), address, 3) == {1}
    with attach(puppet.pid, select=lambda area: area.start <= small < area.end) as process:
        assert len(process.regions) == 1
    with pytest.raises(ValueError, match="choose 'large'"):
        dl.attach(puppet.pid, select="everything")
    with pytest.raises(dl.DirtyLogError, match="looks like a guest's RAM"):
        dl.attach(puppet.pid, select="guest")


def test_it_is_a_source_of_a_log(puppet):
    address = puppet.do("new(512)")
    with attach(puppet.pid) as process:
        log = dl.DirtyLog()
        log.attach(process)
        observer = log.observer("backup")
        with observer.collect():
            pass
        puppet.do(f"poke({address}, 8)")
        with observer.collect() as epoch:
            assert pages_at(process, epoch.pages, address, 512) == {8}


def test_a_harvest_that_fails_half_way_is_made_good_by_the_next(puppet, monkeypatch):
    address = puppet.do("new(512)")
    with attach(puppet.pid) as process:
        process.harvest()
        puppet.do(f"poke({address}, 5)")
        with monkeypatch.context() as patch:
            patch.setattr("dirtylog.sources.process.process.np.concatenate", lambda parts: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                process.harvest()
        with pytest.warns(IncompleteLogWarning, match="failed half-way"):
            dirty = process.harvest()
        assert not dirty.exact
        assert pages_at(process, dirty, address, 512) == set(range(512))
        assert process.harvest().exact


def test_a_warning_that_is_an_error_costs_no_page(puppet):
    address = puppet.do("new(512, flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS)")
    private = puppet.do("new(512)")
    with attach(puppet.pid) as process:
        puppet.do(f"poke({private}, 4)")
        with pytest.raises(IncompleteLogWarning):
            process.harvest()
        dirty = process.harvest()
        assert 4 in pages_at(process, dirty, private, 512)
        assert pages_at(process, dirty, address, 512) == set(range(512))


# ---- what the process does not notice -------------------------------------------------------------------


RESTART_SYSCALL = 219
BLOCKED = {
    "nanosleep": ("nap(0.3)", (35, 230), None, (0, 0)),
    "poll": (
        "call('poll', (ctypes.c_int * 2)(held.setdefault('p', os.pipe())[0], 1), 1, 20000)",
        (7, 271),
        "w",
        (1, 0),
    ),
    "read": ("call('read', held.setdefault('p', os.pipe())[0], ctypes.create_string_buffer(4), 1)", (0,), "w", (1, 0)),
    "futex": (
        "call('syscall', 202, (ctypes.c_int * 1)(5), 128, 5, (ctypes.c_long * 2)(0, 300000000), 0, 0)",
        (202,),
        None,
        None,
    ),
}


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="numbers of system calls are those of x86-64")
@pytest.mark.parametrize("name", ["nanosleep", "poll", "read", "futex"])
def test_a_thread_that_waits_in_a_system_call_goes_on_waiting(puppet, name):
    expression, numbers, wake, expected = BLOCKED[name]
    puppet.do("held.setdefault('p', os.pipe())")
    write_end = puppet.do("held['p'][1]")
    puppet.tell(expression)
    while not until_in_call(puppet, numbers):
        puppet.answer()
        puppet.tell(expression)
    with attach(puppet.pid) as process:
        assert process.stopped > 0
    if wake:
        assert until_in_call(puppet, (*numbers, RESTART_SYSCALL))
        with open(f"/proc/{puppet.pid}/fd/{write_end}", "wb", buffering=0) as pipe:
            pipe.write(b"x")
    answer = literal_eval(puppet.answer())
    # A futex that nobody wakes times out; the others return what they would have returned.
    assert answer == (expected or (-1, errno.ETIMEDOUT))


def test_no_signal_is_lost_or_handled_twice(puppet):
    # Real-time signals queue: every one that was sent is there to be counted.
    number = int(signal.SIGRTMIN) + 3
    puppet.do(f"len(signal.pthread_sigmask(signal.SIG_BLOCK, [{number}]))")
    for _ in range(20):
        os.kill(puppet.pid, number)
        with attach(puppet.pid):
            os.kill(puppet.pid, number)
    assert puppet.do(f"waiting({number})") == 40


def test_the_signal_mask_is_what_it_was(puppet):
    def masks():
        lines = Path(f"/proc/{puppet.pid}/status").read_text().splitlines()
        # Not SigQ, which counts what is queued for all processes of the user.
        return [line for line in lines if line.startswith(("SigP", "ShdP", "SigB", "SigI", "SigC"))]

    puppet.do("str(signal.pthread_sigmask(signal.SIG_SETMASK, [signal.SIGUSR1, signal.SIGRTMIN + 1]))")
    before = masks()
    with attach(puppet.pid):
        pass
    after = masks()
    assert before == after


def test_a_thread_that_does_not_stop_in_time_is_let_go_where_this_process_traces_itself(puppet, monkeypatch):
    attach(puppet.pid).close()

    def only_by_a_parent(pid, tid, *, patience_ms, in_process):
        if not in_process:
            raise OSError(errno.EPERM, "ptrace(PTRACE_SEIZE): refused")
        return _remote.inject(pid, tid, patience_ms=-1, in_process=True)

    monkeypatch.setattr(attaching, "inject", only_by_a_parent)
    late = None
    while late is None:  # it may have stopped at once
        try:
            attaching.attach(puppet.pid).close()
        except dl.DirtyLogError as error:
            late = error
    assert "no thread" in str(late)
    puppet.tell("1")
    assert select.select([puppet.process.stdout], [], [], 60)[0]
    assert literal_eval(puppet.answer()) == 1


def test_patience_that_ends_when_the_thread_has_stopped_does_not_cut_its_call_short(puppet):
    attach(puppet.pid).close()
    descriptor = None
    with ThreadPoolExecutor(1) as pool:
        while descriptor is None:
            # Held before its fourth request: the thread has stopped, and its registers are still its own.
            answer = pool.submit(_remote.inject, puppet.pid, puppet.pid, patience_ms=50, stop_at=4)
            held = None
            while held is None and not answer.done():
                held = next((pid for pid in children(os.getpid()) if "T (stopped)" in status(pid)), None)
            if held is not None:
                over = time.monotonic() + 0.06
                while time.monotonic() < over:
                    os.sched_yield()
                os.kill(held, signal.SIGCONT)
            with suppress(TimeoutError):  # it has not stopped in time: once more
                descriptor = answer.result()[0]
    os.close(descriptor)
    assert puppet.do("1") == 1


def test_a_stopped_process_is_attached_to_and_stays_stopped(puppet):
    address = puppet.do("new(512)")
    puppet.process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, puppet.pid, os.WSTOPPED | os.WNOWAIT)
    with attach(puppet.pid) as process:
        # On its way back into the stop the process is runnable, and on a busy machine it stays so for a while.
        while "State:\tT" not in (status := Path(f"/proc/{puppet.pid}/status").read_text()):
            assert "State:\tR" in status
            os.sched_yield()
        puppet.process.send_signal(signal.SIGCONT)
        puppet.do(f"poke({address}, 2)")
        assert pages_at(process, process.harvest(), address, 512) == {2}


def test_many_rounds_leave_no_descriptor_and_no_mapping(puppet):
    with attach(puppet.pid):
        pass
    before, own = (puppet.do("descriptors()"), len(mappings(puppet.pid))), descriptors()
    for _ in range(100):
        with attach(puppet.pid) as process:
            process.harvest()
    assert (puppet.do("descriptors()"), len(mappings(puppet.pid))) == before
    assert not descriptors() - own


WATCHER = """
import sys
from dirtylog.sources.process import _remote
pid, stop_at = map(int, sys.argv[1:])
print("begin", flush=True)
_remote.inject(pid, pid, stop_at=stop_at)
print("end", flush=True)
"""


def children_of(pid):
    return [
        int(child)
        for task in os.listdir(f"/proc/{pid}/task")
        for child in Path(f"/proc/{pid}/task/{task}/children").read_text().split()
    ]


def test_a_watcher_that_is_killed_at_any_step_leaves_the_process_as_it_was(puppet, sanitized):
    with attach(puppet.pid):
        pass
    descriptor, _, calls = _remote.inject(puppet.pid, puppet.pid)
    os.close(descriptor)
    assert calls > 10
    # Under a sanitizer each takes a second; the program that is left alone is the same.
    for step in range(1, calls + 1, 5 if sanitized else 1):
        with warm.started(WATCHER, puppet.pid, step) as watcher:
            assert watcher.stdout.readline() == b"begin\n"
            helper = None
            while helper is None:
                for child in children_of(watcher.pid):
                    if (
                        ")" in (stat := Path(f"/proc/{child}/stat").read_text())
                        and stat.rpartition(")")[2].split()[0] == "T"
                    ):
                        helper = child
            watcher.kill()
            os.kill(helper, signal.SIGCONT)
        # The helper has finished, or is about to; then the process goes on, whole.
        while Path(f"/proc/{helper}").exists() and "State:\tZ" not in Path(f"/proc/{helper}/status").read_text():
            os.sched_yield()
        assert puppet.do("sum(range(1000))") == 499500
    assert "TracerPid:\t0" in Path(f"/proc/{puppet.pid}/status").read_text()
    assert puppet.do("descriptors()") == [0, 1, 2]


# ---- what is refused --------------------------------------------------------------------------------------


def test_what_cannot_be_attached_to_is_refused_by_name(puppet):
    with pytest.raises(ValueError, match="is this process itself; "):
        dl.attach(os.getpid())
    with pytest.raises(ValueError, match="process ids are 1 and more"):
        dl.attach(0)
    for wrong in ("1", 1.5):
        with pytest.raises(TypeError, match="integer"):
            dl.attach(wrong)
    with pytest.raises(ProcessLookupError, match="there is no process"):
        dl.attach(2**22 + 1)
    puppet.do("held.update(e=threading.Event()) or held.update(t=threading.Thread(target=held['e'].wait))")
    puppet.do("held['t'].start()")
    thread = next(tid for tid in map(int, os.listdir(f"/proc/{puppet.pid}/task")) if tid != puppet.pid)
    with pytest.raises(ValueError, match=rf"is a thread of process {puppet.pid}"):
        dl.attach(thread)
    puppet.do("held['e'].set()")


def test_a_process_that_has_ended_and_was_not_waited_for_is_refused():
    child = os.fork()
    if not child:
        os._exit(0)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    with pytest.raises(ProcessLookupError, match="has ended already"):
        dl.attach(child)
    os.waitpid(child, 0)


def test_a_filter_of_system_calls_is_respected_unless_forced(puppet):
    puppet.do("libc.prctl(38, 1, 0, 0, 0)")
    # One instruction: allow. The process is filtered all the same, and nobody outside knows by what.
    puppet.do("held.update(code=ctypes.create_string_buffer((0x7fff000000000006).to_bytes(8, 'little')))")
    puppet.do(
        "held.update(prog=ctypes.create_string_buffer((1).to_bytes(8, 'little') + "
        "ctypes.addressof(held['code']).to_bytes(8, 'little')))"
    )
    if puppet.do("libc.prctl(22, 2, held['prog'], 0, 0)"):
        pytest.skip("prctl(PR_SET_SECCOMP) is not permitted here")
    with pytest.raises(dl.DirtyLogError, match="seccomp filter"):
        dl.attach(puppet.pid)
    with attach(puppet.pid, force=True) as process:
        process.harvest()


def test_a_process_that_is_traced_already_is_refused(puppet):
    code = (
        "import ctypes, sys, os; libc = ctypes.CDLL(None); "
        f"assert libc.ptrace(0x4206, {puppet.pid}, 0, 0) == 0; print(flush=True); sys.stdin.read()"
    )
    tracer = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with tracer:
        if tracer.stdout.readline() != "\n":
            pytest.skip("one process may not trace another here")
        with pytest.raises(dl.DirtyLogError, match=rf"traced by process {tracer.pid}"):
            dl.attach(puppet.pid)
    with attach(puppet.pid) as process:
        process.harvest()


def test_whoever_may_not_trace_is_told_what_would_help(puppet, importable):
    if os.getuid():
        pytest.skip("it takes root to become another user")
    code = (
        "import os, sys\nimport dirtylog as dl\nfrom dirtylog.sources.process import attach\n"
        "os.setgid(65534); os.setuid(65534)\n"
        f"try: attach({puppet.pid})\nexcept PermissionError as error: print(error)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(dl.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert "ptrace_scope" in done.stdout, done.stderr
    assert "python -m dirtylog.agent" in done.stdout


# ---- handing over ---------------------------------------------------------------------------------------


def test_a_process_hands_its_memory_over_without_being_traced(puppet, tmp_path, importable):
    path = str(tmp_path / "agent.sock")
    address = puppet.do("new(512)")
    puppet.do(f"held.update(a=__import__('dirtylog.agent').agent.listen({path!r}))")
    assert os.stat(path).st_mode & 0o777 == 0o600
    with dl.attach(puppet.pid, handover=path) as process:
        assert process.stopped == 0
        process.harvest()
        puppet.do(f"poke({address}, 3)")
        assert pages_at(process, process.harvest(), address, 512) == {3}
    with Puppet() as other, pytest.raises(dl.DirtyLogError, match=f"is of process {puppet.pid}, not of {other.pid}"):
        dl.attach(other.pid, handover=path)
    assert [fd for fd in puppet.do("descriptors()") if fd > 4] == []


def test_a_script_run_by_the_agent_can_be_watched(tmp_path, importable):
    path = tmp_path / "agent.sock"
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\na = bytearray(4 << 20)\nprint(sys.argv, flush=True)\ninput()\na[1 << 20] = 1\nprint()\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(dl.__file__).parents[1])}
    other = subprocess.Popen(
        [sys.executable, "-m", "dirtylog.agent", "--socket", str(path), str(script), "one", "--two"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    with other:
        assert literal_eval(other.stdout.readline()) == [str(script), "one", "--two"]
        with dl.attach(other.pid, handover=path) as process:
            process.harvest()
        other.communicate("go\n")
    assert other.returncode == 0
    assert not path.exists()


def test_a_child_of_a_script_run_by_the_agent_leaves_the_socket_to_its_parent(tmp_path, importable):
    script, socket = tmp_path / "script.py", tmp_path / "socket"
    script.write_text(
        f"import os, sys\nif not os.fork(): sys.exit()\nos.wait()\nprint(os.path.exists({str(socket)!r}))"
    )
    # From 3.12 on Python warns of a fork beside threads, and the agent's is one.
    environment = {**os.environ, "PYTHONPATH": str(Path(dl.__file__).parents[1]), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "dirtylog.agent", "--socket", str(socket), str(script)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.stdout == "True\n", done.stderr
    assert not socket.exists()


def test_what_is_handed_over_is_never_inherited_by_a_program_that_another_thread_starts():
    import socket

    inherited = []

    class Looked(socket.socket):
        """Looks at what came before anybody can change it."""

        def recvmsg(self, *arguments):
            data, ancillary, *rest = super().recvmsg(*arguments)
            inherited.extend(os.get_inheritable(number) for number in array.array("i", ancillary[0][2]))
            return data, ancillary, *rest

    ours, theirs = socket.socketpair()
    with theirs, Looked(fileno=ours.detach()) as looked:
        try:
            inside.send_descriptors(theirs)
        except OSError as refused:
            pytest.skip(f"this process gets no userfaultfd: {refused}")
        for descriptor in handover.receive(looked, os.getpid()):
            os.close(descriptor)
    assert inherited == [False, False]


def test_a_process_that_cannot_be_looked_at_is_not_called_gone(monkeypatch):
    def refused(*_, **__):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(Path, "read_text", refused)
    with pytest.raises(OSError, match="Too many open files") as caught:
        dl.attach(os.getppid())
    assert not isinstance(caught.value, ProcessLookupError)


def test_whoever_is_no_agent_is_refused(tmp_path, puppet):
    import socket

    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(b"HTTP/1.1 200 OK\r\n")
        with pytest.raises(dl.DirtyLogError, match="not a dirtylog agent"):
            dl.attach(puppet.pid, handover=ours)


def test_address_space_reserved_by_the_terabyte_is_left_out_until_it_is_used(puppet):
    tib = 1 << 40
    # Whoever runs the tests may have set a limit, as tools/mutate.py does.
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.prlimit(puppet.pid, resource.RLIMIT_AS, (hard, hard))
    # 0x4000: MAP_NORESERVE.
    reserved = puppet.do(f"new({64 * tib // PAGE}, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)")
    assert reserved, "the kernel reserves no such range here"
    with attach(puppet.pid) as process:
        assert not any(region.start <= reserved < region.end for region in process.regions)
        assert process.npages < tib // PAGE
        puppet.do(f"poke({reserved}, 1000)")
        assert pages_at(process, process.harvest(), reserved, 2000) == {1000}
    # Who chooses areas by hand gets them whole, or a word why not.
    with attach(puppet.pid, select=lambda area: area.kind == "anonymous") as process:
        assert ["of page tables" in why for area, why in process.skipped.items() if area.start <= reserved < area.end]


# ---- page numbers that are given -----------------------------------------------------------------------


def test_places_are_watched_alone_and_numbered_as_they_say(puppet):
    one, two = puppet.do("new(16)"), puppet.do("new(16)")
    places = [(one + 2 * PAGE, one + 6 * PAGE, 1000), (two, two + 4 * PAGE, 10)]
    with attach(puppet.pid, select=places) as process:
        assert process.npages == 1004
        assert [(region.start, region.first_page, region.npages) for region in process.regions] == [
            (two, 10, 4),
            (one + 2 * PAGE, 1000, 4),
        ]
        process.harvest()
        puppet.do(f"poke({one}, 0, 1, 2, 5, 6, 7)")
        puppet.do(f"poke({two}, 0, 3, 4)")
        dirty = process.harvest()
        assert dirty.indices().tolist() == [10, 13, 1000, 1003]
        assert (process.read(dirty)[:, 7] == 1).all()


def test_a_place_that_would_fill_the_memory_with_page_tables_is_left_out(puppet, monkeypatch):
    address = puppet.do("new(64)")
    monkeypatch.setattr(stretches, "cannot_hold", lambda nbytes: "too much" if nbytes > 32 * PAGE else "")
    for npages, left_out in ((33, ["too much"]), (32, [])):
        with attach(puppet.pid, select=[(address, address + npages * PAGE, 0)]) as process:
            assert [why for area, why in process.skipped.items() if area.start <= address < area.end] == left_out
            assert [region.npages for region in process.regions] == [32] * (not left_out)


def test_memory_that_is_mapped_anew_at_a_place_is_reported_whole_under_its_numbers(puppet):
    address = puppet.do("new(16)")
    with attach(puppet.pid, select=[(address, address + 16 * PAGE, 7)]) as process:
        process.harvest()
        puppet.do(f"libc.munmap({address}, 16 * PAGE)")
        assert process.harvest().count == 0
        assert puppet.do(f"new(16, at={address})") == address
        assert process.harvest().indices().tolist() == list(range(7, 23))


@pytest.mark.parametrize(
    ("places", "error", "words"),
    [
        ([], ValueError, "empty sequence"),
        ([(PAGE, PAGE, 0)], ValueError, "not one or more whole pages"),
        ([(PAGE, 2 * PAGE + 1, 0)], ValueError, "not one or more whole pages"),
        ([(PAGE, 2 * PAGE, -1)], ValueError, "not one or more whole pages"),
        ([(PAGE, 3 * PAGE, 0), (2 * PAGE, 4 * PAGE, 9)], ValueError, "overlap"),
        ([(PAGE, 3 * PAGE, 0), (4 * PAGE, 6 * PAGE, 1)], ValueError, "overlap"),
        ([(PAGE, 2 * PAGE)], ValueError, "unpack"),
        ([(PAGE, 2.0 * PAGE, 0)], TypeError, "integer"),
        ([(1 << 20, 2 << 20, 0)], dl.DirtyLogError, "no writable memory from 0x100000 to 0x200000"),
    ],
)
def test_places_that_cannot_be_are_refused(puppet, places, error, words):
    attach(puppet.pid).close()
    with pytest.raises(error, match=words):
        dl.attach(puppet.pid, select=places)


def test_places_are_not_those_of_children(puppet):
    address = puppet.do("new(16)")
    with pytest.raises(ValueError, match="follow no children"):
        dl.attach(puppet.pid, select=[(address, address + PAGE, 0)], follow_children=True)
