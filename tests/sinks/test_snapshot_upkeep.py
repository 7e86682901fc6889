"""Directories of snapshots kept in order: every one that is left restores at every moment, whoever dies or writes."""

import errno
import gc
import os
import subprocess
import sys
import time

import numpy as np
import pytest

from dirtylog import DirtyPages
from dirtylog.sinks.snapshot import (
    SnapshotError,
    catalog,
    clean,
    flatten,
    info,
    merge,
    overlay,
    prune,
    rebase,
    removal,
    restore,
    save,
    save_diff,
    staged,
    writer,
)  # fmt: skip

pytestmark = pytest.mark.usefixtures("mixed_layouts")

ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}


def plain(paths):
    return [os.path.basename(path) for path in paths]


def test_a_catalog_says_what_hangs_on_what(tree):
    tree.line("a", "b", "c")
    tree.diff("x", "a")
    (tree.directory / "notes.txt").write_text("not a snapshot")
    (tree.directory / "d").write_bytes((tree.directory / "b").read_bytes()[:-30])
    os.rename(tree.directory / "c", tree.directory / "hidden")
    tree.memory["e"] = tree.memory["c"]
    found = {os.path.basename(entry.path): entry for entry in catalog(tree.directory)}
    assert list(found) == ["a", "b", "hidden", "x"]
    assert plain(found["a"].children) == ["b", "x"]
    assert found["hidden"].parent == str(tree.directory / "b")
    assert [entry.depth for entry in found.values()] == [0, 1, 2, 1]
    os.unlink(tree.directory / "a")
    problems = {os.path.basename(entry.path): entry.problem for entry in catalog(tree.directory)}
    assert all("parent a is missing" in problems[name] for name in ("b", "x", "hidden"))


@pytest.mark.parametrize("keep", range(1, 6))
def test_prune_keeps_the_last_and_merges_what_they_need(tree, keep):
    tree.line("a", "b", "c", "d", "e")
    planned = prune(tree.directory, keep_last=keep, dry_run=True)
    assert tree.names() == ["a", "b", "c", "d", "e"]
    done = prune(tree.directory, keep_last=keep, sync=False)
    assert done == planned
    assert tree.check() == ["a", "b", "c", "d", "e"][5 - keep :] == plain(done.kept)
    assert plain(done.removed) == ["a", "b", "c", "d", "e"][: 5 - keep]
    assert len(done.merged) == (keep < 5)
    assert prune(tree.directory, keep_last=keep, sync=False).removed == ()


def test_prune_leaves_what_several_need_and_goes_on_after_it(tree):
    tree.line("a", "b", "c", "d")
    tree.diff("x", "b")
    tree.diff("y", "x")
    done = prune(tree.directory, keep_last=1, sync=False)
    assert plain(done.kept) == tree.check() == ["y"]
    tree.diff("z1", "y")
    tree.diff("z2", "y")
    done = prune(tree.directory, keep_last=2, sync=False)
    assert (plain(done.kept), plain(done.needed), done.removed) == (["z1", "z2"], ["y"], ())
    tree.check("z1", "z2", "y")


def test_prune_keeps_the_newest_of_each_day(tree, monkeypatch):
    day = 24 * 3600 * 10**9
    noon = time.mktime((2026, 3, 10, 12, 0, 0, 0, 0, -1)) * 1e9
    for i, (days, hours) in enumerate([(0, 0), (0, 3), (1, 0), (1, 5), (4, 0), (4, 1)]):
        monkeypatch.setattr(time, "time_ns", lambda at=noon + days * day + hours * 3600e9: int(at))
        tree.diff(f"s{i}", f"s{i - 1}") if i else tree.full("s0")
    done = prune(tree.directory, keep_daily=2, keep_last=1, sync=False)
    assert plain(done.kept) == tree.check() == ["s3", "s5"]


def test_the_newest_of_a_day_is_kept_though_the_clock_was_put_back(tree, monkeypatch):
    hour = 3600 * 10**9
    midnight = int(time.mktime((2026, 3, 10, 0, 0, 0, 0, 0, -1))) * 10**9
    # Yesterday, today, and then over midnight back into yesterday.
    for i, hours in enumerate((-5, 1, -1)):
        monkeypatch.setattr(time, "time_ns", lambda at=midnight + hours * hour: at)
        tree.diff(f"s{i}", f"s{i - 1}") if i else tree.full("s0")
    done = prune(tree.directory, keep_daily=2, dry_run=True)
    assert plain(done.kept) == ["s0", "s2"]
    assert plain(prune(tree.directory, keep_daily=1, sync=False).kept) == tree.check() == ["s2"]


