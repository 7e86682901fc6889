"""Who may run after a migration: never both, never neither without a word to the user; and lines that break."""

import itertools
import json
import os
import queue
import random
import socket
import threading

import numpy as np
import pytest

from dirtylog import DirtyBitmap, DirtyLog, DirtyLogError
from dirtylog.sinks.migrate import MigrationError, Policy, receive, send, sessions, settle, status
from dirtylog.sinks.migrate.payloads import COMPLETE, HELLO, PART, READY, RUNS
from dirtylog.sinks.migrate.wire import HEADER_BYTES, Channel, Kind

NPAGES = 6
# What goes at the end, forth and back: END and RUN; HAVE and DONE.
FORTH, BACK = 2 * HEADER_BYTES + 32 + 16, 2 * HEADER_BYTES + 32 + 16
BEFORE = HEADER_BYTES + READY.size
# What the receiver is made of, as far as it decides who may run.
RECEIVER = [f"migrate/{name}.py" for name in ("receiver", "destination", "failing", "others", "sessions")]


class Fraying(socket.socket):
    """A socket that carries so many bytes and then breaks, in the middle of whatever is sent."""

    budget = None
    carried = 0

    def send(self, data):
        part = data if self.budget is None else data[: self.budget - self.carried]
        super().sendall(part)
        self.carried += len(part)
        if len(part) < len(data):
            self.shutdown(socket.SHUT_RDWR)
            raise ConnectionResetError(104, "cut")
        return len(data)


class Lines:
    """Connections between two ends, each with how many bytes it carries forth and back."""

    def __init__(self, *budgets):
        self.budgets = iter(budgets)
        self.waiting = queue.Queue()
        self.made = []

    def connect(self, breaks=0):
        pair = []
        for end, budget in zip(socket.socketpair(), next(self.budgets, (None, None)), strict=True):
            sock = Fraying(fileno=end.detach())
            sock.settimeout(30)
            sock.budget = budget
            pair.append(sock)
        self.made.append(pair)
        self.waiting.put(pair[1])
        return pair[0]

    def accept(self, breaks=0):
        try:
            return self.waiting.get(timeout=10)
        except queue.Empty:
            raise TimeoutError("nobody came") from None

    def close(self):
        for pair in self.made:
            for sock in pair:
                sock.close()


class Migration:
    """A source that runs until it is paused, and a copy that runs when it has started."""

    def __init__(self, *budgets, npages=NPAGES, reconnect=True, journal=None):
        self.lines = Lines(*budgets)
        self.again = {"reconnect": self.lines.connect} if reconnect else {}
        self.accept = {"reconnect": self.lines.accept} if reconnect else {}
        self.journal = {} if journal is None else {"journal": journal}
        self.rng = np.random.default_rng(npages)
        self.memory = self.rng.integers(1, 256, npages * 4096, np.uint8)
        self.memory[4096:8192] = 0
        self.bitmap = DirtyBitmap(npages)
        log = DirtyLog()
        log.attach(self.bitmap)
        self.observer = log.observer("migration")
        self.source_runs, self.copy_runs = True, False
        self.outcome = self.answer = self.copy = None

    def pause(self):
        self.source_runs = False

    def resume(self):
        self.source_runs = True

    def start(self, memory):
        self.copy_runs, self.copy = True, memory.copy()

    def receive(self, sock, **options):
        try:
            self.answer = receive(sock, start=self.start, **self.accept, **self.journal, **options)
        except BaseException as error:
            self.answer = error
        finally:
            # A process that ends closes its sockets, so that nobody waits for it.
            self.lines.made[-1][1].close()

    def send(self, sock, **options):
        try:
            more = {"pause": self.pause, "resume": self.resume, **self.again, **self.journal, **options}
            self.outcome = send(sock, self.memory, self.observer, **more)
        except BaseException as error:
            self.outcome = error
        finally:
            self.lines.made[-1][0].close()

    def run(self, **options):
        here, there = self.lines.connect(), self.lines.accept()
        thread = threading.Thread(target=self.receive, args=(there,))
        thread.start()
        self.send(here, **options)
        thread.join()
        self.lines.close()
        return self

    def check(self, at=None):
        """Never both; and where neither does, both know that they do not know."""
        assert not (self.source_runs and self.copy_runs), at
        if self.copy_runs:
            assert (self.copy == self.memory).all(), at
        source = status(self.session, end="source")
        # Only where the source's end says that it does not know may neither run.
        assert (self.source_runs, self.copy_runs) != (False, False) or source.may_run is None, at
        assert source.may_run in (self.source_runs, None), at
        copy = sessions._known.get((self.session, "copy"))
        assert copy is None or copy.may_run in (self.copy_runs, None), at
        if getattr(self.outcome, "uncertain", False):
            assert source.stage == "given", at

    @property
    def session(self):
        if isinstance(self.outcome, KeyboardInterrupt):
            return next(reversed([key[0] for key in sessions._known if key[1] == "source"]))
        return self.outcome.session

    def pending(self):
        with self.observer.collect() as epoch:
            return epoch.pages.count


