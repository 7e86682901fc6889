"""Targets: page sets from bytes and pickles, logs that other processes wrote, entries of dirty rings."""

import pickle
import struct
from collections.abc import Iterator

import numpy as np

import dirtylog as dl
from dirtylog._bits.pages import pages_of_state
from dirtylog.errors import DirtyLogError
from dirtylog.sources.kvm import _kvm
from fuzz.target import Target, Wrong

__all__ = ["Pickle", "Ring", "SharedFile", "Words"]

# A page space may be told as large as it likes, but who asks for all its words pays for them.
LARGE = 1 << 24


def agree(pages: dl.DirtyPages, npages: int, numbers: set[int]) -> None:
    """Check that every form of a page set says the same."""
    listed = pages.indices().tolist()
    if set(listed) != numbers or listed != sorted(numbers) or pages.count != len(numbers) or pages.npages != npages:
        raise Wrong(f"{pages} is not {sorted(numbers)[:20]}")
    from_runs = [page for first, count in pages.runs().tolist() for page in range(first, first + count)]
    if from_runs != listed or (npages <= LARGE and dl.indices(pages.words).tolist() != listed):
        raise Wrong(f"the forms of {pages} differ")


class Words(Target):
    """`DirtyPages.from_bytes`: number of pages, page size, words."""

    name = "words"
    refusals = (ValueError,)
    head = struct.Struct("<QQ")

    def seeds(self) -> Iterator[bytes]:
        """Yield sets of several sizes."""
        for npages, data in ((64, b"\x01" * 8), (100, b"\xff" * 12 + b"\x0f\0\0\0"), (1, b"\1" + bytes(7)), (0, b"")):
            yield self.head.pack(npages, 4096) + data

    def read(self, data: bytes) -> object:
        """Read the set."""
        npages, page_size = self.head.unpack_from(data.ljust(16, b"\0"))
        return dl.DirtyPages.from_bytes(data[16:], npages, page_size)

    def judge(self, data: bytes, answer: object) -> None:
        """Compare with what numpy unpacks."""
        assert isinstance(answer, dl.DirtyPages)
        npages, page_size = self.head.unpack_from(data.ljust(16, b"\0"))
        bits = np.unpackbits(np.frombuffer(data[16:], np.uint8), bitorder="little")
        agree(answer, npages, set(np.flatnonzero(bits).tolist()))
        if answer.to_bytes() != data[16:] or answer.page_size != page_size:
            raise Wrong("the bytes do not come back")


