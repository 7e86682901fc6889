"""A fleet in the threads of one process: one moment of every shard, whoever dies wherever."""

from contextlib import suppress
from itertools import count

import numpy as np
import pytest

import dirtylog as dl
from dirtylog.fleet import Coordinator, Reborn, ShardedArray, Threads
from dirtylog.fleet import array as sharded
from dirtylog.fleet.shard import Shard
from dirtylog.sinks.store import BranchMoved, InDoubt, history, repository, restore

ROWS, CHUNK = 24, 4


def write(array, first_row, step):
    """Every shard says the step, and one more row of it, which differs from step to step."""
    array[0, 0] = step
    array[step % len(array), 1] = step


def expected_after(steps, shards):
    model = np.zeros((ROWS, 512))
    for step in steps:
        for rows in shards:
            write(model[rows.start : rows.stop], rows.start, step)
    return model


@pytest.fixture
def array(engine, repo):
    with ShardedArray(engine, (ROWS, 512), repo=repo, chunks=(CHUNK, 512)) as array:
        yield array


def test_a_checkpoint_is_one_moment_of_every_shard(array):
    assert array.rows == [range(8), range(8, 16), range(16, 24)]
    snapshots = []
    for step in range(1, 6):
        array.apply(write, step)
        committed = array.checkpoint(step=step)
        assert committed.written
        assert committed.exact
        snapshots.append(committed.snapshot)
    for step, snapshot in enumerate(snapshots, 1):
        assert np.array_equal(array.read(snapshot), expected_after(range(1, step + 1), array.rows))
    assert [each.step for each in array.history() if each.step] == [1, 2, 3, 4, 5]
    assert committed.pages == 6
    assert committed.chunks == 6
    assert sorted(committed.shards) == ["0-8", "16-24", "8-16"]


def test_nothing_dirty_is_no_snapshot(array):
    array.apply(write, 1)
    first = array.checkpoint()
    again = array.checkpoint()
    assert (again.written, again.snapshot, again.transaction) == (False, first.snapshot, "")
    array.apply(write, 2)
    assert array.checkpoint().written


