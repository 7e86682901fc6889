"""QEMU as it is shipped: what its monitor (QMP) and its block exports (NBD) tell of dirty pages."""

from __future__ import annotations

from dirtylog._public import publish
from dirtylog.sources._channel import PeerError
from dirtylog.sources.qemu.dirty_rate import DirtyRate, MeasuredRate
from dirtylog.sources.qemu.disk import QemuDisk
from dirtylog.sources.qemu.guest import GuestRange, guest_memory
from dirtylog.sources.qemu.nbd import NbdClient
from dirtylog.sources.qemu.qmp import Qmp, QmpError

__all__ = [
    "DirtyRate",
    "GuestRange",
    "MeasuredRate",
    "NbdClient",
    "PeerError",
    "QemuDisk",
    "Qmp",
    "QmpError",
    "guest_memory",
]

publish(__name__, globals(), __all__)
