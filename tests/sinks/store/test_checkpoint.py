"""The one call of checkpoints with a store behind it: what it offers works as in a directory, or is refused by name."""

import importlib.util
import json
import sys
import threading

import numpy as np
import pytest

import dirtylog as dl
from dirtylog import cli
from dirtylog.sinks.checkpoint import export
from dirtylog.sinks.store import BranchMoved, StoreSink, repository

from ..lender import Box


def arrays():
    return {
        "w": dl.zeros((60, 512)),
        "b": np.zeros(300, np.int32),
        "layer/f": np.zeros((40, 30), np.float32, order="F"),
        "when": np.zeros(5, "M8[s]"),
    }


def write(these, step):
    these["w"][step % 60] = step
    these["b"][step % 300] = step
    these["layer/f"][step % 40, step % 30] = step


@pytest.fixture
def where(icechunk, tmp_path):
    return f"file://{tmp_path}/store"


def same(found, expected):
    assert list(found) == list(expected)
    for name, array in expected.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
        assert np.array_equal(found[name], array)


@pytest.mark.parametrize("given", ["address", "repository"])
def test_every_step_loads_as_it_was(where, given):
    repo = repository(where) if given == "repository" else None
    where = where if repo is None else repo
    these, moments = arrays(), {}
    with dl.Checkpoint(None if repo else where, these, store=repo) as checkpoint:
        for step in range(5):
            write(these, step)
            assert checkpoint.save(step=step, state={"rng": bytes([step]), "loss": 0.5}).written
            moments[step] = {name: array.copy("K") for name, array in these.items()}
        checkpoint.save(step=5)
    moments[5] = moments[4]
    assert dl.Checkpoint.steps(where) == list(range(6))
    for step, moment in moments.items():
        same(dl.Checkpoint.load(where, step), moment)
        expected = {"rng": bytes([step]), "loss": 0.5} if step < 5 else None
        assert dl.Checkpoint.state_of(where, step) == expected
    into = arrays()
    assert dl.Checkpoint.load(where, into=into) is into
    same(into, these)
    with pytest.raises(ValueError, match="into has"):
        dl.Checkpoint.load(where, into={"w": into["w"]})
    with pytest.raises(KeyError, match=r"has no checkpoint of step 9; it has those of 0, 1, 2, 3, 4, 5"):
        dl.Checkpoint.load(where, 9)


def test_a_history_and_what_changed_from_one_to_another(where):
    these = {"w": dl.zeros((60, 512)), "b": dl.zeros(512)}
    with dl.Checkpoint(where, these) as checkpoint:
        for step in range(3):
            these["w"][step] = step + 1
            checkpoint.save(step=10 * step)
        # Nothing is dirty, and a step was asked for.
        assert not checkpoint.save(step=30).written
    records = dl.Checkpoint.history(where)
    assert [record.step for record in records] == [0, 10, 20, 30]
    assert [record.time for record in records] == sorted(record.time for record in records)
    assert [record.info.pages for record in records][1:] == [1, 1, 0]
    assert dl.Checkpoint.diff(where, 20, 0)["w"].rows.tolist() == [1, 2]
    assert list(dl.Checkpoint.diff(where, 10)) == ["w"]
    assert dl.Checkpoint.diff(where, 10, 10) == {}


def test_only_the_last_ones_are_kept_and_each_of_them_loads(where):
    these, moments = {"w": dl.zeros((8, 512))}, {}
    with dl.Checkpoint(where, these, keep=2) as checkpoint:
        for step in range(9):
            these["w"][step % 8] = step + 1
            checkpoint.save(step=step)
            moments[step] = these["w"].copy()
            kept = dl.Checkpoint.steps(where)
            assert kept == list(range(max(0, step - 1), step + 1))
            for each in kept:
                assert np.array_equal(dl.Checkpoint.load(where, each)["w"], moments[each])
    # What is not kept is gone, but for what has come since it was last looked for.
    assert sum(1 for _ in repository(where).ancestry(branch="main")) <= 5
    with pytest.raises(KeyError, match="no checkpoint of step 3"):
        dl.Checkpoint.load(where, 3)


def test_what_is_kept_is_not_counted_where_others_would_lose_theirs(where):
    repo = repository(where)
    repo.create_branch("theirs", repo.lookup_branch("main"))
    with pytest.raises(ValueError, match=r"other branches or tags \(theirs\).*leave keep out"):
        dl.Checkpoint(where, arrays(), keep=2)
    repo.delete_branch("theirs")
    w = dl.zeros(512)
    with dl.Checkpoint(where, {"w": w}, keep=1) as checkpoint:
        checkpoint.save()
        repo.create_tag("theirs", repo.lookup_branch("main"))
        checkpoint.save()  # would let the first expire
        with pytest.raises(dl.DirtyLogError, match="other branches or tags"):
            checkpoint.save()
        checkpoint.save()  # said once
    assert sum(1 for _ in repo.ancestry(branch="main")) == 4


