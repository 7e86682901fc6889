"""Epochs as snapshots of a repository: each restores exactly, none is lost or there twice, no stranger is merged."""

from itertools import count

import numpy as np
import pytest

import dirtylog as dl
from dirtylog.sinks.store import (
    BranchMoved,
    ChunkMap,
    InDoubt,
    StoreSink,
    default_chunks,
    history,
    repository,
    restore,
    state_of,
)


def copies(arrays):
    return {name: array.copy() for name, array in arrays.items()}


def test_fifty_random_epochs_restore_exactly_at_every_snapshot(repo, tracked, at_random, equal):
    arrays, rng = {"w": dl.zeros((16, 512)), "deep/f": dl.zeros((64, 40), "f4").T}, np.random.default_rng(50)
    sink = StoreSink(tracked(arrays), arrays, repo, chunks={"w": (4, 512), "deep/f": (40, 32)})
    kept = {}
    for step in range(50):
        at_random(rng, arrays)
        arrays["w"][step % 16, 0] += 1
        saved = sink.save(step=step)
        assert saved.written
        kept[saved.snapshot] = copies(arrays)
    for snapshot, expected in kept.items():
        equal(sink.restore(snapshot), expected)
    told = [version for version in sink.history() if version.transaction]
    assert [version.snapshot for version in told] == list(kept)
    assert [version.epoch for version in told] == list(range(1, 51))
    assert [version.step for version in told] == list(range(50))
    assert len({version.transaction for version in told}) == 50
    assert all(version.exact and version.pages for version in told[1:])
    equal(sink.restore(epoch=7), kept[told[6].snapshot])
    equal(restore(repo, step=7), kept[told[7].snapshot])


def test_every_type_and_order_comes_back_as_it_was(repo, tracked, equal):
    arrays = {
        "i2": dl.zeros((33, 7, 11), "i2"),
        "crosswise": dl.zeros((11, 7, 5), "c16").transpose(1, 2, 0),
        "when": dl.zeros(700, "M8[s]"),
        "pair": dl.zeros(300, [("a", "<i4"), ("b", ">f8", (2,))]),
        "swapped": dl.zeros(300, ">f4"),
        "long": dl.zeros((3, 50), "longdouble"),
        "text": dl.zeros(9, "U5"),
        "scalar": dl.zeros((), "?"),
    }
    sink = StoreSink(tracked(arrays), arrays, repo, chunks={"i2": (5, 3, 11), "when": (64,), "pair": (100,)})
    for value in (1, 2):
        for array in arrays.values():
            array[...] = value
            equal(sink.restore(sink.save().snapshot), arrays)
    out = {name: np.empty_like(array) for name, array in arrays.items()}
    assert sink.restore(out=out) == out
    equal(out, arrays)


def test_an_epoch_writes_its_dirty_chunks_alone(repo, tracked):
    w = dl.zeros((64, 512))
    sink = StoreSink(tracked({"w": w}), {"w": w}, repo, chunks=(4, 512), compressors=None)
    first = sink.save()
    assert (first.whole, first.chunks, first.nbytes) == (("w",), 16, w.nbytes)
    w[5, 5] = w[63, 0] = 1
    second = sink.save()
    assert (second.whole, second.chunks, second.pages, second.nbytes) == ((), 2, 2, 2 * 4 * 4096)
    assert second.amplification == 4


def test_chunks_are_assigned_where_zarr_has_other_inner_parts(repo, tracked, monkeypatch):
    import zarr.core.array_spec

    w = dl.zeros((64, 512))
    sink = StoreSink(tracked({"w": w}), {"w": w}, repo, chunks=(4, 512))
    monkeypatch.delattr(zarr.core.array_spec, "ArraySpec")
    sink.save()
    w[5, 5] = 1
    assert sink.save().chunks == 1
    assert np.array_equal(sink.restore()["w"], w)


def test_an_epoch_without_a_write_makes_no_snapshot(repo, tracked):
    w = dl.zeros((64, 512))
    sink = StoreSink(tracked({"w": w}), {"w": w}, repo)
    first = sink.save()
    empty = sink.save()
    assert (empty.written, empty.snapshot, empty.chunks) == (False, first.snapshot, 0)
    assert len(sink.history()) == 2  # Icechunk's own first one, and ours
    w[1] = 1
    assert sink.save().epoch == 3


