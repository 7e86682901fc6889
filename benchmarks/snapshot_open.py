"""What opening a long chain costs beside the system calls that nobody can do without, and beside restoring it.

Run: python -m benchmarks.snapshot_open [--mib 1024] [--diffs 1000] [--pages 20] [--directory DIR]. Nothing is synced.
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


def resident():
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def make_chain(directory, mib, diffs, pages):
    rng = np.random.default_rng(1)
    memory = dl.zeros(mib << 20, "uint8")
    rows = memory.reshape(-1, 4096)
    rows[:, 0] = 1
    path = directory / "base"
    snapshot.save(path, memory, sync=False)
    for i in range(diffs):
        chosen = np.unique(rng.integers(0, len(rows), pages))
        rows[chosen, 1] += 1
        dirty = dl.DirtyPages.from_indices(chosen, len(rows))
        snapshot.save_diff(directory / f"d{i}", memory, dirty, parent=path, sync=False)
        path = directory / f"d{i}"
    return path


def bare(directory, diffs):
    """Open and read the end of each file, and no more: the least that a look at all of them can cost."""
    for i in range(diffs):
        descriptor = os.open(directory / f"d{i}", os.O_RDONLY)
        os.pread(descriptor, 4096, max(os.fstat(descriptor).st_size - 4096, 0))
        os.close(descriptor)


def processor_time(work):
    start = time.thread_time()
    work()
    return time.thread_time() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--diffs", type=int, default=1000)
    parser.add_argument("--pages", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--directory")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.directory) as name:
        directory = Path(name)
        path = make_chain(directory, options.mib, options.diffs, options.pages)
        opened, least, laid, grown = [], [], [], []
        for _ in range(options.rounds):
            # In turns, so that all meet the same neighbours on the machine.
            least.append(processor_time(lambda: bare(directory, options.diffs)))
            before = resident()
            opened.append(processor_time(lambda: snapshot.open(path).close()))
            grown.append(resident() - before)
            with snapshot.open(path) as mapped:
                laid.append(processor_time(lambda m=mapped: m.array))
        restored = processor_time(lambda: snapshot.restore(path))
        ratio = statistics.median(a / b for a, b in zip(opened, least, strict=True))
        times = restored / min(opened)
        print(
            f"{options.diffs} diffs over {options.mib} MiB: opened in {min(opened) * 1e3:.1f} ms of processor time, "
            f"{ratio:.2f} times the bare system calls; resident memory grew by {max(grown) / 2**20:.1f} MiB; "
            f"laid out at the first use in {min(laid) * 1e3:.0f} ms; restoring takes {times:.0f} times as long"
        )


if __name__ == "__main__":
    main()
