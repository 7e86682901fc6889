"""A fleet over worker processes of Dask, some of which are killed: every snapshot is one moment of every shard."""

import multiprocessing
import os
import random
import runpy
import signal
import time
from collections import Counter
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from dirtylog.errors import BackendUnavailable
from dirtylog.sinks.store import history, repository, restore

from . import coordinating

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

            def write(*work):
                if when == "after":
                    before(*work)
                os.kill(os.getpid(), signal.SIGKILL)

            participant.write = write

    return write, die_in_the_next_epoch


def first_item():
    return lambda array, first_row: array[0, 0]


def expected_after(steps, shards):
    write, _ = functions()
    model = np.zeros((ROWS, COLUMNS))
    for step in steps:
        for rows in shards:
            write(model[rows.start : rows.stop], rows.start, step)
    return model


@pytest.fixture(scope="module")
def processes():
    """Processes that have imported what a worker and a coordinator need: a hundred are started."""
    pytest.importorskip("distributed")
    icechunk = pytest.importorskip("icechunk")
    context = multiprocessing.get_context("forkserver")
    # Icechunk 2 begins its threads when it is imported, and a child of that process would wait for them for ever.
    alone = ["icechunk"] if icechunk.__version__.startswith("1.") else []
    context.set_forkserver_preload(["dirtylog.fleet.dask", "distributed", "zarr", *alone])
    before = os.environ.get("OPENBLAS_NUM_THREADS")
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # a pool of threads would make each fork one of a process with threads
    from multiprocessing.forkserver import ensure_running

    ensure_running()
    os.environ.pop("OPENBLAS_NUM_THREADS")
    os.environ.update({} if before is None else {"OPENBLAS_NUM_THREADS": before})
    return context


@pytest.fixture(scope="module")
def cluster(processes):
    import dask
    import distributed

    with (
        dask.config.set({"distributed.worker.multiprocessing-method": "forkserver"}),
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, dashboard_address=":0", memory_limit=None, silence_logs=50
        ) as cluster,
    ):
        yield cluster


@pytest.fixture(scope="module")
def connected(cluster):
    import distributed

    with distributed.Client(cluster) as client:
        yield client


@pytest.fixture
def client(connected):
    """A client both of whose workers answer: the test before may have killed one."""
    while len(connected.run(os.getpid, on_error="ignore")) < 2:
        connected.wait_for_workers(2, timeout=60)
    return connected


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


@contextmanager
def coordinator(processes, *arguments):
    """Start a coordinator; yield the process and what it tells."""
    heard, tell = processes.Pipe(duplex=False)
    program = str(Path(coordinating.__file__))
    process = processes.Process(
        target=runpy.run_path, args=(program, {"ARGUMENTS": (*arguments, tell)}, "coordinator"), daemon=True
    )
    process.start()
    tell.close()
    try:
        yield process, heard
    finally:
        process.kill()
        process.join()
        heard.close()


def running(cluster):
    """The processes of workers that have reported. One that is killed before is one that its nanny gives up."""
    known = {worker.pid for worker in cluster.scheduler.workers.values()}
    return [nanny.pid for nanny in cluster.workers.values() if nanny.status.name == "running" and nanny.pid in known]


def killed_at_random(processes, cluster, directory, rng, epochs):
    """Take a fleet through epochs while workers and the coordinator are killed; return what was told, and how often."""
    committed, counts, step, typical = {}, Counter(), 0, 0.1
    while step < epochs:
        arguments = (cluster.scheduler_address, str(directory), len(cluster.workers), step + 1, epochs)
        with coordinator(processes, *arguments) as (process, heard):
            doom, victim, began = None, None, time.monotonic()
            while True:
                if not heard.poll(None if doom is None else max(0.0, doom - time.monotonic())):
                    doom = None
                    counts[f"{victim} killed"] += 1
                    if victim == "coordinator":
                        process.kill()
                        break
                    if pids := running(cluster):
                        os.kill(rng.choice(pids), signal.SIGKILL)
                    continue
                try:
                    word, step, *rest = heard.recv()
                except EOFError:
                    process.join()
                    assert process.exitcode == 0
                    break
                counts[word] += 1
                if word == "begins":
                    began = time.monotonic()
                    if doom is None and rng.random() < 0.3:
                        doom = began + rng.uniform(0, 1.2 * typical)
                        victim = rng.choice(["worker", "worker", "coordinator"])
                elif word == "committed":
                    committed[step], typical = rest[0], time.monotonic() - began
                elif word == "recovered":
                    counts["shards"] += len(rest[0])
    return committed, counts


def one_moment_each(repo, committed):
    """Check that every snapshot is one moment of every shard, and that none is missing."""
    told = [version for version in history(repo) if version.step]
    steps = [version.step for version in told]
    assert all(before < after for before, after in pairwise(steps))
    assert len({version.transaction for version in told}) == len(told)
    for version, expected in zip(told, coordinating.states(steps), strict=True):
        assert np.array_equal(restore(repo, version.snapshot)["array"], expected), version
    assert committed.items() <= {version.step: version.snapshot for version in told}.items()
    return len(told)


@pytest.mark.parametrize(
    ("seed", "epochs"), [(4, 100), pytest.param(3, 1000, marks=pytest.mark.stress)], ids=["a hundred", "a thousand"]
)
def test_epochs_outlive_workers_and_coordinators_that_are_killed_at_random(processes, cluster, tmp_path, seed, epochs):
    repo = repository(tmp_path)
    committed, counts = killed_at_random(processes, cluster, tmp_path, random.Random(seed), epochs)
    print(dict(counts))
    assert one_moment_each(repo, committed) >= len(committed) > epochs // 2
    assert counts["coordinator killed"] > 0
    assert counts["worker killed"] > 0
    assert counts["shards"] > 0


def test_workers_are_found_while_the_client_asks_for_none(client, monkeypatch):
    from dirtylog.fleet.dask import Dask

    async def asks_for_none(**_):
        client._scheduler_identity = {"workers": {}}

    monkeypatch.setattr(client, "_update_scheduler_info", asks_for_none)
    assert len(Dask(client).places()) == 2


def test_a_shard_that_is_lost_is_heard_of_after_all_have_ended(client, repo):
    from dirtylog.fleet.dask import ShardedArray

    write, die = functions()
    with ShardedArray(client, (ROWS, COLUMNS), repo=repo, chunks=(CHUNK, COLUMNS), timeout=30) as array:
        first, second = array.rows
        array.apply(write, 1)
        array.checkpoint(step=1)
        array.apply(die, first.start, "before")
        with pytest.raises(Exception, match=r"."):
            array.checkpoint(step=2)
        # It is known to be dead by now, and the second shard is asked for all that.
        with pytest.raises(ConnectionError, match="is gone, with what it had; restore from the last snapshot"):
            array.apply(write, 3)
        assert array._handles[f"{second.start}-{second.stop}"].call("apply", first_item(), ()).result(30) == 3
        client.wait_for_workers(2, timeout=30)
        array.recover()


def test_a_shard_is_not_waited_for_in_a_place_that_is_gone(client):
    from dirtylog.fleet.dask import Dask

    asked = Dask(client).spawn("tcp://127.0.0.1:9", dict)
    with pytest.raises(ConnectionError, match=r"the worker tcp://127\.0\.0\.1:9 is gone"):
        asked.result(30)


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
