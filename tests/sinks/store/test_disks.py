"""Backups of a QEMU disk in a store: each restores exactly, whoever is killed, whatever the store does or forgets."""

import json
import os
import subprocess
import sys
from itertools import count

import pytest

from dirtylog import cli
from dirtylog.errors import DirtyLogError
from dirtylog.sinks.snapshot import SnapshotError
from dirtylog.sinks.store import BranchMoved, InDoubt, disks, repository, restore
from dirtylog.sinks.store.disks import back_up, backups, prune, restore_disk, verify
from dirtylog.sources.qemu import QemuDisk

from ...qemu import ENVIRONMENT, bitmaps, program

pytest.importorskip("icechunk")
CHUNK = 65536


@pytest.fixture(autouse=True)
def scratch(tmp_path, monkeypatch):
    """The directory for scratch files, in which nothing may be left."""
    where = tmp_path / "scratch"
    where.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(where))
    yield where
    assert os.listdir(where) == []


def save(machine, where, **how):
    return back_up(where, machine.qmp, "disk", nbd=machine.daemon.nbd, **how)


def restored(repo, snapshot=None):
    return restore(repo, snapshot)["disk"].tobytes()


def test_the_disk_equals_each_of_ten_backups_with_the_daemon_killed_once(machine, tmp_path, icechunk):
    where, then = tmp_path / "store", {}
    for number in range(10):
        if number in (3, 6):
            machine.restart(kill=number == 6)
        machine.write(6)
        done = save(machine, where)
        assert bool(done.why_full) == (number in (0, 6)), done
        assert done.saved.exact or done.why_full
        then[done.saved.snapshot] = machine.content()
    told = backups(where)
    assert [version.snapshot for version in told] == list(then)
    assert len({version.transaction for version in told}) == 10
    for number, (snapshot, content) in enumerate(then.items()):
        restore_disk(where, tmp_path / f"{number}.raw", snapshot)
        assert (tmp_path / f"{number}.raw").read_bytes() == content
    assert bitmaps(machine.qmp) == [told[-1].about["disk"]["bitmap"]]


def test_dirty_chunks_alone_are_written_and_zeros_are_nothing(machine, repo, tmp_path):
    machine.writer.write(0, 20 * CHUNK, 1)
    first = save(machine, repo)
    assert (first.saved.chunks, first.chunk, first.page_size, first.size) == (20, CHUNK, CHUNK, machine.size)
    machine.writer.write(7 * CHUNK + 100, 1, 2)
    machine.writer(f"write -q -z {11 * CHUNK} {4 * CHUNK}")
    second = save(machine, repo)
    assert (second.saved.chunks, second.saved.pages, second.why_full) == (5, 5, "")
    keys = sorted(status for status in chunks_of(repo))
    assert keys == [number for number in range(20) if number not in range(11, 15)]
    nothing = save(machine, repo)
    assert (nothing.saved.chunks, nothing.why_full) == (0, "")
    assert nothing.saved.snapshot != second.saved.snapshot
    restore_disk(repo, tmp_path / "raw")
    assert (tmp_path / "raw").read_bytes() == machine.content() == restored(repo)
    assert (tmp_path / "raw").stat().st_blocks * 512 <= 16 * CHUNK


def chunks_of(repo):
    """The numbers of the chunks that the newest snapshot has."""
    from zarr.core.sync import sync

    async def found():
        return [int(key[0]) async for key in repo.readonly_session("main").chunk_coordinates("/disk")]

    return sync(found())


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_store_that_fails_at_any_call_loses_nothing_and_repeats_nothing(machine, repo, flaky, after):
    machine.write(3)
    save(machine, repo)
    adopted = 0
    for call in count(1):
        machine.write(2)
        failing = flaky(repo, call, after)
        try:
            adopted += save(machine, failing).saved.adopted
        except OSError:
            machine.write(1)
            assert not save(machine, repo).why_full
        assert restored(repo) == machine.content()
        if failing.calls < call:
            break
    assert call > 5
    assert adopted == after
    told = backups(repo)
    assert len({version.about["disk"]["bitmap"] for version in told}) == len(told) == call + 1
    assert len(bitmaps(machine.qmp)) == 1


