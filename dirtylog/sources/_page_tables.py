"""What write-protecting costs where nothing was ever written: a page table for every 2 MiB, and where to stop."""

from __future__ import annotations

import mmap
import os

__all__ = ["cannot_hold"]

# WP_UNPOPULATED leaves a marker of 8 bytes for each page that is not there yet.
_MARKER_BYTES = 8
_SHARE_OF_MEMORY = 16


def cannot_hold(nbytes: int) -> str:
    """Say why userfaultfd must not protect so many bytes on this machine; an empty string where it may.

    Programs reserve terabytes that they never touch: AddressSanitizer's shadow,
    the heaps of some run-time systems. To write-protect 16 TiB fills 32 GiB of
    page tables, and the kernel ends the process that owns them.
    """
    tables = nbytes // mmap.PAGESIZE * _MARKER_BYTES
    memory = os.sysconf("SC_PHYS_PAGES") * mmap.PAGESIZE
    if tables <= memory // _SHARE_OF_MEMORY:
        return ""
    return (
        f"{nbytes} bytes would need {tables} bytes of page tables, more than one {_SHARE_OF_MEMORY}th of this "
        f"machine's {memory} bytes of memory; track the parts that are written, each by itself"
    )
