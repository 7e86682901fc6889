"""Dirty rings: each vCPU's list of written pages, harvested, reset and only then handed out."""

from __future__ import annotations

import contextlib
import functools
from typing import TYPE_CHECKING

import numpy as np

from dirtylog._bits.owed import take_all
from dirtylog._bits.pages import DirtyPages
from dirtylog.errors import DirtyLogError

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt

    from dirtylog._bits.owed import Owed
    from dirtylog.vm.machine import VM

__all__ = ["DirtyRingFull", "Rings"]

MIN_ENTRIES, MAX_ENTRIES = 128, 65536


class DirtyRingFull(DirtyLogError):
    """A vCPU came out of guest mode because its dirty ring has reached the soft limit.

    Harvest the rings, then go on with what is left.

    Attributes
    ----------
    vcpu : int
        The vCPU's index.
    done : int
        Pages it has stored to, or bytes it has written, before.
    """

    def __init__(self, vcpu: int, done: int) -> None:
        self.vcpu = vcpu
        self.done = done
        super().__init__(f"the dirty ring of vCPU {vcpu} is full after {done}; call harvest_rings() and go on")

    def __reduce__(self) -> tuple[type[DirtyRingFull], tuple[int, int]]:
        """Pickle by the two numbers."""
        return type(self), (self.vcpu, self.done)


def check_entries(entries: int) -> int:
    """Return a ring size that can be had, else ValueError."""
    if not MIN_ENTRIES <= entries <= MAX_ENTRIES or entries & (entries - 1):
        raise ValueError(f"dirty_ring {entries} is not a power of two from {MIN_ENTRIES} to {MAX_ENTRIES}")
    return entries


def aligned_words(masks: npt.NDArray[np.uint64]) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]:
    """Return rows of (slot, first page, mask) as word numbers and masks that begin at a word."""
    first, bits = masks[:, 1], masks[:, 2]
    word, shift = first // 64, first % 64
    above = np.where(shift > 0, bits >> ((64 - shift) % 64), np.uint64(0))
    words = np.concatenate([word, word + 1])
    aligned = np.concatenate([bits << shift, above])
    return words[aligned != 0], aligned[aligned != 0]


class Rings:
    """The rings of one machine. All methods require ``slots_lock`` to be held."""

    def __init__(self, vm: VM) -> None:
        self.vm = vm

    def drain(self) -> None:
        """Fetch, write-protect, flush, keep the pages, and make room: in this order.

        A failure before the end leaves the entries fetched and not released, and
        the next drain finds all of them again (I5).

        References
        ----------
        ``kvm_dirty_ring_reset`` in Linux ``virt/kvm/dirty_ring.c``.
        """
        vm = self.vm
        slots, offsets = vm.mmu.ring_entries()
        if not slots.size:
            return
        masks = vm.mmu.ring_masks(slots.size)
        regions = {region.slot: region for region in vm.regions() if region.log_dirty}
        found = {
            slot: DirtyPages.from_indices(offsets[slots == slot].astype(np.int64), regions[slot].npages, vm.page_size)
            for slot in np.unique(slots).tolist()
            if slot in regions
        }
        if vm.protects_in_python:
            with vm.mmu_lock:
                for slot in found:
                    vm.arch.protect_masked(vm, slot, *aligned_words(masks[masks[:, 0] == slot]))
        else:
            vm.mmu.ring_protect(masks)
        for slot in found:
            vm.arch.flush_tlbs(vm, slot)
        for slot, pages in found.items():
            self.vm.owed_by(slot, pages.npages).owe(pages)
        vm.mmu.ring_release()

    def harvest(self, taken: dict[int, DirtyPages]) -> dict[int, DirtyPages]:
        """Return what every slot that keeps a log has, and forget it.

        `taken` gets it as well: whatever breaks until the caller has returned it, `owe` takes it (I5).
        """
        self.drain()
        logging = [region for region in self.vm.regions() if region.log_dirty]
        return take_all([self._request(region.slot, region.npages) for region in logging], taken)

    def owe(self, taken: dict[int, DirtyPages]) -> None:
        """Keep for the next harvest what was taken and not handed out."""
        for slot, pages in taken.items():
            # A slot that is gone, or another one by now, has nobody who asks for them.
            with contextlib.suppress(KeyError, ValueError):
                self.vm.owed[slot].owe(pages)

    def _request(self, slot: int, npages: int) -> tuple[int, Owed, Callable[[], DirtyPages]]:
        return slot, self.vm.owed_by(slot, npages), functools.partial(self._none, npages)

    def _none(self, npages: int) -> DirtyPages:
        return DirtyPages._empty(npages, self.vm.page_size)

    def take(self, slot: int, taken: dict[int, DirtyPages]) -> dict[int, DirtyPages]:
        """Return what one slot has, as `harvest` does; the others' pages wait for their turn."""
        npages = self.vm.check_log(slot)
        self.drain()
        return take_all([self._request(slot, npages)], taken)

    def peek(self, slot: int) -> DirtyPages:
        """Return what one slot has, and keep it."""
        npages = self.vm.check_log(slot)
        self.drain()
        return self.vm.owed_by(slot, npages).peek(self._none(npages))

    def forget(self, slot: int) -> None:
        """Drop the entries of a slot that is deleted or keeps no log any more.

        Calls no hook, so it cannot fail half-way: other slots' entries wait for the next drain.
        """
        self.vm.mmu.ring_forget(slot)
