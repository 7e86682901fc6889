"""mips: a generic log without write protection, then a flush of the slot's range."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dirtylog.vm._mmu import NO_PROTECTION
from dirtylog.vm.arch import Arch

if TYPE_CHECKING:
    from dirtylog.vm.machine import VM

__all__ = ["Mips"]


class Mips(Arch):
    """Software refills the TLB, and a refill for a store marks.

    An entry stays until the range is flushed, so what is cached is marked, or is
    in the harvest that flushes.
    """

    name = "mips"
    user_mem_slots = 8
    dirtying = "fill"
    hooks = NO_PROTECTION

    def flush_tlbs(self, vm: VM, slot: int) -> None:
        """Flush the slot's range."""
        vm.mmu.flush_slot(slot)
