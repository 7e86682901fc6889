"""s390: the change bit of each page's storage key, tested and cleared page by page."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dirtylog.vm._mmu import NO_PROTECTION
from dirtylog.vm.arch import Arch

if TYPE_CHECKING:
    from dirtylog.vm.machine import VM

__all__ = ["S390"]


class S390(Arch):
    """The hardware sets the change bit after each store; ``sync_dirty_log`` gathers them.

    No translation hides a store from its key, so nothing is protected and nothing
    is flushed (I3 alone carries it).
    """

    name = "s390"
    dirtying = "storage-key"
    hooks = NO_PROTECTION

    def flush_tlbs(self, vm: VM, slot: int) -> None:
        """Do nothing: a cached translation sets the key as well."""
