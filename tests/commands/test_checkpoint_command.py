"""``dirtylog checkpoint``: what it prints, writes and answers."""

import json
import os

import numpy as np
import pytest

import dirtylog as dl
from dirtylog import cli


@pytest.fixture
def directory(tmp_path):
    w, b = np.zeros((100, 10)), np.zeros(3, np.int32)
    with dl.Checkpoint(tmp_path / "run", {"w": w, "b": b}, sync=False) as checkpoint:
        for step in (10, 20):
            w[step] = step
            checkpoint.save(step=step, state={"rng": bytes(range(10)), "loss": [0.5, None]})
    return str(tmp_path / "run")


def test_checkpoints_are_listed_shown_and_exported(directory, tmp_path, capsys):
    def answer(*words):
        assert cli.main(["checkpoint", *words, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    listed = answer("list", directory)["checkpoints"]
    assert [(each["step"], each["kind"]) for each in listed] == [(10, "full"), (20, "diff")]
    shown = answer("show", directory, "--step", "10")
    assert shown["arrays"] == [
        {"name": "w", "dtype": "float64", "shape": [100, 10], "nbytes": 8000},
        {"name": "b", "dtype": "int32", "shape": [3], "nbytes": 12},
    ]
    assert shown["state"] == {"rng": "<10 bytes 0001020304050607...>", "loss": [0.5, None]}
    target = str(tmp_path / "w.npy")
    assert answer("export", directory, target, "--array", "w", "--step", "10")["arrays"] == ["w"]
    assert (np.load(target)[10] == 10).all()
    assert not np.load(target)[20].any()


def test_the_same_for_people(directory, tmp_path, capsys):
    for words in (["list", directory], ["show", directory], ["export", directory, str(tmp_path / "all.npz")]):
        assert cli.main(["checkpoint", *words]) == 0
    out = capsys.readouterr().out
    assert "100x10" in out
    assert '"loss": [0.5, null]' in out
    assert "0000000002.ckpt" in out
    with np.load(tmp_path / "all.npz") as found:
        assert sorted(found) == ["b", "w"]


def test_what_is_not_there_is_one_error(directory, tmp_path, capsys):
    for words, match in (
        (["show", directory, "--step", "5"], "no checkpoint of step 5; it has those of 10, 20"),
        (["export", directory, str(tmp_path / "x.txt")], "it must end in one of .npy, .npz, .zarr"),
        (["export", directory, str(tmp_path / "x.npy")], "holds one array, and there are 2"),
        (["export", directory, str(tmp_path / "x.npz"), "--array", "z"], "no array 'z'; it has b, w"),
        (["show", str(tmp_path / "none")], "none has no checkpoint\n"),
        (["list", str(tmp_path / "none")], "No such file or directory"),
    ):
        assert cli.main(["checkpoint", *words]) == 1
        assert match in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["run"]
    assert cli.main(["checkpoint", "list", str(tmp_path)]) == 0
    assert "none" in capsys.readouterr().out


def test_a_damaged_checkpoint_is_listed_beside_the_others(directory, capsys):
    os.truncate(os.path.join(directory, "0000000002.ckpt"), 5000)
    assert cli.main(["checkpoint", "list", directory, "--json"]) == 0
    sound, damaged = json.loads(capsys.readouterr().out)["checkpoints"]
    assert (sound["step"], sound["problem"]) == (10, None)
    assert damaged["path"].endswith("0000000002.ckpt")
    assert "footer cannot be used" in damaged["problem"]
    assert cli.main(["checkpoint", "list", directory]) == 0
    assert "footer cannot be" in capsys.readouterr().out
