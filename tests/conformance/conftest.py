"""Every kind of source behind one interface: open it, write to its pages, ask it.

To add a source: write a context manager that takes a number of pages and yields an `Opened`, and name it in `SOURCES`.
Every test of `test_conformance.py` then runs on it. A source of another package needs nothing here: `--source`.
"""

import atexit
import shutil
import tempfile
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import dirtylog as dl
from dirtylog.errors import BackendUnavailable
from dirtylog.sources import kvm
from dirtylog.sources.kvm._guest import Guest
from dirtylog.sources.qemu import QemuDisk

from ..qemu import Daemon, Writer

BASE_GFN = 1 << 16


class Opened(SimpleNamespace):
    """A source that is open.

    Attributes
    ----------
    source : the source
    write : callable taking page numbers, in the order in which they are written; each write changes its page
    overreports : bool, whether pages that nobody wrote may be reported now and then
    """


@contextmanager
def bitmap(npages):
    marked = dl.DirtyBitmap(npages)
    yield Opened(source=marked, write=marked.mark_pages, overreports=False)


@contextmanager
def bitmap_on_foreign_memory(npages):
    marked = dl.DirtyBitmap.from_buffer(np.zeros(-(-npages // 64), np.uint64), npages)
    yield Opened(source=marked, write=marked.mark_pages, overreports=False)


def model(**how):
    @contextmanager
    def opened(npages):
        vm = dl.VM(vcpus=2, **how)
        vm.set_memory_region(3, BASE_GFN, npages)
        turn = iter(range(1 << 62))

        def write(pages):
            if len(pages):
                vm.vcpus[next(turn) % 2].touch(BASE_GFN + np.asarray(pages))

        yield Opened(source=vm.slot(3), write=write, overreports=False)

    return opened


def real_machine(mode):
    @contextmanager
    def opened(npages):
        with kvm.Kvm() as system, system.create_vm() as vm:
            if mode == "ring":
                vm.enable_dirty_ring(16384)
            elif mode == "manual":
                vm.enable_manual_protect()
            vm.set_memory_region(3, BASE_GFN, npages)
            # Idle instructions: a KVM in software runs past a ring's reserve without them.
            guest = Guest(vm, capacity=16384, padding=40)
            value = iter(range(1 << 62))

            def write(pages):
                if len(pages):
                    guest.write(BASE_GFN + np.asarray(pages), next(value) % 256)

            # KVM maps a page writable when it is only read, where it may.
            yield Opened(source=vm.slot(3), write=write, overreports=True)

    return opened


def tracked(backend, offset=0, short=0):
    """Memory that begins `offset` bytes into a page, and is `short` bytes short of its last one."""

    @contextmanager
    def opened(npages):
        array = dl.zeros(offset + npages * 4096, dtype=np.uint8)[offset : offset + npages * 4096 - short]
        with dl.track(array, backend=backend) as tracker:

            def write(pages):
                # One by one: a page that comes twice changes twice, which a comparison has to see.
                for page in pages:
                    array[page * 4096] = (int(array[page * 4096]) + 1) % 251

            # I9: write protection sees pages of the address space, each of which touches two of the memory's.
            yield Opened(source=tracker, write=write, overreports=offset != 0 and backend != "compare")

    return opened


@contextmanager
def shared_log(npages):
    with dl.SharedLog.create(npages) as log, dl.SharedLog.open(log.fileno(), npages) as writer:
        yield Opened(source=log, write=writer.mark_pages, overreports=False)


@contextmanager
def qemu_disk(npages):
    """A disk in memory of one storage daemon for all tests: a node and an export for each."""
    for name in ("qemu-storage-daemon", "qemu-io"):
        if shutil.which(name) is None:
            raise BackendUnavailable("a QEMU disk", f"{name} is not installed")
    daemon = storage_daemon()
    node = f"n{next(daemon.numbers)}"
    daemon.qmp.execute("blockdev-add", {"driver": "null-co", "node-name": node, "size": npages * 4096})
    export = {"type": "nbd", "id": node, "node-name": node, "name": node, "writable": True}
    daemon.qmp.execute("block-export-add", export)
    writer = Writer(daemon.nbd, node)
    try:
        with QemuDisk(daemon.qmp, node, 4096, persistent=False, nbd=daemon.nbd, name=f"{node}d") as disk:

            def write(pages):
                for page in pages:
                    writer.write(page * 4096, 512, 1)

            yield Opened(source=disk, write=write, overreports=False)
    finally:
        writer.close()
        daemon.qmp.execute("block-export-del", {"id": node, "mode": "hard"})
        daemon.qmp.wait("BLOCK_EXPORT_DELETED", lambda data: data["id"] == node)
        daemon.qmp.execute("blockdev-del", {"node-name": node})


@cache
def storage_daemon():
    """A storage daemon with a monitor, until the tests end."""
    directory = Path(tempfile.mkdtemp(prefix="dirtylog-conformance-"))
    daemon = Daemon(directory, disk=False)
    daemon.start()
    daemon.numbers = count()
    connection = daemon.qmp()
    atexit.register(shutil.rmtree, directory, True)
    atexit.register(daemon.kill)
    daemon.qmp = connection
    atexit.register(connection.close)
    return daemon


# Two architectures more have no dirty log at all: see the tests of the model.
ARCHITECTURES = ["x86", "arm", "arm64", "ia64", "mips", "powerpc-book3s-hv", "powerpc-book3s-pr", "s390"]

SOURCES = {
    "bitmap": bitmap,
    "bitmap-foreign-memory": bitmap_on_foreign_memory,
    **{f"model-{name}": model(arch=name) for name in ARCHITECTURES},
    "model-manual-protect": model(manual_protect=True),
    "model-dirty-ring": model(dirty_ring=4096),
    "model-huge-pages-eager": model(huge_pages="eager"),
    "model-huge-pages-on-write": model(huge_pages="on-write"),
    "model-pml": model(pml=True),
    **{f"kvm-{mode}": real_machine(mode) for mode in ("bitmap", "manual", "ring")},
    **{f"track-{backend}": tracked(backend) for backend in ("userfaultfd", "mprotect", "compare")},
    **{
        f"track-{backend}-from-byte-{offset}": tracked(backend, offset, short)
        for backend in ("userfaultfd", "mprotect", "compare")
        for offset, short in ((1, 0), (16, 4095), (720, 720), (4095, 1))
    },
    "shared": shared_log,
    "qemu-disk": qemu_disk,
}


def pytest_generate_tests(metafunc):
    if "open_source" in metafunc.fixturenames:
        names = metafunc.config.getoption("--source") or list(SOURCES)
        metafunc.parametrize("open_source", names, indirect=True, scope="session")


@pytest.fixture(scope="session")
def open_source(request):
    """A context manager that opens a source of so many pages; skips with the probe's answer where it cannot be."""
    if request.param in SOURCES:
        opener = SOURCES[request.param]
    else:
        module, _, name = request.param.partition(":")
        opener = getattr(import_module(module), name)
    try:
        with opener(64):
            pass
    except BackendUnavailable as missing:
        pytest.skip(str(missing))
    return opener
