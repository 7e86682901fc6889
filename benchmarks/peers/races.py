"""dirtylog's C API against dirty bitmaps in C and Rust: ``python -m benchmarks.peers.races``.

Each pair is measured alone and in turn, by a stopwatch in C. A figure is how many times as long the peer took: above 1,
dirtylog is faster. A peer whose compiler or library is not there is left out, and said.
"""

import argparse
import ctypes
import ctypes.util
import functools
import itertools
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

import dirtylog as dl
from benchmarks.peers.claims import VARIANTS, random_pages
from dirtylog._core import simd_path

HERE = Path(__file__).parent
SIZES = (18, 24, 28)
DENSITIES = (0, 1e-4, 0.01, 0.1, 0.5, 1)
MARKS = 100_000
# Turns of each pair: so many, but no more than these seconds, once there have been a few.
ROUNDS, FEW_ROUNDS, SECONDS = 15, 5, 2.0
# Times over that a work is done between two ticks where it changes nothing.
AGAIN = 16
API = (
    *("version and size", "bitmap", "npages", "mark", "mark_range", "mark_pages", "is_dirty", "take", "take_quiescent"),
    *("count", "take_pages"),
)
WORKS = ("mark", "mark_pages", "mark_range", "take", "take_pages", "count", "fill")
# In the order of the struct of races_roaring.c.
CROARING = ("create", "add", "add_many", "add_range_closed", "clear", "get_cardinality", "to_uint32_array", "overwrite")


class Plain(ctypes.Structure):
    """``struct plain``."""

    _fields_ = [("words", ctypes.c_void_p), ("npages", ctypes.c_uint64)]


class Contestant:
    """A bitmap and its functions, as addresses; `numbers` is the type of its page numbers."""

    def __init__(
        self, name: str, bitmap: Any, functions: dict[str, Any], keeps: Any = None, numbers: Any = np.int64
    ) -> None:
        self.name, self.bitmap, self.functions, self.keeps, self.numbers = name, bitmap, functions, keeps, numbers

    def fill(self, words: Any) -> None:
        """Make these words of a bitmap that is clean."""
        if isinstance(self.keeps, dl.DirtyBitmap):
            self.keeps.merge(words)
        else:
            self.functions["fill"](self.bitmap, ctypes.c_void_p(words.ctypes.data))


