"""Extents between memory and files: what moves, what is refused, what an error says."""

import errno
import os
import stat

import numpy as np
import pytest

from dirtylog import DirtyPages
from dirtylog._bits import copying
from dirtylog._bits.flat import flat_bytes
from dirtylog.commands import _arrivals
from dirtylog.sinks._bytes import pageio
from dirtylog.sinks._bytes.extents import PackedExtents
from dirtylog.sinks.migrate import sessions
from dirtylog.sinks.snapshot.removal import Removal

EXTENTS = np.array([(0, 10), (10, 6), (100, 1), (4096, 904)], np.int64)
NBYTES = 5000


def memory(seed):
    return np.random.default_rng(seed).integers(1, 256, NBYTES, np.uint8)


def expected(source, background):
    result = background.copy()
    for offset, length in EXTENTS:
        result[offset : offset + length] = source[offset : offset + length]
    return result


def test_copy_moves_the_extents_and_nothing_else():
    source, target = memory(1), memory(2)
    want = expected(source, target)
    assert copying.copy_extents(source, target, EXTENTS) == EXTENTS[:, 1].sum()
    assert (target == want).all()


@pytest.mark.parametrize("shift", [0, 1])
def test_a_large_copy_moves_the_extents_and_nothing_else(shift):
    # Past the size from which stores stream, at offsets and of lengths that allow it and that do not.
    source = np.random.default_rng(6).integers(0, 256, (40 << 20) + 1, np.uint8)[shift:]
    target = np.zeros_like(source)
    extents = np.array([(0, 9 << 20), (10 << 20, 4096), (11 << 20, 65), ((12 << 20) + 3, 9 << 20), (39 << 20, 1 << 20)])
    want = np.zeros_like(source)
    for offset, length in extents:
        want[offset : offset + length] = source[offset : offset + length]
    assert copying.copy_extents(source, target, extents) == extents[:, 1].sum()
    assert (target == want).all()


def test_gather_and_scatter_are_each_others_reverse():
    source, target = memory(1), memory(2)
    want = expected(source, target)
    packed = bytearray(int(EXTENTS[:, 1].sum()))
    copying.gather(source, EXTENTS, packed)
    assert packed == b"".join(source[o : o + n].tobytes() for o, n in EXTENTS)
    copying.scatter(packed, EXTENTS, target)
    assert (target == want).all()


