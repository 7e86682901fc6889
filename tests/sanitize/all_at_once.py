"""Bitmaps, page sets, logs, the machine and trackers, called from threads at once: for ThreadSanitizer.

``python tests/sanitize/all_at_once.py [turns]``: three threads make the calls of one object in orders of their own, one
object after the other. What they answer is other tests' business; this one is for what watches the accesses
(``tools/races.py``), and says which objects it had.
"""

import random
import sys
import threading
import warnings

import numpy as np

import dirtylog as dl

NPAGES = 20_000
THREADS = 3


def calls_of_bitmap(bitmap):
    some = dl.DirtyPages.from_indices(np.arange(0, NPAGES, 7), NPAGES)
    many = dl.DirtyPages.from_runs([[3, NPAGES - 5]], NPAGES)
    numbers = np.arange(1, NPAGES, 5)
    return [
        lambda: bitmap.mark(70),
        lambda: bitmap.mark_range(60, 3000),
        lambda: bitmap.mark_pages([1, 2, 700]),
        lambda: bitmap.mark_pages(numbers),
        lambda: bitmap.merge(some),
        lambda: bitmap.merge(many),
        lambda: bitmap.clear(some),
        lambda: bitmap.clear_range(100, 5000),
        lambda: bitmap.is_dirty(70),
        bitmap.count,
        bitmap.peek,
        bitmap.harvest,
        lambda: bitmap.harvest(33, 4000),
        lambda: bitmap.harvest(out=np.zeros(-(-NPAGES // 64), np.uint64)),
        lambda: repr(bitmap),
    ]


def calls_of_pages(pages):
    other = dl.DirtyPages.from_indices(np.arange(0, NPAGES, 64), NPAGES)
    return [
        lambda: pages.count,
        lambda: pages.words,
        lambda: hash(pages),
        lambda: 70 in pages,
        lambda: pages == other,
        lambda: pages | other,
        lambda: other - pages,
        lambda: pages.__sizeof__(),
        lambda: repr(pages),
        pages.indices,
        pages.runs,
        pages.to_bytes,
        pages.__reduce__,
    ]


def calls_of_log(log, bitmap):
    first, second = log.observer("first"), log.observer("second")
    taken = {observer: threading.Lock() for observer in (first, second)}

    def collect(observer):
        with taken[observer], observer.collect() as epoch:
            return epoch.pages.count

    def come_and_go():
        observer = log.observer(f"passing {threading.get_ident()}")
        with observer.collect():
            pass
        observer.close()

    return [
        lambda: collect(first),
        lambda: collect(second),
        come_and_go,
        lambda: bitmap.mark_range(5, 900),
        lambda: bitmap.mark(19_000),
    ]


def calls_of_machine(vm):
    # No page is read that another vCPU may store to: what a guest races with is the guest's.
    pages = np.arange(0, 300, 3)
    return [
        lambda: vm.vcpus[0].touch(pages),
        lambda: vm.vcpus[1].touch(pages + 1),
        lambda: vm.vcpus[1].faults,
        lambda: vm.vcpus[1].write(4096 * 5, b"some"),
        lambda: vm.vcpus[0].read(4096 * 8, 8),
        lambda: vm.get_dirty_log(0),
        lambda: vm.peek(0),
        lambda: vm.slot(0).harvest(),
    ]


def calls_of_tracker(tracker):
    # Who writes to the memory needs no lock, and is no code of ours: nobody does.
    return [tracker.harvest, tracker.peek, lambda: tracker.mark(5000, 9000), lambda: repr(tracker)]


def at_once(calls, turns):
    """Make calls from threads, in orders that differ; raise what one of them raised."""
    failures = []
    start = threading.Barrier(THREADS)

    def run(number):
        order = random.Random(number)
        start.wait()
        try:
            for _ in range(turns):
                order.choice(calls)()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def main():
    turns = int(sys.argv[1]) if len(sys.argv) > 1 else 300
    warnings.simplefilter("ignore", dl.IncompleteLogWarning)

    def named(name, calls, share=1.0):
        at_once(calls, int(turns * share))
        print(name, flush=True)

    named("DirtyBitmap", calls_of_bitmap(dl.DirtyBitmap(NPAGES)))
    foreign = np.zeros(-(-NPAGES // 64), np.uint64)
    named("DirtyBitmap over foreign memory", calls_of_bitmap(dl.DirtyBitmap.from_buffer(foreign, NPAGES)))
    for _ in range(10):  # what is made at the first call is made once for each
        named("DirtyPages", calls_of_pages(dl.DirtyPages.from_indices(np.arange(0, NPAGES, 500), NPAGES)), 0.1)
        named("DirtyPages, dense", calls_of_pages(dl.DirtyPages.from_runs([[3, 15_000]], NPAGES)), 0.1)
    log, bitmap = dl.DirtyLog(), dl.DirtyBitmap(NPAGES)
    log.attach(bitmap)
    named("DirtyLog", calls_of_log(log, bitmap))
    vm = dl.VM(vcpus=2)
    vm.set_memory_region(0, 0, 300)
    named("VM", calls_of_machine(vm))
    for backend in ("userfaultfd", "mprotect", "compare"):
        try:
            tracker = dl.track(dl.zeros(1 << 20, np.uint8), backend=backend)
        except dl.BackendUnavailable as missing:
            print(f"{backend} is left out: {missing}")
            continue
        with tracker:
            named(f"Tracker by {backend}", calls_of_tracker(tracker), 0.5)


if __name__ == "__main__":
    main()
