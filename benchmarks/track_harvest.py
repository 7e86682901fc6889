"""What a harvest of tracked memory costs, against the bare PAGEMAP_SCAN loop in C and against comparing.

Run ``python -m benchmarks.track_harvest``; it takes a C compiler and 3 GiB of memory for the default of 1 GiB.
Every round writes the same pages and times a harvest or a bare loop, in turns, on the same memory. The loop is timed by
itself and, as a harvest is, from Python: an ioctl leaves caches and the TLB cold for whatever comes next.
"""

import argparse
import ctypes
import mmap
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np

import dirtylog as dl
from dirtylog.sources.memory import _tracking

PAGE = 4096


def bare_loop(directory, of="/proc/self/pagemap"):
    """Compile the C loop and return it as a function of the range: (seconds, pages)."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise SystemExit("no C compiler on PATH (cc, gcc)")
    library = Path(directory) / "bare_scan.so"
    source = Path(__file__).with_name("bare_scan.c")
    subprocess.run([compiler, "-O2", "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    scan = ctypes.CDLL(str(library)).bare_scan
    scan.restype = ctypes.c_double
    scan.argtypes = [ctypes.c_int, ctypes.c_uint64, ctypes.c_uint64, ctypes.POINTER(ctypes.c_uint64)]
    pagemap = os.open(of, os.O_RDONLY | os.O_CLOEXEC)

    def run(start, end):
        pages = ctypes.c_uint64()
        seconds = scan(pagemap, start, end, ctypes.byref(pages))
        return seconds, pages.value

    return run


def measure(array, pages, bare, rounds):
    """Return the median seconds of the bare loop, by itself and from Python, and of a harvest, for the same writes."""
    start = array.ctypes.data
    ours, theirs, from_python = [], [], []
    with dl.track(array, "userfaultfd") as tracker:
        for number in range(2 * rounds):
            array[pages * PAGE] = number % 250
            # Two of a kind in a row, so that each runs as often after itself as after the other.
            before = time.perf_counter()
            if number % 4 < 2:
                seconds, found = bare(start, start + array.nbytes)
                from_python.append(time.perf_counter() - before)
                assert found == len(pages), (found, len(pages))
                theirs.append(seconds)
            else:
                answer = tracker.harvest()
                ours.append(time.perf_counter() - before)
                assert answer.count == len(pages)
    return statistics.median(theirs), statistics.median(from_python), statistics.median(ours)


def measure_unaligned(memory, rounds):
    """Return the median seconds of a harvest of memory that begins on a page, and of memory that begins inside one.

    Each writes 1 % of its pages, in turns. I9: a page of the second is not one of the address space.
    """
    offset = 720  # where malloc puts a large array of doubles
    taken = {}
    for begin in (0, offset):
        array = memory[begin : memory.size - PAGE + begin]
        npages = array.size // PAGE
        pages = np.sort(np.random.default_rng(7).choice(npages, npages // 100, replace=False))
        # The last byte of a page of the address space, wherever the array begins.
        taken[begin] = (array, pages * PAGE + PAGE - 1 - begin, [])
    for number in range(rounds):
        for begin, (array, places, seconds) in taken.items():
            with dl.track(array, "userfaultfd") as tracker:
                for again in range(5):
                    array[places] = (number + again) % 250
                    before = time.perf_counter()
                    answer = tracker.harvest()
                    seconds.append(time.perf_counter() - before)
                    assert len(places) <= answer.count <= (2 if begin else 1) * len(places)
    return tuple(statistics.median(seconds) for _, _, seconds in taken.values())


def measure_compare(array, pages):
    """Return the median seconds of three harvests by comparing."""
    taken = []
    with dl.track(array, "compare") as tracker:
        for number in range(3):
            array[pages * PAGE] = 251 + number
            before = time.perf_counter()
            answer = tracker.harvest()
            taken.append(time.perf_counter() - before)
            assert answer.count == len(pages)
    return statistics.median(taken)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mib", type=int, default=1024, help="size of the array")
    parser.add_argument("--rounds", type=int, default=101)
    options = parser.parse_args()
    if refusal := _tracking.probe("userfaultfd"):
        raise SystemExit(f"userfaultfd: {refusal}")
    size = options.mib << 20
    print(f"{options.mib} MiB, medians of {options.rounds} rounds, milliseconds")
    print(
        f"{'memory':12} {'written':>8} {'C loop':>9} {'harvest':>9} {'ratio':>6} {'from Python':>11} "
        f"{'ratio':>6} {'compare':>9} {'times':>6}"
    )
    with tempfile.TemporaryDirectory() as directory:
        bare = bare_loop(directory)
        for huge in (False, True):
            array = dl.empty(size, np.uint8) if huge else np.frombuffer(small_pages(size), np.uint8)
            array[:] = 1
            for share in (0, 0.001, 0.01, 0.1):
                pages = np.sort(np.random.default_rng(7).choice(size // PAGE, int(size // PAGE * share), replace=False))
                rounds = options.rounds if share < 0.01 else max(31, options.rounds // 3)
                theirs, from_python, ours = measure(array, pages, bare, rounds)
                compared = measure_compare(array, pages)
                kind = "huge pages" if huge else "small pages"
                print(
                    f"{kind:12} {share:8.1%} {theirs * 1e3:9.4f} {ours * 1e3:9.4f} {ours / theirs:6.2f} "
                    f"{from_python * 1e3:11.4f} {ours / from_python:6.2f} {compared * 1e3:9.2f} {compared / ours:6.0f}"
                )
            aligned, unaligned = measure_unaligned(array, max(5, options.rounds // 5))
            print(
                f"{kind:12} {0.01:8.1%} from a page {aligned * 1e3:9.4f}, from inside one {unaligned * 1e3:9.4f}: "
                f"ratio {unaligned / aligned:.2f}"
            )
            del array


def small_pages(size):
    """Map memory that no huge page is advised for."""
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    return memory


if __name__ == "__main__":
    main()