def test_a_commit_of_which_the_store_says_nothing_is_asked_for_by_the_next_backup(machine, repo, flaky):
    save(machine, repo)
    machine.write(3)
    counted = flaky(repo)
    save(machine, counted)
    for after in (True, False):
        machine.write(3)
        before = len(backups(repo))
        # No answer to the commit, which is the last call, nor to anything after it.
        with pytest.raises(InDoubt):
            save(machine, flaky(repo, counted.calls, after, silent=5))
        assert len(backups(repo)) == before + after
        machine.write(1)
        assert not save(machine, repo).why_full
        assert len(backups(repo)) == before + after + 1
        assert restored(repo) == machine.content()


def delayed(flaky, repo, late, commits):
    """A repository whose commits are noted in `late`, and come about as `commits` calls them."""

    class Late(flaky):
        def call(self, work, *args, **options):
            if work.__name__ != "commit":
                return super().call(work, *args, **options)
            late.append(lambda: work(*args, **options))
            return commits(late[-1])

    return Late(repo)


def test_a_commit_that_lands_while_the_next_backup_is_made_is_gone_on_from(machine, repo, flaky):
    machine.write(3)
    save(machine, repo)
    late = []

    def commits(commit):
        if len(late) == 1:
            raise OSError("no answer")
        if len(late) == 2:
            late[0]()
        return commit()

    machine.write(3)
    with pytest.raises(OSError, match="no answer"):
        save(machine, delayed(flaky, repo, late, commits))
    machine.write(3)
    done = save(machine, delayed(flaky, repo, late, commits))
    assert len(late) == 3
    assert not done.why_full
    assert len(backups(repo)) == 3
    assert restored(repo) == machine.content()
    machine.write(1)
    assert not save(machine, repo).why_full
    assert restored(repo) == machine.content()


def test_a_commit_that_lands_when_the_next_backup_has_given_up_makes_the_one_after_it_full(machine, repo, flaky):
    save(machine, repo)
    late = []

    def commits(commit):
        raise OSError("no answer")

    for _ in range(2):
        machine.write(3)
        with pytest.raises(OSError, match="no answer"):
            save(machine, delayed(flaky, repo, late, commits))
    late[0]()  # whose bitmap the second one has merged into the one before
    machine.write(3)
    assert "not there any more" in save(machine, repo).why_full
    assert restored(repo) == machine.content()


KILLED = """
import os, sys
from dirtylog.sinks.store import disks
from dirtylog.sources.qemu import Qmp

commit_once = disks.commit_once

def killed(*args):
    commit_once(*args)
    os._exit(9)

disks.commit_once = killed
disks.back_up(sys.argv[1], Qmp(sys.argv[2]), "disk", nbd=sys.argv[3])
"""


def test_a_process_that_is_killed_when_it_has_committed_loses_nothing(machine, tmp_path, scratch, icechunk):
    machine.write(3)
    where = str(tmp_path / "store")
    save(machine, where)
    machine.write(3)
    machine.qmp.close()  # a monitor serves one client
    told = [where, machine.daemon.monitor, machine.daemon.nbd]
    killed = subprocess.run([sys.executable, "-c", KILLED, *map(str, told)], env={**os.environ, "TMPDIR": str(scratch)})
    assert killed.returncode == 9
    assert os.listdir(scratch)
    machine.write(3)
    machine.qmp = machine.daemon.qmp()
    done = save(machine, where)
    assert not done.why_full
    assert len(backups(where)) == 3
    assert restored(repository(where)) == machine.content()


