"""SharedLog: the same bits for every process, none lost, sizes checked."""

import errno
import fcntl
import io
import mmap
import os
import subprocess
import sys
from multiprocessing import shared_memory
from pathlib import Path

import numpy as np
import pytest

import dirtylog as dl
from dirtylog.sources.shared import SharedLog

from ..leaks import assert_nothing_leaks, descriptors

INCLUDE = Path(dl.__file__).parent / "include"


@pytest.fixture
def log():
    with SharedLog.create(1000) as log:
        yield log


def dirty(log):
    return log.harvest().indices().tolist()


@pytest.mark.parametrize("npages", [1, 63, 64, 65, 512, 4097])
def test_marks_come_back_once(npages):
    with SharedLog.create(npages) as log:
        assert (log.npages, log.page_size) == (npages, 4096)
        assert dirty(log) == []
        log.mark(npages - 1)
        log.mark_range(0, 1)
        assert log.count() == len({0, npages - 1})
        assert log.peek().indices().tolist() == sorted({0, npages - 1})
        assert dirty(log) == sorted({0, npages - 1})
        assert dirty(log) == []


def test_a_batch_a_range_and_a_part_of_the_log(log):
    log.mark_pages([5, 900, 7])
    log.mark_range(60, 10)
    assert log.is_dirty(900)
    assert not log.is_dirty(901)
    assert log.harvest(64, 64).runs().tolist() == [[64, 6]]
    log.clear(log.peek(0, 6))
    assert dirty(log) == [7, 60, 61, 62, 63, 900]


def test_a_harvest_fills_the_callers_words(log):
    log.mark(70)
    words = np.zeros(16, np.uint64)
    assert log.harvest(out=words).indices().tolist() == [70]
    assert words[1] == 1 << 6


