"""What tests of KVM share: a guest over each way of logging, memory for it, and a kernel that fails."""

import mmap

import pytest

from dirtylog.sources import kvm
from dirtylog.sources.kvm._guest import Guest

probed = kvm.probe()
needs_kvm = pytest.mark.skipif(not probed.available, reason=probed.reason)
modes = pytest.mark.parametrize("mode", ["legacy", "manual", "ring"])

PAGE = mmap.PAGESIZE
GFN = 0x10000
# A guest that dirties a page with fewer than 16 instructions runs past a ring's reserve in a software KVM.
PADDING = 40


def anonymous(npages):
    return mmap.mmap(-1, npages * PAGE)


def machine(vm, mode, npages, ring=4096):
    """Set the VM up for one way of logging and return its guest; slot 0 is at GFN."""
    if mode == "manual":
        vm.enable_manual_protect()
    elif mode == "ring":
        vm.enable_dirty_ring(ring)
    vm.set_memory_region(0, GFN, npages, memory=anonymous(npages))
    return Guest(vm, padding=PADDING)


def pages(dirty):
    return dirty.indices().tolist()


def refused(number, call, *arguments, **named):
    with pytest.raises(OSError, match=r"slot|ring|protect") as caught:
        call(*arguments, **named)
    assert caught.value.errno == number, caught.value


class Failing:
    """A handle on which one call first gives other answers: raises or returns them, or what they return if called."""

    def __init__(self, handle, call, answers):
        self._handle, self._call, self._answers = handle, call, answers

    def __getattr__(self, name):
        if name == self._call and self._answers:
            return self._fail
        return getattr(self._handle, name)

    def _fail(self, *arguments):
        answer = self._answers.pop()
        if isinstance(answer, Exception):
            raise answer
        return answer() if callable(answer) else answer
