"""How much of a line a migration uses, for random pages and for pages that changed a little, beside bare sockets.

Run: python -m benchmarks.migrate_wire [--mib 256] [--turns 5]. Two processes on loopback TCP, in turns: bare `sendall`
and `recv_into` of a MiB at once; a first round of random pages; and rounds in which 64 bytes of each page changed.
A ratio is page bytes per second over what the bare sockets took just before.
"""

import argparse
import os
import socket
import statistics
import time

import numpy as np

from dirtylog import DirtyBitmap, DirtyLog
from dirtylog.sinks.migrate import Policy, receive, send

CHUNK = 1 << 20


def raw_receiver(sock, nbytes):
    buffer = memoryview(bytearray(CHUNK))
    while nbytes:
        nbytes -= sock.recv_into(buffer[: min(nbytes, CHUNK)])
    sock.sendall(b"!")


def raw_sender(sock, memory):
    view = memoryview(memory)
    begin = time.perf_counter()
    for at in range(0, len(view), CHUNK):
        sock.sendall(view[at : at + CHUNK])
    sock.recv(1)
    return time.perf_counter() - begin


def pair(there):
    """Connect to a child that does something with its end; return this end and the child."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        child = os.fork()
        if not child:
            sock = socket.create_connection(server.getsockname())
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            there(sock)
            os._exit(0)
        sock, _ = server.accept()
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock, child


class Scribbling:
    """An observer before whose collects 64 bytes of each page change."""

    def __init__(self, observer, memory, rounds):
        self.observer, self.memory, self.left = observer, memory.reshape(-1, 4096), rounds
        self.npages, self.page_size, self.put_back = observer.npages, observer.page_size, observer.put_back
        self.bitmap = None

    def collect(self):
        # The first one is before the first round.
        if 0 < self.left < 4:
            self.memory[:, 1000:1064] += 1
            self.bitmap.fill()
        self.left -= 1
        return self.observer.collect()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=256)
    parser.add_argument("--turns", type=int, default=5)
    options = parser.parse_args()
    nbytes = options.mib << 20
    memory = np.random.default_rng(0).integers(0, 256, nbytes, np.uint8)
    found = {"bare sockets": [], "random pages": [], "64 bytes of each page": []}
    ratios = {name: [] for name in found}
    for _ in range(options.turns):
        sock, child = pair(lambda sock: raw_receiver(sock, nbytes))
        with sock:
            raw = nbytes / raw_sender(sock, memory)
        os.waitpid(child, 0)
        sock, child = pair(receive)
        bitmap = DirtyBitmap(nbytes // 4096)
        log = DirtyLog()
        log.attach(bitmap)
        observer = Scribbling(log.observer("migration"), memory, 4)
        observer.bitmap = bitmap
        policy = Policy(downtime=0.0, max_rounds=4, force=True)
        with sock:
            first = send(sock, memory, log.observer("other"), delta_cache=0, policy=Policy(downtime=1e9))
        os.waitpid(child, 0)
        sock, child = pair(receive)
        with sock:
            result = send(sock, memory, observer, delta_cache=nbytes, policy=policy)
        os.waitpid(child, 0)
        again = [each.bandwidth for each in result.rounds[1:4]]
        assert all(each.delta_pages == each.pages for each in result.rounds[1:4])
        for name, value in zip(found, (raw, first.rounds[0].bandwidth, statistics.median(again)), strict=True):
            found[name].append(value)
            ratios[name].append(value / raw)
    print(f"{options.mib} MiB, {options.turns} turns: median MiB of pages per second, and the median and best ratio")
    for name, values in found.items():
        ratio = ratios[name]
        print(
            f"{name:24} {statistics.median(values) / (1 << 20):9.0f} {statistics.median(ratio):7.2f} {max(ratio):7.2f}"
        )


if __name__ == "__main__":
    main()
