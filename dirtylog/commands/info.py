"""Say what this machine offers for tracking dirty pages, and why not where not.

Each facility is probed by using it, not by asking for a version: a kernel can
have a call compiled out, forbidden or broken.
"""

import argparse
import platform
from dataclasses import asdict, dataclass

import numpy as np

import dirtylog
from dirtylog import _core, terminal
from dirtylog.commands import _probes


@dataclass(frozen=True)
class Facility:
    """One line: a facility, whether it is there, and what it answered."""

    name: str
    available: bool
    answer: str


def facilities() -> list[Facility]:
    """Probe everything, in the order in which it is printed."""
    return [
        Facility("SIMD", True, f"{_core.simd_path()} of {', '.join(_core.simd_paths())}"),
        *(Facility(*probed) for probe in _probes.PROBES for probed in probe()),
    ]


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
        terminal.show_json({**versions, "facilities": [asdict(facility) for facility in found]})
        return 0
    terminal.show_table(
        ", ".join(f"{name} {version}" for name, version in versions.items()),
        ["facility", "here", "answer"],
        [[facility.name, "yes" if facility.available else "no", facility.answer] for facility in found],
    )
    return 0
