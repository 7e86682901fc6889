"""The NBD client: against QEMU's servers, and against one that lies."""

import errno
import json
import os
import random
import socket
import struct
import subprocess
import threading
from contextlib import contextmanager

import numpy as np
import pytest

from dirtylog.sources.qemu import NbdClient, PeerError
from dirtylog.sources.qemu import nbd as module

from ...qemu import content, listening, program

CONTEXT = "base:allocation"


def test_what_qemu_io_wrote_is_read(machine):
    machine.writer.write(0, 512, 0xA1)
    machine.writer.write(3 << 20, 300_000, 0xB2)
    with NbdClient(machine.nbd, "w") as client:
        assert client.size == machine.daemon.size
        assert not client.read_only
        assert bytes(client.read(0, 600)) == b"\xa1" * 512 + bytes(88)
        assert bytes(client.read((3 << 20) - 1, 300_002)) == b"\0" + b"\xb2" * 300_000 + b"\0"
        assert bytes(client.read(client.size, 0)) == b""
        buffer = bytearray(10)
        client.read(506, 10, memoryview(buffer))
        assert buffer == b"\xa1" * 6 + bytes(4)
        client.flush()


def test_extents_are_those_that_nbdinfo_finds(machine):
    nbdinfo = program("nbdinfo")
    machine.qmp.execute("block-dirty-bitmap-add", {"node": "disk", "name": "b", "granularity": 65536})
    chance = random.Random(1)
    for _ in range(40):
        length = chance.randrange(1, 200_000)
        machine.writer.write(chance.randrange(machine.daemon.size - length), length, chance.randrange(256))
    machine.qmp.execute("block-dirty-bitmap-disable", {"node": "disk", "name": "b"})
    machine.qmp.execute(
        "block-export-add", {"type": "nbd", "id": "b", "node-name": "disk", "name": "b", "bitmaps": ["b"]}
    )
    contexts = ["qemu:dirty-bitmap:b", CONTEXT]
    with NbdClient(machine.nbd, "b", contexts) as client:
        assert client.read_only
        assert set(client.contexts) == set(contexts)
        for context in contexts:
            command = [nbdinfo, "--json", f"--map={context}", f"nbd+unix:///b?socket={machine.nbd}"]
            answer = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
            theirs = np.array([[each["offset"], each["length"], each["type"]] for each in answer])
            ours = client.extents(context)
            assert ours.tolist() == module._joined(theirs).tolist()
            assert ours[-1, 0] + ours[-1, 1] == client.size
            part = client.extents(context, 65536, 1 << 20)
            assert part[0, 0] == 65536
            assert part[:, 1].sum() == 1 << 20


def test_an_export_of_qemu_nbd_is_read_over_tcp(tmp_path):
    data = os.urandom(1 << 20)
    (tmp_path / "raw").write_bytes(data)
    with socket.create_server(("127.0.0.1", 0)) as server:
        # systemd's way to hand over a socket that listens already: descriptor 3, for this process.
        nbd = f"{program('qemu-nbd')} -r -f raw {tmp_path / 'raw'} 3<&{server.fileno()}"
        command = f"export LISTEN_PID=$$ LISTEN_FDS=1; exec {nbd}"
        process = subprocess.Popen(["bash", "-c", command], pass_fds=(server.fileno(),))
        try:
            with NbdClient(server.getsockname(), contexts=[CONTEXT]) as client:
                assert bytes(client.read(0, 1 << 20)) == data
                assert client.extents(CONTEXT).tolist() == [[0, 1 << 20, 0]]
        finally:
            process.kill()
            process.wait()


def test_exports_and_contexts_that_are_not_there_are_named(machine):
    with pytest.raises(PeerError, match="nobody"):
        NbdClient(machine.nbd, "nobody")
    with pytest.raises(PeerError, match="has no context 'qemu:dirty-bitmap:none'"):
        NbdClient(machine.nbd, "w", ["qemu:dirty-bitmap:none"])
    with NbdClient(machine.nbd, "w", [CONTEXT]) as client:
        with pytest.raises(KeyError, match="not a context of this client"):
            client.extents("qemu:dirty-bitmap:none")
        for offset, length in ((-1, 1), (0, client.size + 1), (client.size, 1), (0, -1)):
            with pytest.raises(IndexError, match="not in the export"):
                client.read(offset, length)
        with pytest.raises(ValueError, match="out has 3 bytes; 4 are read"):
            client.read(0, 4, memoryview(bytearray(3)))
    with pytest.raises(ValueError, match="closed"):
        client.read(0, 1)
    client.close()


