"""Checkpoint: all arrays of one step or none, only what changed, and no more than is kept."""

import contextlib
import errno
import importlib.util
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

import dirtylog as dl
from dirtylog.sinks import snapshot
from dirtylog.sinks.checkpoint import directory, export
from dirtylog.sinks.snapshot import SnapshotError, staged

from .. import warm
from ..side_by_side import GIL


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


def test_loaded_arrays_are_mapped_and_belong_to_this_process_alone(tmp_path):
    these = {"w": np.arange(1 << 17, dtype=np.float64), "b": np.ones(5)}
    with open_checkpoint(tmp_path, these) as checkpoint:
        checkpoint.save(step=0)
    found = dl.Checkpoint.load(tmp_path)
    address = found["w"].ctypes.data
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    ranges = [(*(int(each, 16) for each in line[0].split("-")), line[-1]) for line in maps]
    assert [path for start, end, path in ranges if start <= address < end] == [str(tmp_path / "0000000001.ckpt")]
    found["w"][7] = -1
    again = dl.Checkpoint.load(tmp_path)
    assert again["w"][7] == 7
    # The memory stays for as long as one array does, whatever becomes of the files.
    bias = again.pop("b")
    del again
    for file in tmp_path.iterdir():
        file.unlink()
    assert bias.tolist() == [1] * 5
    assert found["w"][-1] == (1 << 17) - 1


def test_a_program_goes_on_with_the_arrays_that_it_loaded(tmp_path):
    these, moments = arrays(), []
    with open_checkpoint(tmp_path, these) as checkpoint:
        checkpoint.save(step=0)
    for step in range(1, 5):
        these = dl.Checkpoint.load(tmp_path)
        with open_checkpoint(tmp_path, these, keep=2) as checkpoint:
            write(these, step)
            checkpoint.save(step=step)
            write(these, 10 + step)
            moments.append({name: array.copy("K") for name, array in these.items()})
            assert checkpoint.save(step=10 + step).kind == "diff"
        for name, array in dl.Checkpoint.load(tmp_path).items():
            assert (array == moments[-1][name]).all()


@pytest.mark.parametrize("into", [False, True])
def test_a_flipped_bit_is_found_when_that_is_asked_for(tmp_path, into):
    these = arrays()
    with open_checkpoint(tmp_path, these) as checkpoint:
        these["w"][:] = 1
        checkpoint.save(step=0)
    with (tmp_path / "0000000001.ckpt").open("r+b") as file:
        file.seek(100)
        file.write(b"\xff")
    with pytest.raises(SnapshotError, match="does not match its digest"):
        dl.Checkpoint.load(tmp_path, verify=True, into=arrays() if into else None)


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


def test_a_step_is_found_by_few_looks(tmp_path, monkeypatch):
    w, written = np.zeros(10), {}
    # Runs that go on from an earlier step, and saves without a step in between, as the thread's are.
    runs = [range(0, 40, 2), range(25, 35), range(30, 50, 3)]
    for steps in runs:
        with open_checkpoint(tmp_path, {"w": w}) as checkpoint:
            for step in steps:
                if step % 5 == 0:
                    checkpoint._save(None, None)
                written[step] = checkpoint.save(step=step).path
    looked = []
    real = directory.about
    monkeypatch.setattr(directory, "about", lambda path: looked.append(path) or real(path))
    for step in range(-1, 52):
        looked.clear()
        if step in written:
            assert directory.find(tmp_path, step) == written[step]
            # Three runs, of less than 2**5 files each.
            assert len(looked) <= 1 + 3 * (1 + 5 + 1)
        else:
            with pytest.raises(KeyError, match=f"no checkpoint of step {step};"):
                directory.find(tmp_path, step)
    looked.clear()
    assert directory.find(tmp_path, None) == written[48]
    assert len(looked) == 1


def test_only_the_first_save_lists_the_directory(tmp_path, monkeypatch):
    w = np.zeros(1000)
    with open_checkpoint(tmp_path, {"w": w}) as checkpoint:
        checkpoint.save()
        monkeypatch.setattr(directory, "files", lambda _: pytest.fail("all the files were listed"))
        for _ in range(3):
            w += 1
            checkpoint.save()
    monkeypatch.undo()
    assert dl.Checkpoint.steps(tmp_path) == [0, 1, 2, 3]


