"""A listener that does TLS in a process of its own: who is let in, what is carried, and a copy that holds the GIL."""

import contextlib
import dataclasses
import os
import select
import socket
import ssl
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from dirtylog import DirtyBitmap, DirtyLog, DirtyLogError
from dirtylog.sinks.migrate import (
    Control,
    Keys,
    Listener,
    ListenerProcess,
    MigrationError,
    porter,
    receive,
    send,
)
from dirtylog.sinks.migrate.payloads import EXTENT
from dirtylog.sinks.migrate.wire import Channel, Kind

from .. import warm
from .test_migrate_door import HERE, TOKEN, certificate, close, talk
from .test_migrate_postcopy import LIBC, PAGE, guarded

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def listening():
    """One that lets whoever has a good certificate and the token in, and whom it hung up on."""
    refused = []
    with ListenerProcess(
        HERE, certificate("receiver", token=TOKEN), timeout=60, refused=lambda *why: refused.append(why)
    ) as listener:
        yield listener, refused


GOOD = certificate("sender", token=TOKEN)


def test_memory_comes_over_tls_and_what_is_handed_out_is_plain(listening):
    memory = np.random.default_rng(0).integers(0, 256, 1 << 22, np.uint8)
    log = DirtyLog()
    log.attach(DirtyBitmap(memory.nbytes // PAGE))
    here, there = talk(listening[0], GOOD)
    received = []
    with here, there:
        assert isinstance(here, ssl.SSLSocket)
        assert type(there) is socket.socket
        thread = threading.Thread(target=lambda: received.append(receive(there)))
        thread.start()
        send(here, memory, log.observer("migration"))
        thread.join()
    assert (received[0] == memory).all()


@pytest.mark.parametrize(
    "wrong", [Keys(), certificate("stranger"), certificate("sender"), certificate("sender", token=TOKEN[::-1])]
)
def test_whoever_has_not_the_right_keys_is_hung_up_on_and_named(listening, wrong):
    listener, refused = listening
    before = len(refused)
    outcome, _ = talk(listener, wrong, before=GOOD)
    assert isinstance(outcome, (MigrationError, ssl.SSLError, ConnectionError)), outcome
    assert len(refused) > before


def test_who_comes_after_a_wait_that_was_in_vain_is_handed_to_the_next(listening):
    listener, _ = listening
    with pytest.raises(TimeoutError, match=r"nobody who may talk came within 0\.01 s"):
        listener.accept(0.01)
    control = Control()
    control.cancel()
    with pytest.raises(MigrationError, match="cancelled"):
        listener.accept(control=control)
    here, there = talk(listener, GOOD)
    here.sendall(b"x")
    assert there.recv(1) == b"x"
    close(here, there)


def test_lines_that_were_handed_out_go_on_when_it_is_closed(tmp_path):
    path = str(tmp_path / "socket")
    with ListenerProcess(path, certificate("receiver"), timeout=60) as listener:
        assert os.stat(path).st_mode & 0o777 == 0o600
        here, there = talk(listener, certificate("sender"))
    assert not os.path.exists(path)
    with here, there:
        for one, other in ((here, there), (there, here)):
            one.sendall(b"x")
            assert other.recv(1) == b"x"
    with pytest.raises(ValueError, match="closed"):
        listener.accept()
    with ListenerProcess(path, certificate("receiver")):
        """The name is free again."""


def test_the_last_words_arrive_when_the_owner_has_hung_up(listening):
    here, there = talk(listening[0], GOOD)
    with here:
        there.sendall(b"over" * 1000)
        there.close()
        with here.makefile("rb") as file:
            assert file.read() == b"over" * 1000


def test_an_owner_that_reads_no_more_is_still_heard(listening):
    """As a receiver that is cancelled: it hangs up on what it waits for, and says why."""
    here, there = talk(listening[0], GOOD)
    with here, there:
        there.shutdown(socket.SHUT_RD)
        here.sendall(b"x" * 1000)
        there.sendall(b"no")
        there.close()
        with here.makefile("rb") as file:
            assert file.read() == b"no"


def test_without_keys_that_encrypt_there_is_no_process():
    with ListenerProcess(HERE, Keys(token=TOKEN)) as listener:
        assert listener._process is None
        close(*talk(listener, Keys(token=TOKEN)))


@pytest.mark.parametrize(
    ("program", "why"), [("/bin/false", "cannot import dirtylog"), ("/nonexistent", "No such file")]
)
def test_an_interpreter_that_cannot_be_started_is_named(monkeypatch, program, why):
    monkeypatch.setattr(sys, "executable", program)
    with pytest.raises(DirtyLogError, match=f"'{program}'.*{why}"):
        ListenerProcess(HERE, certificate("receiver"))


def test_keys_that_the_process_cannot_read_are_named(monkeypatch, tmp_path):
    begin = ListenerProcess._start

    def later(self):
        # Removed after this process has read them.
        self._keys = dataclasses.replace(self._keys, cert=tmp_path / "none.pem")
        return begin(self)

    monkeypatch.setattr(ListenerProcess, "_start", later)
    with pytest.raises(DirtyLogError, match=r"could not be started.*No such file"):
        ListenerProcess(HERE, certificate("receiver"))


@pytest.mark.parametrize(
    "code",
    [
        # The interpreter that is started does not come to its end; the process that it leaves says nothing.
        "import os\nwhile os.read(0, 9): pass",
        "import os\nif os.fork(): os._exit(0)\nwhile os.read(0, 9): pass",
    ],
)
def test_a_process_that_does_not_begin_is_not_waited_for_for_ever(monkeypatch, code):
    monkeypatch.setattr(porter, "_CODE", code)
    monkeypatch.setattr(porter, "_BEGINS", 0.5)
    with pytest.raises(DirtyLogError, match=r"could not be started: .* did not begin within 0\.5 s"):
        ListenerProcess(HERE, certificate("receiver"))


@pytest.mark.parametrize("asked", [False, True])
def test_a_process_that_has_ended_is_said_to_have(asked, monkeypatch):
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    monkeypatch.setattr(ListenerProcess, "_start", lambda self: ours)
    with ListenerProcess(HERE, certificate("receiver")) as listener:
        if asked:
            with pytest.raises(TimeoutError):
                listener.accept(0.01)
        theirs.close()
        with pytest.raises(DirtyLogError, match="has ended; open another listener"):
            listener.accept(30)


def test_what_its_accept_fails_with_is_raised_here(monkeypatch):
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    monkeypatch.setattr(ListenerProcess, "_start", lambda self: ours)
    with theirs, ListenerProcess(HERE, certificate("receiver")) as listener:
        for _ in range(2):
            theirs.send(b'{"failed": [24, "Too many open files"]}')
            with pytest.raises(OSError, match="Too many open files") as caught:
                listener.accept(30)
            assert caught.value.errno == 24
            assert theirs.recv(100) == b"accept"


# ---- what is carried -------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def carried(patience=30.0):
    """Yield both ends of what is carried between them, and the thread that does."""
    there, line = socket.socketpair()
    near, here = socket.socketpair()
    thread = threading.Thread(target=porter.carry, args=(line, near, patience))
    with here, there:
        for sock in (here, there):
            sock.settimeout(30)
        thread.start()
        try:
            yield here, there, thread
        finally:
            for sock in (here, there):
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
                sock.close()
            thread.join()


def stuffed(sock):
    """Write until nothing goes any more; return how much did."""
    total = 0
    while select.select([], [sock], [], 0.05)[1]:
        total += sock.send(bytes(1 << 16), socket.MSG_DONTWAIT)
    return total


def read(sock, most):
    """Read so many bytes, or up to the end."""
    data = b""
    while len(data) < most and (part := sock.recv(most - len(data))):
        data += part
    return data


def test_a_direction_that_is_stuck_does_not_stop_the_other():
    with carried() as (here, there, _):
        total = stuffed(here)
        there.sendall(b"y" * 1000)
        assert read(here, 1000) == b"y" * 1000
        assert len(read(there, total)) == total


@pytest.mark.parametrize("end", [0, 1])
def test_the_end_of_one_side_is_the_end_of_the_other_and_what_was_sent_before_arrives(end):
    with carried() as ends:
        ends[end].sendall(b"x" * 100_000)
        ends[end].shutdown(socket.SHUT_WR)
        assert read(ends[1 - end], 100_001) == b"x" * 100_000
        # The other direction goes on.
        ends[1 - end].sendall(b"answer")
        assert read(ends[end], 6) == b"answer"


def test_a_line_that_takes_nothing_is_left_when_the_owner_is_gone():
    with carried(patience=0.0) as (here, _, thread):
        stuffed(here)
        here.close()
        thread.join(30)
        assert not thread.is_alive()


def test_a_line_that_is_gone_is_no_place_to_write_to():
    with carried() as (here, there, thread):
        there.close()
        assert here.recv(1) == b""
        with pytest.raises(ConnectionError):
            here.sendall(bytes(1 << 24))
        here.close()
        thread.join(30)
        assert not thread.is_alive()


# ---- a copy that runs before it has everything -----------------------------------------------------------------------

SENDER = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import numpy as np
from dirtylog import DirtyBitmap, DirtyLog
from dirtylog.sinks.migrate import Control, connect, send
from tests.sinks.test_migrate_door import TOKEN, certificate
memory = np.random.default_rng(0).integers(0, 256, 1 << 24, np.uint8)
log = DirtyLog()
log.attach(DirtyBitmap(4096))
keys = certificate("sender", token=TOKEN)
address = "127.0.0.1", int(sys.argv[1])
breaks = []
def reconnect(number):
    breaks.append(number)
    return connect(address, keys)
with connect(address, keys) as sock:
    # In the background half a second's worth, however busy the machine is: what a copy asks for goes at once.
    send(sock, memory, log.observer("migration"), postcopy=0, reconnect=reconnect, control=Control(32 << 20))
print(len(breaks))
"""


@pytest.mark.skipif(bool(guarded()), reason=guarded())
@pytest.mark.parametrize("run", ["at-once", "filled"])
def test_a_copy_that_holds_the_gil_while_it_waits_is_filled_over_tls(listening, run):
    expected = np.random.default_rng(0).integers(0, 256, 1 << 24, np.uint8)
    listener, wrong, users = listening[0], [], []

    def use(memory):
        for page in np.random.default_rng(1).permutation(4096):
            # As access to one element does: with the GIL.
            if memory[page * PAGE] != expected[page * PAGE]:
                wrong.append(page)

    def start(memory):
        users.append(threading.Thread(target=use, args=(memory,)))
        users[0].start()

    with warm.started(SENDER, str(listener.address[1])) as sender:
        with listener.accept(60) as sock:
            memory = receive(sock, start=start, postcopy=True, run=run)
        users[0].join()
        assert sender.stdout.read() == b"0\n"
        assert sender.wait(60) == 0
    assert not wrong
    assert (memory == expected).all()


def test_a_sender_sees_what_tls_has_read_along_with_something_else(listening):
    here, there = talk(listening[0], GOOD)
    with here, there:
        assert isinstance(here, ssl.SSLSocket)
        channel, frames = Channel(here), socket.socketpair()
        with frames[0], frames[1]:
            other = Channel(frames[0])
            for page in range(2):
                other.send(Kind.WANT, EXTENT.pack(page * PAGE, PAGE))
            there.sendall(frames[1].recv(1000))
        assert not channel.has_more
        for more in (True, False):
            channel.receive(Kind.WANT)
            assert channel.has_more == more


@pytest.mark.skipif(bool(guarded()), reason=guarded())
def test_a_line_with_tls_that_breaks_while_the_copy_runs_is_replaced(listening):
    expected = np.random.default_rng(0).integers(0, 256, 1 << 24, np.uint8)
    listener, lines, users, wrong = listening[0], [], [], []

    def use(memory):
        for page in np.random.default_rng(1).permutation(4096):
            if LIBC.memcmp(memory.ctypes.data + int(page) * PAGE, expected.ctypes.data + int(page) * PAGE, PAGE):
                wrong.append(page)

    def start(memory):
        lines[0].shutdown(socket.SHUT_RDWR)
        users.append(threading.Thread(target=use, args=(memory,), daemon=True))
        users[0].start()

    def accept(breaks=0):
        lines.append(listener.accept(60))
        return lines[-1]

    with warm.started(SENDER, str(listener.address[1])) as sender:
        with accept() as sock:
            memory = receive(sock, start=start, postcopy=True, reconnect=accept)
        users[0].join()
        assert len(lines) == 2
        assert sender.stdout.read() == b"1\n"
        assert sender.wait(60) == 0
    assert not wrong
    assert (memory == expected).all()


def test_a_socket_whose_tls_is_done_here_is_refused_with_the_way_out():
    log = DirtyLog()
    log.attach(DirtyBitmap(16))
    with Listener(HERE, certificate("receiver")) as listener:
        here, there = talk(listener, certificate("sender"))
        errors = []

        def receiving():
            try:
                receive(there, postcopy=True)
            except MigrationError as error:
                errors.append(str(error))

        with here, there:
            thread = threading.Thread(target=receiving)
            thread.start()
            with pytest.raises(MigrationError, match="take one of a ListenerProcess"):
                send(here, np.zeros(16 * PAGE, np.uint8), log.observer("migration"), postcopy=0)
            thread.join()
    assert "take one of a ListenerProcess" in errors[0]
