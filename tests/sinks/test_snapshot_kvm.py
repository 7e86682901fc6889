"""A guest behind /dev/kvm in a mapped snapshot: it runs, is put back, and is saved over the same parent."""

import mmap

import numpy as np
import pytest

from dirtylog.sinks import snapshot
from dirtylog.sources import kvm
from dirtylog.sources.kvm._guest import Guest

from ..sources.kvm.guests import GFN, PADDING, needs_kvm

PAGE = mmap.PAGESIZE
NPAGES = 512


@needs_kvm
def test_a_guest_runs_in_a_mapped_snapshot_and_is_put_back(tmp_path):
    memory = np.arange(NPAGES * PAGE, dtype=np.uint32).astype(np.uint8)
    snapshot.save(tmp_path / "base", memory, page_size=PAGE, sync=False)
    # Two pages alone, and a run that is given back to the system under the guest.
    written = [3, *range(100, 200), 400]
    with snapshot.open(tmp_path / "base") as mapped, kvm.Kvm() as system, system.create_vm() as vm:
        vm.set_memory_region(0, GFN, NPAGES, memory=mapped.array)
        guest = Guest(vm, padding=PADDING)
        vm.get_dirty_log(0)
        for turn, value in enumerate((77, 88, 99)):
            guest.write(np.add(written, GFN), value)
            dirty = vm.get_dirty_log(0)
            assert set(written) <= set(dirty)
            wanted = memory.copy()
            wanted[np.multiply(written, PAGE)] = value
            assert (mapped.array == wanted).all()
            snapshot.save_diff(tmp_path / f"d{turn}", mapped.array, dirty, parent=tmp_path / "base", sync=False)
            assert (snapshot.restore(tmp_path / f"d{turn}") == wanted).all()
            assert mapped.reset(dirty) == dirty
            assert (mapped.array == memory).all()
        # A guest holds the memory: closing the snapshot takes nothing from under it.
        mapped.close()
        guest.write([GFN + 5], 66)
        assert set(vm.get_dirty_log(0)) >= {5}


@needs_kvm
def test_an_opened_snapshot_is_the_memory_of_a_slot(tmp_path):
    snapshot.save(tmp_path / "base", np.ones(NPAGES * PAGE, np.uint8), page_size=PAGE, sync=False)
    with snapshot.open(tmp_path / "base") as mapped, kvm.Kvm() as system, system.create_vm() as vm:
        vm.set_memory_region(0, GFN, NPAGES, memory=mapped)
        assert np.shares_memory(vm.memory(0), mapped.array)
        guest = Guest(vm, padding=PADDING)
        guest.write([GFN + 5], 66)
        assert mapped.array[5 * PAGE] == 66
        # It goes on in the guest after it was closed, and it is the same memory when the slot is changed.
        mapped.close()
        vm.set_memory_region(0, GFN, NPAGES, log_dirty=False)
        guest.write([GFN + 6], 67)
        assert vm.memory(0)[6 * PAGE] == 67


@needs_kvm
def test_what_has_no_memory_is_not_the_memory_of_a_slot():
    with kvm.Kvm() as system, system.create_vm() as vm, pytest.raises(TypeError, match="slot 0: memory is list"):
        vm.set_memory_region(0, GFN, NPAGES, memory=[1, 2])