def length():
    """How many bytes go forth and back in a whole migration."""
    whole = Migration().run()
    assert whole.copy_runs
    return [sock.carried for sock in whole.lines.made[0]]


def test_the_right_to_run_goes_over_once():
    whole = Migration().run()
    assert (whole.source_runs, whole.copy_runs) == (False, True)
    assert (whole.answer == whole.memory).all()
    assert (status(whole.session).stage, status(whole.session, end="copy").stage) == ("done", "runs")
    assert status(whole.session).may_run is False
    assert status(whole.session, end="copy").may_run is True
    assert whole.outcome.breaks == 0


def test_a_line_cut_at_every_byte_of_the_end_lets_one_end_run_or_says_so():
    forth, _ = length()
    seen = set()
    for cut in [(forth - FORTH + n, None) for n in range(FORTH)] + [(None, BEFORE + n) for n in range(BACK)]:
        broken = Migration(cut, reconnect=False).run()
        broken.check(cut)
        stages = status(broken.session).stage, status(broken.session, end="copy").stage
        seen.add(stages)
        if stages == ("live", "have"):
            # The source goes on, and the copy waits for a word that never comes.
            assert broken.answer.uncertain
            assert broken.pending() == NPAGES
    assert seen == {("live", "gone"), ("live", "have"), ("given", "have"), ("given", "runs")}


def test_a_line_cut_at_every_byte_of_the_end_and_replaced_ends_well():
    forth, _ = length()
    for cut in [(forth - FORTH + n, None) for n in range(FORTH)] + [(None, BEFORE + n) for n in range(BACK)]:
        mended = Migration(cut).run()
        mended.check(cut)
        assert mended.copy_runs, cut
        assert mended.outcome.breaks == 1, (cut, mended.outcome)
        assert mended.outcome.wire_bytes < forth + 1000


def test_a_line_cut_anywhere_and_replaced_sends_what_the_copy_lacks_alone():
    forth, _ = length()
    for cut in itertools.chain(range(200), range(200, forth - FORTH, 997)):
        mended = Migration((cut, None)).run()
        mended.check(cut)
        assert mended.copy_runs
        sent = sum(here.carried for here, _ in mended.lines.made)
        # One frame is cut, and goes again; here it is nearly all.
        assert sent < 2 * forth + 1000, cut


def test_twenty_cuts_cost_little_and_lose_nothing_while_the_source_writes():
    npages = 4096
    rng = random.Random(7)
    whole = Migration(npages=npages)
    cut = [(rng.randrange(200_000, 1_600_000), None) for _ in range(20)]
    broken = Migration(*cut, npages=npages)
    for each in (whole, broken):
        stores = itertools.count()

        def clock(each=each, stores=stores):
            # The source runs whenever the sender looks at the clock.
            if each.source_runs and (n := next(stores)) < 6:
                each.memory[n * 40960 : n * 40960 + 9] += 1
                each.bitmap.mark(n * 10)
            return n if each.source_runs else 99

        each.run(clock=clock, policy=Policy(downtime=0.0, max_rounds=3, force=True))
        each.check()
        assert each.copy_runs
    assert broken.outcome.breaks == 20
    bytes_sent = [sum(here.carried for here, _ in each.lines.made) for each in (whole, broken)]
    # A frame of 1 MiB is lost with each line, and goes again: of 16 frames, 20 times.
    assert bytes_sent[1] < bytes_sent[0] + 20 * ((1 << 20) + 1000)


