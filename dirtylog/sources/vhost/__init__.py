"""A virtio device in Python for a guest of QEMU: the back end of vhost-user, which marks what it writes.

While QEMU migrates a guest it hands the device a log: one bit for 4096 bytes of guest-physical address. Whatever the
device writes into guest memory must be marked there after the store (I3), or the destination runs on old content.
"""

from __future__ import annotations

from dirtylog._public import publish
from dirtylog.sources.vhost.backend import VhostBackend
from dirtylog.sources.vhost.queues import VhostRequest

__all__ = ["VhostBackend", "VhostRequest"]

publish(__name__, globals(), __all__)
