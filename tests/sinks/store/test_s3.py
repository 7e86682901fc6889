"""The same over S3, spoken by moto on loopback: any request may fail, before, in or after what it asks for."""

from itertools import count

import numpy as np
import pytest

import dirtylog as dl
from dirtylog.sinks.store import BranchMoved, InDoubt, StoreSink, history, restore
from dirtylog.sinks.store.disks import back_up, backups

from ...qemu import Machine


def copies(arrays):
    return {name: array.copy() for name, array in arrays.items()}


@pytest.mark.parametrize(
    "epochs", [8, pytest.param(50, marks=pytest.mark.stress)], ids=["eight epochs", "fifty epochs"]
)
def test_random_epochs_restore_exactly_at_every_snapshot(s3, tracked, at_random, equal, epochs):
    make, _ = s3
    arrays, rng = {"w": dl.zeros((16, 512)), "b": dl.zeros(700, "f4")}, np.random.default_rng(3)
    sink = StoreSink(tracked(arrays), arrays, make(), chunks={"w": (4, 512), "b": (350,)})
    kept = {}
    for step in range(epochs):
        at_random(rng, arrays)
        arrays["w"][step % 16, 0] += 1
        kept[sink.save(step=step).snapshot] = copies(arrays)
    for snapshot, then in kept.items():
        equal(sink.restore(snapshot), then)


def kept_however_requests_fail(make, faulty, tracked, equal, ways):
    """Let each request of a save fail in each way; return how many saves were refused, and how many adopted."""
    w = dl.zeros((8, 512))
    repo = make()
    sink = StoreSink(tracked({"w": w}), {"w": w}, repo, chunks=(2, 512), compressors=None)
    w[:] = 1
    sink.save(step=0)
    expected, refused, adopted, step = [copies({"w": w})], 0, 0, 0
    for how, number_of, refuses in ways:
        for number in count(1):
            step += 1
            w[step % 8] += 1
            expected.append(copies({"w": w}))
            faulty.arm(number, how, number_of, refuses=refuses)
            try:
                adopted += sink.save(step=step).adopted
                reached = faulty.requests >= number
                faulty.disarm()
            except Exception:
                refused += 1
                reached = True
                faulty.disarm()
                sink.save(step=step)  # nothing is written where the other has landed
            if not reached:
                break
        assert number > 6
    told = [version for version in history(repo) if version.transaction]
    assert [version.step for version in told] == list(range(step + 1))
    assert [version.epoch for version in told] == sorted({version.epoch for version in told})
    for version, then in zip(told, expected, strict=True):
        equal(restore(repo, version.snapshot), then)
    return refused, adopted


@pytest.mark.parametrize(
    "ways",
    [
        [("after", 1)],
        pytest.param([("before", 1), ("before", 1000), ("after", 1000)], marks=pytest.mark.stress),
    ],
    ids=["after one", "in any way"],
)
def test_any_request_may_be_refused_and_nothing_is_lost_or_there_twice(s3, tracked, equal, ways):
    ways = [(*way, True) for way in ways]
    refused, adopted = kept_however_requests_fail(*s3, tracked, equal, ways)
    assert refused + adopted > 6 * len(ways)


@pytest.mark.stress  # the client waits before it tries again, for minutes in all
@pytest.mark.parametrize(
    ("how", "number_of"),
    [("before", 1000), ("in", 1), ("after", 1)],
    ids=["before, from then on", "in one", "after one"],
)
def test_the_line_may_be_cut_at_any_request(s3, tracked, equal, how, number_of):
    # The client itself tries again where one request fails: what was done is then done twice, or refused.
    refused, _ = kept_however_requests_fail(*s3, tracked, equal, [(how, number_of, False)])
    assert (refused > 3) == (number_of > 1)


@pytest.mark.parametrize("refuses", [True, pytest.param(False, marks=pytest.mark.stress)], ids=["refused", "cut"])
def test_a_commit_of_which_the_store_says_nothing_is_held(s3, tracked, refuses):
    make, faulty = s3
    w = dl.zeros((8, 512))
    observer = tracked({"w": w})
    sink = StoreSink(observer, {"w": w}, make(), chunks=(2, 512))
    sink.save()
    w[1] = 1
    faulty.disarm()
    sink.save()
    requests = faulty.requests
    w[2] = 2
    # The write of the branch arrives, and no answer to anything from then on.
    faulty.arm(requests, "after", 100, refuses=refuses)
    with pytest.raises(InDoubt):
        sink.save()
    assert observer.epoch is not None
    faulty.disarm()
    w[3] = 3
    assert sink.save().pages == 1
    assert [version.epoch for version in sink.history() if version.transaction] == [1, 2, 3, 4]


def test_a_strangers_commit_is_refused(s3, tracked):
    make, _ = s3
    w, v = dl.zeros((8, 512)), dl.zeros((8, 512))
    repo = make()
    sink = StoreSink(tracked({"w": w}), {"w": w}, repo)
    sink.save()
    stranger = StoreSink(tracked({"w": v}), {"w": v}, repo)
    v[:] = 9
    stranger.save()
    w[1] = 1
    with pytest.raises(BranchMoved, match="somebody else has committed"):
        sink.save()


def test_a_checkpoint_is_one_call_with_an_address(s3, monkeypatch):
    make, _ = s3
    make()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    where = make.address
    arrays, moments = {"w": dl.zeros((60, 512)), "b": dl.zeros(512)}, []
    with dl.Checkpoint(where, arrays, keep=2) as checkpoint:
        for step in range(5):
            arrays["w"][step] = arrays["b"][step] = step + 1
            checkpoint.save(step=step, state={"step": step})
            moments.append(copies(arrays))
    assert dl.Checkpoint.steps(where) == [3, 4]
    for step in (3, 4):
        found = dl.Checkpoint.load(where, step)
        assert all(np.array_equal(found[name], array) for name, array in moments[step].items())
        assert dl.Checkpoint.state_of(where, step) == {"step": step}
    assert dl.Checkpoint.diff(where, 3, 4)["w"].rows.tolist() == [4]


def back_up_again_and_again(machine, make, faulty, directory, rounds, kills=()):
    """Back up a disk while requests are refused and the daemon is killed; return how many backups were refused."""
    repo, chance, then, refused = make(), machine.chance, {}, 0

    def save():
        return back_up(repo, machine.qmp, "disk", nbd=machine.nbd, scratch=directory)

    for number in range(rounds):
        if number in kills:
            machine.restart(kill=True)
        machine.write(6)
        faulty.arm(int(chance.integers(1, 12)), ("before", "after")[number % 2], number % 3 + 1, refuses=True)
        try:
            done = save()
        except Exception:
            refused += 1
            faulty.disarm()
            done = save()
        faulty.disarm()
        assert number in (0, *kills) or not done.why_full, done
        then[done.saved.snapshot] = machine.content()
    told = [version.snapshot for version in backups(repo)]
    # One that landed without an answer is there too.
    assert [snapshot for snapshot in told if snapshot in then] == list(then)
    for snapshot, content in then.items():
        assert restore(repo, snapshot)["disk"].tobytes() == content
    return refused


def test_backups_of_a_disk_that_are_refused_lose_nothing(machine, s3, tmp_path):
    assert back_up_again_and_again(machine, *s3, tmp_path, 3)


@pytest.mark.stress
def test_fifty_backups_of_a_disk_with_the_daemon_killed_twice(s3, tmp_path):
    machine = Machine(tmp_path, 50, 32 << 20)
    try:
        assert back_up_again_and_again(machine, *s3, tmp_path, 50, kills=(17, 34)) > 10
    finally:
        machine.end(kill=True)
