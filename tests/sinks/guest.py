"""A guest of /dev/kvm that runs in a thread, for tests that migrate it."""

import threading

PAGE = 4096


def writer(first_page, npages):
    """Machine code that writes 1, 2, 3, ... into the pages from `first_page` to the end, round and round, for ever."""
    first, end = (first_page * PAGE).to_bytes(4, "little"), (npages * PAGE).to_bytes(4, "little")
    return (
        b"\x89\x0e"  # mov [esi], ecx
        b"\x81\xc6\x00\x10\x00\x00"  # add esi, 4096
        b"\x81\xfe" + end + b"\x72\x05"  # cmp esi, end; jb over the next
        b"\xbe" + first + b"\x41\xeb\xe8"  # mov esi, first; inc ecx; jmp to the begin
    )


class Running(threading.Thread):
    """The guest, in a thread until it is stopped."""

    def __init__(self, vcpu):
        super().__init__()
        self.vcpu, self.stopping, self.reason = vcpu, False, "INTR"
        self.start()

    def run(self):
        while not self.stopping and self.reason == "INTR":
            self.reason = self.vcpu.run().reason

    def stop(self):
        self.stopping = True
        self.vcpu.kick()
        self.join()
        assert self.reason == "INTR"
