"""What watching a program from outside costs it: how long it stands still, what it loses, and what a look costs.

Run ``python -m benchmarks.attach``; the throughput needs redis-server and redis-benchmark, the bare scan a C compiler.
Everything is taken in turns, in one run: figures of a busy machine are ratios at best.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np

import dirtylog as dl
from benchmarks.track_harvest import bare_loop

PAGE = os.sysconf("SC_PAGE_SIZE")

WRITER = """
import mmap, sys
import numpy as np
memory = mmap.mmap(-1, int(sys.argv[1]), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
memory.madvise(mmap.MADV_NOHUGEPAGE)
array = np.frombuffer(memory, np.uint8)
array[:] = 1
start = array.__array_interface__["data"][0]
places = np.sort(np.random.default_rng(7).choice(len(array) // 4096, int(sys.argv[2]), replace=False)) * 4096
print(start, flush=True)
for line in sys.stdin:
    array[places] += 1
    print(flush=True)
"""


@contextmanager
def writer(nbytes, npages):
    """A program that writes so many pages of its memory when it is told to; and where the memory is."""
    command = [sys.executable, "-c", WRITER, str(nbytes), str(npages)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as program:
        start = int(program.stdout.readline())

        def write():
            program.stdin.write("\n")
            program.stdin.flush()
            program.stdout.readline()

        yield program.pid, start, write
        program.stdin.close()


def stops(rounds):
    """Seconds that a thread of another program stands still for an attachment, round by round."""
    with writer(64 << 20, 1) as (pid, _, _):
        found = []
        for _ in range(rounds):
            with dl.attach(pid) as process:
                found.append(process.stopped)
    return found


def scans(mib, share, rounds, bare):
    """Median seconds of the bare loop in C and of a harvest, over the same memory of another program, in turns."""
    npages = int((mib << 20) // PAGE * share)
    ours, theirs, whole = [], [], []
    with writer(mib << 20, npages) as (pid, start, write):
        end = start + (mib << 20)
        with dl.attach(pid, select=lambda area: area.start < end and start < area.end) as process:
            process.harvest()
            scan = bare(pid)
            region = next(each for each in process.regions if each.start <= start < each.end)
            extra = 0 if (region.start, region.end) == (start, end) else 64
            watch = process._first.watch
            areas = np.array([[region.start, region.end, 0]], np.int64)
            for number in range(3 * rounds):
                write()
                if number % 3 == 0:
                    seconds, found = scan(region.start, region.end)
                    theirs.append(seconds)
                elif number % 3 == 1:
                    before = time.perf_counter()
                    runs, _ = watch.scan(areas, True)
                    ours.append(time.perf_counter() - before)
                    found = int(runs[:, 1].sum())
                else:
                    before = time.perf_counter()
                    found = process.harvest().count
                    whole.append(time.perf_counter() - before)
                assert npages <= found <= npages + extra, (found, npages)
    return [statistics.median(each) for each in (theirs, ours, whole)]


@contextmanager
def redis(directory):
    """A redis-server on a Unix socket, filled."""
    where = Path(directory) / "redis.sock"
    command = ["redis-server", "--port", "0", "--unixsocket", where, "--save", "", "--dir", directory]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as server:
        try:
            while not where.exists():
                time.sleep(0.01)
            throughput(where, 50_000)
            yield server.pid, where
        finally:
            server.terminate()


def throughput(where, requests):
    """Count SETs per second, as redis-benchmark does."""
    command = ["redis-benchmark", "-s", where, "-t", "set", "-n", str(requests), "-r", "100000", "-d", "100", "--csv"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return float(said.splitlines()[-1].split(",")[1].strip('"'))


@contextmanager
def harvesting(pid, per_second):
    """Attached, and harvested so often; detached where that is 0."""
    if not per_second:
        yield
        return
    over = threading.Event()

    def harvest():
        while not over.wait(1 / per_second):
            process.harvest()

    with dl.attach(pid) as process:
        thread = threading.Thread(target=harvest)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mib", type=int, default=512, help="memory to scan")
    parser.add_argument("--rounds", type=int, default=101)
    parser.add_argument("--requests", type=int, default=100_000, help="of redis-benchmark, each time")
    parser.add_argument("--turns", type=int, default=9, help="of detached, 1 and 10 harvests per second")
    options = parser.parse_args()
    found = stops(options.rounds)
    print(f"a stop to attach: median {statistics.median(found) * 1e3:.2f} ms, least {min(found) * 1e3:.2f} ms")
    print(f"\na scan of {options.mib} MiB of another program, medians of {options.rounds}, milliseconds")
    print(f"{'written':>8} {'C loop':>9} {'scan':>9} {'ratio':>6} {'harvest':>9} {'ratio':>6}")
    with tempfile.TemporaryDirectory() as directory:
        for share in (0, 0.001, 0.01, 0.1):
            bare, ours, whole = scans(
                options.mib, share, options.rounds, lambda pid: bare_loop(directory, f"/proc/{pid}/pagemap")
            )
            print(
                f"{share:8.1%} {bare * 1e3:9.4f} {ours * 1e3:9.4f} {ours / bare:6.2f} "
                f"{whole * 1e3:9.4f} {whole / bare:6.2f}"
            )
        if shutil.which("redis-server") is None or shutil.which("redis-benchmark") is None:
            print("\nno redis-server and redis-benchmark on PATH: no throughput")
            return
        rates, prices = {0: [], 1: [], 10: []}, {0: [], 1: [], 10: []}
        with redis(directory) as (pid, where):
            for turn in range(options.turns):
                for per_second in list(rates)[:: 1 if turn % 2 else -1]:
                    with harvesting(pid, per_second):
                        before = time.clock_gettime(~pid << 3 | 2)
                        rates[per_second].append(throughput(where, options.requests))
                        prices[per_second].append((time.clock_gettime(~pid << 3 | 2) - before) / options.requests)
    print(f"\nredis-benchmark, SETs per second, medians of {options.turns} turns of {options.requests:,}")
    for per_second, some in rates.items():
        # Each turn beside its own detached one: what the machine does in between is in both. The server's CPU time says
        # what its first writes to pages cost it, also where other programs have the machine.
        lost = statistics.median(1 - rate / alone for rate, alone in zip(some, rates[0], strict=True))
        dearer = statistics.median(
            price / alone - 1 for price, alone in zip(prices[per_second], prices[0], strict=True)
        )
        name = f"{per_second} harvests per second" if per_second else "detached"
        print(
            f"{name:24} {statistics.median(some):12,.0f}   {lost:7.1%} less than detached, turn by turn; "
            f"{statistics.median(prices[per_second]) * 1e6:6.2f} µs of the server's CPU time each, {dearer:6.1%} more"
        )


if __name__ == "__main__":
    main()
