"""Checkpoint: interrupts, calls in the middle of itself, forks and arrays that move lose nothing."""

import contextlib
import copy
import gc
import os
import pickle
import threading

import numpy as np
import pytest

import dirtylog as dl
from dirtylog.sinks.checkpoint import checkpoint as checkpoints
from dirtylog.sinks.checkpoint.turns import Turns
from dirtylog.sinks.snapshot import _child

from .. import warm
from ..side_by_side import GIL
from ..tracing import traced
from .lender import Box


def open_checkpoint(directory, these, **options):
    return dl.Checkpoint(directory, these, sync=False, **options)


def interrupted_at(line, function, call):
    """Call, and raise KeyboardInterrupt before the `line`-th line of a function is run; say whether it came so far."""
    left, raised = line, False

    def trace(frame, event, _):
        nonlocal left, raised
        if frame.f_code is not function.__code__:
            return None
        if event == "line" and not raised:
            left -= 1
            if left < 0:
                raised = True
                raise KeyboardInterrupt
        return trace

    with contextlib.suppress(KeyboardInterrupt), traced(trace):
        call()
    return raised


@pytest.mark.filterwarnings("ignore:unclosed <Tracker:ResourceWarning")  # of one that nobody had got hold of yet
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("size", [500, 9000])
def test_an_update_that_is_interrupted_goes_on_with_the_old_array_or_with_the_new_one(tmp_path, size):
    w, seen = np.zeros(3000), set()
    for line in range(1000):
        old, new = np.full(500, 1.0), np.full(size, 2.0)
        with open_checkpoint(tmp_path / str(line), {"w": w, "v": old}) as checkpoint:
            checkpoint.save()
            came = interrupted_at(line, dl.Checkpoint._take, lambda new=new: checkpoint.update({"v": new}))
            now = checkpoint._saved.arrays["v"]
            assert now is old or now is new
            seen.add(now is new)
            w[line] = now[-1] = 5 + line
            checkpoint.save()
        found = dl.Checkpoint.load(tmp_path / str(line))
        assert (found["v"] == now).all()
        assert (found["w"] == w).all()
        if not came:
            break
    assert seen == {True, False}
    assert line > 10
    gc.collect()  # while their warnings are ignored


def test_a_checkpoint_that_nobody_gets_leaves_no_thread(tmp_path, monkeypatch):
    started = []
    real = threading.Thread.start

    def interrupted(thread):
        real(thread)
        started.append(thread)
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        open_checkpoint(tmp_path, {"w": np.zeros(5)}, every=0.001)
    started[0].join(10)
    assert not started[0].is_alive()


def take(lock, free):
    free.append(lock.acquire(blocking=False))
    if free[0]:
        lock.release()


@pytest.mark.parametrize("call", ["save", "update"])
def test_a_call_that_is_interrupted_leaves_no_lock(tmp_path, call):
    w, v = np.zeros(500), np.zeros(500)
    with open_checkpoint(tmp_path, {"w": w, "v": v}) as checkpoint:
        calls = {"save": checkpoint.save, "update": lambda: checkpoint.update({"v": v})}
        for line in range(100):
            came = interrupted_at(line, Turns.alone.__wrapped__, calls[call])
            for lock in (checkpoint.lock, checkpoint._turns.saving):
                free = []
                thread = threading.Thread(target=take, args=(lock, free))
                thread.start()
                thread.join()
                assert free == [True]
            w[line] = line + 1
            checkpoint.save()
            if not came:
                break
    assert line > 10
    assert (dl.Checkpoint.load(tmp_path)["w"] == w).all()


class Watched:
    """A lock that says when somebody waits for it."""

    def __init__(self):
        self.lock, self.waits = threading.RLock(), threading.Event()

    def acquire(self, blocking=True, timeout=-1):
        if self.lock.acquire(blocking=False):
            return True
        self.waits.set()
        return blocking and self.lock.acquire(timeout=timeout)

    def release(self):
        self.lock.release()

    def _is_owned(self):
        return self.lock._is_owned()

    def __enter__(self):
        return self.acquire()

    def __exit__(self, *_):
        self.release()