def test_an_error_of_the_disk_is_an_oserror_and_the_connection_goes_on(machine):
    machine.writer.write(0, 16384, 5)  # what is not there is not read
    machine.qmp.execute(
        "blockdev-add",
        {"driver": "blkdebug", "node-name": "bad", "image": "disk",
         "inject-error": [{"event": "none", "iotype": "read", "sector": 8, "errno": 5}]},
    )  # fmt: skip
    machine.qmp.execute("block-export-add", {"type": "nbd", "id": "bad", "node-name": "bad", "name": "bad"})
    with NbdClient(machine.nbd, "bad") as client:
        with pytest.raises(OSError, match="read of 8192 bytes at 0") as failure:
            client.read(0, 8192)
        assert failure.value.errno == errno.EIO
        assert bytes(client.read(8192, 512)) == b"\5" * 512
    assert content(machine.nbd)[:512] == b"\5" * 512


# A server that lies --------------------------------------------------------------------------------------------------


def str_of(value):
    """Name a case by the error that it expects."""
    return value if isinstance(value, str) else ""


GREETING = struct.pack(">QQH", module._MAGIC, module._OPTION, 3)


def reply(option, kind, payload=b""):
    return struct.pack(">QIII", module._OPTION_REPLY, option, kind, len(payload)) + payload


STRUCTURED = reply(8, 1)
META = reply(10, 4, struct.pack(">I", 7) + CONTEXT.encode()) + reply(10, 1)
GO = reply(7, 3, struct.pack(">HQH", 0, 4096, 1)) + reply(7, 1)
UP = GREETING + STRUCTURED + META + GO


def chunk(kind, payload=b"", done=True, cookie=1):
    return struct.pack(">IHHQI", module._STRUCTURED, done, kind, cookie, len(payload)) + payload


def data(offset, content, done=True):
    return chunk(1, struct.pack(">Q", offset) + content, done)


def status(*pairs, context=7, done=True):
    return chunk(5, struct.pack(">I", context) + b"".join(struct.pack(">II", *pair) for pair in pairs), done)


@contextmanager
def client_of(said):
    """A client of a server that has said all it will ever say."""
    ours, theirs = socket.socketpair()
    theirs.sendall(said)
    theirs.shutdown(socket.SHUT_WR)
    with theirs, NbdClient(ours, "x", [CONTEXT], timeout=5) as client:
        yield client


@pytest.mark.parametrize(
    ("said", "why"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n", "no NBD server is at that address"),
        (GREETING[:10], "hung up"),
        (struct.pack(">QQH", module._MAGIC, module._OPTION, 0), "no fixed newstyle"),
        (struct.pack(">QQH", module._MAGIC, 1, 1), "no fixed newstyle"),
        (GREETING + reply(8, 1 << 31 | 1, b"no such thing"), "refuses structured replies.*: no such thing"),
        (GREETING + reply(8, 1 << 31 | 5), "requires TLS"),
        (GREETING + reply(7, 1), "was asked option 8"),
        (GREETING + struct.pack(">QIII", module._OPTION_REPLY, 8, 1, 1 << 30), "1073741824 bytes; 65536 are read"),
        (GREETING + reply(8, 3), "more than it was asked for"),
        (GREETING + STRUCTURED + reply(10, 1), "has no context 'base:allocation'"),
        (GREETING + STRUCTURED + reply(10, 4, b"abc"), "reply 4 of 3 bytes"),
        (GREETING + STRUCTURED + reply(10, 4, struct.pack(">I", 7) + b"other:context"), "offers the context"),
        (GREETING + STRUCTURED + META[: -len(reply(10, 1))] * 2, "each once"),
        (GREETING + STRUCTURED + META + reply(7, 1), "-1 bytes"),
        (GREETING + STRUCTURED + META + reply(7, 3, struct.pack(">HQH", 0, 1 << 63, 1)) + reply(7, 1), "bytes, flags"),
        (GREETING + STRUCTURED + META + reply(7, 3, struct.pack(">HQH", 0, 1, 0)) + reply(7, 1), "flags 0x0"),
        (GREETING + STRUCTURED + META + reply(7, 3, struct.pack(">HIII", 3, 3, 4, 5)), "block sizes from 3 to 5"),
        (GREETING + STRUCTURED + META + reply(7, 3, struct.pack(">H", 9)) * 300, "more than 256 replies"),
        (GREETING + STRUCTURED + META + reply(7, 3, b"x"), "reply 3 of 1 bytes"),
    ],
    ids=str_of,
)  # fmt: skip
def test_a_server_that_lies_before_it_is_asked_is_refused(said, why):
    ours, theirs = socket.socketpair()
    theirs.sendall(said)
    theirs.shutdown(socket.SHUT_WR)
    with theirs, pytest.raises(PeerError, match=why):
        NbdClient(ours, "x", [CONTEXT], timeout=5)


