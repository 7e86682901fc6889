"""Checkpoint: all arrays of one step or none, only what changed, and no more than is kept."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

import dirtylog as dl
from dirtylog.sinks import snapshot
from dirtylog.sinks.snapshot import SnapshotError, staged


def arrays():
    return {"w": np.zeros((60, 1000)), "b": np.zeros(300, np.int32), "f": np.zeros((40, 300), np.float32, order="F")}


def write(these, step):
    these["w"][step % 60] = step
    these["b"][step % 300] = step
    these["f"][step % 40, step % 300] = step
    these["b"][-1] = step


def open_checkpoint(directory, these, **options):
    return dl.Checkpoint(directory, these, sync=False, **options)


@pytest.mark.parametrize("backend", ["auto", "compare"])
def test_every_step_loads_as_it_was(tmp_path, backend):
    these, moments = arrays(), {}
    with open_checkpoint(tmp_path, these, backend=backend) as checkpoint:
        for step in range(8):
            write(these, step)
            written = checkpoint.save(step=step, state={"rng": bytes([step])})
            assert written.kind == ("diff" if step else "full")
            moments[step] = {name: array.copy("K") for name, array in these.items()}
    assert dl.Checkpoint.steps(tmp_path) == list(range(8))
    for step, moment in moments.items():
        found = dl.Checkpoint.load(tmp_path, step)
        assert list(found) == list(moment)
        for name, array in moment.items():
            assert (found[name] == array).all()
            assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
        assert dl.Checkpoint.state_of(tmp_path, step) == {"rng": bytes([step])}
    into = arrays()
    assert dl.Checkpoint.load(tmp_path, into=into) is into
    assert (into["w"] == these["w"]).all()


def test_a_checkpoint_writes_what_changed(tmp_path):
    w = dl.zeros((1 << 20,), np.uint8)
    w[:] = 1
    with open_checkpoint(tmp_path, {"w": w}) as checkpoint:
        checkpoint.save()
        w[5 * 4096] = 2
        written = checkpoint.save()
        assert written.count == 1
        assert checkpoint.save().count == 0
    assert dl.Checkpoint.steps(tmp_path) == [0, 1, 2]


@pytest.mark.parametrize("keep", [1, 2, 5])
def test_only_the_last_ones_are_kept_and_each_of_them_loads(tmp_path, keep):
    these, moments = arrays(), {}
    with open_checkpoint(tmp_path, these, keep=keep) as checkpoint:
        for step in range(17):
            write(these, step)
            checkpoint.save(step=step)
            moments[step] = these["w"].copy()
            kept = dl.Checkpoint.steps(tmp_path)
            assert kept == list(range(max(0, step - keep + 1), step + 1))
            assert len(os.listdir(tmp_path)) < 2 * keep + 1
            for each in kept:
                assert (dl.Checkpoint.load(tmp_path, each)["w"] == moments[each]).all()
        with pytest.raises(KeyError, match="no checkpoint of step 3; it has those of"):
            dl.Checkpoint.load(tmp_path, 3)


def test_a_step_that_is_not_there_is_a_key_error(tmp_path):
    with pytest.raises(KeyError, match="has no checkpoint"):
        dl.Checkpoint.load(tmp_path / "nowhere")
    with pytest.raises(KeyError, match="no checkpoint of step 5"):
        dl.Checkpoint.load(tmp_path, step=5)


def test_a_save_that_fails_changes_nothing_and_loses_nothing(tmp_path, monkeypatch):
    these = arrays()
    with open_checkpoint(tmp_path, these) as checkpoint:
        checkpoint.save(step=0)
        write(these, 7)

        def full(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(staged.Staged, "write", full)
        with pytest.raises(OSError, match="No space"):
            checkpoint.save(step=1)
        monkeypatch.undo()
        assert dl.Checkpoint.steps(tmp_path) == [0]
        assert len(os.listdir(tmp_path)) == 1
        checkpoint.save(step=1)
    for name, array in dl.Checkpoint.load(tmp_path, 1).items():
        assert (array == these[name]).all()


def test_a_program_that_begins_again_goes_on_in_the_same_directory(tmp_path):
    these = arrays()
    for run in range(3):
        with open_checkpoint(tmp_path, these) as checkpoint:
            write(these, run)
            assert checkpoint.save(step=run).kind == "full"
    assert dl.Checkpoint.steps(tmp_path) == [0, 1, 2]
    assert (dl.Checkpoint.load(tmp_path)["w"] == these["w"]).all()


def test_the_thread_saves_and_what_it_meets_is_raised_once(tmp_path, monkeypatch):
    these = arrays()
    saved = threading.Event()
    real = snapshot.save

    def failing(*_, **__):
        saved.set()
        raise SnapshotError("made up")

    monkeypatch.setattr(snapshot, "save", failing)
    checkpoint = open_checkpoint(tmp_path, these, every=0.001)
    assert saved.wait(60)
    with checkpoint.lock:
        # No save is under way, and none begins: what was met is there.
        monkeypatch.setattr(snapshot, "save", real)
        with pytest.raises(SnapshotError, match="made up"):
            checkpoint.save(step=4)
        checkpoint.save(step=4)
    checkpoint.close()
    checkpoint.close()
    assert dl.Checkpoint.steps(tmp_path)[-1] == 4
    with pytest.raises(ValueError, match="is closed"):
        checkpoint.save()


def test_wrong_arguments_are_refused(tmp_path):
    these = arrays()
    for match, options in [("every is 0", {"every": 0}), ("keep is 0", {"keep": 0})]:
        with pytest.raises(ValueError, match=match):
            dl.Checkpoint(tmp_path / "c", these, **options)
    with pytest.raises(ValueError, match="a mapping of names"):
        dl.Checkpoint(tmp_path / "c", {})
    assert not (tmp_path / "c").exists()
    with open_checkpoint(tmp_path, these) as checkpoint, pytest.raises(ValueError, match="step is -1"):
        checkpoint.save(step=-1)


TRAINING = """
import sys
import numpy as np
import dirtylog as dl
w, b = np.zeros((50, 1000)), np.zeros(1000)
with dl.Checkpoint(sys.argv[1], {"w": w, "b": b}, keep=3, sync=False) as checkpoint:
    for step in range(1, 1_000_000):
        w[step % 50] = step
        w[-1, -1] = step
        b[step % 1000] = step
        b[0] = step
        checkpoint.save(step=step)
        print(step, flush=True)
"""


@pytest.mark.parametrize("seed", range(6))
def test_a_kill_at_a_random_moment_leaves_all_arrays_of_one_step(tmp_path, seed):
    process = subprocess.Popen(
        [sys.executable, "-c", TRAINING, str(tmp_path)], stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )  # fmt: skip
    with process:
        for _ in range(3 + 5 * seed):
            last = int(process.stdout.readline())
        os.kill(process.pid, signal.SIGKILL)
    steps = dl.Checkpoint.steps(tmp_path)
    assert steps[-1] >= last
    for step in steps:
        found = dl.Checkpoint.load(tmp_path, step)
        assert found["w"][-1, -1] == found["b"][0] == found["w"][step % 50, 5] == step
        assert snapshot.verify(dl.Checkpoint._path(Path(tmp_path), step))


def test_a_foreign_snapshot_among_the_checkpoints_is_refused_by_name(tmp_path):
    snapshot.save(tmp_path / "0000000001.ckpt", b"x")
    with pytest.raises(SnapshotError, match=r"0000000001.ckpt: this snapshot was not written by a Checkpoint"):
        dl.Checkpoint.load(tmp_path)
