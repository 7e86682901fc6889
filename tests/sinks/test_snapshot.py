"""Snapshots: each restores the memory of its moment, and what is not there or not right is an error."""

import os
import sys

import numpy as np
import pytest

from dirtylog import BackendUnavailable, DirtyBitmap, DirtyLog, DirtyPages
from dirtylog.sinks.snapshot import SnapshotError, info, merge, rebase, restore, save, save_diff, verify
from dirtylog.sinks.snapshot.chain import Layer
from dirtylog.sinks.snapshot.footer import TRAILER
from dirtylog.sinks.snapshot.layout import Layout

NPAGES = 300


class Workload:
    """Memory with a log: random stores, some of which make pages zero again."""

    def __init__(self, seed, npages=NPAGES, page_size=4096, cut=0):
        self.rng = np.random.default_rng(seed)
        self.page_size = page_size
        self.memory = np.zeros(npages * page_size - cut, np.uint8)
        self.bitmap = DirtyBitmap(npages, page_size)
        self.log = DirtyLog()
        self.log.attach(self.bitmap)
        self.observer = self.log.observer("backup")
        self.run()

    def run(self, stores=40):
        for page in self.rng.integers(0, self.bitmap.npages, stores):
            start = int(page) * self.page_size
            if self.rng.random() < 0.3:
                self.memory[start : start + self.page_size] = 0
            else:
                end = min(start + self.page_size, self.memory.nbytes)
                self.memory[int(self.rng.integers(start, end)) : end] = self.rng.integers(1, 256)
            self.bitmap.mark(int(page))

    def save(self, directory, name):
        with self.observer.collect() as epoch:
            save(directory / name, self.memory, page_size=self.page_size, epoch=epoch.number, sync=False)
        return self.memory.copy()

    def diff(self, directory, name, parent):
        with self.observer.collect() as epoch:
            save_diff(
                directory / name, self.memory, epoch.pages, parent=directory / parent, epoch=epoch.number, sync=False
            )
        return self.memory.copy()


def chain(directory, workload, length):
    moments = {"s0": workload.save(directory, "s0")}
    for i in range(1, length):
        workload.run()
        moments[f"s{i}"] = workload.diff(directory, f"s{i}", f"s{i - 1}")
    return moments


@pytest.mark.parametrize(("page_size", "cut"), [(4096, 0), (4096, 1000), (512, 3), (16384, 0), (65536, 65535)])
def test_every_snapshot_of_a_chain_restores_its_own_moment(tmp_path, page_size, cut):
    for name, want in chain(tmp_path, Workload(page_size, 120, page_size, cut), 12).items():
        assert (restore(tmp_path / name) == want).all()
        assert verify(tmp_path / name).epoch == int(name[1:]) + 1


def test_a_snapshot_restores_into_memory_that_held_something_else(tmp_path):
    moments = chain(tmp_path, Workload(1), 4)
    out = np.full(NPAGES * 4096, 255, np.uint8)
    assert restore(tmp_path / "s3", out=out) is out
    assert (out == moments["s3"]).all()
    with pytest.raises(ValueError, match="out has 4096 bytes; the snapshot has"):
        restore(tmp_path / "s3", out=bytearray(4096))


def test_the_first_diff_over_the_base_equals_a_full_snapshot(tmp_path):
    workload = Workload(2)
    workload.save(tmp_path, "base")
    workload.run()
    workload.diff(tmp_path, "diff", "base")
    save(tmp_path / "full", workload.memory)
    assert (restore(tmp_path / "diff") == restore(tmp_path / "full")).all()


def test_the_file_is_plain_and_can_be_mapped(tmp_path):
    workload = Workload(3)
    moment = workload.save(tmp_path, "base")
    assert (np.memmap(tmp_path / "base", np.uint8, "r", shape=moment.shape) == moment).all()


@pytest.mark.parametrize("moment", ["copy", "fork"])
def test_a_chain_with_so_many_diffs_goes_on_with_a_full_snapshot(tmp_path, moment):
    memory = np.zeros(16 << 12, np.uint8)
    save(tmp_path / "0", memory)
    kinds = []
    for number in range(1, 9):
        memory[number << 12] = number
        pages = DirtyPages.from_indices([number], 16)
        parent = tmp_path / str(number - 1)
        written = save_diff(tmp_path / str(number), memory, pages, parent=parent, full_every=3, moment=moment)
        kinds.append((written.kind, written.parent))
        assert (restore(tmp_path / str(number)) == memory).all()
    diffs = [[("diff", str(number - 1)) for number in those] for those in (range(1, 4), range(5, 8))]
    assert kinds == [*diffs[0], ("full", None), *diffs[1], ("full", None)]
    # What counts is the chain as it is, whoever has made it shorter.
    merge(tmp_path / "5", tmp_path / "7")
    assert save_diff(tmp_path / "9", memory, pages, parent=tmp_path / "7", full_every=3).kind == "diff"