def test_what_was_written_last_is_the_newest_though_the_clock_was_put_back(tree, monkeypatch):
    tree.full("f")
    tree.diff("e", "f")
    earlier = time.time_ns() - 3600 * 10**9
    monkeypatch.setattr(time, "time_ns", lambda: earlier)
    tree.full("d")
    tree.diff("c", "d")
    tree.diff("b", "e")
    tree.full("a")
    assert plain(entry.path for entry in catalog(tree.directory)) == ["f", "e", "d", "c", "b", "a"]
    assert plain(prune(tree.directory, keep_last=2, dry_run=True).kept) == ["b", "a"]
    monkeypatch.undo()
    with monkeypatch.context() as calm:
        # With a clock that goes on, no file is opened.
        calm.setattr(writer, "Layer", None)
        tree.full("0")
    assert plain(entry.path for entry in catalog(tree.directory))[-2:] == ["a", "0"]


def test_a_file_has_the_time_that_it_notes_where_the_clock_has_not_reached_that(tree, monkeypatch):
    ahead = time.time_ns() + 3600 * 10**9
    with monkeypatch.context() as future:
        future.setattr(time, "time_ns", lambda: ahead)
        tree.full("c")
        os.utime(tree.directory / "c", ns=(ahead, ahead))
    tree.full("b")
    # Of the three, only this one tells the next that there is a later time than the clock's.
    os.unlink(tree.directory / "c")
    tree.full("a")
    assert plain(entry.path for entry in catalog(tree.directory)) == ["b", "a"]


def test_prune_leaves_what_it_does_not_understand_and_what_others_need(tree, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    tree.line("a", "b", "c", "d")
    save_diff(
        other / "away", tree.memory["b"], DirtyPages.from_indices([], tree.npages), parent=tree.directory / "b",
        search=[tree.directory], sync=False,
    )  # fmt: skip
    damaged = bytearray((tree.directory / "c").read_bytes())
    (tree.directory / "notes.txt").write_text("hello")
    (tree.directory / "mounts").symlink_to("/proc/self/mounts")  # which has no end that can be looked for
    done = prune(tree.directory, keep_last=np.int64(1), search=[other], sync=False)
    (tree.directory / "mounts").unlink()
    assert (plain(done.removed), plain(done.needed)) == (["a", "c"], ["b"])
    assert (restore(other / "away", search=[tree.directory]) == tree.memory["b"]).all()
    tree.memory.pop("notes.txt", None)
    assert tree.names() == ["b", "d", "notes.txt"]
    damaged[-100] ^= 1
    (tree.directory / "e").write_bytes(damaged)
    assert prune(tree.directory, keep_last=1, search=[other], sync=False).removed == ()
    assert "e" in tree.names()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({}, "nothing would be kept"),
        ({"keep_last": 0}, "keep_last is 0; it must be"),
        ({"keep_last": True}, "keep_last is True; it must be"),
        ({"keep_last": 2.0}, "keep_last is 2.0; it must be"),
        ({"keep_daily": -1}, "keep_daily"),
    ],
)
def test_a_prune_that_keeps_nothing_is_refused(tree, options, match):
    tree.line("a", "b")
    with pytest.raises(ValueError, match=match):
        prune(tree.directory, **options)
    tree.check("a", "b")


def test_a_piece_of_a_chain_becomes_one_diff(tree):
    tree.line("a", "b", "c", "d", "e")
    held = info(tree.directory / "d").count
    merged = merge(tree.directory / "b", tree.directory / "d", sync=False)
    assert (merged.kind, merged.parent) == ("diff", "a")
    assert held < merged.count <= tree.npages
    assert tree.check() == ["a", "d", "e"]
    assert merge(tree.directory / "a", tree.directory / "e", keep=True, sync=False).kind == "full"
    assert tree.check() == ["a", "d", "e"]
    merge(tree.directory / "a", tree.directory / "d", sync=False)
    assert tree.check() == ["d", "e"]


