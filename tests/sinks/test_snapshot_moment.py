"""Snapshots of a moment that a child process holds: threads, signals, a child that dies, and who waits for children."""

import errno
import mmap
import os
import signal
import threading
import warnings

import numpy as np
import pytest

import dirtylog as dl
from dirtylog import DirtyPages
from dirtylog.sinks import snapshot
from dirtylog.sinks.snapshot import SnapshotError, _child

from .. import warm

pytestmark = pytest.mark.skipif(not _child.available(), reason="no fork without handlers and signals on this system")


def saved(directory, memory, pages, **options):
    return snapshot.save_diff(
        directory / "diff", memory, pages, parent=directory / "base", sync=False, moment="fork", **options
    )


def test_what_is_written_after_the_moment_is_not_in_it(tmp_path):
    memory = np.arange(3000 * 512, dtype=np.int64)
    as_it_was, told = memory.copy(), []

    def taken(done, total):
        told.append((done, total))
        memory[:] = -1

    info = snapshot.save(tmp_path / "base", memory, sync=False, moment="fork", progress=taken)
    assert told[0] == (0, memory.nbytes)
    assert told[-1] == (memory.nbytes, memory.nbytes)
    assert info.count == 3000
    assert (snapshot.restore(tmp_path / "base") == as_it_was).all()
    snapshot.verify(tmp_path / "base")


