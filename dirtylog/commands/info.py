"""Say what this machine offers for tracking dirty pages and, if something is missing, why.

Each facility is probed by using it, not by asking for a version: a kernel can
have a call compiled out, forbidden or broken.
"""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import numpy as np

import dirtylog
from dirtylog import _core
from dirtylog.commands import _terminal

# What bears on dirty logging; the flags are named where the answer is a set of them.
KVM_CAPABILITIES = (
    "KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2",
    "KVM_CAP_DIRTY_LOG_RING",
    "KVM_CAP_DIRTY_LOG_RING_ACQ_REL",
    "KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP",
)
MANUAL_PROTECT_FLAGS = {1: "enable", 2: "initially-all-set"}
RING_ENTRY_BYTES = 16


@dataclass(frozen=True)
class Facility:
    """One line: a facility, whether it is there, and what it answered."""

    name: str
    available: bool
    answer: str


def facilities() -> list[Facility]:
    """Probe everything, in the order in which it is printed."""
    return [*kvm_facilities(), *memory_facilities(), *core_facilities()]


def kvm_facilities() -> Iterator[Facility]:
    """Ask /dev/kvm for its API and its dirty-log capabilities."""
    from dirtylog.sources import kvm

    found = kvm.probe()
    yield Facility("KVM", found.available, f"/dev/kvm, API {found.api_version}" if found.available else found.reason)
    for name in KVM_CAPABILITIES if found.available else ():
        value = found.capabilities.get(name, 0)
        yield Facility(name, value > 0, capability_text(name, value))


def capability_text(name: str, value: int) -> str:
    """Explain what KVM_CHECK_EXTENSION answered.

    Examples
    --------
    >>> capability_text("KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2", 3)
    '3: enable, initially-all-set'
    >>> capability_text("KVM_CAP_DIRTY_LOG_RING", 1048576)
    'at most 65,536 pages per ring'
    """
    if value > 1 and "RING" in name:
        return f"at most {value // RING_ENTRY_BYTES:,} pages per ring"
    if value > 0 and name == "KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2":
        return f"{value}: {', '.join(text for flag, text in MANUAL_PROTECT_FLAGS.items() if value & flag)}"
    return f"KVM_CHECK_EXTENSION answered {value}"


def memory_facilities() -> Iterator[Facility]:
    """Try what tracking this process's own memory rests on."""
    from dirtylog.sources.memory import probe

    for found in probe.probe():
        yield Facility(found.name, found.available, found.detail or "works")


def core_facilities() -> Iterator[Facility]:
    """Name the vector code in use and what else this CPU can run."""
    chosen, paths = _core.simd_path(), _core.simd_paths()
    missing = "".join(f"; {path} needs {what}" for path, what in _core.simd_missing().items())
    forced = f" by DIRTYLOG_SIMD={os.environ['DIRTYLOG_SIMD']}" if os.environ.get("DIRTYLOG_SIMD") else ""
    yield Facility("SIMD", chosen != "scalar", f"{chosen}{forced}, of {', '.join(paths)}{missing}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--json", action="store_true", help="print the answers for a program")


def run(args: argparse.Namespace) -> int:
    """Print every facility; one that is missing is an answer, not a failure."""
    found = facilities()
    versions = {
        "dirtylog": dirtylog.__version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
    }
    if args.json:
        _terminal.show_json({**versions, "facilities": [asdict(facility) for facility in found]})
        return 0
    _terminal.show_table(
        ", ".join(f"{name} {version}" for name, version in versions.items()),
        ["facility", "here", "answer"],
        [[facility.name, "yes" if facility.available else "no", facility.answer] for facility in found],
        left=3,
    )
    return 0