def test_a_disk_that_cannot_be_read_commits_nothing_and_nothing_goes_on(machine, repo, monkeypatch):
    machine.writer.write(0, 3 * CHUNK, 1)
    save(machine, repo)
    machine.writer.write(0, 3 * CHUNK, 2)
    reads = []

    def read_bytes(disk, offset, out):
        reads.append(offset)
        raise OSError(5, "a bad sector")

    with monkeypatch.context() as patched:
        patched.setattr(QemuDisk, "read_bytes", read_bytes)
        with pytest.raises(OSError, match="a bad sector"):
            save(machine, repo)
    assert reads == [0]
    assert len(backups(repo)) == 1
    machine.writer.write(5 * CHUNK, 1, 3)
    done = save(machine, repo)
    assert (done.saved.chunks, done.why_full) == (4, "")
    assert restored(repo) == machine.content()


def test_a_backup_is_of_one_moment_however_much_is_written_meanwhile(machine, repo):
    machine.writer.write(0, 4 * CHUNK, 9)
    save(machine, repo)
    for chunk in range(0, 20, 2):
        machine.writer.write(chunk * CHUNK, 100, 1)
    before, told = machine.content(), []

    def meanwhile(done, total):
        told.append((done, total))
        machine.writer.write(0, 20 * CHUNK, len(told))

    done = save(machine, repo, progress=meanwhile)
    assert told[-1] == (done.saved.nbytes, done.saved.nbytes)
    assert restored(repo) == before
    save(machine, repo)
    assert restored(repo) == machine.content()


def test_why_a_backup_is_full_is_said_and_strangers_are_not_written_over(machine, repo, scratch):
    assert save(machine, repo).why_full == "there is no backup yet"
    assert save(machine, repo).why_full == ""
    assert save(machine, repo, full=True).why_full == "it was asked for"
    assert save(machine, repo, granularity=4096).why_full == "the chain has pages of 65536 bytes"
    assert save(machine, repo, chunk=1 << 20).why_full == "the last backup has chunks of 65536 bytes"
    machine.write(5)
    done = save(machine, repo)
    assert (done.page_size, done.chunk, done.why_full) == (4096, 1 << 20, "")
    newest = backups(repo)[-1].about["disk"]["bitmap"]
    assert bitmaps(machine.qmp) == [newest]
    machine.qmp.execute("block-dirty-bitmap-remove", {"node": "disk", "name": newest})
    assert "not there any more" in save(machine, repo).why_full
    with disks._workplace(None, "key") as path:
        assert path.startswith(str(scratch))
        with pytest.raises(DirtyLogError, match="another backup"), disks._workplace(None, "key"):
            pass
    with pytest.raises(ValueError, match="chunk is 100"):
        save(machine, repo, chunk=100)
    session = repo.writable_session("main")
    disks.note(session.store, {"transaction": "theirs"})
    session.commit("a stranger's")
    with pytest.raises(BranchMoved, match="is not a backup of a disk"):
        save(machine, repo)
    assert save(machine, repo, full=True).why_full == "there is no backup yet"
    assert restored(repo) == machine.content()


def test_a_stranger_who_commits_meanwhile_is_refused(machine, repo, flaky):
    save(machine, repo)
    machine.write(3)

    def commits(commit):
        other = repo.writable_session("main")
        disks.note(other.store, {"transaction": "theirs"})
        other.commit("a stranger's")
        return commit()

    with pytest.raises(BranchMoved, match="somebody else has committed"):
        save(machine, delayed(flaky, repo, [], commits))


