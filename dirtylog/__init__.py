"""dirtylog: which pages of memory were written since I last looked, without ever losing a write.

From the roof to the ground; imports run downwards only::

    commands/      the command line
    fleet/         one epoch of many workers, committed once to a store
    sinks/         what dirty pages are for: snapshot, checkpoint, migrate, trace, profile, rate
    log  epochs    the neck: merges sources, serves observers in epochs that commit or roll back
    sources/       where pages get dirty: memory of this process or another, KVM, a shared log
    vm/            the model of KVM's dirty log; one file of vm/arch/ for each architecture
    _core          DirtyBitmap; capi and include/ offer it to Cython, C and C++
    _bits/         what it is made of: words, sets of pages (DirtyPages), vector code
    reference      the same in plain Python: the specification, and the oracle of the tests
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

from dirtylog._bits.pages import DirtyPages
from dirtylog._core import DirtyBitmap, ffs, fls, harvest_words, indices, popcount, runs
from dirtylog._public import publish
from dirtylog.errors import BackendUnavailable, DirtyLogError, IncompleteLogWarning

if TYPE_CHECKING:
    from dirtylog.log import DirtyLog, Epoch, Observer
    from dirtylog.sinks.checkpoint import Checkpoint
    from dirtylog.sources.memory import Arena, Tracker, arena, empty, track, zeros
    from dirtylog.sources.process import Process, attach
    from dirtylog.sources.shared import SharedLog
    from dirtylog.vm.arch import Arch
    from dirtylog.vm.machine import VM

__version__ = "0.1.0"

# Names that cost more than a bitmap does are imported when they are first used:
# whoever wants the bits alone pays for the bits alone.
_LAZY = {
    "VM": "dirtylog.vm.machine",
    "Arch": "dirtylog.vm.arch",
    "track": "dirtylog.sources.memory",
    "Tracker": "dirtylog.sources.memory",
    "Arena": "dirtylog.sources.memory",
    "arena": "dirtylog.sources.memory",
    "empty": "dirtylog.sources.memory",
    "zeros": "dirtylog.sources.memory",
    "SharedLog": "dirtylog.sources.shared",
    "Process": "dirtylog.sources.process",
    "attach": "dirtylog.sources.process",
    "Checkpoint": "dirtylog.sinks.checkpoint",
    "DirtyLog": "dirtylog.log",
    "_C_API": "dirtylog.capi",  # PyCapsule_Import asks the package for it
    "Epoch": "dirtylog.log",
    "Observer": "dirtylog.log",
}

__all__ = [
    "VM",
    "Arch",
    "Arena",
    "BackendUnavailable",
    "Checkpoint",
    "DirtyBitmap",
    "DirtyLog",
    "DirtyLogError",
    "DirtyPages",
    "Epoch",
    "IncompleteLogWarning",
    "Observer",
    "Process",
    "SharedLog",
    "Tracker",
    "arena",
    "attach",
    "empty",
    "ffs",
    "fls",
    "get_include",
    "harvest_words",
    "indices",
    "popcount",
    "runs",
    "track",
    "zeros",
]


publish("dirtylog", globals(), ["ffs", "fls", "harvest_words", "indices", "popcount", "runs"])


def get_include() -> str:
    """Return the directory of dirtylog's C headers, for ``include_dirs`` of an extension that uses them."""
    return os.path.join(os.path.dirname(__file__), "include")


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for (PEP 562)."""
    if name not in _LAZY:
        raise AttributeError(f"module 'dirtylog' has no attribute {name!r}")
    value = getattr(import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names, imported yet or not."""
    return sorted({*globals(), *__all__})
