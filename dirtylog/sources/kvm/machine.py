"""A virtual machine of KVM: memory slots and their dirty log, by bitmap, by manual protection or by rings."""

from __future__ import annotations

import errno
import operator
import os
import struct
import threading
import weakref
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Literal

import numpy as np

from dirtylog._bits.pages import DirtyPages
from dirtylog._kvm_arguments import check_dirty, check_out
from dirtylog.errors import BackendUnavailable
from dirtylog.sources._resource import Resource
from dirtylog.sources.kvm import _kvm
from dirtylog.sources.kvm.memslots import PAGE_SIZE, Region, Slot, lend, refuse
from dirtylog.sources.kvm.rings import Rings
from dirtylog.sources.kvm.vcpu import Vcpu

if TYPE_CHECKING:
    import numpy.typing as npt

    from dirtylog._typing import Memory

__all__ = ["VM"]

_REGION = struct.Struct("=IIQQQ")
_ENABLE = struct.Struct("=IIQ88x")
_LOG_DIRTY_PAGES = 1 << 0
_MANUAL_PROTECT, _INITIALLY_SET = 1 << 0, 1 << 1
_RING_ENTRY_BYTES = 16

_MANUAL = ("KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2", 168)
# Where both are offered they differ only in the barriers that user space owes; ours serve either.
_RINGS = (("KVM_CAP_DIRTY_LOG_RING_ACQ_REL", 223), ("KVM_CAP_DIRTY_LOG_RING", 192))


_machines: weakref.WeakSet[VM] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    # Whoever held the lock is in the other process.
    for machine in list(_machines):
        machine._lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)


