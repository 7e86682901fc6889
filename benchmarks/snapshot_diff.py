"""What an incremental snapshot costs beside a whole one, and a page copy, and what a save gathers, beside memcpy.

Run: python benchmarks/snapshot_diff.py [--mib 1024] [--directory DIR]. Nothing is synced.
"""

import argparse
import os
import statistics
import tempfile
import time

import numpy as np

from dirtylog import DirtyPages
from dirtylog._bits.copying import copy_extents, gather
from dirtylog.sinks._bytes.extents import WINDOW, PackedExtents
from dirtylog.sinks.snapshot import save, save_diff


def seconds(function, rounds=5):
    taken = []
    for _ in range(rounds):
        start = time.perf_counter()
        function()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def remove(path):
    if os.path.exists(path):
        os.unlink(path)


def compare(directory, memory, dirty):
    base, diff = os.path.join(directory, "base"), os.path.join(directory, "diff")

    def whole():
        remove(base)
        save(base, memory, sync=False)

    def plain():
        with open(os.path.join(directory, "plain"), "wb") as file:
            file.write(memory)

    def incremental():
        remove(diff)
        infos.append(save_diff(diff, memory, dirty, parent=base, sync=False))

    infos = []
    plain()
    written, full = seconds(plain, 3), seconds(whole, 3)
    partial = seconds(incremental)
    print(
        f"{dirty.count / dirty.npages:.1%} dirty: diff {partial * 1e3:7.1f} ms; write() of all "
        f"{written / partial:.1f} times that, save() {full / partial:.1f} times; "
        f"{infos[-1].allocated / dirty.nbytes:.3f} bytes a dirty byte"
    )


def in_windows(copy, total):
    """Copy a window at a time into one buffer, as a save does before it digests and writes it."""
    buffer = np.ones(WINDOW, np.uint8)
    for begin in range(0, total, WINDOW):
        end = min(begin + WINDOW, total)
        copy(begin, end, buffer[: end - begin])


def compare_copy(memory, fraction, rng, rounds=31):
    npages = memory.nbytes // 4096
    target = np.ones_like(memory)
    count = int(npages * fraction)
    copied, gathered = [], []
    for _ in range(rounds):
        # In turns, so that all meet the same neighbours on the machine, and elsewhere in memory each time, so that
        # none finds its bytes in a cache, of which some processors have half a gigabyte.
        dirty = DirtyPages.from_indices(rng.choice(npages, count, replace=False), npages)
        packed = PackedExtents(dirty, memory.nbytes)
        windows = iter(packed.windows())
        block, another = (
            slice(start, start + dirty.nbytes) for start in (rng.integers(npages - count + 1, size=2) * 4096).tolist()
        )

        def straight(begin, end, part, block=another):
            np.copyto(part, memory[block][begin:end])

        def scattered(begin, end, part, windows=windows):
            gather(memory, next(windows)[2], part)

        ways = [
            lambda block=block: np.copyto(target[block], memory[block]),
            lambda packed=packed: copy_extents(memory, target, packed.extents),
            lambda copy=straight, total=packed.total: in_windows(copy, total),
            lambda copy=scattered, total=packed.total: in_windows(copy, total),
        ]
        # Any goes first: what one leaves in the caches and the TLB helps the next.
        taken = {way: seconds(ways[way], 1) for way in rng.permutation(4).tolist()}
        copied.append(taken[0] / taken[1])
        gathered.append(taken[2] / taken[3])
    for what, ratios in (("page copy", copied), ("what a save gathers", gathered)):
        low, middle, high = statistics.quantiles(ratios, n=4)
        print(
            f"{fraction:6.1%} dirty: {what} at {middle:.2f} of memcpy's speed, the median of {rounds} pairs "
            f"(half of them from {low:.2f} to {high:.2f})"
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--directory")
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    memory = rng.integers(0, 256, arguments.mib << 20, np.uint8)
    npages = memory.nbytes // 4096
    with tempfile.TemporaryDirectory(dir=arguments.directory) as directory:
        for fraction in (0.001, 0.01):
            chosen = rng.choice(npages, max(int(npages * fraction), 1), replace=False)
            compare(directory, memory, DirtyPages.from_indices(chosen, npages))
    for fraction in (0.01, 0.1, 0.5):
        compare_copy(memory, fraction, rng)


if __name__ == "__main__":
    main()
