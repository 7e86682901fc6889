"""ia64: one log of the whole machine, under its own lock, filled by TLB refills."""

from __future__ import annotations

from dirtylog.vm._mmu import NO_PROTECTION
from dirtylog.vm.arch import Arch

__all__ = ["Ia64"]


class Ia64(Arch):
    """``sync_dirty_log`` moves the slot's words over; no write protection.

    The kernel copied the words and zeroed them afterwards; here they are
    exchanged. A refill marks and caches under ``dirty_log_lock``, so an entry
    that is cached has its mark, and the flush after the harvest removes it.
    """

    name = "ia64"
    dirtying = "vm-log"
    hooks = NO_PROTECTION