def test_what_was_dirtied_while_the_line_was_down_goes_with_the_rest():
    migration = Migration((9000, None))
    reconnect = migration.lines.connect

    def late(breaks):
        migration.memory[:10] = 77
        migration.bitmap.mark(0)
        return reconnect()

    migration.again["reconnect"] = late
    migration.run(pause=None)
    assert (migration.answer == migration.memory).all()
    assert migration.pending() == 0


def test_a_line_that_cannot_be_replaced_ends_it_and_every_page_is_dirty_again():
    migration = Migration((9000, None))

    def no_more(breaks):
        assert breaks == 1
        migration.lines.waiting.put(None)
        raise ConnectionRefusedError(111, "nobody is there")

    def nobody(breaks):
        migration.lines.waiting.get(timeout=30)
        raise TimeoutError("nobody came")

    migration.again["reconnect"], migration.accept["reconnect"] = no_more, nobody
    migration.run()
    assert isinstance(migration.outcome, MigrationError)
    assert "nobody is there" in str(migration.outcome)
    assert "nobody came" in str(migration.answer)
    assert migration.source_runs
    assert migration.pending() == NPAGES


def test_an_error_of_a_callback_is_not_a_broken_line():
    migration = Migration()

    def progress(round):
        raise BrokenPipeError(32, "stdout is gone")

    migration.run(progress=progress)
    assert "stdout is gone" in str(migration.outcome)
    assert migration.source_runs
    assert len(migration.lines.made) == 1


# ---- interrupts ------------------------------------------------------------------------------------------------------


def interrupts(interrupt_class, end, *files):
    """Interrupt one end at each place in some files at which a signal may be seen; yields what became of it."""
    for at in itertools.count(1):
        migration = Migration((None, None), (None, None), reconnect=False)
        interrupt = interrupt_class(at, *files)
        here, there = migration.lines.connect(), migration.lines.accept()
        ends = [(migration.send, here), (migration.receive, there)]
        (run, line), (run_other, other) = ends if end == "sender" else ends[::-1]
        thread = threading.Thread(target=run_other, args=(other,))
        thread.start()
        with interrupt.active():
            run(line)
        line.close()
        thread.join()
        migration.lines.close()
        if not interrupt.where:
            assert at > 40
            return
        yield migration, interrupt.where


def test_an_interrupt_anywhere_in_the_sender_lets_one_end_run_or_says_so(interrupt_class):
    for migration, where in interrupts(interrupt_class, "sender", "migrate/sender.py", "migrate/sessions.py"):
        assert not (migration.source_runs and migration.copy_runs), where
        if isinstance(migration.outcome, KeyboardInterrupt) and not (migration.source_runs or migration.copy_runs):
            assert "the destination may run" in " ".join(migration.outcome.__notes__), where


def test_an_interrupt_anywhere_in_the_receiver_lets_one_end_run_or_says_so(interrupt_class):
    for migration, where in interrupts(interrupt_class, "receiver", *RECEIVER):
        assert not (migration.source_runs and migration.copy_runs), where
        if not (migration.source_runs or migration.copy_runs):
            assert getattr(migration.outcome, "uncertain", False) or "has the right to run" in " ".join(
                getattr(migration.answer, "__notes__", [])
            ), where


# ---- what is known afterwards ----------------------------------------------------------------------------------------


def lost(cut, tmp_path):
    """A migration whose end was cut, without another line."""
    broken = Migration(cut, reconnect=False, journal=tmp_path).run()
    assert status(broken.session, journal=tmp_path, end="source").stage == "given"
    return broken


def settled(session, **options):
    """Both ends meet again; return what each knows then."""
    here, there = socket.socketpair()
    answers = []
    with here, there:
        for sock in (here, there):
            sock.settimeout(30)
        thread = threading.Thread(target=lambda: answers.append(settling(there, session, "copy", **options)))
        thread.start()
        answers.append(settling(here, session, "source", **options))
        here.close()
        thread.join()
    return {answer.end: answer.stage for answer in answers}


def settling(sock, session, end, journal):
    # Each end has its own process, and its own journal.
    return settle(sock, session, journal=journal / end)


