"""Snapshots of arrays by name, in other orders and types, with state, and what writers must not do to each other."""

import errno
import os
import resource
import stat
import sys
import threading

import numpy as np
import pytest

from dirtylog import DirtyBitmap, DirtyLog, DirtyPages
from dirtylog.sinks.snapshot import (
    SnapshotError,
    chain,
    flatten,
    info,
    rebase,
    restore,
    save,
    save_diff,
    staged,
    verify,
    writer,
)  # fmt: skip
from dirtylog.sinks.snapshot.images import restore_image, save_image

pytestmark = pytest.mark.usefixtures("mixed_layouts")

PAIR = np.dtype([("x", "<f4", (2,)), ("y", [("z", ">i8"), ("n", "S3")])])


def some_arrays():
    rng = np.random.default_rng(0)
    return {
        "w": rng.random((300, 7)),
        "f": np.asfortranarray(rng.random((5, 1000)).astype(np.float32)),
        "pair": np.frombuffer(rng.bytes(PAIR.itemsize * 600), PAIR).copy(),
        "when": np.arange("2020-01", "2023-01", dtype="M8[D]"),
        "turned": rng.random((3, 40, 50)).transpose(1, 2, 0),
        "one": np.array(3.5),
        "complex": rng.random(2000).astype(np.complex64).reshape(2, 10, 100),
    }


def same(found, wanted):
    assert list(found) == list(wanted)
    for name, array in wanted.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
        assert found[name].flags.f_contiguous == array.flags.f_contiguous
        assert found[name].strides == array.strides or array.ndim == 0
        assert found[name].tobytes() == array.tobytes()


