"""A harvest that copies before it flushes loses writes, every time; the same guest with the right order loses none.

The bug is a race: a store has to fall between the second and the third step of a harvest, when the pages are
write-protected and a vCPU still holds a writable TLB entry. Waiting for that to happen shows it now and then. Here
the guest stores at exactly that moment, so that it shows in every run.
"""

from collections.abc import Callable

import dirtylog as dl

NPAGES = 256
PAGE_SIZE = 4096


class StopsBeforeTheFlush(dl.Arch):
    """x86, with a hook at the critical moment: the pages are protected, the TLBs not yet flushed."""

    name = "stops-before-the-flush"

    def __init__(self) -> None:
        super().__init__()
        self.before_flush: Callable[[], None] = lambda: None

    def flush_tlbs(self, vm: dl.VM, slot: int) -> None:
        """Call the hook, then flush as x86 does."""
        self.before_flush()
        super().flush_tlbs(vm, slot)


def run(copy_early: bool) -> int:
    """Replicate a guest that stores twice into each page; returns how many pages of the replica are wrong."""
    arch = StopsBeforeTheFlush()
    vm = dl.VM(arch=arch, vcpus=1)
    vm.set_memory_region(0, base_gfn=0, npages=NPAGES)
    memory = vm.memory(0).reshape(NPAGES, PAGE_SIZE)
    replica = memory.copy()

    for page in range(NPAGES):
        # The first store faults, marks the page, and leaves a writable TLB entry behind.
        vm.vcpus[0].write(page * PAGE_SIZE, b"\x01")

        def critical_moment(page: int = page) -> None:
            if copy_early:
                replica[page] = memory[page]  # steps three and four swapped
            vm.vcpus[0].write(page * PAGE_SIZE, b"\x02")  # through the stale entry: no fault, no mark

        arch.before_flush = critical_moment
        dirty = vm.get_dirty_log(0)
        arch.before_flush = lambda: None
        if not copy_early:
            dirty.copy(memory, replica)

    # The guest has stopped. One more harvest is the last chance to hear of a write.
    vm.get_dirty_log(0).copy(memory, replica)
    return int((replica != memory).any(axis=1).sum())


def main() -> None:
    """Run both orders."""
    right, wrong = run(copy_early=False), run(copy_early=True)
    print(f"copy after the flush:  {right} of {NPAGES} pages differ")
    print(f"copy before the flush: {wrong} of {NPAGES} pages differ, and no later harvest reports them")
    assert right == 0
    assert wrong == NPAGES


if __name__ == "__main__":
    main()
