"""VM: memslots, vCPUs and an architecture put together, with KVM's calls as methods."""

from __future__ import annotations

import errno
import operator
import threading
from typing import TYPE_CHECKING

from dirtylog._bits.owed import Owed
from dirtylog._bits.pages import DirtyPages
from dirtylog.vm import dirty_log
from dirtylog.vm._mmu import HUGE_PAGES, Lock, Mmu
from dirtylog.vm.arch import Arch, find
from dirtylog.vm.memslots import Memslot, Region, check_range, guest_memory, invalid
from dirtylog.vm.rings import Rings, check_entries
from dirtylog.vm.vcpu import Vcpu

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from _typeshed import WriteableBuffer

__all__ = ["VM"]

MIN_PAGE_SIZE, MAX_PAGE_SIZE = 64, 1 << 30
MAX_VCPUS = 1024


class VM:
    """A virtual machine whose dirty log works as KVM's does, on one of its architectures.

    Parameters
    ----------
    arch : Arch or str
        An architecture, or the name of a registered one.
    vcpus : int
        Number of virtual CPUs.
    page_size : int
        Size of a page in bytes, a power of two.
    manual_protect : bool
        `get_dirty_log` clears nothing; `clear_dirty_log` clears and protects.
    initially_set : bool
        A log starts with every page set and nothing protected; requires
        `manual_protect`.
    dirty_ring : int
        Entries of a dirty ring for each vCPU, a power of two, in place of
        bitmaps: `harvest_rings`. 0: none.
    huge_pages : {None, "eager", "on-write"}
        Map 512 pages at once where they are not logged, and divide such a
        mapping when logging is switched on, or at the first write after. With
        `initially_set` it is always the first write after a clear.
    pml : bool
        Each vCPU notes up to 512 pages whose dirty bit it sets, in place of
        write faults; the notes are collected before a harvest.

    Attributes
    ----------
    arch : Arch
        The architecture.
    vcpus : tuple of Vcpu
        The virtual CPUs.
    page_size : int
        Size of a page in bytes.
    slots_lock, mmu_lock : Lock
        The machine's locks, in the order in which they are taken.

    Raises
    ------
    ValueError
        The architecture is not known, a number is out of range, or the
        architecture cannot do what is asked for.
    TypeError
        `arch` is neither a name nor an Arch.

    Notes
    -----
    Every method may be called from any thread. Waiting for a lock releases the GIL.

    Examples
    --------
    >>> import dirtylog as dl
    >>> vm = dl.VM(arch="arm", vcpus=2)
    >>> vm.set_memory_region(0, base_gfn=0, npages=1024)
    >>> vm.vcpus[0].write(5 * 4096, b"hello")
    >>> vm.vcpus[1].touch([7, 8])
    2
    >>> vm.get_dirty_log(0).runs().tolist()
    [[5, 1], [7, 2]]
    >>> vm.get_dirty_log(0).count
    0
    """

    __module__ = "dirtylog"

    def __init__(
        self,
        arch: Arch | str = "x86",
        vcpus: int = 1,
        page_size: int = 4096,
        *,
        manual_protect: bool = False,
        initially_set: bool = False,
        dirty_ring: int = 0,
        huge_pages: str | None = None,
        pml: bool = False,
    ) -> None:
        if isinstance(arch, str):
            arch = find(arch)
        elif not isinstance(arch, Arch):
            raise TypeError(f"arch is a {type(arch).__name__}; pass an Arch or the name of one")
        vcpus, page_size = operator.index(vcpus), operator.index(page_size)
        if not 1 <= vcpus <= MAX_VCPUS:
            raise ValueError(f"vcpus {vcpus} is out of range: 1 to {MAX_VCPUS}")
        if not MIN_PAGE_SIZE <= page_size <= MAX_PAGE_SIZE or page_size & (page_size - 1):
            raise ValueError(f"page_size {page_size} is not a power of two from {MIN_PAGE_SIZE} to {MAX_PAGE_SIZE}")
        if huge_pages not in HUGE_PAGES:
            raise ValueError(f"huge_pages {huge_pages!r} is not known; choose None, 'eager' or 'on-write'")
        if initially_set and not manual_protect:
            raise ValueError("initially_set requires manual_protect=True: only clear_dirty_log() protects its pages")
        if dirty_ring and (manual_protect or pml):
            raise ValueError("a dirty ring excludes manual_protect and pml; choose one")
        if (dirty_ring or huge_pages) and arch.dirtying != "fault":
            raise ValueError(f"{arch.name} has no write faults; dirty rings and huge pages rest on them")
        if pml and arch.pml_hooks is None:
            raise ValueError(f"{arch.name} has no page-modification log; x86 has")
        self.arch = arch
        self.page_size = page_size
        self.manual_protect: bool = bool(manual_protect)
        self.initially_set: bool = bool(initially_set)
        self.mmu: Mmu = Mmu(
            vcpus,
            page_size.bit_length() - 1,
            arch.dirtying,
            arch.pml_hooks if pml else arch.hooks,
            dirty_ring=check_entries(operator.index(dirty_ring)) if dirty_ring else 0,
            huge_pages=huge_pages,
            pml=pml,
        )
        # By slot: taken from its log or drained from the rings, and not handed out (I5).
        self.owed: dict[int, Owed] = {}
        self.rings: Rings | None = Rings(self) if dirty_ring else None
        self.slots_lock: Lock = self.mmu.slots_lock
        self.harvest_lock: threading.RLock = threading.RLock()
        self.mmu_lock: Lock = self.mmu.mmu_lock
        self.vcpus: tuple[Vcpu, ...] = tuple(Vcpu(self.mmu, index) for index in range(vcpus))
        # Once a harvest, not once a word, and only where the hook is Python.
        self.protects_in_python: bool = type(arch).protect_masked is not Arch.protect_masked

    # ---- memslots ------------------------------------------------------------------

    def set_memory_region(
        self, slot: int, base_gfn: int, npages: int, log_dirty: bool = True, memory: WriteableBuffer | None = None
    ) -> None:
        """Create, move or delete a slot, or switch its log on or off.

        Parameters
        ----------
        slot : int
            Memory slot id, below ``arch.user_mem_slots``.
        base_gfn : int
            The slot's first guest frame number.
        npages : int
            Its size in pages; 0 deletes it. A slot keeps its size.
        log_dirty : bool
            Whether it keeps a dirty log. Switched on, it starts clean: what is
            written from then on is reported.
        memory : buffer, optional
            Writable, contiguous, at least `npages` pages. It is kept alive, and
            exported so that it cannot be resized, until the slot is deleted.
            Fresh zeroes if None; for a slot that exists, the memory it has.

        Raises
        ------
        OSError
            EINVAL: slot id or range out of range, deleting a slot that does not
            exist, another size or memory for one that does; EEXIST: it overlaps
            another slot.
        ValueError, TypeError
            `memory` cannot be used: see there.

        Notes
        -----
        Holds ``slots_lock``. When a deletion returns, no vCPU uses the memory. A
        store that meets a slot on the move waits for it.

        References
        ----------
        ``__kvm_set_memory_region`` in Linux ``virt/kvm/kvm_main.c``.
        """
        slot = self.check_slot(slot)
        region = Region(slot, operator.index(base_gfn), operator.index(npages), bool(log_dirty))
        with self.slots_lock:
            regions = self.regions()
            old = next((known for known in regions if known.slot == slot), None)
            check_range(region, regions, self.page_size, self.arch.dirtying == "vm-log")
            if region.npages == 0:
                if old is None:
                    raise invalid(f"slot {slot} does not exist; nothing to delete")
                self.mmu.remove(slot)
                self._forget(slot)
            elif old is None:
                array = guest_memory(memory, region.npages * self.page_size)
                # Of a slot of this number that was deleted when an interrupt came, before it was forgotten.
                self._forget(slot)
                self.mmu.add(slot, region.base_gfn, region.npages, array, region.log_dirty, self.initially_set)
            else:
                self._change(old, region, memory)

    def _change(self, old: Region, new: Region, memory: WriteableBuffer | None) -> None:
        if new.npages != old.npages:
            raise invalid(f"slot {old.slot} has {old.npages} pages, not {new.npages}; delete it and create it again")
        if (
            memory is not None
            and guest_memory(memory, old.npages * self.page_size).ctypes.data != self.mmu.memory(old.slot).ctypes.data
        ):
            raise invalid(f"slot {old.slot} has other memory; delete it and create it again")
        if new.base_gfn != old.base_gfn:
            self.mmu.move(old.slot, new.base_gfn)
        if new.log_dirty and not old.log_dirty:
            self._start_log(old.slot)
        elif old.log_dirty and not new.log_dirty:
            with self.mmu_lock:
                self.mmu.stop_log(old.slot)
            self._forget(old.slot)

    def owed_by(self, slot: int, npages: int) -> Owed:
        """Return what keeps a slot's pages that were not handed out; ``slots_lock`` is held."""
        if slot not in self.owed:
            self.owed[slot] = Owed(npages, self.page_size)
        return self.owed[slot]

    def _forget(self, slot: int) -> None:
        """Drop what was taken of a slot that is deleted or keeps no log: the next of its id must not get it."""
        if self.rings is not None:
            self.rings.forget(slot)
        self.owed.pop(slot, None)

    def _start_log(self, slot: int) -> None:
        # Old news first: also what a store that was under way when the log was
        # switched off has pushed since. What the hardware notes from here on may
        # be reported although it was written before this call returned.
        self._forget(slot)
        self.mmu.sync(slot, discard=True)
        started = [False]
        try:
            with self.mmu_lock:
                self.mmu.start_log(slot, self.initially_set, started)
                if not self.initially_set:
                    # In the same stay under mmu_lock: a fault comes before both, or marks (I1).
                    self.arch.protect_region(self, slot)
            if not self.initially_set:
                self.arch.flush_tlbs(self, slot)
        except BaseException:
            # A hook that failed, or an interrupt anywhere: a log without protection and flush would miss writes.
            if started[0]:
                with self.mmu_lock:
                    self.mmu.stop_log(slot)
            raise

    def regions(self) -> list[Region]:
        """Return every slot, by gfn; under ``slots_lock``."""
        return [Region(*values) for values in self.mmu.slots()]

    def check_slot(self, slot: int) -> int:
        """Return a slot id the architecture has, else EINVAL."""
        slot = operator.index(slot)
        if not 0 <= slot < self.arch.user_mem_slots:
            raise invalid(
                f"slot {slot} is out of range; {self.arch.name} has slots 0 to {self.arch.user_mem_slots - 1}"
            )
        return slot

    def check_log(self, slot: int) -> int:
        """Return the number of pages of a slot that keeps a log, else EINVAL or ENOENT; under ``slots_lock``."""
        return self.mmu.check_log(self.check_slot(slot))

    def region(self, slot: int) -> Region:
        """Return a slot's place and size; ENOENT if there is none."""
        slot = self.check_slot(slot)
        with self.slots_lock:
            for region in self.regions():
                if region.slot == slot:
                    return region
        raise OSError(errno.ENOENT, f"slot {slot} does not exist; create it with set_memory_region()")

    def memory(self, slot: int) -> npt.NDArray[np.uint8]:
        """Return a slot's bytes: the live guest memory, as the host sees it.

        Writes through it are the host's and are not logged.
        """
        slot = self.check_slot(slot)
        with self.slots_lock:
            return self.mmu.memory(slot)

    def slot(self, slot: int) -> Memslot:
        """Return a slot as a source: ``npages``, ``page_size``, ``harvest()``, ``peek()``."""
        return Memslot(self, self.region(slot).slot)

    # ---- the dirty log -----------------------------------------------------------------

    def get_dirty_log(self, slot: int, out: object = None) -> DirtyPages:
        """Get and clear a slot's log: ``kvm_vm_ioctl_get_dirty_log``.

        Parameters
        ----------
        slot : int
            Memory slot id.
        out : buffer of uint64, optional
            ``ceil(npages / 64)`` words, writable: receives the bitmap as well.

        Returns
        -------
        DirtyPages
            Pages written since the last call, numbered from the slot's start.

        Raises
        ------
        OSError
            EINVAL: slot id out of range; ENOENT: the slot keeps no log; EFAULT: `out`
            cannot take the words; ENOTSUP or EINVAL: the architecture has no
            log. Nothing has been cleared.

        See Also
        --------
        dirtylog.vm.dirty_log.get_dirty_log : the steps, their order and their locks.
        """
        return self.arch.get_dirty_log(self, operator.index(slot), out)

    def clear_dirty_log(self, slot: int, first_page: int, num_pages: int, dirty: DirtyPages) -> None:
        """Clear reported bits and write-protect their pages again.

        The second half of manual protection: `get_dirty_log` has reported the
        pages, the caller is about to copy them, and only pages that were
        reported are cleared.

        Parameters
        ----------
        slot : int
            Memory slot id.
        first_page, num_pages : int
            Range within the slot, in pages. `first_page` is a multiple of 64, and
            `num_pages` too unless the range ends at the slot's end.
        dirty : DirtyPages
            Pages to clear, numbered from the start of the slot; those outside the
            range are left alone.

        Raises
        ------
        OSError
            EINVAL: unaligned or out of range, or no manual protection; ENOENT: the
            slot keeps no log; ENXIO: the machine has dirty rings.
        TypeError
            `dirty` is not a DirtyPages, or a number is not an integer.
        ValueError
            `dirty` is about another number of pages, or pages of another size.

        Notes
        -----
        Clear before you copy (I3): a write during the copy is then seen next time.

        References
        ----------
        ``kvm_clear_dirty_log_protect`` in Linux ``virt/kvm/kvm_main.c``.
        """
        first, count = operator.index(first_page), operator.index(num_pages)
        dirty_log.clear_dirty_log(self, operator.index(slot), first, count, dirty)

    def harvest_rings(self) -> dict[int, DirtyPages]:
        """Harvest and reset every vCPU's dirty ring: ``KVM_RESET_DIRTY_RINGS``.

        Returns
        -------
        dict of int to DirtyPages
            One entry for each slot that keeps a log.

        Raises
        ------
        OSError
            EINVAL: the machine has no dirty rings.
        """
        if self.rings is None:
            raise OSError(errno.EINVAL, "the machine has no dirty rings; create it with dirty_ring=4096")
        taken: dict[int, DirtyPages] = {}
        try:
            with self.slots_lock:
                self.rings.harvest(taken)
            # Not inside: a signal handler may run when the lock has been released.
            return taken
        except BaseException:
            self.rings.owe(taken)
            raise

    def harvest(self, slot: int) -> DirtyPages:
        """Get and clear a slot's log, whichever way the machine keeps it; what `slot(id).harvest()` does."""
        slot = operator.index(slot)
        if self.rings is not None:
            taken: dict[int, DirtyPages] = {}
            try:
                with self.slots_lock:
                    self.rings.take(slot, taken)
                return taken[slot]
            except BaseException:
                self.rings.owe(taken)
                raise
        if not self.manual_protect:
            return self.get_dirty_log(slot)
        # Two calls to the machine make one harvest: two harvesters must not both report what is between them.
        with self.harvest_lock:
            pages = self.get_dirty_log(slot)
            with self.slots_lock:
                # Of the slot as it is now: it may have been made anew since, with another size.
                owed = self.owed_by(slot, self.check_log(slot))
            if pages:
                # I5: from the clear on, until they are handed out, nobody else knows of them.
                owed.owe(pages)
                dirty_log.clear_dirty_log(self, slot, 0, pages.npages, pages, keep_owed=True)
            return owed.hand_out(DirtyPages._empty(pages.npages, self.page_size))

    def peek(self, slot: int) -> DirtyPages:
        """Copy a slot's log; clears nothing."""
        slot = operator.index(slot)
        if self.rings is not None:
            with self.slots_lock:
                return self.rings.peek(slot)
        return dirty_log.peek(self, slot)

    def __repr__(self) -> str:
        """Name the architecture and the number of vCPUs."""
        return f"<VM: {self.arch.name}, {len(self.vcpus)} vCPUs>"
