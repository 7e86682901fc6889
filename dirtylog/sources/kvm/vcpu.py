"""A virtual CPU of KVM: its registers, running it, why it left."""

from __future__ import annotations

import struct
from dataclasses import astuple, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from dirtylog._bits.dirty_limit import DirtyLimit
from dirtylog.sources._resource import Resource
from dirtylog.sources.kvm import _kvm

if TYPE_CHECKING:
    from dirtylog.sources.kvm.rings import Rings

__all__ = ["Dtable", "Exit", "Regs", "Segment", "Sregs", "Vcpu"]

# KVM_EXIT_*, in the order of their numbers.
# fmt: off
EXIT_REASONS = (
    "UNKNOWN", "EXCEPTION", "IO", "HYPERCALL", "DEBUG", "HLT", "MMIO", "IRQ_WINDOW_OPEN", "SHUTDOWN", "FAIL_ENTRY",
    "INTR", "SET_TPR", "TPR_ACCESS", "S390_SIEIC", "S390_RESET", "DCR", "NMI", "INTERNAL_ERROR", "OSI", "PAPR_HCALL",
    "S390_UCONTROL", "WATCHDOG", "S390_TSCH", "EPR", "SYSTEM_EVENT", "S390_STSI", "IOAPIC_EOI", "HYPERV", "ARM_NISV",
    "X86_RDMSR", "X86_WRMSR", "DIRTY_RING_FULL", "AP_RESET_HOLD", "X86_BUS_LOCK", "XEN", "RISCV_SBI", "RISCV_CSR",
    "NOTIFY", "LOONGARCH_IOCSR", "MEMORY_FAULT",
)
# fmt: on

CR0_PE = 1 << 0
RFLAGS_ALWAYS = 1 << 1

_REGS = struct.Struct("=18Q")
_SEGMENT = struct.Struct("=QIH9Bx")
_DTABLE = struct.Struct("=QH6x")
_CONTROL = struct.Struct("=7Q4Q")
# struct kvm_run: whether it is to return at once, exit_reason, and the union that says more.
_IMMEDIATE_EXIT = 1
_REASON = struct.Struct("=8xI")
_UNION = 32
_IO = struct.Struct("=BBHIQ")
_MMIO = struct.Struct("=Q8sIB")
_INTERNAL = struct.Struct("=II16Q")
_WORDS = struct.Struct("=3Q")


@dataclass(slots=True)
class Regs:
    """``struct kvm_regs``: the general registers."""

    rax: int = 0
    rbx: int = 0
    rcx: int = 0
    rdx: int = 0
    rsi: int = 0
    rdi: int = 0
    rsp: int = 0
    rbp: int = 0
    r8: int = 0
    r9: int = 0
    r10: int = 0
    r11: int = 0
    r12: int = 0
    r13: int = 0
    r14: int = 0
    r15: int = 0
    rip: int = 0
    rflags: int = RFLAGS_ALWAYS


@dataclass(slots=True)
class Segment:
    """``struct kvm_segment``: a segment register with its hidden part."""

    base: int = 0
    limit: int = 0xFFFF
    selector: int = 0
    type: int = 3
    present: int = 1
    dpl: int = 0
    db: int = 0
    s: int = 1
    l: int = 0  # noqa: E741  the kernel's name
    g: int = 0
    avl: int = 0
    unusable: int = 0


@dataclass(slots=True)
class Dtable:
    """``struct kvm_dtable``: a descriptor table's place."""

    base: int = 0
    limit: int = 0


@dataclass(slots=True)
class Sregs:
    """``struct kvm_sregs``: segments, tables and control registers."""

    cs: Segment
    ds: Segment
    es: Segment
    fs: Segment
    gs: Segment
    ss: Segment
    tr: Segment
    ldt: Segment
    gdt: Dtable
    idt: Dtable
    cr0: int
    cr2: int
    cr3: int
    cr4: int
    cr8: int
    efer: int
    apic_base: int
    interrupt_bitmap: tuple[int, int, int, int]


