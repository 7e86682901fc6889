"""Two observers with different rhythms over one running writer: each, by itself, rebuilds memory."""

import threading

import numpy as np

import dirtylog as dl

NPAGES = 2048
STORES = 20_000


def main() -> None:
    """Write from a thread, collect from two observers, compare."""
    memory = np.zeros(NPAGES, np.uint64)  # a word stands for a page
    bitmap = dl.DirtyBitmap(NPAGES)
    log = dl.DirtyLog()
    log.attach(bitmap)
    replicas = {log.observer("often"): memory.copy(), log.observer("seldom"): memory.copy()}
    done = threading.Event()

    def write() -> None:
        generator = np.random.default_rng(0)
        for value, page in enumerate(generator.integers(0, NPAGES, STORES), 1):
            memory[page] = value
            bitmap.mark(page)  # after the store
        done.set()

    def catch_up(observer: dl.Observer) -> None:
        with observer.collect() as epoch:
            words = epoch.pages.indices()  # entry i of `memory` stands for page i
            replicas[observer][words] = memory[words]

    often, seldom = replicas
    writer = threading.Thread(target=write)
    writer.start()
    rounds = 0
    while not done.is_set():
        catch_up(often)
        rounds += 1
        if rounds % 7 == 0:
            catch_up(seldom)
    writer.join()
    for observer, replica in replicas.items():
        catch_up(observer)
        assert (replica == memory).all()
    print(f"{STORES} stores, {rounds} rounds: both replicas are equal to memory")


if __name__ == "__main__":
    main()
