"""Architectures: found by name or entry point, written in Python or in C."""

import ctypes
import errno
import subprocess
from pathlib import Path

import numpy as np
import pytest

import dirtylog as dl
from dirtylog.vm import arch


def test_every_row_of_the_table_is_registered():
    assert {
        "x86",
        "arm",
        "arm64",
        "arm64-stub",
        "ia64",
        "mips",
        "powerpc-book3s-hv",
        "powerpc-book3s-pr",
        "powerpc-booke",
        "s390",
    } <= set(arch.names())
    for name in arch.names():
        found = arch.find(name)
        assert found.name == name
        assert isinstance(found, dl.Arch)
        assert name in repr(found)


def test_an_architecture_is_registered_once_by_its_name(monkeypatch):
    monkeypatch.setattr(arch, "_known", dict(arch._known))

    class Toy(dl.Arch):
        name = "toy"

    assert arch.register(Toy) is Toy
    arch.register(Toy)
    assert dl.VM("toy").arch.name == "toy"

    class Other(dl.Arch):
        name = "x86"

    class Nameless(dl.Arch):
        pass

    with pytest.raises(ValueError, match="registered already"):
        arch.register(Other)
    with pytest.raises(ValueError, match="no name"):
        arch.register(Nameless)
    for wrong in (int, Toy(), "toy"):
        with pytest.raises(TypeError, match="not a subclass of"):
            arch.register(wrong)


def test_another_package_adds_an_architecture_by_its_entry_point(tmp_path, monkeypatch):
    (tmp_path / "riscv_arch.py").write_text(
        "import dirtylog as dl\n\n\nclass RiscV(dl.Arch):\n    name = 'riscv'\n    user_mem_slots = 3\n"
    )
    info = tmp_path / "riscv_arch-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: riscv-arch\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[dirtylog.arch]\nriscv = riscv_arch:RiscV\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert "riscv" in arch.names()
    vm = dl.VM("riscv")
    vm.set_memory_region(2, 0, 10)
    vm.vcpus[0].touch([4])
    assert vm.get_dirty_log(2).indices().tolist() == [4]
    with pytest.raises(OSError, match="riscv has slots 0 to 2"):
        vm.set_memory_region(3, 100, 1)


def test_an_entry_point_that_is_no_architecture_is_refused(tmp_path, monkeypatch):
    info = tmp_path / "not_an_arch-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: not-an-arch\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[dirtylog.arch]\npdp11 = builtins:dict\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(TypeError, match="builtins:dict"):
        arch.find("pdp11")


class Recording(dl.Arch):
    """Every hook in Python; notes what it was called with."""

    name = "recording"

    def __init__(self):
        self.calls = []

    def sync_dirty_log(self, vm, slot):
        self.calls.append(("sync", slot, vm.slots_lock.held, vm.mmu_lock.held))
        super().sync_dirty_log(vm, slot)

    def protect_masked(self, vm, slot, words, masks):
        self.calls.append(("protect", words.tolist(), masks.tolist(), vm.slots_lock.held, vm.mmu_lock.held))
        super().protect_masked(vm, slot, words, masks)

    def protect_region(self, vm, slot):
        self.calls.append(("region", slot, vm.slots_lock.held, vm.mmu_lock.held))
        super().protect_region(vm, slot)

    def flush_tlbs(self, vm, slot):
        self.calls.append(("flush", slot, vm.slots_lock.held, vm.mmu_lock.held))
        super().flush_tlbs(vm, slot)


def test_python_hooks_are_called_once_a_harvest_in_order_under_their_locks():
    recording = Recording()
    vm = dl.VM(recording)
    vm.set_memory_region(0, 0, 1000)
    vm.vcpus[0].touch([0, 3, 64, 999])
    assert vm.get_dirty_log(0).count == 4
    assert recording.calls == [
        ("sync", 0, True, False),
        ("protect", [0, 1, 15], [0b1001, 1, 1 << 39], True, True),
        ("flush", 0, True, False),
    ]
    recording.calls.clear()
    assert vm.get_dirty_log(0).count == 0
    assert recording.calls == [("sync", 0, True, False)]


def test_the_whole_region_is_protected_when_logging_is_switched_on():
    recording = Recording()
    vm = dl.VM(recording)
    vm.set_memory_region(5, 0, 100, log_dirty=False)
    recording.calls.clear()
    vm.set_memory_region(5, 0, 100, log_dirty=True)
    assert recording.calls == [("region", 5, True, True), ("flush", 5, True, False)]