@pytest.mark.parametrize("page_size", [512, 4096, 65536])
def test_arrays_by_name_come_back_as_they_were(tmp_path, page_size):
    arrays = some_arrays()
    save(tmp_path / "base", arrays, page_size=page_size, state={"step": 1, "rng": b"\0\xff", "deep": [1, [None, {}]]})
    same(restore(tmp_path / "base"), arrays)
    npages = {name: -(-array.nbytes // page_size) for name, array in arrays.items()}
    first = {name: array.copy("K") for name, array in arrays.items()}
    arrays["w"][299, 6] = -1
    arrays["f"][4, 0] = 9
    arrays["one"][()] = 7
    pages = {name: DirtyPages._empty(count, page_size) for name, count in npages.items()}
    pages["w"] = DirtyPages.from_indices([(300 * 7 - 1) * 8 // page_size], npages["w"], page_size)
    pages["f"] = DirtyPages.from_indices([0], npages["f"], page_size)
    pages["one"] = DirtyPages.from_indices([0], 1, page_size)
    saved = save_diff(tmp_path / "diff", arrays, pages, parent=tmp_path / "base", state={"step": 2})
    assert (saved.count, saved.names, saved.state) == (3, tuple(arrays), {"step": 2})
    same(restore(tmp_path / "diff"), arrays)
    same(restore(tmp_path / "base"), first)
    assert info(tmp_path / "base").state == {"step": 1, "rng": b"\0\xff", "deep": [1, [None, {}]]}
    out = {name: np.full_like(array, array.flat[0]) for name, array in reversed(arrays.items())}
    assert restore(tmp_path / "diff", out=out) is out
    same({name: out[name] for name in arrays}, arrays)
    verify(tmp_path / "diff")
    rebase(tmp_path / "base", tmp_path / "diff")
    same(restore(tmp_path / "base"), arrays)
    assert info(tmp_path / "base").state == {"step": 2}


@pytest.mark.parametrize(
    ("make", "fits"),
    [
        (lambda: np.zeros((3, 4)), True),
        (lambda: bytearray(96), True),
        (lambda: np.zeros((8, 12), np.uint8), True),
        (lambda: np.zeros((3, 4), order="F"), False),
        (lambda: np.zeros((3, 4), ">f8"), False),
        (lambda: np.zeros((3, 4), np.int64), False),
        (lambda: np.zeros((4, 3)), False),
        (lambda: np.zeros(12), False),
    ],
)
def test_arrays_in_which_the_bytes_would_be_other_values_are_not_filled(tmp_path, make, fits):
    array = np.arange(12.0).reshape(3, 4)
    save(tmp_path / "0", {"w": array, "b": np.zeros(5)})
    out = {"w": make(), "b": np.zeros(5)}
    if fits:
        restore(tmp_path / "0", out=out)
        assert bytes(memoryview(out["w"]).cast("B")) == array.tobytes()
        return
    before = out["w"].copy()
    everything = {"w": DirtyPages._all(1), "b": DirtyPages._all(1)}
    for options in ({}, {"only": everything}):
        with pytest.raises(
            ValueError, match=r"out\['w'\] is .*; the snapshot has float64 of shape \(3, 4\) in order C"
        ):
            restore(tmp_path / "0", out=out, **options)
    assert (out["w"] == before).all()


def test_an_axis_of_one_item_lies_anywhere(tmp_path):
    array = np.arange(12.0).reshape(3, 1, 4)
    out = np.zeros((1, 3, 4)).transpose(1, 0, 2)
    assert out.strides != array.strides
    save(tmp_path / "0", array)
    assert (restore(tmp_path / "0", out=out) == array).all()
    save(tmp_path / "1", memoryview(array).cast("B"))
    assert (restore(tmp_path / "1", out=out) == array).all()


def test_an_array_without_a_name_comes_back_as_it_was(tmp_path):
    array = np.asfortranarray(np.arange(3000.0).reshape(3, 1000))
    save(tmp_path / "base", array)
    found = restore(tmp_path / "base")
    assert found.dtype == array.dtype
    assert (found == array).all()
    save(tmp_path / "bytes", b"abc")
    assert restore(tmp_path / "bytes").tobytes() == b"abc"


@pytest.mark.parametrize("seed", range(4))
def test_random_pages_of_random_arrays_rebuild_them(tmp_path, seed):
    rng = np.random.default_rng(seed)
    arrays = {f"a{i}": np.zeros(int(rng.integers(1, 9000)), np.uint8) for i in range(int(rng.integers(1, 9)))}
    save(tmp_path / "0", arrays, page_size=512, sync=False)
    for step in range(1, 6):
        pages = {}
        for name, array in arrays.items():
            npages = -(-array.nbytes // 512)
            dirty = rng.choice(npages, int(rng.integers(0, npages + 1)), replace=False)
            for page in dirty:
                array[page * 512 : page * 512 + 512] = rng.integers(0, 3)
            pages[name] = DirtyPages.from_indices(dirty, npages, 512)
        save_diff(tmp_path / f"{step}", arrays, pages, parent=tmp_path / f"{step - 1}", sync=False)
        same(restore(tmp_path / f"{step}"), arrays)
    verify(tmp_path / "5")


def test_what_cannot_be_read_back_is_refused_before_it_is_written(tmp_path):
    array = np.ones(5000, np.uint8)
    for error, match, memory, options in [
        (TypeError, "holds Python objects", np.array([{}]), {}),
        (ValueError, "will not do for memory", {"": array}, {}),
        (ValueError, "will not do for memory", {"a\x1b[2J": array}, {}),
        (ValueError, "will not do for memory", {3: array}, {}),
        (ValueError, "has 0 arrays", {}, {}),
        (ValueError, "is not contiguous", array[::2], {}),
        (ValueError, "pages of 512 to", array, {"page_size": 256}),
        (ValueError, "mode is 0o1000", array, {"mode": 0o1000}),
        (TypeError, "state has a ndarray", array, {"state": [array]}),
        (TypeError, "state has the key 3", array, {"state": {3: 4}}),
        (ValueError, "state has .* bytes as JSON", array, {"state": "x" * (17 << 20)}),
    ]:
        with pytest.raises(error, match=match):
            save(tmp_path / "s", memory, **options)
    assert os.listdir(tmp_path) == []
    save(tmp_path / "s", {"a": array, "b": array})
    everything = DirtyPages._all(4)
    for error, match, memory, pages in [
        (SnapshotError, "has the arrays", {"a": array, "c": array}, everything),
        (SnapshotError, "the parent has", {"b": array[:4096], "a": array}, DirtyPages._all(3)),
        (ValueError, r"pages has \['a'\]", {"a": array, "b": array}, {"a": everything}),
        (ValueError, r"pages\['a'\] has 4 pages", {"a": array, "b": array}, {"a": everything, "b": everything}),
    ]:
        with pytest.raises(error, match=match):
            save_diff(tmp_path / "d", memory, pages, parent=tmp_path / "s")
    assert os.listdir(tmp_path) == ["s"]


# ---- writers and the names they write -------------------------------------------------------------------------------


def mode(path):
    return stat.S_IMODE(os.stat(path).st_mode)


def test_files_are_private_unless_asked_and_a_replaced_file_keeps_its_mode(tmp_path):
    memory = np.ones(16 * 4096, np.uint8)
    assert mode(save(tmp_path / "b", memory).path) == 0o600
    assert mode(save(tmp_path / "shared", memory, mode=0o644).path) == 0o644
    os.chmod(tmp_path / "b", 0o640)
    save_diff(tmp_path / "d", memory, DirtyPages.from_indices([1], 16), parent=tmp_path / "b")
    assert mode(tmp_path / "d") == 0o600
    rebase(tmp_path / "b", tmp_path / "d")
    assert mode(tmp_path / "b") == 0o640
    save(tmp_path / "b", memory, replace=True)
    assert mode(tmp_path / "b") == 0o640


def test_of_two_writers_of_one_name_the_second_is_told(tmp_path):
    first, second = np.full(8192, 1, np.uint8), np.full(8192, 2, np.uint8)

    def other(*_):
        if not os.path.exists(tmp_path / "x"):
            save(tmp_path / "x", second)

    with pytest.raises(FileExistsError, match="was written meanwhile"):
        save(tmp_path / "x", first, progress=other)
    assert (restore(tmp_path / "x") == second).all()
    assert os.listdir(tmp_path) == ["x"]


@pytest.mark.parametrize("missing", [("rename",), ("rename", "link")])
def test_file_systems_without_that_rename_or_links_still_take_snapshots(tmp_path, monkeypatch, missing):
    def refuse(*_):
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(staged, "rename_noreplace", refuse)
    monkeypatch.setattr(staged, "_said", set())
    if "link" in missing:
        monkeypatch.setattr(os, "link", refuse)
        with pytest.warns(RuntimeWarning, match="neither a rename that replaces nothing nor links"):
            save(tmp_path / "a", b"a" * 5000)
    save(tmp_path / "x", b"x" * 5000)
    with pytest.raises(FileExistsError):
        save(tmp_path / "y", b"y", progress=lambda *_: (tmp_path / "y").write_bytes(b"mine"))
    assert (tmp_path / "y").read_bytes() == b"mine"
    assert restore(tmp_path / "x").tobytes() == b"x" * 5000
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


def test_a_directory_that_cannot_be_synced_is_said_once(tmp_path, monkeypatch):
    real = os.fsync

    def fsync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(staged, "_said", set())
    with pytest.warns(RuntimeWarning, match="cannot sync a directory"):
        assert not save(tmp_path / "a", b"a").durable
    assert not save(tmp_path / "b", b"b").durable
    assert restore(tmp_path / "b").tobytes() == b"b"


def test_what_fails_after_the_rename_is_not_reported_as_not_written(tmp_path, monkeypatch):
    memory = np.ones(8 * 4096, np.uint8)
    save(tmp_path / "b", memory)
    bitmap, log = DirtyBitmap(8), DirtyLog()
    log.attach(bitmap)
    observer = log.observer("o")
    bitmap.mark(1)
    real = os.fsync

    def fsync(descriptor):
        if os.path.exists(tmp_path / "d1"):
            raise OSError(errno.EIO, "Input/output error")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with observer.collect() as epoch:
        # Warnings are errors here, and even so the epoch commits: the file is there.
        saved = save_diff(tmp_path / f"d{epoch.number}", memory, epoch.pages, parent=tmp_path / "b")
    assert not saved.durable
    monkeypatch.undo()
    with observer.collect() as epoch:
        assert epoch.number == 2
        assert not epoch.pages
    assert verify(tmp_path / "d1").count == 1


def test_an_interrupt_after_the_rename_leaves_a_name_that_the_same_call_can_write_again(tmp_path, monkeypatch):
    memory = np.ones(8 * 4096, np.uint8)
    save(tmp_path / "b", memory)
    pages = DirtyPages.from_indices([1], 8)
    real = staged.rename_noreplace

    def interrupted(source, target):
        real(source, target)
        raise KeyboardInterrupt

    monkeypatch.setattr(staged, "rename_noreplace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_diff(tmp_path / "d", memory, pages, parent=tmp_path / "b")
    monkeypatch.undo()
    memory[4096] = 9
    save_diff(tmp_path / "d", memory, pages, parent=tmp_path / "b")
    assert (restore(tmp_path / "d") == memory).all()
    with pytest.raises(FileExistsError):
        save_diff(tmp_path / "d", memory, pages, parent=tmp_path / "b")


def test_a_change_of_directory_meanwhile_does_not_matter(tmp_path, monkeypatch):
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path)
    save("s", np.ones(4 * 4096, np.uint8), progress=lambda *_: os.chdir(tmp_path / "other"))
    assert sorted(os.listdir(tmp_path)) == ["other", "s"]
    assert os.listdir(tmp_path / "other") == []


# ---- chains ---------------------------------------------------------------------------------------------------------


def small_chain(directory, length, npages=8):
    memory = np.zeros(npages * 4096, np.uint8)
    memory[1] = 1
    save(directory / "s0", memory, sync=False)
    for i in range(1, length):
        page = i % npages
        memory[page * 4096] = i % 251
        pages = DirtyPages.from_indices([page], npages)
        save_diff(directory / f"s{i}", memory, pages, parent=directory / f"s{i - 1}", sync=False)
    return memory


@pytest.fixture
def few_descriptors_and_frames():
    """Room for 60 more open files, and for 60 more calls inside each other."""
    depth, frame = 0, sys._getframe()
    while frame := frame.f_back:
        depth += 1
    recursion = sys.getrecursionlimit()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 60, hard))
    sys.setrecursionlimit(depth + 60)
    yield
    sys.setrecursionlimit(recursion)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_chain_longer_than_all_descriptors_and_frames_restores(tmp_path, few_descriptors_and_frames):
    memory = small_chain(tmp_path, 150)
    assert (restore(tmp_path / "s149") == memory).all()
    rebase(tmp_path / "s0", tmp_path / "s149", sync=False)
    assert (restore(tmp_path / "s0") == memory).all()
    assert (restore(tmp_path / "s149") == memory).all()


@pytest.mark.parametrize("break_it", [os.unlink, lambda path: os.truncate(path, 100)])
@pytest.mark.parametrize("which", ["s0", "s1", "s2"])
def test_a_diff_over_a_chain_that_cannot_be_restored_is_refused(tmp_path, break_it, which):
    memory = small_chain(tmp_path, 3)
    break_it(tmp_path / which)
    with pytest.raises(SnapshotError, match=which):
        save_diff(tmp_path / "d", memory, DirtyPages.from_indices([2], 8), parent=tmp_path / "s2")
    assert not os.path.exists(tmp_path / "d")


def test_a_chain_that_is_too_long_to_be_read_is_not_written(tmp_path, monkeypatch):
    memory = small_chain(tmp_path, 3)
    monkeypatch.setattr(writer, "MAX_CHAIN", 3)
    with pytest.raises(SnapshotError, match="its chain has 3 files, and no more than 3 are read"):
        save_diff(tmp_path / "d", memory, DirtyPages.from_indices([2], 8), parent=tmp_path / "s2")
    assert not os.path.exists(tmp_path / "d")


def test_a_diff_does_not_replace_its_own_ancestor(tmp_path):
    memory = small_chain(tmp_path, 3)
    for name in ("s0", "s1"):
        with pytest.raises(ValueError, match="is an ancestor of its parent"):
            save_diff(tmp_path / name, memory, DirtyPages._empty(8), parent=tmp_path / "s2", replace=True)
    assert (restore(tmp_path / "s2") == memory).all()


def test_a_parent_that_is_replaced_while_its_diff_is_written_is_noticed(tmp_path):
    memory = small_chain(tmp_path, 2)
    with pytest.raises(SnapshotError, match="was replaced or removed while its diff was written"):
        save_diff(
            tmp_path / "d", memory, DirtyPages.from_indices([2], 8), parent=tmp_path / "s1",
            progress=lambda *_: save(tmp_path / "s1", memory, replace=True),
        )  # fmt: skip
    assert sorted(os.listdir(tmp_path)) == ["s0", "s1"]


def test_epochs_go_up(tmp_path):
    save(tmp_path / "b", bytes(4096), epoch=4)
    for epoch in (3, 4):
        with pytest.raises(ValueError, match="is of epoch 4, and a diff must be later"):
            save_diff(tmp_path / "d", bytes(4096), DirtyPages._empty(1), parent=tmp_path / "b", epoch=epoch)
    save_diff(tmp_path / "d", bytes(4096), DirtyPages._empty(1), parent=tmp_path / "b", epoch=5)


def test_a_parent_is_found_in_the_directories_that_are_named(tmp_path):
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
    memory = small_chain(tmp_path / "old", 2)
    pages = DirtyPages.from_indices([3], 8)
    memory[3 * 4096] = 77
    with pytest.raises(ValueError, match="pass its directory as search="):
        save_diff(tmp_path / "new" / "d", memory, pages, parent=tmp_path / "old" / "s1")
    there = [tmp_path / "old"]
    save_diff(tmp_path / "new" / "d", memory, pages, parent=tmp_path / "old" / "s1", search=there)
    with pytest.raises(SnapshotError, match="no such snapshot"):
        restore(tmp_path / "new" / "d")
    assert (restore(tmp_path / "new" / "d", search=there) == memory).all()
    assert verify(tmp_path / "new" / "d", search=there).parent == "s1"


def test_a_rebase_that_would_orphan_other_diffs_is_refused(tmp_path):
    memory = small_chain(tmp_path, 3)
    save_diff(tmp_path / "sibling", memory, DirtyPages.from_indices([2, 5], 8), parent=tmp_path / "s1")
    with pytest.raises(SnapshotError, match="sibling could not be restored any more"):
        rebase(tmp_path / "s0", tmp_path / "s2")
    rebase(tmp_path / "s0", tmp_path / "s1")
    assert (restore(tmp_path / "sibling") == memory).all()
    rebase(tmp_path / "s0", tmp_path / "s2", orphan=True)
    assert (restore(tmp_path / "s0") == memory).all()
    assert (restore(tmp_path / "s2") == memory).all()


def test_a_few_pages_of_an_enormous_memory_are_a_small_file(tmp_path):
    npages = 1 << 31  # 8 TiB: ext4 ends at 16
    runs = DirtyPages.from_runs([[5, 2], [npages - 1, 1]], npages)

    class Sparse:
        page_size, nbytes, named = 4096, npages * 4096, False

        def rows(self):
            return (("", "|u1", (self.nbytes,), "C", 0, self.nbytes),)

        def gather(self, extents, packed):
            np.frombuffer(packed, np.uint8)[:] = 7

    Sparse.npages = npages
    how = writer.How(None, "blake2b_128", False, False, None, None, None)
    try:
        saved = writer.write(str(tmp_path / "s"), Sparse(), runs, None, how)
    except OSError as error:
        pytest.skip(f"no files of 8 TiB here: {error}")
    assert saved.allocated < 1 << 17
    assert verify(tmp_path / "s").count == 3
    with pytest.raises(ValueError, match="the limit is"):
        restore(tmp_path / "s")


# ---- readers beside writers -----------------------------------------------------------------------------------------


def test_readers_beside_a_writer_that_replaces_never_see_damage(tmp_path):
    memory = np.random.default_rng(0).integers(0, 256, 16 * 4096, np.uint8)
    save(tmp_path / "s", memory, sync=False)
    done = threading.Event()

    def write():
        for i in range(150):
            memory[i % 16 * 4096] ^= 1
            save(tmp_path / "s", memory, sync=False, replace=True)
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    reads = 0
    while not done.is_set() or not reads:
        verify(tmp_path / "s")
        restore(tmp_path / "s")
        info(tmp_path / "s")
        reads += 3
    writer.join()


# ---- images ---------------------------------------------------------------------------------------------------------


def test_an_image_that_is_cut_while_it_is_read_is_an_error(tmp_path):
    (tmp_path / "image").write_bytes(np.random.default_rng(0).bytes(6 << 20))
    with pytest.raises(OSError, match="cut while it was read"):
        save_image(tmp_path / "s", tmp_path / "image", progress=lambda *_: os.truncate(tmp_path / "image", 4096))
    assert os.listdir(tmp_path) == ["image"]


def test_half_a_restored_image_is_never_there(tmp_path):
    save(tmp_path / "s", np.ones(3 << 20, np.uint8))

    def fail(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        restore_image(tmp_path / "s", tmp_path / "image", progress=fail)
    assert os.listdir(tmp_path) == ["s"]
    restore_image(tmp_path / "s", tmp_path / "image")
    assert (tmp_path / "image").read_bytes() == b"\1" * (3 << 20)


def test_a_file_that_is_flattened_again_and_again_stays_the_parent_of_all_its_children(tmp_path):
    memory = np.zeros(8 * 4096, np.uint8)
    save(tmp_path / "base", memory, sync=False)
    moments = []
    for i in range(3):
        memory[i * 4096] = i + 1
        pages = DirtyPages.from_indices([i], 8)
        if i == 0:
            save_diff(tmp_path / "parent", memory, pages, parent=tmp_path / "base", sync=False)
            then = memory.copy()
        else:
            child = then.copy()
            child[i * 4096] = i + 1
            save_diff(tmp_path / f"child{i}", child, pages, parent=tmp_path / "parent", sync=False)
            moments.append(child)
        flatten(tmp_path / "parent", sync=False)
    for i, moment in enumerate(moments, 1):
        assert (restore(tmp_path / f"child{i}") == moment).all()
    assert info(tmp_path / "parent").time <= info(tmp_path / "child1").time


def test_a_diff_over_a_parent_that_is_flattened_meanwhile_is_written(tmp_path):
    memory = small_chain(tmp_path, 3)
    pages = DirtyPages.from_indices([0], 8)
    save_diff(
        tmp_path / "next", memory, pages, parent=tmp_path / "s2", sync=False,
        progress=lambda *_: flatten(tmp_path / "s2", sync=False),
    )  # fmt: skip
    assert (restore(tmp_path / "next") == memory).all()


def test_a_reader_that_met_a_child_just_before_it_was_merged_looks_again(tmp_path, monkeypatch):
    memory = small_chain(tmp_path, 4)
    find = chain.find

    def merged_meanwhile(name, *rest):
        monkeypatch.setattr(chain, "find", find)
        flatten(tmp_path / "s3", sync=False)
        for each in ("s2", "s1", "s0"):
            os.unlink(tmp_path / each)
        return find(name, *rest)

    monkeypatch.setattr(chain, "find", merged_meanwhile)
    assert (restore(tmp_path / "s3") == memory).all()
