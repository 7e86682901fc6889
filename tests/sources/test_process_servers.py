"""Programs as they are shipped, watched from outside: what they write is seen, and they never notice."""

import shutil
import socket
import subprocess
import time

import numpy as np
import pytest

from .test_process import attach


@pytest.fixture
def redis(tmp_path):
    """A redis-server on a Unix socket, and a way to talk to it."""
    program = shutil.which("redis-server")
    if program is None:
        pytest.skip("redis-server is not installed")
    where = tmp_path / "redis.sock"
    command = [program, "--port", "0", "--unixsocket", str(where), "--save", "", "--dir", str(tmp_path)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(30)
    with server, client:
        try:
            while client.connect_ex(str(where)):
                assert server.poll() is None
                time.sleep(0.005)  # until it listens: it says so nowhere else

            def ask(*words):
                parts = [str(word).encode() if not isinstance(word, bytes) else word for word in words]
                line = b"*%d\r\n" % len(parts) + b"".join(b"$%d\r\n%b\r\n" % (len(part), part) for part in parts)
                client.sendall(line)
                return client.recv(1 << 20)

            ask.pid = server.pid
            yield ask
        finally:
            server.terminate()


def test_a_set_of_redis_shows_as_the_few_pages_that_it_writes(redis):
    redis("SET", "padding", b"x" * (64 << 20))
    assert redis("SET", "key", b"a" * 100) == b"+OK\r\n"
    with attach(redis.pid) as process:
        total = sum(region.npages for region in process.regions)
        assert total > 16384
        process.harvest()
        redis("SET", "key", b"b" * 100)
        dirty = process.harvest()
        assert 1 <= dirty.count <= 100
        # The value is in those pages.
        assert b"b" * 100 in process.read(dirty).tobytes()
    assert redis("GET", "key") == b"$100\r\n" + b"b" * 100 + b"\r\n"


def test_memory_of_redis_is_rebuilt_from_what_was_written(redis):
    """A copy that takes only the dirty pages of a hundred harvests equals the memory at the end."""
    redis("SET", "filler", b"z" * (4 << 20))
    with attach(redis.pid, spare=1 << 14) as process:
        copy = {}

        def take(dirty):
            copy.update(zip(dirty.indices().tolist(), process.read(dirty), strict=True))

        everything = [np.arange(r.first_page, r.first_page + r.npages) for r in process.regions]
        take(type(process.harvest()).from_indices(np.concatenate(everything), process.npages))
        for i in range(100):
            redis("SET", f"key:{i % 37}", b"%d" % i * (i * 50))
            take(process.harvest())
        frozen = type(process.peek()).from_indices(sorted(copy), process.npages)
        memory = process.read(frozen)
        late = set(process.harvest().indices().tolist())
        wrong = [
            page for page, now in zip(frozen, memory, strict=True) if page not in late and (copy[page] != now).any()
        ]
    assert wrong == []
    assert redis("GET", "key:22").startswith(b"$9600\r\n")