class Pickle(Target):
    """The state that a pickle of `DirtyPages` holds: whoever wrote the pickle chose them."""

    name = "pickle"
    refusals = (ValueError, TypeError)
    head = struct.Struct("<BqqHH")

    def seeds(self) -> Iterator[bytes]:
        """Yield sparse and dense sets."""
        for pages, npages in (([1, 70, 71], 10_000), ([5], 1 << 40), ([], 64)):
            *_, state = dl.DirtyPages.from_indices(pages, npages).__reduce__()
            _, _, exact, numbers, masks, words = state
            parts = [words] if words is not None else [numbers, masks]
            sizes = [len(part) for part in parts] + [0]
            yield self.head.pack(2 * exact + (words is None), npages, 4096, *sizes[:2]) + b"".join(parts)
        yield self.head.pack(2, 64, 4096, 8, 0) + b"\x03" + bytes(7)

    def arguments(self, data: bytes) -> tuple[object, ...]:
        """Return what the input says the pickle holds."""
        kind, npages, page_size, one, two = self.head.unpack_from(data.ljust(self.head.size, b"\0"))
        rest = data[self.head.size :]
        first, second = rest[:one], rest[one : one + two]
        if kind & 1:
            return npages, page_size, bool(kind & 2), first, second, None
        return npages, page_size, bool(kind & 2), None, None, first

    def read(self, data: bytes) -> object:
        """Rebuild the set."""
        return pages_of_state(*self.arguments(data))

    def judge(self, data: bytes, answer: object) -> None:
        """Compare with what the numbers and masks say, and with a second pickling."""
        assert isinstance(answer, dl.DirtyPages)
        npages, page_size, exact, numbers, masks, words = self.arguments(data)
        if words is not None:
            numbers, masks = np.arange(len(words) // 8).astype("<u8").tobytes(), words
        pairs = zip(np.frombuffer(numbers, "<u8").tolist(), np.frombuffer(masks, "<u8").tolist(), strict=True)
        agree(answer, npages, {64 * n + b for n, m in pairs for b in range(64) if m >> b & 1})
        if (answer.page_size, answer.exact) != (page_size, exact) or pickle.loads(pickle.dumps(answer)) != answer:
            raise Wrong(f"{answer} does not come back from a pickle of it")


class SharedFile(Target):
    """A `SharedLog` over a file that another process wrote: its size and its tail are not to be trusted."""

    name = "shared"
    writable = True
    refusals = (ValueError, DirtyLogError)
    head = struct.Struct("<I")

    def seeds(self) -> Iterator[bytes]:
        """Yield logs with and without a tail."""
        yield self.head.pack(0) + b"\x10" * 16
        yield self.head.pack(100) + b"\xff" * 12 + b"\x0f\0\0\0"
        yield self.head.pack(64) + b"\x01" * 24

    def prepare(self, data: bytes) -> bytes:
        """Write the file."""
        (self.directory / "log").write_bytes(data[4:])
        return data

    def read(self, data: bytes) -> object:
        """Open the log and harvest it."""
        (npages,) = self.head.unpack_from(data.ljust(4, b"\0"))
        with dl.SharedLog.open(self.directory / "log", npages or None) as log:
            return log.npages, log.harvest()

    def judge(self, data: bytes, answer: object) -> None:
        """Compare with what numpy unpacks; what the guest is too small for stays where it was."""
        npages, pages = answer
        size = -(-npages // 64) * 8
        bits = np.unpackbits(np.frombuffer(data[4 : 4 + size], np.uint8), bitorder="little")
        agree(pages, npages, set(np.flatnonzero(bits).tolist()))
        if (self.directory / "log").read_bytes() != bytes(size) + data[4 + size :]:
            raise Wrong("other bytes of the file have changed than those of the log")


class Ring(Target):
    """Entries of a dirty ring: slot, offset and flags are the kernel's to write, and it may be wrong."""

    name = "ring"
    refusals = ()
    entry = np.dtype([("flags", "<u4"), ("slot", "<u4"), ("offset", "<u8")])
    slots = {0: 100, 7: 1000, 1 << 16: 64}  # noqa: RUF012

    def seeds(self) -> Iterator[bytes]:
        """Yield rings that are empty, half full, full, and out of order."""
        full = np.zeros(8, self.entry)
        full["flags"] = 1
        full["slot"] = [0, 7, 7, 1 << 16, 0, 3, 7, 0]
        full["offset"] = [0, 999, 1000, 63, 1 << 63, 5, 64, 99]
        for flags in ([0] * 8, [1] * 5 + [0] * 3, [1] * 8, [1, 0, 1, 2, 2, 0, 0, 0]):
            full["flags"] = flags
            yield full.tobytes()

    def read(self, data: bytes) -> object:
        """Drain twice and take what there is."""
        size = 1 << (len(data) // 16).bit_length() >> 1
        if size == 0:
            return None
        entries = np.frombuffer(data, self.entry, size).copy()
        ring, log = _kvm.Ring(entries, size), _kvm.RingLog()
        for slot, npages in self.slots.items():
            log.add(slot, dl.DirtyBitmap(npages))
        drained = log.drain(ring), log.drain(ring)
        return entries, drained, {slot: log[slot].harvest() for slot in self.slots}

    def judge(self, data: bytes, answer: object) -> None:
        """Compare with a drain in plain Python."""
        if answer is None:
            return
        entries, ((drained, overflow, (foreign, _, _)), (again, _, _)), taken = answer
        before = np.frombuffer(data, self.entry, len(entries))
        ours = next((i for i, flags in enumerate(before["flags"].tolist()) if flags != 1), len(before))
        behind = bool((before["flags"][ours:] == 1).any())
        pages: dict[int, set[int]] = {slot: set() for slot in self.slots}
        strange = 0
        for _, slot, offset in before[:ours].tolist():
            if offset < self.slots.get(slot, 0):
                pages[slot].add(offset)
            else:
                strange += 1
        if (drained, overflow, foreign, again) != (ours, behind or ours == len(before), strange, 0):
            raise Wrong(f"drained {(drained, overflow, foreign, again)}, not {(ours, behind, strange, 0)}")
        for slot, expected in pages.items():
            agree(taken[slot], self.slots[slot], expected)
        if entries["flags"].tolist() != [2] * ours + before["flags"][ours:].tolist():
            raise Wrong("other entries are marked for reset than were read")
