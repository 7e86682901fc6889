"""Both ends of ``dirtylog migrate`` in one process."""

import queue
import threading

import pytest

from dirtylog.commands import _terminal, migrate

from .test_snapshot_and_migrate import run


@pytest.fixture
def migrated(tmp_path, monkeypatch, capsys):
    """Migrate between two threads, from what some options say to what others say; return the receiver's answer."""
    listening = queue.Queue()
    monkeypatch.setattr(_terminal, "show_note", listening.put)
    answers = queue.Queue()
    monkeypatch.setattr(_terminal, "show_json", answers.put)

    def work(origin, arrival):
        failures = []

        def receive():
            try:
                run(migrate, "receive", "--listen", f"unix:{tmp_path / 'line'}", "--json", *arrival)
            except Exception as error:
                failures.append(error)
                listening.put(repr(error))

        receiver = threading.Thread(target=receive)
        receiver.start()
        try:
            note = listening.get(timeout=60)
            assert note.startswith("listening on "), note
            run(migrate, "send", note.removeprefix("listening on "), *origin, "--json")
        finally:
            receiver.join()
        assert failures == []
        ends = [answers.get_nowait() for _ in range(2)]
        return next(each for each in ends if "memory_bytes" in each), next(each for each in ends if "session" in each)

    return work
