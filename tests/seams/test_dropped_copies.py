"""Copies of a file's pages that are taken away while the kernel does not tell which pages are copies."""

import os
import subprocess
import sys

import pytest

from dirtylog.sources.memory import _tracking

# In front of libc: the PAGEMAP_SCAN that asks for pages that are no file's (the ninth word of its argument) finds no
# memory for its answer.
BLIND = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdarg.h>
#include <stdint.h>
#include <sys/ioctl.h>

int blind;

int ioctl(int fd, unsigned long request, ...)
{
    static int (*real)(int, unsigned long, void *);
    va_list more;
    void *argument;

    if (!real)
        real = (int (*)(int, unsigned long, void *))dlsym(RTLD_NEXT, "ioctl");
    va_start(more, request);
    argument = va_arg(more, void *);
    va_end(more);
    if (blind && _IOC_TYPE(request) == 'f' && _IOC_NR(request) == 16 && ((uint64_t *)argument)[8] == 4) {
        errno = ENOMEM;
        return -1;
    }
    return real(fd, request, argument);
}
"""
PROGRAM = """
import ctypes, mmap, sys, warnings
import numpy as np
import dirtylog as dl
library, path, when = sys.argv[1:]
warnings.simplefilter("ignore")
blind = ctypes.c_int.in_dll(ctypes.CDLL(library), "blind")
PAGE = mmap.PAGESIZE
with open(path, "rb") as file:
    memory = mmap.mmap(file.fileno(), 8 * PAGE, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
array = np.frombuffer(memory, np.uint8)
array[5 * PAGE] = 9
copies = {5}
blind.value = when == "open"
with dl.track(array, "userfaultfd") as tracker:
    if when == "harvest":
        tracker.harvest()
        array[3 * PAGE] = 9
        copies.add(3)
        blind.value = 1
        found = tracker.harvest()
        assert (found.count, found.exact) == (8, False), found
    blind.value = 0
    memory.madvise(mmap.MADV_DONTNEED)
    found = set(tracker.harvest().indices().tolist())
    assert copies <= found, found
    assert tracker.harvest().count == 0
"""


@pytest.mark.skipif(bool(_tracking.probe("userfaultfd")), reason=_tracking.probe("userfaultfd") or "")
@pytest.mark.parametrize("when", ["open", "harvest"])
def test_a_copy_of_which_the_kernel_did_not_tell_is_reported_when_it_is_taken_away(when, c_compiler, tmp_path):
    if "libasan" in os.environ.get("LD_PRELOAD", ""):
        pytest.skip("the sanitizer has to be the first library in the process")
    (tmp_path / "blind.c").write_text(BLIND)
    library, image = tmp_path / "blind.so", tmp_path / "image"
    subprocess.run([c_compiler, "-shared", "-fPIC", tmp_path / "blind.c", "-o", library, "-ldl"], check=True)
    image.write_bytes(bytes(8 * 4096))
    env = {**os.environ, "LD_PRELOAD": str(library), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, library, image, when], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