def test_dirt_in_nearly_all_chunks_is_written_whole_and_said(repo, tracked):
    w = dl.zeros((64, 512))
    sink = StoreSink(tracked({"w": w}), {"w": w}, repo, chunks=(4, 512))
    sink.save()
    w[::4, 0] = 1
    saved = sink.save()
    assert (saved.whole, saved.pages, saved.amplification) == (("w",), 16, 4)


def test_zeros_of_both_signs_are_kept(repo, tracked):
    w = dl.zeros(512)
    w[:] = -0.0
    sink = StoreSink(tracked({"w": w}), {"w": w}, repo)
    sink.save()
    assert np.signbit(sink.restore()["w"]).all()


def test_a_strangers_commit_is_refused_and_nothing_is_lost(repo, tracked):
    import zarr

    w = dl.zeros((64, 512))
    sink = StoreSink(tracked({"w": w}), {"w": w}, repo)
    sink.save()
    session = repo.writable_session("main")
    zarr.open_array(session.store, path="w", mode="r+")[0, 0] = 9
    theirs = session.commit("a stranger's")
    w[3] = 3
    with pytest.raises(BranchMoved, match=f"at {theirs}"):
        sink.save()
    assert repo.lookup_branch("main") == theirs
    repo.create_branch("ours", sink.base)
    resumed = StoreSink(sink._observer, {"w": w}, repo, "ours", base=sink.base)
    assert resumed.save().pages == 1
    assert resumed.restore()["w"][3].all()


def test_a_stranger_who_is_faster_is_refused_too(repo, tracked, flaky):
    w = dl.zeros((64, 512))
    sink = StoreSink(tracked({"w": w}), {"w": w}, repo)
    sink.save()

    class Slow(flaky):
        def call(self, work, *args, **options):
            if work.__name__ == "commit":
                other = self.repo.writable_session("main")
                import zarr

                zarr.open_array(other.store, path="w", mode="r+")[0, 0] = 9
                other.commit("a stranger's")
            return super().call(work, *args, **options)

    w[3] = 3
    sink._repo = Slow(repo)
    with pytest.raises(BranchMoved, match="somebody else has committed"):
        sink.save()
    assert history(repo)[-1].message == "a stranger's"


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_failure_at_any_call_loses_nothing_and_repeats_nothing(icechunk, tracked, flaky, equal, after):
    w, b = dl.zeros((16, 512)), dl.zeros(100)
    arrays = {"w": w, "b": b}
    observer = tracked(arrays)
    for call in count(1):
        repo = repository("memory://")
        sink = StoreSink(observer, arrays, repo, chunks={"w": (2, 512), "b": (50,)})
        expected = []
        for step in range(3):
            w[step] += 1
            b[step] += 1
            sink._repo = failing = flaky(repo, call if step == 1 else 0, after)
            try:
                sink.save(step=step)
            except OSError:
                sink._repo = repo
                sink.save(step=step)
            if step == 1:
                reached = failing.calls >= call
            expected.append(copies(arrays))
        told = [version for version in sink.history() if version.transaction]
        assert [version.step for version in told] == [0, 1, 2]
        assert [version.epoch for version in told] == [told[0].epoch + each for each in range(3)]
        for version, then in zip(told, expected, strict=True):
            equal(sink.restore(version.snapshot), then)
        sink.close()
        if not reached:
            break
    assert call > 3


def test_an_answer_that_was_lost_is_adopted(repo, tracked, flaky):
    w = dl.zeros((64, 512))
    sink = StoreSink(tracked({"w": w}), {"w": w}, repo)
    sink.save()
    w[3] = 3
    sink._repo = counting = flaky(repo)
    sink.save()
    w[4] = 4
    sink._repo = flaky(repo, fail=counting.calls, after=True)
    saved = sink.save()
    assert saved.adopted
    assert sink.restore(saved.snapshot)["w"][4].all()
    assert sink.save().written is False