@dataclass(frozen=True, slots=True)
class Exit:
    """Why the guest left.

    Attributes
    ----------
    reason : str
        The kernel's constant without ``KVM_EXIT_``: ``"HLT"``, ``"IO"``, ``"MMIO"``, ``"SHUTDOWN"``,
        ``"DIRTY_RING_FULL"``, ...; ``"INTR"`` after a kick or a signal.
    port : int
        IO: the port.
    address : int
        MMIO: guest physical address, in bytes.
    size : int
        IO, MMIO: bytes of one access.
    count : int
        IO: accesses (string instructions make several).
    is_write : bool
        IO, MMIO: the guest wrote; otherwise it waits for `Vcpu.answer`.
    data : bytes
        IO, MMIO: what the guest wrote.
    details : tuple of int
        FAIL_ENTRY, INTERNAL_ERROR and the like: the numbers KVM gave.
    """

    reason: str
    port: int = 0
    address: int = 0
    size: int = 0
    count: int = 0
    is_write: bool = False
    data: bytes = b""
    details: tuple[int, ...] = field(default=())


def _pack(name: str, layout: struct.Struct, values: object) -> bytes:
    try:
        return layout.pack(*astuple(values))  # type: ignore[call-overload]
    except struct.error as error:
        raise ValueError(f"{name} {values}: a field is out of its range ({error})") from None


