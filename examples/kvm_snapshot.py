"""Incremental snapshots of a real guest behind /dev/kvm, each restored and compared; says so where there is no KVM.

needs: dirtylog.sinks.snapshot
needs: xxhash
"""

import mmap
import platform
import tempfile
from pathlib import Path

import dirtylog as dl
from dirtylog.sinks import snapshot
from dirtylog.sources import kvm

NPAGES = 1024
PAGE = mmap.PAGESIZE

# 32-bit code, loaded at address 0. It adds 1 to the first byte of EBX pages, beginning at address EDI, then halts.
PROGRAM = bytes.fromhex(
    "fe07"  # again: inc byte [edi]
    "81c700100000"  # add edi, 4096
    "4b"  # dec ebx
    "75f5"  # jnz again
    "f4"  # hlt
)


def write_pages(vcpu: kvm.Vcpu, first: int, count: int) -> None:
    """Let the guest write `count` pages from page `first` on, and wait until it halts."""
    vcpu.enter_flat32(0)
    registers = vcpu.get_regs()
    registers.rdi, registers.rbx = first * PAGE, count
    vcpu.set_regs(registers)
    reason = vcpu.run().reason
    while reason == "INTR":  # a signal came in between: go on where the guest was
        reason = vcpu.run().reason
    assert reason == "HLT", reason


def main() -> None:
    """Run the guest, take a snapshot after each run, restore all of them."""
    if platform.machine() != "x86_64":
        print(f"skipped: the guest's program is x86 machine code, and this machine is {platform.machine()}")
        return
    probe = kvm.probe()
    if not probe.available:
        print(f"skipped: {probe.reason}")
        return

    log = dl.DirtyLog()
    moments = {}
    with (
        kvm.Kvm() as system,
        system.create_vm() as vm,
        tempfile.TemporaryDirectory() as name,
    ):
        vm.set_memory_region(0, base_gfn=0, npages=NPAGES)
        memory = vm.memory(0)
        memory[: len(PROGRAM)] = memoryview(PROGRAM)
        vcpu = vm.create_vcpu()

        log.attach(vm.slot(0))
        snapshots = log.observer("snapshots", everything=True)
        parent = None
        for number, (first, count) in enumerate([(1, 1000), (10, 3), (500, 40)]):
            write_pages(vcpu, first, count)
            path = Path(name, f"{number}.img")
            with snapshots.collect() as epoch:
                if parent is None:
                    info = snapshot.save(path, memory)
                else:
                    info = snapshot.save_diff(path, memory, epoch.pages, parent=parent)
            print(f"{path.name}: {count} pages written, {epoch.pages.count} reported, {info.count} saved")
            moments[path] = bytes(memory)
            parent = path
        for path, moment in moments.items():
            assert bytes(snapshot.restore(path)) == moment
    print(f"{len(moments)} snapshots restored: each equal to its moment")


if __name__ == "__main__":
    main()