@pytest.mark.parametrize("change", [{"since": "1"}, {"since": 1 << 40}, {"reached": None}, {"step": [1]}, {"more": 1}])
def test_what_a_file_says_of_its_run_is_not_believed(tmp_path, change):
    noted = {"step": 1, "keep": None, "since": 1, "reached": 1, "user": None}
    snapshot.save(tmp_path / "0000000001.ckpt", b"x", state={**noted, **change})
    with pytest.raises(KeyError if change == {"since": 1 << 40} else SnapshotError):
        dl.Checkpoint.load(tmp_path, step=2)


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
    for match, options in [
        ("every is 0", {"every": 0}),
        ("every is '3'", {"every": "3"}),
        ("every is True", {"every": True}),
        ("keep is 0", {"keep": 0}),
        ("keep is True", {"keep": True}),
        ("keep is 2.0", {"keep": 2.0}),
        ("full_every is True", {"full_every": True}),
        ("digest is 'md5'", {"digest": "md5"}),
    ]:
        with pytest.raises(ValueError, match=match):
            dl.Checkpoint(tmp_path / "c", these, **options)
    with pytest.raises(ValueError, match="a mapping of names"):
        dl.Checkpoint(tmp_path / "c", {})
    assert not (tmp_path / "c").exists()
    with open_checkpoint(tmp_path, these) as checkpoint:
        # What JSON writes in another way than a number, no reader would take for one.
        for step in (-1, True, np.True_, 3.0, "3"):
            with pytest.raises(ValueError, match=f"step is {re.escape(repr(step))}; it must be a number from 0"):
                checkpoint.save(step=step)
    assert os.listdir(tmp_path) == []


def test_numbers_of_numpy_are_numbers(tmp_path):
    options = {"keep": np.int64(3), "full_every": np.uint8(7), "every": np.float32(1000)}
    these = arrays()
    with open_checkpoint(tmp_path, these, **options) as checkpoint:
        for step in np.arange(5, dtype=np.int16):
            checkpoint.save(step=step)
        assert checkpoint._thread.is_alive()
    assert dl.Checkpoint.steps(tmp_path) == [2, 3, 4]


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
    with warm.started(TRAINING, tmp_path) as process:
        for _ in range(3 + 5 * seed):
            last = int(process.stdout.readline())
        process.kill()
    steps = dl.Checkpoint.steps(tmp_path)
    assert steps[-1] >= last
    for step in steps:
        found = dl.Checkpoint.load(tmp_path, step)
        assert found["w"][-1, -1] == found["b"][0] == found["w"][step % 50, 5] == step
        assert snapshot.verify(directory.find(tmp_path, step))


def test_a_foreign_snapshot_among_the_checkpoints_is_refused_by_name(tmp_path):
    snapshot.save(tmp_path / "0000000001.ckpt", b"x")
    with pytest.raises(SnapshotError, match=r"0000000001.ckpt: this snapshot was not written by a Checkpoint"):
        dl.Checkpoint.load(tmp_path)


def cut(path):
    os.truncate(path, os.path.getsize(path) - 1)


@pytest.mark.parametrize("damaged", [1, 3, 5])
def test_a_damaged_file_does_not_hide_the_steps_that_do_not_need_it(tmp_path, damaged):
    these = arrays()
    with open_checkpoint(tmp_path, these, full_every=1, keep=9) as checkpoint:
        for step in range(5):
            write(these, step)
            checkpoint.save(step=step)
    cut(tmp_path / directory.name_of(damaged))
    # Steps 0, 2 and 4 are full, and each diff needs the one before.
    lost = {1: {0, 1}, 3: {2, 3}, 5: {4}}[damaged]
    for step in set(range(5)) - lost:
        if damaged == 5:
            with pytest.warns(
                RuntimeWarning, match=r"0000000005.ckpt: .* is taken from 000000000\d.ckpt, which is older"
            ):
                found = dl.Checkpoint.load(tmp_path, step)
        else:
            found = dl.Checkpoint.load(tmp_path, step)
        assert found["b"][-1] == step
    for step in lost | {77}:
        with pytest.raises(SnapshotError if step in lost else (SnapshotError, KeyError)):
            dl.Checkpoint.load(tmp_path, step)
    if damaged == 5:
        with pytest.raises(SnapshotError, match=r"0000000005.ckpt"):
            dl.Checkpoint.load(tmp_path)


@pytest.mark.parametrize("harm", [os.unlink, cut])
def test_after_the_last_file_was_harmed_the_save_after_the_next_stands_for_itself(tmp_path, harm):
    these = arrays()
    with open_checkpoint(tmp_path, these) as checkpoint:
        write(these, 0)
        harm(checkpoint.save(step=0).path)
        write(these, 1)
        with pytest.raises(SnapshotError, match=r"0000000001.ckpt"):
            checkpoint.save(step=1)
        assert checkpoint.save(step=1).kind == "full"
        write(these, 2)
        assert checkpoint.save(step=2).kind == "diff"
    for name, array in dl.Checkpoint.load(tmp_path).items():
        assert (array == these[name]).all()


LOOKS = {
    "load": lambda path: dl.Checkpoint.load(path)["w"][0],
    "load into": lambda path: dl.Checkpoint.load(path, into={"w": np.zeros(9000)})["w"][0],
    "verify": lambda path: dl.Checkpoint.load(path, verify=True)["w"][0],
    "state": dl.Checkpoint.state_of,
    "steps": lambda path: dl.Checkpoint.steps(path)[-1],
    "history": lambda path: dl.Checkpoint.history(path)[-1].step,
    "survey": lambda path: directory.survey(path)[-1][1].step,
    "described": lambda path: directory.described(path, None)[0],
    "whole": lambda path: directory.whole(path, None)["w"][0],
    "export": lambda path: export(path, path / "out.npz") and np.load(path / "out.npz")["w"][0],
}