def test_a_commit_of_which_nobody_knows_is_held_until_the_store_says(repo, tracked, flaky):
    w = dl.zeros((64, 512))
    observer = tracked({"w": w})
    sink = StoreSink(observer, {"w": w}, repo)
    sink.save()
    w[3] = 3
    sink._repo = counting = flaky(repo)
    sink.save()
    for landed in (True, False):
        w[4] += 1
        sink._repo = flaky(repo, fail=counting.calls, after=landed, silent=1)
        with pytest.raises(InDoubt, match="the next save asks again"):
            sink.save()
        assert observer.epoch is not None
        w[5] += 1
        sink._repo = repo
        saved = sink.save()
        assert saved.pages == (1 if landed else 2)
        assert np.array_equal(sink.restore()["w"], w)
    told = [version for version in sink.history() if version.transaction]
    assert [version.epoch for version in told] == [1, 2, 3, 4, 5]


def test_a_commit_that_lands_late_is_known_as_ours(repo, tracked, flaky):
    w = dl.zeros((64, 512))
    sink = StoreSink(tracked({"w": w}), {"w": w}, repo)
    sink.save()
    late = []

    class Late(flaky):
        def call(self, work, *args, **options):
            if work.__name__ == "commit":
                late.append(lambda: work(*args, **options))
                raise OSError("no answer")
            return super().call(work, *args, **options)

    w[3] = 3
    sink._repo = Late(repo)
    with pytest.raises(OSError, match="no answer"):
        sink.save()
    late.pop()()
    sink._repo = repo
    w[4] = 4
    assert sink.save().pages == 2
    assert np.array_equal(sink.restore()["w"], w)


def test_what_is_restored_is_gone_on_with_from_there(repo, tracked, equal):
    w = dl.zeros((64, 512))
    sink = StoreSink(tracked({"w": w}), {"w": w}, repo, chunks=(4, 512))
    w[1] = 1
    sink.save()
    sink.close()
    again = dl.zeros((64, 512))
    restore(repo, out={"w": again})
    later = StoreSink(tracked({"w": again}), {"w": again}, repo, base=sink.base, chunks=(4, 512))
    again[2] = 2
    saved = later.save()
    assert saved.chunks == 1
    equal(later.restore(), {"w": again})
    with pytest.raises(ValueError, match="closed"):
        sink.save()


def test_arrays_of_one_block_are_found_by_their_addresses(repo, tracked, equal):
    arena = dl.arena({"w": ((64, 512), "f8"), "b": (100, "f4"), "c": (100, "f4")})
    sink = StoreSink(tracked({"block": arena.block}), arena, repo, memory=arena.block, chunks={"w": (4, 512)})
    sink.save()
    arena["b"][:] = 1
    saved = sink.save()
    assert saved.chunks == 2  # b, and c, which shares its page
    equal(sink.restore(), dict(arena))


def test_nothing_is_written_to_arrays_that_do_not_fit(repo, tracked):
    w, b = dl.zeros(600), dl.zeros(10)
    arrays = {"w": w, "b": b}
    sink = StoreSink(tracked(arrays), arrays, repo)
    w[:], b[:] = 1, 1
    sink.save()
    out = {"w": np.zeros(600), "b": np.zeros(11)}
    with pytest.raises(ValueError, match="is of shape"):
        sink.restore(out=out)
    assert not out["w"].any()
    with pytest.raises(KeyError, match="no array 'x'"):
        restore(repo, names=["x"])
    with pytest.raises(KeyError, match="no epoch 77"):
        sink.restore(epoch=77)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "the arrays, each from a page of its own on, are 2 pages and the log has 3"),
        ({"places": {"w": 4096}}, "must name"),
        ({"places": {"w": 0, "b": 3 * 4096}}, "ends at byte"),
        ({"chunks": {"w": (1, 1)}, "places": {"w": 0, "b": 4096}}, "one extent for each axis"),
        ({"memory": bytearray(10)}, "does not lie in memory="),
    ],
)
def test_arrays_that_are_not_where_they_are_said_to_be_are_refused(repo, options, said):
    log = dl.DirtyLog()
    log.attach(dl.DirtyBitmap(3))
    with pytest.raises(ValueError, match=said):
        StoreSink(log.observer("x"), {"w": np.zeros(512), "b": np.zeros(3)}, repo, **options)


