"""A guest behind /dev/kvm in a mapped snapshot: it runs, is put back, and is saved over the same parent."""

import mmap

import numpy as np

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
