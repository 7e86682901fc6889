"""What a migration owes when a callback fails, a signal comes or the peer plays for time: pages, a word, an end."""

import contextlib
import itertools
import os
import resource
import socket
import struct
import threading
import warnings

import numpy as np
import pytest

import dirtylog as dl
from dirtylog.sinks.migrate import MigrationError, Policy, receive, send
from dirtylog.sinks.migrate.payloads import HELLO, PAGES, PART, READY, ROUND
from dirtylog.sinks.migrate.wire import Channel, Kind, WireError

NPAGES = 8
DIRTY = {1, 2, 3}


class Migration:
    """One source and one destination that are connected; who runs at the end, and what is dirty."""

    def __init__(self, hang_up=False):
        self.here, self.there = socket.socketpair()
        for sock in (self.here, self.there):
            sock.settimeout(30)
        self.memory = np.ones(NPAGES * 4096, np.uint8)
        self.bitmap = dl.DirtyBitmap(NPAGES)
        log = dl.DirtyLog()
        log.attach(self.bitmap)
        self.observer = log.observer("migration")
        self.bitmap.mark_pages(sorted(DIRTY))
        self.received, self.calls = None, []
        self.thread = threading.Thread(target=self.hang_up if hang_up else self.receive)

    def receive(self):
        with self.there, contextlib.suppress(MigrationError):
            self.received = receive(self.there)

    def hang_up(self):
        with self.there:
            channel = Channel(self.there)
            with contextlib.suppress(WireError, OSError):
                channel.receive(Kind.HELLO)
                channel.send(Kind.READY, READY.pack(PART, 0, 0, bytes(16)), counted=False)
                channel.receive(Kind.ROUND)

    def send(self, **options):
        options.setdefault("pause", lambda: self.calls.append("pause"))
        options.setdefault("resume", lambda: self.calls.append("resume"))
        self.thread.start()
        try:
            return send(self.here, self.memory, self.observer, **options)
        finally:
            self.here.close()
            self.thread.join()

    def pending(self):
        with warnings.catch_warnings(action="ignore"), self.observer.collect() as epoch:
            return set(epoch.pages.indices().tolist())


@pytest.mark.parametrize("hang_up", [False, True])
def test_an_interrupt_anywhere_loses_no_page_and_leaves_nobody_in_the_dark(hang_up, interrupt_class):
    for at in itertools.count(1):
        migration = Migration(hang_up)
        files = [f"migrate/{name}.py" for name in ("sender", "rounds", "lane", "wire")]
        interrupt = interrupt_class(at, *files, "/epochs.py")
        failed = told = False
        try:
            with interrupt.active():
                migration.send()
        except (KeyboardInterrupt, MigrationError) as raised:
            failed = True
            told = getattr(raised, "uncertain", False) or "the destination" in " ".join(
                getattr(raised, "__notes__", [])
            )
        if not interrupt.where:
            break
        complete = migration.received is not None
        if failed:
            assert migration.pending() >= DIRTY, interrupt.where
        assert told or not failed or not complete, interrupt.where
        assert not (complete and "resume" in migration.calls), interrupt.where
        assert migration.calls in ([], ["pause", "resume"]) or complete or told, interrupt.where
    assert at > 100


def test_a_callback_that_fails_after_the_last_word_does_not_undo_the_migration():
    migration = Migration()

    def progress(each):
        if each.final:
            raise BrokenPipeError(32, "stdout is gone")

    result = migration.send(progress=progress)
    assert [str(problem) for problem in result.problems] == ["[Errno 32] stdout is gone"]
    assert (migration.received == migration.memory).all()
    assert migration.calls == ["pause"]


def test_a_throttle_that_cannot_be_taken_back_does_not_undo_the_migration():
    migration = Migration()

    def throttle(fraction):
        if not fraction:
            raise OSError("the cgroup is gone")

    policy = Policy(downtime=0, max_rounds=4, force=True, throttle_after=1)
    result = migration.send(throttle=throttle, policy=policy, clock=Filling(migration.bitmap))
    assert [str(problem) for problem in result.problems] == ["the cgroup is gone"]


