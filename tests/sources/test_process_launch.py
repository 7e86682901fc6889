"""A program that is started to be watched, and the children of one that is: all of it, to the end."""

import errno
import mmap
import os
import signal
import subprocess
import sys
import threading
from ast import literal_eval
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import dirtylog as dl
from dirtylog.errors import BackendUnavailable, IncompleteLogWarning
from dirtylog.sources.process import attaching
from dirtylog.sources.process import launch as launching
from dirtylog.sources.process.freezing import frozen
from dirtylog.sources.process.regions import THREAD_STACK, mappings

from .test_process import Puppet, attach, pages_at

pytestmark = pytest.mark.usefixtures("plain_programs")
PUPPET = Path(__file__).with_name("puppet.py")
PAGE = mmap.PAGESIZE


class Told:
    """A puppet that was started to be watched, with pipes for its orders and answers."""

    def __init__(self):
        theirs_in, self._orders = os.pipe()
        self._answers, theirs_out = os.pipe()
        for descriptor in (theirs_in, theirs_out):
            os.set_inheritable(descriptor, True)
        # One program becomes another: what is watched from then on is the second.
        command = (
            f"import os; os.dup2({theirs_in}, 0); os.dup2({theirs_out}, 1); os.closerange(3, 256); "
            f"os.execv({sys.executable!r}, [{sys.executable!r}, {str(PUPPET)!r}])"
        )
        try:
            self.program = launching.launch([sys.executable, "-c", command])
        except BackendUnavailable as missing:
            pytest.skip(f"watching a program does not work here: {missing}")
        finally:
            os.close(theirs_in)
            os.close(theirs_out)
        self._reader = os.fdopen(self._answers, "r")
        self.pid = literal_eval(self._reader.readline())

    def tell(self, expression):
        os.write(self._orders, f"{expression}\n".encode())

    def answer(self):
        return literal_eval(self._reader.readline())

    def do(self, expression):
        self.tell(expression)
        return self.answer()

    def end(self):
        if self._orders >= 0:
            os.close(self._orders)
            self._orders = -1

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with self.program, self._reader:
            self.end()
            self.program.wait(60)


@pytest.fixture
def told():
    with Told() as one:
        yield one


def new_in(program, address, npages):
    return pages_at(program.process, program.process.harvest(), address, npages)


def test_what_is_written_is_reported_after_another_program_was_executed(told):
    assert told.pid == told.program.pid
    told.program.process.harvest()
    address = told.do("new(300)")
    told.do(f"poke({address}, 1, 299)")
    assert new_in(told.program, address, 300) == {1, 299}
    told.do(f"poke({address}, 7)")
    assert new_in(told.program, address, 300) == {7}


@pytest.mark.parametrize("end", ["os._exit(3)", "os.kill(os.getpid(), 9)", "os.kill(os.getpid(), 11)", "os.abort()"])
def test_what_was_written_last_is_there_however_the_program_ended(told, end):
    address = told.do("new(300)")
    told.program.process.harvest()
    told.tell(f"(poke({address}, 5, 6), {end})")
    assert told.program.wait(60)
    process = told.program.process
    assert not process.alive
    assert pages_at(process, process.peek(), address, 300) == {5, 6}
    dirty = process.harvest()
    assert pages_at(process, dirty, address, 300) == {5, 6}
    with pytest.raises(dl.DirtyLogError, match="has ended"):
        process.harvest()


def test_the_program_has_no_descriptor_thread_or_child_of_ours(told):
    assert told.do("descriptors()") == [0, 1, 2]
    assert told.do("len(os.listdir('/proc/self/task'))") == 1
    assert told.do("open('/proc/thread-self/children').read()") == ""
    assert "TracerPid:\t0\n" in told.do("open('/proc/self/status').read()")
    assert told.do("[signal.getsignal(n) == signal.SIG_DFL for n in (15, 10)]") == [True, True]
    assert told.do("signal.pthread_sigmask(signal.SIG_BLOCK, [])") == set()


def test_nothing_is_left_when_the_watch_ends(told):
    keeper = told.program.process._first.keeper
    assert os.path.exists(f"/proc/{keeper}")
    told.program.process.close()
    assert not os.path.exists(f"/proc/{keeper}")
    assert told.do("1 + 1") == 2


def test_a_program_is_waited_for_whatever_the_number_of_its_descriptor(many_open):
    pid = os.posix_spawnp("true", ["true"], os.environ)
    with launching.Program(pid, None, None) as program:
        assert program.wait(60)
        assert program.poll() == 0


