"""arm: write protection of a mask's whole range, and a TLB flush of its own."""

from __future__ import annotations

from dirtylog.vm._mmu import PROTECT_RANGE_FLUSH_VMID
from dirtylog.vm.arch import Arch

__all__ = ["Arm"]


class Arm(Arch):
    """The generic call; ``stage2_wp_range``, then a flush by VMID (HAVE_KVM_ARCH_TLB_FLUSH_ALL).

    The range form protects clean pages between dirty ones as well: they fault
    once more when they are written, and are reported only then.
    """

    name = "arm"
    hooks = PROTECT_RANGE_FLUSH_VMID