def test_bits_are_vhost_users(log):
    """log[page / 8] |= 1 << (page % 8)."""
    with mmap.mmap(log.fileno(), 0) as view:
        for page in (0, 9, 63, 64, 999):
            view[page // 8] |= 1 << page % 8
    assert dirty(log) == [0, 9, 63, 64, 999]
    log.mark(523)
    with mmap.mmap(log.fileno(), 0, prot=mmap.PROT_READ) as view:
        assert view[523 // 8] == 1 << 523 % 8
        assert sum(view[:]) == view[523 // 8]


def test_two_views_share_the_marks_by_descriptor(log):
    with SharedLog.open(log.fileno(), 1000) as other:
        assert other.fileno() != log.fileno()
        other.mark(17)
        assert dirty(log) == [17]
        log.mark(18)
        assert dirty(other) == [18]


def test_two_views_share_the_marks_by_path(tmp_path):
    path = tmp_path / "log"
    with SharedLog.create(path=path, nbytes=100 * 4096 - 1) as log, SharedLog.open(path, 100) as other:
        assert log.npages == 100
        assert path.stat().st_size == 16
        assert path.stat().st_mode & 0o777 == 0o600
        other.mark(99)
        assert dirty(log) == [99]
        log.mark(3)
    with SharedLog.open(str(path), nbytes=100 * 4096) as again:
        assert dirty(again) == [3]


def test_two_views_share_the_marks_by_shared_memory():
    segment = shared_memory.SharedMemory(create=True, size=4096)
    try:
        with SharedLog.open(segment, 1000) as log, SharedLog.open(segment, 1000) as other:
            other.mark(999)
            assert dirty(log) == [999]
            with pytest.raises(io.UnsupportedOperation, match="hand on its name"):
                log.fileno()
        with SharedLog.open(segment) as whole:
            assert whole.npages == 8 * segment.size
    finally:
        segment.close()
        segment.unlink()
    with pytest.raises(ValueError, match="SharedMemory is closed"):
        SharedLog.open(segment)


def test_an_offset_is_where_the_log_starts():
    offset = mmap.ALLOCATIONGRANULARITY
    descriptor = os.memfd_create("log")
    os.ftruncate(descriptor, offset + 16)
    with SharedLog.open(descriptor, offset=offset) as log:
        assert log.npages == 128
        os.pwrite(descriptor, b"\x81", offset + 8)
        assert dirty(log) == [64, 71]
    os.close(descriptor)


@pytest.mark.parametrize(("size", "npages"), [(0, 1), (8, 65), (15, 128), (16, 129), (8, 1 << 40)])
def test_a_log_smaller_than_the_guest_is_refused(size, npages):
    descriptor = os.memfd_create("log")
    os.ftruncate(descriptor, size)
    before = descriptors()
    with pytest.raises(ValueError, match=f"has {size} bytes and is smaller than the guest: {npages} pages take"):
        SharedLog.open(descriptor, npages)
    with pytest.raises(ValueError, match="smaller than the guest"):
        SharedLog.open(descriptor, nbytes=npages * 4096)
    assert not descriptors() - before
    os.close(descriptor)


@pytest.mark.parametrize("size", [0, 4, 12])
def test_a_log_of_unknown_size_is_whole_words(size):
    descriptor = os.memfd_create("log")
    os.ftruncate(descriptor, size)
    with pytest.raises(ValueError, match=f"whole 64-bit words, and this one has {size} bytes"):
        SharedLog.open(descriptor)
    os.close(descriptor)


def test_a_larger_log_is_fine_and_its_rest_is_left_alone():
    descriptor = os.memfd_create("log")
    os.pwrite(descriptor, bytes(8) + b"\xff" * 8, 0)
    with SharedLog.open(descriptor, 64) as log:
        log.mark(1)
        assert dirty(log) == [1]
    assert os.pread(descriptor, 16, 0) == bytes(8) + b"\xff" * 8
    os.close(descriptor)


def test_bits_past_the_guest_are_refused_when_opening():
    """I7."""
    descriptor = os.memfd_create("log")
    os.pwrite(descriptor, bytes(15) + b"\x10", 0)
    with pytest.raises(ValueError, match="bits set past page 99"):
        SharedLog.open(descriptor, 100)
    os.close(descriptor)


def test_a_mark_past_the_guest_is_an_error_and_takes_nothing(log):
    log.mark(5)
    with SharedLog.open(log.fileno(), 1024) as larger:
        larger.mark(1001)
        for call in (log.harvest, log.peek, log.count):
            with pytest.raises(dl.DirtyLogError, match="marked page 1001, and the log was opened for 1000 pages"):
                call()
        assert dirty(larger) == [5, 1001]
    assert dirty(log) == []


def test_a_descriptor_that_is_not_open_is_named():
    with pytest.raises(OSError, match="file descriptor 1000000: Bad file descriptor; pass one that is open") as caught:
        SharedLog.open(1_000_000)
    assert caught.value.errno == errno.EBADF


def test_a_file_that_was_cut_is_an_error_not_a_crash(tmp_path):
    with SharedLog.create(1 << 16, tmp_path / "log") as log:
        os.truncate(tmp_path / "log", 0)
        for call in (log.harvest, log.peek, log.count, lambda: log.mark(0), lambda: log.mark_pages([1])):
            with pytest.raises(dl.DirtyLogError, match="was cut to 0 bytes"):
                call()


def test_an_anonymous_log_cannot_be_cut(log):
    with pytest.raises(PermissionError):
        os.ftruncate(log.fileno(), 0)
    assert fcntl.fcntl(log.fileno(), fcntl.F_GET_SEALS) & fcntl.F_SEAL_SEAL


def test_wrong_arguments_are_refused_before_anything_is_made(tmp_path):
    path = tmp_path / "log"
    with pytest.raises(ValueError, match="how large is the guest"):
        SharedLog.create(path=path)
    with pytest.raises(ValueError, match="pass one of them"):
        SharedLog.create(5, path, nbytes=4096)
    for size in ({"npages": 0}, {"npages": -1}, {"nbytes": 0}):
        with pytest.raises(ValueError, match="at least 1"):
            SharedLog.create(path=path, **size)
    with pytest.raises(TypeError):
        SharedLog.create(1.5, path)
    assert not path.exists()
    with pytest.raises(TypeError, match="a bytes is not a log"):
        SharedLog.open(b"/tmp/x")
    with pytest.raises(FileNotFoundError):
        SharedLog.open(path)
    with pytest.raises(OSError, match="Bad file descriptor"):
        SharedLog.open(1 << 20)


def test_an_existing_file_is_not_overwritten(tmp_path):
    path = tmp_path / "log"
    path.write_bytes(b"precious")
    with pytest.raises(FileExistsError):
        SharedLog.create(64, path)
    assert path.read_bytes() == b"precious"


def test_a_creation_that_fails_leaves_no_file_and_no_descriptor(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    monkeypatch.setattr(os, "ftruncate", refuse)
    before = descriptors()
    for path in (None, tmp_path / "log"):
        with pytest.raises(OSError, match="No space left"):
            SharedLog.create(64, path)
    assert not descriptors() - before
    assert list(tmp_path.iterdir()) == []


def test_an_anonymous_log_takes_no_memory_before_it_is_used():
    with SharedLog.create(1 << 30) as log:
        assert os.fstat(log.fileno()).st_size == 1 << 27
        assert os.fstat(log.fileno()).st_blocks * 512 <= 1 << 16
        log.mark((1 << 30) - 1)
        assert log.is_dirty((1 << 30) - 1)


@pytest.mark.parametrize(
    ("npages", "error", "why"),
    [(1 << 52, MemoryError, "this machine has"), ((1 << 52) + 1, ValueError, "npages is"), (1 << 70, ValueError, "np")],
)
def test_a_log_that_nothing_can_hold_is_refused_before_anything_is_made(tmp_path, monkeypatch, npages, error, why):
    def made(*_):
        raise AssertionError("something was made")

    monkeypatch.setattr(os, "memfd_create", made)
    monkeypatch.setattr(os, "posix_fallocate", made)
    for size in ({"npages": npages}, {"nbytes": npages * 4096}):
        with pytest.raises(error, match=why):
            SharedLog.create(**size)
        with pytest.raises((ValueError, OSError), match=r"npages is|no room for a log of"):
            SharedLog.create(path=tmp_path / "log", **size)
    assert list(tmp_path.iterdir()) == []


def test_pages_out_of_range_are_index_errors(log):
    for call in (lambda: log.mark(1000), lambda: log.mark(-1), lambda: log.mark_pages([3, 1000])):
        with pytest.raises(IndexError):
            call()
    with pytest.raises(IndexError):
        log.harvest(1001)
    assert dirty(log) == []


def test_closing_twice_is_fine_and_a_closed_log_refuses(log):
    log.close()
    log.close()
    assert log.closed
    calls = (log.harvest, log.peek, log.count, log.fileno, log.__enter__, lambda: log.mark(0), lambda: log.is_dirty(0))
    for call in calls:
        with pytest.raises(ValueError, match="SharedLog is closed"):
            call()


@pytest.mark.parametrize("moment", ["before the answer", "after the answer", "the number is another file's"])
@pytest.mark.parametrize("call", [SharedLog.harvest, SharedLog.peek, SharedLog.count, lambda log: log.mark(0)])
def test_a_close_beside_another_call_is_closed_and_nothing_else(log, monkeypatch, tmp_path, moment, call):
    """The other thread's close comes while the call asks for the file's size."""
    fstat = os.fstat
    stranger = os.open(tmp_path / "stranger", os.O_RDWR | os.O_CREAT)

    def close_and_answer(descriptor):
        answer = fstat(descriptor)
        log.close()
        if moment == "after the answer":
            return answer
        return fstat(descriptor if moment == "before the answer" else stranger)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fstat", close_and_answer)
        with pytest.raises(ValueError, match="SharedLog is closed"):
            call(log)
    os.close(stranger)


def test_a_harvest_under_way_keeps_the_memory_that_a_close_gives_back(log):
    log.mark(3)
    bitmap = log._checked_bitmap()
    log.close()
    assert bitmap.harvest().indices().tolist() == [3]


def test_pages_outlive_the_log_they_came_from(log):
    log.mark(3)
    peeked, taken = log.peek(), log.harvest()
    log.close()
    assert peeked.indices().tolist() == taken.indices().tolist() == [3]


def test_a_forgotten_log_warns():
    log = SharedLog.create(10)
    with pytest.warns(ResourceWarning, match="unclosed <SharedLog: 10 pages"):
        del log


def create_and_close(count):
    for number in range(count):
        with SharedLog.create(1 << 15) as log, SharedLog.open(log.fileno()) as other:
            other.mark(number)
            assert dirty(log) == [number]


def test_a_thousand_logs_leave_nothing(sanitized):
    assert_nothing_leaks(create_and_close, memory=not sanitized)


# ---- other processes ----------------------------------------------------------------------------------

# argv: how, descriptor of the log, descriptor of the words, npages, first, step, rounds.
# Word 0 of the shared words starts the writers; word 1 + page holds what was last stored in a page.
C_WRITER = r"""
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include "dirtylog/bitmap.h"

int main(int argc, char **argv)
{
    int words_form = !strcmp(argv[1], "word");
    uint64_t npages = strtoull(argv[4], 0, 10), first = strtoull(argv[5], 0, 10);
    uint64_t step = strtoull(argv[6], 0, 10), rounds = strtoull(argv[7], 0, 10);
    uint64_t bytes = (npages + 63) / 64 * 8;
    unsigned char *log = mmap(0, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, atoi(argv[2]), 0);
    uint64_t *data = mmap(0, 8 * (npages + 1), PROT_READ | PROT_WRITE, MAP_SHARED, atoi(argv[3]), 0);
    struct dl_bitmap bitmap = {.words = (uint64_t *)log, .npages = npages};

    if (log == MAP_FAILED || data == MAP_FAILED)
        return 1;
    while (!__atomic_load_n(&data[0], __ATOMIC_ACQUIRE))
        ;
    for (uint64_t round = 1; round <= rounds; round++)
        for (uint64_t page = first; page < npages; page += step) {
            __atomic_store_n(&data[1 + page], round, __ATOMIC_RELAXED);
            if (words_form)
                dl_mark(&bitmap, page);
            else
                __atomic_fetch_or(&log[page / 8], (unsigned char)(1 << page % 8), __ATOMIC_SEQ_CST);
        }
    return 0;
}
"""

PYTHON_WRITER = """
import mmap, sys
import numpy as np
import dirtylog as dl
log_fd, words_fd, npages, first, step, rounds = map(int, sys.argv[2:])
with dl.SharedLog.open(log_fd, npages) as log:
    data = np.frombuffer(mmap.mmap(words_fd, 0), np.uint64)
    while not data[0]:
        pass
    pages = np.arange(first, npages, step)
    for number in range(1, rounds + 1):
        for part in np.array_split(pages, max(1, len(pages) // 64)):
            data[1 + part] = number
            log.mark_pages(part)
"""


@pytest.fixture(params=["byte", "word", "python"])
def writer(request, tmp_path):
    """The command of a program that marks, and which form of the bits it uses."""
    if request.param == "python":
        return [sys.executable, "-c", PYTHON_WRITER, "python"]
    compiler = request.getfixturevalue("c_compiler")
    source, program = tmp_path / "writer.c", tmp_path / "writer"
    source.write_text(C_WRITER)
    subprocess.run([compiler, "-O2", "-std=gnu11", f"-I{INCLUDE}", str(source), "-o", str(program)], check=True)
    return [str(program), request.param]


class Writers:
    """Two processes that mark the even and the odd pages of one log, when told to go."""

    def __init__(self, command, log, rounds):
        self.words = os.memfd_create("words")
        os.ftruncate(self.words, 8 * (log.npages + 1))
        self.memory = mmap.mmap(self.words, 0)
        self.data = np.frombuffer(self.memory, np.uint64)
        fds = (log.fileno(), self.words)
        self.processes = [
            subprocess.Popen([*command, *map(str, (*fds, log.npages, first, 2, rounds))], pass_fds=fds)
            for first in (0, 1)
        ]

    def go(self):
        self.memory[0] = 1

    def running(self):
        return any(process.poll() is None for process in self.processes)

    def finish(self):
        codes = [process.wait() for process in self.processes]
        stored = self.data[1:].copy()
        del self.data
        self.memory.close()
        os.close(self.words)
        assert codes == [0, 0]
        return stored


def test_two_processes_mark_a_million_pages_while_a_third_harvests(writer):
    """Each page once, even and odd pages from different processes: none lost, none invented."""
    npages = 1 << 20
    with SharedLog.create(npages) as log:
        writers = Writers(writer, log, 1)
        found = []
        writers.go()
        while writers.running():
            found.append(log.harvest().indices())
        writers.finish()
        found.append(log.harvest().indices())
        assert log.count() == 0
    together = np.concatenate(found)
    assert len(together) == npages
    assert np.array_equal(np.sort(together), np.arange(npages))


def test_what_a_process_stored_before_its_mark_is_there_after_the_harvest(writer):
    """The value oracle: copying what is reported ends with what was stored last."""
    npages = 64 * 3
    with SharedLog.create(npages) as log:
        writers = Writers(writer, log, 3000)
        seen = np.zeros(npages, np.uint64)
        writers.go()
        while writers.running():
            pages = log.harvest().indices()
            seen[pages] = writers.data[1 + pages]
        pages = log.harvest().indices()
        seen[pages] = writers.data[1 + pages]
        del pages
        stored = writers.finish()
    assert np.array_equal(seen, stored)
    assert set(stored.tolist()) == {3000}
