"""A program that does what it is told on its standard input, one Python expression per line; it prints the result."""

import ctypes
import mmap
import os
import signal
import socket
import sys
import threading

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = libc.mremap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
libc.mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int]
PAGE = mmap.PAGESIZE
held = {}


def new(npages, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, at=None, file=-1):
    """Map so many pages of memory; return their address."""
    fixed = 0x10 if at else 0
    return libc.mmap(at, npages * PAGE, 3, flags | fixed, file, 0)


def poke(address, *pages):
    """Write into pages: the byte there, plus one."""
    for page in pages:
        byte = ctypes.c_ubyte.from_address(address + page * PAGE + 7)
        byte.value = (byte.value + 1) % 256


def peek(address, page):
    """Read the byte that `poke` writes."""
    return ctypes.c_ubyte.from_address(address + page * PAGE + 7).value


def waiting(number):
    """Take every signal of a number that is queued; return how many there were."""
    taken = 0
    while signal.sigtimedwait([number], 0):
        taken += 1
    return taken


def call(function, *arguments):
    """Make a C call; return what it returned, and errno."""
    ctypes.set_errno(0)
    return getattr(libc, function)(*arguments), ctypes.get_errno()


def nap(seconds):
    """Sleep by the bare nanosleep; return 0 and 0 if nothing but time ended it."""
    request = (ctypes.c_long * 2)(int(seconds), int(seconds % 1 * 1e9))
    return call("nanosleep", request, None)


def fork_and_write(address, *pages):
    """Fork; the child writes, and ends; return its status."""
    pid = os.fork()
    if not pid:
        poke(address, *pages)
        os._exit(0)
    return os.waitpid(pid, 0)[1]


def descriptors():
    """The descriptors that are open, but for the one that lists them."""
    return [each for each in sorted(map(int, os.listdir("/proc/self/fd"))) if os.path.exists(f"/proc/self/fd/{each}")]


def main():
    """Obey."""
    print(os.getpid(), flush=True)
    for line in sys.stdin:
        if line.strip():
            print(repr(eval(line)), flush=True)


_ = socket, threading
if __name__ == "__main__":
    main()
