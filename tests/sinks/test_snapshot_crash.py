"""Snapshots that are interrupted: a full disk, a size limit, a kill at any step leave the last good chain."""

import errno
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dirtylog import DirtyBitmap, DirtyLog, DirtyPages
from dirtylog.sinks._bytes.pageio import rename_noreplace
from dirtylog.sinks.snapshot import clean, rebase, restore, save, save_diff, staged, verify

from .. import warm

NPAGES = 64
ROOT = Path(__file__).parents[2]


def states(seed, n):
    """Return the memory at n moments, and what was dirty from each to the next."""
    rng = np.random.default_rng(seed)
    memory = rng.integers(0, 256, NPAGES * 4096, np.uint8)
    moments, dirty = [memory.copy()], []
    for _ in range(1, n):
        pages = rng.choice(NPAGES, 12, replace=False)
        for page in pages:
            memory[page * 4096 : page * 4096 + 4096] = rng.integers(0, 256) if rng.random() < 0.8 else 0
        moments.append(memory.copy())
        dirty.append(DirtyPages.from_indices(pages, NPAGES))
    return moments, dirty


def logged(memory):
    bitmap = DirtyBitmap(memory.nbytes // 4096)
    log = DirtyLog()
    log.attach(bitmap)
    return bitmap, log.observer("backup")


def check_failed_and_retried(directory, observer, memory, expected_errno, make_room):
    """A diff fails, changes nothing, rolls its epoch back, and is written in full once there is room."""
    before = sorted(os.listdir(directory))
    with pytest.raises(OSError, match="diff") as caught, observer.collect() as epoch:  # noqa: PT012
        first = epoch.pages
        save_diff(directory / "diff", memory, epoch.pages, parent=directory / "base")
    assert caught.value.errno == expected_errno
    assert sorted(os.listdir(directory)) == before
    verify(directory / "base")
    make_room()
    with observer.collect() as epoch:
        assert epoch.pages == first
        assert epoch.number == 1
        save_diff(directory / "diff", memory, epoch.pages, parent=directory / "base")
    assert (restore(directory / "diff") == memory).all()


@pytest.fixture
def small_disk(tmp_path):
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no small disk: mount -t tmpfs answered {mounted.returncode}: {mounted.stderr.strip()}")
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_full_disk_leaves_the_chain_and_rolls_the_epoch_back(small_disk):
    memory = np.zeros(1 << 21, np.uint8)
    memory[: 1 << 18] = 1
    save(small_disk / "base", memory)
    (small_disk / "ballast").write_bytes(bytes(400 << 10))
    bitmap, observer = logged(memory)
    memory[1 << 18 : 5 << 17] = 2
    bitmap.mark_range(64, 96)
    check_failed_and_retried(small_disk, observer, memory, errno.ENOSPC, lambda: os.truncate(small_disk / "ballast", 0))


def test_a_file_size_limit_leaves_the_chain_and_rolls_the_epoch_back(tmp_path):
    memory = np.zeros(1 << 21, np.uint8)
    save(tmp_path / "base", memory)
    bitmap, observer = logged(memory)
    memory[::4096] = 2
    bitmap.mark_range(0, 512)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        check_failed_and_retried(
            tmp_path, observer, memory, errno.EFBIG, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)


class InterruptedWorkError(Exception):
    pass


class Steps:
    """The system calls of a transaction, the k-th of which fails or kills; stands in for the `os` module."""

    NAMES = ("open", "ftruncate", "pwrite", "fsync", "rename", "rename_noreplace", "close", "unlink")
    # What may have happened although it answered an error. An open that failed has opened nothing.
    DONE_AND_FAILED = ("ftruncate", "pwrite", "fsync", "rename", "rename_noreplace", "unlink")

    def __init__(self, at, strike, after, names=NAMES):
        self.at, self.strike, self.after, self.names, self.taken = at, strike, after, names, 0

    def __getattr__(self, name):
        # No power is cut here, so that a sync is a step like the others and need not wait for a disk.
        functions = {"fsync": os.fstat, "rename_noreplace": rename_noreplace}
        function = functions.get(name) or getattr(os, name)
        if name not in self.names:
            return function

        def step(*args, **kwargs):
            self.taken += 1
            hit = self.taken == self.at
            if hit and not self.after:
                self.strike()
            try:
                return function(*args, **kwargs)
            finally:
                # After a call that failed, too: a name that is not there is an answer.
                if hit and self.after:
                    self.strike()

        return step


def set_steps(steps, setter=setattr):
    """Let the writer make its system calls by way of `steps`."""
    setter(staged, "os", steps)
    setter(staged, "rename_noreplace", steps.rename_noreplace)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def strike_with_error():
    raise InterruptedWorkError


def work(directory, moments, dirty, progress):
    """Two diffs over a base, and a rebase: what the interrupted process does."""
    for i in (1, 2):
        save_diff(directory / f"s{i}", moments[i], dirty[i - 1], parent=directory / f"s{i - 1}", progress=progress)
    rebase(directory / "s0", directory / "s1", progress=progress)


def check_survivors(directory, moments, dirty):
    """Whatever has its name restores its moment; the rest can be written as if nothing had been."""
    base = restore(directory / "s0")
    rebased = (base == moments[1]).all()
    assert rebased or (base == moments[0]).all()
    verify(directory / "s0")
    there = [i for i in (1, 2) if (directory / f"s{i}").exists()]
    assert there in ([], [1], [1, 2])
    for i in there:
        verify(directory / f"s{i}")
        assert (restore(directory / f"s{i}") == moments[i]).all()
    for i in {1, 2} - set(there):
        save_diff(directory / f"s{i}", moments[i], dirty[i - 1], parent=directory / f"s{i - 1}", sync=False)
    rebase(directory / "s0", directory / "s1", sync=False)
    for i in (1, 2):
        assert (restore(directory / f"s{i}") == moments[i]).all()
    # Whoever writes next in the directory clears up after those who died there.
    rebase(directory / "s1", directory / "s2", sync=False)
    save(directory / "s2", moments[2], replace=True, sync=False)
    assert sorted(os.listdir(directory)) == ["s0", "s1", "s2"]


def count_steps(directory, moments, dirty, monkeypatch, names=Steps.NAMES):
    save(directory / "s0", moments[0], sync=False)
    steps = Steps(0, die, False, names)
    set_steps(steps, monkeypatch.setattr)
    work(directory, moments, dirty, lambda *_: None)
    monkeypatch.undo()
    return steps.taken


KILLED = """
import json, os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import tests.sinks.test_snapshot_crash as t
moments, dirty = t.states(1, 3)
statuses = []
for directory, at, after in json.loads(sys.argv[2]):
    directory = Path(directory)
    directory.mkdir()
    t.save(directory / "s0", moments[0], sync=False)
    child = os.fork()
    if child == 0:
        t.set_steps(t.Steps(at, t.die, after))
        t.work(directory, moments, dirty, lambda *_: None)
        os._exit(0)
    statuses.append(os.waitpid(child, 0)[1])
print(json.dumps(statuses))
"""


def test_a_kill_before_or_after_any_system_call_leaves_a_chain_that_restores(tmp_path, monkeypatch):
    moments, dirty = states(1, 3)
    (tmp_path / "count").mkdir()
    taken = count_steps(tmp_path / "count", moments, dirty, monkeypatch)
    assert taken > 20
    plan = [(str(tmp_path / f"{at}{after}"), at, after) for at in range(1, taken + 1) for after in (False, True)]
    process = warm.run(KILLED, ROOT, json.dumps(plan))
    assert process.returncode == 0, process.stderr
    assert json.loads(process.stdout) == [signal.SIGKILL] * len(plan)
    for directory, _, _ in plan:
        check_survivors(Path(directory), moments, dirty)


@pytest.mark.parametrize("after", [False, True])
def test_an_error_at_any_system_call_leaves_a_chain_that_restores(tmp_path, monkeypatch, after):
    moments, dirty = states(2, 3)
    names = Steps.DONE_AND_FAILED if after else Steps.NAMES
    (tmp_path / "count").mkdir()
    for at in range(1, count_steps(tmp_path / "count", moments, dirty, monkeypatch, names) + 1):
        directory = tmp_path / str(at)
        directory.mkdir()
        save(directory / "s0", moments[0], sync=False)
        set_steps(Steps(at, strike_with_error, after, names), monkeypatch.setattr)
        with pytest.raises(InterruptedWorkError):
            work(directory, moments, dirty, lambda *_: None)
        monkeypatch.undo()
        check_survivors(directory, moments, dirty)


WRITER = """
import os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import tests.sinks.test_snapshot_crash as t
moments, dirty = t.states(3, 40)
directory = Path(sys.argv[2])
def said(*_):
    os.write(1, b".")
t.save(directory / "s0", moments[0], progress=said, sync=False)
for i in range(1, 40):
    parent = directory / f"s{i - 1}"
    t.save_diff(directory / f"s{i}", moments[i], dirty[i - 1], parent=parent, progress=said, sync=False)
    said()
"""


@pytest.mark.parametrize("seed", range(6))
def test_a_kill_at_a_random_moment_leaves_a_chain_that_restores(tmp_path, seed):
    moments, _ = states(3, 40)
    rng = np.random.default_rng(seed)
    with warm.started(WRITER, ROOT, tmp_path) as process:
        # The writer says when it gets on; after so many words it is shot, wherever it is by then.
        for _ in range(int(rng.integers(3, 75))):
            assert process.stdout.read(1) == b"."
        process.kill()
    last = max(int(name[1:]) for name in os.listdir(tmp_path) if name[0] == "s")
    for i in range(last + 1):
        assert (restore(tmp_path / f"s{i}") == moments[i]).all()
    verify(tmp_path / f"s{last}")


def test_a_writer_that_lives_is_not_cleared_away(tmp_path):
    with staged.Staged(str(tmp_path / "s"), 4096, sync=False, replace=False, mode=None) as writer:
        assert clean(tmp_path, elsewhere=True) == []
        assert os.path.exists(writer.part)
    assert os.listdir(tmp_path) == []


def test_a_part_file_that_cannot_be_removed_keeps_no_descriptor(tmp_path, monkeypatch):
    writer = staged.Staged(str(tmp_path / "s"), 4096, sync=False, replace=False, mode=None)
    descriptor = writer.descriptor

    def refused(path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)

    with monkeypatch.context() as patched:
        patched.setattr(os, "unlink", refused)
        for _ in range(2):
            with pytest.raises(PermissionError):
                writer.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)
    # It is still its to remove.
    writer.close()
    assert os.listdir(tmp_path) == []


def test_a_writer_that_lives_in_another_process_is_not_cleared_away(tmp_path):
    program = (
        "import sys\nfrom dirtylog.sinks.snapshot import staged\n"
        "w = staged.Staged(sys.argv[1] + '/s', 4096, sync=False, replace=False, mode=None)\nprint(w.part, flush=True)\n"
        "sys.stdin.read()\nimport os; os._exit(0)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )  # fmt: skip
    with process:
        part = process.stdout.readline().strip()
        assert clean(tmp_path) == []
        assert os.path.exists(part)
        process.stdin.close()
        process.wait()
    # Now that it is dead it is removed by whoever writes there next, whatever the name.
    save(tmp_path / "other", b"x" * 4096, sync=False)
    assert os.listdir(tmp_path) == ["other"]


def test_the_part_file_of_a_writer_on_another_machine_is_removed_only_when_asked(tmp_path):
    part = tmp_path / ".dirtylog.0123456789ab.1.5.0123456789abcdef.part"
    part.touch()
    (tmp_path / ".dirtylog.notes").touch()
    assert clean(tmp_path) == []
    assert clean(tmp_path, elsewhere=True) == [str(part)]
    assert os.listdir(tmp_path) == [".dirtylog.notes"]
