"""Who may talk to a migration's receiver: certificates, keys and tokens; and who cannot hold it up."""

import contextlib
import os
import selectors
import socket
import ssl
import threading
from pathlib import Path

import numpy as np
import pytest

from dirtylog import BackendUnavailable, DirtyBitmap, DirtyLog
from dirtylog.sinks.migrate import Keys, Listener, MigrationError, connect, door, greeting, receive, send

CERTIFICATES = Path(__file__).parent / "certificates"
TOKEN = b"0123456789abcdef"
HERE = ("127.0.0.1", 0)


def certificate(whose, authority="authority", **more):
    return Keys(cert=CERTIFICATES / f"{whose}.pem", ca=CERTIFICATES / f"{authority}.pem", **more)


def talk(listener, keys, *, before=(), **options):
    """Connect while the listener accepts; return what each end got: a socket or an error."""
    got = []

    def accept():
        try:
            got.append(listener.accept(30))
        except BaseException as error:
            got.append(error)

    thread = threading.Thread(target=accept)
    thread.start()
    try:
        there = connect(listener.address, keys, timeout=30, **options)
    except (OSError, MigrationError) as error:
        there = error
        # Let the listener go: somebody comes who may.
        with connect(listener.address, before):
            thread.join()
        got[0].close()
        return there, None
    thread.join()
    return there, got[0]


def close(*socks):
    for sock in socks:
        sock.close()


@pytest.mark.parametrize(
    ("receiver", "sender"),
    [
        (Keys(), Keys()),
        (Keys(token=TOKEN), Keys(token=TOKEN)),
        (certificate("receiver"), certificate("sender")),
        (certificate("receiver", token=TOKEN), certificate("sender", token=TOKEN)),
    ],
)
def test_memory_goes_between_those_who_may_talk(receiver, sender):
    memory = np.random.default_rng(0).integers(0, 256, 1 << 16, np.uint8)
    log = DirtyLog()
    log.attach(DirtyBitmap(16))
    with Listener(HERE, receiver) as listener:
        here, there = talk(listener, sender)
        received = []
        with here, there:
            assert isinstance(there, ssl.SSLSocket) == receiver.encrypts
            thread = threading.Thread(target=lambda: received.append(receive(there)))
            thread.start()
            send(here, memory, log.observer("migration"))
            thread.join()
    assert (received[0] == memory).all()


def test_a_unix_socket_is_its_users_alone_and_goes_away(tmp_path):
    path = str(tmp_path / "socket")
    before = os.umask(0)
    try:
        with Listener(path, Keys(token=TOKEN)) as listener:
            assert os.stat(path).st_mode & 0o777 == 0o600
            assert listener.address == path
            close(*talk(listener, Keys(token=TOKEN)))
            with pytest.raises(OSError, match=f"in use: 'unix:{path}'"):
                Listener(path)
            # The system's own words name no address.
            with pytest.raises(OSError, match=f"No such file or directory: 'unix:{tmp_path}/none/x'"):
                Listener(str(tmp_path / "none" / "x"))
            with pytest.raises(OSError, match=r"in use: '127\.0\.0\.1:"), Listener(("127.0.0.1", 0)) as other:
                Listener(other.address)
            assert os.path.exists(path)
    finally:
        os.umask(before)
    assert not os.path.exists(path)
    listener.close()
    with pytest.raises(ValueError, match="closed"):
        listener.accept()


@pytest.mark.parametrize(
    ("receiver", "sender", "right"),
    [
        (Keys(token=TOKEN), Keys(token=TOKEN[::-1]), Keys(token=TOKEN)),
        (Keys(token=TOKEN), Keys(), Keys(token=TOKEN)),
        (Keys(), Keys(token=TOKEN), Keys()),
        (certificate("receiver"), Keys(), certificate("sender")),
        (certificate("receiver"), certificate("stranger"), certificate("sender")),
        (certificate("receiver"), certificate("stranger", "strangers"), certificate("sender")),
        (certificate("receiver"), certificate("receiver"), certificate("sender")),
        (certificate("receiver", token=TOKEN), certificate("sender"), certificate("sender", token=TOKEN)),
        # Its certificate is good, but it is the receiver's that must name the host.
        (certificate("receiver"), certificate("sender", name="other.example"), certificate("sender")),
    ],
)
def test_whoever_has_not_the_right_keys_is_hung_up_on_and_the_slot_is_free(receiver, sender, right):
    refused = []
    with Listener(HERE, receiver, refused=lambda *why: refused.append(why)) as listener:
        outcome, _ = talk(listener, sender, before=right)
        assert isinstance(outcome, (MigrationError, ssl.SSLError, ConnectionError)), outcome
    assert refused


def test_a_receiver_that_does_not_hold_the_token_is_found_out(monkeypatch):
    # It lets everybody in; the sender asks for its proof.
    real = greeting._proof
    monkeypatch.setattr(greeting, "_expect", lambda sock, proof: greeting._read(sock, len(proof)))
    with Listener(HERE) as listener:
        got = []
        thread = threading.Thread(target=lambda: got.append(listener.accept(30)))
        thread.start()
        with socket.create_connection(listener.address) as sock:
            mine = greeting._greeting()
            sock.sendall(mine)
            theirs = sock.recv(40, socket.MSG_WAITALL)
            sock.sendall(real(TOKEN, b"sender", mine + theirs))
            assert sock.recv(32, socket.MSG_WAITALL) != real(TOKEN, b"receiver", mine + theirs)
            thread.join()
        got[0].close()