def test_an_interrupt_after_the_last_word_says_that_the_copy_may_run():
    migration = Migration()

    def progress(each):
        if each.final:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        migration.send(progress=progress)
    assert "the migration is complete" in caught.value.__notes__[0]
    assert migration.calls == ["pause"]
    assert migration.pending() >= DIRTY


def test_a_throttle_that_fails_does_not_hide_why_the_migration_did():
    migration = Migration()

    def throttle(fraction):
        if not fraction:
            raise OSError("the cgroup is gone")
        raise RuntimeError("cannot be throttled")

    policy = Policy(downtime=0, throttle_after=1)
    with pytest.raises(RuntimeError, match="cannot be throttled") as caught:
        migration.send(throttle=throttle, policy=policy, clock=Filling(migration.bitmap))
    assert "the cgroup is gone" in caught.value.__notes__[0]


class Filling:
    """A clock that dirties everything whenever it is looked at."""

    def __init__(self, bitmap):
        self.bitmap, self.ticks = bitmap, itertools.count()

    def __call__(self):
        self.bitmap.fill()
        return next(self.ticks)


# ---- a peer that plays for time --------------------------------------------------------------------------------------


class Clock:
    """Time that passes when somebody waits."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class Dripping(socket.socket):
    """A socket on which a byte comes now and then, a second apart."""

    def __init__(self, fileno, clock):
        super().__init__(fileno=fileno)
        self.clock = clock

    def recv_into(self, buffer):
        self.clock.now += 1
        return super().recv_into(buffer[:1])


def test_a_byte_now_and_then_does_not_hold_a_receiver_longer_than_its_timeout():
    here, there = socket.socketpair()
    clock = Clock()
    with here, Dripping(there.detach(), clock) as slow:
        slow.settimeout(5)
        Channel(here).send(Kind.ROUND, ROUND.pack(1))
        with pytest.raises(TimeoutError, match="waiting for a frame: 5 s is over"):
            Channel(slow, clock=clock).receive(Kind.ROUND)
        assert clock.now == 5
        assert slow.gettimeout() == 5


def test_a_deadline_bounds_all_frames_together():
    here, there = socket.socketpair()
    clock = Clock()
    with here, Dripping(there.detach(), clock) as slow:
        sender, receiver = Channel(here), Channel(slow, 50, clock)
        for number in range(2):
            sender.send(Kind.ROUND, ROUND.pack(number))
        receiver.receive(Kind.ROUND)
        with pytest.raises(TimeoutError, match="the deadline is over"):
            receiver.receive(Kind.ROUND)
        assert clock.now == 50
        with pytest.raises(ValueError, match="deadline is 0"):
            Channel(slow, 0)


def end_of(frames, **options):
    """Say hello and send some frames; return what the receiver makes of them."""
    here, there = socket.socketpair()
    answer = []

    def run():
        with there:
            try:
                answer.append(receive(there, **options))
            except BaseException as error:
                answer.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    heard = None
    with here:
        here.settimeout(30)
        channel = Channel(here)
        channel.send(Kind.HELLO, HELLO.pack(bytes(16), NPAGES * 4096, 4096, 0, 0, 0, 0))
        try:
            channel.receive(Kind.READY, counted=False)
            for kind, payload in frames:
                channel.send(kind, payload)
            here.shutdown(socket.SHUT_WR)
            channel.receive(Kind.HAVE, counted=False)
        except (WireError, OSError) as error:
            heard = str(error)
        thread.join()
    return answer[0], heard


def pages(first, count):
    return Kind.ZEROS, struct.pack("<qq", first * 4096, count * 4096)


def rounds(*contents):
    for number, content in enumerate(contents, 1):
        yield Kind.ROUND, ROUND.pack(number)
        yield from content


def test_rounds_that_bring_nothing_have_an_end():
    answer, _ = end_of(rounds([], []))
    assert "round 1 was empty, and is not the last" in str(answer)


def test_rounds_have_an_end():
    answer, _ = end_of(rounds(*[[pages(0, 1)]] * 6), max_rounds=5)
    assert "the sender begins round 6, max_rounds is 5" in str(answer)
    with pytest.raises(ValueError, match="max_rounds is 0"):
        receive(None, max_rounds=0)


def test_a_round_brings_each_page_once():
    answer, _ = end_of(rounds([pages(0, NPAGES), pages(0, 1)]))
    assert f"round 1 has more bytes than the memory, {NPAGES * 4096}" in str(answer)
    data = Kind.PAGES, PAGES.pack(1, 0) + struct.pack("<qq", 0, 4096) + bytes(4096)
    answer, _ = end_of([data])
    assert "pages come before the first round" in str(answer)


# ---- the receiver's own troubles -------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [MemoryError("no room"), KeyboardInterrupt(), RuntimeError("no such place")])
def test_a_receiver_that_fails_says_so(error):
    def make(nbytes):
        assert nbytes == NPAGES * 4096
        raise error

    answer, heard = end_of([], out=make)
    assert answer is error
    assert f"the receiver failed ({type(error).__name__}: {error})" in heard


def test_memory_that_cannot_be_kept_is_no_arrival():
    migration = Migration()
    seen = []

    def keep(memory):
        seen.append(bool((memory == migration.memory).all()))
        raise OSError(28, "No space left on device")

    def run():
        with migration.there, contextlib.suppress(MigrationError):
            receive(migration.there, arrived=keep)

    migration.thread = threading.Thread(target=run)
    with pytest.raises(MigrationError, match="No space left") as caught:
        migration.send()
    assert seen == [True]
    assert not caught.value.uncertain
    assert migration.calls == ["pause", "resume"]
    assert migration.pending() >= DIRTY


class Deaf(socket.socket):
    """A socket that loses the last word."""

    def send(self, data):
        if data[5] == Kind.DONE:
            raise ConnectionResetError("lost")
        return super().send(data)


def test_a_receiver_whose_last_word_is_lost_has_the_right_to_run_all_the_same():
    migration = Migration()
    received = []

    def run():
        with Deaf(fileno=migration.there.detach()) as sock:
            # The descriptor does not block, because the socket it comes from has a timeout.
            sock.settimeout(30)
            received.append(receive(sock))

    migration.thread = threading.Thread(target=run)
    with pytest.raises(MigrationError) as caught:
        migration.send()
    assert (received[0] == migration.memory).all()
    assert caught.value.uncertain
    assert migration.calls == ["pause"]


@pytest.mark.parametrize("given", [False, True], ids=["memory of its own", "memory that it is given"])
def test_zero_pages_commit_no_memory_at_the_receiver(given):
    nbytes = 64 << 20
    out = dl.zeros(nbytes, np.uint8) if given else None
    memory = np.zeros(nbytes, np.uint8)
    memory[:4096] = 1
    bitmap = dl.DirtyBitmap(nbytes // 4096)
    log = dl.DirtyLog()
    log.attach(bitmap)
    here, there = socket.socketpair()
    received = []
    thread = threading.Thread(target=lambda: received.append(receive(there, out=out)))
    thread.start()
    with here, there:
        send(here, memory, log.observer("migration"))
        thread.join()
    # Of this array alone: what is written is present; zero pages are holes, or the one zero page.
    address = received[0].ctypes.data
    with open("/proc/self/smaps", encoding="ascii") as smaps:
        committed = anonymous_kib(smaps, address, address + nbytes)
    assert committed << 10 < nbytes // 8
    assert (received[0] == memory).all()


def anonymous_kib(smaps, start, end):
    """Add up the memory of the mappings in a range that is really there."""
    total, inside = 0, False
    for line in smaps:
        head = line.split()[0]
        if "-" in head and not head.endswith(":"):
            first, last = (int(part, 16) for part in head.split("-"))
            inside = first < end and last > start
        elif inside and head == "Anonymous:":
            total += int(line.split()[1])
    return total


def test_zeroes_over_memory_that_is_not_zero_are_written():
    out = np.full(NPAGES * 4096, 7, np.uint8)
    answer, _ = end_of(rounds([pages(0, NPAGES)]), out=out)
    # The digest is not sent here, so it fails; what was zeroed is zero.
    assert isinstance(answer, MigrationError)
    assert not out.any()


# ---- migrate receive --out -------------------------------------------------------------------------------------------


def test_a_file_appears_when_it_is_complete_and_never_replaces_another(tmp_path):
    from dirtylog.commands._arrivals import OutFile

    path = tmp_path / "memory"
    with OutFile(str(path)) as out:
        memory = out.reserve(8192)
        memory[:4] = b"page"
        assert not path.exists()
        out.arrived(memory)
        assert not path.exists()
        out.start(memory)
    assert path.read_bytes() == b"page" + bytes(8188)
    assert os.listdir(tmp_path) == ["memory"]
    assert path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(FileExistsError, match="remove it or choose another"):
        OutFile(str(path))
    other = tmp_path / "other"
    with OutFile(str(other)) as out:
        memory = out.reserve(4096)
        other.write_bytes(b"theirs")
        # It has the right to run by then: it stays, and the error says where.
        with pytest.raises(FileExistsError) as caught:
            out.start(memory)
    assert other.read_bytes() == b"theirs"
    [kept] = set(os.listdir(tmp_path)) - {"memory", "other"}
    assert caught.value.__notes__ == [f"the memory is complete, in {tmp_path / kept}"]


def test_what_is_complete_and_was_not_told_to_run_is_kept_and_the_rest_is_not(tmp_path):
    from dirtylog.commands._arrivals import OutFile

    def arrive(error):
        with OutFile(str(tmp_path / "memory")) as out:
            out.reserve(4096)
            raise error

    with pytest.raises(MigrationError):
        arrive(MigrationError("the line is cut"))
    assert os.listdir(tmp_path) == []
    with pytest.raises(MigrationError) as caught:
        arrive(MigrationError("the line is cut", uncertain=True))
    [kept] = os.listdir(tmp_path)
    assert kept in caught.value.__notes__[0]


@pytest.mark.parametrize("where", ["snapshot", "checkpoint"])
def test_what_arrives_is_in_no_list_of_snapshots_before_it_has_the_right_to_run(tmp_path, where):
    from dirtylog.commands._arrivals import _NextCheckpoint, _SnapshotFile
    from dirtylog.sinks import snapshot

    def arriving():
        return _SnapshotFile(str(tmp_path / "here")) if where == "snapshot" else _NextCheckpoint(str(tmp_path))

    memory = {"w": np.arange(1000)}
    with arriving() as arrival:
        arrival.arrived(memory)
        assert snapshot.catalog(tmp_path) == []
    assert os.listdir(tmp_path) == []
    with arriving() as arrival:
        arrival.arrived(memory)
        arrival.start(memory)
    assert [entry.path for entry in snapshot.catalog(tmp_path)] == [arrival.path]
    assert len(os.listdir(tmp_path)) == 1
    assert (snapshot.restore(arrival.path)["w"] == memory["w"]).all()

    def unanswered(arrival):
        with arrival:
            arrival.arrived(memory)
            raise MigrationError("the line is cut", uncertain=True)

    os.unlink(arrival.path)
    with pytest.raises(MigrationError) as caught:
        unanswered(arriving())
    kept = caught.value.__notes__[0].removeprefix("the memory is in ")
    assert (snapshot.restore(kept)["w"] == memory["w"]).all()


def test_a_file_that_finds_no_room_is_refused_before_a_page_is_sent(tmp_path):
    from dirtylog.commands._arrivals import OutFile

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with OutFile(str(tmp_path / "memory")) as out:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
        try:
            with pytest.raises(OSError, match="bytes cannot be reserved"):
                out.reserve(1 << 30)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(tmp_path) == []
