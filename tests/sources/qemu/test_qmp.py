"""The QMP client: against a storage daemon, and against a monitor that lies."""

import json
import pickle
import socket

import pytest

from dirtylog.sources.qemu import PeerError, Qmp, QmpError

from ...qemu import listening

HELLO = b'{"QMP": {"version": {"qemu": {"major": 7, "minor": 2, "micro": 22}}, "capabilities": ["oob"]}}\r\n'
READY = HELLO + b'{"return": {}, "id": 1}\r\n'


def monitor(said, timeout=5):
    """A monitor that has said all it will ever say."""
    ours, theirs = socket.socketpair()
    theirs.sendall(said)
    theirs.shutdown(socket.SHUT_WR)
    return ours, theirs, timeout


def connected(said, timeout=5):
    ours, theirs, timeout = monitor(said, timeout)
    qmp = Qmp(ours, timeout=timeout)
    qmp.other_end = theirs
    return qmp


def test_a_daemon_answers_and_refuses_in_its_own_words(machine):
    machine.qmp.close()  # a monitor serves one client
    with machine.daemon.qmp() as qmp:
        assert qmp.version[0].isdigit()
        assert {"name": "quit"} in qmp.execute("query-commands")
        with pytest.raises(QmpError, match="nor node-name='nobody'") as refusal:
            qmp.execute("block-dirty-bitmap-add", {"node": "nobody", "name": "b"})
        assert refusal.value.kind == "GenericError"
        with pytest.raises(QmpError, match="CommandNotFound"):
            qmp.execute("make-coffee")
        copied = pickle.loads(pickle.dumps(refusal.value))
        assert (copied.command, copied.kind, copied.description) == (
            "block-dirty-bitmap-add", refusal.value.kind, refusal.value.description,
        )  # fmt: skip
    with pytest.raises(ValueError, match="closed"):
        qmp.execute("query-commands")


def test_events_are_kept_and_waited_for(machine):
    machine.qmp.execute("block-export-add", {"type": "nbd", "id": "e", "node-name": "disk", "name": "e"})
    machine.qmp.execute("block-export-del", {"id": "e", "mode": "hard"})
    told = machine.qmp.wait("BLOCK_EXPORT_DELETED", lambda data: data["id"] == "e")
    assert told == {"id": "e"}


def test_an_answer_is_told_from_events_and_from_answers_that_nobody_waits_for():
    qmp = connected(
        READY + b'{"event": "STOP", "data": {}}\n{"return": 5, "id": 77}\n{"return": 6, "id": 2}\n{"event": "RESUME"}\n'
    )
    assert qmp.execute("x", {"a": 1}) == 6
    assert [each["event"] for each in qmp.events] == ["STOP"]
    assert qmp.wait("RESUME") == {}
    assert qmp.wait("STOP") == {}
    assert not qmp.events
    sent = qmp.other_end.recv(1 << 16).splitlines()
    assert json.loads(sent[-1]) == {"execute": "x", "arguments": {"a": 1}, "id": 2}
    with pytest.raises(PeerError, match="hung up"):
        qmp.wait("STOP")
    qmp.close()
    qmp.other_end.close()


@pytest.mark.parametrize(
    ("said", "why"),
    [
        (b"SSH-2.0-OpenSSH_9\r\n", "what is not JSON"),
        (b'{"no": 1}\n', "no QMP monitor"),
        (b'{"QMP": 1}\n', "no QMP monitor"),
        (b"[" * 100_000 + b"\n", "what is not JSON"),
        (b"\xff\xfe\n", "what is not JSON"),
        (b"[1]\n", "a message is an object"),
        (b'{"QMP": {}}', "hung up"),
        (HELLO + b'{"id": 1}\n', "answered qmp_capabilities with"),
    ],
)
def test_what_does_not_speak_qmp_is_refused(said, why):
    ours, theirs, timeout = monitor(said)
    with theirs, pytest.raises(PeerError, match=why):
        Qmp(ours, timeout=timeout)


def test_an_error_in_any_form_is_an_error():
    for error in (b'"words"', b'{"class": 7, "desc": ["x"]}', b"1"):
        qmp = connected(READY + b'{"error": ' + error + b"}\n")
        with pytest.raises(QmpError, match="QEMU refused x"):
            qmp.execute("x")
        qmp.close()
        qmp.other_end.close()


def test_events_that_nobody_asks_for_do_not_pile_up():
    qmp = connected(READY + b'{"event": "E"}\n' * 1500 + b'{"return": 1, "id": 2}\n')
    assert qmp.execute("x") == 1
    assert len(qmp.events) == 1000
    qmp.close()
    qmp.other_end.close()


def test_a_line_without_an_end_is_cut_off(monkeypatch):
    monkeypatch.setattr("dirtylog.sources.qemu.qmp.MAX_LINE", 1000)
    ours, theirs, timeout = monitor(b" " * 70_000)
    with theirs, pytest.raises(PeerError, match="more than 1000 bytes"):
        Qmp(ours, timeout=timeout)


def test_a_monitor_that_another_program_holds_is_said(tmp_path):
    with listening(tmp_path / "m"), pytest.raises(TimeoutError, match="one client at a time"):
        Qmp(tmp_path / "m", timeout=0.05)


def test_a_signal_handler_in_the_middle_of_a_command_is_refused(monkeypatch):
    qmp = connected(READY)
    with qmp._alone(), pytest.raises(Exception, match="signal handler"):
        qmp.execute("x")
    qmp.close()
    qmp.other_end.close()