def test_an_architecture_may_override_the_whole_call():
    class Everything(dl.Arch):
        name = "everything"

        def get_dirty_log(self, vm, slot, out=None):
            super().get_dirty_log(vm, slot, out)
            return dl.DirtyPages.from_runs([(0, vm.region(slot).npages)], vm.region(slot).npages, vm.page_size)

    vm = dl.VM(Everything())
    vm.set_memory_region(0, 0, 100)
    assert vm.get_dirty_log(0).count == 100
    assert vm.slot(0).harvest().count == 100


def test_logging_that_cannot_be_switched_on_stays_off():
    class Broken(dl.Arch):
        name = "broken"

        def protect_region(self, vm, slot):
            raise RuntimeError("no protection")

    vm = dl.VM(Broken())
    vm.set_memory_region(0, 0, 100, log_dirty=False)
    with pytest.raises(RuntimeError, match="no protection"):
        vm.set_memory_region(0, 0, 100, log_dirty=True)
    with pytest.raises(OSError, match="no dirty log") as caught:
        vm.get_dirty_log(0)
    assert caught.value.errno == errno.ENOENT


HOOKS = r"""
#include "dirtylog/protect.h"

static uint64_t calls[4];

static void masked(void *context, const struct dl_page_table *table, uint64_t first_page, uint64_t mask)
{
    ((uint64_t *)context)[0]++;
    dl_protect_each(NULL, table, first_page, mask);
}

static void region(void *context, const struct dl_page_table *table)
{
    ((uint64_t *)context)[1]++;
    dl_protect_all(NULL, table);
}

static void sync_log(void *context, const struct dl_page_table *table, const struct dl_bitmap *log)
{
    ((uint64_t *)context)[2]++;
    dl_mark(log, table->npages - 1); /* a device that writes the last page all the time */
}

static void flush(void *context, struct dl_mmu *mmu, void (*generic)(struct dl_mmu *))
{
    ((uint64_t *)context)[3]++;
    generic(mmu);
}

struct dl_arch_hooks hooks = {
    .context = calls,
    .protect_masked = masked,
    .protect_region = region,
    .sync_dirty_log = sync_log,
    .flush_tlbs = flush,
};
"""


FLAGS = ["-std=gnu11", "-Wall", "-Wextra", "-Werror", "-Wno-unused-function", "-O1", "-shared", "-fPIC"]


@pytest.fixture(scope="module")
def c_hooks(c_compiler, tmp_path_factory):
    """A hook table compiled as another package would, against the installed headers."""
    folder = tmp_path_factory.mktemp("hooks")
    source, library = folder / "hooks.c", folder / "hooks.so"
    source.write_text(HOOKS)
    include = Path(dl.__file__).parent / "include"
    subprocess.run(
        [c_compiler, *FLAGS, f"-I{include}", str(source), "-o", str(library)],
        check=True,
    )
    loaded = ctypes.CDLL(str(library))
    address = ctypes.addressof(ctypes.c_char.in_dll(loaded, "hooks"))
    context = ctypes.POINTER(ctypes.c_uint64).from_address(address)
    new = ctypes.pythonapi.PyCapsule_New
    new.restype, new.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    name = ctypes.c_char_p(b"dirtylog.arch_hooks.1")
    return new(address, name, None), context, (loaded, name)


def test_hooks_written_in_c_are_called_through_their_capsule(c_hooks):
    capsule, calls, _keep = c_hooks

    class Native(dl.Arch):
        name = "native"
        hooks = capsule

    vm = dl.VM(Native())
    vm.set_memory_region(0, 0, 200, log_dirty=False)
    vm.vcpus[0].touch([1])
    vm.set_memory_region(0, 0, 200)
    before = np.array(calls[0:4])
    vm.vcpus[0].touch([1, 70, 71])
    assert vm.get_dirty_log(0).indices().tolist() == [1, 70, 71, 199]
    assert (np.array(calls[0:4]) - before).tolist() == [3, 0, 1, 1]
    assert calls[1] == 1
    vm.vcpus[0].touch([1])
    assert vm.get_dirty_log(0).indices().tolist() == [1, 199]


def test_a_capsule_of_another_name_is_refused():
    class Wrong(dl.Arch):
        name = "wrong"
        hooks = object()

    with pytest.raises(ValueError, match="PyCapsule"):
        dl.VM(Wrong())