def test_tokens_are_compared_in_constant_time_and_never_sent(monkeypatch):
    compared, sent = [], []
    compare = greeting.hmac.compare_digest
    monkeypatch.setattr(greeting.hmac, "compare_digest", lambda *pair: compared.append(pair) or compare(*pair))
    write = greeting._write
    monkeypatch.setattr(greeting, "_write", lambda sock, data: sent.append(data) or write(sock, data))
    with Listener(HERE, Keys(token=TOKEN)) as listener:
        close(*talk(listener, Keys(token=TOKEN)))
    assert len(compared) == 2
    assert TOKEN not in b"".join(sent)
    assert len(set(sent)) == len(sent) == 4


@contextlib.contextmanager
def accepting(listener):
    """Accept one connection in a thread; it is closed at the end."""
    got = []
    thread = threading.Thread(target=lambda: got.append(listener.accept(30)))
    thread.start()
    yield
    thread.join()
    got[0].close()


def test_a_replayed_proof_is_of_no_use():
    refused = []
    said = greeting._greeting()
    with Listener(HERE, Keys(token=TOKEN), refused=lambda name, why: refused.append(why)) as listener:
        with accepting(listener), socket.create_connection(listener.address) as sock:
            sock.sendall(said)
            proof = greeting._proof(TOKEN, b"sender", said + sock.recv(40, socket.MSG_WAITALL))
            sock.sendall(proof)
        with accepting(listener):
            with socket.create_connection(listener.address) as again:
                again.sendall(said)
                again.recv(40, socket.MSG_WAITALL)
                again.sendall(proof)
                assert again.recv(1) == b""
            connect(listener.address, Keys(token=TOKEN)).close()
    assert refused == ["the peer holds another token, or none"]


def test_a_port_scanners_bytes_and_many_silent_connections_do_not_take_the_slot():
    refused = []
    with (
        Listener(HERE, Keys(token=TOKEN), pending=8, refused=lambda name, why: refused.append(why)) as listener,
        contextlib.ExitStack() as crowd,
    ):
        for words in [b"GET / HTTP/1.0\r\n\r\n", bytes(1000), b"dlog\x09" + bytes(100), b"dlo", b"\x16\x03\x01"]:
            crowd.enter_context(socket.create_connection(listener.address)).sendall(words)
        for _ in range(90):
            crowd.enter_context(socket.create_connection(listener.address))
        close(*talk(listener, Keys(token=TOKEN)))
        assert len(listener._visitors) <= 8
    assert sum("another protocol: it begins with b'GET '" in why for why in refused) == 1
    assert any("version 9" in why for why in refused)
    assert any("too many others" in why for why in refused)


