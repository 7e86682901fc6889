"""Real file systems whose disk loses its power: what reached the disk is recorded, and mounted again in part.

The file system is on a loop device over a file that recording_disk.py serves, which records every write and flush in
order. An image of a cut has all that was written before some flush, and any blocks of what was written after it: a disk
that has not been flushed owes nobody anything. Mounting it replays the journal, as after a real cut.
"""

import contextlib
import ctypes
import errno
import fcntl
import functools
import os
import shutil
import struct
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from dirtylog.sinks._bytes import pageio

from .power import Disk
from .recording_disk import ENTRY, FLUSH, MARK, WRITE

# What the disk writes whole or not at all: superblocks rely on it. So large are its sectors.
BLOCK = 4096
SERVER = Path(__file__).with_name("recording_disk.py")

# How each is made, how large, and how it is mounted: so that nothing is synced but what was asked for.
FILE_SYSTEMS = {
    "ext4": (["mkfs.ext4", "-q", "-F", "-b", "4096", "-E", "lazy_itable_init=0"], 32 << 20, "noauto_da_alloc"),
    "xfs": (["mkfs.xfs", "-q", "-s", "size=4096"], 300 << 20, ""),
    "btrfs": (["mkfs.btrfs", "-q"], 128 << 20, "nodiscard"),
}

# From <sched.h>, <sys/mount.h> and <linux/loop.h>.
CLONE_NEWNS, MS_REC, MS_PRIVATE, MNT_DETACH = 0x20000, 0x4000, 0x40000, 2
LOOP_CTL_GET_FREE, LOOP_CONFIGURE, AUTOCLEAR = 0x4C82, 0x4C0A, 4

libc = ctypes.CDLL(None, use_errno=True)


def ask(name, *arguments):
    """Call the system; an error says what was called."""
    if getattr(libc, name)(*arguments) < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), name)


@contextlib.contextmanager
def needed(what):
    """Skip the test if this cannot be had here."""
    try:
        yield
    except OSError as error:
        pytest.skip(f"no file system that can be cut: {what} answered {errno.errorcode.get(error.errno, error)}")


def alone(test):
    """Run a test in a thread that has mounts of its own: they go when it ends, and when the process is killed."""

    @functools.wraps(test)
    def run(*arguments, **named):
        raised = []

        def work():
            try:
                with needed("unshare(CLONE_NEWNS)"):
                    ask("unshare", CLONE_NEWNS)
                    ask("mount", None, b"/", None, MS_REC | MS_PRIVATE, None)
                test(*arguments, **named)
            except BaseException as error:
                raised.append(error)

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        if raised:
            raise raised[0]

    return run


@contextlib.contextmanager
def mounted(source, place, kind, options):
    ask("mount", os.fsencode(source), os.fsencode(place), kind.encode(), 0, options.encode())
    try:
        yield place
    except BaseException:
        # Whoever failed may still have something open there.
        ask("umount2", os.fsencode(place), MNT_DETACH)
        raise
    ask("umount2", os.fsencode(place), 0)


@contextlib.contextmanager
def loop(descriptor):
    """A loop device over a file; it goes with the last that has it open or mounted."""
    info = bytearray(232)
    struct.pack_into("<I", info, 52, AUTOCLEAR)
    about = struct.pack("<II", descriptor, BLOCK) + info + bytes(64)
    with open("/dev/loop-control", "rb") as control:
        for _ in range(100):
            path = f"/dev/loop{fcntl.ioctl(control, LOOP_CTL_GET_FREE)}"
            device = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.ioctl(device, LOOP_CONFIGURE, about)
                break
            except OSError as error:
                os.close(device)
                if error.errno != errno.EBUSY:  # somebody else was faster
                    raise
        else:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), path)
    try:
        yield path
    finally:
        os.close(device)


def held_blocks(image):
    """Return the blocks of a file that are not zero, by their first byte."""
    zero = bytes(BLOCK)
    found, at = {}, 0
    while True:
        try:
            at = os.lseek(image, at, os.SEEK_DATA)
        except OSError:
            return found
        block = os.pread(image, BLOCK, at)
        if block != zero:
            found[at] = block
        at += BLOCK