class VM(Resource):
    """One virtual machine; made by `Kvm.create_vm`.

    Notes
    -----
    Any method from any thread. A lock of the VM is held around every change of
    a slot and every harvest; `Vcpu.run` and `get_dirty_log` do not take it. In
    the child of a fork every call is OSError EIO, as KVM has it, and `close`
    gives back what the child inherited.
    """

    page_size = PAGE_SIZE

    def __init__(self, handle: _kvm.Handle, system: object, capabilities: Mapping[str, int], run_size: int) -> None:
        super().__init__()
        self.capabilities = capabilities
        self._handle = handle
        self._system = system
        self._run_size = run_size
        self._lock = threading.RLock()
        self._regions: dict[int, Region] = {}
        # How the log is kept: a bitmap (None), a bitmap under manual protection, or rings. In a list, where the call
        # that makes the kernel change its ways notes it.
        self._way: list[Literal["manual"] | Rings | None] = [None]
        self._vcpus: list[Vcpu] = []
        # The descriptor of a vCPU that the kernel has made and we have not wrapped yet, or -1.
        self._unwrapped = [-1]
        _machines.add(self)
        self._closed = False

    @property
    def _rings(self) -> Rings | None:
        way = self._way[0]
        return way if isinstance(way, Rings) else None

    @property
    def _manual(self) -> bool:
        return self._way[0] == "manual"

    def __repr__(self) -> str:
        """Show slots, vCPUs and whether it is open."""
        state = "closed" if self.closed else f"{len(self._regions)} slots, {len(self._vcpus)} vCPUs"
        return f"<kvm.{self._handle.name}, {state}>"

    # ---- memory -------------------------------------------------------------

    def set_memory_region(
        self, slot: int, base_gfn: int, npages: int, log_dirty: bool = True, memory: Memory | None = None
    ) -> None:
        """Create, move, change or delete a memory slot.

        Parameters
        ----------
        slot : int
            Slot id.
        base_gfn : int
            First guest frame number.
        npages : int
            Size in pages; 0 deletes the slot.
        log_dirty : bool, optional
            Keep a dirty log.
        memory : writable buffer, array or opened snapshot, optional
            Page-aligned, contiguous, at least ``npages * page_size`` bytes:
            `dirtylog.zeros` makes such arrays. It is kept alive, and cannot be
            resized or unmapped by its owner, until the slot is deleted or the
            VM closed. Without it a new slot gets anonymous memory, an existing
            one keeps what it has.

        Raises
        ------
        TypeError
            `memory` has no memory of its own.
        ValueError
            `memory` is read-only, has gaps, is not page-aligned or too small; the VM is closed.
        OSError
            EEXIST: overlaps another slot; EINVAL: a slot id out of range, or a
            change that KVM does not know (delete the slot first).

        Notes
        -----
        Deleting a slot or switching its log off drops the log, moving it
        keeps it, as in KVM. Harvest first.

        References
        ----------
        ``kvm_set_memory_region`` in Linux ``virt/kvm/kvm_main.c``.
        """
        self._handle.fileno()
        slot, base_gfn, npages = operator.index(slot), operator.index(base_gfn), operator.index(npages)
        self._check_slot(slot)
        if base_gfn < 0 or npages < 0 or (base_gfn + npages) * self.page_size >= 1 << 64:
            refuse(errno.EINVAL, f"slot {slot}: {npages} pages from gfn {base_gfn} are not at a 64-bit guest address")
        with self._lock:
            old = self._regions.get(slot)
            if npages == 0:
                if old is None:
                    refuse(errno.EINVAL, f"slot {slot} does not exist, so it cannot be deleted")
                # The slot is gone from `_regions` as soon as the kernel has let go of it, whatever fails below.
                self._kernel_region(slot, 0, old.base_gfn, 0, 0, ending=old.pinned, forget=self._regions)
                try:
                    if old.log_dirty:
                        self._forget_log(old)
                finally:
                    old.pinned.release()
                return
            if old is not None:
                if npages != old.npages:
                    refuse(
                        errno.EINVAL,
                        f"slot {slot} has {old.npages} pages, not {npages}; delete it and create it again",
                    )
                memory = old.memory if memory is None else memory
            memory, pinned = lend(slot, npages, memory)
            self._install(Region(slot, base_gfn, npages, log_dirty, memory, pinned), old)

    def _kernel_region(
        self,
        slot: int,
        flags: int,
        base_gfn: int,
        npages: int,
        address: int,
        ending: _kvm.Pinned | None = None,
        forget: dict[int, Region] | None = None,
    ) -> None:
        size = npages * self.page_size
        argument = bytearray(_REGION.pack(slot, flags, base_gfn * self.page_size, size, address))
        what = f"KVM_SET_USER_MEMORY_REGION of slot {slot}, {npages} pages from gfn {base_gfn}"
        self._handle.ioctl(_kvm.SET_USER_MEMORY_REGION, argument, what, ending, forget, slot)

    def _install(self, new: Region, old: Region | None) -> None:
        # A ring may name the slot as soon as the kernel knows it: it has a place in the log before.
        rings = self._rings
        logs_anew = rings is not None and new.log_dirty and not (old and old.log_dirty)
        if old is not None and old.log_dirty and new.log_dirty:
            # Moving a slot keeps KVM's bitmap, so it keeps what we hold of it.
            new.owed = old.owed
        if rings and logs_anew:
            if rings.knows(new.slot):
                # An interrupt came between the end of the slot that had this number and our record of it.
                rings.drain(self._handle)
                rings.remove_slot(new.slot)
            rings.add_slot(new.slot, new.npages)
        # Known before the kernel has its memory: an interrupt must not free what a guest writes to.
        self._regions[new.slot] = new
        try:
            flags = _LOG_DIRTY_PAGES if new.log_dirty else 0
            self._kernel_region(new.slot, flags, new.base_gfn, new.npages, new.pinned.address)
        except BaseException as error:
            if old is not None and old.log_dirty and not new.log_dirty and not isinstance(error, OSError):
                # The kernel may have dropped the log that the slot keeps after all (I6).
                old.owed.owe_everything()
            # Refused, or interrupted before or after it was done: as it was, in either case.
            with suppress(OSError, ValueError):
                self._restore(new, old)
            if rings and logs_anew:
                rings.remove_slot(new.slot)
            if old is None:
                del self._regions[new.slot]
            else:
                self._regions[new.slot] = old
            raise
        if old is not None:
            try:
                if old.log_dirty and not new.log_dirty:
                    self._forget_log(old)
            finally:
                old.pinned.release()

    def _restore(self, new: Region, old: Region | None) -> None:
        if old is None:
            self._kernel_region(new.slot, 0, new.base_gfn, 0, 0, ending=new.pinned)
        else:
            flags = _LOG_DIRTY_PAGES if old.log_dirty else 0
            self._kernel_region(old.slot, flags, old.base_gfn, old.npages, old.pinned.address)

    def _forget_log(self, region: Region) -> None:
        # The kernel pushes no entry for the slot once the ioctl has returned:
        # what the rings still hold for it is emptied here, and an entry that
        # names an unknown slot later is a foreign one.
        if self._rings:
            try:
                self._rings.drain(self._handle)
            finally:
                self._rings.remove_slot(region.slot)

    # ---- the log, slot by slot ------------------------------------------------

    def _region(self, slot: int) -> Region:
        region = self._regions.get(slot)
        if region is None:
            self._handle.fileno()
            self._check_slot(operator.index(slot))
            refuse(errno.ENOENT, f"slot {slot} does not exist; there are {sorted(self._regions)}")
        return region

    def _check_slot(self, slot: int) -> None:
        slots = self.capabilities["KVM_CAP_NR_MEMSLOTS"]
        if not 0 <= slot < slots:
            refuse(errno.EINVAL, f"slot {slot} is out of range; KVM has slots 0 to {slots - 1}")

    def memory(self, slot: int) -> npt.NDArray[np.uint8]:
        """Return a slot's bytes: the live guest memory; OSError ENOENT when there is no such slot.

        Writes through it are the host's, and KVM does not log them.
        """
        region = self._region(slot)
        view = memoryview(region.memory)  # type: ignore[arg-type]  # an array is one, on Python 3.11 too
        return np.frombuffer(view, np.uint8, region.npages * self.page_size)

    def get_dirty_log(self, slot: int, out: object = None) -> DirtyPages:
        """Report the pages of a slot written since the last report (KVM_GET_DIRTY_LOG).

        Parameters
        ----------
        slot : int
            Slot id.
        out : buffer of uint64, optional
            Also receives the words: ``ceil(npages / 64)`` of them, writable and contiguous.

        Returns
        -------
        DirtyPages
            Numbered from the slot's start.

        Raises
        ------
        OSError
            ENOENT: no such slot, or it keeps no log; EINVAL: slot out of range;
            EFAULT: `out` cannot take the words; ENXIO: the rings are enabled.

        Notes
        -----
        Clears the log and write-protects again; under manual protection it
        does neither, see `clear_dirty_log`. Takes KVM's `slots_lock`; O(npages / 64).

        References
        ----------
        ``kvm_get_dirty_log_protect`` in Linux ``virt/kvm/kvm_main.c``.
        """
        # Straight to the ioctl and without the VM's lock: with little dirty, a
        # lock costs as much as the rest of this method.
        region = self._regions.get(slot) or self._region(slot)
        words = None if out is None else check_out(slot, out, region.npages)
        manual = self._way[0] == "manual"
        pages = region.look(self._handle) if manual else region.report(self._handle, keep=False)
        if words is not None:
            try:
                words[:] = pages.words
            except BaseException:
                # No memory for the words, or an interrupt (I5).
                region.owed.owe(pages)
                raise
        return pages

    def clear_dirty_log(self, slot: int, first_page: int, num_pages: int, dirty: DirtyPages) -> None:
        """Clear reported bits and write-protect their pages again (KVM_CLEAR_DIRTY_LOG).

        Parameters
        ----------
        slot : int
            Slot id.
        first_page, num_pages : int
            Range within the slot, in pages. `first_page` is a multiple of 64, and
            `num_pages` too unless the range ends at the slot's end.
        dirty : DirtyPages
            Pages to clear, numbered from the start of the slot.

        Raises
        ------
        TypeError
            `dirty` is not a DirtyPages, or a number is not an integer.
        ValueError
            `dirty` is not about `npages` pages of the slot.
        OSError
            EINVAL: unaligned or outside the slot; ENOENT: no such slot, or it keeps no log.

        Notes
        -----
        Clear before you copy (I3): a write during the copy is then seen next time.

        References
        ----------
        ``kvm_clear_dirty_log_protect`` in Linux ``virt/kvm/kvm_main.c``.
        """
        slot, first_page, num_pages = operator.index(slot), operator.index(first_page), operator.index(num_pages)
        cleared = [False]
        try:
            with self._lock:
                region = self._region(slot)
                check_dirty(slot, dirty, region.npages, self.page_size)
                if not (0 <= first_page < 1 << 63 and 0 <= num_pages < 1 << 32):
                    refuse(errno.EINVAL, f"slot {slot}: {num_pages} pages from {first_page} are outside it")
                self._handle.clear_dirty_log(slot, first_page, num_pages, dirty.words, cleared)
                if region.owed and num_pages:
                    runs = [(first_page, num_pages)]
                    region.owed.forget_pages(dirty & DirtyPages.from_runs(runs, region.npages, self.page_size))
        except BaseException:
            # I5: nobody has heard that they are cleared. The kernel does not say which of them it cleared.
            if cleared[0]:
                region.owed.owe(dirty)
            raise

    def enable_manual_protect(self, initially_set: bool = False) -> None:
        """Let `get_dirty_log` report without clearing, and `clear_dirty_log` clear.

        Parameters
        ----------
        initially_set : bool, optional
            Slots that begin to log later report every page the first time.

        Raises
        ------
        BackendUnavailable
            The kernel does not offer it.
        OSError
            EINVAL: the rings are enabled.
        """
        wanted = _MANUAL_PROTECT | (_INITIALLY_SET if initially_set else 0)
        name, number = _MANUAL
        offered = self.capabilities[name]
        if wanted & ~offered:
            raise BackendUnavailable("KVM manual protection", f"{name} is {offered}, {wanted} is needed")
        with self._lock:
            if self._rings:
                # Initially-all-set leaves pages writable that a ring would have to hear of.
                refuse(errno.EINVAL, "manual protection and dirty rings exclude each other in one VM")
            self._enable(f"{name} with {wanted}", number, wanted, "manual")

    def _enable(self, what: str, number: int, argument: int, way: Literal["manual"] | Rings) -> None:
        """Change how the log is kept, here and in the kernel, by one call: an interrupt finds both or none."""
        packed = bytearray(_ENABLE.pack(number, 0, argument))
        self._handle.ioctl(_kvm.ENABLE_CAP, packed, f"KVM_ENABLE_CAP of {what}", record=self._way, value=way)

    # ---- rings ---------------------------------------------------------------

    def enable_dirty_ring(self, entries: int) -> None:
        """Give every vCPU a ring of dirty pages in place of the slots' bitmaps.

        Parameters
        ----------
        entries : int
            Capacity of a ring in pages: a power of two. A vCPU leaves with
            ``"DIRTY_RING_FULL"`` when 64 entries are left (512 more with PML). Make room
            then by the `peek` of any slot, which takes the pages from nobody.
            Hardware takes one entry for each page until it is harvested; a KVM in
            software takes one for every write.

        Raises
        ------
        BackendUnavailable
            The kernel does not offer it.
        OSError
            EINVAL: not a power of two, too small or too large, a vCPU exists already,
            enabled before, or manual protection is on.

        References
        ----------
        ``KVM_CAP_DIRTY_LOG_RING`` in Linux ``Documentation/virt/kvm/api.rst``.
        """
        offered = [(name, number) for name, number in _RINGS if self.capabilities[name]]
        if not offered:
            raise BackendUnavailable("KVM dirty rings", f"{_RINGS[0][0]} and {_RINGS[1][0]} are 0")
        name, number = offered[0]
        entries = operator.index(entries)
        most = self.capabilities[name] // _RING_ENTRY_BYTES
        if entries <= 0 or entries & (entries - 1) or entries > most:
            refuse(errno.EINVAL, f"a dirty ring has a power of two of entries up to {most}, not {entries}")
        with self._lock:
            if self._vcpus:
                refuse(errno.EINVAL, "enable the dirty ring before the first vCPU is created")
            if self._manual:
                refuse(errno.EINVAL, "manual protection and dirty rings exclude each other in one VM")
            if self._rings:
                refuse(errno.EINVAL, f"dirty rings of {self._rings.entries} entries are enabled already")
            # Complete before the kernel hears of it.
            rings = Rings(entries, self.page_size, self._lock)
            for region in self._regions.values():
                if region.log_dirty:
                    rings.add_slot(region.slot, region.npages)
            self._enable(f"{name}, {entries} entries per ring", number, entries * _RING_ENTRY_BYTES, rings)

    def harvest_rings(self) -> dict[int, DirtyPages]:
        """Empty the rings of all vCPUs and report the pages written since the last harvest.

        Returns
        -------
        dict of int to DirtyPages
            One entry for each slot that keeps a log.

        Raises
        ------
        OSError
            EINVAL: the rings are not enabled. Otherwise the kernel's errno, and
            the pages are reported by the next harvest (I5).

        Warns
        -----
        IncompleteLogWarning
            A ring overflowed, or held an entry for no page of ours: every page
            is reported, ``exact=False`` (I6).

        Notes
        -----
        The order is: read the entries and mark them for reset; let KVM
        write-protect their pages again; hand them out. A write between the
        first and the second step goes unlogged and is harmless: its page is in
        this harvest, and its content is read later (I2).

        What the guest wrote before the call is in this harvest or in an earlier
        one. Intel's page-modification logging keeps the latest pages of a vCPU
        in hardware until it leaves guest mode, so every vCPU that runs is made
        to leave once, and is waited for, before the rings are read. Its `run`
        goes on by itself: it costs the guest some microseconds, and the exit is
        not reported. A vCPU that is not running is left alone.

        What this returns is handed out: a slot's `harvest`, and an observer of a
        log that it is attached to, hear of later pages alone. Where those are to
        have them and a ring is full, `peek` a slot instead.

        May be called from any thread, also from one that runs a vCPU, and from
        a signal handler.

        References
        ----------
        ``kvm_vm_ioctl_reset_dirty_pages`` in Linux ``virt/kvm/kvm_main.c``;
        ``KVM_CAP_DIRTY_LOG_RING`` in Linux ``Documentation/virt/kvm/api.rst``.
        """
        self._handle.fileno()
        rings = self._rings
        if rings is None:
            refuse(errno.EINVAL, "the dirty ring is not enabled; call enable_dirty_ring before create_vcpu")
        taken: dict[int, DirtyPages] = {}
        try:
            with self._lock:
                rings.drain(self._handle)
                rings.take([region.slot for region in self._regions.values() if region.log_dirty], taken, 4)
            # Not inside: a signal handler may run when the lock has been released.
            return taken
        except BaseException:
            rings.owe(taken)
            raise

    # ---- sources and vCPUs -----------------------------------------------------

    def slot(self, slot: int) -> Slot:
        """Return a slot as a source of dirty pages; OSError ENOENT when there is none."""
        return Slot(self, self._region(slot))

    def harvest_slot(self, region: Region) -> DirtyPages:
        """Get and clear, in whatever way the log is kept; for `Slot`."""
        rings = self._rings
        if rings:
            taken: dict[int, DirtyPages] = {}
            try:
                with self._lock:
                    region = self._still(region)
                    rings.drain(self._handle)
                    rings.take([region.slot], taken, 5)
                return taken[region.slot]
            except BaseException:
                rings.owe(taken)
                raise
        with self._lock:
            region = self._still(region)
            if self._manual:
                return region.harvest_manual(self._handle)
            return region.report(self._handle, keep=False)

    def peek_slot(self, region: Region) -> DirtyPages:
        """Report and keep, in whatever way the log is kept; for `Slot`."""
        with self._lock:
            region = self._still(region)
            if self._rings:
                self._rings.drain(self._handle)
                return self._rings.peek(region.slot, 5)
            # Manual protection keeps the bits itself.
            return region.look(self._handle) if self._manual else region.report(self._handle, keep=True)

    def _still(self, region: Region) -> Region:
        now = self._region(region.slot)
        if now.npages != region.npages:
            refuse(errno.ENOENT, f"slot {region.slot} is another one since; ask for slot({region.slot}) again")
        if not now.log_dirty:
            refuse(errno.ENOENT, f"slot {region.slot} keeps no log; set it with log_dirty=True")
        return now

    def create_vcpu(self) -> Vcpu:
        """Make a virtual CPU, in reset state.

        Returns
        -------
        Vcpu
            A context manager; closing the VM closes it too.

        Raises
        ------
        BackendUnavailable
            The kernel (before Linux 4.13) cannot be made to return from a run without a race.
        OSError
            With the kernel's errno.
        """
        if not self.capabilities["KVM_CAP_IMMEDIATE_EXIT"]:
            raise BackendUnavailable("running a vCPU", "KVM_CAP_IMMEDIATE_EXIT is 0")
        with self._lock:
            index = len(self._vcpus)
            # KVM makes each number once: what fails or is interrupted below finds it here the next time.
            if self._unwrapped[0] < 0:
                self._handle.ioctl(_kvm.CREATE_VCPU, index, f"KVM_CREATE_VCPU {index}", record=self._unwrapped)
            handle = _kvm.VcpuHandle(self._unwrapped, f"vCPU {index}", self._run_size)
            try:
                ring = self._rings.add_vcpu(index, handle) if self._rings else None
            except BaseException:
                handle.close()
                raise
            vcpu = Vcpu(handle, index, self._rings, ring)
            descriptor, self._unwrapped[0] = self._unwrapped[0], -1
            try:
                self._vcpus.append(vcpu)
            finally:
                os.close(descriptor)
            return vcpu

    def _release(self) -> None:
        """Close the VM and its vCPUs, then let go of the slots' memory; the second time does nothing."""
        self._handle.close()
        descriptor, self._unwrapped[0] = self._unwrapped[0], -1
        if descriptor >= 0:
            os.close(descriptor)
        # Not under the lock: a run under way may end in `Rings.note_full`, which takes it.
        for vcpu in list(self._vcpus):
            vcpu.close()
        with self._lock:
            if self._rings:
                self._rings.close()
            for region in self._regions.values():
                region.pinned.release()
            self._regions.clear()
