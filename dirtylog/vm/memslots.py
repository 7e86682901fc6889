"""Memslots: the checks of KVM's set_memory_region, the memory behind a slot, and a slot as a source."""

from __future__ import annotations

import errno
import mmap
import operator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt
    from _typeshed import WriteableBuffer

    from dirtylog._bits.pages import DirtyPages
    from dirtylog.vm.machine import VM

__all__ = ["Memslot", "Region"]

MAX_SLOT_PAGES = (1 << 31) - 1  # KVM_MEM_MAX_NR_PAGES
MAX_GPA = 1 << 63
MAX_VM_LOG_PAGES = 1 << 32  # one bit each, in one piece, whatever of it is used


class Region(NamedTuple):
    """One slot as the machine has it."""

    slot: int
    base_gfn: int
    npages: int
    log_dirty: bool


def invalid(reason: str) -> OSError:
    """Make the EINVAL that KVM would return, with the reason it would not give."""
    return OSError(errno.EINVAL, reason)


def check_range(region: Region, others: list[Region], page_size: int, vm_log: bool) -> None:
    """Refuse a region that is too large, wraps, or overlaps another slot (EEXIST)."""
    end = region.base_gfn + region.npages
    if region.base_gfn < 0 or region.npages < 0:
        raise invalid(
            f"base_gfn {region.base_gfn} and npages {region.npages} must not be negative; guest frames count from 0"
        )
    if region.npages > MAX_SLOT_PAGES:
        raise invalid(f"npages {region.npages} is more than a slot holds, {MAX_SLOT_PAGES}; use several slots")
    if end * page_size > MAX_GPA:
        raise invalid(f"the region ends at gfn {end:#x}, past the last gpa {MAX_GPA:#x}")
    if vm_log and end > MAX_VM_LOG_PAGES:
        raise invalid(f"the region ends at gfn {end:#x}; one log of the whole machine ends at {MAX_VM_LOG_PAGES:#x}")
    for other in others:
        if other.slot != region.slot and other.base_gfn < end and region.base_gfn < other.base_gfn + other.npages:
            raise OSError(
                errno.EEXIST,
                f"gfns {region.base_gfn:#x} to {end - 1:#x} overlap slot {other.slot}, which begins at"
                f" {other.base_gfn:#x} and has {other.npages} pages; delete that slot or choose other gfns",
            )


def guest_memory(memory: WriteableBuffer | None, nbytes: int) -> npt.NDArray[np.uint8]:
    """Return a slot's bytes: the caller's memory, exported as long as the slot lives, or fresh zeroes.

    Raises
    ------
    TypeError
        `memory` has no buffer.
    ValueError
        It is read-only, not contiguous, or smaller than the slot.
    """
    if memory is None:
        # Zero-filled when first touched: a large guest costs what it uses.
        return np.frombuffer(mmap.mmap(-1, nbytes), np.uint8)
    view = memoryview(memory)
    if view.readonly or not view.c_contiguous:
        wrong = "read-only" if view.readonly else "not C-contiguous"
        raise ValueError(f"memory is {wrong}; a slot needs one writable piece of {nbytes} bytes")
    if view.nbytes < nbytes:
        raise ValueError(f"memory has {view.nbytes} bytes; the slot's pages need {nbytes}")
    return np.frombuffer(view, np.uint8, nbytes)


class Memslot:
    """One slot of a machine as a source of dirty pages: :meth:`VM.slot` makes it.

    Examples
    --------
    >>> import dirtylog as dl
    >>> vm = dl.VM()
    >>> vm.set_memory_region(0, base_gfn=0x100, npages=64)
    >>> source = vm.slot(0)
    >>> vm.vcpus[0].touch([0x105, 0x107])
    2
    >>> source.peek().indices()
    array([5, 7])
    >>> source.harvest().runs().tolist()
    [[5, 1], [7, 1]]
    """

    def __init__(self, vm: VM, slot: int) -> None:
        self.vm = vm
        self.id: int = operator.index(slot)

    @property
    def page_size(self) -> int:
        """Size of a page in bytes."""
        return self.vm.page_size

    @property
    def base_gfn(self) -> int:
        """The slot's first guest frame number."""
        return self.vm.region(self.id).base_gfn

    @property
    def npages(self) -> int:
        """The slot's size in pages."""
        return self.vm.region(self.id).npages

    def harvest(self) -> DirtyPages:
        """Get and clear: :meth:`VM.harvest`."""
        return self.vm.harvest(self.id)

    def peek(self) -> DirtyPages:
        """Copy the log, clear nothing."""
        return self.vm.peek(self.id)

    def __repr__(self) -> str:
        """Name the slot and its machine's architecture."""
        return f"<slot {self.id} of {self.vm!r}>"
