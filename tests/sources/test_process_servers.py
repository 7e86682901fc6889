"""Programs as they are shipped, watched from outside: what they write is seen, and they never notice."""

import os
import shutil
import signal
import socket
import subprocess
import time

import numpy as np
import pytest

from dirtylog.sinks import snapshot
from dirtylog.sinks.snapshot.processes import diff_process, process_of, save_process

from .test_process import PAGE, attach

pytestmark = pytest.mark.usefixtures("plain_programs")


@pytest.fixture(scope="module")
def redis(tmp_path_factory):
    """A redis-server on a Unix socket, and a way to talk to it."""
    program = shutil.which("redis-server")
    if program is None:
        pytest.skip("redis-server is not installed")
    tmp_path = tmp_path_factory.mktemp("redis")
    where = tmp_path / "redis.sock"
    command = [program, "--port", "0", "--unixsocket", str(where), "--save", "", "--dir", str(tmp_path)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, env={**os.environ, "LD_PRELOAD": ""})
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


def test_a_snapshot_of_redis_is_what_its_memory_is_while_it_stands_still(redis, tmp_path):
    """Held still by SIGSTOP as well, so that it can be compared after the snapshot has let it go."""
    parent, full = None, 0
    for number in range(3):
        redis("SET", f"snapshot:{number}", b"%d" % number * 100_000)
        os.kill(redis.pid, signal.SIGSTOP)
        try:
            path = tmp_path / str(number)
            if parent is None:
                about = save_process(path, redis.pid, freeze="ptrace", sync=False)
            else:
                about = diff_process(path, redis.pid, parent=parent, freeze="ptrace", sync=False)
                assert about.count < full / 2, "a diff holds what has changed"
            restored = snapshot.restore(path)
            regions = process_of(about)[1]
            assert {"stack", "file", "anonymous"} <= {region.kind for region in regions}
            with open(f"/proc/{redis.pid}/mem", "rb", buffering=0) as memory:
                for region in regions:
                    now = np.frombuffer(os.pread(memory.fileno(), region.npages * PAGE, region.start), np.uint8)
                    kept = restored[region.first_page * PAGE :][: len(now)]
                    assert len(now) == region.npages * PAGE
                    assert (now == kept).all(), region
        finally:
            os.kill(redis.pid, signal.SIGCONT)
        full, parent = (full if parent else about.count), path
    assert redis("PING") == b"+PONG\r\n"


def test_a_set_of_redis_shows_as_the_few_pages_that_it_writes(redis):
    # Redis makes the value itself: the buffer of a long request is given back when its client has been idle for two
    # seconds, which on a busy machine may be between the harvests.
    redis("SETRANGE", "padding", str((64 << 20) - 1), b"x")
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
