"""A file is on the disk before a rename puts it in its place: a power cut must not leave a name without its content."""

import os
import stat

import numpy as np
import pytest

import dirtylog as dl
from dirtylog.sinks import snapshot, trace
from dirtylog.sinks.snapshot import staged

pytestmark = pytest.mark.thread_unsafe(reason="it watches the system calls of the process")
PAGE = 4096


@pytest.fixture
def unsynced(monkeypatch):
    """The names that a rename or a link has given to files whose content was not synced; and all that were given."""
    synced, found, given = set(), [], []

    def watch(module, name, before):
        real = getattr(module, name)

        def called(*arguments, **options):
            before(*arguments)
            return real(*arguments, **options)

        monkeypatch.setattr(module, name, called)

    def note(descriptor):
        synced.add(os.fstat(descriptor).st_ino)

    def check(source, target, *_):
        status = os.stat(source)
        if stat.S_ISREG(status.st_mode):
            given.append(str(target))
            if status.st_ino not in synced:
                found.append(str(target))

    for name in ("fsync", "fdatasync"):
        watch(os, name, note)
    for name in ("rename", "replace", "link"):
        watch(os, name, check)
    watch(staged, "rename_noreplace", check)
    return found, given


def snapshots(directory):
    memory = np.ones(25 * PAGE, np.uint8)
    snapshot.save(directory / "base", memory)
    memory[3 * PAGE] = 2
    snapshot.save_diff(directory / "diff", memory, dl.DirtyPages.from_indices([3], 25), parent=directory / "base")
    snapshot.rebase(directory / "base", directory / "diff")
    snapshot.save(directory / "base", memory, replace=True)


def checkpoints(directory):
    arrays = {"w": dl.zeros(25 * PAGE, np.uint8)}
    with dl.Checkpoint(directory, arrays, keep=1) as checkpoint:
        for step in range(4):
            arrays["w"][step * PAGE] = 1
            checkpoint.save(step=step)


def traces(directory):
    pytest.importorskip("pyarrow")
    for _ in range(2):
        with trace.Recorder(directory / "trace", 100) as recorder:
            recorder.write(1.0, dl.DirtyPages.from_indices([1, 2, 50], 100))


@pytest.mark.parametrize("write", [snapshots, checkpoints, traces])
def test_what_is_renamed_into_place_was_synced(unsynced, tmp_path, write):
    found, given = unsynced
    write(tmp_path)
    assert given
    assert not found