def test_ends_that_lost_sight_of_each_other_settle_who_runs(tmp_path):
    forth, _ = length()
    broken = lost((forth - 5, None), tmp_path)
    assert broken.outcome.uncertain
    assert broken.answer.uncertain
    assert status(broken.session, journal=tmp_path, end="copy").stage == "have"
    for end in ("source", "copy"):
        (tmp_path / end).mkdir()
        name = f"{broken.session}.{end}.json"
        os.rename(tmp_path / name, tmp_path / end / name)
    assert settled(broken.session, journal=tmp_path) == {"source": "done", "copy": "runs"}
    # Once more asks nobody.
    assert settle(None, broken.session, journal=tmp_path / "source").may_run is False
    assert settle(None, broken.session, journal=tmp_path / "copy").may_run is True


def test_a_source_that_asks_a_receiver_which_waits_for_it_is_heard(tmp_path):
    forth, _ = length()
    migration = Migration((forth - 5, None), journal=tmp_path)
    migration.again = {}
    here, there = migration.lines.connect(), migration.lines.accept()
    thread = threading.Thread(target=migration.receive, args=(there,))
    thread.start()
    migration.send(here)
    assert migration.outcome.uncertain
    with migration.lines.connect() as sock:
        assert settle(sock, migration.session).stage == "done"
        thread.join()
    assert migration.copy_runs
    assert not migration.source_runs
    migration.lines.close()


STARTED = []


@pytest.fixture(autouse=True)
def every_answer_is_over():
    yield
    while STARTED:
        STARTED.pop().join()


def answering(*frames):
    """A socket at whose other end somebody reads a HELLO and answers."""
    here, there = socket.socketpair()

    def run():
        with there:
            there.settimeout(30)
            channel = Channel(there)
            channel.receive(Kind.HELLO)
            for kind, payload in frames:
                channel.send(kind, payload, counted=False)

    STARTED.append(threading.Thread(target=run))
    STARTED[-1].start()
    here.settimeout(30)
    return here


@pytest.mark.parametrize(
    "frames",
    [
        [(Kind.READY, READY.pack(PART, 0, 0, bytes(16)))],
        [(Kind.READY, b"")],
        [(Kind.REFUSED, b"another session is being received here")],
        [(Kind.READY, READY.pack(RUNS, 0, 0, bytes(16))), (Kind.DONE, bytes(16))],
        [(Kind.READY, READY.pack(COMPLETE, 0, 0, bytes(16)))],
    ],
)
def test_what_another_receiver_says_settles_nothing(frames, tmp_path):
    forth, _ = length()
    broken = lost((forth - 5, None), tmp_path)
    with answering(*frames) as sock, pytest.raises(MigrationError, match="is not settled") as caught:
        settle(sock, broken.session)
    assert caught.value.uncertain
    assert status(broken.session).stage == "given"


@pytest.mark.parametrize(
    "frames",
    [[(Kind.REFUSED, b"another session")], [(Kind.READY, READY.pack(PART, 0, 0, bytes(16)))], [(Kind.HAVE, bytes(32))]],
)
def test_a_source_that_gave_its_right_away_takes_it_back_on_nobody_elses_word(frames):
    forth, _ = length()
    migration = Migration((forth - 5, None))
    migration.accept = {}
    migration.again["reconnect"] = lambda breaks: answering(*frames)
    migration.run()
    assert migration.outcome.uncertain, migration.outcome
    assert not migration.source_runs


def test_another_session_does_not_take_the_place_of_a_lost_one():
    migration = Migration((9000, None))
    intruder = []
    reconnect = migration.lines.connect

    def late(breaks):
        if breaks == 1:
            sock = reconnect()
            channel = Channel(sock)
            channel.send(Kind.HELLO, HELLO.pack(bytes(16), NPAGES * 4096, 4096, 0, 0, 0, 0))
            with pytest.raises(DirtyLogError, match="another session is being received here"):
                channel.receive(Kind.READY, counted=False)
            intruder.append(sock.close())
        return reconnect()

    migration.again["reconnect"] = late
    migration.run()
    assert intruder
    assert migration.copy_runs


