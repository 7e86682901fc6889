"""dirtylog's C API against dirty bitmaps in C and Rust: ``python -m benchmarks.peers.races``.

Each pair is measured alone and in turn, by a stopwatch in C. A figure is how many times as long the peer took: above 1,
dirtylog is faster. A peer whose compiler is not there is left out.
"""

import argparse
import ctypes
import shutil
import statistics
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import dirtylog as dl
from benchmarks.peers.claims import random_pages
from dirtylog._core import simd_path

HERE = Path(__file__).parent
SIZES = (18, 24, 28)
DENSITIES = (0, 1e-4, 0.01, 0.1, 0.5, 1)
MARKS = 100_000
ROUNDS = 15
API = ["version", "size", "bitmap", "npages", "mark", "mark_range", "mark_pages", "is_dirty", "harvest"]


class Plain(ctypes.Structure):
    """``struct plain``."""

    _fields_ = [("words", ctypes.c_void_p), ("npages", ctypes.c_uint64)]


class Contestant:
    """A bitmap and its functions, as addresses."""

    def __init__(self, name: str, bitmap: Any, functions: dict[str, Any], keeps: Any = None) -> None:
        self.name, self.bitmap, self.functions, self.keeps = name, bitmap, functions, keeps


def libraries(directory: Path) -> dict[str, ctypes.CDLL]:
    """Compile what can be compiled here."""
    c, rust = directory / "races.so", directory / "races_rust.so"
    subprocess.run(["gcc", "-O2", "-shared", "-fPIC", str(HERE / "races.c"), "-o", str(c)], check=True)
    found = {"c": ctypes.CDLL(str(c))}
    for name in ("time_mark", "time_mark_pages", "time_mark_range", "time_take"):
        getattr(found["c"], name).restype = ctypes.c_double
    if shutil.which("rustc"):
        command = ["rustc", "-O", "--crate-type=cdylib", str(HERE / "races.rs"), "-o", str(rust)]
        subprocess.run(command, check=True, cwd=directory)
        found["rust"] = ctypes.CDLL(str(rust))
        found["rust"].rust_new.restype = ctypes.c_void_p
    return found


def ours(npages: int) -> Contestant:
    """Return dirtylog by its table of C functions."""
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    table = pointer(dl._C_API, b"dirtylog._C_API")
    addresses = (ctypes.c_void_p * 8).from_address(table)  # the first holds version and size
    found = dict(zip(API[2:], addresses[1:], strict=True))
    bitmap = dl.DirtyBitmap(npages)
    handle = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object)(found["bitmap"])(bitmap)
    return Contestant("dirtylog", handle, {**found, "take": found["harvest"]}, bitmap)


def peers(npages: int, built: dict[str, ctypes.CDLL]) -> list[Contestant]:
    """Return everybody else."""
    field = []
    for name, ranges, take in (("Linux", "linux_mark_range", "linux_take"), ("QEMU", "qemu_mark_range", "qemu_take")):
        functions = {"mark": "linux_mark", "mark_pages": "linux_mark_pages", "mark_range": ranges, "take": take}
        words = np.zeros(npages // 64, np.uint64)
        bitmap = Plain(words.ctypes.data, npages)
        addresses = {work: getattr(built["c"], function) for work, function in functions.items()}
        field.append(Contestant(name, ctypes.byref(bitmap), addresses, (words, bitmap)))
    if "rust" in built:
        library = built["rust"]
        handle = ctypes.c_void_p(library.rust_new(ctypes.c_uint64(npages)))
        addresses = {work: getattr(library, f"rust_{work}") for work in ("mark", "mark_pages", "mark_range", "take")}
        field.append(Contestant("rust-vmm", handle, addresses))
    return field


def race(one: Contestant, other: Contestant, run: Callable[[Contestant], float]) -> float:
    """Return how many times as long the other took."""
    times: dict[str, list[float]] = {one.name: [], other.name: []}
    for turn in range(ROUNDS + 1):
        for each in (one, other):
            found = run(each)
            if turn:
                times[each.name].append(found)
    return statistics.median(times[other.name]) / statistics.median(times[one.name])


def works(npages: int, clock: ctypes.CDLL) -> dict[str, Callable[[Contestant], float]]:
    """Return what is measured, by name; each leaves the bitmap clean."""
    out = np.zeros(npages // 64, np.uint64)
    marks = np.random.default_rng(npages).integers(0, npages, MARKS)

    def pointer(each: Contestant, work: str) -> Any:
        return ctypes.cast(each.functions[work], ctypes.c_void_p)

    def marking(work: str) -> Callable[[Contestant], float]:
        def run(each: Contestant) -> float:
            numbers = ctypes.c_void_p(marks.ctypes.data)
            timed = getattr(clock, f"time_{work}")
            found = timed(pointer(each, work), as_pointer(each), numbers, ctypes.c_size_t(MARKS))
            clock.time_take(pointer(each, "take"), as_pointer(each), ctypes.c_void_p(out.ctypes.data))
            return float(found)

        return run

    def ranging(each: Contestant) -> float:
        bounds = ctypes.c_uint64(npages // 5), ctypes.c_uint64(npages // 2)
        found = clock.time_mark_range(pointer(each, "mark_range"), as_pointer(each), *bounds)
        clock.time_take(pointer(each, "take"), as_pointer(each), ctypes.c_void_p(out.ctypes.data))
        return float(found)

    def taking(pages: Any) -> Callable[[Contestant], float]:
        def run(each: Contestant) -> float:
            numbers = ctypes.c_void_p(pages.ctypes.data)
            clock.time_mark_pages(pointer(each, "mark_pages"), as_pointer(each), numbers, ctypes.c_size_t(pages.size))
            return float(clock.time_take(pointer(each, "take"), as_pointer(each), ctypes.c_void_p(out.ctypes.data)))

        return run

    found: dict[str, Callable[[Contestant], float]] = {
        "mark, a call each": marking("mark"),
        "mark, one call": marking("mark_pages"),
        "mark a range of half": ranging,
    }
    for density in DENSITIES:
        found[f"take, {density:g} dirty"] = taking(random_pages(npages, density))
    return found


def as_pointer(each: Contestant) -> Any:
    """Return the bitmap as C takes it."""
    return ctypes.c_void_p(each.bitmap) if isinstance(each.bitmap, int) else each.bitmap


def main() -> None:
    """Print one table for each size."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers.races", description=__doc__)
    parser.add_argument("--sizes", nargs="+", type=int, default=SIZES, metavar="BITS", help="2^BITS pages (18 24 28)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="dirtylog-races-") as directory:
        built = libraries(Path(directory))
        print(f"vector path {simd_path()}; times of the peer over those of dirtylog")
        for size in args.sizes:
            mine, others = ours(1 << size), peers(1 << size, built)
            print(f"\n{'2^' + str(size) + ' pages':24}" + "".join(f"{other.name:>10}" for other in others))
            for name, run in works(1 << size, built["c"]).items():
                ratios = [race(mine, other, run) for other in others]
                print(f"{name:24}" + "".join(f"{ratio:>10.2f}" for ratio in ratios), flush=True)


if __name__ == "__main__":
    main()