class Removing:
    """Lists the files of a directory, and saves between some lists and the look at what was listed."""

    def __init__(self, monkeypatch, lists, saves):
        self.real, self.left, self.saves, self.listed = directory.files, set(lists), saves, 0
        monkeypatch.setattr(directory, "files", self)

    def __call__(self, path):
        found = self.real(path)
        self.listed += 1
        if self.listed in self.left:
            self.left.remove(self.listed)
            before = self.listed
            self.saves()
            self.listed = before  # a save lists as well
        return found


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("keep", [1, 2])
def test_whoever_looks_while_what_was_listed_is_removed_looks_again(tmp_path, monkeypatch, look, keep):
    w = np.zeros(9000)
    with open_checkpoint(tmp_path, {"w": w}, keep=keep) as checkpoint:

        def saves():
            for _ in range(2 * keep):
                w[0] += 1
                checkpoint.save(step=int(w[0]), state=w[0])

        saves()
        # The first list is that of whoever looks again; the second, that of the function itself.
        removing = Removing(monkeypatch, [2], saves)
        assert LOOKS[look](tmp_path) == w[0] == 4 * keep
        assert removing.listed > 3


def test_a_step_that_is_removed_while_it_is_looked_for_is_not_kept(tmp_path, monkeypatch):
    these = arrays()
    with open_checkpoint(tmp_path, these, keep=2) as checkpoint:

        def saves(*steps):
            for step in steps:
                checkpoint.save(step=step)

        saves(0, 1, 2)
        Removing(monkeypatch, [2], lambda: saves(3, 4, 5, 6))
        with pytest.raises(KeyError, match="no checkpoint of step 1; it has those of 5, 6"):
            dl.Checkpoint.load(tmp_path, 1)


def test_what_was_removed_while_a_step_was_looked_for_is_not_said_to_be_damaged(tmp_path, monkeypatch):
    these = arrays()
    for run in ((0, 1, 2), (5, 6, 7)):
        with open_checkpoint(tmp_path, these) as checkpoint:
            for step in run:
                write(these, step)
                checkpoint.save(step=step)
    Removing(monkeypatch, [2], lambda: os.unlink(tmp_path / "0000000004.ckpt"))
    # A warning would be an error here.
    assert dl.Checkpoint.load(tmp_path, 1)["b"][-1] == 1


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_a_reason_to_remove_what_is_not_kept(tmp_path, monkeypatch, code):
    these = arrays()

    def full(*_, **__):
        raise OSError(code, os.strerror(code))

    with open_checkpoint(tmp_path, these, keep=3) as checkpoint:
        for step in range(5):
            write(these, step)
            checkpoint.save(step=step)
        assert len(os.listdir(tmp_path)) == 5
        write(these, 5)
        with monkeypatch.context() as patched:
            patched.setattr(snapshot, "save_diff", full)
            with pytest.raises(OSError, match=os.strerror(code)):
                checkpoint.save(step=5)
        # The full one stays below the oldest, since little changed: it took in the diff between them.
        assert sorted(os.listdir(tmp_path)) == [directory.name_of(number) for number in (1, 3, 4, 5)]
        assert checkpoint.save(step=5).kind == "diff"
    assert dl.Checkpoint.steps(tmp_path) == [3, 4, 5]
    for name, array in dl.Checkpoint.load(tmp_path).items():
        assert (array == these[name]).all()


@pytest.mark.parametrize("number", [1, 2])
def test_a_directory_that_became_another_one_is_noticed(tmp_path, number):
    """As by an older copy that was put back, or by a program that began anew there: the names are the same."""
    run, other = tmp_path / "run", tmp_path / "other"
    w, v = np.ones((60, 1000)), np.full((60, 1000), 5.0)
    with open_checkpoint(other, {"w": v}) as checkpoint:
        for _ in range(number):
            checkpoint.save()
    with open_checkpoint(run, {"w": w}) as checkpoint:
        for step in range(number):
            w[step] = step
            checkpoint.save()
        run.rename(tmp_path / "old")
        other.rename(run)
        w[7] = 7
        with pytest.raises(SnapshotError, match=f"{number}.ckpt: this is another snapshot than the one of digest"):
            checkpoint.save()
        assert checkpoint.save().kind == "full"
        w[8] = 8
        assert checkpoint.save().kind == "diff"
    assert (dl.Checkpoint.load(run)["w"] == w).all()
    assert (dl.Checkpoint.load(run, 0)["w"] == v).all()