def test_a_program_that_begins_again_goes_on_in_the_same_store(where):
    these = arrays()
    for run in range(2):
        with dl.Checkpoint(where, these) as checkpoint:
            write(these, run)
            assert checkpoint.save(step=run).whole
        these = dl.Checkpoint.load(where)
    assert dl.Checkpoint.steps(where) == [0, 1]
    # A run that has fewer arrays has fewer.
    with dl.Checkpoint(where, {"b": these["b"]}) as checkpoint:
        checkpoint.save(step=2)
    assert list(dl.Checkpoint.load(where)) == ["b"]
    assert list(dl.Checkpoint.load(where, 1)) == list(these)


def test_another_array_of_a_name_is_gone_on_with(where):
    w, b = dl.zeros((100, 64)), dl.zeros(512)
    with dl.Checkpoint(where, {"w": w, "b": b}) as checkpoint:
        checkpoint.save()
        w[0] = b[:] = 1
        larger = dl.zeros((300, 64))
        larger[:] = 2
        with pytest.raises(ValueError, match="cannot be stored by that name"):
            checkpoint.update({"w": larger, "a//b": larger})
        checkpoint.update({"w": larger})
        w[:] = 9
        assert checkpoint.save().whole == ("w", "b")
        larger[7] = b[3] = 3
        saved = checkpoint.save()
        assert (saved.pages, saved.whole) == (2, ("w", "b"))  # of one chunk each
    assert [dl.Checkpoint.load(where, step)["w"].shape for step in (0, 1)] == [(100, 64), (300, 64)]
    same(dl.Checkpoint.load(where), {"w": larger, "b": b})


def test_the_thread_saves_what_has_no_step(where, monkeypatch):
    these, saved, real = arrays(), threading.Event(), StoreSink.save

    def save(*args, **options):
        try:
            return real(*args, **options)
        finally:
            saved.set()

    monkeypatch.setattr(StoreSink, "save", save)
    with dl.Checkpoint(where, these, every=0.001):
        assert saved.wait(60)
    assert dl.Checkpoint.steps(where) == []
    same(dl.Checkpoint.load(where), these)


def test_a_save_that_fails_changes_nothing_and_loses_nothing(where, flaky):
    these = {"w": dl.zeros((60, 512))}
    with dl.Checkpoint(where, these) as checkpoint:
        checkpoint.save(step=0)
        these["w"][3] = 3
        repo, checkpoint._saved.ready._repo = checkpoint._saved.ready._repo, flaky(repository(where), 1)
        with pytest.raises(OSError, match="does not answer"):
            checkpoint.save(step=1)
        assert dl.Checkpoint.steps(where) == [0]
        checkpoint._saved.ready._repo = repo
        assert checkpoint.save(step=1).pages == 1
    same(dl.Checkpoint.load(where, 1), these)


class Stop(Exception):
    pass


@pytest.mark.parametrize("calls", [0, 1])
def test_what_progress_raises_loses_nothing(where, calls):
    these, seen = {"w": dl.zeros((1024, 512))}, []
    with dl.Checkpoint(where, these) as checkpoint:
        checkpoint.save(step=0, progress=lambda done, total: seen.append((done, total)))
        assert [done for done, _ in seen] == sorted(done for done, _ in seen)
        assert seen[-1] == (4 << 20, 4 << 20)
        these["w"][[3, 600]] = 3

        left = iter(range(calls))

        def stopping(done, total):
            if next(left, None) is None:
                raise Stop

        with pytest.raises(Stop):
            checkpoint.save(step=1, progress=stopping)
        assert dl.Checkpoint.steps(where) == [0]
        assert checkpoint.save(step=1).pages == 2
    same(dl.Checkpoint.load(where, 1), these)
    with pytest.raises(ValueError, match="leave progress out"):
        dl.Checkpoint.load(where, progress=print)