def test_a_merge_of_what_others_need_is_refused(tree):
    tree.line("a", "b", "c", "d")
    tree.diff("x", "b")
    with pytest.raises(SnapshotError, match=r"d: .*x could not be restored any more: .* or pass keep=True"):
        merge(tree.directory / "b", tree.directory / "d", sync=False)
    with pytest.raises(SnapshotError, match=r"it was not taken over .*x"):
        merge(tree.directory / "x", tree.directory / "d", sync=False)
    with pytest.raises(ValueError, match="is both the first and the last"):
        merge(tree.directory / "x", tree.directory / "x")
    tree.check("a", "b", "c", "d", "x")
    merge(tree.directory / "b", tree.directory / "d", keep=True, sync=False)
    tree.check("a", "b", "c", "d", "x")


def test_a_piece_over_a_base_that_was_laid_over_with_the_piece_itself_is_merged(tree):
    tree.line("a", "b", "c", "d")
    rebase(tree.directory / "a", tree.directory / "b", sync=False)
    tree.memory["a"] = tree.memory["b"]
    merge(tree.directory / "b", tree.directory / "c", sync=False)
    assert tree.check() == ["a", "c", "d"]


def test_a_base_over_a_base_is_laid_over(tree):
    tree.line("a", "b", "c", "d")
    rebase(tree.directory / "a", tree.directory / "b", sync=False)
    rebase(tree.directory / "b", tree.directory / "c", sync=False)
    tree.memory.update(a=tree.memory["b"], b=tree.memory["c"])
    assert tree.check() == ["a", "b", "c", "d"]


def test_a_diff_over_a_base_that_is_being_laid_over_is_refused(tree):
    tree.line("a", "b")
    with pytest.raises(SnapshotError, match="about to be removed or replaced"):
        rebase(tree.directory / "a", tree.directory / "b", sync=False, progress=lambda *_: tree.diff("x", "a"))
    assert tree.check() == ["a", "b"]


@pytest.mark.parametrize("seed", range(8))
def test_whatever_is_merged_pruned_flattened_and_rebased_all_that_is_left_restores(tmp_path, make_tree, seed):
    tree = make_tree(tmp_path, seed, npages=8)
    tree.full("s000")
    for i in range(1, 30):
        there = tree.names()
        pick = [str(each) for each in tree.rng.choice(there, 2)]
        action = tree.rng.integers(12)
        try:
            if action < 7:
                tree.diff(f"s{i:03d}", pick[0])
            elif action == 7:
                flatten(tmp_path / pick[0], sync=False)
            elif action == 8:
                merge(tmp_path / pick[0], tmp_path / pick[1], keep=bool(tree.rng.integers(2)), sync=False)
            elif action == 9:
                rebase(tmp_path / pick[0], tmp_path / pick[1], sync=False)
                tree.memory[pick[0]] = tree.memory[pick[1]]
                # What lies between the two cannot be restored any more, by its own word.
                for entry in catalog(tmp_path):
                    if entry.problem is not None:
                        with pytest.raises(SnapshotError):
                            restore(entry.path)
                        os.rename(entry.path, tmp_path / ".gone")
            else:
                prune(tmp_path, keep_last=int(tree.rng.integers(3, 9)), sync=False)
        except (SnapshotError, ValueError):
            pass
        for entry in catalog(tmp_path):
            if entry.problem is None:
                assert (restore(entry.path) == tree.memory[os.path.basename(entry.path)]).all()
            else:
                with pytest.raises(SnapshotError):
                    restore(entry.path)


# ---- beside each other -----------------------------------------------------------------------------------------------


def test_a_diff_that_appears_while_a_prune_waits_keeps_what_it_needs(tree, monkeypatch):
    tree.line("a", "b", "c")
    wait = removal.Removal._wait

    def meanwhile(self):
        # As a writer whose look came before the announcement.
        monkeypatch.setattr(writer, "announced", lambda path: False)
        tree.diff("x", "b")
        wait(self)

    monkeypatch.setattr(removal.Removal, "_wait", meanwhile)
    done = prune(tree.directory, keep_last=1, sync=False)
    assert tree.check("x", "b") == ["a", "b", "c", "x"] or "b" in plain(done.needed)
    assert (tree.directory / "b").exists()