def test_a_thousand_connections_beside_the_real_one_hold_nobody_up():
    """Silent ones, ones that say a little and hang up, and a port scanner's: in waves, while memory goes over."""
    scanner = [b"GET / HTTP/1.0\r\n\r\n", b"\x16\x03\x01\x02\x00\x01", bytes(100)]
    said = [b"", b"dlog", *scanner, b"dlog\x03" + bytes(35)]
    memory = np.random.default_rng(0).integers(0, 256, 1 << 22, np.uint8)
    log = DirtyLog()
    log.attach(DirtyBitmap(memory.nbytes // 4096))
    refused, received, answers = [], [], []
    keys = Keys(token=TOKEN)
    options = {"refused": lambda name, why: refused.append(why), "pending": 8, "timeout": 60}

    with Listener(HERE, keys, **options) as listener, contextlib.ExitStack() as strangers:

        def come(numbers):
            for number in numbers:
                if number % 100 == 0:
                    strangers.pop_all().close()
                sock = strangers.enter_context(socket.create_connection(listener.address, timeout=60))
                with contextlib.suppress(OSError):
                    sock.sendall(said[number % len(said)])
                if number % 5 == 0:
                    sock.close()

        def accept(breaks=0):
            return listener.accept(60)

        def take():
            try:
                with accept() as sock:
                    received.append(receive(sock, reconnect=accept))
            except BaseException as error:
                answers.append(error)

        def cut(breaks):
            come(range(500, 1000))
            return connect(listener.address, keys, timeout=60)

        thread = threading.Thread(target=take)
        thread.start()
        come(range(500))
        with Once(connect(listener.address, keys, timeout=60)) as here:
            send(here, memory, log.observer("migration"), reconnect=cut)
        thread.join()
    assert answers == []
    assert (received[0] == memory).all()
    assert len(refused) > 500


class Once(socket.socket):
    """A line that breaks in the middle of what it carries."""

    def __init__(self, sock):
        timeout = sock.gettimeout()
        super().__init__(fileno=sock.detach())
        self.settimeout(timeout)
        self.left = 1 << 21

    def send(self, data):
        self.left -= len(data)
        if self.left < 0:
            self.shutdown(socket.SHUT_RDWR)
            raise ConnectionResetError(104, "cut")
        return super().send(data)


class Clock:
    """Time that passes when it is looked at."""

    def __init__(self):
        self.now = 0

    def __call__(self):
        self.now += 0.001
        return self.now


@pytest.mark.parametrize("keys", [Keys(), certificate("receiver")])
def test_half_open_connections_are_hung_up_on_in_time(keys):
    refused = []
    with Listener(HERE, keys, timeout=0.003, refused=lambda name, why: refused.append(why), clock=Clock()) as listener:
        with socket.create_connection(listener.address) as sock:
            sock.sendall(b"dlog")
            with pytest.raises(TimeoutError, match=r"nobody who may talk came within 0\.02 s"):
                listener.accept(0.02)
            assert refused == ["it took too long"]
        assert not listener._visitors


def test_a_connection_that_is_on_its_way_survives_between_two_accepts():
    with Listener(HERE) as listener:
        slow = socket.create_connection(listener.address)
        close(*talk(listener, Keys()))
        with slow:
            mine = greeting._greeting()
            slow.sendall(mine)
            got = []
            thread = threading.Thread(target=lambda: got.append(listener.accept(30)))
            thread.start()
            both = mine + slow.recv(40, socket.MSG_WAITALL)
            slow.sendall(greeting._proof(None, b"sender", both))
            assert slow.recv(32, socket.MSG_WAITALL) == greeting._proof(None, b"receiver", both)
            thread.join()
            got[0].close()


def test_no_descriptors_left_is_said_once_nobody_can_be_hung_up_on(monkeypatch):
    with Listener(HERE) as listener, socket.create_connection(listener.address):
        calls = []

        class Server:
            fileno = listener._server.fileno
            close = listener._server.close

            def accept(self):
                calls.append(len(listener._visitors))
                raise OSError(24, "Too many open files")

        monkeypatch.setattr(listener, "_server", Server())
        with pytest.raises(OSError, match="Too many open files"):
            listener.accept(30)
        with selectors.DefaultSelector() as selector:
            sock, other = socket.socketpair()
            with other:
                listener._visitors[sock.fileno()] = door._Visitor(sock, iter(()), 1e9, "x")
                selector.register(sock, selectors.EVENT_READ)
                listener._newcomer(selector)
        assert calls == [0, 1]
        assert not listener._visitors


@pytest.mark.parametrize("address", [("192.0.2.1", 4000), ("0.0.0.0", 0)])
def test_an_address_that_others_reach_needs_tls(address):
    for call in (lambda **more: Listener(address, **more), lambda **more: connect(address, **more)):
        for keys in (None, Keys(token=TOKEN)):
            with pytest.raises(ValueError, match=r"not a loopback address, and there is no TLS: .*insecure=True"):
                call(keys=keys)


def test_insecure_is_a_word_that_has_to_be_said():
    with Listener(("0.0.0.0", 0), insecure=True) as listener:
        assert listener.address[1]


def test_keys_that_protect_half_are_refused_and_secrets_are_not_shown(tmp_path):
    with pytest.raises(ValueError, match="TLS needs cert and ca at both ends"):
        Keys(cert="x")
    with pytest.raises(ValueError, match="TLS needs cert and ca at both ends"):
        Keys(key="x")
    with pytest.raises(ValueError, match="token has 3 bytes; it must have 16 to 1024: openssl rand -hex 32"):
        Keys(token=b"abc")
    with pytest.raises(ValueError, match="pending is 0"):
        Listener(HERE, pending=0)
    with pytest.raises(ValueError, match="not the path of a Unix socket"):
        Listener("\0abstract")
    assert "0123" not in repr(Keys(token=TOKEN))
    path = tmp_path / "token"
    path.write_bytes(TOKEN + b"\n")
    path.chmod(0o600)
    assert Keys.from_files(token_file=path) == Keys(token=TOKEN)
    path.chmod(0o644)
    with pytest.raises(PermissionError, match="everybody may read this secret; chmod 600"):
        Keys.from_files(token_file=path)


def test_a_shared_key_is_enough_where_the_interpreter_has_it():
    if not getattr(ssl, "HAS_PSK", False):
        with pytest.raises(BackendUnavailable, match=r"Python 3\.13"):
            Keys(psk=TOKEN)
        return
    with pytest.raises(ValueError, match="psk and cert are both given"):
        certificate("sender", psk=TOKEN)
    with Listener(HERE, Keys(psk=TOKEN)) as listener:
        here, there = talk(listener, Keys(psk=TOKEN))
        assert here.cipher()[0] == "ECDHE-PSK-CHACHA20-POLY1305"
        close(here, there)
        outcome, _ = talk(listener, Keys(psk=TOKEN[::-1]), before=Keys(psk=TOKEN))
        assert isinstance(outcome, (OSError, MigrationError))
        outcome, _ = talk(listener, certificate("sender"), before=Keys(psk=TOKEN))
        assert isinstance(outcome, (OSError, MigrationError))