def test_arrays_without_items_are_saved_with_their_types_and_shapes(where, tmp_path, capsys):
    these = {
        "none": np.zeros((0, 4), np.int16),
        "w": np.arange(10.0),
        "scalar": np.array(7.5),
        "when": np.zeros(0, "M8[s]"),
    }
    with dl.Checkpoint(where, these) as checkpoint:
        for step in range(2):
            these["w"][3] = these["scalar"][...] = step
            checkpoint.save(step=step)
    same(dl.Checkpoint.load(where), these)
    into = {name: np.ones_like(array) for name, array in these.items()}
    assert dl.Checkpoint.load(where, into=into) is into
    same(into, these)
    assert sorted(dl.Checkpoint.diff(where, 0)) == ["scalar", "w"]
    assert cli.main(["checkpoint", "show", where, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)["arrays"]
    assert [(row["name"], row["shape"]) for row in shown] == [(name, [*array.shape]) for name, array in these.items()]
    assert export(where, tmp_path / "out.npz") == list(these)
    with pytest.raises(ValueError, match="at least one must have an item"):
        dl.Checkpoint(where, {"none": these["none"]})


def test_a_strangers_commit_is_refused_and_an_update_goes_on_from_there(where, tracked):
    these, theirs = {"w": dl.zeros(600)}, {"x": dl.zeros(512)}
    with dl.Checkpoint(where, these) as checkpoint:
        checkpoint.save()
        StoreSink(tracked(theirs), theirs, repository(where)).save()
        these["w"][5] = 5
        with pytest.raises(BranchMoved, match="somebody else has committed"):
            checkpoint.save()
        checkpoint.update(these)
        assert checkpoint.save().whole == ("w",)
    same(dl.Checkpoint.load(where), these)


@pytest.mark.parametrize("size", [600, 9000])
def test_memory_that_moved_goes_over_no_strangers_commit(where, tracked, size):
    box, theirs = Box(np.zeros(600)), {"x": dl.zeros(512)}
    with dl.Checkpoint(where, {"box": box}) as checkpoint:
        checkpoint.save()
        box.array = np.full(size, 1.5)
        assert checkpoint.save().whole == ("box",)
        same(dl.Checkpoint.load(where), {"box": box.array})
        StoreSink(tracked(theirs), theirs, repository(where)).save()
        box.array = np.full(size, 2.5)
        with pytest.raises(BranchMoved, match="somebody else has committed"):
            checkpoint.save()
        same(dl.Checkpoint.load(where), theirs)
        checkpoint.update({"box": box})
        checkpoint.save()
    same(dl.Checkpoint.load(where), {"box": box.array})


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"full_every": 7}, "full_every cannot be chosen for a store; leave it out, or save to a directory"),
        ({"digest": "blake2b_128", "moment": "fork"}, "digest and moment cannot be chosen"),
        ({"store": 1}, "a directory or the address of a store, or None"),
        ({"keep": 0}, "keep is 0"),
    ],
)
def test_what_a_store_does_not_do_is_refused_before_anything_is_made(where, tmp_path, options, said):
    with pytest.raises(ValueError, match=said):
        dl.Checkpoint(where, arrays(), **options)
    assert not list(tmp_path.iterdir())


def test_what_is_no_place_and_what_is_not_there_is_said(where, tmp_path):
    with pytest.raises(ValueError, match="say where"):
        dl.Checkpoint(None, arrays())
    with pytest.raises(TypeError, match=r"must be a str, a path or an icechunk\.Repository"):
        dl.Checkpoint(5, arrays())
    with pytest.raises(KeyError, match="has no checkpoint: there is no repository"):
        dl.Checkpoint.load(where)
    with pytest.raises(ValueError, match="no store that is known"):
        dl.Checkpoint.steps("ftp://host/path")
    repository(where)
    with pytest.raises(KeyError, match="has no checkpoint"):
        dl.Checkpoint.load(where)
    with pytest.raises(ValueError, match="leave verify out"):
        dl.Checkpoint.load(where, verify=True)
    assert [each.name for each in tmp_path.iterdir()] == ["store"]


def test_a_checkpoint_of_a_store_is_exported(where, tmp_path):
    these = arrays()
    with dl.Checkpoint(where, these) as checkpoint:
        write(these, 3)
        checkpoint.save()
    assert export(where, tmp_path / "out.npz") == list(these)
    with np.load(tmp_path / "out.npz") as found:
        same(dict(found), these)


def test_the_command_looks_into_a_store(where, tmp_path, capsys):
    these = {"w": dl.zeros((60, 512))}
    with dl.Checkpoint(where, these) as checkpoint:
        for step in (10, 20):
            these["w"][step] = step
            checkpoint.save(step=step, state={"loss": 0.5})

    def answer(*words):
        assert cli.main(["checkpoint", *words, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    listed = answer("list", where)["checkpoints"]
    assert [(each["step"], each["pages"]) for each in listed] == [(10, 60), (20, 1)]
    shown = answer("show", where, "--step", "10")
    assert shown["arrays"] == [{"name": "w", "dtype": "float64", "shape": [60, 512], "nbytes": 60 * 4096}]
    assert (shown["step"], shown["state"]) == (10, {"loss": 0.5})
    assert answer("export", where, str(tmp_path / "w.npy"), "--step", "10")["arrays"] == ["w"]
    assert np.load(tmp_path / "w.npy")[10].all()
    for words in (["list", where], ["show", where]):
        assert cli.main(["checkpoint", *words]) == 0
    said = capsys.readouterr().out
    assert listed[1]["snapshot"] in said
    assert "60x512" in said
    assert cli.main(["checkpoint", "list", f"file://{tmp_path}/nowhere"]) == 1
    assert "there is no repository" in capsys.readouterr().err


def test_without_icechunk_a_store_is_refused_and_a_directory_works(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "icechunk", None)
    if importlib.util.find_spec("zarr") is None:
        monkeypatch.setitem(sys.modules, "zarr", None)
    with pytest.raises(dl.BackendUnavailable, match="pip install"):
        dl.Checkpoint("s3://bucket/prefix", arrays())
    these = arrays()
    with dl.Checkpoint(tmp_path / "c", these) as checkpoint:
        checkpoint.save()
