"""kill -9 of a program like a training run, at random moments: all arrays restore to one and the same step."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

import dirtylog as dl
from dirtylog.sinks import snapshot

from .. import warm

PROGRAM = Path(__file__).with_name("training.py")


@pytest.fixture(scope="module")
def training():
    spec = importlib.util.spec_from_file_location("training", PROGRAM)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def kill_and_look(training, directory, words):
    """Kill it when it has said so many bytes; return how many checkpoints there were, all of one step each."""
    code = f"import runpy; runpy.run_path({str(PROGRAM)!r}, run_name='__main__')"
    with warm.started(code, directory) as process:
        for _ in range(words):
            assert process.stdout.read(1) == b"."
        process.kill()
    looked = 0
    for entry in snapshot.catalog(directory):
        assert entry.problem is None
        found = snapshot.restore(entry.path)
        step = int(found["b"][-1])
        for name, array in training.expected(step).items():
            assert (found[name] == array).all(), f"{entry.path}: {name} is not of step {step}"
        looked += 1
    if looked:
        assert list(dl.Checkpoint.load(directory)) == ["w", "b", "f"]
    return looked


def test_a_training_run_killed_at_random_moments_restores_to_one_step(tmp_path, training):
    rng = np.random.default_rng(5)
    looked = runs = 0
    while runs < 5 or not looked:  # on a busy machine the program may say much before its first checkpoint
        runs += 1
        looked += kill_and_look(training, tmp_path / str(runs), int(rng.integers(5, 60 * runs)))


@pytest.mark.stress
@pytest.mark.timeout(3600)
def test_a_training_run_killed_at_200_random_moments_restores_to_one_step(tmp_path, training):
    rng = np.random.default_rng(6)
    looked = sum(kill_and_look(training, tmp_path / str(i), int(rng.integers(1, 200))) for i in range(200))
    print(f"200 kills, {looked} checkpoints, each of one step")
    assert looked > 200
