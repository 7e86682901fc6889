"""powerpc: change bits (book3s-hv), a page table for each vCPU (book3s-pr), or no log (booke)."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, ClassVar

from dirtylog.vm._mmu import NO_PROTECTION
from dirtylog.vm.arch import Arch, Unsupported

if TYPE_CHECKING:
    from dirtylog.vm.machine import VM

__all__ = ["Book3sHv", "Book3sPr", "BookE"]


class Book3sHv(Arch):
    """The page walk sets a change bit; a harvest tests and clears it under the entry's lock bit.

    Nothing faults. Each entry's translation is dropped on every vCPU before its
    bit is read, so nothing is left to flush at the end.
    """

    name = "powerpc-book3s-hv"
    dirtying = "change-bit"
    hooks = NO_PROTECTION

    def flush_tlbs(self, vm: VM, slot: int) -> None:
        """Do nothing: `sync_dirty_log` has dropped every entry it took."""


class Book3sPr(Arch):
    """Write faults mark and fill the vCPU's own page table, which a harvest empties on every vCPU."""

    name = "powerpc-book3s-pr"
    dirtying = "shadow"
    hooks = NO_PROTECTION

    def flush_tlbs(self, vm: VM, slot: int) -> None:
        """Flush the slot's page-table entries on every vCPU (``kvmppc_mmu_pte_pflush``)."""
        vm.mmu.flush_shadow(slot)


class BookE(Unsupported):
    """No dirty log: ENOTSUP."""

    name = "powerpc-booke"
    error: ClassVar[int] = errno.ENOTSUP