SPAWNS = """
import os, sys
given = [(os.POSIX_SPAWN_OPEN, 0, sys.argv[1], os.O_RDONLY, 0)]
os.waitpid(os.posix_spawnp("true", ["true"], os.environ, file_actions=given), 0)
print("went on")
"""


@pytest.fixture
def spawning(tmp_path):
    """A program that nothing but its end stops: its child shares its memory, and waits before it is another one."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with subprocess.Popen([sys.executable, "-c", SPAWNS, fifo], stdout=subprocess.PIPE, text=True) as process:
        process.let_go = lambda: os.close(os.open(fifo, os.O_WRONLY))
        state = Path(f"/proc/{process.pid}/stat")
        while state.read_text().rpartition(")")[2].split()[0] != "D":
            os.sched_yield()
        yield process


def skip_where_refused(error, process):
    if error.errno == errno.EPERM:
        process.kill()
        process.let_go()
        pytest.skip(f"a child may not be traced here: {error}")


def test_a_program_that_does_not_stop_in_time_to_be_adopted_is_let_go(spawning):
    with pytest.raises(OSError, match=r"waiting for the thread to stop|SEIZE") as caught:
        attaching.adopt(spawning.pid, 0.01)
    skip_where_refused(caught.value, spawning)
    spawning.let_go()
    assert spawning.communicate(timeout=60) == ("went on\n", None)
    assert not [thread for thread in threading.enumerate() if thread.name == "dirtylog keeper" and thread.is_alive()]


@pytest.mark.parametrize(
    "stopping", [attaching.adopt, lambda pid, patience: frozen(pid, patience=patience).__enter__()]
)
def test_a_program_that_ends_while_it_is_told_to_stop_can_still_be_waited_for(spawning, stopping):
    def sleeps(thread):
        # nanosleep and clock_nanosleep of x86-64: the pause of a look for the stop.
        return Path(f"/proc/self/task/{thread}/syscall").read_text().split()[0] in ("35", "230")

    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(stopping, spawning.pid, 60)
        status = Path(f"/proc/{spawning.pid}/status")
        while not answer.done():
            tracer = int(status.read_text().partition("TracerPid:")[2].split()[0])
            if tracer and sleeps(tracer):
                spawning.kill()
                break
        error = answer.exception(60)
    assert isinstance(error, OSError)
    skip_where_refused(error, spawning)
    assert error.errno == errno.ESRCH
    spawning.let_go()
    assert spawning.wait(60) == -signal.SIGKILL


def test_a_program_that_cannot_be_executed_is_an_error_of_that_name():
    with pytest.raises(FileNotFoundError) as error:
        launching.launch(["/no/such/program"])
    assert error.value.filename == "/no/such/program"


def test_a_program_that_ends_before_it_opens_its_script_is_no_failure():
    with launching.launch([sys.executable, "-c", "raise SystemExit(4)"], begins=["never-opened"]) as program:
        assert program.wait(60)
        assert os.waitstatus_to_exitcode(program.poll()) == 4
        assert program.process is None


def test_the_start_of_an_interpreter_is_not_counted(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import os; os._exit(0)")
    sizes = []
    for begins in ([], [str(script)]):
        with launching.launch([sys.executable, str(script)], begins=begins) as program:
            assert program.wait(60)
            sizes.append(program.process.harvest().nbytes)
    assert sizes[1] < sizes[0] / 2


# ---- children -----------------------------------------------------------------------------------------

FORK = "(ready := os.pipe(), go := os.pipe(), child := os.fork(), child or ({work}, os.write(ready[1], b'x'), os.read(go[0], 1), os._exit(0)), os.read(ready[0], 1), held.update(go=go))[2]"  # noqa: E501
REAP = "(os.write(held['go'][1], b'x'), os.wait()[1])[1]"


@pytest.mark.parametrize("started", [True, False], ids=["started here", "attached to"])
def test_a_forked_child_is_watched_and_its_own_pages_alone_are_reported(started):
    with Told() if started else Puppet() as parent:
        address = parent.do("new(2000)")
        parent.do(f"poke({address}, *range(2000))")
        process = parent.program.process if started else attach(parent.pid, follow_children=True)
        process.harvest()
        child = parent.do(FORK.format(work=f"poke({address}, 3, 1999)"))
        parent.do(f"poke({address}, 8)")
        dirty = process.harvest()
        found = {}
        for region in process.regions:
            if region.start <= address < region.end or address <= region.start < address + 2000 * PAGE:
                inside = dirty & dl.DirtyPages.from_runs([[region.first_page, region.npages]], dirty.npages)
                shift = (region.start - address) // PAGE - region.first_page
                found.setdefault(region.pid, set()).update(page + shift for page in inside if 0 <= page + shift < 2000)
        assert found[parent.pid] == {8}
        # What the parent wrote after the fork, the child has for itself as well: the kernel cannot tell.
        assert {3, 1999} <= found[child] <= {3, 8, 1999}
        assert dirty.exact
        assert parent.do(REAP) == 0
        process.harvest()
        assert {region.pid for region in process.regions} == {parent.pid}
        process.close()


def test_children_that_there_are_already_start_clean():
    with Puppet() as parent:
        address = parent.do("new(2000)")
        child = parent.do(FORK.format(work=f"poke({address}, 3)"))
        with attach(parent.pid, follow_children=True) as process:
            assert child in {region.pid for region in process.regions}
            assert pages_at(process, process.harvest(), address, 2000) == set()
        assert parent.do(REAP) == 0


def test_a_child_that_is_there_already_and_larger_than_its_parent_takes_no_room_of_what_may_come():
    with Puppet() as parent:
        child = parent.do(FORK.format(work="new(150_000)"))
        with attach(parent.pid, follow_children=True) as process:
            assert process.missed == {}
            assert child in {region.pid for region in process.regions}
            assert process.npages - process.used_pages >= process.used_pages
            assert process.harvest().exact
        assert parent.do(REAP) == 0


def test_a_child_that_cannot_be_watched_is_named_and_nothing_is_exact_from_then_on(monkeypatch):
    with Puppet() as parent, attach(parent.pid, follow_children=True) as process:
        child = parent.do(FORK.format(work="0"))

        def refused(pid):
            raise PermissionError(1, "not this one")

        monkeypatch.setattr(process, "_enter", refused)
        with pytest.warns(IncompleteLogWarning, match=f"{child}.*not this one"):
            assert not process.harvest().exact
        assert list(process.missed) == [child]
        assert parent.do(REAP) == 0


def test_stacks_of_threads_are_told_apart():
    with Puppet() as puppet:
        puppet.do("held.update(e=threading.Event())")
        puppet.do("[threading.Thread(target=held['e'].wait).start() for _ in range(5)]")
        assert sum(area.name == THREAD_STACK for area in mappings(puppet.pid)) == 5
        with attach(puppet.pid) as process:
            assert "stack" not in {region.kind for region in process.regions}
        puppet.do("held['e'].set()")


def test_memory_that_is_reserved_and_not_touched_is_not_watched_and_costs_no_page_tables(told):
    def tables():
        status = Path(f"/proc/{told.pid}/status").read_text()
        return int(status.partition("VmPTE:")[2].split()[0])

    told.program.process.harvest()
    before = tables()
    pages = 64 << 18  # 64 GiB
    address = told.do(f"new({pages}, 0x4022)")
    told.do(f"poke({address}, 5)")
    assert new_in(told.program, address, pages) == {5}
    told.do(f"poke({address}, 6, {pages - 1})")
    assert new_in(told.program, address, pages) == {6, pages - 1}
    assert tables() < before + 2048


def test_an_end_of_passing_signals_on_that_never_began_changes_no_handler(importable):
    command = (
        # What a shell starts in the background ignores it.
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from dirtylog.sources.process import _remote; _remote.pass_signals(0)\n"
        "try: signal.raise_signal(signal.SIGINT)\n"
        "except KeyboardInterrupt: print('ours')"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(dl.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, env=environment)
    assert done.stdout == "ours\n"


def test_signals_that_somebody_sends_to_the_watcher_are_passed_on(tmp_path, importable):
    script = tmp_path / "script.py"
    script.write_text(
        "import signal, sys\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(9))\n"
        "print('ready', flush=True)\nsignal.pause()\n"
    )
    import subprocess

    command = [sys.executable, "-m", "dirtylog", "profile", "--output", str(tmp_path / "report"), str(script)]
    watcher = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with watcher:
        first = watcher.stdout.readline()
        if not first:
            pytest.skip(watcher.stderr.read())
        watcher.send_signal(signal.SIGTERM)
        assert watcher.wait() == 9
    assert "dirtied per second" in (tmp_path / "report").read_text()
