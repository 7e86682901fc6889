"""Architectures: the hooks each may override, and the registry that finds one by name."""

from __future__ import annotations

import errno
import os
from importlib import import_module
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, ClassVar

from dirtylog.vm import dirty_log
from dirtylog.vm._mmu import PROTECT_EACH

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from dirtylog._bits.pages import DirtyPages
    from dirtylog.vm.machine import VM

__all__ = ["Arch", "Unsupported", "find", "names", "register"]

ENTRY_POINTS = "dirtylog.arch"


class Arch:
    """What differs between architectures: how pages get dirty, and the hooks of a harvest.

    Derive from it, give it a `name`, and hand an instance to :class:`VM`, or make
    it known to others by the entry-point group ``dirtylog.arch``.

    Attributes
    ----------
    name : str
        The name it is registered by.
    user_mem_slots : int
        Number of memory slots; a slot id at or past it is EINVAL.
    dirtying : str
        How the machine learns of a write: ``"fault"`` (write faults mark),
        ``"fill"`` (TLB refills mark), ``"vm-log"`` (the same, into one log of the
        whole machine), ``"shadow"`` (write faults, a page table a vCPU),
        ``"change-bit"`` (in the page table) or ``"storage-key"``.
    hooks : PyCapsule
        ``struct dl_arch_hooks`` of ``dirtylog/protect.h``: hooks written in C,
        called without the GIL. A method below that is overridden in Python
        comes before its C hook.
    pml_hooks : PyCapsule or None
        The hooks that take their place on a machine with a page-modification log.

    Notes
    -----
    Hooks run under ``slots_lock``, `protect_masked` and `protect_region` under
    ``mmu_lock`` too. A hook that raises loses nothing: the snapshot is marked
    again (I5).

    Examples
    --------
    >>> import dirtylog as dl
    >>> class Loud(dl.Arch):
    ...     name = "loud"
    ...
    ...     def flush_tlbs(self, vm, slot):
    ...         print("flush")
    ...         super().flush_tlbs(vm, slot)
    >>> vm = dl.VM(arch=Loud())
    >>> vm.set_memory_region(0, base_gfn=0, npages=8)
    >>> vm.vcpus[0].write(0x3000, b"x")
    >>> vm.get_dirty_log(0).indices()
    flush
    array([3])
    """

    __module__ = "dirtylog"

    name: ClassVar[str] = ""
    user_mem_slots: ClassVar[int] = 32
    dirtying: ClassVar[str] = "fault"
    hooks: ClassVar[object] = PROTECT_EACH
    pml_hooks: ClassVar[object] = None

    def get_dirty_log(self, vm: VM, slot: int, out: object = None) -> DirtyPages:
        """Do the whole call (HAVE_KVM_ARCH_DIRTY_LOG); KVM's four steps unless overridden."""
        return dirty_log.get_dirty_log(vm, slot, out)

    def sync_dirty_log(self, vm: VM, slot: int) -> None:
        """Before a harvest: move what the hardware recorded into the slot's log."""
        vm.mmu.sync(slot)

    def protect_masked(self, vm: VM, slot: int, words: npt.NDArray[np.uint64], masks: npt.NDArray[np.uint64]) -> None:
        """Write-protect the pages of a snapshot, given once a harvest as word numbers and masks."""
        vm.mmu.protect(slot, words, masks)

    def protect_region(self, vm: VM, slot: int) -> None:
        """Write-protect a whole slot, when its logging is switched on."""
        vm.mmu.protect_region(slot)

    def flush_tlbs(self, vm: VM, slot: int) -> None:
        """Flush: after it returns no store through an entry cached before may land."""
        vm.mmu.flush()

    def __repr__(self) -> str:
        """Name the class and what it is registered as."""
        return f"<{type(self).__name__}: {self.name!r}>"


class Unsupported(Arch):
    """An architecture whose kernel answers every dirty-log call with one errno."""

    error: ClassVar[int] = errno.ENOTSUP

    def get_dirty_log(self, vm: VM, slot: int, out: object = None) -> DirtyPages:
        """Refuse."""
        raise OSError(self.error, f"{self.name} keeps no dirty log: {os.strerror(self.error)}")

    def sync_dirty_log(self, vm: VM, slot: int) -> None:
        """Refuse as well: a peek is not a way round."""
        self.get_dirty_log(vm, slot)


_known: dict[str, type[Arch] | str] = {
    "x86": "x86:X86",
    "arm": "arm:Arm",
    "arm64": "arm64:Arm64",
    "arm64-stub": "arm64:Arm64Stub",
    "ia64": "ia64:Ia64",
    "mips": "mips:Mips",
    "powerpc-book3s-hv": "powerpc:Book3sHv",
    "powerpc-book3s-pr": "powerpc:Book3sPr",
    "powerpc-booke": "powerpc:BookE",
    "s390": "s390:S390",
}


def register(arch: type[Arch]) -> type[Arch]:
    """Make an architecture known by its `name` in this process; usable as a decorator.

    Raises
    ------
    TypeError
        It is not a subclass of `Arch`.
    ValueError
        It has no name, or the name is taken.
    """
    if not (isinstance(arch, type) and issubclass(arch, Arch)):
        raise TypeError(f"{arch!r} is not a subclass of dirtylog.Arch; register the class itself")
    if not arch.name:
        raise ValueError(f"{arch.__name__} has no name; set its class attribute `name`")
    if _known.get(arch.name, arch) is not arch:
        raise ValueError(f"architecture {arch.name!r} is registered already; choose another name")
    _known[arch.name] = arch
    return arch


def names() -> list[str]:
    """Return every name that `find` knows, those of other packages included."""
    return sorted({*_known, *(point.name for point in entry_points(group=ENTRY_POINTS))})


def find(name: str) -> Arch:
    """Return a new instance of the architecture registered as `name`.

    Raises
    ------
    ValueError
        No architecture has the name.
    TypeError
        Another package registered something else than an Arch.
    """
    known = _known.get(name)
    if isinstance(known, str):
        module, attribute = known.split(":")
        found: Arch = getattr(import_module(f"{__name__}.{module}"), attribute)()
        return found
    if known is not None:
        return known()
    for point in entry_points(group=ENTRY_POINTS, name=name):
        loaded = point.load()()
        if not isinstance(loaded, Arch):
            raise TypeError(f"entry point {point.value!r} makes a {type(loaded).__name__}; it must make an Arch")
        return loaded
    raise ValueError(f"architecture {name!r} is not known; choose one of {', '.join(names())}")
