"""How much of its speed a second Python thread keeps while the core does bulk work."""

import threading
import time
from collections.abc import Callable

import numpy as np

import dirtylog as dl

NPAGES = 1 << 24


def counting_rate(work: Callable[[], object], seconds: float) -> float:
    """Count in a second thread while this one works; return counts a second."""
    counts = 0
    stop = False
    started = threading.Event()

    def count() -> None:
        nonlocal counts
        started.set()
        while not stop:
            counts += 1

    thread = threading.Thread(target=count)
    thread.start()
    started.wait()
    first, begun = counts, time.perf_counter()
    while time.perf_counter() - begun < seconds:
        work()
    last, ended = counts, time.perf_counter()
    stop = True
    thread.join()
    return (last - first) / (ended - begun)


def kept_speed(seconds: float = 1.0) -> dict[str, float]:
    """Measure the share of its speed that a second thread keeps, for each kind of bulk work."""
    bitmap = dl.DirtyBitmap(NPAGES)
    pages = np.random.default_rng(0).integers(NPAGES, size=4_000_000)
    words = np.random.default_rng(1).integers(2**64, size=NPAGES // 64, dtype=np.uint64)
    works: dict[str, Callable[[], object]] = {
        "batch mark": lambda: bitmap.mark_pages(pages),
        "mark and harvest": lambda: (bitmap.fill(), bitmap.harvest().indices()),
        "indices": lambda: dl.indices(words),
        "runs": lambda: dl.runs(words),
    }
    alone = counting_rate(lambda: time.sleep(0.01), seconds)
    return {name: counting_rate(work, seconds) / alone for name, work in works.items()}
