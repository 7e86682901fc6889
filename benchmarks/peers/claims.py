"""What dirtylog claims to be faster than, and by how much: each row measured side by side."""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import os
import subprocess
import sys
import timeit
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

import dirtylog as dl
from benchmarks.peers.contestants import Bitarray, Dirtylog, KernelLoop, Numpy, NumpyViews, Roaring
from benchmarks.peers.native import yardsticks
from benchmarks.peers.timing import side_by_side
from dirtylog._core import simd_path, simd_paths

# Sets of pages that a small bitmap is filled with in turn.
VARIANTS = 16


@dataclass(frozen=True)
class Claim:
    """One row: what was measured, the ratio found and the ratio wanted."""

    work: str
    ratio: float
    wanted: float
    at_least: bool = True
    note: str = ""

    @property
    def met(self) -> bool:
        return self.ratio >= self.wanted if self.at_least else self.ratio <= self.wanted


def random_pages(npages: int, density: float) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Return sorted distinct pages, the same ones every time."""
    if density >= 1:
        return np.arange(npages)
    count = int(npages * density)
    rng = np.random.default_rng(npages + count)
    if density > 0.05:
        return np.flatnonzero(rng.random(npages, np.float32) < density)
    return np.unique(rng.integers(0, npages, count))


def filler(contestant: Any, pages: np.ndarray[Any, np.dtype[np.int64]], npages: int) -> Callable[[], None]:
    """Return what makes a contestant dirty before each round.

    A small bitmap gets other pages from round to round: with the same ones, the branch
    predictor learns them by heart, which it never can outside a benchmark. They are
    prepared beforehand, or making them would empty the caches between two rounds.
    """
    contestant.prepare(pages)
    if npages > 1 << 20 or pages.size == npages:
        return contestant.fill  # type: ignore[no-any-return]
    others = []
    for turn in range(VARIANTS):
        other = copy.copy(contestant)
        other.prepare(np.sort((pages + 4099 * turn) % npages))
        others.append(other.fill)
    turns = itertools.cycle(others)
    return lambda: next(turns)()


def nothing() -> None:
    """Prepare nothing."""


def versus(npages: int, density: float, work: str, peer: type[Any], peer_work: str = "", **limits: Any) -> float:
    """Return how many times as long a peer took for a work as dirtylog, the two alone and in turn."""
    pages = random_pages(npages, density)
    works: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {}
    for kind, of_kind in ((Dirtylog, work), (peer, peer_work or work)):
        contestant = kind(npages)
        works[kind.name] = (filler(contestant, pages, npages), getattr(contestant, of_kind))
    times = side_by_side(works, **limits)
    return times[peer.name] / times[Dirtylog.name]


def harvests() -> Iterator[Claim]:
    npages = 1 << 28
    bitmap = dl.DirtyBitmap(npages)
    loop = KernelLoop(npages)
    empty = side_by_side({"ours": (nothing, bitmap.harvest), "kernel": (nothing, loop.words)}, rounds=51, seconds=2)
    yield Claim("harvest, 2^28 pages, nothing dirty / kernel's loop", empty["kernel"] / empty["ours"], 300)
    found = versus(npages, 1e-5, "numbers", KernelLoop, "words", rounds=51)
    yield Claim("harvest to numbers, 2^28 pages, 0.001 % / kernel's loop alone", found, 50)
    worst = min(
        (versus(1 << size, density, "words", KernelLoop, rounds=31), size, density)
        for size in (18, 24, 28)
        for density in (0, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 0.5, 1)
    )
    yield Claim(
        "harvest to words, the worst of all sizes and densities / kernel's loop",
        worst[0],
        0.95,
        note=f"worst at 2^{worst[1]} pages, {worst[2]:%}",
    )


def strongest(found: dict[str, float]) -> tuple[float, str]:
    """Return the ratio to the fastest of some peers, and which it was."""
    name = min(found, key=lambda name: found[name])
    return found[name], f"the strongest: {name}"


def numbers() -> Iterator[Claim]:
    for density, wanted in ((1e-4, 20), (1e-2, 5), (0.1, 2), (0.5, 1)):
        by_numpy = {peer.name: versus(1 << 24, density, "numbers", peer, rounds=31) for peer in (Numpy, NumpyViews)}
        found, which = strongest(by_numpy)
        yield Claim(f"harvest to numbers, 2^24 pages, {density:g} / numpy", found, wanted, note=which)
        found = versus(1 << 24, density, "numbers", Bitarray, rounds=31)
        yield Claim(f"harvest to numbers, 2^24 pages, {density:g} / {Bitarray.name}", found, 10)


def cycles() -> Iterator[Claim]:
    npages = 1 << 24
    for density in (1e-6, 1e-4, 1e-3, 1e-2, 0.1, 0.5, 1):
        pages = random_pages(npages, density)
        ours, theirs = Dirtylog(npages), Roaring(npages)
        ours.prepare(pages)
        theirs.prepare(pages)

        def cycle(contestant: Any) -> Callable[[], None]:
            def work() -> None:
                contestant.mark()
                contestant.numbers()

            return work

        times = side_by_side({"ours": (nothing, cycle(ours)), "theirs": (nothing, cycle(theirs))})
        yield Claim(f"mark and harvest, 2^24 pages, {density:g} / pyroaring", times["theirs"] / times["ours"], 1)


def extraction() -> Iterator[Claim]:
    npages = 1 << 24
    plain = yardsticks()

    def c_way(words: Any) -> tuple[object, object]:
        out = np.empty(dl.popcount(words) + 64, np.int64)
        return plain.indices(words, out), out

    for density in (0.1, 0.5):
        words = dl.DirtyPages.from_indices(random_pages(npages, density), npages).words.copy()
        if c_way(words)[0] is None:
            continue
        times = side_by_side(
            {"ours": (nothing, lambda words=words: dl.indices(words)), "c": (nothing, lambda words=words: c_way(words))}
        )
        yield Claim(
            f"page numbers from words, 2^24 pages, {density:g}: time over plain C with AVX-512 compress",
            times["ours"] / times["c"],
            1.5,
            at_least=False,
        )
    for density, wanted in ((0.01, 5), (0.5, 2)):
        by_numpy = {}
        for peer in (Numpy, NumpyViews):
            contestant = peer(npages)
            contestant.prepare(random_pages(npages, density))
            works: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
                "ours": (nothing, functools.partial(dl.runs, contestant.source)),
                "peer": (nothing, functools.partial(contestant.runs_of, contestant.source)),
            }
            times = side_by_side(works)
            by_numpy[peer.name] = times["peer"] / times["ours"]
        found, which = strongest(by_numpy)
        yield Claim(f"runs from words, 2^24 pages, {density:g} / numpy", found, wanted, note=which)


def scaling() -> Iterator[Claim]:
    works = {}
    for size in (20, 28):
        contestant = Dirtylog(1 << size)
        contestant.prepare(np.unique(np.random.default_rng(1).integers(0, 1 << size, 1000)))
        works[str(size)] = (contestant.fill, contestant.numbers)
    times = side_by_side(works, rounds=101)
    yield Claim(
        "harvest of 1000 dirty pages: time at 2^28 pages over time at 2^20",
        times["28"] / times["20"],
        3,
        at_least=False,
    )


def marking() -> Iterator[Claim]:
    npages = 1 << 24
    bitmap = dl.DirtyBitmap(npages)
    one = min(timeit.repeat("mark(77)", globals={"mark": bitmap.mark}, number=200_000, repeat=5)) / 200_000
    yield Claim("mark one page from Python, ns", one * 1e9, 80, at_least=False)
    pages = np.random.default_rng(2).integers(0, npages, 1_000_000)
    batch = side_by_side({"batch": (bitmap.harvest, lambda: bitmap.mark_pages(pages))})["batch"]
    yield Claim("mark a million random pages, ns each", batch * 1e3, 15, at_least=False)
    plain = yardsticks()
    words = np.zeros(npages // 64, np.uint64)
    near = np.random.default_rng(3).integers(0, 1 << 18, 1_000_000)
    for name, chosen in (("2^18", near), ("2^24", pages)):
        times = side_by_side(
            {
                "ours": (nothing, lambda chosen=chosen: plain.mark(bitmap, chosen)),
                "bare": (nothing, lambda chosen=chosen: plain.lock_or(words, chosen)),
            }
        )
        yield Claim(
            f"mark from C through the table, random pages of {name}: time over a bare lock or",
            times["ours"] / times["bare"],
            1.3,
            at_least=False,
        )


def writers() -> Iterator[Claim]:
    """Two threads that mark halves of one bitmap, beside one thread that marks one half."""
    npages = 1 << 24
    bitmap = dl.DirtyBitmap(npages)
    pages = np.random.default_rng(4).integers(0, npages // 2, 4_000_000)
    other = pages + npages // 2
    with ThreadPoolExecutor(1) as pool:

        def both() -> None:
            second = pool.submit(bitmap.mark_pages, other)
            bitmap.mark_pages(pages)
            second.result()

        times = side_by_side({"one": (bitmap.harvest, lambda: bitmap.mark_pages(pages)), "two": (bitmap.harvest, both)})
    yield Claim(
        "two threads, each marking its half of one bitmap: time over one thread that marks one half",
        times["two"] / times["one"],
        1.5,
        at_least=False,
    )


def importing() -> Iterator[Claim]:
    def run(module: str) -> Callable[[], object]:
        return lambda: subprocess.run([sys.executable, "-c", f"import {module}"], check=True)

    works = {module: (nothing, run(module)) for module in ("numpy", "dirtylog")}
    times = side_by_side(works, rounds=15, seconds=10)
    yield Claim("import dirtylog: time over import numpy", times["dirtylog"] / times["numpy"], 1.3, at_least=False)


def all_claims() -> Iterator[Claim]:
    """Measure every row."""
    for group in (harvests, numbers, cycles, extraction, scaling, marking, writers, importing):
        yield from group()


def table() -> int:
    """Print every row as it is measured, on the vector path in use; return how many are not met."""
    missed = 0
    print(f"vector path: {simd_path()}", flush=True)
    for claim in all_claims():
        bound = "at least" if claim.at_least else "at most"
        verdict = "met" if claim.met else "MISSED"
        print(f"{verdict:6} {claim.ratio:10.2f} ({bound} {claim.wanted:g})  {claim.work}  {claim.note}", flush=True)
        missed += not claim.met
    print(f"{missed} missed on {simd_path()}", flush=True)
    return missed


def main() -> int:
    """Print the table, or one for each path that this CPU can run; 1 if a row is not met."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers.claims", description=__doc__)
    parser.add_argument(
        "--paths", action="store_true", help="every vector path in turn, each in a process of its own; fails on none"
    )
    if not parser.parse_args().paths:
        return table() > 0
    for path in simd_paths():
        command = [sys.executable, "-m", "benchmarks.peers.claims"]
        subprocess.run(command, env={**os.environ, "DIRTYLOG_SIMD": path}, check=False)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
