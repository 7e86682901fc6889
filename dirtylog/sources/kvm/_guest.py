"""A real guest of a few instructions that writes one byte into each page of a list: for measuring and testing."""

from __future__ import annotations

import mmap
from typing import TYPE_CHECKING

import numpy as np

from dirtylog.errors import DirtyLogError
from dirtylog.sources.kvm.vcpu import Exit, Regs

if TYPE_CHECKING:
    import numpy.typing as npt

    from dirtylog.sources.kvm.machine import VM

__all__ = ["Guest"]


def _program(padding: int) -> bytes:
    body = (
        b"\x8b\x06"  # mov eax, [esi]     the next address
        b"\x83\xc6\x04"  # add esi, 4
        b"\x88\x10"  # mov [eax], dl
    )
    body += b"\x90" * padding + b"\x49"  # nop ..., dec ecx
    back = -(len(body) + 6)
    return body + b"\x0f\x85" + back.to_bytes(4, "little", signed=True) + b"\xf4"  # jnz body; hlt


class Guest:
    """A vCPU with its program: 32-bit protected mode without paging.

    Parameters
    ----------
    vm : kvm.VM
        The rings, if any, are enabled already.
    gfn : int, optional
        Where program and list go. They get a slot of their own, without a log.
    slot : int, optional
        Its id.
    capacity : int, optional
        Pages in one list.
    padding : int, optional
        Idle instructions for each page. In ring mode a software KVM needs more
        than 16, or the guest runs past the ring's reserve between two checks.
    """

    def __init__(self, vm: VM, gfn: int = 0, slot: int = 99, capacity: int = 1 << 16, padding: int = 0) -> None:
        page = vm.page_size
        pages = 1 + -(-4 * capacity // page)
        memory = mmap.mmap(-1, pages * page, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        program = _program(padding)
        memory[: len(program)] = program
        self._list = np.frombuffer(memory, dtype="<u4", count=capacity, offset=page)
        self._entry = gfn * page
        self._page = page
        vm.set_memory_region(slot, gfn, pages, log_dirty=False, memory=memory)
        self.vcpu = vm.create_vcpu()
        self.vcpu.enter_flat32(self._entry)

    def load(self, gfns: npt.ArrayLike, value: int = 1) -> None:
        """Prepare to write `value` into the first byte of each page, in this order; run it with `step`."""
        addresses = np.asarray(gfns, dtype=np.uint64).ravel() * np.uint64(self._page)
        if not 0 < len(addresses) <= len(self._list) or addresses.max() >= 1 << 32:
            raise ValueError(f"a list has 1..{len(self._list)} pages below 4 GiB")
        self._list[: len(addresses)] = addresses
        entry = self._entry
        self.vcpu.set_regs(Regs(rip=entry, rsi=entry + self._page, rcx=len(addresses), rdx=value))

    def step(self) -> Exit:
        """Run until the guest leaves: ``"HLT"`` when the list is done."""
        return self.vcpu.run()

    def write(self, gfns: npt.ArrayLike, value: int = 1) -> None:
        """Write `value` into the first byte of each page, in this order; DirtyLogError when the guest gets stuck."""
        self.load(gfns, value)
        while (left := self.step()).reason == "INTR":
            pass
        if left.reason != "HLT":
            raise DirtyLogError(f"the guest left with {left}, not with HLT")
