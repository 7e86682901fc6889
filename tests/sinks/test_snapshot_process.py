"""Snapshots of another process's memory: what they hold, what they say, and that the process runs on."""

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

import dirtylog as dl
from dirtylog import cli
from dirtylog.sinks import snapshot
from dirtylog.sinks.snapshot import processes
from dirtylog.sinks.snapshot.processes import diff_process, process_of, save_process
from dirtylog.sources.process import Area, freezing
from dirtylog.sources.process.contents import held_pages

from ..sources.test_process import PAGE, Puppet


@pytest.fixture(scope="module")
def shared_puppet():
    with Puppet() as one:
        try:
            held_pages(one.pid, [], 1)
            with freezing.frozen(one.pid):
                pass
        except OSError as missing:
            pytest.skip(f"the memory of another process cannot be read here: {missing}")
        yield one


@pytest.fixture
def puppet(shared_puppet):
    yield shared_puppet
    shared_puppet.do("[libc.munmap(*each) for each in held.pop('mapped', [])]")


def new(puppet, npages, how="new({})"):
    address = puppet.do(how.format(npages))
    puppet.do(f"held.setdefault('mapped', []).append(({address}, {npages} * PAGE))")
    return address


def bytes_at(path, address, npages):
    """What a snapshot has of memory at an address."""
    memory = snapshot.restore(path)
    for region in process_of(snapshot.info(path))[1]:
        if region.start <= address and address + npages * PAGE <= region.end:
            first = region.first_page * PAGE + address - region.start
            return memory[first : first + npages * PAGE]
    raise AssertionError(f"{address:#x} is not in the snapshot")


def test_a_chain_of_diffs_follows_memory_that_comes_and_goes(puppet, tmp_path):
    first = new(puppet, 300)
    puppet.do(f"poke({first}, 3, 299)")
    base = save_process(tmp_path / "base", puppet.pid, sync=False)
    assert bytes_at(base.path, first, 300)[[3 * PAGE + 7, 299 * PAGE + 7]].tolist() == [1, 1]
    second = new(puppet, 200)
    puppet.do(f"poke({second}, 5), poke({first}, 3)")
    one = diff_process(tmp_path / "one", puppet.pid, sync=False, parent=base.path)
    assert one.count < 200
    assert bytes_at(one.path, first, 300)[[3 * PAGE + 7, 299 * PAGE + 7]].tolist() == [2, 1]
    assert bytes_at(one.path, second, 200)[5 * PAGE + 7] == 1
    puppet.do("[libc.munmap(*each) for each in held.pop('mapped')]")
    third = new(puppet, 250, f"new({{}}, at={first})")
    two = diff_process(tmp_path / "two", puppet.pid, sync=False, parent=one.path, freeze="ptrace")
    assert third == first
    assert not bytes_at(two.path, third, 250).any()
    assert snapshot.verify(two.path).state == two.state


