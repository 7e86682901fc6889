"""What this machine offers for tracking memory, each facility tried by using it."""

from __future__ import annotations

import mmap
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dirtylog.sources.memory import _tracking

__all__ = ["Facility", "Mapping", "mappings_of", "probe"]

_SOFT_DIRTY = 1 << 55


@dataclass(frozen=True, slots=True)
class Facility:
    """One thing a machine may offer.

    Attributes
    ----------
    name : str
        As `dirtylog info` prints it.
    available : bool
        It was used, and it worked.
    detail : str
        Why not, where not: the call and its answer.
    """

    name: str
    available: bool
    detail: str


@dataclass(frozen=True, slots=True)
class Mapping:
    """A line of ``/proc/self/maps``: addresses in bytes, permissions such as ``rw-p``, and the file's name."""

    start: int
    end: int
    permissions: str
    path: str

    @property
    def writers(self) -> str:
        """Who can write this memory without this process noticing.

        ``"private"``: nobody. ``"heirs"``: children of a later fork.
        ``"anyone"``: whoever maps the same file or shared memory.
        """
        if self.permissions.endswith("p"):
            return "private"
        return "heirs" if self.path == "/dev/zero (deleted)" else "anyone"


def mappings_of(address: int, nbytes: int) -> list[Mapping]:
    """List the mappings that a range of this process's memory lies in.

    Parameters
    ----------
    address, nbytes : int
        The range, in bytes.

    Returns
    -------
    list of Mapping
        In order of address; empty where the system does not tell.

    References
    ----------
    ``proc_pid_maps(5)``.
    """
    found = []
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return []
    for line in lines:
        span, _, rest = line.partition(" ")
        start, end = (int(bound, 16) for bound in span.split("-"))
        if start < address + nbytes and address < end:
            permissions, _, _, _, *path = rest.split(maxsplit=4)
            found.append(Mapping(start, end, permissions, path[0] if path else ""))
    return found


def probe() -> list[Facility]:
    """Try each facility that tracking rests on.

    Returns
    -------
    list of Facility
        userfaultfd, its asynchronous write protection, PAGEMAP_SCAN, soft-dirty
        and mprotect, in this order.

    Notes
    -----
    Each is used on a page of its own: a kernel may know a call by name and
    still have it compiled out. Costs a few system calls; thread-safe.

    Examples
    --------
    >>> from dirtylog.sources.memory.probe import probe
    >>> [facility.name for facility in probe()]
    ['userfaultfd', 'userfaultfd WP_ASYNC', 'PAGEMAP_SCAN', 'soft-dirty', 'mprotect']
    """
    refusal = _tracking.probe("userfaultfd")
    # The steps come in this order, and the refusal names the first that failed.
    syscall = refusal.startswith("userfaultfd(")
    feature = syscall or refusal.startswith("ioctl(UFFDIO_")
    protect = _tracking.probe("mprotect")
    return [
        Facility("userfaultfd", not syscall, refusal if syscall else ""),
        Facility("userfaultfd WP_ASYNC", not feature, refusal if feature else ""),
        Facility("PAGEMAP_SCAN", not refusal, refusal),
        _attempt("soft-dirty", _soft_dirty),
        Facility("mprotect", not protect, protect),
    ]


def _attempt(name: str, action: Callable[[], str]) -> Facility:
    try:
        detail = action()
    except OSError as error:
        detail = str(error)
    return Facility(name, not detail, detail)


def _soft_dirty() -> str:
    """Clear the soft-dirty bits, write a page, and look for its bit.

    In a process of its own, because clearing is for a whole process: another
    user of the bits in this one would lose its log.
    """
    if not sys.platform.startswith("linux"):
        return f"{sys.platform} has no /proc/self/pagemap"
    code = f"from {__name__} import _soft_dirty_here; print(_soft_dirty_here(), end='')"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    return child.stdout if child.returncode == 0 else child.stderr.strip().rpartition("\n")[2]


def _soft_dirty_here() -> str:
    with mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as page:
        page[0] = 1
        Path("/proc/self/clear_refs").write_text("4", encoding="ascii")
        page[0] = 2
        address = _tracking.PinnedPages(page, mmap.PAGESIZE).address
        with Path("/proc/self/pagemap").open("rb", buffering=0) as pagemap:
            pagemap.seek(address // mmap.PAGESIZE * 8)
            (entry,) = struct.unpack("<Q", pagemap.read(8))
    if entry & _SOFT_DIRTY:
        return ""
    return "writing 4 to /proc/self/clear_refs succeeds, but a written page does not get bit 55"
