"""The KVM system: opens /dev/kvm, says what it can do, makes virtual machines."""

from __future__ import annotations

import errno
import os
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from dirtylog.errors import BackendUnavailable
from dirtylog.sources._resource import Resource
from dirtylog.sources.kvm import _kvm
from dirtylog.sources.kvm.machine import VM

__all__ = ["Kvm", "Probe", "probe"]

API_VERSION = 12

# Names and numbers of <linux/kvm.h>: what bears on memory, dirty logs and running a vCPU.
CAPABILITIES = {
    "KVM_CAP_USER_MEMORY": 3,
    "KVM_CAP_NR_VCPUS": 9,
    "KVM_CAP_NR_MEMSLOTS": 10,
    "KVM_CAP_SYNC_MMU": 16,
    "KVM_CAP_DESTROY_MEMORY_REGION_WORKS": 21,
    "KVM_CAP_IRQFD": 32,
    "KVM_CAP_IOEVENTFD": 36,
    "KVM_CAP_MAX_VCPUS": 66,
    "KVM_CAP_SYNC_REGS": 74,
    "KVM_CAP_READONLY_MEM": 81,
    "KVM_CAP_ENABLE_CAP_VM": 98,
    "KVM_CAP_MULTI_ADDRESS_SPACE": 118,
    "KVM_CAP_MAX_VCPU_ID": 128,
    "KVM_CAP_IMMEDIATE_EXIT": 136,
    "KVM_CAP_NESTED_STATE": 157,
    "KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2": 168,
    "KVM_CAP_DIRTY_LOG_RING": 192,
    "KVM_CAP_BINARY_STATS_FD": 203,
    "KVM_CAP_EXIT_ON_EMULATION_FAILURE": 204,
    "KVM_CAP_DIRTY_LOG_RING_ACQ_REL": 223,
    "KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP": 225,
    "KVM_CAP_USER_MEMORY2": 231,
    "KVM_CAP_MEMORY_FAULT_INFO": 232,
    "KVM_CAP_MEMORY_ATTRIBUTES": 233,
    "KVM_CAP_GUEST_MEMFD": 234,
}

_WAY_OUT = {
    errno.ENOENT: "load the kvm module (kvm_intel or kvm_amd), or use the model: dirtylog.VM",
    errno.EACCES: "join the group that owns the device (usually kvm), or use the model: dirtylog.VM",
    errno.EPERM: "join the group that owns the device (usually kvm), or use the model: dirtylog.VM",
}


class Kvm(Resource):
    """The KVM system descriptor.

    Parameters
    ----------
    path : str, optional
        The device.

    Raises
    ------
    BackendUnavailable
        The device cannot be opened, or is not KVM with API version 12.

    Notes
    -----
    Any method from any thread. Closing it closes its virtual machines first.
    """

    def __init__(self, path: str = "/dev/kvm") -> None:
        super().__init__()
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            name = errno.errorcode.get(error.errno or 0, str(error.errno))
            way_out = _WAY_OUT.get(error.errno or 0, "use the model: dirtylog.VM")
            raise BackendUnavailable("KVM", f"open({path!r}): {name}", way_out) from error
        handle = _kvm.Handle(descriptor, path)
        try:
            version = handle.ioctl(_kvm.GET_API_VERSION, 0, "KVM_GET_API_VERSION")
        except OSError as error:
            handle.close()
            name = errno.errorcode.get(error.errno or 0, str(error.errno))
            raise BackendUnavailable("KVM", f"ioctl({path!r}, KVM_GET_API_VERSION): {name}") from error
        if version != API_VERSION:
            handle.close()
            raise BackendUnavailable("KVM", f"KVM_GET_API_VERSION of {path!r} is {version}, not {API_VERSION}")
        self._handle = handle
        self._machines: weakref.WeakSet[VM] = weakref.WeakSet()
        self._names = 0
        self._capabilities: Mapping[str, int] | None = None
        self._closed = False

    def __repr__(self) -> str:
        """Show the device and whether it is open."""
        return f"<Kvm {self._handle.name}, {'closed' if self.closed else 'open'}>"

    @property
    def capabilities(self) -> Mapping[str, int]:
        """What KVM_CHECK_EXTENSION answers, by the constant's name; 0 when absent.

        Asked once; what was asked before `close` stays readable.
        """
        if self._capabilities is None:
            self._capabilities = MappingProxyType({name: self.check(number) for name, number in CAPABILITIES.items()})
        return self._capabilities

    def check(self, number: int) -> int:
        """Return what KVM_CHECK_EXTENSION answers for a capability's number."""
        return self._handle.ioctl(_kvm.CHECK_EXTENSION, number, f"KVM_CHECK_EXTENSION of {number}")

    def create_vm(self) -> VM:
        """Make a virtual machine without memory and vCPUs.

        Returns
        -------
        VM
            A context manager.

        Raises
        ------
        OSError
            With the kernel's errno.
        ValueError
            This object is closed.
        """
        capabilities = self.capabilities
        run_size = self._handle.ioctl(_kvm.GET_VCPU_MMAP_SIZE, 0, "KVM_GET_VCPU_MMAP_SIZE")
        made = [-1]
        try:
            self._handle.ioctl(_kvm.CREATE_VM, 0, "KVM_CREATE_VM", record=made)
            machine = VM(_kvm.Handle(made, f"VM {self._names}"), self, capabilities, run_size)
        finally:
            if made[0] >= 0:
                os.close(made[0])
        self._names += 1
        self._machines.add(machine)
        return machine

    def _release(self) -> None:
        """Close the virtual machines that are still open, then the descriptor."""
        for machine in list(self._machines):
            machine.close()
        self._handle.close()


@dataclass(frozen=True)
class Probe:
    """What `probe` found.

    Attributes
    ----------
    available : bool
        Whether `Kvm` can be opened.
    reason : str
        Why not, or an empty string.
    api_version : int
        12, or 0 when not available.
    capabilities : mapping of str to int
        By the kernel's constants.
    """

    available: bool
    reason: str
    api_version: int = 0
    capabilities: Mapping[str, int] = field(default_factory=dict)


def probe(path: str = "/dev/kvm") -> Probe:
    """Find out what KVM offers here; never raises for a machine without it.

    Parameters
    ----------
    path : str, optional
        The device.

    Returns
    -------
    Probe

    Examples
    --------
    >>> from dirtylog.sources import kvm
    >>> kvm.probe("/dev/null").available
    False
    """
    try:
        with Kvm(path) as system:
            return Probe(True, "", API_VERSION, dict(system.capabilities))
    except BackendUnavailable as error:
        return Probe(False, str(error))