@pytest.mark.parametrize(
    ("said", "why"),
    [
        (b"", "hung up"),
        (struct.pack(">I", 0xDEADBEEF) + bytes(16), "0xdeadbeef where a reply begins"),
        (chunk(1, struct.pack(">Q", 0) + bytes(10), cookie=2), "answered request 2"),
        (struct.pack(">IIQ", module._SIMPLE, 0, 9), "answered request 9"),
        (struct.pack(">IIQ", module._SIMPLE, 0, 1), "left out bytes"),
        (chunk(0), "left out bytes"),
        (chunk(0, done=False), "empty chunk in the middle"),
        (chunk(1, struct.pack(">Q", 0)), "chunk of 8 bytes"),
        (struct.pack(">IHHQI", module._STRUCTURED, 1, 1, 1, 1 << 31), "chunk of 2147483648 bytes"),
        (data(0, bytes(1025)), "bytes 0 to 1025"),
        (data(1024, b"x"), "bytes 1024 to 1025"),
        (data(0, bytes(1023)), "left out bytes"),
        (data(1, bytes(1023)), "left out bytes"),
        (data(0, bytes(1024), done=False) + data(5, b"x"), "sent some twice"),
        (data(0, bytes(10), done=False) + data(0, b"x"), "each once"),
        (data(0, b"x", False) + data(1, b"x", False) + data(2, b"x", False) + data(3, b"x"), "more than 3 chunks"),
        (chunk(2, struct.pack(">QI", 0, 0)), "each once"),
        (chunk(2, struct.pack(">QI", 0, 1 << 31)), "each once"),
        (chunk(2, struct.pack(">QIB", 0, 5, 5)), "chunk of 13 bytes"),
        (status((4096, 0)), "chunk of type 5"),
        (chunk(1 << 15 | 1, b"\0\0\0\5", done=True), "an error of 4 bytes"),
        (chunk(1 << 15 | 1, struct.pack(">IH", 5, 60000), done=True), "cannot be read"),
        (chunk(1 << 15 | 1, struct.pack(">IH", 5, 0), done=False) * 70, "more than 64 errors"),
    ],
    ids=str_of,
)  # fmt: skip
def test_a_reply_to_a_read_that_cannot_be_is_refused_and_the_connection_is_of_no_more_use(said, why):
    with client_of(UP + said) as client:
        with pytest.raises(PeerError, match=why):
            client.read(0, 1024)
        with pytest.raises(PeerError, match="of no more use"):
            client.read(0, 1024)


def test_a_reply_in_pieces_and_in_any_order_is_put_together():
    pieces = data(600, b"b" * 424, False) + chunk(2, struct.pack(">QI", 500, 100), False) + data(0, b"a" * 500, False)
    with client_of(UP + pieces + chunk(0)) as client:
        buffer = memoryview(bytearray(b"z" * 1024))
        client.read(0, 1024, buffer)
        assert bytes(buffer) == b"a" * 500 + bytes(100) + b"b" * 424


@pytest.mark.parametrize(
    ("said", "why"),
    [
        (status((0, 1), (4096, 0)), "extent of 0 bytes"),
        (status((4096, 1), context=8), "for the context 8"),
        (status(), "block status for the context"),
        (chunk(5, bytes(9)), "block status for the context"),
        (status((4096, 1), done=False) + status((4096, 1)), "for the context 7"),
        (status((4096, 1), (4096, 0)), "past the 4096 bytes"),
        (chunk(0), "left out the context"),
        (data(0, b"x"), "chunk of type 1"),
    ],
    ids=str_of,
)
def test_block_status_that_cannot_be_is_refused(said, why):
    with client_of(UP + said) as client, pytest.raises(PeerError, match=why):
        client.extents(CONTEXT)


def test_an_extent_that_says_more_than_was_asked_is_cut_and_one_that_says_less_is_asked_on():
    with client_of(UP + status((512, 0), (1024, 1)) + chunk(5, struct.pack(">III", 7, 9000, 1), cookie=2)) as client:
        assert client.extents(CONTEXT).tolist() == [[0, 512, 0], [512, 3584, 1]]


def test_a_server_that_is_silent_or_trickles_is_left_after_the_time_out(tmp_path):
    with listening(tmp_path / "s") as server:
        with pytest.raises(TimeoutError, match="did not answer in time"):
            NbdClient(tmp_path / "s", timeout=0.05)
        server.close()
    ours, theirs = socket.socketpair()
    stop = threading.Event()

    def trickle():
        for byte in UP + data(0, bytes(4000)):
            if stop.wait(0.001):
                break
            try:
                theirs.sendall(bytes([byte]))
            except BrokenPipeError:  # it has hung up, as it should
                break

    thread = threading.Thread(target=trickle)
    thread.start()
    try:
        with pytest.raises(TimeoutError, match="did not answer in time"):
            NbdClient(ours, "x", [CONTEXT], timeout=0.02)
    finally:
        stop.set()
        thread.join(60)
        theirs.close()


def test_where_nobody_listens_the_error_names_the_path(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        NbdClient(tmp_path / "nowhere")
    with pytest.raises(TypeError, match="path of a Unix socket"):
        NbdClient(7)
    with pytest.raises(ValueError, match="timeout is 0"):
        NbdClient(tmp_path / "nowhere", timeout=0)
    with pytest.raises(ValueError, match="at most 4096"):
        NbdClient(tmp_path / "nowhere", "x" * 5000)
    with pytest.raises(ValueError, match="asked for once"):
        NbdClient(tmp_path / "nowhere", contexts=[CONTEXT, CONTEXT])