def test_what_is_only_reserved_is_neither_read_nor_kept(puppet, tmp_path):
    reserve = new(puppet, (8 << 30) // PAGE, "new({}, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)")
    puppet.do(f"poke({reserve}, 1000)")
    shared = new(puppet, 4096, "new({}, flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS)")
    puppet.do(f"poke({shared}, 7)")
    about = save_process(tmp_path / "base", puppet.pid, sync=False)
    assert about.nbytes < 4 << 30
    assert about.allocated < 64 << 20
    regions = process_of(about)[1]
    held = held_pages(puppet.pid, regions, about.npages)
    region = next(region for region in regions if region.start == shared)
    inside = held & dl.DirtyPages.from_runs([[region.first_page, 4096]], about.npages)
    # Where nothing was written, the kernel says to root alone: to others all of it may hold something.
    looked_into = os.access(f"/proc/{puppet.pid}/map_files/{region.start:x}-{region.end:x}", os.R_OK)
    assert inside.indices().tolist() == [region.first_page + page for page in ([7] if looked_into else range(4096))]
    assert snapshot.restore(about.path)[(region.first_page + 7) * PAGE + 7] == 1


def test_a_process_that_maps_more_than_there_is_room_for_asks_for_a_full_snapshot(puppet, tmp_path):
    base = save_process(tmp_path / "base", puppet.pid, sync=False)
    new(puppet, (3 << 30) // PAGE)
    with pytest.raises(dl.DirtyLogError, match="save a full one again"):
        diff_process(tmp_path / "one", puppet.pid, sync=False, parent=base.path)
    assert os.listdir(tmp_path) == ["base"]


@pytest.mark.parametrize("seed", range(20))
def test_memory_keeps_its_numbers_and_what_is_new_gets_numbers_that_nobody_has(seed):
    rng = np.random.default_rng(seed)

    def stretches_of(mapped):
        edges = np.flatnonzero(np.diff(mapped.astype(np.int8), prepend=0, append=0)).reshape(-1, 2) * PAGE
        return [(start, end, Area(start, end, True, False, "")) for start, end in edges.tolist()]

    def numbers(regions):
        return {
            region.start // PAGE + page: region.first_page + page for region in regions for page in range(region.npages)
        }

    regions, before = [], {}
    for _ in range(6):
        mapped = rng.random(80) < rng.choice([0.1, 0.5, 0.9])
        regions = processes._number(stretches_of(mapped), regions, 4096, 1)
        after = numbers(regions)
        assert sorted(after) == np.flatnonzero(mapped).tolist()
        assert len(set(after.values())) == len(after)
        assert {page: after[page] for page in after.keys() & before.keys()} == {
            page: before[page] for page in after.keys() & before.keys()
        }
        before = after


def test_places_without_memory_are_said_to_be(puppet, tmp_path, monkeypatch):
    address = new(puppet, 16)
    places = [(address, address + 16 * PAGE, 0)]
    save_process(tmp_path / "base", puppet.pid, select=places, sync=False)
    # Unmapped after the places were looked at.
    monkeypatch.setattr(processes, "mappings", lambda pid: [])
    for take in (save_process, lambda *words, **how: diff_process(*words, parent=tmp_path / "base", **how)):
        with pytest.raises(dl.DirtyLogError, match=f"process {puppet.pid} has no memory any more in the 1 places"):
            take(tmp_path / "next", puppet.pid, select=places, sync=False)


def test_a_diff_over_something_else_is_refused(puppet, tmp_path):
    snapshot.save(tmp_path / "array", np.ones(PAGE, np.uint8))
    with pytest.raises(snapshot.SnapshotError, match="not a snapshot of the memory of process"):
        diff_process(tmp_path / "one", puppet.pid, sync=False, parent=tmp_path / "array")


def test_state_that_cannot_be_is_an_error_and_not_a_crash(tmp_path):
    for regions in ([[0, 0, 99, "heap", "", 1]], [[0, -1, 1, "heap", "", 1]], [["x"]], None):
        about = snapshot.save(
            tmp_path / "base", np.ones(PAGE, np.uint8), state={"process": {"regions": regions}}, replace=True
        )
        with pytest.raises(snapshot.SnapshotError, match="regions"):
            process_of(about)
    assert process_of(snapshot.save(tmp_path / "other", np.ones(9, np.uint8), state=[1])) is None


# ---- holding it still ---------------------------------------------------------------------------------

THREADS = "[threading.Thread(target=signal.pause, daemon=True).start() for _ in range(3)]"


def states(pid):
    status = (Path(f"/proc/{pid}/task/{tid}/status").read_text() for tid in os.listdir(f"/proc/{pid}/task"))
    return {text.partition("State:\t")[2][0] for text in status}


def test_every_thread_stands_still_while_it_is_frozen_and_goes_on_afterwards():
    with Puppet() as puppet:
        puppet.do(THREADS)
        puppet.tell("nap(0.05)")
        with freezing.frozen(puppet.pid):
            assert states(puppet.pid) == {"t"}
            os.kill(puppet.pid, signal.SIGWINCH)
        assert puppet.answer() == "(0, 0)\n"
        puppet.process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, puppet.pid, os.WSTOPPED | os.WNOWAIT)
        with freezing.frozen(puppet.pid):
            pass
        while states(puppet.pid) != {"T"}:  # on its way back to where it was, never in the program
            os.sched_yield()
        puppet.process.send_signal(signal.SIGCONT)
        assert "TracerPid:\t0\n" in puppet.do("open('/proc/self/status').read()")


def test_a_process_that_has_ended_or_may_not_be_frozen_is_said():
    with pytest.raises(ProcessLookupError), freezing.frozen(2**22 + 1):
        pass
    with pytest.raises(ValueError, match="'ptrace', 'cgroup'"), freezing.frozen(1, "ice"):
        pass
    with pytest.raises(OSError), freezing.frozen(os.getpid()):  # noqa: PT011 - a thread cannot trace its own process
        pass
    assert all(thread.name != "dirtylog freeze" for thread in threading.enumerate())


def test_a_thread_that_does_not_stop_in_time_is_let_go(puppet, monkeypatch):
    def late(tid, patience):
        raise TimeoutError(110, "no stop")

    monkeypatch.setattr(freezing, "hold", late)
    with pytest.raises(dl.DirtyLogError, match="uninterruptible"), freezing.frozen(puppet.pid):
        pass
    assert puppet.do("1") == 1


@pytest.fixture(params=["unified", "freezer", ""], ids=["version 2", "version 1", "version 2 alone"])
def group(request):
    file = "freezer.state" if request.param == "freezer" else "cgroup.freeze"
    made = freezing.CGROUPS / request.param / f"dirtylog-test-{os.getpid()}"
    try:
        made.mkdir()
    except OSError as missing:
        pytest.skip(f"there is no such control group here: {missing}")
    try:
        if not (made / file).exists():
            pytest.skip("groups of this kind cannot be frozen here")
        yield made, file
    finally:
        made.rmdir()


def test_a_control_group_is_frozen_and_thawed(group, puppet):
    made, file = group
    own = Path("/proc/self/cgroup").read_text()
    home = made.parent / next(
        (line.split(":", 2)[2] for line in own.splitlines() if line.split(":")[1] in ("", "freezer")), ""
    ).lstrip("/")
    before = (made / file).read_text()
    try:
        (made / "cgroup.procs").write_text(f"{puppet.pid}\n")
        with freezing.frozen(puppet.pid, "cgroup"):
            assert (made / file).read_text() != before
            with freezing.frozen(puppet.pid, "cgroup"):
                pass  # somebody else's freezing outlives ours
            assert (made / file).read_text() != before
            puppet.tell("2 + 2")
        assert puppet.answer() == "4\n"
        assert (made / file).read_text() == before
        assert freezing._own_group_within(home) or not (home / file).exists()
        # Killed while it froze: the group thaws.
        code = (
            "import os, signal; from dirtylog.sources.process.freezing import frozen\n"
            f"with frozen({puppet.pid}, 'cgroup'): os.kill(os.getpid(), signal.SIGKILL)"
        )
        environment = {**os.environ, "PYTHONPATH": str(Path(dl.__file__).parents[1])}
        subprocess.run([sys.executable, "-c", code], env=environment)
        assert puppet.do("3 + 3") == 6
    finally:
        with contextlib.suppress(OSError):
            (home / "cgroup.procs").write_text(f"{puppet.pid}\n")


@pytest.mark.parametrize(
    ("pid", "error", "words"),
    [
        (2**22 + 1, ProcessLookupError, "there is no process"),
        (0, ValueError, "process ids are 1 and more"),
        (2, ValueError, "thread of the kernel"),
    ],
)
@pytest.mark.parametrize("freeze", [None, "ptrace"])
def test_what_is_no_process_with_memory_has_no_snapshot(pid, error, words, freeze, tmp_path):
    if pid == 2 and Path("/proc/2/comm").exists() and Path("/proc/2/comm").read_text() != "kthreadd\n":
        pytest.skip("the kernel's threads are not seen here: this is a container")
    with pytest.raises(error, match=words):
        save_process(tmp_path / "s", pid, freeze=freeze, sync=False)
    assert not list(tmp_path.iterdir())


def test_a_process_that_may_not_be_read_is_refused_with_what_it_would_take(puppet, tmp_path, monkeypatch):
    def refused(pid):
        raise PermissionError(errno.EACCES, "Permission denied", f"/proc/{pid}/maps")

    monkeypatch.setattr("dirtylog.sinks.snapshot.processes.mappings", refused)
    with pytest.raises(PermissionError, match="ptrace_scope is"):
        save_process(tmp_path / "s", puppet.pid, sync=False)


# ---- the command --------------------------------------------------------------------------------------


def test_the_command_says_what_the_snapshot_holds_and_whether_it_was_paused(puppet, tmp_path, capsys):
    base, diff = str(tmp_path / "base"), str(tmp_path / "diff")
    pid = str(puppet.pid)
    assert cli.main(["snapshot", "save", base, "--pid", pid, "--freeze", "--no-sync"]) == 0
    said = capsys.readouterr().out
    assert "memory, not registers" in said
    assert "paused by ptrace" in said
    assert cli.main(["snapshot", "diff", diff, "--parent", base, "--pid", pid, "--no-sync", "--json"]) == 0
    process = json.loads(capsys.readouterr().out)["state"]["process"]
    assert (process["pid"], process["paused"], process["holds"]) == (puppet.pid, None, "memory, not registers")
    assert cli.main(["snapshot", "info", diff]) == 0
    assert "it ran on meanwhile" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["save", "s"], "one of them"),
        (["save", "s", "image", "--pid", "1"], "one of them"),
        (["save", "s", "image", "--freeze"], "--freeze is about a running process"),
        (["diff", "s", "image", "--parent", "p", "--select", "all"], "--select is about a running process"),
        (["diff", "s", "--pid", "1", "--parent", "p", "--bitmap", "b"], "--bitmap is about an image"),
        (["save", "s", "--pid", "1", "--page-size", "512"], "--page-size is about an image"),
    ],
)
def test_options_that_do_not_go_together_are_refused(words, said, capsys):
    assert cli.main(["snapshot", *words]) != 0
    assert said in capsys.readouterr().err