def test_whoever_holds_the_lock_may_close_though_the_thread_waits_for_it(tmp_path):
    w = np.zeros(500)
    with open_checkpoint(tmp_path, {"w": w}, every=0.001) as checkpoint:
        checkpoint._turns.lock = Watched()
        with checkpoint.lock:
            assert checkpoint.lock.waits.wait(60)
            checkpoint.close()
            assert not checkpoint._thread.is_alive()


def test_progress_may_close_though_the_thread_waits_for_the_save(tmp_path):
    w = np.zeros(500)
    checkpoint = open_checkpoint(tmp_path, {"w": w}, every=0.001)
    w[:] = 1
    checkpoint._turns.lock = Watched()

    def told(done, total):
        assert checkpoint.lock.waits.wait(60)
        checkpoint.close()

    checkpoint.save(step=1, progress=told)
    assert not checkpoint._thread.is_alive()
    assert (dl.Checkpoint.load(tmp_path, 1)["w"] == 1).all()


@pytest.mark.parametrize("call", ["save", "update"])
def test_a_call_in_the_middle_of_a_save_is_refused_and_changes_nothing(tmp_path, call):
    w = np.zeros(500)
    with open_checkpoint(tmp_path, {"w": w}) as checkpoint:
        calls = {"save": checkpoint.save, "update": lambda: checkpoint.update({"w": np.ones(500)})}

        def within(done, total):
            with pytest.raises(dl.DirtyLogError, match="in the middle of a save or an update"):
                calls[call]()

        for step in range(3):
            w[step] = step + 1
            checkpoint.save(step=step, progress=within)
            assert (dl.Checkpoint.load(tmp_path, step)["w"] == w).all()
        assert dl.Checkpoint.steps(tmp_path) == [0, 1, 2]
        w[9] = 9
        checkpoint.save()
    assert (dl.Checkpoint.load(tmp_path)["w"] == w).all()


@pytest.mark.parametrize("call", ["save", "update", "close"])
def test_a_call_by_the_thread_of_a_store_that_tells_how_far_it_is_does_not_wait_for_the_save(
    tmp_path, monkeypatch, call
):
    w, said = np.zeros(500), []
    with open_checkpoint(tmp_path, {"w": w}) as checkpoint:
        calls = {"save": checkpoint.save, "update": lambda: checkpoint.update({"w": w}), "close": checkpoint.close}
        real = checkpoint._back.save

        def save(*arguments):
            *_, progress, _ = arguments
            thread = threading.Thread(target=progress, args=(1, 2))
            thread.start()
            thread.join(60)
            said.append("goes on")
            return real(*arguments)

        def told(done, total):
            if not said:
                with pytest.raises(dl.DirtyLogError, match="in the middle of a save or an update"):
                    calls[call]()
                said.append("refused")

        monkeypatch.setattr(checkpoint._back, "save", save)
        checkpoint.save(step=1, progress=told)
    assert said == ["refused", "goes on"]
    assert (dl.Checkpoint.load(tmp_path, 1)["w"] == w).all()


BEHIND_THE_LOCK = """
import signal, sys, threading
import numpy as np
import dirtylog as dl

signal.alarm(60)
checkpoint = dl.Checkpoint(sys.argv[1], {"w": np.zeros(500)}, sync=False, moment="fork")
writers_may, waits = threading.Event(), threading.Event()

class Saving:
    \"\"\"The lock that a save holds, which says when another thread waits for it.\"\"\"

    def __init__(self):
        self.lock = threading.RLock()

    def acquire(self, blocking=True, timeout=-1):
        if self.lock.acquire(blocking=False):
            return True
        if blocking:
            waits.set()
        return blocking and self.lock.acquire()

    def release(self):
        self.lock.release()

    def _is_owned(self):
        return self.lock._is_owned()

checkpoint._turns.saving = Saving()

def other():
    writers_may.wait()
    with checkpoint.lock:
        try:
            checkpoint.save(step=2)
        except ValueError as error:
            print(error)

def told(done, total):
    if not writers_may.is_set():
        writers_may.set()
        waits.wait()
        try:
            getattr(checkpoint, sys.argv[2])()
        except dl.DirtyLogError as error:
            print(str(error)[:45])

thread = threading.Thread(target=other)
thread.start()
checkpoint.save(step=1, progress=told)
thread.join()
checkpoint.close()
"""


