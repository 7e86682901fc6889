"""Machines to test, and the value oracle of KVM's own dirty-log selftest."""

import contextlib
import threading

import numpy as np
import pytest

import dirtylog as dl
from dirtylog.vm import arch
from dirtylog.vm.rings import DirtyRingFull

UNSUPPORTED = ("arm64-stub", "powerpc-booke")
HARVESTING = tuple(name for name in arch.names() if name not in UNSUPPORTED)
BASE_GFN = 37  # no multiple of 64: a slot begins in the middle of a word of the machine's log


class LostWriteError(AssertionError):
    """A page was written and no harvest said so."""


class ValueOracle:
    """Knows from the pages' values alone whether the log told the truth.

    The guest stores the iteration number into pages. At iteration n, after a harvest:
    a page reported dirty holds n or n - 1; a page reported clean holds what it held
    when it was last looked at, or n, and then the next harvest must report it.
    """

    def __init__(self, vm, slot=0):
        self.values = vm.memory(slot).view("<u8")[:: vm.page_size // 8]
        self.seen = self.values.copy()
        self.pending = np.zeros(self.values.size, bool)

    def read(self):
        return self.values.copy()

    def check(self, dirty, iteration, contents=None):
        contents = self.read() if contents is None else contents
        reported = np.zeros(contents.size, bool)
        reported[dirty.indices()] = True
        if (lost := np.flatnonzero(self.pending & ~reported)).size:
            raise LostWriteError(f"pages {lost.tolist()} were written after a harvest and not reported by the next")
        age = iteration - contents[reported].astype(np.int64)
        assert ((age == 0) | (age == 1)).all(), "a page reported dirty holds an old value"
        changed = ~reported & (contents != self.seen)
        assert (contents[changed] == iteration).all(), "a page reported clean holds an unreported old value"
        self.pending = changed
        self.seen = contents
        return int(reported.sum())


class Writers:
    """Threads, one a vCPU, that store the current iteration into random pages until told to stop."""

    def __init__(self, vm, slot=0, pages_at_once=40):
        self.vm = vm
        region = vm.region(slot)
        self.first, self.npages, self.at_once = region.base_gfn, region.npages, pages_at_once
        self.iteration = 1
        self.started = [0] * len(vm.vcpus)
        self.stopping = False
        self.failures = []
        self.turn = threading.Condition()
        self.threads = [threading.Thread(target=self.run, args=(vcpu,)) for vcpu in vm.vcpus]

    def run(self, vcpu):
        random = np.random.default_rng(vcpu.index)
        try:
            while not self.stopping:
                with self.turn:
                    iteration = self.iteration
                    if self.started[vcpu.index] != iteration:
                        self.started[vcpu.index] = iteration
                        self.turn.notify_all()
                # A full ring waits for the next harvest; what is left is not stored.
                with contextlib.suppress(DirtyRingFull):
                    vcpu.store(self.first + random.integers(0, self.npages, self.at_once), iteration)
        except BaseException as error:
            self.failures.append(error)

    def next_iteration(self):
        """Begin an iteration; when it returns, no vCPU stores an older number any more."""
        with self.turn:
            self.iteration += 1
            alive = self.turn.wait_for(lambda: self.failures or min(self.started) == self.iteration, timeout=120)
            assert alive, "a vCPU makes no progress"
        return self.iteration

    def __enter__(self):
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *exception):
        self.stopping = True
        for thread in self.threads:
            thread.join()
        assert not self.failures, self.failures


def machine(name, vcpus=2, npages=512, base_gfn=BASE_GFN, **options):
    vm = dl.VM(name, vcpus=vcpus, **options)
    vm.set_memory_region(0, base_gfn, npages)
    return vm


@pytest.fixture(params=HARVESTING, scope="session")
def harvesting(request):
    """The name of each architecture that has a log."""
    return request.param


@pytest.fixture(params=UNSUPPORTED, scope="session")
def unsupported(request):
    """The name of each architecture that refuses."""
    return request.param


@pytest.fixture
def kit():
    """What tests of this directory share."""

    class Kit:
        oracle = ValueOracle
        writers = Writers
        lost_write = LostWriteError
        machine = staticmethod(machine)
        base_gfn = BASE_GFN

    return Kit