def test_a_damaged_chunk_is_not_restored(machine, tmp_path, icechunk):
    (tmp_path / "random").write_bytes(os.urandom(CHUNK))
    machine.writer(f"write -q -s {tmp_path / 'random'} 0 {CHUNK}")
    where = tmp_path / "store"
    save(machine, where)
    verify(where)
    chunk = max((where / "chunks").iterdir(), key=lambda path: path.stat().st_size)
    data = bytearray(chunk.read_bytes())
    data[len(data) // 2] ^= 1
    chunk.write_bytes(data)
    with pytest.raises(SnapshotError, match="cannot be read, at bytes 0 to"):
        verify(where)
    with pytest.raises(SnapshotError, match="cannot be read"):
        restore_disk(where, tmp_path / "raw")
    assert not (tmp_path / "raw").exists()
    with pytest.raises(SnapshotError, match="no backup nonsense; the newest is"):
        verify(where, "nonsense")
    with pytest.raises(SnapshotError, match="there is no repository"):
        backups(tmp_path / "none")


def test_what_is_pruned_is_gone_and_the_chain_goes_on(machine, tmp_path, icechunk):
    where = tmp_path / "store"
    for _ in range(4):
        machine.write(3)
        save(machine, where)
    told = backups(where)
    removed, kept = prune(where, 2, dry_run=True)
    assert (removed, kept) == (told[:2], told[2:])
    assert prune(where, 2) == (removed, kept)
    assert [version.snapshot for version in backups(where)] == [version.snapshot for version in kept]
    machine.write(3)
    assert not save(machine, where).why_full
    assert restored(repository(where)) == machine.content()
    verify(where, kept[0].snapshot)
    with pytest.raises(ValueError, match="at least 1"):
        prune(where, 0)
    repository(where).create_tag("t", kept[0].snapshot)
    with pytest.raises(ValueError, match=r"other branches or tags \(t\)"):
        prune(where, 1)


def test_a_store_by_the_command(machine, tmp_path, icechunk, capsys):
    def command(*words):
        code = cli.main(["backup", *map(str, words)])
        return code, capsys.readouterr()

    store = ["--store", tmp_path / "store"]
    monitor = ["--qmp", machine.daemon.monitor, "--node", "disk", "--nbd", machine.daemon.nbd]
    machine.qmp.close()  # a monitor serves one client
    for expected in ("full: there is no backup yet", "what was written since the last one"):
        machine.write(5)
        code, said = command("save", *store, *monitor)
        assert code == 0, said.err
        assert expected in said.out
    assert command("restore", *store, tmp_path / "raw")[0] == 0
    assert (tmp_path / "raw").read_bytes() == machine.content()
    assert command("restore", *store, tmp_path / "q", "--format", "qcow2")[0] == 0
    compared = [program("qemu-img"), "compare", "-f", "raw", "-F", "qcow2", tmp_path / "raw", tmp_path / "q"]
    subprocess.run(compared, check=True, capture_output=True, env=ENVIRONMENT)
    code, said = command("verify", *store, "--json")
    assert code == 0
    told = json.loads(said.out)["backups"]
    assert [bool(each["disk"]["why_full"]) for each in told] == [True, False]
    code, said = command("list", *store)
    assert (code, said.out.count("restorable")) == (0, 2)
    assert command("restore", *store, tmp_path / "first", "--backup", told[0]["snapshot"])[0] == 0
    code, said = command("restore", *store, tmp_path / "raw")
    assert (code, "is not overwritten" in said.err) == (1, True)
    code, said = command("prune", *store, "--keep-last", "1", "--json")
    assert json.loads(said.out)["removed"] == [told[0]["snapshot"]]
    for words, why in (
        (["list"], "name the place"),
        (["list", "directory", *store], "name the place"),
        (["list", "directory", "--branch", "b"], "--branch is about a store"),
        (["save", *store, *monitor, "--no-sync"], "--no-sync is about a directory"),
        (["prune", *store, "--keep-daily", "1"], "--keep-daily is about a directory"),
        (["prune", *store], "--keep-last"),
    ):
        code, said = command(*words)
        assert (code, why in said.err) == (2, True), said
    assert command("list", *store, "--branch", "nobody")[1].err.startswith("dirtylog: the store refused: ")