@pytest.mark.parametrize("where", [0, 1, 16, 48, 63])
@pytest.mark.parametrize("total", [6 << 20, 1 << 20], ids=["past the caches", "through the caches"])
def test_extents_of_every_length_and_alignment_are_moved_whatever_they_are_copied_with(where, total):
    # Several pages are copied at once: each in its turn meets others, shorter and longer, and those at the end remain.
    rng = np.random.default_rng(where)
    lengths = rng.choice([1, 63, 64, 65, 2047, 2048, 2111, 4095, 4096, 4097, 8191, 12288], total // 3000)
    lengths[: len(lengths) % 4] = 4096
    gaps = rng.choice([0, 1, 16, 64, 4096], len(lengths))
    extents = np.column_stack([np.cumsum(gaps + lengths) - lengths, lengths])
    source = rng.integers(0, 256, extents[-1].sum() + 64, np.uint8)[where:]
    target = np.full(len(source) + 64, 7, np.uint8)[where : where + len(source)]
    taken = np.zeros(len(source), bool)
    for offset, length in extents:
        taken[offset : offset + length] = True
    copying.copy_extents(source, target, extents)
    assert (target == np.where(taken, source, 7)).all()
    packed = np.zeros(lengths.sum(), np.uint8)
    copying.gather(source, extents, packed)
    assert (packed == source[taken]).all()
    target[:] = 7
    copying.scatter(packed, extents, target)
    assert (target == np.where(taken, source, 7)).all()


@pytest.mark.parametrize("packed", [True, False])
def test_a_file_gets_and_gives_the_extents_at_their_offsets(tmp_path, packed):
    source = memory(3)
    with open(tmp_path / "f", "w+b") as file:
        file.truncate(NBYTES)
        data = bytearray(int(EXTENTS[:, 1].sum()))
        copying.gather(source, EXTENTS, data)
        pageio.write_extents(file.fileno(), data if packed else source, EXTENTS, packed=packed, name="f")
        want = expected(source, np.zeros(NBYTES, np.uint8))
        assert (np.fromfile(tmp_path / "f", np.uint8) == want).all()
        back = bytearray(len(data)) if packed else bytearray(NBYTES)
        pageio.read_extents(file.fileno(), back, EXTENTS, packed=packed, name="f")
        assert back == (data if packed else want.tobytes())


def test_more_neighbours_than_one_call_takes_are_written_whole(tmp_path):
    extents = np.stack([np.arange(1000) * 3, np.full(1000, 3)], axis=1)
    source = memory(4)[:3000]
    with open(tmp_path / "f", "w+b") as file:
        pageio.write_extents(file.fileno(), source, extents, packed=False, name="f")
        assert (np.fromfile(tmp_path / "f", np.uint8) == source).all()


@pytest.mark.parametrize("row", [(-1, 2), (0, -1), (NBYTES, 1), (NBYTES - 1, 2), (2**63 - 1, 2), (1, 2**63 - 1)])
def test_an_extent_outside_is_refused_before_a_byte_moves(tmp_path, row):
    source, target = memory(1), memory(2)
    before = target.copy()
    extents = np.array([(0, 10), row], np.int64)
    with pytest.raises(IndexError, match="extent 1 is offset"):
        copying.copy_extents(source, target, extents)
    with pytest.raises(IndexError), open(tmp_path / "f", "w+b") as file:
        pageio.write_extents(file.fileno(), source, extents, packed=False, name="f")
    assert (target == before).all()
    assert os.path.getsize(tmp_path / "f") == 0


@pytest.mark.parametrize("size", [0, 920, 922])
def test_a_packed_buffer_of_the_wrong_size_is_refused(size):
    with pytest.raises(ValueError, match="do not add up"):
        copying.gather(memory(1), EXTENTS, bytearray(size))


def test_the_sum_of_packed_extents_cannot_overflow(tmp_path):
    extents = np.array([(0, 1 << 62)] * 5, np.int64)
    with pytest.raises(ValueError, match="do not add up"), open(tmp_path / "f", "w+b") as file:
        pageio.write_extents(file.fileno(), b"12345678", extents, packed=True, name="f")


def test_buffers_that_will_not_do_are_refused():
    with pytest.raises(ValueError, match="target cannot be used"):
        copying.copy_extents(memory(1), bytes(NBYTES), EXTENTS)
    with pytest.raises(ValueError, match="source cannot be used"):
        copying.copy_extents(memory(1)[::2], bytearray(NBYTES), EXTENTS)
    with pytest.raises(TypeError, match="source is int"):
        copying.copy_extents(7, bytearray(NBYTES), EXTENTS)
    with pytest.raises(ValueError, match="3 columns"):
        copying.copy_extents(memory(1), bytearray(NBYTES), np.zeros((1, 3), np.int64))


def test_no_extents_is_no_work(tmp_path):
    none = np.empty((0, 2), np.int64)
    assert copying.copy_extents(memory(1), memory(2), none) == 0
    copying.gather(memory(1), none, bytearray())
    with open(tmp_path / "f", "w+b") as file:
        pageio.write_extents(file.fileno(), b"", none, packed=True, name="f")


def test_an_error_carries_errno_and_file_name(tmp_path):
    with open(tmp_path / "f", "w+b") as file:
        file.write(b"short")
        file.flush()
        with pytest.raises(OSError, match="'some name'") as caught:
            pageio.read_extents(file.fileno(), bytearray(NBYTES), EXTENTS, packed=False, name="some name")
        assert caught.value.errno == errno.ENODATA
    read_only = os.open(tmp_path / "f", os.O_RDONLY)
    try:
        with pytest.raises(OSError, match="'f'") as caught:
            pageio.write_extents(read_only, memory(1), EXTENTS, packed=False, name="f")
        assert caught.value.errno == errno.EBADF
    finally:
        os.close(read_only)


def test_data_extents_cover_all_that_is_not_zero(tmp_path):
    with open(tmp_path / "f", "w+b") as file:
        file.truncate(1 << 20)
        assert len(pageio.data_extents(file.fileno(), 1 << 20, name="f")) == 0
        for offset in (5, 70_000, (1 << 20) - 1):
            os.pwrite(file.fileno(), b"x", offset)
        found = pageio.data_extents(file.fileno(), 1 << 20, name="f")
        assert all(any(o <= offset < o + n for o, n in found) for offset in (5, 70_000, (1 << 20) - 1))
        assert found.sum(axis=1).max() <= 1 << 20
        assert (found[1:, 0] >= found[:-1].sum(axis=1)).all()


def test_data_extents_of_what_cannot_be_sought_is_an_error_with_the_name():
    reader, writer = os.pipe()
    try:
        with pytest.raises(OSError, match="'pipe'"):
            pageio.data_extents(reader, 100, name="pipe")
    finally:
        os.close(reader)
        os.close(writer)


@pytest.mark.parametrize("size", [7, 16, 64, 10_000])
def test_windows_are_the_packed_stream_cut_in_pieces(size):
    rng = np.random.default_rng(5)
    for _ in range(60):
        npages = int(rng.integers(1, 100))
        nbytes = npages * 16 - int(rng.integers(0, 16))
        pages = DirtyPages.from_indices(rng.integers(0, npages, int(rng.integers(0, 100))), npages, 16)
        packed = PackedExtents(pages, nbytes)
        want = [b for page in pages for b in range(page * 16, min(page * 16 + 16, nbytes))]
        cuts = list(packed.windows(size))
        assert [b for _, _, extents in cuts for o, n in extents for b in range(o, o + n)] == want
        assert all(extents[:, 1].sum() == end - begin for begin, end, extents in cuts)
        assert packed.total == len(want)


def test_any_contiguous_memory_becomes_bytes_and_nothing_else_does():
    array = np.zeros((4, 5), [("a", "<i4"), ("b", "u1")])
    flat_bytes(array, writable=True)[0] = 9
    assert array.tobytes()[0] == 9
    with pytest.raises(ValueError, match="not contiguous"):
        flat_bytes(np.zeros((4, 4))[:, 1])
    with pytest.raises(ValueError, match="read-only"):
        flat_bytes(b"abc", writable=True)
    with pytest.raises(ValueError, match="empty"):
        flat_bytes(b"")
    with pytest.raises(TypeError, match="is int"):
        flat_bytes(3)


class _Disk:
    """A file system that answers to the sync of a directory as it is told, and counts."""

    def __init__(self, monkeypatch, answer):
        self.answer, self.calls = answer, []
        self.fsync = os.fsync
        monkeypatch.setattr(os, "fsync", self.sync_one)
        monkeypatch.setattr(os, "sync", lambda: self.calls.append("all"))

    def sync_one(self, descriptor):
        if not stat.S_ISDIR(os.fstat(descriptor).st_mode):
            self.fsync(descriptor)
            return
        self.calls.append("directory")
        if self.answer:
            raise OSError(self.answer, os.strerror(self.answer))


def _journal(directory):
    sessions.Record("0" * 32, "source", directory).set("given")


def _out_file(directory):
    with _arrivals.OutFile(str(directory / "copy")) as out:
        memory = out.reserve(4096)
        out.arrived(memory)
        out.start(memory)
        memory.close()


def _removal(directory):
    (directory / "one").touch()
    with Removal(str(directory), ["one"], patience=0, sync=True) as removal:
        removal.remove(str(directory / "one"))


@pytest.mark.parametrize("work", [pageio.sync_directory, _journal, _out_file, _removal])
@pytest.mark.parametrize("answer", pageio.UNSUPPORTED)
def test_where_a_directory_cannot_be_synced_all_is(monkeypatch, tmp_path, work, answer):
    disk = _Disk(monkeypatch, answer)
    work(tmp_path)
    assert disk.calls
    assert disk.calls == ["directory", "all"] * (len(disk.calls) // 2)


@pytest.mark.parametrize("work", [pageio.sync_directory, _journal, _out_file, _removal])
def test_a_directory_that_fails_to_sync_is_an_error(monkeypatch, tmp_path, work):
    disk = _Disk(monkeypatch, errno.EIO)
    with pytest.raises(OSError, match="Input/output"):
        work(tmp_path)
    assert disk.calls == ["directory"]
