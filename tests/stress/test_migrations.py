"""Migrations of which one end is killed at a random moment: never both run, and the journals say what to do."""

import collections
import contextlib
import os
import random
import signal
import socket
import time

import numpy as np
import pytest

from dirtylog import DirtyBitmap, DirtyLog
from dirtylog.sinks.migrate import MigrationError, receive, send, status

pytestmark = pytest.mark.stress

NPAGES = 256
RUNS = 200
SESSION = "5" * 32
# What the two journals may say together. Of a source that nobody knows nothing was given away.
TABLE = {
    ("live", None): "restart the source, or go on",
    ("live", "part"): "restart the source, or go on",
    ("live", "gone"): "restart the source, or go on",
    ("live", "have"): "the source has the right; drop the copy",
    ("given", "have"): "settle, or let the durable copy run",
    ("given", "runs"): "the copy runs",
    ("given", "gone"): "the source may go on: the copy never may",
    ("done", "runs"): "the copy runs",
    (None, None): "nothing has begun",
    (None, "part"): "nothing was given away",
    (None, "gone"): "nothing was given away",
}


def source(sock, place):
    memory = np.random.default_rng(0).integers(0, 256, NPAGES * 4096, np.uint8)
    log = DirtyLog()
    log.attach(DirtyBitmap(NPAGES))
    runs = place / "source runs"
    runs.touch()
    send(sock, memory, log.observer("migration"), pause=runs.unlink, resume=runs.touch, session=SESSION, journal=place)


def copy(sock, place):
    def start(memory):
        (place / "copy runs").touch()
        if (place / "source runs").exists():
            (place / "both run").touch()

    receive(sock, start=start, journal=place)


def child(end, sock, other, place):
    """Be one end in a process of its own; return its number."""
    pid = os.fork()
    if pid:
        return pid
    try:
        other.close()
        with contextlib.suppress(MigrationError):
            end(sock, place)
    finally:
        os._exit(0)


def one(place, wait):
    """Migrate between two processes; kill one after `wait(its pids)`. Return the stages of both journals."""
    here, there = socket.socketpair()
    with here, there:
        pids = [child(source, here, there, place), child(copy, there, here, place)]
    wait(pids)
    for pid in pids:
        os.waitpid(pid, 0)
    stages = []
    for end in ("source", "copy"):
        try:
            stages.append(status(SESSION, end=end, journal=place))
        except KeyError:
            stages.append(None)
    return stages


def test_a_killed_end_never_lets_both_run_and_the_table_says_what_to_do(tmp_path):
    rng = random.Random(1)
    begin = time.monotonic()
    (tmp_path / "whole").mkdir()
    assert [each.stage for each in one(tmp_path / "whole", lambda pids: None)] == ["done", "runs"]
    whole = time.monotonic() - begin
    seen = collections.Counter()
    for number in range(RUNS):
        place = tmp_path / str(number)
        place.mkdir()

        def kill(pids):
            time.sleep(rng.random() * whole)
            os.kill(rng.choice(pids), signal.SIGKILL)

        found = one(place, kill)
        stages = tuple(each and each.stage for each in found)
        assert stages in TABLE, (number, stages)
        assert [each.may_run for each in found if each] != [True, True]
        assert not (place / "both run").exists(), number
        # What is recorded is durable, and what is not was not done.
        assert not (place / "copy runs").exists() or stages[1] == "runs", number
        seen[stages] += 1
    print(*(f"{count:>4}  source {a}, copy {b}: {TABLE[a, b]}" for (a, b), count in seen.most_common()), sep="\n")
