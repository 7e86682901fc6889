"""Two threads copy into one snapshot: the same bytes as one, and nothing left behind whatever breaks."""

import errno
import os
import threading

import numpy as np
import pytest

from dirtylog import DirtyPages
from dirtylog.sinks import snapshot
from dirtylog.sinks._bytes.extents import WINDOW, PackedExtents
from dirtylog.sinks.snapshot import copying
from dirtylog.sinks.snapshot.footer import hasher
from dirtylog.sinks.snapshot.layout import Layout

NPAGES = 3 * WINDOW // 4096 + 5
MEMORY = np.random.default_rng(3).integers(1, 256, (NPAGES, 4096), np.uint8)
DIGEST = hasher("blake2b_128")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(copying, "THREADED_FROM", WINDOW)
    monkeypatch.setattr(copying, "_processors", lambda: 2)
    yield
    assert [thread.name for thread in threading.enumerate() if thread.name == "dirtylog-snapshot"] == []


class Source:
    """Memory that does something before it is copied."""

    def __init__(self, before=lambda number: None):
        self.number, self.before = 0, before

    def gather(self, extents, packed):
        self.before(self.number)
        self.number += 1
        for offset, length in extents.tolist():
            packed[:length] = MEMORY.reshape(-1).data[offset : offset + length]
            packed = packed[length:]


def copied(path, source, told=lambda done: None, flags=os.O_RDWR, layout=Layout.PLAIN):
    descriptor = os.open(path, flags | os.O_CREAT, 0o600)
    try:
        packed = PackedExtents(DirtyPages.from_indices(np.arange(0, NPAGES, 1), NPAGES), MEMORY.nbytes)
        return copying.copy(source, packed, layout, descriptor, str(path), DIGEST, told)
    finally:
        os.close(descriptor)


def test_two_threads_write_what_one_writes(tmp_path, monkeypatch):
    told = []
    digests = copied(tmp_path / "two", Source(), told.append)
    assert copied(tmp_path / "packed", Source(), layout=Layout.PACKED) == digests
    monkeypatch.setattr(copying, "_processors", lambda: 1)
    assert copied(tmp_path / "one", Source()) == digests
    for name in ("one", "two", "packed"):
        assert (tmp_path / name).read_bytes() == MEMORY.tobytes()
    assert told == [WINDOW, 2 * WINDOW, 3 * WINDOW, MEMORY.nbytes]


def test_where_no_thread_can_be_started_one_does_all(tmp_path, monkeypatch):
    def refuse(_thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    copied(tmp_path / "file", Source())
    assert (tmp_path / "file").read_bytes() == MEMORY.tobytes()


def test_what_the_writing_thread_meets_is_raised(tmp_path):
    with pytest.raises(OSError, match="Bad file descriptor") as caught:
        copied(tmp_path / "file", Source(), flags=os.O_RDONLY)
    assert (caught.value.errno, caught.value.filename) == (errno.EBADF, str(tmp_path / "file"))


@pytest.mark.parametrize("window", range(4))
def test_an_interrupt_ends_the_other_thread_too(tmp_path, window):
    def interrupt(number):
        if number == window:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        copied(tmp_path / "file", Source(interrupt))


def test_a_writer_that_is_never_used_ends_and_writes_into_no_other_file(tmp_path):
    descriptor = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    behind = copying._Behind(descriptor, "file", lambda done: None)
    # What an interrupt leaves behind: the descriptor is closed, and its number may be another file's.
    os.close(descriptor)
    with open(tmp_path / "other", "w+b") as other:
        assert other.fileno() == descriptor
        behind.write(behind.buffer(), 4, np.array([[0, 4]], np.int64), 4)
        thread = behind._thread
        del behind
        thread.join()
    assert (tmp_path / "other").read_bytes() == b""
    assert (tmp_path / "file").read_bytes() == bytes(4)


def test_a_snapshot_of_many_windows_restores(tmp_path):
    snapshot.save(tmp_path / "base", MEMORY)
    snapshot.save_diff(
        tmp_path / "diff", MEMORY, DirtyPages.from_indices(np.arange(0, NPAGES, 2), NPAGES), parent=tmp_path / "base"
    )
    assert (snapshot.restore(tmp_path / "diff") == MEMORY).all()
    snapshot.verify(tmp_path / "diff")
