"""Migration over a socket: memory arrives as it was when it was paused, or the source is as it was before."""

import contextlib
import itertools
import socket
import threading

import numpy as np
import pytest

from dirtylog import DirtyBitmap, DirtyLog
from dirtylog.sinks.migrate import MigrationError, NotConverging, Policy, receive, send
from dirtylog.sinks.migrate.payloads import PART, READY
from dirtylog.sinks.migrate.wire import Channel, Kind, WireError

NPAGES = 600


class Watched:
    """An observer that lets the workload run just before it collects: during a round, seen from the migration."""

    def __init__(self, observer, during):
        self.observer, self.during, self.rounds = observer, during, -1
        self.npages, self.page_size, self.put_back = observer.npages, observer.page_size, observer.put_back

    def collect(self):
        self.rounds += 1
        if self.rounds:
            self.during(self.rounds)
        return self.observer.collect()


class Source:
    """Memory with a log, a workload that runs during rounds until it is paused."""

    def __init__(self, seed=0, page_size=4096, cut=0, npages=NPAGES):
        self.rng = np.random.default_rng(seed)
        self.page_size = page_size
        self.memory = self.rng.integers(0, 256, npages * page_size - cut, np.uint8)
        self.memory[page_size * (npages // 4) : page_size * (npages // 2)] = 0
        self.bitmap = DirtyBitmap(npages, page_size)
        log = DirtyLog()
        log.attach(self.bitmap)
        self.real = log.observer("migration")
        self.paused = False
        self.workload = lambda number: None

    @property
    def observer(self):
        return Watched(self.real, lambda number: self.paused or self.workload(number))

    def run(self, stores):
        assert not self.paused
        for page in self.rng.integers(0, self.bitmap.npages, stores):
            start = int(page) * self.page_size
            self.memory[start : start + self.page_size] = self.rng.integers(0, 3)
            self.bitmap.mark(int(page))

    def pause(self):
        self.run(5)
        self.paused = True

    def resume(self):
        self.paused = False

    def calming(self, number):
        """Dirty less in each round than in the one before."""
        self.run(self.bitmap.npages * 2 // 4**number)

    def pending(self):
        """Take what the observer would be given next."""
        with self.real.collect() as epoch:
            return epoch.pages


def ticks():
    """Return a clock on which a second passes at each look."""
    return itertools.count().__next__


class Destination(threading.Thread):
    """Receives in a thread; `answer` is the memory or the error."""

    def __init__(self, sock, **options):
        super().__init__()
        self.sock, self.options, self.answer = sock, options, None
        self.start()

    def run(self):
        with self.sock:
            try:
                self.answer = receive(self.sock, **self.options)
            except Exception as error:
                self.answer = error


def migrated(source, receiver=None, **options):
    """Migrate over a socket pair; return the result or the error, and the destination's answer."""
    here, there = socket.socketpair()
    for sock in (here, there):
        sock.settimeout(60)
    destination = Destination(there, **(receiver or {}))
    with here:
        try:
            outcome = send(here, source.memory, source.observer, pause=source.pause, resume=source.resume, **options)
        except Exception as error:
            outcome = error
    destination.join()
    return outcome, destination.answer


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize(("page_size", "cut"), [(4096, 0), (4096, 4095), (512, 7), (65536, 100), (1 << 21, 5000)])
def test_memory_that_is_written_meanwhile_arrives_as_it_was_when_paused(page_size, cut, compress):
    source = Source(1, page_size, cut, 12 if page_size > 65536 else 200)
    source.workload = source.calming
    result, memory = migrated(source, compress=compress, clock=ticks(), policy=Policy(downtime=0.02))
    assert len(result.rounds) >= 3
    assert (memory == source.memory).all()
    assert source.paused
    assert [r.number for r in result.rounds] == list(range(1, len(result.rounds) + 1))
    assert [r.final for r in result.rounds] == [False] * (len(result.rounds) - 1) + [True]
    assert result.nbytes == sum(r.nbytes for r in result.rounds)
    assert not source.pending()


def test_it_arrives_in_memory_of_the_callers_own():
    source = Source(2)
    out = np.full(source.memory.nbytes, 9, np.uint8)
    _, memory = migrated(source, {"out": out})
    assert memory is out
    assert (out == source.memory).all()


def test_the_expected_downtime_follows_what_is_dirty_and_decides():
    source = Source(4)
    stores = [300, 100, 10, 4]
    source.workload = lambda number: source.bitmap.mark_range(0, stores[number - 1])
    source.pause = lambda: source.bitmap.mark_range(599, 1) or setattr(source, "paused", True)
    seen = []
    # A round takes one second: the clock ticks at its begin and at its end.
    options = {"clock": ticks(), "policy": Policy(downtime=0.15), "delta_cache": 0}
    result, _ = migrated(source, progress=seen.append, **options)
    assert seen == list(result.rounds)
    assert [(r.pages, r.zero_pages, r.dirtied, r.dirty_rate) for r in seen] == [
        (600, 150, 300, 300),
        (300, 150, 100, 100),
        (100, 0, 10, 10),
        (11, 0, 0, 0),
    ]
    assert [r.expected_downtime for r in seen] == pytest.approx([0.5, 1 / 3, 0.1, 0])
    assert [r.nbytes for r in seen] == [r.pages * 4096 for r in seen]
    assert all(0 <= r.wire_bytes - (r.pages - r.zero_pages) * 4096 < 4096 for r in seen)
    assert (result.seconds, result.downtime) == (10, 3)


def test_zero_pages_go_without_data():
    source = Source(5)
    source.memory[:] = 0
    result, memory = migrated(source)
    assert not memory[: 4096 * 100].any() or (memory == source.memory).all()
    assert result.rounds[0].zero_pages == NPAGES
    assert result.rounds[0].wire_bytes < 1000


def test_a_page_that_became_zero_arrives_as_zero():
    source = Source(6)

    def workload(number):
        if number == 1:
            source.memory[:8192] = 0
            source.bitmap.mark_range(0, 2)

    source.workload = workload
    _, memory = migrated(source, clock=ticks(), policy=Policy(downtime=0.0))
    assert (memory == source.memory).all()
    assert not memory[:8192].any()


def test_compressed_pages_take_fewer_bytes():
    source = Source(7)
    source.memory[:] = np.arange(source.memory.nbytes) // 64 % 251 + 1
    plain, _ = migrated(source)
    source.paused = False
    packed, memory = migrated(source, compress=True)
    assert (memory == source.memory).all()
    assert packed.wire_bytes < plain.wire_bytes / 2


# ---- a workload that cannot converge --------------------------------------------------------------------------------


def restless(seed):
    source = Source(seed)
    source.workload = lambda number: source.bitmap.mark_range(0, NPAGES)
    return source


def test_what_cannot_converge_ends_honestly_and_was_never_paused():
    source = restless(8)
    before = source.memory.copy()
    error, answer = migrated(source, clock=ticks(), policy=Policy(downtime=0.5, max_rounds=5))
    assert isinstance(error, NotConverging)
    assert "after 5 rounds 2457600 bytes are left, which take 1 s" in str(error)
    assert len(error.rounds) == 5
    assert error.rounds[-1].expected_downtime == 1
    assert not error.uncertain
    assert not source.paused
    assert (source.memory == before).all()
    assert source.pending().count == NPAGES
    assert isinstance(answer, MigrationError)
    assert "the source gave up" in str(answer)


def test_force_pauses_it_whatever_that_takes():
    source = restless(9)
    result, memory = migrated(source, clock=ticks(), policy=Policy(downtime=0.5, max_rounds=3, force=True))
    assert len(result.rounds) == 4
    assert result.rounds[-1].pages == NPAGES
    assert (memory == source.memory).all()


def test_throttling_is_asked_for_more_and_more_and_taken_back():
    source = restless(10)
    asked = []
    migrated(
        source,
        throttle=asked.append,
        clock=ticks(),
        policy=Policy(downtime=0.5, max_rounds=7, throttle_first=0.25, throttle_step=0.5, throttle_most=0.9),
    )
    assert asked == [0.25, 0.75, 0.9, 0.0]


def test_a_source_that_obeys_the_throttle_converges():
    source = Source(11)
    speed = [1.0]

    source.workload = lambda number: source.bitmap.mark_range(0, int(NPAGES * max(speed[0], 0.0)))

    result, memory = migrated(
        source,
        throttle=lambda fraction: speed.__setitem__(0, 1 - 2 * fraction),
        clock=ticks(),
        policy=Policy(downtime=0.1),
    )
    assert max(r.throttle for r in result.rounds) >= 0.5
    assert (memory == source.memory).all()


# ---- failures: the source is intact and can try again ---------------------------------------------------------------


class Cut(threading.Thread):
    """A line that carries so many bytes in one direction and then breaks."""

    def __init__(self, source, target, limit):
        super().__init__()
        self.source, self.target, self.limit, self.carried = source, target, limit, 0
        self.start()

    def run(self):
        with contextlib.suppress(OSError):
            while self.carried < self.limit and (data := self.source.recv(min(65536, self.limit - self.carried))):
                self.target.sendall(data)
                self.carried += len(data)
        for sock in (self.source, self.target):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)


def over_a_line(source, forth, back, **options):
    here, near = socket.socketpair()
    far, there = socket.socketpair()
    for sock in (here, near, far, there):
        sock.settimeout(60)
    lines = [Cut(near, far, forth), Cut(far, near, back)]
    destination = Destination(there)
    with here, near, far:
        try:
            outcome = send(here, source.memory, source.observer, pause=source.pause, resume=source.resume, **options)
        except Exception as error:
            outcome = error
        here.close()
        for thread in (destination, *lines):
            thread.join()
    return outcome, destination.answer, [line.carried for line in lines]


def test_a_line_cut_after_any_number_of_bytes_leaves_the_source_intact_and_retryable():
    source = Source(12, npages=40)
    source.workload = source.calming
    calm = {"clock": ticks(), "policy": Policy(downtime=0.01)}
    outcome, _, (forth, back) = over_a_line(source, 1 << 40, 1 << 40, **calm)
    assert outcome.rounds
    source.resume()
    rng = np.random.default_rng(13)
    # The ends of the stream byte by byte, the middle at random.
    cuts = {*range(60), *(forth - 1 - i for i in range(60)), *rng.integers(0, forth, 40).tolist()}
    plan = [(n, 1 << 40) for n in sorted(cuts)] + [(1 << 40, n) for n in range(back)]
    for limits in plan:
        source = Source(12, npages=40)
        source.workload = source.calming
        outcome, answer, _ = over_a_line(source, *limits, **calm)
        assert isinstance(outcome, MigrationError), limits
        # Only the answer, which is sent once all has arrived, can be lost without the destination knowing.
        complete = isinstance(answer, np.ndarray)
        assert outcome.uncertain or not complete
        # Two guests must never run: the source goes on only where the copy cannot.
        assert source.paused == outcome.uncertain
        source.resume()
        # Whatever had been sent is dirty again, and so is what was written since.
        if outcome.rounds:
            assert source.pending().count == 40
        result, memory = migrated(source)
        assert result.rounds
        assert (memory == source.memory).all()


def test_an_answer_that_does_not_match_is_no_arrival():
    source = Source(19, npages=4)
    here, there = socket.socketpair()
    with here, there:
        answering = Channel(there)

        answering.send(Kind.READY, READY.pack(PART, 0, 0, bytes(16)), counted=False)
        with pytest.raises(MigrationError, match="the receiver's digest differs") as caught:
            send(here, source.memory, source.observer, pause=lambda: answering.send(Kind.HAVE, bytes(32)))
    assert not caught.value.uncertain
    assert source.pending().count == 4


def end_of_a_migration(source, last_word):
    """Migrate to a peer that reads everything and ends with `last_word(channel, digest)`; return the outcome."""
    here, there = socket.socketpair()

    def peer():
        with there:
            channel = Channel(there)
            channel.receive(Kind.HELLO)
            channel.send(Kind.READY, READY.pack(PART, 0, 0, bytes(16)), counted=False)
            kind = None
            while kind != Kind.END:
                digest = channel.digest()
                kind, _ = channel.receive(Kind.ROUND, Kind.PAGES, Kind.ZEROS, Kind.END)
            last_word(channel, digest)

    thread = threading.Thread(target=peer)
    thread.start()
    with here:
        try:
            return send(here, source.memory, source.observer, pause=source.pause, resume=source.resume)
        except BaseException as error:
            return error
        finally:
            thread.join()


def test_a_source_whose_copy_may_run_stays_paused():
    source = Source(22)

    def take_the_right(channel, digest):
        channel.send(Kind.HAVE, digest, counted=False)
        channel.receive(Kind.RUN)

    error = end_of_a_migration(source, take_the_right)
    assert isinstance(error, MigrationError)
    assert error.uncertain
    assert source.paused
    assert source.pending().count == NPAGES


class Interrupted(socket.socket):
    """A socket that is interrupted just after a call has done its work."""

    after = None

    def send(self, data):
        count = super().send(data)
        if self.after == "send" and data[5] == Kind.RUN:
            raise KeyboardInterrupt
        return count

    def recv_into(self, buffer):
        count = super().recv_into(buffer)
        if self.after == "recv_into" and buffer.nbytes == 16:
            raise KeyboardInterrupt
        return count


@pytest.mark.parametrize("after", ["send", "recv_into"])
def test_a_source_whose_copy_may_run_stays_paused_when_it_is_interrupted(after):
    source = Source(23)
    here, there = socket.socketpair()
    destination = Destination(there)
    with here, Interrupted(fileno=here.detach()) as sock:
        sock.after = after
        with pytest.raises(KeyboardInterrupt) as caught:
            send(sock, source.memory, source.observer, pause=source.pause, resume=source.resume)
        destination.join()
    assert isinstance(destination.answer, np.ndarray)
    assert "left paused" in caught.value.__notes__[0]
    assert source.paused


def test_a_source_whose_copy_was_refused_goes_on():
    source = Source(24)
    error = end_of_a_migration(source, lambda channel, digest: channel.refuse("three pages never came"))
    assert "three pages never came" in str(error)
    assert not error.uncertain
    assert not source.paused
    assert source.pending().count == NPAGES


def test_an_error_in_pause_puts_everything_back():
    source = Source(14)

    def pause():
        raise RuntimeError("cannot be paused")

    source.pause = pause
    error, answer = migrated(source)
    assert str(error) == "cannot be paused"
    assert source.pending().count == NPAGES
    assert isinstance(answer, MigrationError)


def test_a_source_goes_on_even_if_its_observer_takes_nothing_back():
    source = Source(20)

    def pause():
        source.paused = True
        source.real.close()
        raise RuntimeError("cannot be paused")

    source.pause = pause
    error, answer = migrated(source)
    assert str(error) == "cannot be paused"
    assert "observer 'migration' is closed" in error.__notes__[0]
    assert not source.paused
    assert "the source gave up" in str(answer)


def test_a_peer_is_told_even_if_the_source_cannot_go_on():
    source = Source(21)

    def fail(what):
        raise RuntimeError(what)

    source.pause, source.resume = lambda: fail("cannot be paused"), lambda: fail("cannot go on")
    error, answer = migrated(source)
    assert str(error) == "cannot go on"
    assert source.pending().count == NPAGES
    assert "the source gave up" in str(answer)


def test_a_failure_before_anything_was_sent_puts_back_what_was_collected_alone():
    source = Source(15)
    source.bitmap.mark(3)
    here, there = socket.socketpair()
    there.close()
    with here, pytest.raises(MigrationError, match="round 1"):
        send(here, source.memory, source.observer)
    assert source.pending().indices().tolist() == [3]


def test_a_destination_of_another_size_refuses_and_says_so():
    source = Source(16)
    error, answer = migrated(source, {"out": bytearray(4096)})
    assert "refused: the sender announces 2457600 bytes; out has 4096" in str(error)
    assert isinstance(answer, MigrationError)
    error, _ = migrated(source, {"limit": 1000})
    assert "the limit is 1000" in str(error)


def test_wrong_arguments_are_refused_before_anything_is_collected():
    source = Source(17)
    source.bitmap.mark(5)
    here, there = socket.socketpair()
    with here, there:
        with pytest.raises(ValueError, match="the observer has 600 pages"):
            send(here, source.memory[4096:], source.observer)
        with pytest.raises(TypeError, match="connected stream socket"):
            send(3, source.memory, source.observer)
        here.setblocking(False)
        with pytest.raises(ValueError, match="non-blocking"):
            send(here, source.memory, source.observer)
        with pytest.raises(ValueError, match="read-only"):
            receive(there, out=bytes(10))
    with pytest.raises(ValueError, match="downtime is -1"):
        Policy(downtime=-1)
    with pytest.raises(ValueError, match="max_rounds is 0 and throttle_after 2; both must be 1 or more"):
        Policy(max_rounds=0)
    with pytest.raises(ValueError, match=r"throttle_most 1\.0"):
        Policy(throttle_most=1.0)
    assert source.pending().indices().tolist() == [5]


def test_errors_have_their_statistics_and_their_cause():
    error = MigrationError("x", (), True)
    assert error.uncertain
    source = Source(18)
    here, there = socket.socketpair()
    there.close()
    with here, pytest.raises(MigrationError) as caught:
        send(here, source.memory, source.observer)
    assert isinstance(caught.value.__cause__, (OSError, WireError))
