"""Tell a leak from noise: what a process of its own holds is counted, and a leak is what grows with the rounds."""

import contextlib
import ctypes
import gc
import importlib.util
import inspect
import json
import os
import sys
import threading
from collections import Counter
from itertools import pairwise
from pathlib import Path

if __package__:  # and not where this is the process itself
    from . import warm

ROOT = Path(__file__).parent.parent
BATCHES = 4
# Rounds that fill caches, registries and the allocator's pools before anything is counted.
WARM_UP = 50
# And countings before the first that counts: what they read and make has its pools, too, and without a GIL these take a
# few pages more at each of the first four, as many as a slow leak.
COUNTED_BEFORE = 8
# Of a round. An object is 16 bytes at least, but what grows by fewer than this is not told from an allocator at rest.
LEAKED_BYTES = 100
PAGE = os.sysconf("SC_PAGESIZE")
# What counts for a leak: so much more for each round, of what an allocator may take at any time; of the rest, one.
# Without a GIL, blocks that were freed count as handed out for a while: fewer with each batch, and a few after four.
LEAST = {"resident pages": LEAKED_BYTES / PAGE, "blocks of Python": 1 / 2, "bytes of malloc": LEAKED_BYTES}
MEMORY = (*LEAST, "mappings")


def descriptors():
    """Count this process's descriptors by what they are; a difference of two is what has been opened between them."""
    gc.collect()  # or a forgotten object of an earlier test is closed in between
    found = Counter()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the one that lists them
            found[name, os.readlink(f"/proc/self/fd/{name}")] += 1
    return found


class _Mallinfo(ctypes.Structure):
    """``struct mallinfo2`` of glibc."""

    _fields_ = [(f"field{number}", ctypes.c_size_t) for number in range(10)]
    # In mappings of their own, and in all others.
    bytes = property(lambda self: self.field4 + self.field7)


def _malloced():
    """What the C library has handed out, where it tells."""
    ask = getattr(ctypes.CDLL(None), "mallinfo2", None)  # glibc 2.33
    if ask is None:
        return {}
    ask.restype = _Mallinfo
    return {"bytes of malloc": ask().bytes}


def held():
    """Count what this process holds.

    Resident pages are what a leak takes in the end, of whatever allocator; but one that has free room, or gives some
    back meanwhile, hides it for a while. What the two allocators have handed out is exact.
    """
    gc.collect()
    return {
        "descriptors": len(os.listdir("/proc/self/fd")),
        "mappings": len(Path("/proc/self/maps").read_bytes().splitlines()),
        "threads": threading.active_count(),
        "resident pages": int(Path("/proc/self/statm").read_text().split()[1]),
        "blocks of Python": sys.getallocatedblocks(),
        **_malloced(),
    }


def leaks(samples, rounds):
    """Name what grew in every one of the batches of `rounds` rounds between the samples.

    An allocator's arena, a huge page that the kernel makes, a cache that fills: noise comes in steps, and stops. A leak
    goes on: once per round, or once per so many.
    """
    found = {}
    for what in samples[0]:
        growth = min(after[what] - before[what] for before, after in pairwise(samples))
        if growth >= (rounds * LEAST[what] if what in LEAST else 1):
            found[what] = growth
    return found


def assert_nothing_leaks(run, *arguments, rounds=1000, memory=True):
    """Call ``run(count, *arguments)`` in a process of its own and assert that nothing grows with the count.

    `run` is a function of a test module; `arguments` are what JSON can carry. A sanitizer keeps what was freed, to see
    it used, in more and more mappings: pass ``memory=False`` there, where descriptors and threads alone are judged.
    """
    batch = rounds // BATCHES
    samples = counted(run, batch, *arguments)
    if not memory:
        for sample in samples:
            for what in MEMORY:
                sample.pop(what, None)
    found = leaks(samples, batch)
    assert not found, f"every {batch} rounds leave at least {found}: {samples}"


def counted(run, batch, *arguments):
    """Return what a process of its own holds at first, and after each batch."""
    task = json.dumps([inspect.getfile(run), run.__name__, batch, arguments])
    here = f"import runpy; runpy.run_path({str(Path(__file__).resolve())!r}, run_name='__main__')"
    done = warm.run(here, task, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def main():
    """Be the process: load the module, run the batches, print what was held after each."""
    file, name, batch, arguments = json.loads(sys.argv[1])
    path = Path(file)
    # As a member of its package, so that its relative imports work.
    sys.path[0] = str(ROOT)
    parts = path.relative_to(ROOT).with_suffix("").parts
    spec = importlib.util.spec_from_file_location(".".join(parts), path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    run = getattr(module, name)
    run(WARM_UP, *arguments)
    # As texts: one block each.
    samples = [json.dumps(held()) for _ in range(COUNTED_BEFORE)][-1:]
    for _ in range(BATCHES):
        run(batch, *arguments)
        samples.append(json.dumps(held()))
    print(f"[{','.join(samples)}]")


if __name__ == "__main__":
    main()