@pytest.mark.parametrize("stage", ["have", "runs"])
@pytest.mark.parametrize("kept", ["memory", "journal"])
def test_a_copy_that_is_complete_is_not_forgotten_for_a_sender_of_its_session(tmp_path, stage, kept):
    """If it were, the source that asks would hear that there is no copy, and run beside it."""
    session = "ab" * 16
    journal = tmp_path if kept == "journal" else None
    sessions.Record(session, "copy", journal).set(stage)
    if kept == "journal":
        sessions._known.clear()  # another process
    here, there = socket.socketpair()
    with here, there:
        Channel(there).send(Kind.HELLO, HELLO.pack(bytes.fromhex(session), NPAGES * 4096, 4096, 0, 0, 0, 0))
        there.shutdown(socket.SHUT_WR)
        with pytest.raises(MigrationError, match=f"session {session} was received here before: the copy"):
            receive(here, journal=journal)
        with pytest.raises(DirtyLogError, match="was received here before"):
            Channel(there).receive(Kind.READY, counted=False)
    assert status(session, journal=journal).stage == stage


def test_a_copy_that_claims_to_run_without_the_right_is_not_believed():
    here, there = socket.socketpair()
    migration = Migration()
    migration.again = {}

    def run():
        with there:
            channel = Channel(there)
            channel.receive(Kind.HELLO)
            channel.send(Kind.READY, READY.pack(RUNS, 0, 0, bytes(16)), counted=False)

    thread = threading.Thread(target=run)
    thread.start()
    with here, pytest.raises(MigrationError, match="says that it is complete, and it cannot be"):
        send(here, migration.memory, migration.observer, pause=migration.pause)
    thread.join()
    assert migration.source_runs


def test_what_start_raises_is_told_and_does_not_take_the_right_back():
    migration = Migration(reconnect=False)

    def start(memory):
        raise OSError(28, "No space left on device")

    migration.start = start
    migration.run()
    assert migration.outcome.session
    assert str(migration.answer) == "[Errno 28] No space left on device"
    assert "the copy has the right to run" in migration.answer.__notes__[0]


def test_a_journal_that_cannot_be_written_leaves_the_right_with_the_source(tmp_path, monkeypatch):
    write = sessions._write

    def full(path, data):
        if json.loads(data)["stage"] == "given":
            raise OSError(28, "No space left on device")
        write(path, data)

    monkeypatch.setattr(sessions, "_write", full)
    migration = Migration(reconnect=False, journal=tmp_path).run()
    assert "No space left" in str(migration.outcome)
    assert (migration.source_runs, migration.copy_runs) == (True, False)
    assert status(migration.session, journal=tmp_path).stage == "live"
    assert sorted(os.listdir(tmp_path)) == [f"{migration.session}.{end}.json" for end in ("copy", "source")]


def test_a_journal_that_cannot_say_done_is_a_problem_and_no_failure(tmp_path, monkeypatch):
    write = sessions._write
    monkeypatch.setattr(
        sessions, "_write", lambda path, data: 1 / 0 if b"done" in data or b"runs" in data else write(path, data)
    )
    migration = Migration(reconnect=False, journal=tmp_path).run()
    assert isinstance(migration.outcome.problems[0], ZeroDivisionError)
    assert isinstance(migration.answer, ZeroDivisionError)
    # The one who asks gets no wrong answer: the journal says that it does not know.
    assert {status(migration.session, journal=tmp_path, end=end).may_run for end in ("source", "copy")} == {None}


def test_a_session_is_used_once_and_what_is_none_is_refused(tmp_path):
    migration = Migration(reconnect=False).run()
    with pytest.raises(ValueError, match="was used before"):
        send(migration.lines.made[0][0], migration.memory, migration.observer, session=migration.session)
    with pytest.raises(ValueError, match="must be 32 hexadecimal digits"):
        status("../../etc/passwd")
    with pytest.raises(KeyError, match="knows nothing of session"):
        status("0" * 32, journal=tmp_path)
    path = tmp_path / f"{'0' * 32}.copy.json"
    for damaged in ("", "[]", '{"session": "x"}', json.dumps({"session": "0" * 32, "end": "copy", "stage": "live"})):
        path.write_text(damaged)
        with pytest.raises(DirtyLogError, match=r"is damaged .*: ask the other end"):
            status("0" * 32, journal=tmp_path)
