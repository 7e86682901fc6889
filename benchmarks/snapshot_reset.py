"""What it costs to put memory back as it was: resetting, beside a fork that ends, mapping again, and restoring.

Run: python -m benchmarks.snapshot_reset [--mib 1024] [--pages 100] [--directory DIR]. One process, in turns.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

import dirtylog as dl
from dirtylog.sinks import snapshot


def timed(work):
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def fork_and_end(write):
    child = os.fork()
    if child == 0:
        write()
        os._exit(0)
    os.waitpid(child, 0)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--pages", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--directory")
    options = parser.parse_args()
    rng = np.random.default_rng(1)
    npages = options.mib * 256
    with tempfile.TemporaryDirectory(dir=options.directory) as name:
        path = Path(name) / "start"
        memory = dl.zeros(options.mib << 20, "uint8")
        memory[::4096] = 1
        snapshot.save(path, memory, sync=False)
        del memory
        ways = {"reset": [], "reset, writing included": [], "restore(only=)": [], "fork and end": [], "map again": []}
        chosen = rng.choice(npages, options.pages, replace=False) * 4096
        with snapshot.open(path) as mapped, dl.track(mapped.array) as tracker:
            array = mapped.array
            # Each process that forks has used its memory: there are page tables to copy.
            array[::4096].sum()

            def write():
                array[chosen] += 1

            def map_again():
                with snapshot.open(path) as other:
                    other.array[chosen] += 1

            for _ in range(options.rounds):
                written = timed(write)
                spent = timed(lambda: mapped.reset(tracker))
                ways["reset"].append(spent)
                ways["reset, writing included"].append(written + spent)
                write()
                ways["restore(only=)"].append(timed(lambda: snapshot.restore(path, out=array, only=tracker)))
                ways["fork and end"].append(timed(lambda: fork_and_end(write)))
                ways["map again"].append(timed(map_again))
            out = np.empty(mapped.nbytes, np.uint8)
        ways["restore"] = [timed(lambda: snapshot.restore(path, out=out)) for _ in range(3)]
    # The least of each is what the work takes; the median has the neighbours on the machine in it.
    least = min(ways["reset"])
    print(
        f"{options.pages} pages of {options.mib} MiB, {tracker.backend}; least and median; reset with its harvest is 1:"
    )
    for way, times in ways.items():
        median = statistics.median(times)
        print(f"{way:24} {min(times) * 1e3:9.2f} ms {median * 1e3:9.2f} ms {min(times) / least:8.1f}")


if __name__ == "__main__":
    main()
