"""Backups of a disk that a real qemu-storage-daemon has: the disk equals the backup, whoever was killed in between."""

import json
import os
import shutil
import subprocess

import numpy as np
import pytest

from dirtylog import cli
from dirtylog.errors import BackendUnavailable, DirtyLogError
from dirtylog.sinks import snapshot
from dirtylog.sinks.snapshot import disks
from dirtylog.sinks.snapshot.disks import back_up, newest, restore_disk
from dirtylog.sources.qemu import QemuDisk

from ..qemu import SIZE, bitmaps, program

pytest.importorskip("xxhash", reason="xxhash is not installed")


def save(machine, directory, **how):
    return back_up(directory, machine.qmp, "disk", nbd=machine.daemon.nbd, sync=False, **how)


def restored(path):
    return np.asarray(snapshot.restore(path)).tobytes()


def soak(machine, directory, rounds, granularity, kills, **how):
    """Back up again and again, with the daemon killed in some rounds and ended in one; check each backup."""
    fulls = 0
    for number in range(rounds):
        if number in kills:
            machine.restart(kill=True)
        elif number == rounds // 2:
            machine.restart(kill=False)
        machine.write(6)
        done = save(machine, directory, granularity=granularity, **how)
        assert bool(done.why_full) == (number == 0 or number in kills), (number, done.why_full)
        fulls += done.info.kind == "full"
        assert restored(done.info.path) == machine.content()
    assert fulls == 1 + len(kills)


@pytest.mark.parametrize("granularity", [4096, 65536, 1 << 20])
def test_the_disk_equals_each_backup_whoever_was_killed(machine, tmp_path, granularity):
    soak(machine, tmp_path / "backups", 4, granularity, kills={1})


def test_a_backup_is_of_one_moment_however_much_is_written_meanwhile(machine, tmp_path):
    machine.write(20)
    save(machine, tmp_path / "b")
    machine.write(20)
    before = machine.content()
    told = []

    def meanwhile(done, total):
        told.append(done)
        machine.writer.write(0, SIZE, len(told) % 256)

    done = save(machine, tmp_path / "b", progress=meanwhile)
    assert told
    assert restored(done.info.path) == before
    assert [name for name in os.listdir(tmp_path / "b") if name.startswith(".")] == []
    assert restored(save(machine, tmp_path / "b").info.path) == machine.content()


