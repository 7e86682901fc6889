"""A migration that is slowed down, looked at and cancelled from outside."""

import contextlib
import socket
import threading

import numpy as np
import pytest

from dirtylog import DirtyBitmap, DirtyLog
from dirtylog.sinks.migrate import Control, Listener, MigrationError, Policy, connect, receive, send, status
from dirtylog.sinks.migrate.payloads import HELLO, PART, READY
from dirtylog.sinks.migrate.wire import Channel, Kind

NPAGES = 1024


class Clock:
    """Time that passes when somebody sleeps."""

    def __init__(self):
        self.now, self.naps = 0.0, []

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        self.naps.append(seconds)
        self.now += seconds


def migrated(control, *, during=None, calls=None, **options):
    """Migrate a little memory; return the outcome, the copy's answer, and what is dirty afterwards."""
    memory = np.random.default_rng(0).integers(1, 256, NPAGES * 4096, np.uint8)
    bitmap = DirtyBitmap(NPAGES)
    log = DirtyLog()
    log.attach(bitmap)
    observer = log.observer("migration")
    here, there = socket.socketpair()
    for sock in (here, there):
        sock.settimeout(30)
    answers = []

    def run():
        with there:
            try:
                answers.append(receive(there, **(during or {})))
            except Exception as error:
                answers.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    calls = [] if calls is None else calls
    with here:
        try:
            outcome = send(
                here,
                memory,
                observer,
                control=control,
                pause=lambda: calls.append("pause"),
                resume=lambda: calls.append("resume"),
                **options,
            )
        except Exception as error:
            outcome = error
    thread.join()
    with observer.collect() as epoch:
        return outcome, answers[0], epoch.pages.count


def test_no_more_bytes_go_in_a_second_than_are_allowed():
    clock = Clock()
    control = Control(1 << 20, clock=clock, sleep=clock.sleep)
    result, _, _ = migrated(control)
    # What goes last need not be waited for.
    assert result.wire_bytes - (2 << 20) <= clock.now * (1 << 20) <= result.wire_bytes
    assert max(clock.naps) <= 0.1
    assert control.wire_bytes >= result.wire_bytes
    assert control.nbytes == result.nbytes
    assert (control.round, control.breaks, control.session) == (len(result.rounds), 0, result.session)


def test_a_limit_may_be_changed_while_it_runs():
    clock = Clock()
    control = Control(1 << 20, clock=clock, sleep=lambda seconds: setattr(control, "bandwidth", None))
    result, _, _ = migrated(control)
    assert result.rounds
    assert control.bandwidth is None
    for wrong in (0, -1, float("nan")):
        with pytest.raises(ValueError, match="must be a positive number of bytes per second"):
            control.bandwidth = wrong


def cancelled(control, **options):
    calls = []
    outcome, answer, dirty = migrated(control, calls=calls, **options)
    assert isinstance(outcome, MigrationError)
    assert "was cancelled in round" in str(outcome)
    assert not outcome.uncertain
    assert isinstance(answer, MigrationError)
    # In the last case it may have been about to answer: then it asks.
    assert answer.uncertain or "the source gave up" in str(answer)
    assert dirty == NPAGES or not outcome.rounds
    assert status(outcome.session).stage == "live"
    assert calls in ([], ["pause", "resume"])
    return calls


def test_it_is_cancelled_in_a_pause_of_the_limit():
    control = Control(1, sleep=lambda seconds: control.cancel())
    assert cancelled(control) == []
    assert control.cancelled


def test_it_is_cancelled_between_two_rounds():
    control = Control()
    assert cancelled(control, progress=lambda each: control.cancel(), policy=Policy(downtime=0)) == []


def test_it_is_cancelled_while_it_waits_for_an_answer():
    control = Control()
    # The copy is complete and takes its time to keep it: the sender waits for its word.
    cancelling = threading.Event()

    def arrived(memory):
        assert control.cancel()
        cancelling.set()

    assert cancelled(control, during={"arrived": arrived}) == ["pause", "resume"]
    assert cancelling.is_set()


def test_it_is_not_cancelled_once_the_right_to_run_is_given():
    control = Control()
    answers = []
    outcome, answer, _ = migrated(control, during={"start": lambda memory: answers.append(control.cancel())})
    assert answers == [False]
    assert not control.cancelled
    assert outcome.rounds
    assert len(answer) == NPAGES * 4096


@pytest.mark.parametrize("when", ["pages", "arrived", "state", "start"])
def test_the_other_end_cancels_it_and_the_source_goes_on(when):
    control = Control()
    calls, answers = [], []

    def cancel(*_):
        answers.append(control.cancel())

    during = {"control": control, {"pages": "progress"}.get(when, when): cancel}
    outcome, answer, dirty = migrated(Control(), calls=calls, during=during)
    assert control.session == outcome.session
    if when == "start":
        assert answers == [False]
        assert outcome.rounds
        assert len(answer) == NPAGES * 4096
        return
    assert set(answers) == {True}
    assert str(answer).startswith("the migration was cancelled in round")
    assert not answer.uncertain
    assert not outcome.uncertain
    assert dirty == NPAGES
    assert status(outcome.session, end="source").stage == "live"
    assert status(outcome.session, end="copy").stage == "gone"
    assert calls in ([], ["pause", "resume"])
    assert control.nbytes > 0


