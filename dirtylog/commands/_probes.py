"""Asks the kernel which facilities for dirty tracking it has, each by using it."""

import errno
import fcntl
import mmap
import os
import struct
from collections.abc import Callable, Iterator

Probed = tuple[str, bool, str]  # name, available, what it answered

KVM_GET_API_VERSION = 0xAE00
KVM_CHECK_EXTENSION = 0xAE03
KVM_CAPABILITIES = {
    "KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2": 168,
    "KVM_CAP_DIRTY_LOG_RING": 192,
    "KVM_CAP_DIRTY_LOG_RING_ACQ_REL": 223,
    "KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP": 225,
}
MANUAL_PROTECT_FLAGS = {1: "enable", 2: "initially-all-set"}


def error_text(call: str, error: OSError) -> str:
    """Write what a call answered: the errno's name is what people search for."""
    name = errno.errorcode.get(error.errno or 0, "unknown error")
    return f"{call}: {name} ({error.strerror})"


def kvm() -> Iterator[Probed]:
    """Ask /dev/kvm for its API and its dirty-log capabilities."""
    try:
        device = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        yield "KVM", False, error_text("open(/dev/kvm)", error)
        return
    try:
        yield "KVM", True, f"/dev/kvm, API {fcntl.ioctl(device, KVM_GET_API_VERSION)}"
        for name, number in KVM_CAPABILITIES.items():
            value = fcntl.ioctl(device, KVM_CHECK_EXTENSION, number)
            yield name, value > 0, capability_text(name, value)
    except OSError as error:
        yield "KVM", False, error_text("ioctl(/dev/kvm)", error)
    finally:
        os.close(device)


def capability_text(name: str, value: int) -> str:
    """Explain what KVM_CHECK_EXTENSION answered."""
    if value <= 0:
        return f"KVM_CHECK_EXTENSION: {value}"
    if name == "KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2":
        flags = [text for flag, text in MANUAL_PROTECT_FLAGS.items() if value & flag]
        return f"{value}: {', '.join(flags)}"
    if "RING" in name and value > 1:
        return f"{value:,} bytes a ring: {value // 16:,} pages"
    return str(value)


def soft_dirty() -> Iterator[Probed]:
    """Clear this process's soft-dirty bits, write a page, and look for bit 55 of its pagemap entry.

    Clearing succeeds where soft-dirty is compiled out, so only the write tells.
    """
    name = "soft-dirty"
    try:
        with (
            mmap.mmap(-1, mmap.PAGESIZE) as memory,
            open("/proc/self/clear_refs", "w") as clear_refs,
            open("/proc/self/pagemap", "rb", buffering=0) as pagemap,
        ):
            memory[0] = 1
            clear_refs.write("4")
            clear_refs.flush()
            memory[0] = 2
            entry = os.pread(pagemap.fileno(), 8, address_of(memory) // mmap.PAGESIZE * 8)
    except OSError as error:
        yield name, False, error_text("writing 4 to /proc/self/clear_refs, reading /proc/self/pagemap", error)
        return
    marked = bool(struct.unpack("<Q", entry)[0] >> 55 & 1)
    yield name, marked, "a written page is marked" if marked else "a written page is not marked: not compiled in"


def address_of(memory: mmap.mmap) -> int:
    """Find where a mapping starts."""
    import numpy as np

    return int(np.frombuffer(memory, dtype=np.uint8).ctypes.data)


PROBES: tuple[Callable[[], Iterator[Probed]], ...] = (kvm, soft_dirty)
