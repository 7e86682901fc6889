"""Memory slots of a KVM machine: the memory lent to the kernel, and the slot as a source of dirty pages."""

from __future__ import annotations

import mmap
import os
from typing import TYPE_CHECKING, NoReturn

from dirtylog._bits.flat import flat_array
from dirtylog._bits.owed import Owed
from dirtylog._bits.pages import DirtyPages
from dirtylog.sources.kvm import _kvm

if TYPE_CHECKING:
    from dirtylog._typing import Memory
    from dirtylog.sources.kvm.machine import VM

__all__ = ["Region", "Slot", "lend", "refuse"]

PAGE_SIZE = mmap.PAGESIZE


def refuse(number: int, why: str) -> NoReturn:
    """Raise OSError with an errno of KVM's."""
    raise OSError(number, f"{why}: {os.strerror(number)}")


class Region:
    """What the kernel knows of a slot, and what we owe its user."""

    __slots__ = ("base_gfn", "log_dirty", "memory", "npages", "owed", "pinned", "slot")

    def __init__(
        self, slot: int, base_gfn: int, npages: int, log_dirty: bool, memory: Memory, pinned: _kvm.Pinned
    ) -> None:
        self.slot: int = slot
        self.base_gfn: int = base_gfn
        self.npages: int = npages
        self.log_dirty: bool = log_dirty
        self.memory: Memory = memory
        self.pinned: _kvm.Pinned = pinned
        # I5: taken from the kernel, not handed out yet.
        self.owed: Owed = Owed(npages, PAGE_SIZE)

    def report(self, handle: _kvm.Handle, keep: bool) -> DirtyPages:
        """Ask the kernel, and add what is owed; `keep` it owed."""
        return handle.get_dirty_log(self.slot, self.pinned, self.npages, PAGE_SIZE, self.owed, keep)

    def look(self, handle: _kvm.Handle) -> DirtyPages:
        """Ask a kernel that keeps its bits (manual protection), and add what is owed, which stays owed."""
        return self.owed.peek(handle.get_dirty_log(self.slot, self.pinned, self.npages, PAGE_SIZE))

    def harvest_manual(self, handle: _kvm.Handle) -> DirtyPages:
        """Ask the kernel, and clear what it said."""
        fresh = handle.get_dirty_log(self.slot, self.pinned, self.npages, PAGE_SIZE)
        if fresh:
            words = fresh.words
            # I5: a clear that fails half way has taken some bits: they are kept here.
            self.owed.owe(fresh)
            handle.clear_dirty_log(self.slot, 0, self.npages, words)
        return self.owed.hand_out(DirtyPages._empty(self.npages, PAGE_SIZE))


def lend(slot: int, npages: int, memory: Memory | None) -> tuple[Memory, _kvm.Pinned]:
    """Check the memory for a slot, or make some, and hold it where it is; ValueError when it does not do."""
    size = npages * PAGE_SIZE
    if memory is None:
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        try:
            pinned = _kvm.Pinned(memory)
        except TypeError:
            # What lends its memory by another protocol than the buffer's: an opened snapshot, a tensor.
            memory = flat_array(memory, what=f"slot {slot}: memory")
            pinned = _kvm.Pinned(memory)
    except (BufferError, ValueError) as error:
        raise ValueError(f"slot {slot}: memory has to be writable and contiguous ({error})") from error
    if pinned.address % PAGE_SIZE:
        raise ValueError(
            f"slot {slot}: memory starts {pinned.address % PAGE_SIZE} bytes into a page; "
            "dirtylog.zeros() makes page-aligned arrays"
        )
    if pinned.nbytes < size:
        raise ValueError(f"slot {slot}: {npages} pages need {size} bytes of memory, got {pinned.nbytes}")
    return memory, pinned


class Slot:
    """A memory slot as a source of dirty pages; made by `VM.slot`.

    Attributes
    ----------
    npages : int
        Size in pages.
    page_size : int
        In bytes.

    Notes
    -----
    `harvest` and `peek` mean the same whichever way the log is kept. KVM's
    bitmap has no peek: what a peek took from it is kept here for the next
    harvest. Manual protection and rings need no such copy, or keep one anyhow.
    """

    __slots__ = ("_region", "_vm", "npages", "page_size")

    def __init__(self, vm: VM, region: Region) -> None:
        self._vm = vm
        self._region = region
        self.npages: int = region.npages
        self.page_size: int = vm.page_size

    @property
    def memory(self) -> Memory:
        """The memory behind the slot: what was given, or an anonymous mapping."""
        return self._region.memory

    def harvest(self) -> DirtyPages:
        """Report the pages written since the last harvest, and clear them.

        Returns
        -------
        DirtyPages
            Numbered from the slot's start.

        Raises
        ------
        OSError
            ENOENT: the slot is gone or keeps no log; else the kernel's errno, and nothing is lost (I5).
        """
        return self._vm.harvest_slot(self._region)

    def peek(self) -> DirtyPages:
        """Report the pages written since the last harvest, and keep them for the next."""
        return self._vm.peek_slot(self._region)
