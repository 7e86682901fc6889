"""The dirty rings of one KVM machine: emptied in the right order, and distrusted when they have lost entries."""

from __future__ import annotations

import functools
import threading
import warnings
from collections.abc import Iterable

from dirtylog._bits.owed import Owed, take_all
from dirtylog._bits.pages import DirtyPages
from dirtylog._core import DirtyBitmap
from dirtylog.errors import DirtyLogError, IncompleteLogWarning
from dirtylog.sources.kvm import _kvm

__all__ = ["Rings"]


class _Collected:
    """What the rings reported for one slot, and what of it is owed to its user."""

    __slots__ = ("bitmap", "npages", "owed", "why")

    def __init__(self, npages: int, page_size: int) -> None:
        self.npages: int = npages
        self.bitmap: DirtyBitmap = DirtyBitmap(npages, page_size)
        # I5: taken from the bitmap and not handed out; and everything, when an entry made no sense (I6).
        self.owed: Owed = Owed(npages, page_size)
        self.why: str = ""


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
        "_lock",
        "_log",
        "_page_size",
        "_slots",
        "entries",
        "rings",
        "vcpus",
    )

    def __init__(self, entries: int, page_size: int, lock: threading.RLock) -> None:
        self.entries: int = entries
        self.rings: list[_kvm.Ring] = []
        self.vcpus: list[_kvm.VcpuHandle] = []
        self._lock = lock
        self._page_size = page_size
        self._log = _kvm.RingLog()
        self._slots: dict[int, _Collected] = {}

    @property
    def harvests(self) -> int:
        """How often the rings were emptied: counted when KVM has taken the entries back, or has refused to."""
        return self._log.harvests

    def add_vcpu(self, index: int, handle: _kvm.VcpuHandle) -> _kvm.Ring:
        """Map the ring of vCPU `index`, which may have failed to be made before; OSError when it cannot be mapped."""
        ring = _kvm.Ring(handle, self.entries)
        # One ring for each vCPU: a second one on the same entries would take them for an overflow.
        self.rings[index:] = [ring]
        self.vcpus[index:] = [handle]
        return ring

    def add_slot(self, slot: int, npages: int) -> None:
        """Begin to collect for a slot: before the kernel hears of it."""
        self._slots[slot] = _Collected(npages, self._page_size)
        self._log.add(slot, self._slots[slot].bitmap)

    def remove_slot(self, slot: int) -> None:
        """Drop what was collected for a slot."""
        self._log.remove(slot)
        self._slots.pop(slot, None)

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
        try:
            # What is marked for reset and what is known of it change in this one call, whatever interrupts us.
            self._log.drain_and_reset(handle, self.rings)
        finally:
            self._note_foreign()

    def _note_foreign(self) -> None:
        if self._log.foreign is not None:
            index, slot, offset = self._log.foreign
            why = f"the dirty ring of vCPU {index} named offset {offset} of slot {slot}, which is not a page of ours"
            for collected in self._slots.values():
                collected.why = why
                collected.owed.owe_everything()
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

    def _warn(self, stacklevel: int, slot: int, _: DirtyPages) -> None:
        message = f"slot {slot}: {self._lost or self._slots[slot].why}; every page is reported"
        warnings.warn(IncompleteLogWarning(message), stacklevel=stacklevel)

    def _asked(self, slot: int) -> _Collected:
        collected = self._slots[slot]
        if self._lost:
            # I6: for good.
            collected.owed.owe_everything()
        return collected

    def take(self, slots: Iterable[int], taken: dict[int, DirtyPages], stacklevel: int) -> dict[int, DirtyPages]:
        """Hand out what some slots have, and warn of those that have everything.

        Parameters
        ----------
        slots : iterable of int
            All of them, or none, are taken.
        taken : dict of int to DirtyPages
            Empty; gets the answers. Whatever breaks until the caller has returned it, `owe` takes it (I5).
        stacklevel : int
            Of `warnings.warn`: the user's frame.
        """
        requests = []
        for slot in slots:
            collected = self._asked(slot)
            requests.append((slot, collected.owed, collected.bitmap.harvest))
        return take_all(requests, taken, functools.partial(self._warn, stacklevel))

    def owe(self, taken: dict[int, DirtyPages]) -> None:
        """Keep for the next harvest what was taken and not handed out; without the lock."""
        for slot, pages in taken.items():
            collected = self._slots.get(slot)
            # It may be gone, or another one.
            if collected is not None and collected.npages == pages.npages:
                collected.owed.owe(pages)

    def peek(self, slot: int, stacklevel: int) -> DirtyPages:
        """Report what a slot has, and keep it."""
        collected = self._asked(slot)
        warn = functools.partial(self._warn, stacklevel, slot)
        return collected.owed.peek(collected.bitmap.peek(), warn)

    def note_full(self, ring: _kvm.Ring, harvests: int) -> None:
        """Note that KVM_RUN called a ring full.

        Parameters
        ----------
        ring : Ring
            The vCPU's ring.
        harvests : int
            `harvests` before the run: with one since, also one that had begun by then, "full" may be old news.

        Raises
        ------
        DirtyLogError
            The ring is out of step after an overflow: full for ever, and nothing in it.
        """
        with self._lock:
            if self._lost:
                raise DirtyLogError(f"{self._lost}; this VM can no longer track, make a new one with a larger ring")
            # A ring of entries that KVM refused to take back is full with nothing in it to read, and has lost none.
            if harvests == self.harvests and not self._log.outstanding:
                ring.mark_full()

    def close(self) -> None:
        """Unmap the rings."""
        for ring in self.rings:
            ring.close()
        self.rings.clear()
        self.vcpus.clear()
