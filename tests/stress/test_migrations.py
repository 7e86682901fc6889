"""Migrations of which one end is killed at a random moment: never both run, and the journals say what to do."""

import collections
import contextlib
import ctypes
import os
import random
import signal
import socket
import threading
import time
from functools import partial

import numpy as np
import pytest

from dirtylog import DirtyBitmap, DirtyLog, zeros
from dirtylog.sinks.migrate import Listener, ListenerProcess, MigrationError, receive, send, status
from dirtylog.sinks.migrate._postcopy import Faults

from ..sinks.test_migrate_door import HERE, certificate, talk

pytestmark = pytest.mark.stress

NPAGES = 2048
RUNS = 200
# Of so many runs one goes over TLS.
TLS = 4
SESSION = "5" * 32
# What the two journals may say together, whatever the kind. Of a source that nobody knows nothing was given away.
BOTH = {
    ("live", None): "restart the source, or go on",
    ("live", "part"): "restart the source, or go on",
    ("live", "gone"): "restart the source, or go on",
    ("given", "gone"): "the source may go on: the copy never may",
    ("given", "runs"): "the copy runs",
    ("done", "runs"): "the copy runs",
    (None, None): "nothing has begun",
    (None, "part"): "nothing was given away",
    (None, "gone"): "nothing was given away",
}
TABLE = BOTH | {
    ("live", "have"): "the source has the right; drop the copy",
    ("given", "have"): "settle, or let the durable copy run",
}
# Of a copy that runs before it has everything, or that is to run when it has.
POSTCOPY = BOTH | {
    ("live", "ready"): "restart the source, or go on",
    ("given", "ready"): "the source may go on: the copy was not told to run, and its memory is gone",
    ("given", "faults"): "the program is lost, if the copy lacks pages: start it again from a snapshot",
    ("serves", "faults"): "the program is lost, if the copy lacks pages: start it again from a snapshot",
    ("done", "faults"): "the program ended with the copy's process, which had everything",
    ("done", "fills"): "the source may go on, if it is there still: the copy did not run, and its memory is gone",
    ("given", "fills"): "the source may go on: the copy did not run, and its memory is gone",
    ("serves", "fills"): "the source may go on: the copy did not run, and its memory is gone",
    ("serves", "gone"): "the source may go on: the copy never may",
    ("serves", "runs"): "the copy runs",
}


def contents():
    return np.random.default_rng(0).integers(0, 256, NPAGES * 4096, np.uint8)


def source(sock, place, **options):
    memory = contents()
    log = DirtyLog()
    log.attach(DirtyBitmap(NPAGES))
    runs = place / "source runs"
    runs.touch()
    send(sock, memory, log.observer("migration"), pause=runs.unlink, resume=runs.touch, session=SESSION, journal=place,
         **options)  # fmt: skip


def copy(sock, place, **options):
    users = []

    def use(memory):
        # Each page as it comes, without the GIL.
        memcmp = ctypes.CDLL(None).memcmp
        memcmp.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
        expected = contents()
        for page in np.random.default_rng(1).permutation(NPAGES):
            at = int(page) * 4096
            if memcmp(memory.ctypes.data + at, expected.ctypes.data + at, 4096):
                (place / "wrong").touch()

    def start(memory):
        (place / "copy runs").touch()
        if (place / "source runs").exists():
            (place / "both run").touch()
        if options:
            # Where it waits for a page that never comes it ends with the process.
            users.append(threading.Thread(target=use, args=(memory,), daemon=True))
            users[0].start()

    receive(sock, start=start, journal=place, **options)
    for user in users:
        user.join()


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


def one(place, line, wait, sends, receives):
    """Migrate between two processes; kill one after `wait(its pids)`. Return the stages of both journals."""
    here, there = line()
    with here, there:
        ends = partial(source, **sends), partial(copy, **receives)
        pids = [child(ends[0], here, there, place), child(ends[1], there, here, place)]
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


def guards():
    """Whether memory can be guarded here."""
    try:
        Faults([(0, zeros(4096, np.uint8))], 4096, 4096, np.ones(1, np.uint64), bytes(16)).release()
    except OSError:
        return False
    return True


@pytest.mark.parametrize(
    ("sends", "receives", "table"),
    [
        ({}, {}, TABLE),
        ({"postcopy": 0}, {"postcopy": True}, POSTCOPY),
        ({"postcopy": 0}, {"postcopy": True, "run": "filled"}, POSTCOPY),
    ],
    ids=["precopy", "postcopy", "filled"],
)
def test_a_killed_end_never_lets_both_run_and_the_table_says_what_to_do(sends, receives, table, tmp_path):
    if receives and not guards():
        pytest.skip("memory cannot be guarded by userfaultfd here")
    rng = random.Random(1)
    # TLS is done by the ends themselves, or where a copy runs before it is complete by another process than the copy's.
    with (ListenerProcess if receives else Listener)(HERE, certificate("receiver"), timeout=60) as listener:
        lines = {False: socket.socketpair, True: partial(talk, listener, certificate("sender"))}
        whole = {tls: uncut(tmp_path / f"whole {tls}", line, sends, receives) for tls, line in lines.items()}
        judge(tmp_path, rng, lines, whole, sends, receives, table)


def uncut(place, line, sends, receives):
    """Return how long it takes."""
    place.mkdir()
    begin = time.monotonic()
    assert [each.stage for each in one(place, line, lambda pids: None, sends, receives)] == ["done", "runs"]
    return time.monotonic() - begin


def judge(directory, rng, lines, whole, sends, receives, table):
    """Kill an end of so many migrations, and compare what is left with the table."""
    seen = collections.Counter()
    for number in range(RUNS):
        place = directory / str(number)
        place.mkdir()
        tls = number % TLS == 0

        def kill(pids, tls=tls):
            time.sleep(rng.random() * whole[tls])
            os.kill(rng.choice(pids), signal.SIGKILL)

        found = one(place, lines[tls], kill, sends, receives)
        stages = tuple(each and each.stage for each in found)
        assert stages in table, (number, stages)
        assert [each.may_run for each in found if each] != [True, True]
        assert not (place / "both run").exists(), number
        assert not (place / "wrong").exists(), number
        # What is recorded is durable, and what is not was not done.
        assert not (place / "copy runs").exists() or stages[1] in ("faults", "runs"), number
        assert not ((place / "source runs").exists() and (place / "copy runs").exists()), number
        # A source goes on by itself only where the copy never may.
        assert not (place / "source runs").exists() or stages[0] in (None, "live"), number
        seen[tls, *stages] += 1
    for (tls, *stages), count in sorted(seen.items(), key=lambda each: -each[1]):
        print(f"{count:>4}  {'TLS, ' * tls}source {stages[0]}, copy {stages[1]}: {table[tuple(stages)]}")
