"""The dirty rings of one KVM machine: emptied in the right order, and distrusted when they have lost entries."""

from __future__ import annotations

import threading
import warnings
from typing import Any

from dirtylog._bits.pages import DirtyPages
from dirtylog.errors import DirtyLogError, IncompleteLogWarning
from dirtylog.sources.kvm import _kvm

__all__ = ["Rings"]


class Rings:
    """The rings of all vCPUs, and what they reported for each slot.

    Parameters
    ----------
    entries : int
        Capacity of a ring in pages.
    page_size : int
        In bytes.
    lock : RLock
        The VM's; held by the caller of every method but `note_full`, which takes it.

    Notes
    -----
    KVM reports no overflow. It is recognised by what it leaves behind: a ring
    without a free entry, entries behind a free one, a ring called full with
    nothing in it, a reset that takes back fewer entries than were read. After
    one, KVM's indexes are out of step with ours for good, so every later
    harvest reports everything (I6).
    """

    __slots__ = (
        "_incomplete",
        "_lock",
        "_log",
        "_page_size",
        "_told",
        "entries",
        "harvests",
        "rings",
        "vcpus",
    )

    def __init__(self, entries: int, page_size: int, lock: threading.RLock) -> None:
        self.entries: int = entries
        self.harvests: int = 0
        self.rings: list[_kvm.Ring] = []
        self.vcpus: list[_kvm.VcpuHandle] = []
        self._lock = lock
        self._page_size = page_size
        self._log = _kvm.RingLog()
        # By slot: why its next harvest reports everything. None: nothing is wrong.
        self._incomplete: dict[int, str] = {}
        # Slots whose warning raised: they are taken without another one.
        self._told: set[int] = set()

    def add_vcpu(self, index: int, handle: _kvm.VcpuHandle) -> _kvm.Ring:
        """Map the ring of vCPU `index`, which may have failed to be made before; OSError when it cannot be mapped."""
        ring = _kvm.Ring(handle, self.entries)
        # One ring for each vCPU: a second one on the same entries would take them for an overflow.
        self.rings[index:] = [ring]
        self.vcpus[index:] = [handle]
        return ring

    def add_slot(self, slot: int, npages: int) -> None:
        """Begin to collect for a slot: before the kernel hears of it."""
        self._log.add(slot, npages)
        self._incomplete[slot] = ""

    def remove_slot(self, slot: int) -> None:
        """Drop what was collected for a slot."""
        self._log.remove(slot)
        self._incomplete.pop(slot, None)
        self._told.discard(slot)

    def drain(self, handle: _kvm.Handle) -> None:
        """Read the entries and mark them for reset, then let KVM write-protect their pages again.

        First every guest that runs is made to leave once: page-modification
        logging keeps entries in hardware until then, where no harvest sees them.

        Raises
        ------
        OSError
            The reset failed with the kernel's errno; what was read stays for the next time (I5).
        """
        _kvm.leave_guest(self.vcpus)
        self.harvests += 1
        try:
            # What is marked for reset and what is known of it change in this one call, whatever interrupts us.
            self._log.drain_and_reset(handle, self.rings)
        finally:
            self._note_foreign()

    def _note_foreign(self) -> None:
        if self._log.foreign is not None:
            index, slot, offset = self._log.foreign
            why = f"the dirty ring of vCPU {index} named offset {offset} of slot {slot}, which is not a page of ours"
            self._incomplete = dict.fromkeys(self._incomplete, why)
            self._log.forget_foreign()

    @property
    def _lost(self) -> str:
        """Why nothing of these rings can be believed any more, or an empty string."""
        log = self._log
        if log.expected:
            return f"KVM took back {log.taken_back} of {log.expected} ring entries: a dirty ring overflowed"
        if log.overflowed >= 0:
            # The rings are gone when the machine is closed.
            entries = next((ring.entries for ring in self.rings[log.overflowed :]), self.entries)
            return f"the dirty ring of vCPU {log.overflowed} ({entries} entries) overflowed"
        return ""

    def knows(self, slot: int) -> bool:
        """Whether anything is kept for a slot."""
        return slot in self._log

    def warn_if_incomplete(self, slots: list[int], stacklevel: int) -> None:
        """Warn of slots whose next harvest reports everything; one whose warning raised is taken without another.

        Parameters
        ----------
        slots : list of int
            About to be taken.
        stacklevel : int
            Of `warnings.warn`: the user's frame.
        """
        suspects = [slot for slot in slots if self._why(slot) and slot not in self._told]
        try:
            for slot in suspects:
                self._warn(slot, stacklevel + 1)
        except BaseException:
            # Else a program that makes errors of warnings would never get its pages.
            self._told.update(suspects)
            raise

    def _why(self, slot: int) -> str:
        return self._lost or self._incomplete[slot]

    def _warn(self, slot: int, stacklevel: int) -> None:
        message = f"slot {slot}: {self._why(slot)}; every page is reported"
        warnings.warn(IncompleteLogWarning(message), stacklevel=stacklevel)

    def take(self, sizes: dict[int, int], taken: dict[int, DirtyPages]) -> dict[int, DirtyPages]:
        """Hand out what some slots have, given their sizes in pages; after `warn_if_incomplete`.

        Parameters
        ----------
        sizes : dict of int to int
            The slots, and their sizes in pages.
        taken : dict of int to DirtyPages
            Empty; gets every answer at the moment at which it is taken. Whatever breaks until the caller has
            returned it, `put_back` takes it (I5).
        """
        # I5: these exist before anything is taken.
        everything = {
            slot: DirtyPages._all(npages, self._page_size, exact=False)
            for slot, npages in sizes.items()
            if self._why(slot)
        }
        _kvm.take_slots(self._log, list(sizes), self._page_size, taken)
        for slot, pages in everything.items():
            taken[slot] = pages
            self._incomplete[slot] = ""
        self._told.difference_update(sizes)
        return taken

    def put_back(self, taken: dict[int, Any]) -> None:
        """Keep for the next harvest what was taken and not handed out."""
        for slot, pages in taken.items():
            if pages is None:
                continue
            if slot in self._incomplete and not pages.exact:
                self._incomplete[slot] = "a harvest of everything was not handed out"
            self._log.put_back(slot, pages)

    def peek(self, slot: int, npages: int) -> DirtyPages:
        """Report what a slot has, and keep it."""
        if self._why(slot):
            if slot not in self._told:
                self._warn(slot, 5)
            return DirtyPages._all(npages, self._page_size, exact=False)
        return self._log.copy(slot, self._page_size)

    def note_full(self, ring: _kvm.Ring, harvests: int) -> None:
        """Note that KVM_RUN called a ring full.

        Parameters
        ----------
        ring : Ring
            The vCPU's ring.
        harvests : int
            `harvests` before the run: with a harvest since, "full" may be old news.

        Raises
        ------
        DirtyLogError
            The ring is out of step after an overflow: full for ever, and nothing in it.
        """
        with self._lock:
            if self._lost:
                raise DirtyLogError(f"{self._lost}; this VM can no longer track, make a new one with a larger ring")
            if harvests == self.harvests:
                ring.mark_full()

    def close(self) -> None:
        """Unmap the rings."""
        for ring in self.rings:
            ring.close()
        self.rings.clear()
        self.vcpus.clear()
