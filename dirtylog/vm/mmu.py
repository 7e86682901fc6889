"""The dirty log's calls in their order: what is held, taken, protected, flushed and handed out."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

    from dirtylog._pages import DirtyPages
    from dirtylog.vm.machine import VM

__all__ = ["get_dirty_log", "peek"]


def check_out(out: object, npages: int) -> npt.NDArray[np.uint64]:
    """Return the caller's buffer as words, or raise EFAULT before anything is cleared (I5)."""
    nwords = (npages + 63) // 64
    try:
        view = memoryview(out)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"out is a {type(out).__name__}; pass a writable buffer of {nwords} uint64 words") from None
    wrong = None
    if view.readonly:
        wrong = "read-only"
    elif not view.c_contiguous:
        wrong = "not C-contiguous"
    elif view.itemsize != 8 or view.format.lstrip("@=<") not in ("L", "Q"):
        wrong = f"of items {view.format!r}, not uint64"
    elif view.nbytes != 8 * nwords:
        wrong = f"of {view.nbytes // 8} words"
    words = None if wrong else np.asarray(view).reshape(-1)
    if words is None or not words.flags.aligned:
        reason = wrong or "misaligned"
        raise OSError(errno.EFAULT, f"out is {reason}; pass a writable, aligned buffer of {nwords} uint64 words")
    return words


def take(vm: VM, slot: int) -> bool:
    """Snapshot and protect, with the architecture's hook in C or in Python; True if anything was dirty."""
    if vm.protects_in_python:
        return vm.mmu.harvest_batch(slot, lambda words, masks: vm.arch.protect_masked(vm, slot, words, masks))
    return vm.mmu.harvest(slot)


def get_dirty_log(vm: VM, slot: int, out: object = None) -> DirtyPages:
    """Get and clear a slot's log: the seed's four steps.

    Parameters
    ----------
    vm : VM
        The machine.
    slot : int
        Memory slot id.
    out : buffer of uint64, optional
        Receives the words as well.

    Returns
    -------
    DirtyPages
        Pages written since the last call, numbered from the slot's start.

    Raises
    ------
    OSError
        EINVAL: slot id out of range; ENOENT: the slot keeps no log; EFAULT: `out`
        cannot take the words. Nothing has been cleared.

    Notes
    -----
    I2. Under ``slots_lock``: (1) under ``mmu_lock`` exchange each word into the
    bitmap's second half, (2) write-protect its pages; (3) flush the TLBs if
    anything was dirty; (4) hand the copy out. Between (2) and (3) a vCPU may
    still write through a stale TLB entry: harmless, since that page is in this
    snapshot and its content is read after the flush.

    ``mmu_lock`` is free during the flush, as in the seed. A page that faults
    meanwhile is marked for the next harvest.

    References
    ----------
    ``kvm_vm_ioctl_get_dirty_log`` in Linux ``virt/kvm/kvm_main.c``.
    """
    with vm.slots_lock:
        npages = vm.check_log(slot)
        words = None if out is None else check_out(out, npages)
        vm.arch.sync_dirty_log(vm, slot)
        try:
            if take(vm, slot):
                vm.arch.flush_tlbs(vm, slot)
            return vm.mmu.hand_out(slot, words)
        except BaseException:
            # I5: a hook that failed, no memory for the copy, or an interrupt.
            vm.mmu.put_back(slot)
            raise


def peek(vm: VM, slot: int) -> DirtyPages:
    """Copy a slot's log without clearing it; hardware marks are moved into it first."""
    with vm.slots_lock:
        vm.check_log(slot)
        vm.arch.sync_dirty_log(vm, slot)
        return vm.mmu.peek(slot)