def test_two_that_save_to_one_directory_are_told_and_lose_nothing(tmp_path):
    one, other = arrays(), arrays()
    with open_checkpoint(tmp_path, one) as first, open_checkpoint(tmp_path, other) as second:
        first.save(step=0)
        second.save(step=10)
        write(one, 1)
        with pytest.raises(FileExistsError, match=r"somebody else has saved to this directory.*0000000002.ckpt"):
            first.save(step=1)
        first.save(step=1)
    assert dl.Checkpoint.steps(tmp_path) == [0, 10, 1]
    for name, array in dl.Checkpoint.load(tmp_path, 1).items():
        assert (array == one[name]).all()


# ---- what a program does to its arrays -------------------------------------------------------------------------------


def test_an_interrupt_before_the_epoch_is_committed_loses_nothing_and_is_in_nobodys_way(tmp_path, monkeypatch):
    these, moments = arrays(), {}
    real = snapshot.save_diff

    def interrupted(*args, **kwargs):
        real(*args, **kwargs)
        raise KeyboardInterrupt

    with open_checkpoint(tmp_path, these, keep=3) as checkpoint:
        for step in range(20):
            write(these, step)
            if step % 4 == 2:
                monkeypatch.setattr(snapshot, "save_diff", interrupted)
                with pytest.raises(KeyboardInterrupt):
                    checkpoint.save(step=step)
                monkeypatch.setattr(snapshot, "save_diff", real)
                # Now there are two of this step, and they differ.
                these["w"][0, 0] += 1
            checkpoint.save(step=step)
            moments[step] = these["w"].copy()
            for each in dl.Checkpoint.steps(tmp_path):
                assert (dl.Checkpoint.load(tmp_path, each)["w"] == moments[each]).all()
    assert [entry.problem for entry in snapshot.catalog(tmp_path)] == [None] * len(os.listdir(tmp_path))


def test_a_base_of_which_little_changed_stays_below_what_is_kept(tmp_path):
    w = dl.zeros((1 << 20,), np.uint8)
    w[:] = 1
    with open_checkpoint(tmp_path, {"w": w}, keep=2) as checkpoint:
        for step in range(9):
            w[step * 4096] = step
            checkpoint.save(step=step)
    kinds = [entry.info.kind for entry in snapshot.catalog(tmp_path)]
    assert kinds[0] == "full"
    assert set(kinds[1:]) == {"diff"}
    assert dl.Checkpoint.steps(tmp_path) == [7, 8]
    w[:] = 3
    with open_checkpoint(tmp_path, {"w": w}, keep=2) as checkpoint:
        for step in range(9, 16):
            w += 1
            checkpoint.save(step=step)
            assert (dl.Checkpoint.load(tmp_path)["w"] == w).all()
    assert len(os.listdir(tmp_path)) <= 4


def test_after_so_many_diffs_all_is_written_again(tmp_path):
    w = np.zeros(10000)
    with open_checkpoint(tmp_path, {"w": w}, full_every=3) as checkpoint:
        kinds = [checkpoint.save().kind for _ in range(9)]
    assert kinds == ["full", "diff", "diff", "diff"] * 2 + ["full"]
    with pytest.raises(ValueError, match="full_every is 0"):
        open_checkpoint(tmp_path, {"w": w}, full_every=0)


