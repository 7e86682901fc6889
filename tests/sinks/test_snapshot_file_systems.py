"""Power cuts of real file systems: ext4, xfs and btrfs, of which the disk has what it was told to flush, and any more.

Cut at every flush, with nothing, all, a beginning or any part of what was written since the last one. Every snapshot
that is there must restore, and every one that a call has returned for must be there. test_snapshot_power.py asks the
same of a model, where nothing can be mounted.
"""

import pytest

import dirtylog as dl

from .file_systems import FILE_SYSTEMS, FileSystem, alone
from .power import WORKS, chain, check, run, run_checkpoints

pytestmark = [
    pytest.mark.stress,
    pytest.mark.timeout(1800),
    pytest.mark.usefixtures("mixed_layouts"),
    pytest.mark.parametrize("kind", FILE_SYSTEMS),
]


def recorded(work, system, make_tree, monkeypatch):
    with system.recording():
        if work == "checkpoint":
            system.directory.mkdir()
            return run_checkpoints(7, system, monkeypatch)
        return run(work, chain(make_tree, system.directory), system, monkeypatch)


def count(system, states):
    print(f"{system.kind}: {len(system.entries)} writes and flushes, {system.mounts} cuts mounted, {states} states")
    assert system.mounts > 10
    assert states > 1


@pytest.mark.parametrize("work", [*WORKS, "checkpoint"])
@alone
def test_a_cut_of_the_power_leaves_snapshots_that_restore(tmp_path, make_tree, monkeypatch, kind, work):
    system = FileSystem(kind, tmp_path)
    memory = recorded(work, system, make_tree, monkeypatch)
    count(system, check(system, memory, tmp_path / "after", torn=4))


@pytest.mark.parametrize("work", [*WORKS, "checkpoint"])
@alone
def test_a_cut_after_any_call_that_the_disk_has_already_leaves_snapshots_that_restore(
    tmp_path, make_tree, monkeypatch, kind, work
):
    system = FileSystem(kind, tmp_path, eager=True)
    memory = recorded(work, system, make_tree, monkeypatch)
    count(system, check(system, memory, tmp_path / "after", torn=1))


@pytest.mark.parametrize("forgotten", ["sync", "sync directory"])
@alone
def test_a_sync_that_is_missing_is_found(tmp_path, make_tree, monkeypatch, kind, forgotten):
    system = FileSystem(kind, tmp_path, forgotten=forgotten)
    memory = recorded("save", system, make_tree, monkeypatch)
    with pytest.raises((AssertionError, dl.DirtyLogError)):
        check(system, memory, tmp_path / "after", torn=3)