class Vcpu(Resource):
    """One virtual CPU; made by `VM.create_vcpu`, closed with its VM at the latest.

    Notes
    -----
    `run` belongs to one thread at a time; `kick` and `close` may be called from
    any other meanwhile. Closing waits until the run under way has returned.
    """

    def __init__(self, handle: _kvm.VcpuHandle, index: int, rings: Rings | None, ring: _kvm.Ring | None) -> None:
        super().__init__()
        self.index = index
        # Not the VM: it owns its vCPUs, and a cycle would put off its closing.
        self._rings = rings
        self._handle = handle
        self._ring = ring
        self._answer_at: tuple[int, int] | None = None
        # Whether the guest has left and nobody has been told why; and the harvests before that run.
        self._left = [False]
        self._harvests = 0
        self._limit = DirtyLimit()
        self._closed = False

    def __repr__(self) -> str:
        """Show the number and whether it is open."""
        return f"<{self._handle.name}, {'closed' if self.closed else 'open'}>"

    @property
    def dirtied(self) -> int:
        """Pages that it has dirtied, as far as its dirty ring was harvested; 0 without rings."""
        return 0 if self._ring is None else self._ring.taken

    @property
    def dirty_limit(self) -> float | None:
        """Pages per second that it may dirty; None: as many as it likes.

        A vCPU that has dirtied more stands still, in `run`, when it has left the guest: because its ring was full, or
        for a harvest. What it dirtied is known after that, so harvest several times a second. A kick ends the pause.
        For any thread, at any time.

        Raises
        ------
        ValueError
            It is not a positive number, or the machine has no dirty rings: nothing says which vCPU dirtied a page.
        """
        return self._limit.rate

    @dirty_limit.setter
    def dirty_limit(self, rate: float | None) -> None:
        if rate is not None and self._ring is None:
            raise ValueError(f"vCPU {self.index} has no dirty ring to count its pages by: enable_dirty_ring() first")
        self._limit.hold(rate, self.dirtied)
        self._handle.paced = rate is not None

    def _kicked(self) -> bool:
        """Whether the next run is to return at once."""
        return self._handle.load(_IMMEDIATE_EXIT, 1) != b"\0"

    def get_regs(self) -> Regs:
        """Return the general registers (KVM_GET_REGS)."""
        buffer = bytearray(_REGS.size)
        self._handle.ioctl(_kvm.GET_REGS, buffer, f"KVM_GET_REGS of {self._handle.name}")
        return Regs(*_REGS.unpack(buffer))

    def set_regs(self, regs: Regs) -> None:
        """Set the general registers (KVM_SET_REGS); ValueError for a value outside 64 bits."""
        buffer = bytearray(_pack("registers", _REGS, regs))
        self._handle.ioctl(_kvm.SET_REGS, buffer, f"KVM_SET_REGS of {self._handle.name}")

    def get_sregs(self) -> Sregs:
        """Return segments, tables and control registers (KVM_GET_SREGS)."""
        buffer = bytearray(8 * _SEGMENT.size + 2 * _DTABLE.size + _CONTROL.size)
        self._handle.ioctl(_kvm.GET_SREGS, buffer, f"KVM_GET_SREGS of {self._handle.name}")
        control = 8 * _SEGMENT.size + 2 * _DTABLE.size
        parts: list[Any] = [Segment(*_SEGMENT.unpack_from(buffer, at * _SEGMENT.size)) for at in range(8)]
        parts += [Dtable(*_DTABLE.unpack_from(buffer, 8 * _SEGMENT.size + at * _DTABLE.size)) for at in range(2)]
        *registers, b0, b1, b2, b3 = _CONTROL.unpack_from(buffer, control)
        parts += [*registers, (b0, b1, b2, b3)]
        return Sregs(*parts)

    def set_sregs(self, sregs: Sregs) -> None:
        """Set segments, tables and control registers (KVM_SET_SREGS); ValueError for a value outside its field."""
        s = sregs
        parts = [_pack("segment", _SEGMENT, part) for part in (s.cs, s.ds, s.es, s.fs, s.gs, s.ss, s.tr, s.ldt)]
        parts += [_pack("table", _DTABLE, part) for part in (s.gdt, s.idt)]
        try:
            parts.append(_CONTROL.pack(s.cr0, s.cr2, s.cr3, s.cr4, s.cr8, s.efer, s.apic_base, *s.interrupt_bitmap))
        except struct.error as error:
            raise ValueError(f"a control register is outside 64 bits ({error})") from None
        self._handle.ioctl(_kvm.SET_SREGS, bytearray(b"".join(parts)), f"KVM_SET_SREGS of {self._handle.name}")

    def enter_real_mode(self, ip: int) -> None:
        """Start at a 16-bit address: real mode, all segments at 0, interrupts off.

        Parameters
        ----------
        ip : int
            Address of the first instruction, in bytes, below 65536.
        """
        if not 0 <= ip <= 0xFFFF:
            raise ValueError(f"real mode starts below address 65536 here, not at {ip:#x}; use enter_flat32")
        sregs = self.get_sregs()
        data = Segment()
        sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss = data
        sregs.cs = replace(data, type=11)
        sregs.cr0 &= ~CR0_PE
        self.set_sregs(sregs)
        self.set_regs(Regs(rip=ip))

    def enter_flat32(self, ip: int) -> None:
        """Start at a 32-bit address: protected mode without paging, flat 4 GiB segments, interrupts off.

        Parameters
        ----------
        ip : int
            Address of the first instruction, in bytes, below 4 GiB.
        """
        if not 0 <= ip <= 0xFFFFFFFF:
            raise ValueError(f"flat 32-bit mode starts below 4 GiB, not at {ip:#x}")
        sregs = self.get_sregs()
        data = Segment(limit=0xFFFFFFFF, selector=16, db=1, g=1)
        sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss = data
        sregs.cs = replace(data, selector=8, type=11)
        sregs.cr0 |= CR0_PE
        self.set_sregs(sregs)
        self.set_regs(Regs(rip=ip))

    def run(self) -> Exit:
        """Run the guest until it leaves.

        Returns
        -------
        Exit

        Raises
        ------
        RuntimeError
            The vCPU is running in another thread.
        DirtyLogError
            The dirty ring is stuck after an overflow: this VM can no longer track.
        OSError
            With the kernel's errno.
        ValueError
            Closed.

        Notes
        -----
        Releases the GIL. A Python signal handler that raises ends the run with
        its exception; after one that does not, the exit is ``"INTR"``. Either
        way nothing of the guest is lost: run it again. If it had left by then, the
        next run says so, and the guest does not go on before.

        A harvest of the rings makes the guest leave for a moment, and `run` goes
        on by itself. Handlers of signals that come at that very moment run then,
        and end the run only if they raise: a handler that has to end it calls
        `kick`.

        References
        ----------
        ``KVM_RUN`` and ``struct kvm_run`` in Linux ``Documentation/virt/kvm/api.rst``.
        """
        if not self._left[0]:
            self._answer_at = None
            self._harvests = self._rings.harvests if self._rings else 0
            if not self._run():
                return Exit("INTR")
        (number,) = _REASON.unpack(self._handle.load(0, _REASON.size))
        reason = EXIT_REASONS[number] if number < len(EXIT_REASONS) else f"EXIT_{number}"
        if reason == "DIRTY_RING_FULL" and self._rings and self._ring:
            self._rings.note_full(self._ring, self._harvests)
        exit = self._describe(reason)
        # No call from here on, after which a signal handler could raise.
        self._left[0] = False
        return exit

    def _run(self) -> bool:
        """Run until the guest leaves for good, and stand still where it has dirtied too much; False for a kick."""
        self._handle.fileno()  # an error if it is closed
        try:
            self._limit.wait(self.dirtied, self._kicked)
            while (ran := self._handle.run(self._left)) is None:
                self._limit.wait(self.dirtied, self._kicked)
        except ValueError:
            # Closed while it stood still: that ends a run as a kick does.
            if not self._handle.closed:
                raise
            return False
        return ran

    def _describe(self, reason: str) -> Exit:
        load = self._handle.load
        if reason == "IO":
            is_write, size, port, count, offset = _IO.unpack(load(_UNION, _IO.size))
            if is_write:
                return Exit(reason, port=port, size=size, count=count, is_write=True, data=load(offset, size * count))
            self._answer_at = (offset, size * count)
            return Exit(reason, port=port, size=size, count=count)
        if reason == "MMIO":
            address, data, size, is_write = _MMIO.unpack(load(_UNION, _MMIO.size))
            if is_write:
                return Exit(reason, address=address, size=size, count=1, is_write=True, data=data[:size])
            self._answer_at = (_UNION + 8, size)
            return Exit(reason, address=address, size=size, count=1)
        if reason == "INTERNAL_ERROR":
            suberror, count, *details = _INTERNAL.unpack(load(_UNION, _INTERNAL.size))
            return Exit(reason, details=(suberror, *details[: min(count, len(details))]))
        if reason in ("UNKNOWN", "EXCEPTION", "FAIL_ENTRY", "SYSTEM_EVENT", "MEMORY_FAULT"):
            return Exit(reason, details=_WORDS.unpack(load(_UNION, _WORDS.size)))
        return Exit(reason)

    def answer(self, data: bytes) -> None:
        """Give the guest what it read from a port or from an address without memory.

        Parameters
        ----------
        data : bytes
            ``size * count`` bytes of the exit that `run` returned last.

        Raises
        ------
        ValueError
            The last exit was not a read, or it expects another number of bytes.
        """
        if self._answer_at is None:
            raise ValueError("the guest waits for no data: the last exit was not an IO or MMIO read")
        offset, size = self._answer_at
        if len(data) != size:
            raise ValueError(f"the guest waits for {size} bytes, not {len(data)}")
        self._handle.store(offset, data)

    def kick(self) -> None:
        """Make `run` return ``"INTR"`` in the thread that is in it, or else the next run.

        Notes
        -----
        For any thread, at any time: a kick is never lost. Several before one
        return count as one. Uses a real-time signal that the process does not
        use otherwise, with a handler that does nothing; `run` lets it through
        where its thread blocks signals, and leaves the mask as it was.

        References
        ----------
        ``immediate_exit`` in Linux ``Documentation/virt/kvm/api.rst``.
        """
        self._handle.kick()

    def _release(self) -> None:
        """Kick the vCPU, wait until it has returned, close it; its ring is still harvested by the VM."""
        self._handle.close()
