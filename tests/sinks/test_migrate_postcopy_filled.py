"""A copy that runs when it is filled, and the right to run that is asked for alone."""

import os
import secrets
import shutil
import threading

import numpy as np
import pytest

import dirtylog as dl
from dirtylog.sinks.migrate import MigrationError, destination, receive, sessions, settle, status
from dirtylog.sinks.migrate.wire import Channel, Kind

from .test_migrate_postcopy import Copy, Relay, Source, flags_of, guarded, migrated, send

pytestmark = pytest.mark.skipif(bool(guarded()), reason=guarded())


@pytest.fixture
def session():
    return secrets.token_hex(16)


@pytest.mark.parametrize(("run", "stage"), [("at-once", "faults"), ("filled", "runs")])
def test_a_copy_is_started_at_once_or_when_it_has_everything(run, stage, session):
    source, relay, stages = Source(), Relay(), []

    class Begins(Copy):
        def begin(self, memory):
            stages.append(status(session, end="copy").stage)

    with relay.connect() as here:
        copy = Begins(relay.accept(), **({} if run == "at-once" else {"run": run}))
        send(here, source.memory, source.observer, postcopy=0, session=session)
    copy.join()
    relay.join()
    assert stages == [stage]
    assert (copy.answer == source.memory).all()


def test_a_line_that_is_lost_before_a_copy_is_filled_gives_it_up_and_the_source_may_go_on(session, tmp_path):
    source, relay = Source(), Relay()
    relay.cuts = [500_000]

    def room(nbytes):
        # Nowhere to be printed: that would wait for what never comes.
        source.room = dl.zeros(nbytes, np.uint8)
        return source.room

    options = {"run": "filled", "journal": tmp_path, "out": room}
    outcome, copy = migrated(source, relay=relay, session=session, receiver=options)
    assert "unless the copy's own status is gone" in str(outcome)
    assert "the copy was given up before it ran" in str(copy.answer)
    assert copy.started.empty()
    # Nobody waits for what is missing any more.
    flags = flags_of(source.room.ctypes.data)
    assert "dc" not in flags
    for journal in (None, tmp_path):
        known = status(session, end="copy", journal=journal)
        assert (known.stage, known.may_run) == ("gone", False)
    # Nothing is lost with it: all of it goes again, in a migration of its own.
    _, copy = migrated(source)
    assert (copy.answer == source.memory).all()


def test_the_journal_of_a_copy_that_waits_to_be_filled_does_not_say_that_it_runs(session, tmp_path):
    source, relay, stages = Source(), Relay(), []

    def looks(*_):
        stages.append(status(session, end="copy", journal=tmp_path))
        relay.free.set()

    relay.holds = True
    options = {"run": "filled", "journal": tmp_path, "progress": looks}
    migrated(source, relay=relay, session=session, receiver=options)
    assert (stages[0].stage, stages[0].may_run) == ("fills", False)


def test_a_line_that_is_replaced_fills_it_all_the_same(session):
    source, relay = Source(1024), Relay()
    relay.cuts = [300_000, 700_000]
    options = {"run": "filled", "reconnect": relay.accept}
    result, copy = migrated(source, relay=relay, reconnect=relay.connect, session=session, receiver=options)
    assert result.breaks == 2
    assert (copy.answer == source.memory).all()


class Interrupted(Copy):
    """Keeps the interrupt that ends it."""

    def run(self):
        with self.sock:
            try:
                receive(self.sock, start=self.begin, **self.options)
            except KeyboardInterrupt as error:
                self.answer = error


def test_an_interrupt_gives_it_up_as_well(session, monkeypatch):
    source, relay = Source(), Relay()

    def interrupted(channel, faults):
        raise KeyboardInterrupt

    monkeypatch.setattr(Channel, "lend", interrupted)
    with relay.connect() as here:
        copy = Interrupted(relay.accept(), postcopy=True, run="filled")
        with pytest.raises(MigrationError):
            send(here, source.memory, source.observer, postcopy=0, session=session)
    copy.join()
    relay.join()
    assert "the copy was given up before it ran" in copy.answer.__notes__[0]
    assert status(session, end="copy").stage == "gone"
    assert copy.started.empty()


