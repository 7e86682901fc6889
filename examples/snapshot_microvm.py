"""Incremental snapshots of a running (model) guest: one base, small diffs, every moment restored byte for byte.

needs: dirtylog.sinks.snapshot
needs: xxhash
"""

import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

import dirtylog as dl
from dirtylog.sinks import snapshot

NPAGES = 4096
SNAPSHOTS = 8
ROUNDS_BETWEEN = 20
PAGES_A_ROUND = 10


class Guest:
    """A vCPU that stores into random pages on a thread of its own, until it is paused or stopped.

    A plain lock around each round would not do: whoever releases a lock and takes it again at once nearly always
    wins, and the other side starves. Here each side waits until the other has had its turn.
    """

    def __init__(self, vm: dl.VM) -> None:
        self._vcpu = vm.vcpus[0]
        self._turn = threading.Condition()
        self._rounds = 0
        self._pause_wanted = self._paused = self._stopped = False
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        generator = np.random.default_rng(0)
        while True:
            with self._turn:
                self._paused = self._pause_wanted
                self._turn.notify_all()
                self._turn.wait_for(lambda: self._stopped or not self._pause_wanted)
                if self._stopped:
                    return
                self._paused = False
                self._rounds += 1
            self._vcpu.touch(generator.integers(0, NPAGES, PAGES_A_ROUND))

    def run_for(self, rounds: int) -> None:
        """Wait until the guest has made at least this much progress."""
        with self._turn:
            goal = self._rounds + rounds
            self._turn.wait_for(lambda: self._rounds >= goal)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Hold the guest between two rounds."""
        with self._turn:
            self._pause_wanted = True
            self._turn.wait_for(lambda: self._paused)
        try:
            yield
        finally:
            with self._turn:
                self._pause_wanted = False
                self._turn.notify_all()

    def stop(self) -> None:
        """End the guest and its thread."""
        with self._turn:
            self._stopped = True
            self._turn.notify_all()
        self._thread.join()


def main() -> None:
    """Run a guest, pause it only while its pages are copied, restore each snapshot."""
    vm = dl.VM(vcpus=1)
    vm.set_memory_region(0, base_gfn=0, npages=NPAGES)
    memory = vm.memory(0)
    log = dl.DirtyLog()
    log.attach(vm.slot(0))
    observer = log.observer("snapshots", everything=True)
    moments = {}
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        parent = None
        guest = Guest(vm)
        try:
            for number in range(SNAPSHOTS):
                guest.run_for(ROUNDS_BETWEEN)
                path = directory / f"{number}.img"
                with guest.paused(), observer.collect() as epoch:
                    if parent is None:
                        info = snapshot.save(path, memory, sync=False)
                    else:
                        info = snapshot.save_diff(path, memory, epoch.pages, parent=parent, sync=False)
                    moments[path] = memory.copy()
                print(f"{path.name}: {info.count} pages of {NPAGES}")
                assert info.count > 0, "the guest has made no progress"
                parent = path
        finally:
            guest.stop()
        for path, moment in moments.items():
            assert (snapshot.restore(path) == moment).all()
    print(f"{len(moments)} snapshots restored: each equal to its moment")


if __name__ == "__main__":
    main()
