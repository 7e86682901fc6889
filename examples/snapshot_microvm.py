"""Incremental snapshots of a running (model) guest: one base, small diffs, every moment restored byte for byte.

needs: dirtylog.sinks.snapshot
needs: xxhash
"""

import tempfile
import threading
from pathlib import Path

import numpy as np

import dirtylog as dl
from dirtylog.sinks import snapshot

NPAGES = 4096
SNAPSHOTS = 8


class Guest:
    """A vCPU that stores into random pages on a thread of its own, and can be paused."""

    def __init__(self, vm: dl.VM) -> None:
        self.vm = vm
        self.running = threading.Lock()  # held while it stores
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        generator = np.random.default_rng(0)
        while not self.stop.is_set():
            with self.running:
                self.vm.vcpus[0].touch(generator.integers(0, NPAGES, 10))


def main() -> None:
    """Run a guest, take snapshots while it is paused for the copy alone, restore each."""
    vm = dl.VM(vcpus=1)
    vm.set_memory_region(0, base_gfn=0, npages=NPAGES)
    memory = vm.memory(0)
    log = dl.DirtyLog()
    log.attach(vm.slot(0))
    observer = log.observer("snapshots", everything=True)
    guest = Guest(vm)
    moments = {}
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        parent = None
        guest.thread.start()
        for number in range(SNAPSHOTS):
            path = directory / f"{number}.img"
            with guest.running, observer.collect() as epoch:
                if parent is None:
                    info = snapshot.save(path, memory, sync=False)
                else:
                    info = snapshot.save_diff(path, memory, epoch.pages, parent=parent, sync=False)
                moments[path] = memory.copy()
            print(f"{path.name}: {info.count} pages of {NPAGES}")
            parent = path
        guest.stop.set()
        guest.thread.join()
        for path, moment in moments.items():
            assert (snapshot.restore(path) == moment).all()
    print(f"{len(moments)} snapshots restored: each equal to its moment")


if __name__ == "__main__":
    main()