@pytest.mark.skipif(not _child.available(), reason="no fork without handlers and signals on this system")
@pytest.mark.parametrize(
    ("call", "says", "steps"),
    [
        ("save", b"this thread is in the middle of a save or an ", [1, 2]),
        ("close", b"the checkpoint is closed", [1]),
    ],
)
def test_a_call_in_the_middle_of_a_save_waits_for_nobody_who_waits_for_the_save(tmp_path, call, says, steps):
    with warm.started(BEHIND_THE_LOCK, tmp_path / "c", call) as process:
        said = process.stdout.read()
        assert process.wait(60) == 0
    assert said.splitlines() == [says]
    assert dl.Checkpoint.steps(tmp_path / "c") == steps


FORKED = """
import os, signal, sys, threading
import numpy as np
import dirtylog as dl

signal.alarm(60)
w = np.ones(500)
checkpoint = dl.Checkpoint(sys.argv[1], {"w": w}, sync=False)
saves, forked = threading.Event(), threading.Event()

def told(done, total):
    saves.set()
    forked.wait()

thread = threading.Thread(target=checkpoint.save, kwargs={"step": 1, "progress": told})
thread.start()
saves.wait()
pid = os.fork()
if not pid:
    signal.alarm(20)
    with checkpoint.lock:
        pass
    try:
        checkpoint.save()
    except dl.DirtyLogError as error:
        print("belongs to the parent process" in str(error), flush=True)
    checkpoint.close()
    os._exit(0)
print(os.waitpid(pid, 0)[1], flush=True)
forked.set()
thread.join()
w[7] = 7
checkpoint.save(step=2)
checkpoint.close()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork()")
def test_the_child_of_a_fork_waits_for_no_save_of_a_thread_that_it_does_not_have(tmp_path):
    with warm.started(FORKED, tmp_path / "c") as process:
        said = process.stdout.read()
        assert process.wait(60) == 0
    assert said.split() == [b"True", b"0"]
    found = dl.Checkpoint.load(tmp_path / "c", 2)["w"]
    assert (found[7], found.sum()) == (7, 506)


@pytest.mark.parametrize("size", [3000, 9000, 40])
def test_an_array_whose_memory_lies_elsewhere_by_now_is_followed(tmp_path, size):
    box, w = Box(np.zeros(3000)), np.zeros(700)
    with open_checkpoint(tmp_path, {"box": box, "w": w}) as checkpoint:
        for step in range(6):
            if step in (2, 4):
                box.array = np.full(size, step + 0.5)
            box.array[[-1, step]] = w[step] = step
            checkpoint.save(step=step)
            found = dl.Checkpoint.load(tmp_path, step)
            assert (found["box"] == box.array).all()
            assert (found["w"] == w).all()


@pytest.mark.skipif(not GIL, reason="no GIL: references are not counted in one place")
def test_the_thread_says_that_nobody_writes_to_an_array_any_more(tmp_path, monkeypatch):
    noted = threading.Event()
    real = checkpoints.Checkpoint._note

    def note(self, error):
        real(self, error)
        noted.set()

    monkeypatch.setattr(checkpoints.Checkpoint, "_note", note)
    checkpoint = open_checkpoint(tmp_path, {"w": np.zeros(9)}, every=0.001)
    found = noted.wait(60)
    with pytest.raises(RuntimeWarning, match="the array 'w' has no other reference"):
        checkpoint.close()  # in any case: its thread would go on beside all other tests
    assert found


@pytest.mark.parametrize("make", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_checkpoint_is_not_copied(tmp_path, make):
    with (
        open_checkpoint(tmp_path, {"w": np.zeros(9)}) as checkpoint,
        pytest.raises(TypeError, match="a Checkpoint is neither copied nor pickled"),
    ):
        make(checkpoint)
