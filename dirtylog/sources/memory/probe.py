"""What this machine offers for tracking memory, each facility tried by using it."""

from __future__ import annotations

import contextlib
import mmap
import signal
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dirtylog._bits.vouched import vouched_ranges
from dirtylog.sources.memory import _tracking

__all__ = ["Facility", "Mapping", "blocks_faults", "mappings_of", "probe"]

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
    """A line of ``/proc/self/maps``.

    Attributes
    ----------
    start, end : int
        Addresses, in bytes.
    permissions : str
        Such as ``"rw-p"``.
    page_size : int
        Bytes of the kernel's own pages: more than the system's for hugetlb.
    path : str
        The file's name; empty for most anonymous memory.
    file : tuple of int
        The device's major and minor number, and the inode: 0 without a file.
    vouched : bool
        Whether who mapped it vouches for its file never being written.
    """

    start: int
    end: int
    permissions: str
    page_size: int
    path: str
    file: tuple[int, int, int]
    vouched: bool = False

    @property
    def writers(self) -> str:
        """Who can write this memory without this process noticing.

        ``"private"``: nobody. ``"lenders"``: whoever writes the file, until a
        page is copied. ``"heirs"``: children of a later fork. ``"relatives"``:
        whoever was forked before dirtylog was imported. ``"anyone"``: whoever
        maps the same file or shared memory.
        """
        anonymous = self.path in ("/dev/zero (deleted)", "/dev/zero", "/anon_hugepage (deleted)")
        if self.permissions.endswith("p"):
            return "private" if anonymous or self.vouched or not self.file[2] else "lenders"
        if not anonymous:
            return "anyone"
        return "relatives" if _older is None or self.file in _older else "heirs"


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

    Notes
    -----
    Linux 6.11 answers for an address, so the cost does not follow what else
    the process has mapped.

    References
    ----------
    ``proc_pid_maps(5)``; ``PROCMAP_QUERY`` in Linux ``include/uapi/linux/fs.h``.
    """
    try:
        found = _tracking.mappings(address, min(address + nbytes, 2**64 - 1))
    except OSError:
        return []
    vouched = vouched_ranges()
    return [
        Mapping(
            start, end, permissions, page_size or _page_size_at(start, inode), path, (major, minor, inode),
            any(first <= start and end <= last for first, last in vouched),
        )
        for start, end, permissions, page_size, major, minor, inode, path in found
    ]  # fmt: skip


def _page_size_at(start: int, inode: int) -> int:
    """Bytes of the kernel's pages of a mapping, for kernels that tell by ``smaps`` only; hugetlb has an inode."""
    if not inode:
        return mmap.PAGESIZE
    here = False
    with Path("/proc/self/smaps").open(encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            if here and line.startswith("KernelPageSize:"):
                return int(line.split()[1]) << 10
            here = here or line.startswith(f"{start:x}-")
    return mmap.PAGESIZE


def _shared_anonymous() -> frozenset[tuple[int, int, int]] | None:
    """The shared anonymous memory that there is: a process that was forked by now may have it too."""
    try:
        found = _tracking.mappings(0, 2**64 - 1)
    except OSError:
        return None
    return frozenset(
        (major, minor, inode) for _, _, permissions, _, major, minor, inode, _ in found if permissions[3] == "s"
    )


# Nobody can tell who was forked before this was imported, with what. Memory that is mapped later is shared with
# later forks only, which are counted.
_older = _shared_anonymous()


def blocks_faults() -> int:
    """Return a thread of this process that blocks SIGSEGV, 0 if none is found.

    Notes
    -----
    Of now: a thread that blocks it later goes unseen, and one that blocks it
    for a moment, as a thread that starts another does, may be found.

    References
    ----------
    ``SigBlk`` in ``proc_pid_status(5)``.
    """
    bit = 1 << (signal.SIGSEGV - 1)
    for task in Path("/proc/self/task").glob("*/status"):
        # A thread that ends meanwhile blocks nothing any more.
        with contextlib.suppress(OSError):
            for line in task.read_bytes().splitlines():
                if line.startswith(b"SigBlk:") and int(line.split()[1], 16) & bit:
                    return int(task.parent.name)
    return 0


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