@pytest.mark.parametrize("number", [0, -1, True, 2.0, "3"])
def test_a_length_that_no_chain_can_have_is_refused(tmp_path, number):
    memory = np.zeros(4096, np.uint8)
    save(tmp_path / "0", memory)
    with pytest.raises(ValueError, match=r"full_every is .*; it must be a number from 1, or None"):
        save_diff(tmp_path / "1", memory, DirtyPages._all(1), parent=tmp_path / "0", full_every=number)
    assert not (tmp_path / "1").exists()


def test_a_full_snapshot_has_holes_for_zero_pages(tmp_path):
    memory = np.zeros(1 << 24, np.uint8)
    memory[1 << 20] = 1
    assert save(tmp_path / "base", memory).allocated <= 1 << 16
    assert info(tmp_path / "base").count == 1


def test_a_page_that_became_zero_does_not_fall_through_to_the_parent(tmp_path):
    memory = np.ones(1 << 16, np.uint8)
    save(tmp_path / "base", memory)
    memory[4096:8192] = 0
    assert save_diff(tmp_path / "diff", memory, DirtyPages.from_indices([1], 16), parent=tmp_path / "base").allocated
    assert (restore(tmp_path / "diff") == memory).all()


def test_a_copy_that_turned_zeros_into_holes_restores_all_the_same(tmp_path):
    test_a_page_that_became_zero_does_not_fall_through_to_the_parent(tmp_path)
    footer = (tmp_path / "diff").read_bytes()[4096:]
    with open(tmp_path / "diff", "r+b") as file:
        file.truncate(0)
        file.seek(4096)
        file.write(footer)
    assert restore(tmp_path / "diff")[4096:8192].max() == 0
    verify(tmp_path / "diff")


def test_a_diff_writes_no_more_than_is_dirty(tmp_path):
    rng = np.random.default_rng(4)
    memory = rng.integers(0, 256, 1 << 25, np.uint8)
    save(tmp_path / "base", memory, sync=False)
    pages = DirtyPages.from_indices(rng.choice(8192, 82, replace=False), 8192)
    written = save_diff(tmp_path / "diff", memory, pages, parent=tmp_path / "base", sync=False)
    assert written.allocated <= 1.2 * pages.nbytes


def test_more_pages_than_changed_do_no_harm_and_are_noted_as_inexact(tmp_path):
    workload = Workload(5)
    workload.save(tmp_path, "base")
    everything = DirtyPages._all(NPAGES)
    assert not save_diff(tmp_path / "diff", workload.memory, everything, parent=tmp_path / "base").exact
    assert not info(tmp_path / "diff").exact
    assert (restore(tmp_path / "diff") == workload.memory).all()


def test_an_empty_diff_is_the_parents_memory(tmp_path):
    workload = Workload(6)
    moment = workload.save(tmp_path, "base")
    assert (workload.diff(tmp_path, "diff", "base") == moment).all()
    assert info(tmp_path / "diff").count == 0
    assert (restore(tmp_path / "diff") == moment).all()


def test_without_xxhash_digests_are_by_what_is_here(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "xxhash", None)
    memory = np.ones(5000, np.uint8)
    assert save(tmp_path / "base", memory).algorithm == "blake2b_128"
    save_diff(tmp_path / "diff", memory, DirtyPages._all(2), parent=tmp_path / "base")
    assert verify(tmp_path / "diff").algorithm == "blake2b_128"
    with pytest.raises(BackendUnavailable, match="pip install xxhash"):
        save(tmp_path / "other", memory, digest="xxh3_128")


def test_two_digests_can_be_chosen_and_mixed_in_a_chain(tmp_path):
    workload = Workload(7)
    save(tmp_path / "base", workload.memory, digest="blake2b_128")
    save_diff(tmp_path / "diff", workload.memory, DirtyPages._all(NPAGES), parent=tmp_path / "base")
    assert (info(tmp_path / "base").algorithm, verify(tmp_path / "diff").algorithm) == ("blake2b_128", "xxh3_128")
    with pytest.raises(ValueError, match="digest is 'md5'"):
        save(tmp_path / "other", workload.memory, digest="md5")