class Course:
    """What the races are run on: the stopwatch, memory to write to, pages to mark."""

    def __init__(self, npages: int, clock: ctypes.CDLL) -> None:
        self.npages, self.clock = npages, clock
        self.out = np.zeros(npages + 64, np.int64)
        self.marks = {
            kind: np.random.default_rng(npages).integers(0, npages, MARKS).astype(kind)
            for kind in (np.int64, np.uint32)
        }

    def time(self, each: Contestant, work: str, *arguments: Any) -> float:
        """Return nanoseconds."""
        function = ctypes.cast(each.functions[work], ctypes.c_void_p)
        return float(getattr(self.clock, f"time_{work}")(function, each.bitmap, *arguments))

    def mark(self, each: Contestant, work: str) -> float:
        marks = self.marks[each.numbers if work == "mark_pages" else np.int64]
        found = self.time(each, work, ctypes.c_void_p(marks.ctypes.data), ctypes.c_size_t(MARKS))
        self.clean(each)
        return found

    def cycle(self, each: Contestant) -> float:
        marks = self.marks[each.numbers]
        marked = self.time(each, "mark_pages", ctypes.c_void_p(marks.ctypes.data), ctypes.c_size_t(MARKS))
        return marked + self.take_pages(each)

    def mark_range(self, each: Contestant) -> float:
        found = self.time(each, "mark_range", ctypes.c_uint64(self.npages // 5), ctypes.c_uint64(self.npages // 2))
        self.clean(each)
        return found

    def take(self, each: Contestant, again: int = 1) -> float:
        return self.time(each, "take", ctypes.c_void_p(self.out.ctypes.data), ctypes.c_size_t(again))

    def take_pages(self, each: Contestant, again: int = 1) -> float:
        room = ctypes.c_size_t(self.npages + 1)
        return self.time(each, "take_pages", ctypes.c_void_p(self.out.ctypes.data), room, ctypes.c_size_t(again))

    def count(self, each: Contestant, again: int = 1) -> float:
        found = self.time(each, "count", ctypes.c_size_t(again))
        self.clean(each)
        return found

    def clean(self, each: Contestant) -> None:
        (self.take if "take" in each.functions else self.take_pages)(each)

    def check(self, field: list[Contestant]) -> None:
        """See that all of them find what was marked, whichever way it was."""
        pages = np.unique(self.marks[np.int64])
        dirty = dl.DirtyPages.from_indices(pages, self.npages)
        half = dl.DirtyPages.from_runs([(self.npages // 5, self.npages // 2)], self.npages)
        for each in field:
            numbers, words = self.out.view(each.numbers), self.out.view(np.uint64)
            each.fill(dirty.words)
            self.take_pages(each)
            right = [np.array_equal(numbers[: pages.size], pages)]
            if "take" in each.functions:
                for mark, wanted in ((self.mark_range, half), (lambda each: self.mark(each, "mark_pages"), dirty)):
                    mark(each)  # and cleans, to words
                    right.append(np.array_equal(words[: wanted.words.size], wanted.words))
            if not all(right):
                raise AssertionError(f"{each.name} does not find what was marked")


def croaring() -> tuple[ctypes.CDLL, str] | None:
    """Return CRoaring, as pyroaring ships it or as the system has it, and its version."""
    try:
        import pyroaring

        return ctypes.CDLL(pyroaring.__file__), f"CRoaring {pyroaring.__croaring_version__}, of pyroaring"
    except (ImportError, AttributeError, OSError):
        name = ctypes.util.find_library("roaring")
        return (ctypes.CDLL(name), f"CRoaring of the system, {name}") if name else None


def libraries(directory: Path) -> dict[str, ctypes.CDLL]:
    """Compile what can be compiled here."""
    c, rust = directory / "races.so", directory / "races_rust.so"
    x86 = platform.machine() == "x86_64"
    sources = [str(HERE / f"races{part}.c") for part in ("", "_hbitmap", "_roaring")]
    # Linux counts bits by the instruction where there is one; all the others are given it as well.
    counting = ["-mpopcnt"] if x86 else []
    subprocess.run(["gcc", "-O2", *counting, "-shared", "-fPIC", *sources, "-o", str(c)], check=True)
    found = {"c": ctypes.CDLL(str(c))}
    for name in ("hbitmap_new", "roaring_new"):
        getattr(found["c"], name).restype = ctypes.c_void_p
    for name in WORKS[:-1]:
        getattr(found["c"], f"time_{name}").restype = ctypes.c_double
    if shutil.which("rustc"):
        counting = ["-C", "target-feature=+popcnt"] if x86 else []
        command = ["rustc", "-O", *counting, "--crate-type=cdylib", str(HERE / "races.rs"), "-o", str(rust)]
        subprocess.run(command, check=True, cwd=directory)
        found["rust"] = ctypes.CDLL(str(rust))
        found["rust"].rust_new.restype = ctypes.c_void_p
    else:
        print("left out: rust-vmm, there is no rustc", file=sys.stderr)
    if library := croaring():
        found["croaring"] = library[0]
        table = (ctypes.c_void_p * (len(CROARING) + 1))()
        for i, name in enumerate((*CROARING, "to_bitset")):
            if function := getattr(library[0], f"roaring_bitmap_{name}", None):
                table[i] = ctypes.cast(function, ctypes.c_void_p)
        found["c"].roaring_open(table)
        print(library[1], file=sys.stderr)
    else:
        print("left out: CRoaring, there is neither pyroaring nor libroaring", file=sys.stderr)
    return found


def ours(npages: int) -> Contestant:
    """Return dirtylog by its table of C functions."""
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    table = pointer(dl._C_API, b"dirtylog._C_API")
    found: dict[str, Any] = dict(zip(API, (ctypes.c_void_p * len(API)).from_address(table), strict=True))
    bitmap = dl.DirtyBitmap(npages)
    handle = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object)(found["bitmap"])(bitmap)
    return Contestant("dirtylog", ctypes.c_void_p(handle), found, bitmap)


def peers(npages: int, built: dict[str, ctypes.CDLL]) -> list[Contestant]:
    """Return everybody else."""

    def functions(library: str, prefix: str, **others: str) -> dict[str, Any]:
        return {work: getattr(built[library], others.get(work, f"{prefix}_{work}")) for work in WORKS}

    def made(name: str, library: str, prefix: str, numbers: Any = np.int64) -> Contestant:
        handle = getattr(built[library], f"{prefix}_new")(ctypes.c_uint64(npages))
        return Contestant(name, ctypes.c_void_p(handle), functions(library, prefix), numbers=numbers)

    field = []
    shared = {"mark": "linux_mark", "mark_pages": "linux_mark_pages", "count": "plain_count", "fill": "plain_fill"}
    for name in ("Linux", "QEMU"):
        words = np.zeros(npages // 64, np.uint64)
        bitmap = Plain(words.ctypes.data, npages)
        found = functions("c", name.lower(), **shared)
        field.append(Contestant(name, ctypes.byref(bitmap), found, (words, bitmap)))
    if "rust" in built:
        field.append(made("rust-vmm", "rust", "rust"))
    field.append(made("hbitmap", "c", "hbitmap"))
    if "croaring" in built:
        field.append(made("CRoaring", "c", "roaring", np.uint32))
        if not hasattr(built["croaring"], "roaring_bitmap_to_bitset"):
            del field[-1].functions["take"]
    return field


def race(one: Contestant, other: Contestant, run: Callable[[Contestant], float]) -> tuple[float, float]:
    """Return the median nanoseconds of the two."""
    times: dict[str, list[float]] = {one.name: [], other.name: []}
    for turn in range(ROUNDS + 1):
        if turn > FEW_ROUNDS and sum(map(sum, times.values())) > SECONDS * 1e9:
            break
        for each in (one, other):
            found = run(each)
            if turn:
                times[each.name].append(found)
    return statistics.median(times[one.name]), statistics.median(times[other.name])


def bitmaps(npages: int, density: float) -> Iterator[Any]:
    """Return words to fill a bitmap with, in turn: a small one gets others each time, as in the claims."""
    pages = random_pages(npages, density)
    turns = VARIANTS if npages <= 1 << 20 and 0 < density < 1 else 1

    def words(turn: int) -> Any:
        if density >= 1:
            return np.full(npages // 64, np.uint64(2**64 - 1))
        return dl.DirtyPages.from_indices(np.sort((pages + 4099 * turn) % npages), npages).words

    return itertools.cycle([words(turn) for turn in range(turns)])


def works(course: Course) -> Iterator[tuple[str, str, Callable[[Contestant], float]]]:
    """Yield what is measured: its name, its function, and how; each leaves the bitmap clean."""
    yield "mark, a call each", "mark", lambda each: course.mark(each, "mark")
    yield "mark, one call", "mark_pages", lambda each: course.mark(each, "mark_pages")
    yield "mark a range of half", "mark_range", course.mark_range
    yield "mark, one call, to numbers", "take_pages", course.cycle

    def filled(turns: Iterator[Any], run: Callable[..., float], again: int, each: Contestant) -> float:
        each.fill(next(turns))
        return run(each, again)

    for density in DENSITIES:
        turns = bitmaps(course.npages, density)
        for name, work in (("to words", "take"), ("to numbers", "take_pages"), ("count", "count")):
            again = AGAIN if density == 0 or (work == "count" and course.npages < 1 << 28) else 1
            run = functools.partial(filled, turns, getattr(course, work), again)
            yield f"{name}, {density:g} dirty", work, run


def readable(nanoseconds: float) -> str:
    for unit in ("ns", "µs"):
        if nanoseconds < 1000:
            return f"{nanoseconds:.3g} {unit}"
        nanoseconds /= 1000
    return f"{nanoseconds:,.3g} ms" if nanoseconds < 1000 else f"{nanoseconds:,.0f} ms"


def main() -> None:
    """Print one table for each size."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers.races", description=__doc__)
    parser.add_argument("--sizes", nargs="+", type=int, default=SIZES, metavar="BITS", help="2^BITS pages (18 24 28)")
    parser.add_argument("--only", default="", metavar="WORK", help="works whose name begins so")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="dirtylog-races-") as directory:
        built = libraries(Path(directory))
        print(f"vector path {simd_path()}; times of the peer over those of dirtylog")
        for size in args.sizes:
            mine, others = ours(1 << size), peers(1 << size, built)
            names = (f"{other.name:>9}" for other in others)
            print(f"\n| {'2^' + str(size) + ' pages':26} | dirtylog | " + " | ".join(names) + " |")
            print("|---|" + "---:|" * (len(others) + 1))
            course = Course(1 << size, built["c"])
            course.check([mine, *others])
            for name, work, run in works(course):
                if not name.startswith(args.only):
                    continue
                found = [race(mine, other, run) if work in other.functions else None for other in others]
                cells = [f"{pair[1] / pair[0]:>9.2f}" if pair else f"{'-':>9}" for pair in found]
                own = statistics.median(pair[0] for pair in found if pair)
                print(f"| {name:26} | {readable(own):>8} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
