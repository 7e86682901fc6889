"""How fast a guest of QEMU dirties its memory, as QEMU itself measures it, and what is known of each way to measure."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import SupportsIndex

from dirtylog.errors import BackendUnavailable, DirtyLogError
from dirtylog.sources.qemu.qmp import Qmp

__all__ = ["DirtyRate", "MeasuredRate"]

MODES = {
    "page-sampling": "QEMU compares checksums of sampled pages: half to a tenth of what is written; a lower bound",
    "dirty-bitmap": "KVM's bitmap: each page once, as a migration would send it",
    "dirty-ring": "KVM's rings: a page that is written again in the interval counts again; an upper bound",
}
_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class MeasuredRate:
    """What QEMU has measured.

    Parameters
    ----------
    mode : str
        ``"page-sampling"``, ``"dirty-bitmap"`` or ``"dirty-ring"``.
    seconds : int
        The interval.
    bytes_per_second : int
        QEMU gives whole MiB per second.
    meaning : str
        What is known of this mode's figure.
    vcpus : dict of int to int
        Bytes per second of each vCPU, where the mode tells them apart.
    """

    mode: str
    seconds: int
    bytes_per_second: int
    meaning: str
    vcpus: dict[int, int] = field(default_factory=dict)


class DirtyRate:
    """QEMU's own dirty-rate meter (``calc-dirty-rate``).

    Parameters
    ----------
    qmp : Qmp
        A monitor of the QEMU. It stays the caller's.
    mode : str, default "page-sampling"
        How QEMU measures. ``"dirty-bitmap"`` and ``"dirty-ring"`` need KVM, the latter also
        ``-accel kvm,dirty-ring-size=N``.
    sample_pages : int, default 512
        For sampling: pages of each GiB.

    Raises
    ------
    ValueError
        There is no such mode.
    BackendUnavailable
        The guest does not run under KVM, and the mode needs it.

    Notes
    -----
    Measured against guests whose writes were counted: sampling reports half to a tenth of what is written, for it finds
    a page only if its content differs at the end; the bitmap is right under KVM; the rings count each write of a page
    that was harvested in between. Without KVM, QEMU 7.2 ends when it is asked for the bitmap: that is refused here,
    before QEMU is asked.

    A figure of your own, exact and in pages: :func:`dirtylog.attach` to the process, or :func:`dirtylog.track` memory
    that it shares.

    References
    ----------
    ``calc-dirty-rate`` in `qapi/migration.json`, and `migration/dirtyrate.c`, of QEMU.
    """

    __module__ = "dirtylog.sources.qemu"

    def __init__(self, qmp: Qmp, mode: str = "page-sampling", *, sample_pages: SupportsIndex = 512) -> None:
        if mode not in MODES:
            raise ValueError(f"mode is {mode!r}; QEMU has {', '.join(MODES)}")
        self.mode = mode
        self._qmp = qmp
        self._sample_pages = int(sample_pages.__index__())
        if not 128 <= self._sample_pages <= 4096:
            raise ValueError(f"sample_pages is {self._sample_pages}; QEMU samples 128 to 4096 pages of each GiB")
        if mode != "page-sampling" and not qmp.execute("query-kvm").get("enabled"):
            raise BackendUnavailable(
                f"QEMU's dirty rate by {mode}", "query-kvm: the guest does not run under KVM", "use page-sampling"
            )

    def measure(self, seconds: SupportsIndex = 1) -> MeasuredRate:
        """Measure for a while, and wait for the figure.

        Parameters
        ----------
        seconds : int, default 1
            The interval, from 1 to 60.

        Returns
        -------
        MeasuredRate

        Raises
        ------
        ValueError
            The interval is out of range.
        QmpError
            QEMU refused: another measurement is under way, the rings are not enabled, ...
        DirtyLogError, OSError
            QEMU does not come to an end, or has gone.
        """
        length = int(seconds.__index__())
        if not 1 <= length <= 60:
            raise ValueError(f"seconds is {length}; QEMU measures 1 to 60 seconds")
        arguments: dict[str, object] = {"calc-time": length, "mode": self.mode}
        if self.mode == "page-sampling":
            arguments["sample-pages"] = self._sample_pages
        self._qmp.execute("calc-dirty-rate", arguments)
        # QEMU has no event for the end.
        end = time.monotonic() + length + 60
        time.sleep(length)
        while (answer := self._qmp.execute("query-dirty-rate"))["status"] != "measured":
            if time.monotonic() > end:
                raise DirtyLogError(f"QEMU still measures, a minute after the {length} s that it was to measure")
            time.sleep(0.02)
        vcpus = {int(each["id"]): int(each["dirty-rate"]) * _MIB for each in answer.get("vcpu-dirty-rate", [])}
        # Of vCPUs, some versions give no sum.
        rate = int(answer.get("dirty-rate", 0)) * _MIB or sum(vcpus.values())
        return MeasuredRate(self.mode, length, rate, MODES[self.mode], vcpus)