class FileSystem:
    """A file system on a disk that is recorded; for tests, what :class:`Disk` is by a model.

    Parameters
    ----------
    kind : str
        One of `FILE_SYSTEMS`.
    place : Path
        A directory for its mount points.
    eager : bool
        Everything is on the disk as soon as it was done: each state that the directory has, the disk has.
    forgotten : str, optional
        A kind of sync that is left out, "sync" or "sync directory".
    """

    def __init__(self, kind, place, *, eager=False, forgotten=None):
        self.kind, self.eager, self.forgotten = kind, eager, forgotten
        self.make, self.size, self.options = FILE_SYSTEMS[kind]
        if shutil.which(self.make[0]) is None:
            pytest.skip(f"no file system that can be cut: {self.make[0]} is not installed")
        self.file, self.root, self.after = place / "recorded", place / "mounted", place / "cut"
        self.directory = self.root / "disk"
        self.returned = {}
        self.entries = []
        self.mounts = 0

    @contextlib.contextmanager
    def recording(self):
        """Make it and mount it; in the block, what reaches its disk is recorded."""
        with contextlib.ExitStack() as stack:

            def kept(descriptor):
                stack.callback(os.close, descriptor)
                return descriptor

            image = kept(os.memfd_create("disk"))
            os.ftruncate(image, self.size)
            made = f"/proc/{os.getpid()}/fd/{image}"
            subprocess.run([*self.make, made], check=True, capture_output=True)
            self.start = held_blocks(image)
            record = kept(os.memfd_create("record"))
            self.file.touch()
            for place in (self.root, self.after):
                place.mkdir()
            with needed("open(/dev/fuse)"):
                fuse = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
            try:
                numbers = (fuse, image, record)
                command = [sys.executable, "-I", "-S", str(SERVER), *map(str, numbers)]
                server = stack.enter_context(subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=numbers))
                with needed("mount(fuse)"):
                    options = f"fd={fuse},rootmode=100000,user_id=0,group_id=0"
                    stack.enter_context(mounted("recorded", self.file, "fuse", options))
                server.stdin.close()
            finally:
                # The server alone has it from here on: when that ends, so does the disk.
                os.close(fuse)
            self.marks = kept(os.open(self.file, os.O_RDWR | os.O_CLOEXEC))
            with needed("a loop device"):
                device = stack.enter_context(loop(self.marks))
            with needed(f"mount({self.kind})"):
                stack.enter_context(mounted(device, self.root, self.kind, self.options))
            yield self
            self._read(record)

    def _read(self, record):
        data, at = os.pread(record, os.fstat(record).st_size, 0), 0
        while at < len(data):
            kind, size, offset = ENTRY.unpack_from(data, at)
            at += ENTRY.size
            content = data[at : at + size]
            at += size
            if kind == MARK:
                for name in content.decode().split():
                    self.returned.setdefault(name, len(self.entries) + 1)
            self.entries.append((kind, offset, content))

    def sync(self):
        """Let the disk have everything."""
        root = os.open(self.root, os.O_RDONLY)
        try:
            ask("syncfs", root)
        finally:
            os.close(root)

    def patch(self, monkeypatch):
        """Begin; before that, all is on the disk."""
        self.sync()
        if self.eager or self.forgotten:
            Through(self).patch(monkeypatch)

    def must_have(self, *names):
        """Say that a call has returned for these; the first time, that cuts begin here."""
        os.pwrite(self.marks, " ".join(names).encode() or b" ", self.size)

    # ---- after a cut ------------------------------------------------------------------------------------------------

    def cuts(self, rng, torn):
        """Yield ``(entries recorded, {name: bytes})`` of the directory after a cut, as :meth:`Disk.cuts` does."""
        durable, pending, marked, begun = dict(self.start), [], False, False
        for done, (kind, offset, content) in enumerate([*self.entries, (FLUSH, 0, b"")]):
            if kind == MARK:
                marked = begun = True
            elif kind == WRITE:
                assert offset % BLOCK == len(content) % BLOCK == 0
                pending += [(offset + at, content[at : at + BLOCK]) for at in range(0, len(content), BLOCK)]
            elif begun:
                for left in self._left(pending, marked, rng, torn):
                    yield done, self._mounted({**durable, **left})
            if kind == FLUSH:
                durable.update(pending)
                pending, marked = [], False

    @staticmethod
    def _left(pending, marked, rng, torn):
        """Go through what may be on the disk of blocks that it was not told to flush."""
        # Without them it is as before the last flush, but for what has returned since.
        if marked:
            yield {}
        if pending:
            yield dict(pending)
        if len(pending) > 1:
            for turn in range(torn):
                yield dict(pending[: rng.integers(len(pending))])
                share = (0.5, 0.1, 0.9)[turn % 3]
                yield dict(each for each in pending if rng.random() < share)

    def _mounted(self, blocks):
        self.mounts += 1
        image = os.memfd_create("cut")
        try:
            os.ftruncate(image, self.size)
            for at, block in blocks.items():
                os.pwrite(image, block, at)
            with loop(image) as device, mounted(device, self.after, self.kind, self.options) as place:
                found = (place / self.directory.name).iterdir()
                return {path.name: path.read_bytes() for path in found if path.is_file()}
        finally:
            os.close(image)


class Through(Disk):
    """Stands in for `os`, as the model does, but acts on a file system: eagerly, or forgetting a kind of sync."""

    def __init__(self, system):
        super().__init__(system.directory)
        self.system = system

    def did(self, operation):
        if self.system.eager and not operation[0].startswith("sync"):
            self.system.sync()

    def rename_noreplace(self, source, target):
        pageio.rename_noreplace(source, target)
        self.did(("rename",))

    def fsync(self, descriptor):
        kind = "sync directory" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "sync"
        if kind != self.system.forgotten:
            os.fsync(descriptor)