@pytest.mark.parametrize("size", [1000, 5000])
def test_another_array_of_a_name_is_saved_whole_and_then_by_what_changes(tmp_path, size):
    w, b = dl.zeros((1000, 64)), dl.zeros((4096,), np.uint8)
    w[:] = 1
    with open_checkpoint(tmp_path, {"w": w, "b": b}) as checkpoint:
        checkpoint.save()
        new = dl.zeros((size, 64))
        new[:] = 2
        checkpoint.update({"w": new})
        w[:] = 9
        written = checkpoint.save()
        assert written.kind == ("diff" if size == 1000 else "full")
        assert written.count == -(-size * 64 * 8 // 4096) + (size != 1000) * 0
        new[0] = 3
        assert checkpoint.save().count == 1
        with pytest.raises(ValueError, match="not contiguous"):
            checkpoint.update({"w": np.zeros((10, 10))[::2, ::2], "x": b})
        x = np.arange(5)
        checkpoint.update({"x": x})
        assert checkpoint.save().kind == "full"
    assert (dl.Checkpoint.load(tmp_path, 0)["w"] == 1).all()
    assert (dl.Checkpoint.load(tmp_path, 1)["w"] == 2).all()
    assert dl.Checkpoint.load(tmp_path, 2)["w"].shape == (size, 64)
    assert list(dl.Checkpoint.load(tmp_path)) == ["w", "b", "x"]
    with pytest.raises(ValueError, match="closed"):
        checkpoint.update({"w": w})


@pytest.mark.skipif(not GIL, reason="no GIL: references are not counted in one place")
@pytest.mark.parametrize("make", [lambda: np.zeros(1000), lambda: dl.zeros((1000,)), lambda: np.zeros(2000)[500:]])
def test_an_array_that_nobody_else_refers_to_is_said_once(tmp_path, make):
    w, kept = make(), np.zeros(10)
    with open_checkpoint(tmp_path, {"w": w, "kept": kept, "view": kept[2:]}) as checkpoint:
        checkpoint.save()
        alias = w[3:]
        w = w + 1
        checkpoint.save()
        del alias
        with pytest.warns(RuntimeWarning, match=r"the array 'w' has no other reference .*update\(\{'w': w\}\)"):
            checkpoint.save()
        checkpoint.save()
        checkpoint.update({"w": w})
        w += 1
        checkpoint.save()
    assert (dl.Checkpoint.load(tmp_path)["w"] == 2).all()


def test_what_the_thread_meets_again_and_again_is_said_once_and_hides_nothing(tmp_path, monkeypatch):
    these = arrays()
    checkpoint = open_checkpoint(tmp_path, these)
    for _ in range(3):
        checkpoint._note(OSError(28, "No space left on device"))
    with pytest.raises(OSError, match="No space"):
        checkpoint.save()
    checkpoint._note(OSError(28, "No space left on device"))
    checkpoint.save()
    checkpoint._note(SnapshotError("made up"))
    with pytest.raises(ZeroDivisionError) as caught, checkpoint:
        _ = 1 / 0
    assert "in the checkpoint's thread: SnapshotError: made up" in caught.value.__notes__[0]
    assert checkpoint.closed


# ---- what a directory says -------------------------------------------------------------------------------------------


def test_a_history_and_what_changed_from_one_to_another(tmp_path):
    w, b = dl.zeros((100, 512)), dl.zeros((4096,), np.uint8)
    for run in range(2):
        with open_checkpoint(tmp_path, {"w": w, "b": b}) as checkpoint:
            for step in range(3):
                w[10 * run + step] = step + 1
                if step == 2:
                    b[7] = run + 1
                checkpoint.save(step=10 * run + step)
    records = dl.Checkpoint.history(tmp_path)
    assert [record.step for record in records] == [0, 1, 2, 10, 11, 12]
    assert [record.info.kind for record in records] == ["full", "diff", "diff"] * 2
    assert [record.time for record in records] == sorted(record.time for record in records)
    assert [*dl.Checkpoint.diff(tmp_path, 0, 1)] == ["w"]
    changed = dl.Checkpoint.diff(tmp_path, 2, 0)
    assert changed["w"].rows.tolist() == [1, 2]
    assert (changed["b"].rows.tolist(), changed["b"].pages.count) == (list(range(4096)), 1)
    across = dl.Checkpoint.diff(tmp_path, 1)
    assert across["w"].rows.tolist() == [2, 10, 11, 12]
    assert dl.Checkpoint.diff(tmp_path, 1, 1) == {}
    with pytest.raises(KeyError, match="no checkpoint of step 7"):
        dl.Checkpoint.diff(tmp_path, 7)


def test_arrays_that_are_not_alike_differ_whole(tmp_path):
    w, s, larger = np.zeros(1000), np.zeros((), np.int64), np.zeros(2000)
    with open_checkpoint(tmp_path, {"w": w, "s": s}) as checkpoint:
        checkpoint.save()
        checkpoint.update({"w": larger})
        checkpoint.save()
    changed = dl.Checkpoint.diff(tmp_path, 0, 1)
    assert list(changed) == ["w"]
    assert changed["w"].rows.tolist() == list(range(2000))


@pytest.mark.parametrize("ending", [".npy", ".npz"])
def test_an_export_holds_the_arrays(tmp_path, ending):
    these = arrays()
    with open_checkpoint(tmp_path / "c", these) as checkpoint:
        write(these, 3)
        checkpoint.save()
    target = tmp_path / f"out{ending}"
    if ending == ".npy":
        with pytest.raises(ValueError, match=r"holds one array, and there are 3: b, f, w; name one"):
            export(tmp_path / "c", target)
        assert export(tmp_path / "c", target, names=["f"]) == ["f"]
        found = {"f": np.load(target)}
    else:
        assert export(tmp_path / "c", target) == ["w", "b", "f"]
        found = np.load(target)
    for name in found:
        assert (np.asarray(found[name]) == these[name]).all()
        assert found[name].dtype == these[name].dtype
    assert sorted(os.listdir(tmp_path)) == ["c", target.name]
    if ending == ".npz":
        found.close()
    with pytest.raises(FileExistsError, match="overwrites nothing"):
        export(tmp_path / "c", target)


IN_ZARR = """
import sys
import numpy as np
import zarr
from dirtylog.sinks.checkpoint import export
directory, target = sys.argv[1:]
assert export(directory, target) == ["w", "b", "f", "layer/k", "scalar", "none"]
assert export(directory, target + ".one.zarr", names=["f"]) == ["f"]
group, one = zarr.open_group(target, mode="r"), zarr.open_group(target + ".one.zarr", mode="r")
for name, expected in np.load(directory + ".npz").items():
    for found in [group[name], one[name]] if name == "f" else [group[name]]:
        assert np.array_equal(found[...], expected) and found.shape == expected.shape, name
        # zarr notes the order of the bytes elsewhere than in the type.
        assert found.dtype.newbyteorder("=") == expected.dtype.newbyteorder("="), name
try:
    export(directory, target)
except FileExistsError as error:
    assert "overwrites nothing" in str(error)
else:
    raise AssertionError("the target was overwritten")
"""


def test_an_export_to_zarr_holds_the_arrays(tmp_path):
    if importlib.util.find_spec("zarr") is None:
        pytest.skip("zarr is not installed")
    more = {"layer/k": np.arange(7, dtype=">f8"), "scalar": np.array(7, np.int16), "none": np.zeros((0, 4))}
    these = {**arrays(), **more}
    write(these, 3)
    with open_checkpoint(tmp_path / "c", these) as checkpoint:
        checkpoint.save()
    np.savez(tmp_path / "c.npz", **these)
    # In a process of its own: zarr starts threads that live as long as their process.
    command = [sys.executable, "-W", "error", "-c", IN_ZARR, str(tmp_path / "c"), str(tmp_path / "out.zarr")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert sorted(os.listdir(tmp_path)) == ["c", "c.npz", "out.zarr", "out.zarr.one.zarr"]


def test_an_export_of_one_array_reads_no_other_into_memory_and_checks_all(tmp_path, monkeypatch):
    these = {**arrays(), "none": np.zeros((0, 3), np.int16)}
    with open_checkpoint(tmp_path / "c", these) as checkpoint:
        checkpoint.save()
        write(these, 7)
        checkpoint.save()
    read, real = [], snapshot.read
    monkeypatch.setattr(snapshot, "restore", lambda *_, **__: pytest.fail("all arrays were read"))
    monkeypatch.setattr(snapshot, "read", lambda path, region: read.append(region) or real(path, region=region))
    assert export(tmp_path / "c", tmp_path / "some.npz", names=["none", "f", "b", "f"]) == ["none", "f", "b"]
    assert read == ["f", "b"]
    with np.load(tmp_path / "some.npz") as found:
        for name in ("none", "f", "b"):
            assert (found[name] == these[name]).all()
            assert (found[name].dtype, found[name].shape) == (these[name].dtype, these[name].shape)
    with pytest.raises(KeyError, match="has no array 'x'; it has b, f, none, w"):
        export(tmp_path / "c", tmp_path / "other.npz", names=["x"])
    with open(tmp_path / "c" / "0000000002.ckpt", "r+b") as file:
        file.write(b"?")  # of the array that is not asked for
    with pytest.raises(SnapshotError, match="does not match its digest"):
        export(tmp_path / "c", tmp_path / "other.npz", names=["f"])
    assert sorted(os.listdir(tmp_path)) == ["c", "some.npz"]


def test_an_export_is_on_disk_before_it_has_its_name(tmp_path, monkeypatch):
    exporting = sys.modules["dirtylog.sinks.checkpoint.export"]  # which the function of that name hides
    synced, real_sync, real_rename = [], os.fsync, exporting.rename_new

    def fsync(descriptor):
        synced.append(os.fstat(descriptor).st_ino)
        real_sync(descriptor)

    def rename_new(part, path):
        assert os.stat(part).st_ino in synced
        real_rename(part, path)
        synced.clear()

    these = arrays()
    with open_checkpoint(tmp_path / "c", these) as checkpoint:
        checkpoint.save()
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(exporting, "rename_new", rename_new)
    export(tmp_path / "c", tmp_path / "out.npz")
    assert (tmp_path / "out.npz").exists()


@pytest.mark.parametrize("why", ["no directory", "a full disk"])
def test_an_export_that_cannot_be_written_is_named_as_it_was_asked_for(tmp_path, monkeypatch, why):
    these = arrays()
    with open_checkpoint(tmp_path / "c", these) as checkpoint:
        checkpoint.save()
    target = tmp_path / "out.npz"
    if why == "no directory":
        target = tmp_path / "not" / "out.npz"
    else:

        def full(*_, **__):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(np.lib.format, "write_array", full)
    with pytest.raises(OSError, match="No s") as caught:
        export(tmp_path / "c", target)
    assert caught.value.filename == str(target)
    assert os.listdir(tmp_path) == ["c"]


def test_an_export_that_will_not_do_leaves_nothing(tmp_path, monkeypatch):
    w = np.zeros(3)
    with open_checkpoint(tmp_path / "c", {"../w": w}) as checkpoint:
        checkpoint.save()
    with pytest.raises(ValueError, match=r"ends in '.txt'; it must end in one of .npy, .npz, .zarr"):
        export(tmp_path / "c", tmp_path / "out.txt")
    with pytest.raises(ValueError, match="a path out of the file"):
        export(tmp_path / "c", tmp_path / "out.npz")
    with pytest.raises(KeyError, match=r"no array 'x'; it has \.\./w"):
        export(tmp_path / "c", tmp_path / "out.npz", names=["x"])
    with pytest.raises(KeyError, match="no checkpoint of step 5"):
        export(tmp_path / "c", tmp_path / "out.npz", 5)
    monkeypatch.setitem(sys.modules, "zarr", None)
    with open_checkpoint(tmp_path / "d", {"w": w}) as checkpoint:
        checkpoint.save()
    with pytest.raises(dl.BackendUnavailable, match=r"pip install zarr, or write \.npz"):
        export(tmp_path / "d", tmp_path / "out.zarr")
    assert sorted(os.listdir(tmp_path)) == ["c", "d"]


# ---- progress --------------------------------------------------------------------------------------------------------


class Stop(Exception):
    pass


def stopping_after(calls):
    """Return a callback that raises at the call after so many."""
    left = iter(range(calls))

    def told(done, total):
        if next(left, None) is None:
            raise Stop

    return told


@pytest.mark.parametrize("moment", [None, "fork"])
def test_a_save_says_how_far_it_is(tmp_path, moment):
    w, seen = dl.zeros((3 << 20,), np.uint8), []
    w[:] = 1
    with open_checkpoint(tmp_path, {"w": w}, **({"moment": moment} if moment else {})) as checkpoint:
        checkpoint.save(progress=lambda done, total: seen.append((done, total)))
        assert [done for done, _ in seen] == sorted(done for done, _ in seen)
        assert seen[0] == ((0, 3 << 20) if moment else (1 << 20, 3 << 20))
        assert seen[-1] == (3 << 20, 3 << 20)
        w[5000] = 2
        seen.clear()
        checkpoint.save(progress=lambda done, total: seen.append((done, total)))
    assert seen == [(0, 4096), (4096, 4096)] if moment else seen == [(4096, 4096)]


@pytest.mark.parametrize("moment", ["copy", "fork"])
@pytest.mark.parametrize("calls", [0, 1, 2])
def test_what_progress_raises_loses_nothing_and_leaves_nothing(tmp_path, moment, calls):
    w = dl.zeros((3 << 20,), np.uint8)
    with open_checkpoint(tmp_path, {"w": w}, moment=moment) as checkpoint:
        checkpoint.save(step=0)
        w[:] = 1
        before = os.listdir(tmp_path)
        with pytest.raises(Stop):
            checkpoint.save(step=1, progress=stopping_after(calls))
        assert os.listdir(tmp_path) == before
        assert dl.Checkpoint.steps(tmp_path) == [0]
        assert checkpoint.save().count == 768
    assert dl.Checkpoint.steps(tmp_path) == [0, 1]
    assert (dl.Checkpoint.load(tmp_path)["w"] == 1).all()


def test_reading_says_how_far_it_is_where_all_is_read(tmp_path):
    w, seen = np.ones(3 << 20, np.uint8), []
    with open_checkpoint(tmp_path / "c", {"w": w}) as checkpoint:
        checkpoint.save()

    def told(done, total):
        seen.append((done, total))

    dl.Checkpoint.load(tmp_path / "c", progress=told)
    assert seen == []
    for read in (
        lambda told: dl.Checkpoint.load(tmp_path / "c", verify=True, progress=told),
        lambda told: dl.Checkpoint.load(tmp_path / "c", into={"w": w}, progress=told),
        lambda told: export(tmp_path / "c", tmp_path / "out.npy", progress=told),
    ):
        with pytest.raises(Stop):
            read(stopping_after(0))
        assert os.listdir(tmp_path) == ["c"]
        seen.clear()
        read(told)
        assert seen[-1] == (3 << 20, 3 << 20)


# ---- arrays without items --------------------------------------------------------------------------------------------

EMPTY = {
    "none": np.zeros((0, 4)),
    "w": np.arange(10.0),
    "scalar": np.array(7, np.int16),
    "wide": np.zeros((5000, 0), "M8[s]"),
    "record": np.zeros(0, [("a", "<i4"), ("b", "<f8", (2,))]),
}


def alike(found, expected):
    assert list(found) == list(expected)
    for name, array in expected.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
        assert np.array_equal(found[name], array)


@pytest.mark.parametrize("moment", ["copy", "fork"])
@pytest.mark.parametrize("names", [EMPTY, ["none", "wide"]])
def test_arrays_without_items_are_saved_with_their_types_and_shapes(tmp_path, moment, names):
    these = {name: EMPTY[name].copy() for name in names}
    with open_checkpoint(tmp_path / "c", these, keep=2, moment=moment) as checkpoint:
        for step in range(5):
            if "w" in these:
                these["w"][3] = step
            checkpoint.save(step=step)
    assert dl.Checkpoint.steps(tmp_path / "c") == [3, 4]
    alike(dl.Checkpoint.load(tmp_path / "c", verify=True), these)
    into = {name: np.ones_like(array) for name, array in these.items()}
    assert dl.Checkpoint.load(tmp_path / "c", into=into) is into
    alike(into, these)
    # The scalar may share a page of the heap with `w`.
    assert {*dl.Checkpoint.diff(tmp_path / "c", 3)} - {"scalar"} == {"w"} & {*these}
    assert [(name, shape) for name, _, shape, _ in directory.described(tmp_path / "c", None)[1]] == [
        (name, list(array.shape)) for name, array in these.items()
    ]
    export(tmp_path / "c", tmp_path / "out.npz")
    with np.load(tmp_path / "out.npz") as file:
        alike({name: file[name] for name in file}, these)


def test_an_array_that_comes_to_have_items_is_tracked_once_it_is_told(tmp_path):
    w, b = np.zeros((0, 4)), np.ones(5)
    with open_checkpoint(tmp_path, {"w": w, "b": b}) as checkpoint:
        checkpoint.save(step=0)
        w = np.ones((3, 4))
        said = pytest.warns(RuntimeWarning, match="'w' has no other reference")
        with said if GIL else contextlib.nullcontext():  # without one, references are not counted in one place
            checkpoint.save(step=1)
        checkpoint.update({"w": w})
        checkpoint.save(step=2)
        w[1, 1] = 7
        assert checkpoint.save(step=3).kind == "diff"
        empty = np.zeros((2, 0), np.int8)
        checkpoint.update({"w": empty})
        checkpoint.save(step=4)
        b[2] = 9
        assert checkpoint.save(step=5).kind == "diff"
    assert dl.Checkpoint.load(tmp_path, 2)["w"].tolist() == [[1.0] * 4] * 3
    alike(dl.Checkpoint.load(tmp_path, 3), {"w": w, "b": np.ones(5)})
    alike(dl.Checkpoint.load(tmp_path, 5), {"w": empty, "b": b})


def test_an_empty_array_that_grows_in_place_is_not_passed_over(tmp_path):
    grows, b = np.zeros(0), np.ones(5)
    with open_checkpoint(tmp_path, {"grows": grows, "b": b}) as checkpoint:
        grows.resize(3, refcheck=False)
        b[0] = 2
        with pytest.raises(ValueError, match=r"'grows' was empty and has grown; tell the checkpoint: update"):
            checkpoint.save()
        checkpoint.update({"grows": grows})
        checkpoint.save()
    alike(dl.Checkpoint.load(tmp_path), {"grows": np.zeros(3), "b": b})


def test_what_cannot_be_an_empty_array_is_refused(tmp_path):
    for bad, error in ((np.zeros(0, object), TypeError), (np.ma.zeros(0), TypeError)):
        with pytest.raises(error):
            open_checkpoint(tmp_path / "c", {"w": bad, "b": np.ones(5)})
    with pytest.raises(ValueError, match="will not do for memory"):
        open_checkpoint(tmp_path / "c", {"": np.zeros(0), "b": np.ones(5)})
    these = {"w": np.zeros((0, 4)), "b": np.ones(5)}
    kept = list(these.values())
    with open_checkpoint(tmp_path / "c", these) as checkpoint:
        checkpoint.save()
    assert len(kept) == 2
    for into in ({"b": np.ones(5)}, {"b": np.ones(5), "w": np.zeros((0, 5))}):
        with pytest.raises(ValueError, match=r"no array 'w' of shape \(0, 4\)"):
            dl.Checkpoint.load(tmp_path / "c", into=into)


@pytest.mark.parametrize(
    "note",
    [1, [1], [[0, "w", "<f8", [1]]], [[0, "w", "<f8", []]], [[0, "w", "|O", [0]]], [[0, "w", "nothing", [0]]],
     [["0", "w", "<f8", [0]]], [[0, 1, "<f8", [0]]], [[0, "w", "<f8", [0] * 65]], [[0, "w", "<f8", [0, -1]]],
     [[0, "w", "<f8", [0, 1 << 62, 1 << 62]]]],
)  # fmt: skip
def test_what_a_file_says_of_its_empty_arrays_is_not_believed(tmp_path, note):
    noted = {"step": 1, "keep": None, "since": 1, "reached": 1, "user": None, "empty": note}
    snapshot.save(tmp_path / "0000000001.ckpt", {"b": b"x"}, state=noted)
    with pytest.raises(SnapshotError):
        dl.Checkpoint.load(tmp_path)


def test_a_checkpoint_that_came_from_elsewhere_keeps_its_empty_arrays(tmp_path):
    these = {"none": np.zeros((0, 4)), "w": np.arange(10.0)}
    with open_checkpoint(tmp_path / "c", these) as checkpoint:
        state = checkpoint.save(step=3, state="here").state
    path = directory.next_path(str(tmp_path))
    snapshot.save(path, {"w": these["w"]}, state=directory.noted_for(path, state))
    alike(dl.Checkpoint.load(tmp_path, 3), these)
    assert dl.Checkpoint.state_of(tmp_path) == "here"
