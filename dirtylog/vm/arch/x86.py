"""x86: write faults mark, and a harvest write-protects each page it takes."""

from __future__ import annotations

from dirtylog.vm._mmu import PROTECT_DIRTY_BITS, PROTECT_EACH
from dirtylog.vm.arch import Arch

__all__ = ["X86"]


class X86(Arch):
    """The generic call; ``kvm_mmu_write_protect_pt_masked`` for each set bit."""

    name = "x86"
    user_mem_slots = 125
    hooks = PROTECT_EACH
    pml_hooks = PROTECT_DIRTY_BITS
