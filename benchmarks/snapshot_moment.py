"""How long writers stand still for a snapshot of one moment: all of a copy, or until a child has the memory.

Run: python -m benchmarks.snapshot_moment [--mib 256] [--directory DIR]. One process, in turns; nothing is synced. The
stall of ``moment="copy"`` is the whole save; that of ``moment="fork"`` ends when the child holds the moment, while the
save goes on. Beside them a copy in memory, which holds a moment too and takes the memory twice, and a bare fork that
ends at once.
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


def fork_and_end():
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)


def main():
    parser = argparse.ArgumentParser(prog="python -m benchmarks.snapshot_moment", description=__doc__)
    parser.add_argument("--mib", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--directory")
    options = parser.parse_args()
    memory = dl.zeros(options.mib << 20, "uint8")
    memory[::512] = 1
    ways = {"moment='copy'": [], "moment='fork', stall": [], "moment='fork', all": [], "a copy": [], "a bare fork": []}
    with tempfile.TemporaryDirectory(dir=options.directory) as name:
        path = Path(name) / "moment"

        def save(moment):
            path.unlink(missing_ok=True)
            said = []
            start = time.perf_counter()
            snapshot.save(
                path, memory, sync=False, moment=moment, progress=lambda *_: said or said.append(time.perf_counter())
            )
            return said[0] - start, time.perf_counter() - start

        target = np.ones_like(memory)
        for _ in range(options.rounds):
            ways["moment='copy'"].append(save("copy")[1])
            # Its first word is that the child has the memory.
            stall, whole = save("fork")
            ways["moment='fork', stall"].append(stall)
            ways["moment='fork', all"].append(whole)
            start = time.perf_counter()
            np.copyto(target, memory)
            ways["a copy"].append(time.perf_counter() - start)
            start = time.perf_counter()
            fork_and_end()
            ways["a bare fork"].append(time.perf_counter() - start)
    stall = statistics.median(ways["moment='fork', stall"])
    print(f"{options.mib} MiB; least, median, and the median beside the stall of a fork:")
    for way, times in ways.items():
        median = statistics.median(times)
        print(f"{way:22} {min(times) * 1e3:9.2f} ms {median * 1e3:9.2f} ms {median / stall:8.1f}")


if __name__ == "__main__":
    main()
