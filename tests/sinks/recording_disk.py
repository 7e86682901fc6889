"""A program that serves a disk as a file, by FUSE, and records in which order it was written and flushed.

Run by file_systems.py: recording_disk.py FUSE IMAGE RECORD, three open descriptors. It begins when its input ends, for
there is nothing to read before the mount. A process of its own, because whoever waits for the disk may hold the GIL. It
ends when the file is unmounted, and if it ends before that, nothing hangs: whoever waits gets an error.
"""

import os
import struct
import sys
from errno import ENODEV, ENOSYS, EPERM

WRITE, FLUSH, MARK = 1, 2, 3
# Of an entry of the record: what it is, the bytes that follow, the first byte of the disk.
ENTRY = struct.Struct("<BIQ")

# From <linux/fuse.h>, whose names these are.
FORGET, GETATTR, SETATTR, OPEN, READ, FUSE_WRITE, STATFS, RELEASE, FSYNC = 2, 3, 4, 14, 15, 16, 17, 18, 20
FUSE_FLUSH, INIT, INTERRUPT, DESTROY, BATCH_FORGET, FALLOCATE = 25, 26, 36, 38, 42, 43
IN_HEADER, OUT_HEADER = struct.Struct("<IIQQIIIHH"), struct.Struct("<IiQ")
ATTRIBUTES = struct.Struct("<6Q10I")
BIG_WRITES, MAX_PAGES, DIRECT_IO = 1 << 5, 1 << 22, 1
MAX_WRITE = 1 << 20
KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE = 1, 2, 16

REGULAR = 0o100600


class Server:
    """Answers requests one at a time, so their order is the order of the record."""

    def __init__(self, fuse, image, record):
        self.fuse, self.image, self.record = fuse, image, record
        self.size = os.fstat(image).st_size

    def note(self, kind, offset=0, data=b""):
        os.write(self.record, ENTRY.pack(kind, len(data), offset) + data)

    def attributes(self):
        return ATTRIBUTES.pack(1, self.size, 0, 0, 0, 0, 0, 0, 0, REGULAR, 1, 0, 0, 0, 4096, 0)

    def write(self, offset, data):
        # What lies behind the end of the disk is no write to it, but a mark among them.
        if offset >= self.size:
            self.note(MARK, 0, data)
        else:
            os.pwrite(self.image, data, offset)
            self.note(WRITE, offset, data)

    def answer(self, operation, body):
        """Return an error number and the answer."""
        if operation == INIT:
            about = struct.pack("<4I2H2I2H8I", 7, 31, 0, BIG_WRITES | MAX_PAGES, 12, 9, MAX_WRITE, 1, 256, 0, *[0] * 8)
            return 0, about
        if operation in (GETATTR, SETATTR):
            return 0, bytes(16) + self.attributes()
        if operation == OPEN:
            return 0, struct.pack("<QII", 0, DIRECT_IO, 0)
        if operation == READ:
            _, offset, size = struct.unpack_from("<QQI", body)
            return 0, os.pread(self.image, size, offset)
        if operation == FUSE_WRITE:
            _, offset, size = struct.unpack_from("<QQI", body)
            self.write(offset, body[40 : 40 + size])
            return 0, struct.pack("<II", size, 0)
        if operation == FALLOCATE:
            _, offset, length, mode = struct.unpack_from("<QQQI", body)
            if not mode & (PUNCH_HOLE | ZERO_RANGE):
                return ENOSYS, b""
            for at in range(offset, offset + length, MAX_WRITE):
                self.write(at, bytes(min(MAX_WRITE, offset + length - at)))
            return 0, b""
        if operation == FSYNC:
            self.note(FLUSH)
            return 0, b""
        if operation == STATFS:
            return 0, bytes(80)
        return (0, b"") if operation in (RELEASE, FUSE_FLUSH, DESTROY) else (ENOSYS, b"")

    def serve(self):
        while True:
            try:
                request = os.read(self.fuse, MAX_WRITE + 8192)
            except OSError as error:
                if error.errno in (ENODEV, EPERM):  # unmounted; never mounted
                    return
                raise
            _, operation, unique, *_ = IN_HEADER.unpack_from(request)
            if operation in (FORGET, BATCH_FORGET, INTERRUPT):
                continue
            error, answer = self.answer(operation, request[IN_HEADER.size :])
            os.write(self.fuse, OUT_HEADER.pack(OUT_HEADER.size + len(answer), -error, unique) + answer)


if __name__ == "__main__":
    sys.stdin.read()
    Server(*map(int, sys.argv[1:])).serve()
