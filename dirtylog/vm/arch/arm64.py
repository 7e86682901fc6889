"""arm64: the generic log its port was announced with, and the stub the patch series left."""

from __future__ import annotations

import errno
from typing import ClassVar

from dirtylog.vm._mmu import PROTECT_RANGE
from dirtylog.vm.arch import Arch, Unsupported

__all__ = ["Arm64", "Arm64Stub"]


class Arm64(Arch):
    """The generic call and the generic flush; write protection by range, shared with arm."""

    name = "arm64"
    hooks = PROTECT_RANGE


class Arm64Stub(Unsupported):
    """As the patch series has it: EINVAL."""

    name = "arm64-stub"
    error: ClassVar[int] = errno.EINVAL