@pytest.mark.parametrize("name", ["", "/w", "a//b", "../w", "a/zarr.json", "__x"])
def test_names_that_are_paths_are_refused(repo, name):
    log = dl.DirtyLog()
    log.attach(dl.DirtyBitmap(1))
    with pytest.raises(ValueError, match="cannot be stored by that name"):
        StoreSink(log.observer("x"), {name: np.zeros(512)}, repo)


@pytest.mark.parametrize(
    ("shape", "itemsize", "order", "chunks"),
    [
        ((8192, 4096), 4, None, (64, 4096)),
        ((10**6,), 8, None, (125000,)),
        ((3, 1000, 1000), 8, None, (1, 125, 1000)),
        ((1000, 1000, 3), 8, (2, 1, 0), (1000, 125, 1)),
        ((5, 5), 8, None, (5, 5)),
        ((), 8, None, ()),
        ((0, 4), 8, None, (1, 4)),
        ((10,), 1 << 21, None, (1,)),
    ],
)
def test_chunks_by_default_are_whole_rows_of_about_a_mebibyte(shape, itemsize, order, chunks):
    found = default_chunks(shape, itemsize, order)
    assert found == chunks
    assert ChunkMap(shape, found, itemsize).count >= (0 not in shape)


def test_a_store_of_no_known_kind_is_refused(icechunk):
    with pytest.raises(ValueError, match="no store that is known"):
        repository("ftp://host/path")
    with pytest.raises(ValueError, match="a directory has no options"):
        repository("/nowhere", region="x")
    with pytest.raises(ValueError, match=r"secret_access_key=\.\.\.; it may have region"):
        repository("s3://bucket/prefix?secret_access_key=hush")
    with pytest.raises(ValueError, match="allow_http=yes"):
        repository("s3://bucket/prefix?allow_http=yes")


def test_a_state_goes_with_its_snapshot_alone(repo, tracked):
    w = dl.zeros(512)
    sink = StoreSink(tracked({"w": w}), {"w": w}, repo)
    states = [{"rng": b"\x00\xff", "loss": [0.5, None]}, None, "text"]
    snapshots = []
    for step, state in enumerate(states):
        w[step] = 1
        snapshots.append(sink.save(step=step, state=state, about={"run": 7}).snapshot)
    assert [state_of(repo, snapshot) for snapshot in snapshots] == states
    assert [state_of(repo, step=step) for step in range(3)] == states
    assert state_of(repo, sink.history()[0].snapshot) is None  # Icechunk's own
    assert sink.history()[-1].about["run"] == 7
    # A snapshot is made for them even where nothing is dirty.
    assert sink.save(state="more").snapshot != snapshots[-1]
    w[9] = 9
    with pytest.raises(ValueError, match="about has epoch, which dirtylog notes itself"):
        sink.save(about={"epoch": 1})
    with pytest.raises(TypeError, match="state has a set"):
        sink.save(state={1})
    # With neither, nothing is noted: what the snapshot before said is still there, and is not this one's.
    last = sink.save()
    assert (last.pages, state_of(repo, last.snapshot)) == (1, None)


@pytest.mark.parametrize(
    ("where", "options", "function", "expected"),
    [
        ("s3://b/a/c?region=x", {}, "s3_storage", {"bucket": "b", "prefix": "a/c", "region": "x", "from_env": True}),
        ("gs://b/a/c", {}, "gcs_storage", {"bucket": "b", "prefix": "a/c", "from_env": True}),
        ("gcs://b", {"anonymous": True}, "gcs_storage", {"bucket": "b", "prefix": None, "anonymous": True}),
        ("az://a/c/p/q", {}, "azure_storage", {"account": "a", "container": "c", "prefix": "p/q", "from_env": True}),
    ],
)
def test_an_address_is_what_icechunk_is_told(icechunk, monkeypatch, where, options, function, expected):
    from dirtylog.sinks.store import branch

    told, real = [], getattr(icechunk, function)
    monkeypatch.setattr(icechunk, function, lambda **given: told.append(given) or real(**given))
    assert isinstance(branch._storage(icechunk, where, options), icechunk.Storage)  # which takes what it is told
    assert told == [expected]