def test_progress_is_told_bytes_up_to_all_of_them(tmp_path):
    memory = np.ones((5 << 20) + 3, np.uint8)
    for work in (
        lambda told: save(tmp_path / "base", memory, progress=lambda *at: told.append(at)),
        lambda told: restore(tmp_path / "base", progress=lambda *at: told.append(at)),
        lambda told: verify(tmp_path / "base", progress=lambda *at: told.append(at)),
    ):
        told = []
        work(told)
        assert told == [(min(i << 20, memory.nbytes), memory.nbytes) for i in range(1, 7)]


# ---- what is refused ------------------------------------------------------------------------------------------------


def test_a_snapshot_is_not_overwritten_unless_asked(tmp_path):
    workload = Workload(8)
    moment = workload.save(tmp_path, "base")
    workload.run()
    with pytest.raises(FileExistsError, match="replace=True"):
        save(tmp_path / "base", workload.memory)
    assert (restore(tmp_path / "base") == moment).all()
    save(tmp_path / "base", workload.memory, replace=True)
    assert (restore(tmp_path / "base") == workload.memory).all()
    assert os.listdir(tmp_path) == ["base"]


def test_where_nothing_is_to_be_replaced_it_is_written(tmp_path):
    save(tmp_path / "s", b"x", replace=True)
    assert bytes(restore(tmp_path / "s")) == b"x"


@pytest.mark.parametrize("look", range(4))
def test_a_file_that_is_removed_while_it_is_replaced_is_written_anew(tmp_path, monkeypatch, look):
    # By whoever prunes, after any of the looks at it.
    path = tmp_path / "s"
    save(path, b"before")
    looks = []

    def looking(real):
        def one(at, *arguments, **options):
            answer = real(at, *arguments, **options)
            if os.fspath(at) == str(path):
                looks.append(at)
                if len(looks) == look + 1:
                    path.unlink()
            return answer

        return one

    for name in ("stat", "lstat"):
        monkeypatch.setattr(os, name, looking(getattr(os, name)))
    save(path, b"after", replace=True)
    monkeypatch.undo()
    assert bytes(restore(path)) == b"after"


@pytest.mark.parametrize(
    "make", [os.mkdir, lambda path: os.symlink("nothing", path), lambda path: os.symlink(path, path)]
)
def test_only_a_file_is_replaced(tmp_path, make):
    make(tmp_path / "s")
    with pytest.raises(ValueError, match="is not a regular file"):
        save(tmp_path / "s", b"x", replace=True)


def test_a_foreign_file_is_not_overwritten_either(tmp_path):
    (tmp_path / "base").write_bytes(b"somebody's")
    with pytest.raises(FileExistsError):
        save(tmp_path / "base", b"x")
    assert (tmp_path / "base").read_bytes() == b"somebody's"


def test_a_missing_parent_is_an_error_and_never_zeros(tmp_path):
    chain(tmp_path, Workload(9), 4)
    os.unlink(tmp_path / "s1")
    out = np.full(NPAGES * 4096, 7, np.uint8)
    for use in (lambda p: restore(p, out=out), verify, lambda p: rebase(tmp_path / "s0", p)):
        with pytest.raises(SnapshotError, match=r"s2: its parent cannot be used: .*s1: there is no such snapshot"):
            use(tmp_path / "s3")
    assert (out == 7).all()
    with pytest.raises(SnapshotError, match="no such snapshot"):
        save_diff(tmp_path / "s4", out, DirtyPages._empty(NPAGES), parent=tmp_path / "s1")


def test_a_parent_that_was_replaced_is_noticed(tmp_path):
    workload = Workload(10)
    chain(tmp_path, workload, 3)
    save(tmp_path / "s0", workload.memory, replace=True)
    with pytest.raises(SnapshotError, match="is not the one it was taken over"):
        restore(tmp_path / "s2")