def test_a_diff_holds_the_moment_of_all_arrays_and_an_empty_one_needs_no_child(tmp_path, monkeypatch):
    arrays = {"a": np.ones(5000), "b": np.ones(3, np.int8), "c": np.ones((70, 90), order="F")}
    snapshot.save(tmp_path / "base", arrays, sync=False)
    for array in arrays.values():
        array[:] = 2

    def taken(*_):
        for array in arrays.values():
            array[:] = 3

    pages = {name: DirtyPages._all(-(-each.nbytes // 4096), 4096, exact=True) for name, each in arrays.items()}
    saved(tmp_path, arrays, pages, progress=taken)
    snapshot.verify(tmp_path / "diff")
    found = snapshot.restore(tmp_path / "diff")
    assert all((each == 2).all() for each in found.values())
    nothing, made = {name: each ^ each for name, each in pages.items()}, []
    monkeypatch.setattr(_child, "write_moment", lambda *_: made.append(1))
    snapshot.save_diff(tmp_path / "next", arrays, nothing, parent=tmp_path / "diff", sync=False, moment="fork")
    assert (snapshot.restore(tmp_path / "next")["a"] == 2).all()
    assert not made


def test_a_thread_that_holds_every_lock_is_in_nobodys_way(tmp_path):
    memory, stop, running = np.ones(1 << 18), threading.Event(), threading.Event()

    def busy():
        while not stop.is_set():
            # Allocates, imports, warns and writes: all that would deadlock a child that runs Python.
            bytes(1 << 16)
            memory[::512] += 1
            running.set()

    threads = [threading.Thread(target=busy) for _ in range(3)]
    for each in threads:
        each.start()
    try:
        running.wait()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for i in range(3):
                snapshot.save(tmp_path / f"s{i}", memory, sync=False, moment="fork")
    finally:
        stop.set()
        for each in threads:
            each.join()
    for i in range(3):
        snapshot.verify(tmp_path / f"s{i}")


def test_a_child_that_is_killed_rolls_the_epoch_back(tmp_path, monkeypatch):
    memory = dl.zeros(1 << 24, "uint8")
    snapshot.save(tmp_path / "base", memory, sync=False)
    with dl.track(memory) as tracker:
        log = dl.DirtyLog()
        log.attach(tracker)
        observer = log.observer("backup")
        memory[:] = 1
        write_moment = _child.write_moment

        def killed(_, pieces, taken):
            # Writing nowhere, for a minute.
            endless = np.tile(np.array([[4096, 0, 1 << 46]]), (5000, 1))
            with open(os.devnull, "wb") as nowhere:
                return write_moment(nowhere.fileno(), endless, lambda pid: os.kill(pid, signal.SIGKILL))

        with monkeypatch.context() as patched:
            patched.setattr(_child, "write_moment", killed)
            with pytest.raises(SnapshotError, match="SIGKILL"), observer.collect() as epoch:
                saved(tmp_path, memory, epoch.pages)
        assert sorted(os.listdir(tmp_path)) == ["base"]
        with observer.collect() as epoch:
            assert epoch.pages.count == 4096
            saved(tmp_path, memory, epoch.pages)
    assert (snapshot.restore(tmp_path / "diff") == 1).all()


def test_what_the_child_cannot_read_or_write_is_an_error_of_the_system(tmp_path):
    pages = np.array([[4096, 0, 4096]])  # address 4096 is nobody's
    with (tmp_path / "file").open("w+b") as file:
        assert _child.write_moment(file.fileno(), pages, lambda pid: None) == errno.EFAULT
        memory = np.ones(4096, np.uint8)
        read_only = os.open(tmp_path / "file", os.O_RDONLY)
        pieces = np.array([[memory.ctypes.data, 0, 4096]])
        assert _child.write_moment(read_only, pieces, lambda pid: None) == errno.EBADF
        os.close(read_only)


def test_an_error_in_progress_ends_the_child_and_leaves_nothing(tmp_path):
    memory = np.ones(1 << 20)
    children = []

    def fails(done, total):
        children.append(done)
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        snapshot.save(tmp_path / "base", memory, sync=False, moment="fork", progress=fails)
    assert children == [0]
    assert os.listdir(tmp_path) == []


WAITING = """
import os, signal, sys
import numpy as np
from dirtylog.sinks import snapshot
seen, answers = [], []
signal.signal(signal.SIGCHLD, lambda *_: seen.append(1))

def taken(*_):
    try:
        answers.append(os.waitpid(-1, os.WNOHANG))
    except ChildProcessError:
        answers.append(None)

snapshot.save(sys.argv[1], np.ones(1 << 16), sync=False, moment="fork", progress=taken)
assert answers and set(answers) == {None}, answers
assert seen == []
"""


def test_who_waits_for_children_never_meets_it(tmp_path):
    # In a process that has no other children.
    done = warm.run(WAITING, tmp_path / "base")
    assert done.returncode == 0, done.stderr


def test_memory_that_others_write_is_refused(tmp_path):
    with mmap.mmap(-1, 8192) as shared:
        array = np.frombuffer(shared, np.uint8)
        with pytest.raises(ValueError, match="is shared"):
            snapshot.save(tmp_path / "base", array, moment="fork")
        del array
    with pytest.raises(ValueError, match="moment is 'now'"):
        snapshot.save(tmp_path / "base", np.ones(9), moment="now")
    with pytest.raises(ValueError, match="moment is 'now'"):
        dl.Checkpoint(tmp_path / "run", {"w": np.ones(9)}, moment="now")
    assert os.listdir(tmp_path) == []


def test_a_checkpoint_lets_writers_go_on_once_the_moment_is_held(tmp_path, monkeypatch):
    w = np.zeros(1 << 16)
    write_moment, went_on = _child.write_moment, []

    def while_the_child_is_there(fd, pieces, taken):
        def tell(pid):
            taken(pid)
            # Another thread: the lock is free now, although the checkpoint is not written.
            writer = threading.Thread(target=write)
            writer.start()
            writer.join(30)
            assert went_on

        return write_moment(fd, pieces, tell)

    def write():
        with checkpoint.lock:
            w[:] += 1
            went_on.append(1)

    with dl.Checkpoint(tmp_path, {"w": w}, sync=False, moment="fork") as checkpoint:
        for step in range(3):
            with monkeypatch.context() as patched:
                patched.setattr(_child, "write_moment", while_the_child_is_there)
                checkpoint.save(step=step)
            went_on.clear()
            assert (dl.Checkpoint.load(tmp_path)["w"] == step).all()
        assert (w == 3).all()
        checkpoint.save()
    assert (dl.Checkpoint.load(tmp_path)["w"] == 3).all()


@pytest.mark.parametrize("call", ["save", "update", "close"])
def test_whoever_waits_for_the_end_of_a_save_does_not_hold_the_lock_of_writers_meanwhile(tmp_path, monkeypatch, call):
    w = dl.zeros(100_000)
    checkpoint = dl.Checkpoint(tmp_path, {"w": w}, sync=False, moment="fork")
    taken, waits, written = threading.Event(), threading.Event(), threading.Event()
    real = snapshot.save

    def slowly(*arguments, progress, **options):
        progress(0, 1)  # the child has the moment: writers go on
        taken.set()
        assert written.wait(60)
        return real(*arguments, progress=progress, **options)

    class Watched:
        """The checkpoint's own lock; says that somebody waits for it."""

        def __init__(self, lock):
            self.lock = lock

        def acquire(self, blocking=True, timeout=-1):
            assert timeout == -1  # which is for the checkpoint's thread
            return self.lock.acquire(blocking=False) or (blocking and self.wait())

        def wait(self):
            waits.set()
            return self.lock.acquire()

        def __enter__(self):
            return self.acquire()

        def __exit__(self, *_):
            self.lock.release()

        def release(self):
            self.lock.release()

        def _is_owned(self):
            return self.lock._is_owned()

    monkeypatch.setattr(checkpoint._turns, "saving", Watched(checkpoint._turns.saving))
    with monkeypatch.context() as patched:
        patched.setattr(snapshot, "save", slowly)
        first = threading.Thread(target=checkpoint.save)
        first.start()
        assert taken.wait(60)
    arguments = [{"w": w}] if call == "update" else []
    second = threading.Thread(target=getattr(checkpoint, call), args=arguments)
    second.start()
    assert waits.wait(60)
    # Only now, and until it ends: whoever waits holds nothing that this thread needs.
    if free := checkpoint.lock.acquire(timeout=10):
        checkpoint.lock.release()
    written.set()
    first.join()
    second.join()
    checkpoint.close()
    assert free