@pytest.mark.parametrize("shards", [1, 2, 6, 100])
def test_an_array_is_restored_in_another_number_of_shards(array, engine, repo, shards):
    array.apply(write, 3)
    array.checkpoint()
    then = array.read()
    array.close()
    with ShardedArray.restore(engine, repo, shards=shards) as again:
        assert len(again.rows) == min(shards, ROWS // CHUNK)
        assert np.array_equal(again.read(), then)
        assert again.checkpoint().written is False
        again.apply(write, 5)
        assert again.checkpoint().pages == 2 * len(again.rows)
        assert np.array_equal(again.read(again.base), again.read())


def test_an_older_snapshot_is_gone_on_from_in_a_branch_of_its_own(array, engine, repo):
    array.apply(write, 1)
    first = array.checkpoint().snapshot
    array.apply(write, 2)
    array.checkpoint()
    with pytest.raises(ValueError, match="'main' has gone on"):
        ShardedArray.restore(engine, repo, snapshot=first)
    with ShardedArray.restore(engine, repo, snapshot=first, branch="again") as again:
        again.apply(write, 7)
        again.checkpoint(step=7)
        assert np.array_equal(again.read(again.base), expected_after([1, 7], again.rows))
    assert history(repo)[-1].step is None
    with pytest.raises(KeyError, match="no array 'x'"):
        ShardedArray.restore(engine, repo, "x")
    with pytest.raises(ValueError, match="there is an array 'array'"):
        ShardedArray(engine, (ROWS, 512), repo=repo)


class Died(BaseException):
    """The process of a coordinator is gone."""


class Mortal:
    """What a coordinator uses, until it dies at one of its calls: before it, or after it was sent.

    From then on it does nothing: none of its calls arrives.
    """

    def __init__(self, die, after):
        self.die, self.after, self.calls, self.dead = die, after, 0, False

    def call(self, work, *args, **options):
        self.calls += 1
        if self.dead or (self.calls == self.die and not self.after):
            self.dead = True
            raise Died
        answer = work(*args, **options)
        if self.calls == self.die:
            self.dead = True
            raise Died
        return answer

    def handles(self, handles):
        return {name: MortalHandle(self, handle) for name, handle in handles.items()}

    def repo(self, repo):
        return MortalThing(self, repo, {"writable_session", "ancestry"})


class MortalHandle:
    def __init__(self, mortal, handle):
        self.mortal, self.handle = mortal, handle

    def call(self, method, *args):
        # What is sent to a participant is the repository itself.
        args = [each.thing if isinstance(each, MortalThing) else each for each in args]
        return self.mortal.call(self.handle.call, method, *args)


class MortalThing:
    def __init__(self, mortal, thing, names):
        self.mortal, self.thing, self.names = mortal, thing, names

    def __getattr__(self, name):
        found = getattr(self.thing, name)
        if name not in self.names:
            return found

        def call(*args, **options):
            answer = self.mortal.call(found, *args, **options)
            return MortalThing(self.mortal, answer, {"commit"}) if name == "writable_session" else answer

        return call


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_coordinator_may_die_at_any_call_and_another_goes_on(engine, repos, after):
    landed = set()
    for die in count(1):
        repo = next(repos)
        with ShardedArray(engine, (ROWS, 512), repo=repo, chunks=(CHUNK, 512)) as array:
            array.apply(write, 1)
            array.checkpoint(step=1)
            array.apply(write, 2)
            mortal = Mortal(die, after)
            first = Coordinator(mortal.repo(repo))
            with suppress(Died):
                first.epoch(mortal.handles(array._handles), step=2)
            array.apply(write, 3)
            Coordinator(repo).epoch(array._handles, step=3)
            told = [version for version in history(repo) if version.step]
            landed.add(len(told))
            for version in told:
                found = restore(repo, version.snapshot)["array"]
                assert np.array_equal(found, expected_after(range(1, version.step + 1), array.rows)), (die, version)
            assert told[-1].step == 3
            assert len({version.transaction for version in told}) == len(told)
        if not mortal.dead:
            break
    assert die > 8
    assert landed == {2, 3}  # it died before the commit, and after it


def test_a_shard_that_was_made_again_takes_no_part(array, engine, repo):
    array.apply(write, 1)
    array.checkpoint()
    array.apply(write, 2)
    # As an engine that revives what has died: by its constructor, with what it was made of.
    name = next(iter(array._handles))
    old = dict(array._handles)
    array._spawn({name: None}, True)
    with pytest.raises(Reborn, match=f"shard '{name}' is incarnation"):
        array.checkpoint()
    with pytest.raises(Reborn, match="restore every shard from one snapshot"):
        Coordinator(repo).epoch(array._handles)
    assert history(repo)[-1].epoch == 1
    assert array.recover() == []
    assert np.array_equal(array.read(), expected_after([1], array.rows))
    array.apply(write, 3)
    array.checkpoint()
    assert np.array_equal(array.read(array.base), expected_after([1, 3], array.rows))
    old[name].call("close").result()


def test_a_shard_of_which_no_commit_tells_takes_no_part_unless_it_is_admitted(array, repo):
    array.apply(write, 1)
    # As if its engine had made one again, from the zeros that the first snapshot has, and the coordinator had died.
    name = next(iter(array._handles))
    old = array._handles[name]
    array._spawn([name], False)
    another = Coordinator(repo)
    with pytest.raises(Reborn, match="nobody knows whether it was made again since; admit"):
        another.epoch(array._handles)
    array._handles[name].call("close").result()
    array._handles[name] = old
    another.admit(array._handles)
    snapshot = another.epoch(array._handles).snapshot
    assert np.array_equal(array.read(snapshot), expected_after([1], array.rows))


def test_shards_that_are_made_are_closed_where_one_cannot_be(engine, repo, monkeypatch):
    class Broken(Threads):
        made = 0

        def spawn(self, place, factory, *args):
            self.made += 1
            return super().spawn(place, factory if self.made != 1 else lambda *_: 1 / 0, *args)

    shards = []

    class Kept(Shard):
        def __init__(self, *args):
            super().__init__(*args)
            shards.append(self)

    monkeypatch.setattr(sharded, "Shard", Kept)
    with Broken(3) as broken, pytest.raises(ZeroDivisionError):
        ShardedArray(broken, (ROWS, 512), repo=repo, chunks=(CHUNK, 512))
    assert [shard._tracker.closed for shard in shards] == [True, True]


def test_a_shard_that_cannot_be_restored_is_closed_and_made_again(repo, monkeypatch):
    with Threads(2) as engine, ShardedArray(engine, (ROWS, 512), repo=repo, chunks=(CHUNK, 512)) as array:
        array.apply(write, 1)
        name, handle = next(iter(array._handles.items()))
        monkeypatch.setattr(handle._thing, "_load", lambda store: 1 / 0)
        assert array.recover() == [name]
        assert np.array_equal(array.read(), np.zeros((ROWS, 512)))
    assert handle._thing._tracker.closed


def test_a_shard_of_an_older_snapshot_takes_no_part(array):
    name = next(iter(array._handles))
    array.apply(write, 1)
    old = array.base
    array.checkpoint()
    store = array._repo.readonly_session(snapshot_id=old).store
    array._handles[name].call("reload", old, store).result()
    with pytest.raises(BranchMoved, match=f"shard '{name}' was restored from {old}"):
        array.checkpoint()


class Lost:
    """A shard whose worker is gone: at its next call of one name, before or after it was done."""

    def __init__(self, handle, method, after):
        self.handle, self.method, self.after, self.gone = handle, method, after, False

    def call(self, method, *args):
        if method == self.method or self.gone:
            if self.after and not self.gone:
                self.handle.call(method, *args).result()
            self.gone = True
            raise ConnectionError("the worker is gone")
        return self.handle.call(method, *args)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("method", ["resolve", "prepare", "decide"])
def test_a_lost_worker_costs_what_was_written_since_the_last_snapshot(array, method, after):
    array.apply(write, 1)
    array.checkpoint(step=1)
    array.apply(write, 2)
    name = list(array._handles)[1]
    lost = array._handles[name] = Lost(array._handles[name], method, after)
    steps = [1]
    if method == "decide":  # the epoch is committed; who was not told is gone
        assert array.checkpoint(step=2).written
        steps = [1, 2]
    else:
        with pytest.raises(ConnectionError, match="gone"):
            array.checkpoint(step=2)
    assert array.recover() == [name]
    assert sorted(array._places.values()) == [0, 1, 2]  # where there was room, not beside another shard
    assert np.array_equal(array.read(), expected_after(steps, array.rows))
    array.apply(write, 3)
    array.checkpoint(step=3)
    assert np.array_equal(array.read(array.base), expected_after([*steps, 3], array.rows))
    assert [each.step for each in array.history() if each.step] == [*steps, 3]
    lost.handle.call("close").result()


def test_shards_that_live_keep_their_pages_when_an_epoch_fails(array):
    array.apply(write, 1)
    name = list(array._handles)[1]
    handle = array._handles[name]
    array._handles[name] = Lost(handle, "prepare", False)
    with pytest.raises(ConnectionError):
        array.checkpoint()
    array._handles[name] = handle  # it was a cable
    committed = array.checkpoint()
    assert committed.pages == 6
    assert np.array_equal(array.read(committed.snapshot), expected_after([1], array.rows))


def test_an_answer_that_nobody_gives_is_waited_out_and_then_found(array, repo):
    array.apply(write, 1)
    silent = [True]

    class Silent:
        def __getattr__(self, name):
            return getattr(repo, name)

        def writable_session(self, branch):
            session = repo.writable_session(branch)
            commit = session.commit

            class Deaf:
                def commit(self, *args, **options):
                    commit(*args, **options)
                    raise OSError("no answer")

                def __getattr__(self, name):
                    return getattr(session, name)

            return Deaf() if silent[0] else session

        def ancestry(self, **where):
            if silent[0]:
                raise OSError("no answer")
            return repo.ancestry(**where)

    array._coordinator._repo = Silent()
    with pytest.raises(InDoubt, match="next save asks again"):
        array.checkpoint(step=1)
    assert all(handle.call("standing").result().holds for handle in array._handles.values())
    silent[0] = False
    array.apply(write, 2)
    array.checkpoint(step=2)
    assert [each.step for each in history(repo) if each.step] == [1, 2]
    assert np.array_equal(array.read(array.base), expected_after([1, 2], array.rows))


def test_a_function_that_fails_in_a_shard_is_heard_after_all_have_ended(array):
    def fail(rows, first_row):
        rows[0] = 1
        if first_row == 8:
            raise ArithmeticError("in the middle")

    with pytest.raises(ArithmeticError, match="in the middle"):
        array.apply(fail)
    assert array.read()[:, 0].sum() == 3


@pytest.mark.parametrize(
    ("shape", "options", "said"),
    [
        ((), {}, "has rows"),
        ((0, 3), {}, "has rows"),
        ((4, 4), {"dtype": "M8[s]"}, "of numbers"),
        ((4, 4), {"shards": 0}, "at least 1"),
    ],
)
def test_what_cannot_be_sharded_is_refused(engine, repo, shape, options, said):
    with pytest.raises(ValueError, match=said):
        ShardedArray(engine, shape, repo=repo, **options)


def test_a_repository_that_cannot_travel_is_refused(engine, icechunk):
    class Far(Threads):
        same_process = False

    with Far(2) as far, pytest.raises(ValueError, match="in memory"):
        ShardedArray(far, (4, 4), repo=repository("memory://"))
    # In one process Icechunk 1 copies what is in memory with what travels; 2 does not.
    if icechunk.__version__.startswith("1."):
        with pytest.raises(ValueError, match="in memory"):
            ShardedArray(engine, (4, 4), repo=repository("memory://"))
        return
    with ShardedArray(engine, (ROWS, 512), repo=repository("memory://"), chunks=(CHUNK, 512)) as array:
        array.apply(write, 1)
        assert np.array_equal(array.read(array.checkpoint().snapshot), expected_after([1], array.rows))


def test_a_closed_array_says_so(array):
    array.close()
    array.close()
    with pytest.raises(ValueError, match="restore it from its repository"):
        array.checkpoint()
    with pytest.raises(ValueError, match="at least 1"):
        Threads(0)
    with pytest.raises(ValueError, match="above 0"):
        Coordinator(None, timeout=0)
    with pytest.raises(ValueError, match="at least one"):
        Coordinator(None).epoch({})


def test_rows_are_numbered_as_in_the_whole_array(array):
    assert array.apply(lambda rows, first_row: (first_row, rows.shape)) == [
        (0, (8, 512)),
        (8, (8, 512)),
        (16, (8, 512)),
    ]
    assert isinstance(array.read(), np.ndarray)
    assert dl.DirtyPages  # the shards use the library that is tested
