"""Virtual CPUs: the guest's stores and loads, from as many threads as there are vCPUs."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING

import numpy as np

from dirtylog._bits.dirty_limit import DirtyLimit
from dirtylog.vm.rings import DirtyRingFull

if TYPE_CHECKING:
    import numpy.typing as npt
    from _typeshed import ReadableBuffer

    from dirtylog.vm._mmu import Mmu

__all__ = ["Vcpu"]

GPA_BITS = 63


def guest_frames(gfns: npt.ArrayLike) -> npt.NDArray[np.uint64]:
    """Return gfns as a flat uint64 array; refuse what is not an integer (TypeError) or negative (IndexError)."""
    array = np.asarray(gfns).reshape(-1)
    if array.size == 0:
        return np.empty(0, np.uint64)
    if array.dtype.kind not in "iu":
        raise TypeError(f"gfns are {array.dtype}; pass integers")
    if array.dtype.kind == "i" and (lowest := int(array.min())) < 0:
        raise IndexError(f"gfn {lowest} is negative; guest frames count from 0")
    return np.ascontiguousarray(array, np.uint64)


class Vcpu:
    """One virtual CPU; ``vm.vcpus[i]``.

    Notes
    -----
    Stores and loads release the GIL. A store and its translation are made in one
    stay in guest mode: a TLB flush waits for it, and once the flush has returned no
    store through an older entry lands. Two threads on one vCPU take turns.
    """

    def __init__(self, mmu: Mmu, index: int) -> None:
        self._mmu = mmu
        self.index = index
        self._limit = DirtyLimit()

    @property
    def faults(self) -> int:
        """Stores that left guest mode to be marked."""
        return self._mmu.faults(self.index)

    @property
    def dirtied(self) -> int:
        """Pages that it has dirtied: stores to write-protected pages."""
        return self.faults

    @property
    def dirty_limit(self) -> float | None:
        """Pages per second that it may dirty; None: as many as it likes. Stores of one call go through together.

        A vCPU that has dirtied more stands still before its next store. For any thread, at any time. ValueError for
        what is not a positive number. Architectures that log without write faults know of no pages to count.
        """
        return self._limit.rate

    @dirty_limit.setter
    def dirty_limit(self, rate: float | None) -> None:
        self._limit.hold(rate, self.dirtied)

    def write(self, gpa: int, data: ReadableBuffer) -> None:
        """Store bytes at a guest-physical address; they may cross pages and slots.

        Raises
        ------
        OSError
            EFAULT: a page is in no memslot. Nothing has been stored, unless the
            slot was deleted in the middle.
        IndexError
            `gpa` is negative or past the last address.
        DirtyRingFull
            The machine has dirty rings, and this one's soft limit is reached.
        """
        view = memoryview(data).cast("B")
        self._limit.wait(self.faults)
        self._check_done(self._mmu.write(self.index, check_gpa(gpa, view.nbytes), view), view.nbytes)

    def read(self, gpa: int, size: int) -> bytes:
        """Load `size` bytes from a guest-physical address; marks nothing.

        Raises
        ------
        OSError
            EFAULT: a page is in no memslot.
        IndexError
            `gpa` is negative or past the last address.
        """
        size = operator.index(size)
        if size < 0:
            raise ValueError(f"size {size} is negative; it counts bytes")
        return self._mmu.read(self.index, check_gpa(gpa, size), size)

    def touch(self, gfns: npt.ArrayLike) -> int:
        """Add 1 to the first byte of each page, in the order given.

        Parameters
        ----------
        gfns : array_like of int
            Guest frame numbers; duplicates touch again.

        Returns
        -------
        int
            Number of touches.

        Raises
        ------
        OSError
            EFAULT: a page is in no memslot. Nothing has been touched, unless the
            slot was deleted in the middle.
        DirtyRingFull
            The machine has dirty rings, and this one's soft limit is reached.
        """
        frames = guest_frames(gfns)
        self._limit.wait(self.faults)
        return self._check_done(self._mmu.store(self.index, frames), frames.size)

    def store(self, gfns: npt.ArrayLike, value: int) -> int:
        """Store one 64-bit `value`, little-endian, at the start of each page; else as `touch`."""
        frames = guest_frames(gfns)
        self._limit.wait(self.faults)
        return self._check_done(self._mmu.store(self.index, frames, operator.index(value)), frames.size)

    def _check_done(self, done: int, wanted: int) -> int:
        if done < wanted:
            raise DirtyRingFull(self.index, done)
        return done

    def __repr__(self) -> str:
        """Name the vCPU."""
        return f"<vCPU {self.index}>"


def check_gpa(gpa: int, size: int) -> int:
    """Return a guest-physical address that with `size` bytes is in the address space, else IndexError."""
    gpa = operator.index(gpa)
    if gpa < 0 or gpa + size > 1 << GPA_BITS:
        raise IndexError(f"gpa {gpa:#x} with {size} bytes is out of range: addresses are 0 to {(1 << GPA_BITS) - 1:#x}")
    return gpa
