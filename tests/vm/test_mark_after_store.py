"""I3 where no flush helps: a store that is held half way by userfaultfd, and a harvest meanwhile."""

import ctypes
import fcntl
import mmap
import os
import struct
import threading

import numpy as np
import pytest

import dirtylog as dl

SYS_USERFAULTFD = {"x86_64": 323, "aarch64": 282}
UFFD_USER_MODE_ONLY = 1
UFFDIO_API = 0xC018AA3F
UFFDIO_REGISTER = 0xC020AA00
UFFDIO_ZEROPAGE = 0xC020AA04
PAGE = mmap.PAGESIZE


class MissingPages:
    """Memory whose first touch waits until it is let through."""

    def __init__(self, npages):
        self.memory = np.frombuffer(mmap.mmap(-1, npages * PAGE), np.uint8)
        number = SYS_USERFAULTFD.get(os.uname().machine)
        if number is None:
            pytest.skip(f"userfaultfd: no system call number known for {os.uname().machine}")
        self.fd = ctypes.CDLL(None, use_errno=True).syscall(number, os.O_CLOEXEC | UFFD_USER_MODE_ONLY)
        if self.fd < 0:
            pytest.skip(f"userfaultfd: {os.strerror(ctypes.get_errno())}")
        fcntl.ioctl(self.fd, UFFDIO_API, struct.pack("QQQ", 0xAA, 0, 0))
        self.address = self.memory.ctypes.data
        fcntl.ioctl(self.fd, UFFDIO_REGISTER, struct.pack("QQQQ", self.address, npages * PAGE, 1, 0))

    def wait_for_touch(self):
        assert os.read(self.fd, 32)[0] == 0x12  # UFFD_EVENT_PAGEFAULT

    def let_through(self, page):
        fcntl.ioctl(self.fd, UFFDIO_ZEROPAGE, struct.pack("QQQq", self.address + page * PAGE, PAGE, 0, 0))

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        os.close(self.fd)


def test_s390_sets_the_key_after_the_store_so_a_harvest_between_them_loses_nothing():
    with MissingPages(4) as missing:
        vm = dl.VM("s390", page_size=PAGE)
        vm.set_memory_region(0, 0, 4, memory=missing.memory)
        thread = threading.Thread(target=vm.vcpus[0].store, args=([2], 7))
        thread.start()
        missing.wait_for_touch()
        assert vm.get_dirty_log(0).count == 0, "marked before the store: this harvest would copy the old content"
        missing.let_through(2)
        thread.join()
        assert int(missing.memory[2 * PAGE]) == 7
        assert vm.get_dirty_log(0).indices().tolist() == [2]