def test_a_control_is_for_one_migration():
    control = Control()
    migrated(control)
    outcome, answer, dirty = migrated(control)
    assert "make another one" in str(outcome)
    assert isinstance(answer, MigrationError)
    assert dirty == 0
    assert control.cancel() is False


# ---- cancelled in a wait ---------------------------------------------------------------------------------------------


class Impatient(Control):
    """Is cancelled when it has been looked at so many times."""

    def __init__(self, looks):
        super().__init__()
        self.left = looks

    def _check(self):
        self.left -= 1
        if self.left == 0:
            assert self.cancel()
        super()._check()


def silent():
    """Return a socket, and another at which a copy is ready and reads nothing; nothing ends a wait but a cancel."""
    here, there = socket.socketpair()
    Channel(there).send(Kind.READY, READY.pack(PART, 0, 0, bytes(16)), counted=False)
    return here, there


@pytest.mark.parametrize("bandwidth", [None, 1e12])
def test_it_is_cancelled_while_the_line_has_no_room(bandwidth):
    here, there = silent()
    memory = np.random.default_rng(0).integers(1, 256, NPAGES * 4096, np.uint8)
    log = DirtyLog()
    log.attach(DirtyBitmap(NPAGES))
    control = Impatient(9)
    control.bandwidth = bandwidth
    with here, there:
        with pytest.raises(MigrationError, match="was cancelled in round 1"):
            send(here, memory, log.observer("migration"), control=control)
        # Within a frame no word of it could be heard: the line has ended.
        there.settimeout(30)
        while there.recv(1 << 20):
            pass


def test_it_is_cancelled_while_it_waits_for_a_receiver():
    with socket.create_server(("127.0.0.1", 0)) as server, pytest.raises(MigrationError, match="was cancelled"):
        connect(server.getsockname(), control=Impatient(2))


def test_it_is_cancelled_while_it_waits_for_a_sender():
    with Listener(("127.0.0.1", 0)) as listener, pytest.raises(MigrationError, match="was cancelled"):
        listener.accept(control=Impatient(2))


@pytest.mark.parametrize("where", ["joins", "another", "reconnect", "idle"])
def test_a_receiver_is_cancelled_while_it_waits(where):
    here, there = socket.socketpair()
    channel = Channel(here)
    channel.send(Kind.HELLO, HELLO.pack(bytes(16), 1 << 20, 4096, 0, 0 if where in ("idle", "reconnect") else 2, 0, 0))
    control = Impatient(5)
    pair = socket.socketpair()
    with here, there, pair[0], pair[1], Listener(("127.0.0.1", 0)) as listener:
        options = {"reconnect": lambda breaks: listener.accept(control=control)}
        options["another"] = lambda: pair[0] if where == "joins" else listener.accept(control=control)
        if where == "reconnect":
            here.shutdown(socket.SHUT_WR)
        with pytest.raises(MigrationError, match="was cancelled in round 0"):
            receive(there, control=control, **options)


def test_it_is_cancelled_and_does_not_fail_to_converge_when_it_is_throttled():
    control = Control()
    bitmap = DirtyBitmap(NPAGES)
    log = DirtyLog()
    log.attach(bitmap)
    throttled = []

    def throttle(level):
        throttled.append(level)
        if level:
            control.cancel()

    here, there = socket.socketpair()

    def run():
        with there, contextlib.suppress(MigrationError):
            receive(there)

    thread = threading.Thread(target=run)
    thread.start()
    options = {"throttle": throttle, "policy": Policy(downtime=0, max_rounds=2, throttle_after=1)}
    with here, pytest.raises(MigrationError, match="was cancelled in round 2"):
        send(here, np.ones(NPAGES * 4096, np.uint8), Redirtying(log.observer("m"), bitmap), control=control, **options)
    thread.join()
    assert throttled == [0.2, 0.0]


class Redirtying:
    """An observer of memory that is written in each round."""

    def __init__(self, observer, bitmap):
        self.observer, self.bitmap = observer, bitmap
        self.npages, self.page_size, self.put_back = observer.npages, observer.page_size, observer.put_back

    def collect(self):
        self.bitmap.fill()
        return self.observer.collect()


def test_another_limit_holds_for_what_has_gone_before():
    clock = Clock()
    control = Control(1000, clock=clock, sleep=clock.sleep)
    # At once, as what a copy that runs has asked for.
    control._note(1_000_000)
    assert control._left() == 1000
    control.bandwidth = 1_000_000
    assert control._left() == pytest.approx(1)
    control.bandwidth = 500_000
    assert control._left() == pytest.approx(2)
