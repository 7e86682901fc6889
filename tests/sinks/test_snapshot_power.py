"""Power cuts, by a model: of every system call of a writer, the disk as it may be if the power goes right after it.

Whatever comes out: every snapshot that is there must restore, and every one that a call has returned for must be there.
test_snapshot_file_systems.py asks the same of real file systems.
"""

import shutil

import pytest

import dirtylog as dl

from .power import WORKS, Disk, chain, check, run, run_checkpoints

pytestmark = pytest.mark.usefixtures("mixed_layouts")


def recorded(work, make_tree, directory, monkeypatch):
    tree = chain(make_tree, directory)
    disk = Disk(directory)
    return disk, run(work, tree, disk, monkeypatch)


def checkpointed(directory, monkeypatch, steps):
    directory.mkdir()
    disk = Disk(directory)
    return disk, run_checkpoints(steps, disk, monkeypatch)


@pytest.mark.parametrize("work", WORKS)
def test_a_power_cut_after_any_system_call_leaves_snapshots_that_restore(tmp_path, make_tree, monkeypatch, work):
    disk, memory = recorded(work, make_tree, tmp_path / "disk", monkeypatch)
    assert ("sync directory",) in disk.operations
    assert check(disk, memory, tmp_path / "after", torn=1) > 1


def test_a_power_cut_of_a_checkpoint_leaves_checkpoints_that_load(tmp_path, monkeypatch):
    disk, memory = checkpointed(tmp_path / "disk", monkeypatch, 7)
    assert check(disk, memory, tmp_path / "after", torn=1) > 10


@pytest.mark.parametrize("forgotten", ["sync", "sync directory"])
def test_the_model_finds_a_sync_that_is_missing(tmp_path, make_tree, monkeypatch, forgotten):
    disk, memory = recorded("merge", make_tree, tmp_path / "disk", monkeypatch)
    disk.operations = [each for each in disk.operations if each[0] != forgotten]
    with pytest.raises((AssertionError, dl.DirtyLogError)):
        check(disk, memory, tmp_path / "after", torn=3)


@pytest.mark.stress
@pytest.mark.parametrize("work", [*WORKS, "checkpoint"])
def test_power_cuts_with_many_torn_disks(tmp_path, make_tree, monkeypatch, work):
    for seed in range(3):
        place = tmp_path / f"disk{seed}"
        if work == "checkpoint":
            disk, memory = checkpointed(place, monkeypatch, 15)
        else:
            disk, memory = recorded(work, make_tree, place, monkeypatch)
        check(disk, memory, tmp_path / f"after{seed}", torn=10, seed=seed)
        shutil.rmtree(place)