def test_wrong_arguments_are_refused_and_leave_no_file(tmp_path):
    workload = Workload(11)
    workload.save(tmp_path, "base")
    names = sorted(os.listdir(tmp_path))
    none = DirtyPages._empty(NPAGES)
    (tmp_path / "elsewhere").mkdir()
    for error, match, path, memory, pages, parent in [
        (ValueError, "pages has 301 pages", "d", workload.memory, DirtyPages._empty(301), "base"),
        (SnapshotError, "the parent has", "d", workload.memory[4096:], DirtyPages._empty(NPAGES - 1), "base"),
        (SnapshotError, "the parent has", "d", workload.memory, DirtyPages._empty(NPAGES // 2, 8192), "base"),
        (TypeError, "pages is list", "d", workload.memory, [1], "base"),
        (ValueError, "cannot be its own parent", "base", workload.memory, none, "base"),
        (ValueError, "must be in the diff's directory", "elsewhere/d", workload.memory, none, "base"),
        (ValueError, "will not do", ".hidden", workload.memory, none, "base"),
        (ValueError, "will not do", "d\n", workload.memory, none, "base"),
        (ValueError, "will not do", "d", workload.memory, none, ".."),
        (TypeError, "memory is int", "d", 3, none, "base"),
    ]:
        with pytest.raises(error, match=match):
            save_diff(tmp_path / path, memory, pages, parent=f"{tmp_path}/{parent}")
    with pytest.raises(ValueError, match="page_size is 1000"):
        save(tmp_path / "d", workload.memory, page_size=1000)
    for epoch in (-1, True, 1.0):
        with pytest.raises(ValueError, match=f"epoch is {epoch}; it must be a number from 0 to"):
            save(tmp_path / "d", workload.memory, epoch=epoch)
    os.rmdir(tmp_path / "elsewhere")
    assert sorted(os.listdir(tmp_path)) == names


def test_a_parent_of_another_digest_is_refused_unless_it_holds_the_same_memory(tmp_path):
    memory, pages = np.zeros(8192, np.uint8), DirtyPages.from_indices([1], 2)
    save(tmp_path / "0", memory)
    first = save_diff(tmp_path / "1", memory, pages, parent=tmp_path / "0")
    with pytest.raises(SnapshotError, match=f"1: this is another snapshot than the one of digest {'0' * 32}"):
        save_diff(tmp_path / "2", memory, pages, parent=tmp_path / "1", parent_digest="0" * 32)
    assert not (tmp_path / "2").exists()
    assert merge(tmp_path / "0", tmp_path / "1").digest != first.digest
    assert save_diff(tmp_path / "2", memory, pages, parent=tmp_path / "1", parent_digest=first.digest).kind == "diff"


def test_numbers_of_numpy_are_numbers(tmp_path):
    memory = np.zeros(8192, np.uint8)
    save(tmp_path / "0", memory, epoch=np.int64(5), page_size=np.int32(4096))
    pages = DirtyPages.from_indices([1], 2)
    save_diff(tmp_path / "1", memory, pages, parent=tmp_path / "0", epoch=np.uint64(6), full_every=np.int8(1))
    assert [info(tmp_path / name).epoch for name in ("0", "1")] == [5, 6]


def test_nothing_larger_than_the_limit_is_allocated(tmp_path):
    save(tmp_path / "base", np.zeros(1 << 16, np.uint8))
    with pytest.raises(ValueError, match="restoring takes 65536 bytes, the limit is 65535"):
        restore(tmp_path / "base", limit=65535)
    restore(tmp_path / "base", limit=65536)


# ---- rebase ---------------------------------------------------------------------------------------------------------


def test_a_rebased_base_holds_the_diffs_memory_and_the_diff_restores_still(tmp_path):
    moments = chain(tmp_path, Workload(12), 4)
    assert rebase(tmp_path / "s0", tmp_path / "s1").kind == "full"
    for name in ("s1", "s2", "s3"):
        assert (restore(tmp_path / name) == moments[name]).all()
    assert (restore(tmp_path / "s0") == moments["s1"]).all()
    assert verify(tmp_path / "s0").epoch == 2


def test_a_base_takes_one_diff_after_the_other_with_those_done_deleted(tmp_path):
    moments = chain(tmp_path, Workload(13), 5)
    for i in range(1, 5):
        rebase(tmp_path / "s0", tmp_path / f"s{i}")
        os.unlink(tmp_path / f"s{i}")
        assert (restore(tmp_path / "s0") == moments[f"s{i}"]).all()
    assert os.listdir(tmp_path) == ["s0"]


def test_a_whole_chain_is_laid_over_its_base_at_once(tmp_path):
    moments = chain(tmp_path, Workload(14), 5)
    rebase(tmp_path / "s0", tmp_path / "s4")
    assert (restore(tmp_path / "s0") == moments["s4"]).all()
    with pytest.raises(SnapshotError, match="not the one it was taken over"):
        restore(tmp_path / "s2")


def test_diffs_in_the_middle_of_a_chain_are_joined(tmp_path):
    moments = chain(tmp_path, Workload(15), 5)
    rebase(tmp_path / "s1", tmp_path / "s3")
    assert info(tmp_path / "s1").kind == "diff"
    assert (restore(tmp_path / "s1") == moments["s3"]).all()


def test_a_diff_is_not_laid_over_what_is_no_ancestor(tmp_path):
    workload = Workload(16)
    chain(tmp_path, workload, 3)
    save(tmp_path / "other", workload.memory)
    for base, diff in (("other", "s2"), ("s2", "s1"), ("s1", "s1"), ("s1", "s0")):
        before = (tmp_path / base).read_bytes()
        with pytest.raises(SnapshotError, match="was not taken over it"):
            rebase(tmp_path / base, tmp_path / diff)
        assert (tmp_path / base).read_bytes() == before


def test_a_damaged_diff_is_not_laid_over_its_base(tmp_path):
    moments = chain(tmp_path, Workload(17), 2)
    flip(tmp_path / "s1", 0, 3)
    with pytest.raises(SnapshotError, match=r"s1: pages .* does not match its digest"):
        rebase(tmp_path / "s0", tmp_path / "s1")
    assert (restore(tmp_path / "s0") == moments["s0"]).all()
    assert len(os.listdir(tmp_path)) == 2


# ---- verify ---------------------------------------------------------------------------------------------------------


def restored_pages(path):
    with Layer(str(path)) as layer:
        return layer.pages().indices()


def flip(path, offset, bit):
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1 << bit]))