def test_a_backup_that_fails_loses_nothing_wherever_it_fails(machine, tmp_path, monkeypatch):
    machine.write(5)
    save(machine, tmp_path / "b")
    for step, module in (("write", disks), ("parent_link", disks)):
        machine.write(3)
        with monkeypatch.context() as patched:
            patched.setattr(module, step, lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                save(machine, tmp_path / "b")
    # On disk, and its bitmap not removed: as if the process had died just then.
    with monkeypatch.context() as patched:
        patched.setattr(QemuDisk, "release_lease", lambda *_: None)
        machine.write(3)
        done = save(machine, tmp_path / "b")
    assert not done.why_full
    assert restored(done.info.path) == machine.content()
    machine.write(3)
    done = save(machine, tmp_path / "b")
    assert not done.why_full
    assert done.info.exact
    assert restored(done.info.path) == machine.content()


@pytest.mark.parametrize("first", [True, False])
def test_a_full_backup_that_fails_leaves_no_bitmap_that_nobody_knows(machine, tmp_path, monkeypatch, first):
    if not first:
        save(machine, tmp_path / "b")
    for _ in range(2):
        with monkeypatch.context() as patched:
            patched.setattr(disks, "write", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                save(machine, tmp_path / "b", full=True)
        assert len(bitmaps(machine.qmp)) <= 2
    machine.write(5)
    assert bool(save(machine, tmp_path / "b").why_full) == first
    assert bitmaps(machine.qmp) == [newest(tmp_path / "b").bitmap]
    assert restored(newest(tmp_path / "b").path) == machine.content()


def test_a_full_backup_that_fails_after_qemu_was_killed_is_made_again(machine, tmp_path, monkeypatch):
    save(machine, tmp_path / "b")
    machine.write(5)  # known to a bitmap that was never stored, and is lost without a trace
    machine.restart(kill=True)
    with monkeypatch.context() as patched:
        patched.setattr(disks, "write", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            save(machine, tmp_path / "b")
    done = save(machine, tmp_path / "b")
    assert "not there any more" in done.why_full
    assert restored(done.info.path) == machine.content()
    assert not save(machine, tmp_path / "b").why_full


def test_why_a_backup_is_full_is_said_and_what_nobody_goes_on_with_is_removed(machine, tmp_path):
    assert save(machine, tmp_path / "b").why_full == "there is no backup yet"
    assert save(machine, tmp_path / "b").why_full == ""
    assert save(machine, tmp_path / "b", full=True).why_full == "it was asked for"
    assert "pages of 65536" in save(machine, tmp_path / "b", granularity=4096).why_full
    name = newest(tmp_path / "b").bitmap
    machine.qmp.execute("block-dirty-bitmap-remove", {"node": "disk", "name": name})
    assert "not there any more" in save(machine, tmp_path / "b").why_full
    assert bitmaps(machine.qmp) == [newest(tmp_path / "b").bitmap]
    with disks.alone_in(str(tmp_path / "b")), pytest.raises(DirtyLogError, match="another backup"):
        save(machine, tmp_path / "b")


def test_restored_to_raw_and_qcow2_by_the_command(machine, tmp_path, capsys):
    def command(*words):
        code = cli.main(["backup", *map(str, words)])
        return code, capsys.readouterr()

    where = tmp_path / "b"
    monitor = ["--qmp", machine.daemon.monitor, "--node", "disk", "--nbd", machine.daemon.nbd, "--no-sync"]
    machine.qmp.close()  # a monitor serves one client
    for expected in ("full: there is no backup yet", "what was written since 00000001.backup"):
        machine.write(5)
        code, said = command("save", where, *monitor)
        assert code == 0, said.err
        assert expected in said.out
    wanted = machine.content()
    code, said = command("verify", where, "--json")
    assert code == 0
    assert [each["kind"] for each in json.loads(said.out)["backups"]] == ["full", "diff"]
    assert command("restore", where, tmp_path / "raw")[0] == 0
    assert (tmp_path / "raw").read_bytes() == wanted
    assert command("restore", where, tmp_path / "q", "--format", "qcow2")[0] == 0
    compared = [program("qemu-img"), "compare", "-f", "raw", "-F", "qcow2", tmp_path / "raw", tmp_path / "q"]
    subprocess.run(compared, check=True, capture_output=True)
    assert command("restore", where, tmp_path / "first", "--backup", "00000001.backup")[0] == 0
    code, said = command("restore", where, tmp_path / "q", "--format", "qcow2")
    assert code == 1
    assert "is not overwritten" in said.err
    code, said = command("restore", where, tmp_path / "n", "--format", "nonsense")
    assert code == 1
    assert "qemu-img could not make the image" in said.err
    assert sorted(path.name for path in tmp_path.glob(".*")) == []
    code, said = command("prune", where, "--keep-last", "1", "--json")
    assert code == 0
    assert len(json.loads(said.out)["removed"]) == 1
    code, said = command("list", where)
    assert (code, "restorable" in said.out) == (0, True)
    assert restored(newest(where).path) == wanted
    machine.write(5)
    code, said = command("save", where, *monitor, "--json")
    assert json.loads(said.out)["why_full"] == ""
    assert restored(newest(where).path) == machine.content()
    path = newest(where).path
    with open(path, "r+b") as file:
        file.write(os.urandom(4096))
    assert command("verify", where)[0] == 1


def test_what_cannot_be_restored_is_said(tmp_path, monkeypatch):
    (tmp_path / "none").mkdir()
    with pytest.raises(snapshot.SnapshotError, match="no backup in it"):
        restore_disk(tmp_path / "none", tmp_path / "image")
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(BackendUnavailable, match="qemu-img is not on PATH"):
        restore_disk(tmp_path / "x", tmp_path / "image", format="qcow2")
