"""``python -m benchmarks.quiescent``: a harvest while nobody marks beside an ordinary one, in one run, by density.

Then those of the C header, which have no vector code of their own, where all is dirty: as a C compiler makes them, with
and without a summary, and with an instruction that counts bits or without it.
"""

import argparse
import ctypes
import subprocess
import sysconfig
import tempfile
import time
from pathlib import Path

import numpy as np

import dirtylog as dl
from dirtylog._core import simd_path

DENSITIES = (0, 0.001, 0.01, 0.1, 0.5, 1)
HEADER = """
#include "dirtylog/bitmap.h"
uint64_t harvest(uint64_t *words, uint64_t *summary, uint64_t npages, uint64_t *out, int quiescent)
{
    struct dl_bitmap bitmap = {words, summary, npages};
    return quiescent ? dl_harvest_quiescent(&bitmap, out) : dl_harvest(&bitmap, out);
}
"""


def seconds(bitmap: dl.DirtyBitmap, pages: dl.DirtyPages, *, quiescent: bool) -> float:
    """Return what one harvest of these pages takes."""
    bitmap.merge(pages)
    begin = time.perf_counter()
    found = bitmap.harvest(quiescent=quiescent)
    taken = time.perf_counter() - begin
    if found.count != pages.count:
        raise AssertionError(f"{found.count} pages were harvested of {pages.count}")
    return taken


def compiled(directory: str, flags: list[str]) -> ctypes.CDLL:
    """Return the header's harvests as a compiler makes them."""
    source, target = Path(directory, "header.c"), Path(directory, f"header{len(flags)}.so")
    source.write_text(HEADER)
    compiler = sysconfig.get_config_var("CC").split()[0]
    command = [compiler, "-O2", *flags, "-shared", "-fPIC", f"-I{dl.get_include()}", str(source), "-o", str(target)]
    subprocess.run(command, check=True)
    library = ctypes.CDLL(str(target))
    library.harvest.restype = ctypes.c_uint64
    return library


def header_seconds(library: ctypes.CDLL, npages: int, *, summary: bool, rounds: int) -> list[float]:
    """Return what an ordinary and a quiescent harvest of all pages take: the shortest of some rounds, in turn."""
    words, out = dl.zeros(npages // 64, np.uint64), dl.zeros(npages // 64, np.uint64)
    lines = dl.zeros(max(npages // 64 // 512, 1), np.uint64)
    best = [float("inf")] * 2
    for _ in range(rounds):
        for quiescent in (0, 1):
            words[:] = lines[:] = ~np.uint64(0)
            where = [ctypes.c_void_p(each) for each in (words.ctypes.data, lines.ctypes.data if summary else None)]
            into = ctypes.c_void_p(out.ctypes.data)
            begin = time.perf_counter()
            count = library.harvest(*where, ctypes.c_uint64(npages), into, quiescent)
            best[quiescent] = min(best[quiescent], time.perf_counter() - begin)
            if count != npages:
                raise AssertionError(f"{count} pages were harvested of {npages}")
    return best


def main() -> None:
    """Print a row for each size and density: the shortest of some rounds, both ways in turn."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quiescent", description=__doc__)
    parser.add_argument("--rounds", type=int, default=30, help="harvests of each kind (default: 30)")
    options = parser.parse_args()
    print(f"{'pages':>12} {'dirty':>7} {'ordinary':>12} {'quiescent':>12} {'ratio':>6}   ({simd_path()})")
    for npages in (1 << 18, 1 << 21, 1 << 24):
        bitmap, random = dl.DirtyBitmap(npages), np.random.default_rng(1)
        for density in DENSITIES:
            pages = dl.DirtyPages.from_indices(np.flatnonzero(random.random(npages) < density), npages)
            best = [
                min(times)
                for times in zip(
                    *([seconds(bitmap, pages, quiescent=how) for how in (False, True)] for _ in range(options.rounds)),
                    strict=True,
                )
            ]
            ratio = best[0] / best[1]
            print(f"{npages:>12,} {density:>7.1%} {best[0] * 1e6:>9.1f} us {best[1] * 1e6:>9.1f} us {ratio:>6.1f}")
    with tempfile.TemporaryDirectory() as directory:
        for flags in ([], ["-mpopcnt"]):
            library = compiled(directory, flags)
            for summary in (False, True):
                print(" ".join(["the header's, with a summary" if summary else "the header's", *flags]))
                for npages in (1 << 18, 1 << 21, 1 << 24):
                    best = header_seconds(library, npages, summary=summary, rounds=options.rounds)
                    ratio = best[0] / best[1]
                    print(f"{npages:>12,} {1:>7.1%} {best[0] * 1e6:>9.1f} us {best[1] * 1e6:>9.1f} us {ratio:>6.1f}")


if __name__ == "__main__":
    main()
