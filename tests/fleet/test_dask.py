"""A fleet over worker processes of Dask, some of which are killed: every snapshot is one moment of every shard."""

import random

import numpy as np
import pytest

from dirtylog.errors import BackendUnavailable
from dirtylog.sinks.store import history, restore

ROWS, COLUMNS, CHUNK = 32, 512, 4


def functions():
    """What runs in the workers: made here, so that it travels by value."""

    def write(array, first_row, step):
        array[0, 0] = step
        array[step % len(array), 1:] = step

    def die_in_the_next_epoch(array, first_row, victim, when):
        import os
        import signal

        from dirtylog.sinks.store import participant

        if first_row == victim:
            before = participant.write

            def write(store, work):
                if when == "after":
                    before(store, work)
                os.kill(os.getpid(), signal.SIGKILL)

            participant.write = write

    return write, die_in_the_next_epoch


def expected_after(steps, shards):
    write, _ = functions()
    model = np.zeros((ROWS, COLUMNS))
    for step in steps:
        for rows in shards:
            write(model[rows.start : rows.stop], rows.start, step)
    return model


@pytest.fixture(scope="module")
def client():
    distributed = pytest.importorskip("distributed")
    pytest.importorskip("icechunk")
    cluster = distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, dashboard_address=None, memory_limit=None, silence_logs=50
    )
    with cluster, distributed.Client(cluster) as client:
        yield client


def killed_and_recovered(client, repo, rng, epochs):
    """Run epochs of which some lose a worker; check that each snapshot is one moment; return how many were lost."""
    from dirtylog.fleet.dask import ShardedArray

    write, die = functions()
    steps, lost = [], 0
    array = ShardedArray(client, (ROWS, COLUMNS), repo=repo, chunks=(CHUNK, COLUMNS), timeout=30)
    with array:
        for step in range(1, epochs + 1):
            array.apply(write, step)
            victim = rng.choice(array.rows).start if step % 3 == 2 else None
            if victim is None:
                array.checkpoint(step=step)
                steps.append(step)
                continue
            lost += 1
            array.apply(die, victim, rng.choice(["before", "after"]))
            with pytest.raises(Exception, match=r".") as failure:
                array.checkpoint(step=step)
            assert not isinstance(failure.value, AssertionError)
            client.wait_for_workers(2, timeout=30)
            assert f"{victim}-" in " ".join(array.recover())
            assert np.array_equal(array.read(), expected_after(steps, array.rows))
        shards = array.rows
    told = [version for version in history(repo) if version.step]
    assert [version.step for version in told] == steps
    for number, version in enumerate(told, 1):
        found = restore(repo, version.snapshot)["array"]
        assert np.array_equal(found, expected_after(steps[:number], shards))
    return lost


def test_workers_that_are_killed_cost_their_epoch_and_nothing_else(client, repo):
    assert killed_and_recovered(client, repo, random.Random(1), 3) == 1
    from dirtylog.fleet.dask import ShardedArray

    with ShardedArray.restore(client, repo, shards=3) as again:
        assert len(again.rows) == 3
        assert np.array_equal(again.read(), restore(repo)["array"])


@pytest.mark.stress
def test_a_hundred_epochs_with_a_worker_killed_in_every_third(client, repo):
    assert killed_and_recovered(client, repo, random.Random(2), 100) == 33


def test_what_is_not_a_client_is_refused():
    pytest.importorskip("distributed")
    from dirtylog.fleet.dask import Dask

    with pytest.raises(TypeError, match=r"must be a distributed\.Client"):
        Dask(None)


def test_without_dask_its_name_is_said(monkeypatch):
    import sys

    from dirtylog.fleet.dask import Dask

    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(BackendUnavailable, match="pip install distributed"):
        Dask(None)