@pytest.mark.parametrize("run", ["at-once", "filled"])
def test_an_interrupt_when_it_has_everything_leaves_it_the_right_to_run(run, session, monkeypatch):
    source, relay, interrupts = Source(), Relay(), [KeyboardInterrupt]
    move = destination.Copy.move

    def interrupted(copy, stage):
        if stage == destination.Stage.RUNS and interrupts:
            raise interrupts.pop()
        move(copy, stage)

    monkeypatch.setattr(destination.Copy, "move", interrupted)
    with relay.connect() as here:
        copy = Interrupted(relay.accept(), postcopy=True, run=run)
        send(here, source.memory, source.observer, postcopy=0, session=session)
    copy.join()
    relay.join()
    assert "the copy has the right to run, and the source has not" in copy.answer.__notes__[0]
    assert [status(session, end=end).stage for end in ("source", "copy")] == ["done", "runs"]


@pytest.mark.parametrize("run", ["at-once", "filled"])
def test_a_full_journal_does_not_keep_a_filled_copy_from_being_started(run, session, tmp_path, monkeypatch):
    write = sessions._write

    def full(path, data):
        if b'"runs"' in data:
            raise OSError(28, "no space left")
        write(path, data)

    monkeypatch.setattr(sessions, "_write", full)
    source = Source()
    _, copy = migrated(source, session=session, receiver={"run": run, "journal": tmp_path})
    assert (copy.started.get_nowait() == source.memory).all()
    assert "no space left" in str(copy.answer)


def test_another_word_is_refused():
    relay = Relay()
    with relay.connect(), relay.accept() as there, pytest.raises(ValueError, match="'at-once' or 'filled'"):
        receive(there, postcopy=True, run="later")
    relay.join()


def test_who_comes_for_the_right_alone_does_not_let_a_copy_run_that_lacks_pages(session):
    source, relay = Source(), Relay()
    relay.loses = Kind.RUN
    with relay.connect() as here:
        copy = Copy(relay.accept(), reconnect=relay.accept)
        with pytest.raises(MigrationError) as caught:
            send(here, source.memory, source.observer, postcopy=0, session=session)
    assert caught.value.uncertain
    relay.loses = None
    with relay.connect() as here, pytest.raises(MigrationError, match="it is given up"):
        settle(here, session)
    copy.join()
    relay.join()
    assert copy.started.empty()
    assert [status(session, end=end).stage for end in ("source", "copy")] == ["given", "gone"]


def test_a_source_that_did_not_hear_that_the_copy_runs_learns_it_and_does_not_go_on(session):
    source, relay = Source(), Relay()
    relay.loses = Kind.DONE

    def accept(breaks):
        if breaks > 1:
            raise ConnectionError("nobody serves it any more")
        return relay.accept()

    with relay.connect() as here:
        copy = Copy(relay.accept(), reconnect=accept)
        with pytest.raises(MigrationError) as caught:
            send(here, source.memory, source.observer, postcopy=0, session=session)
    assert caught.value.uncertain
    relay.loses = None
    with relay.connect() as here:
        known = settle(here, session)
    assert (known.end, known.stage, known.may_run) == ("source", "serves", False)
    copy.join()
    relay.join()
    assert "nobody serves it any more" in str(copy.answer)
    assert status(session, end="copy").stage == "faults"


def test_a_journal_that_cannot_be_written_when_it_is_given_up_lets_go_of_the_memory(session, monkeypatch, tmp_path):
    source, relay, rooms = Source(), Relay(), []
    journal = tmp_path / "journal"
    journal.mkdir()

    def room(nbytes):
        rooms.append(dl.zeros(nbytes, np.uint8))
        return rooms[0]

    def interrupted(channel, faults):
        shutil.rmtree(journal)
        raise KeyboardInterrupt

    monkeypatch.setattr(Channel, "lend", interrupted)
    with relay.connect() as here:
        copy = Copy(relay.accept(), run="filled", journal=journal, out=room)
        with pytest.raises(MigrationError):
            send(here, source.memory, source.observer, postcopy=0, session=session)
    copy.join()
    relay.join()
    assert isinstance(copy.answer, FileNotFoundError)
    # Where it is still guarded, the system call waits, and does so without the GIL.
    reads, writes = os.pipe()
    reader = threading.Thread(target=os.write, args=(writes, rooms[0][-16:]), daemon=True)
    reader.start()
    reader.join(30)
    assert not reader.is_alive()
    os.close(reads)
    os.close(writes)