@pytest.mark.usefixtures("mixed_layouts")
@pytest.mark.parametrize("page_size", [512, 4096])
def test_a_flipped_bit_anywhere_in_any_file_of_the_chain_is_found(tmp_path, page_size):
    chain(tmp_path, Workload(18, 60, page_size, 5), 3)
    rng = np.random.default_rng(19)
    verify(tmp_path / "s2")
    for name in ("s0", "s1", "s2"):
        # Every page, held or a hole, the very ends of the data, and what is between it and the footer.
        with Layer(str(tmp_path / name)) as layer:
            size, packed = layer.place.offset, layer.place.layout is Layout.PACKED
        held = restored_pages(tmp_path / name).tolist() if packed else [*range(60)]
        assert size == -(-(len(held) * page_size - 5 * (held[-1] == 59)) // 4096) * 4096
        assert packed == (name == "s1")
        starts = np.arange(0, size, page_size)
        offsets = {0, size - 1, *np.minimum(starts + rng.integers(0, page_size, len(starts)), size - 1).tolist()}
        original = (tmp_path / name).read_bytes()
        for offset in sorted(offsets):
            flip(tmp_path / name, offset, int(rng.integers(8)))
            with pytest.raises(SnapshotError, match=f"{name}: pages ") as caught:
                verify(tmp_path / "s2")
            first, last = map(int, caught.value.damage[0].split("pages ")[1].split(":")[0].split(" to "))
            assert first <= held[min(offset // page_size, len(held) - 1)] <= last
            (tmp_path / name).write_bytes(original)
    verify(tmp_path / "s2")


def test_what_is_damaged_is_not_restored(tmp_path):
    chain(tmp_path, Workload(22), 2)
    flip(tmp_path / "s0", int(restored_pages(tmp_path / "s0")[-1]) * 4096 + 9, 0)
    with pytest.raises(SnapshotError, match=r"s0: pages .* does not match its digest"):
        restore(tmp_path / "s1")


def test_a_flipped_bit_anywhere_in_a_footer_is_found(tmp_path):
    chain(tmp_path, Workload(20, 20), 2)
    for name in ("s0", "s1"):
        original = (tmp_path / name).read_bytes()
        for offset in range(TRAILER.unpack(original[-64:])[2], len(original)):
            flip(tmp_path / name, offset, offset % 8)
            with pytest.raises(SnapshotError):
                verify(tmp_path / "s1")
            flip(tmp_path / name, offset, offset % 8)
    verify(tmp_path / "s1")


def test_a_file_cut_or_grown_is_found(tmp_path):
    chain(tmp_path, Workload(21, 20), 2)
    for name in ("s0", "s1"):
        original = (tmp_path / name).read_bytes()
        for changed in (original[:-1], original + b"\0", b""):
            (tmp_path / name).write_bytes(changed)
            with pytest.raises(SnapshotError):
                verify(tmp_path / "s1")
        (tmp_path / name).write_bytes(original)
    verify(tmp_path / "s1")
