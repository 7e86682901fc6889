"""``dirtylog migrate`` moves something real: snapshots, checkpoints and a process's memory, each into its place."""

import os
import shutil
import signal
import socket
import subprocess
import threading
import time

import numpy as np
import pytest

from dirtylog import BackendUnavailable, Checkpoint, DirtyLogError, attach
from dirtylog.commands import migrate
from dirtylog.sinks import snapshot
from dirtylog.sinks.snapshot.processes import process_of

from .test_snapshot_and_migrate import run

PAGE = 4096


def contents():
    rng = np.random.default_rng(3)
    return {"w": rng.random((30, 70)), "b": np.asfortranarray(rng.integers(0, 9, (5, 6), np.int16))}


def test_a_snapshot_migrates_with_its_names_types_and_state(migrated, tmp_path):
    arrays, state = contents(), {"registers": b"\0\xff", "steps": [1, 2.5, None]}
    snapshot.save(tmp_path / "here", arrays, state=state)
    received, sent = migrated(["--snapshot", tmp_path / "here"], ["--snapshot", tmp_path / "there"])
    with snapshot.open(tmp_path / "there", verify=True) as mapped:
        assert mapped.state == state
        for name, array in arrays.items():
            assert (mapped[name] == array).all()
            assert (mapped[name].dtype, mapped[name].flags.f_contiguous) == (array.dtype, array.flags.f_contiguous)
    assert received["digest"] == sent["digest"]
    assert received["arrays"] == ["w", "b"]
    assert sorted(os.listdir(tmp_path)) == ["here", "there"]


def test_a_checkpoint_migrates_into_a_directory_as_the_same_step(migrated, tmp_path):
    arrays = contents()
    with Checkpoint(tmp_path / "here", arrays, sync=False) as checkpoint:
        checkpoint.save(step=4, state={"rate": 0.5})
        arrays["w"][3] = 8
        checkpoint.save(step=7, state={"rate": 0.25})
    for step in (7, 4):
        migrated(["--checkpoint", tmp_path / "here", "--step", step], ["--checkpoint", tmp_path / "there"])
    assert Checkpoint.steps(tmp_path / "there") == [7, 4]
    for step, rate in ((7, 0.25), (4, 0.5)):
        loaded = Checkpoint.load(tmp_path / "there", step)
        assert (loaded["w"] == Checkpoint.load(tmp_path / "here", step)["w"]).all()
        assert Checkpoint.state_of(tmp_path / "there", step) == {"rate": rate}
    # Whoever trains on goes on there.
    mine = {name: array.copy() for name, array in loaded.items()}
    with Checkpoint(tmp_path / "there", mine, sync=False) as more:
        more.save(step=8)
    assert Checkpoint.steps(tmp_path / "there") == [7, 4, 8]


def test_memory_without_names_migrates_into_a_file_and_into_a_checkpoint(migrated, tmp_path):
    memory = np.random.default_rng(1).integers(0, 256, 3 * PAGE - 100, np.uint8)
    snapshot.save(tmp_path / "here", memory)
    migrated(["--snapshot", tmp_path / "here"], ["--out", tmp_path / "file"])
    assert (np.fromfile(tmp_path / "file", np.uint8) == memory).all()
    migrated(["--snapshot", tmp_path / "here"], ["--checkpoint", tmp_path / "there"])
    assert (Checkpoint.load(tmp_path / "there")["memory"] == memory).all()


def test_a_damaged_snapshot_is_not_sent(tmp_path):
    snapshot.save(tmp_path / "here", np.ones(3 * PAGE, np.uint8))
    with open(tmp_path / "here", "r+b") as file:
        file.write(b"\2")
    with pytest.raises(snapshot.SnapshotError, match="does not match its digest"):
        run(migrate, "send", "127.0.0.1:1", "--snapshot", tmp_path / "here")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--demo", "--step", "1"], "--step is about --checkpoint"),
        (["--snapshot", "x", "--freeze", "ptrace"], "--freeze is about --pid"),
        (["--demo", "--stop"], "--stop is about --pid"),
        (["--checkpoint", "."], "has no checkpoint"),
    ],
)
def test_options_that_do_not_go_with_what_is_sent_are_refused(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DirtyLogError, match=message):
        run(migrate, "send", "127.0.0.1:1", *words)


def test_a_target_that_is_there_is_refused_before_anybody_comes(tmp_path):
    (tmp_path / "there").touch()
    for option in ("--out", "--snapshot"):
        with pytest.raises(FileExistsError, match="remove it or choose another"):
            run(migrate, "receive", option, tmp_path / "there")


# ---- a process, from outside ----------------------------------------------------------------------------------------


@pytest.fixture
def redis(tmp_path):
    """A redis-server that is written all the time, until it is held still."""
    program = shutil.which("redis-server")
    if program is None:
        pytest.skip("redis-server is not installed")
    where = tmp_path / "redis.sock"
    command = [program, "--port", "0", "--unixsocket", str(where), "--save", "", "--dir", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as server, socket.socket(socket.AF_UNIX) as client:
        client.settimeout(60)
        stop = threading.Event()
        writer = threading.Thread(target=lambda: write(client, stop))
        try:
            while client.connect_ex(str(where)):
                assert server.poll() is None
                time.sleep(0.005)  # until it listens: it says so nowhere else
            writer.start()
            yield server.pid
        finally:
            server.send_signal(signal.SIGCONT)
            stop.set()
            if writer.ident is not None:
                writer.join()
            server.terminate()


def write(client, stop):
    number = 0
    while not stop.is_set():
        value = b"%d" % number * (number % 500 + 1)
        key = b"key:%d" % (number % 37)
        client.sendall(b"*3\r\n$3\r\nSET\r\n$%d\r\n%b\r\n$%d\r\n%b\r\n" % (len(key), key, len(value), value))
        assert client.recv(100) == b"+OK\r\n"
        number += 1


def test_the_memory_of_a_server_that_is_written_arrives_as_it_was_when_it_was_held_still(migrated, redis, tmp_path):
    try:
        attach(redis).close()
    except (BackendUnavailable, PermissionError, DirtyLogError) as error:
        pytest.skip(str(error))
    _, sent = migrated(
        ["--pid", redis, "--stop", "--max-rounds", 3, "--downtime", 0, "--force"], ["--snapshot", tmp_path / "there"]
    )
    about = snapshot.info(tmp_path / "there")
    process, regions = process_of(about)
    assert (process["pid"], process["paused"], process["command"]) == (redis, "ptrace", "redis-server")
    assert {"stack", "file", "anonymous"} <= {region.kind for region in regions}
    memory = snapshot.restore(tmp_path / "there")
    with open(f"/proc/{redis}/mem", "rb", buffering=0) as file:
        for region in regions:
            now = np.frombuffer(os.pread(file.fileno(), region.npages * PAGE, region.start), np.uint8)
            kept = memory[region.first_page * PAGE :][: len(now)]
            assert len(now) == region.npages * PAGE
            assert (now == kept).all(), region
    assert len(sent["rounds"]) == 4
    assert sum(each["dirtied"] for each in sent["rounds"]) > 0
