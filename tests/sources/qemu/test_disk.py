"""A disk of a real qemu-storage-daemon as a source: nothing lost, whoever ends when."""

import itertools
import os
from contextlib import suppress

import numpy as np
import pytest

import dirtylog as dl
from dirtylog.errors import DirtyLogError, IncompleteLogWarning
from dirtylog.sources.qemu import QemuDisk, QmpError

from ...qemu import SIZE, Daemon, bitmaps, content

PAGE = 65536


def numbers(pages):
    return pages.indices().tolist()


@pytest.fixture
def disk(machine):
    with QemuDisk(machine.qmp, "disk", PAGE, nbd=machine.nbd) as opened:
        yield opened


def test_what_is_written_is_reported_once_and_discards_are_writes(machine, disk):
    assert (disk.npages, disk.page_size, disk.resumed) == (SIZE // PAGE, PAGE, False)
    assert not disk.harvest()
    machine.writer.write(0, 512, 1)
    machine.writer.write(10 * PAGE - 1, 2, 2)
    machine.writer(f"discard {20 * PAGE} {PAGE}")
    machine.writer(f"write -q -z {30 * PAGE} 512")
    machine.writer.write(SIZE - 512, 512, 3)
    assert numbers(disk.peek()) == [0, 9, 10, 20, 30, SIZE // PAGE - 1]
    harvested = disk.harvest()
    assert numbers(harvested) == [0, 9, 10, 20, 30, SIZE // PAGE - 1]
    assert harvested.exact
    assert not disk.peek()
    assert not disk.harvest()
    assert disk.read(10).tolist() == [2] + [0] * (PAGE - 1)
    for first, count in ((-1, 1), (0, SIZE // PAGE + 1), (0, -1)):
        with pytest.raises(IndexError, match="not on the disk"):
            disk.read(first, count)


def test_a_bitmap_is_kept_until_its_epoch_commits_and_no_longer(machine, disk):
    log = dl.DirtyLog()
    log.attach(disk)
    with log.observer("backup") as backup, log.observer("other") as other:
        machine.writer.write(0, 512, 1)
        with backup.collect() as epoch:
            assert numbers(epoch.pages) == [0]
            assert bitmaps(machine.qmp) == ["dirtylog-0", "dirtylog-1"]
        assert bitmaps(machine.qmp) == ["dirtylog-0", "dirtylog-1"]  # the other one has not had it
        with other.collect() as epoch:
            assert numbers(epoch.pages) == [0]
            assert bitmaps(machine.qmp) == ["dirtylog-0", "dirtylog-2"]  # joined
        assert bitmaps(machine.qmp) == ["dirtylog-0", "dirtylog-2"]
        with backup.collect():
            pass
        with other.collect():
            pass
        with backup.collect():
            pass
        assert len(bitmaps(machine.qmp)) == 2
    assert disk.lease == 5


def test_an_epoch_that_failed_is_reported_again_also_to_the_next_process(machine):
    with QemuDisk(machine.qmp, "disk", PAGE, nbd=machine.nbd) as disk:
        log = dl.DirtyLog()
        log.attach(disk)
        backup = log.observer("backup")
        machine.writer.write(0, 512, 1)
        with pytest.raises(RuntimeError), backup.collect():
            raise RuntimeError
        machine.writer.write(5 * PAGE, 512, 1)
        epoch = backup.collect().__enter__()
        assert numbers(epoch.pages) == [0, 5]
        epoch.rollback()
        backup.close()
    machine.writer.write(7 * PAGE, 512, 1)
    with QemuDisk(machine.qmp, "disk", PAGE, nbd=machine.nbd) as disk:
        assert disk.resumed
        assert numbers(disk.peek()) == [0, 5, 7]
        log = dl.DirtyLog()
        log.attach(disk)
        with log.observer("backup") as backup, backup.collect() as epoch:
            assert numbers(epoch.pages) == [0, 5, 7]
            assert epoch.pages.exact
        assert bitmaps(machine.qmp) == [disk.bitmap]
        disk.forget()
        assert bitmaps(machine.qmp) == []
    assert disk.closed


def test_bitmaps_outlive_a_daemon_that_ends_as_it_should_and_no_other(tmp_path):
    daemon = Daemon(tmp_path)
    daemon.start()
    with daemon.qmp() as qmp, QemuDisk(qmp, "disk", PAGE, nbd=daemon.nbd) as disk:
        first = disk.bitmap
    daemon.quit()
    daemon.start()
    with daemon.qmp() as qmp, QemuDisk(qmp, "disk", PAGE, nbd=daemon.nbd, since=first) as disk:
        assert disk.resumed
        assert not disk.harvest()
        second = disk.bitmap
    daemon.kill()
    daemon.start()
    with daemon.qmp() as qmp, QemuDisk(qmp, "disk", PAGE, nbd=daemon.nbd, since=second) as disk:
        assert not disk.resumed
        with pytest.warns(IncompleteLogWarning, match="all 64 pages.*calls the bitmap inconsistent"):
            pages = disk.harvest()
        assert (pages.count, pages.exact) == (64, False)
        assert not disk.harvest()
    daemon.kill()


def test_a_bitmap_that_somebody_removed_makes_every_page_reported(machine, disk):
    machine.qmp.execute("block-dirty-bitmap-remove", {"node": "disk", "name": disk.bitmap})
    with pytest.warns(IncompleteLogWarning, match="not there any more"):
        assert not disk.harvest().exact
    machine.writer.write(0, 512, 1)
    assert numbers(disk.harvest()) == [0]


def test_a_harvest_that_fails_after_the_turn_owes_its_pages(machine, disk, monkeypatch):
    machine.writer.write(0, 512, 1)
    monkeypatch.setattr(disk, "_read_bitmap", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        disk.harvest()
    monkeypatch.undo()
    machine.writer.write(PAGE, 512, 1)
    assert numbers(disk.peek()) == [0, 1]
    assert numbers(disk.harvest()) == [0, 1]


def test_with_a_scratch_file_read_gives_the_moment_of_the_harvest(machine, tmp_path):
    scratch = tmp_path / "scratch"
    machine.writer.write(0, SIZE, 1)
    name = "a" * 100  # longer than the name of a node may be
    with QemuDisk(machine.qmp, "disk", PAGE, nbd=machine.nbd, scratch=scratch, name=name) as disk:
        for value in (2, 3, 4):
            before = content(machine.nbd)
            disk.harvest()
            machine.writer.write(PAGE - 100, 200, value)
            machine.writer.write(SIZE - 512, 512, value)
            assert disk.read(0, disk.npages).tobytes() == before
            assert content(machine.nbd) != before
        assert numbers(disk.harvest()) == [0, 1, SIZE // PAGE - 1]
        assert scratch.exists()
    assert not scratch.exists()
    assert [each["id"] for each in machine.qmp.execute("query-block-exports")] == ["w"]
    assert machine.qmp.execute("query-jobs") == []


def test_what_a_process_that_died_has_left_is_tidied_up(machine, tmp_path):
    died = QemuDisk(machine.qmp, "disk", PAGE, nbd=machine.nbd, scratch=tmp_path / "scratch")
    machine.writer.write(0, 512, 1)
    died.harvest()
    died.read(0)
    died._content._reader.close()
    with QemuDisk(machine.qmp, "disk", PAGE, nbd=machine.nbd) as disk:
        assert machine.qmp.execute("query-jobs") == []
        assert numbers(disk.harvest()) == [0]
        assert disk.read(0)[:3].tolist() == [1, 1, 1]
    died._content._reader, died._content._held = None, False
    died.close()


def test_it_starts_a_server_of_its_own_where_none_runs(tmp_path):
    daemon = Daemon(tmp_path, nbd=False)
    daemon.start()
    with daemon.qmp() as qmp:
        for _ in range(2):
            with QemuDisk(qmp, "disk", PAGE, persistent=False) as disk:
                assert not disk.harvest()
                assert not disk.read(0).any()
                directory = disk._exports._directory
            assert not os.path.exists(directory)
        with QemuDisk(qmp, "disk", PAGE, persistent=False, name="one") as disk:
            disk.read(0)
            with pytest.raises(QmpError, match="already running") as refusal:
                QemuDisk(qmp, "disk", PAGE, persistent=False, name="two")
            assert "another QemuDisk, which is in use" in refusal.value.__notes__[0]
            assert not disk.harvest()  # its server is there still
            disk.read(0)
            # As if the first one had died: its server, and its export, are there still.
            disk._exports._unlock()
            with QemuDisk(qmp, "disk", PAGE, persistent=False, name="one") as other:
                assert not other.harvest()
            disk._content._reader.close()
            disk._content._reader, disk._exports._directory = None, ""
        disk_of_another = {"type": "nbd", "id": "theirs", "node-name": "disk", "name": "theirs"}
        qmp.execute("nbd-server-start", {"addr": {"type": "unix", "data": {"path": str(tmp_path / "other")}}})
        qmp.execute("block-export-add", disk_of_another)
        with pytest.raises(QmpError, match="already running") as refusal:
            QemuDisk(qmp, "disk", PAGE, persistent=False)
        assert "pass nbd=" in refusal.value.__notes__[0]
        assert [each["id"] for each in qmp.execute("query-block-exports")] == ["theirs"]
        assert not any(content(tmp_path / "other", "theirs"))  # and theirs still serves
    daemon.kill()


class Deaf:
    """A monitor of which one command goes wrong: it is not given, or it is done and nobody hears the answer."""

    def __init__(self, qmp):
        self.qmp = qmp
        self.arm(0, False)

    def arm(self, at, done, about=""):
        self.at, self.done, self.about, self.calls = at, done, about, 0

    def execute(self, command, arguments=None):
        self.calls += self.about in f"{command} {arguments}"
        wrong, self.at = self.calls == self.at, 0 if self.calls == self.at else self.at
        if wrong and not self.done:
            raise TimeoutError("no answer")
        answer = self.qmp.execute(command, arguments)
        if wrong:
            raise TimeoutError("no answer")
        return answer

    def wait(self, event, suits):
        return self.qmp.wait(event, suits)


@pytest.mark.parametrize(("done", "held"), [(False, False), (True, False), (True, True)])
def test_a_command_without_an_answer_loses_nothing_and_stops_nothing(machine, tmp_path, done, held):
    scratch = tmp_path / "scratch" if held else None
    for at in itertools.count(1):
        deaf = Deaf(machine.qmp)
        with QemuDisk(deaf, "disk", PAGE, nbd=machine.nbd, scratch=scratch) as disk:
            deaf.arm(at, done)
            pending = set()
            for page in range(2 if done and not held else 1):
                machine.writer.write(page * PAGE, 512, 1)
                pending.add(page)
                with suppress(TimeoutError):
                    harvested = disk.harvest()
                    assert pending <= set(numbers(harvested))
                    assert harvested.exact
                    disk.read(page)
                    pending.clear()
                    disk.release_lease(disk.lease)
                with suppress(TimeoutError):
                    assert pending <= set(numbers(disk.peek()))
            reached = not deaf.at
            deaf.arm(0, done)
            assert pending <= set(numbers(disk.harvest()))
            disk.release_lease(disk.lease)
            assert not disk.harvest()
            disk.release_lease(disk.lease)
            assert bitmaps(machine.qmp) == [disk.bitmap]
            disk.forget()
        assert [each["id"] for each in machine.qmp.execute("query-block-exports")] == ["w"]
        assert machine.qmp.execute("query-jobs") == []
        assert scratch is None or not scratch.exists()
        if not reached:
            break
    assert at >= 10


def test_arguments_that_will_not_do_are_named(machine, disk):
    with pytest.raises(DirtyLogError, match="no node 'nobody'"):
        QemuDisk(machine.qmp, "nobody", nbd=machine.nbd)
    with pytest.raises(ValueError, match="granularity is 4096; the bitmap 'dirtylog-0'"):
        QemuDisk(machine.qmp, "disk", 4096, nbd=machine.nbd)
    with pytest.raises(ValueError, match="a letter"):
        QemuDisk(machine.qmp, "disk", nbd=machine.nbd, name="9 lives")
    with pytest.raises(ValueError, match="page_size"):
        QemuDisk(machine.qmp, "disk", 1000, nbd=machine.nbd)
    assert "QemuDisk 'disk': 64 pages" in repr(disk)
    disk.close()
    for call in (disk.harvest, disk.peek, lambda: disk.read(0)):
        with pytest.raises(ValueError, match="closed"):
            call()
    disk.release_lease(1)


@pytest.mark.parametrize("granularity", [4096, 65536, 1 << 20])
def test_a_copy_of_dirty_pages_alone_equals_the_disk(machine, granularity):
    chance = np.random.default_rng(granularity)
    with QemuDisk(machine.qmp, "disk", granularity, nbd=machine.nbd) as disk:
        log = dl.DirtyLog()
        log.attach(disk)
        copy = np.zeros(SIZE, np.uint8)
        with log.observer("copy") as observer:
            for _ in range(4):
                for _ in range(10):
                    length = int(chance.integers(1, 50_000))
                    machine.writer.write(int(chance.integers(0, SIZE - length)), length, int(chance.integers(256)))
                with observer.collect() as epoch:
                    for first, count in epoch.pages.runs().tolist():
                        part = disk.read(first, count)
                        copy[first * granularity : first * granularity + len(part)] = part
        assert copy.tobytes() == content(machine.nbd)


def test_what_was_joined_and_never_handed_out_outlives_the_lease_that_it_was_joined_to(machine):
    deaf = Deaf(machine.qmp)
    with QemuDisk(deaf, "disk", PAGE, nbd=machine.nbd) as disk:
        log = dl.DirtyLog()
        log.attach(disk)
        with log.observer("first") as first:
            machine.writer.write(0, 512, 1)
            epoch = first.collect().__enter__()
            with log.observer("second") as second:
                machine.writer.write(PAGE, 512, 1)
                deaf.arm(1, True, "block-dirty-bitmap-merge")
                with pytest.raises(TimeoutError):
                    second.collect().__enter__()
                epoch.commit()
    with QemuDisk(machine.qmp, "disk", PAGE, nbd=machine.nbd) as disk:
        assert 1 in numbers(disk.peek())


def test_a_copy_that_a_process_made_to_peek_and_died_is_removed(machine):
    about = {"node": "disk", "name": "dirtylog-x-peek", "granularity": PAGE, "disabled": True}
    machine.qmp.execute("block-dirty-bitmap-add", about)
    with QemuDisk(machine.qmp, "disk", PAGE, nbd=machine.nbd) as disk:
        assert not disk.peek()
