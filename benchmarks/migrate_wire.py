"""How much of a line a migration uses, for random pages and for pages that changed a little, beside bare sockets.

Run: python -m benchmarks.migrate_wire [--mib 256] [--turns 5] [--channels 1 2]. Two processes on loopback TCP, in
turns: bare `sendall` and `recv_into` of a MiB at once; a first round of random pages, into memory that is there and
into new memory; and rounds in which 64 bytes of each page changed; all of that over each number of channels. A ratio is
page bytes per second over what the bare sockets took just before. At last with postcopy: how long after the pause the
copy has read its first byte, in the middle of the memory, and the rate at which the rest comes.
"""

import argparse
import os
import socket
import statistics
import struct
import time
from typing import Any

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


class Ends:
    """A child that does something with its end of a connection; a context manager that yields this end."""

    def __init__(self, there):
        self.server = socket.create_server(("127.0.0.1", 0))
        self.child = os.fork()
        if not self.child:
            with self.connect() as sock:
                there(sock, self.connect)
            os._exit(0)

    def connect(self):
        sock = socket.create_connection(self.server.getsockname())
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock

    def accept(self):
        sock, _ = self.server.accept()
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock

    def __enter__(self):
        self.sock = self.accept()
        return self.sock

    def __exit__(self, *_):
        self.sock.close()
        self.server.close()
        os.waitpid(self.child, 0)


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


def receiver(nbytes):
    """Return what receives, into so many bytes that are there already; 0: into new memory."""
    # Filled after the fork: of what is shared each page would be copied when it is written.
    return lambda sock, another: receive(sock, out=np.ones(nbytes, np.uint8) if nbytes else None, another=another)


def observers(npages):
    bitmap = DirtyBitmap(npages)
    log = DirtyLog()
    log.attach(bitmap)
    return bitmap, log.observer("migration")


def first_round(memory, there, channels):
    """Return the bytes per second of the first round."""
    ends = Ends(receiver(there))
    how = {"delta_cache": 0, "policy": Policy(downtime=1e9), "channels": channels, "another": ends.accept}
    with ends as sock:
        return send(sock, memory, observers(len(memory) // 4096)[1], **how).rounds[0].bandwidth


def later_rounds(memory, there, channels):
    """Return the bytes per second of rounds in which each page changed a little."""
    bitmap, observer = observers(len(memory) // 4096)
    scribbling: Any = Scribbling(observer, memory, 4)
    scribbling.bitmap = bitmap
    ends = Ends(receiver(there))
    policy = Policy(downtime=0.0, max_rounds=4, force=True)
    with ends as sock:
        result = send(
            sock, memory, scribbling, delta_cache=len(memory), policy=policy, channels=channels, another=ends.accept
        )
    again = result.rounds[1:4]
    assert all(each.delta_pages == each.pages for each in again)
    return statistics.median(each.bandwidth for each in again)


def first_touch(memory):
    """Return the seconds from the pause until a copy has read a page, and the bytes per second of all of them."""
    here, there = os.pipe()

    def receiving(sock, _):
        def start(copy):
            copy[len(copy) // 2] += 1
            # One clock for both processes.
            os.write(there, struct.pack("d", time.monotonic()))

        receive(sock, start=start, postcopy=True)

    paused = []
    with Ends(receiving) as sock:
        observer = observers(len(memory) // 4096)[1]
        result = send(sock, memory, observer, postcopy=0, pause=lambda: paused.append(time.monotonic()))
        (touched,) = struct.unpack("d", os.read(here, 8))
    for end in (here, there):
        os.close(end)
    return touched - paused[-1], result.rounds[-1].bandwidth


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=256)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--channels", type=int, nargs="+", default=[1, 2])
    options = parser.parse_args()
    nbytes = options.mib << 20
    memory = np.random.default_rng(0).integers(0, 256, nbytes, np.uint8)
    found = {}

    def note(name, value, raw):
        found.setdefault(name, []).append((value, value / raw))

    for _ in range(options.turns):
        for channels in options.channels:
            for name, measure, there in (
                ("random pages", first_round, nbytes),
                ("random pages, new memory", first_round, 0),
                ("64 bytes of each page", later_rounds, nbytes),
            ):
                with Ends(lambda sock, _: raw_receiver(sock, nbytes)) as sock:
                    raw = nbytes / raw_sender(sock, memory)
                note("bare sockets", raw, raw)
                note(f"{name}, {channels} channels", measure(memory, there, channels), raw)
    print(f"{options.mib} MiB, {options.turns} turns: median MiB of pages per second, and the median and best ratio")
    for name, values in found.items():
        rates, ratios = zip(*values, strict=True)
        print(
            f"{name:38} {statistics.median(rates) / (1 << 20):9.0f} {statistics.median(ratios):7.2f} {max(ratios):7.2f}"
        )
    touches, rates = zip(*(first_touch(memory) for _ in range(options.turns)), strict=True)
    middle, worst = 1e3 * statistics.median(touches), 1e3 * max(touches)
    print(f"postcopy: first page {middle:.1f} ms after the pause, worst {worst:.1f}")
    print(f"postcopy: {statistics.median(rates) / (1 << 20):.0f} MiB per second in the background")


if __name__ == "__main__":
    main()
