"""What KVM's dirty log costs from Python, as a multiple of the same ioctls in C.

    python benchmarks/kvm_dirty_log.py

Each round of Python stands beside one of C on the same dirty pages; the figure
is the ratio of the lower quartiles, since whatever else runs only adds time.
C's stopwatch is in C; for the report of a slot, a second one is around the call
by ctypes, since an ioctl leaves caches and the TLB cold for whatever comes next,
and a caller from Python comes next.
Needs /dev/kvm, a C compiler and the headers of Linux 5.11 or later.
"""

import argparse
import ctypes
import mmap
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

import dirtylog as dl
from dirtylog.sources import kvm
from dirtylog.sources.kvm import _kvm
from dirtylog.sources.kvm._guest import Guest

GFN = 1 << 16
NPAGES = (1 << 30) // mmap.PAGESIZE
ENTRY = np.dtype([("flags", "<u4"), ("slot", "<u4"), ("offset", "<u8")])
RING = 65536


def compile_bare(folder: str) -> ctypes.CDLL:
    library = Path(folder) / "kvm_bare.so"
    source = Path(__file__).with_name("kvm_bare.c")
    subprocess.run(["cc", "-O2", "-shared", "-fPIC", "-o", library, source], check=True)
    bare = ctypes.CDLL(str(library))
    bare.bare_get.restype = bare.bare_drain.restype = ctypes.c_double
    bare.map_ring.restype = ctypes.c_void_p
    bare.map_ring.argtypes = [ctypes.c_int, ctypes.c_size_t]
    return bare


class CRing:
    """The ring of one vCPU, or plain memory, drained by the C program."""

    def __init__(self, bare, address, size, vm=-1):
        self.bare, self.address, self.size, self.vm = bare, address, size, vm
        self.fetch = ctypes.c_uint32(0)
        self.drained = ctypes.c_uint64(0)
        self.words = np.zeros(NPAGES // 64, np.uint64)

    def drain(self):
        nanoseconds = self.bare.bare_drain(
            self.vm,
            ctypes.c_void_p(self.address),
            ctypes.c_uint32(self.size),
            ctypes.byref(self.fetch),
            ctypes.c_uint32(0),
            ctypes.c_uint64(NPAGES),
            ctypes.c_void_p(self.words.ctypes.data),
            ctypes.byref(self.drained),
        )
        assert nanoseconds >= 0, nanoseconds
        return nanoseconds


def timed(call):
    start = time.perf_counter_ns()
    result = call()
    return time.perf_counter_ns() - start, result


def row(name, c, python, bound, outside=None):
    c_time, python_time = np.percentile(c, 25), np.percentile(python, 25)
    ratio = python_time / c_time
    verdict = "ok" if ratio <= bound else "TOO SLOW"
    print(
        f"{name:44} C {c_time / 1e3:9.2f} us   Python {python_time / 1e3:9.2f} us   "
        f"{ratio:5.2f}x (at most {bound}x) {verdict}"
    )
    if outside:
        by_ctypes = np.percentile(outside, 25)
        print(f"{'':44} C by ctypes {by_ctypes / 1e3:9.2f} us, of which Python takes {python_time / by_ctypes:5.2f}x")
    return ratio <= bound


def get_dirty_log(system, bare, rounds):
    fine = True
    with system.create_vm() as vm:
        vm.set_memory_region(0, GFN, NPAGES)
        guest = Guest(vm, capacity=NPAGES)
        guest.write(GFN + np.arange(NPAGES))
        vm.get_dirty_log(0)
        words = np.zeros(NPAGES // 64, np.uint64)
        descriptor, address = vm._handle.fileno(), ctypes.c_void_p(words.ctypes.data)
        for percent, repeat in ((0, 200 * rounds), (1, 20 * rounds), (100, 3 * rounds)):
            every = GFN + np.arange(0, NPAGES, 100 // percent) if percent else np.arange(0)
            c, outside, python = [], [], []
            for at in range(2 * repeat):
                if percent:
                    guest.write(every)
                if at % 2:
                    nanoseconds, dirty = timed(lambda: vm.get_dirty_log(0))
                    python.append(nanoseconds)
                    assert percent == 0 or dirty.count == len(every)
                else:
                    nanoseconds, inside = timed(lambda: bare.bare_get(descriptor, 0, address))
                    outside.append(nanoseconds)
                    c.append(inside)
            fine &= row(f"get_dirty_log of 1 GiB, {percent} % dirty", c, python, 1.15 if percent else 1.5, outside)
    return fine


def drain_plain_memory(bare, rounds):
    """A ring of 65 536 entries but one, in memory, so that the kernel's share is out of the figure."""
    fine = True
    for order, offsets in (
        ("in order", np.arange(RING)),
        ("at random", np.random.default_rng(0).permutation(NPAGES)[:RING]),
    ):
        filled = np.zeros(RING, ENTRY)
        filled["flags"][: RING - 1] = 1
        filled["offset"] = offsets
        entries = filled.copy()
        c_ring = CRing(bare, entries.ctypes.data, RING)
        c, python = [], []
        for at in range(40 * rounds):
            entries[:] = filled
            if at % 2:
                ring, log, bitmap = _kvm.Ring(entries, RING), _kvm.RingLog(), dl.DirtyBitmap(NPAGES)
                log.add(0, bitmap)
                nanoseconds, (_, dirty) = timed(lambda r=ring, log=log, b=bitmap: (log.drain(r), b.harvest()))
                python.append(nanoseconds)
                assert dirty.count == RING - 1
            else:
                c_ring.fetch.value = 0
                c.append(c_ring.drain())
                assert c_ring.drained.value == RING - 1
        fine &= row(f"drain {RING - 1} entries in plain memory, {order}", c, python, 1.15)
    return fine


def drain_real_rings(system, bare, rounds):
    """Two machines with a guest each, drained and reset by C and by Python in turn."""
    written = GFN + np.random.default_rng(0).permutation(NPAGES)[: RING * 3 // 4]
    c, python = [], []
    with system.create_vm() as one, system.create_vm() as other:
        guests = []
        for vm in (one, other):
            vm.enable_dirty_ring(RING)
            vm.set_memory_region(0, GFN, NPAGES)
            # Far from the ring's reserve, and slowly enough for a KVM in software to check in time.
            guests.append(Guest(vm, capacity=len(written), padding=40))
        c_ring = CRing(
            bare,
            bare.map_ring(guests[0].vcpu._handle.fileno(), RING * ENTRY.itemsize),
            RING,
            one._handle.fileno(),
        )
        for at in range(6 * rounds + 2):
            guests[at % 2].write(written)
            if at % 2:
                nanoseconds, dirty = timed(other.harvest_rings)
                assert dirty[0].count == len(written)
                times = python
            else:
                nanoseconds, times = c_ring.drain(), c
                assert c_ring.drained.value == len(written)
            # The first round maps every page.
            if at >= 2:
                times.append(nanoseconds)
    return row(f"harvest_rings, {len(written)} entries, with reset", c, python, 1.15)


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--rounds", type=int, default=5, help="rounds of the slowest case (default 5)")
    rounds = arguments.parse_args().rounds
    with tempfile.TemporaryDirectory() as folder:
        bare = compile_bare(folder)
        with kvm.Kvm() as system:
            fine = drain_plain_memory(bare, rounds)
            fine &= drain_real_rings(system, bare, rounds)
            fine &= get_dirty_log(system, bare, rounds)
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