def test_a_diff_over_what_is_about_to_go_is_refused(tree):
    tree.line("a", "b", "c")
    with removal.Removal(str(tree.directory), ["b"], patience=0, sync=False):
        with pytest.raises(SnapshotError, match="about to be removed or replaced; take the diff over one that stays"):
            tree.diff("x", "b")
        with pytest.raises(SnapshotError, match="about to be removed or replaced; try again"):
            save(tree.directory / "b", b"x", replace=True)
        tree.diff("d", "c")
    tree.diff("x", "b")
    assert tree.check() == ["a", "b", "c", "d", "x"]
    assert sorted(os.listdir(tree.directory)) == ["a", "b", "c", "d", "x"]


def test_a_prune_waits_for_writers_and_gives_up_in_the_end(tree):
    tree.line("a", "b", "c")
    with staged.Staged(str(tree.directory / "s"), 4096, sync=False, replace=False, mode=None):
        with pytest.raises(SnapshotError, match=r"a writer is at work there \(.*waited 0.01 s"):
            prune(tree.directory, keep_last=1, patience=0.01)
        assert tree.check() == ["a", "b", "c"]
    assert prune(tree.directory, keep_last=1, patience=0.01, sync=False).removed


def test_what_replaced_a_file_while_it_was_merged_is_not_lost(tree, monkeypatch):
    tree.line("a", "b", "c")
    lay, newer = overlay.lay, np.full(tree.npages * 4096 - 100, 7, np.uint8)

    def replaced_meanwhile(*arguments):
        monkeypatch.setattr(overlay, "lay", lay)
        lay(*arguments)
        save(tree.directory / "c", newer, replace=True, sync=False)

    monkeypatch.setattr(overlay, "lay", replaced_meanwhile)
    flatten(tree.directory / "c", sync=False)
    assert (restore(tree.directory / "c") == newer).all()


def test_an_announcement_of_a_dead_process_is_not_believed_and_cleaned_away(tree):
    tree.line("a", "b")
    program = (
        "import os, sys\nfrom dirtylog.sinks.snapshot.removal import Removal\n"
        "held = Removal(sys.argv[1], ['b'], patience=0, sync=False).__enter__()\nos._exit(0)"
    )
    subprocess.run([sys.executable, "-c", program, str(tree.directory)], check=True, env=ENVIRONMENT)
    assert os.listdir(tree.directory / removal.ANNOUNCEMENTS)
    tree.diff("c", "b")
    assert len(clean(tree.directory, dry_run=True)) == 1
    assert len(clean(tree.directory)) == 1
    assert sorted(os.listdir(tree.directory)) == ["a", "b", "c"]


def test_an_announcement_whose_making_is_interrupted_is_let_go_in_silence(tree, monkeypatch):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(removal, "own_name", interrupted)
    said = []
    monkeypatch.setattr(sys, "unraisablehook", said.append)
    with pytest.raises(KeyboardInterrupt):
        removal.Removal(str(tree.directory), ["b"], patience=0, sync=False)
    gc.collect()
    assert [str(each.exc_value) for each in said] == []


def test_an_announcement_that_nobody_holds_any_more_is_withdrawn(tree):
    """As where an interrupt comes when it was made, and its block is not entered yet."""
    tree.line("a", "b")
    held = removal.Removal(str(tree.directory), ["b"], patience=0, sync=False).__enter__()
    with pytest.raises(SnapshotError, match="about to be removed"):
        tree.diff("c", "b")
    del held
    tree.diff("c", "b")
    # And this as where it comes between the end of an announcement and that of its directory.
    (tree.directory / removal.ANNOUNCEMENTS).mkdir()
    assert clean(tree.directory) == []
    assert sorted(os.listdir(tree.directory)) == ["a", "b", "c"]


def test_a_prune_for_which_the_disk_has_no_room_names_the_directory(tree, monkeypatch):
    tree.line("a", "b", "c")

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as caught:
        prune(tree.directory, keep_last=1)
    monkeypatch.undo()
    assert caught.value.filename == str(tree.directory)
    assert sorted(os.listdir(tree.directory)) == tree.check() == ["a", "b", "c"]
