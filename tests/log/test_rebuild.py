"""Observers of different rhythm rebuild a running writer's memory exactly, and failed epochs change nothing."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import dirtylog as dl

NPAGES, PAGE_SIZE = 5000, 64


class Workload:
    """A writer over one memory that two sources report: one half each, and a part of it twice."""

    def __init__(self, seed):
        self.memory = np.zeros((NPAGES, PAGE_SIZE), np.uint8)
        self.random = np.random.default_rng(seed)
        self.low, self.high = dl.DirtyBitmap(3000, PAGE_SIZE), dl.DirtyBitmap(2500, PAGE_SIZE)
        self.log = dl.DirtyLog()
        self.log.attach(self.low, name="low")
        self.log.attach(self.high, first_page=2500, name="high")

    def write(self):
        """One step: store first, mark after (I3)."""
        page = int(self.random.integers(NPAGES))
        self.memory[page] = self.random.integers(256)
        if page < 2750:
            self.low.mark(page)
        else:
            self.high.mark(page - 2500)

    def run(self, steps):
        for _ in range(steps):
            self.write()


class TornError(Exception):
    """A consumer's failure in the middle of an epoch."""


class Copy:
    """A consumer: a copy of the memory that it keeps up to date by its epochs alone."""

    def __init__(self, workload, name, fails_every=0):
        self.memory = workload.memory
        self.observer = workload.log.observer(name)
        self.copy = self.memory.copy()
        self.fails_every = fails_every
        self.collects = 0

    def update(self):
        self.collects += 1
        try:
            with self.observer.collect() as epoch:
                pages = epoch.pages.indices()
                if self.fails_every and self.collects % self.fails_every == 0:
                    self.copy[pages[::2]] = 0xEE
                    raise TornError
                self.copy[pages] = self.memory[pages]
        except TornError:
            return False
        return True

    def finish(self):
        while not self.update():
            pass
        return self.copy


@pytest.mark.parametrize("fails_every", [0, 10, 2])
def test_two_rhythms_rebuild_the_memory_of_every_moment(fails_every):
    """The writer pauses for a copy: what an observer has taken is then the memory, byte for byte."""
    workload = Workload(seed=1)
    quick, slow = Copy(workload, "quick", fails_every), Copy(workload, "slow", fails_every)
    for step in range(1, 200):
        workload.run(30)
        if quick.update():
            assert np.array_equal(quick.copy, workload.memory)
        if step % 7 == 0 and slow.update():
            assert np.array_equal(slow.copy, workload.memory)
    assert np.array_equal(quick.finish(), workload.memory)
    assert np.array_equal(slow.finish(), workload.memory)


def test_observers_in_threads_of_their_own_rebuild_a_running_writer():
    workload = Workload(seed=2)
    copies = [Copy(workload, f"copy {i}", fails_every=10 * i) for i in range(3)]
    late, stop, start = [], threading.Event(), threading.Barrier(5)

    def follow(copy):
        start.wait()
        while not stop.is_set():
            copy.update()

    def come_and_go():
        start.wait()
        while not stop.is_set():
            with workload.log.observer("passing") as observer, observer.collect():
                pass
            if len(late) < 5:
                # The observer first, then the copy: nothing falls in between.
                late.append(Copy(workload, f"late {len(late)}"))

    def write():
        start.wait()
        try:
            workload.run(20_000)
        finally:
            stop.set()

    with ThreadPoolExecutor(5) as pool:
        tasks = [pool.submit(write), pool.submit(come_and_go), *(pool.submit(follow, copy) for copy in copies)]
    for task in tasks:
        task.result()
    assert len(workload.log.observers) == 3 + len(late)
    for copy in copies + late:
        assert np.array_equal(copy.finish(), workload.memory), copy.observer.name


def test_a_source_may_leave_while_observers_collect():
    workload = Workload(seed=3)
    copy = Copy(workload, "copy")
    workload.run(500)
    copy.update()
    workload.run(500)
    workload.log.detach(workload.high)
    assert np.array_equal(copy.finish(), workload.memory)
