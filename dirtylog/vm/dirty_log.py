"""The dirty log's calls in their order: what is held, taken, protected, flushed and handed out."""

from __future__ import annotations

import errno
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from dirtylog._bits.pages import DirtyPages
from dirtylog._kvm_arguments import check_dirty, check_out

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt

    from dirtylog.vm.machine import VM

    BatchHook = Callable[[npt.NDArray[np.uint64], npt.NDArray[np.uint64]], None]

__all__ = ["clear_dirty_log", "get_dirty_log", "peek"]


def python_hook(vm: VM, slot: int) -> BatchHook | None:
    """Return the batch form of the architecture's write protection where it is written in Python."""
    return partial(vm.arch.protect_masked, vm, slot) if vm.protects_in_python else None


def refuse_rings(vm: VM) -> None:
    """Raise ENXIO where the machine keeps dirty rings: the bitmaps stay empty there."""
    if vm.rings is not None:
        raise OSError(errno.ENXIO, "the machine has dirty rings, which exclude the dirty log; use harvest_rings()")


def get_dirty_log(vm: VM, slot: int, out: object = None) -> DirtyPages:
    """Get and clear a slot's log: KVM's four steps.

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
        cannot take the words; ENXIO: the machine has dirty rings. Nothing has been
        cleared.

    Notes
    -----
    I2. Under ``slots_lock``: (1) under ``mmu_lock`` exchange each word into the
    bitmap's second half, (2) write-protect its pages; (3) flush the TLBs if
    anything was dirty; (4) hand the copy out. Between (2) and (3) a vCPU may
    still write through a stale TLB entry: harmless, since that page is in this
    snapshot and its content is read after the flush.

    With manual protection only the copy is made: clearing, protection and flush
    come with `clear_dirty_log`.

    ``mmu_lock`` is free during the flush, as in KVM. A page that faults
    meanwhile is marked for the next harvest.

    References
    ----------
    ``kvm_vm_ioctl_get_dirty_log`` in Linux ``virt/kvm/kvm_main.c``.
    """
    with vm.slots_lock:
        npages = vm.check_log(slot)
        refuse_rings(vm)
        words = None if out is None else check_out(slot, out, npages)
        vm.arch.sync_dirty_log(vm, slot)
        if vm.manual_protect:
            pages = vm.owed_by(slot, npages).peek(vm.mmu.report(slot))
            if words is not None:
                words[:] = pages.words
            return pages
        owed = vm.owed_by(slot, npages)
        earlier = bool(owed)
        taken: DirtyPages | None = None
        try:
            hook = python_hook(vm, slot)
            if vm.mmu.harvest_batch(slot, hook) if hook else vm.mmu.harvest(slot):
                vm.arch.flush_tlbs(vm, slot)
            taken = owed.take(vm.mmu.hand_out, slot, words)
            if earlier and words is not None:
                words[:] = taken.words
        except BaseException:
            # I5: a hook that failed, no memory for the copy, or an interrupt.
            if taken is not None:
                owed.owe(taken)
            vm.mmu.put_back(slot)
            raise
        return taken


def peek(vm: VM, slot: int) -> DirtyPages:
    """Copy a slot's log without clearing it; hardware marks are moved into it first."""
    with vm.slots_lock:
        npages = vm.check_log(slot)
        vm.arch.sync_dirty_log(vm, slot)
        return vm.owed_by(slot, npages).peek(vm.mmu.peek(slot))


def clear_dirty_log(
    vm: VM, slot: int, first_page: int, num_pages: int, dirty: DirtyPages, *, keep_owed: bool = False
) -> None:
    """Clear and protect what was reported: see :meth:`VM.clear_dirty_log`.

    Under ``slots_lock``: collect what the hardware recorded; under ``mmu_lock``
    clear each word's reported bits and write-protect their pages; then flush if
    anything was cleared. `keep_owed`: the caller has not handed the pages out.
    """
    cleared_by_now = False
    try:
        with vm.slots_lock:
            npages = vm.check_log(slot)
            refuse_rings(vm)
            if not vm.manual_protect:
                raise OSError(
                    errno.EINVAL, "get_dirty_log() has cleared the log already; create the VM with manual_protect=True"
                )
            check_dirty(slot, dirty, npages, vm.page_size)
            end = first_page + num_pages
            if first_page % 64 or first_page < 0 or num_pages < 0 or end > npages or (end < npages and num_pages % 64):
                raise OSError(
                    errno.EINVAL,
                    f"pages {first_page} to {end - 1} of {npages}: the range must begin at a multiple of 64"
                    " and be a multiple of 64 long or end with the slot",
                )
            owed = vm.owed_by(slot, npages)
            first_word, end_word = first_page // 64, (end + 63) // 64
            words = dirty.words[first_word:end_word]
            # Not all that the caller names was dirty: only what was cleared comes back (I5).
            cleared = np.zeros(words.size, np.uint64)
            known: DirtyPages | None = None
            # What the hardware has noted and the log has not was written before the copy that follows.
            vm.arch.sync_dirty_log(vm, slot)
            try:
                if vm.mmu.clear(slot, first_word, words, cleared, python_hook(vm, slot)):
                    vm.arch.flush_tlbs(vm, slot)
                if owed and num_pages and not keep_owed:
                    named = dirty & DirtyPages.from_runs([(first_page, num_pages)], npages, vm.page_size)
                    known = named & owed.peek(DirtyPages._empty(npages, vm.page_size))
                    owed.forget_pages(known)
                cleared_by_now = True
            except BaseException:
                vm.mmu.unclear(slot, first_word, cleared)
                if known is not None:
                    owed.owe(known)
                raise
    except BaseException:
        # Between the lock's release and the end: the slot may be another one by now, what it owes is its own (I5).
        if cleared_by_now:
            owed.owe(dirty)
        raise
