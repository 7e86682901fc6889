"""Frames of pages: as many bytes as changed, whatever changed; and nothing is written of what cannot be."""

import contextlib
import errno
import os
import socket
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dirtylog.sinks.migrate._frames import ENDED, FOREIGN, LATE, ODD, OVER, PAUSE, Packer, Taker
from dirtylog.sinks.migrate.wire import Kind

from ..signals import signalled

PAGE = 512
ZERO, WHOLE, DELTA = Kind.ZEROS, Kind.PAGES, Kind.DELTAS


def rows(table):
    """Return the numbers of the pages of a table."""
    found = np.frombuffer(table, "<i8").reshape(-1, 2)
    return [page for offset, length in found for page in range(offset // PAGE, -(-(offset + length) // PAGE))]


class Cache:
    """Copies of as many pages as there are places."""

    def __init__(self, places):
        self.data = np.zeros(places * PAGE, np.uint8)
        self.held = np.full(places, -1, np.int64)
        self.frames = np.zeros(places, np.int64)

    def sort(self, window, numbers, older=1):
        """Return the kind of each page, and what changed."""
        where = extents(*numbers)
        where[-1, 1] = len(window) - (len(numbers) - 1) * PAGE
        nbytes = max(int(where[-1].sum()), 0)
        packer = Packer([], nbytes, PAGE, self.data, self.held, self.frames, 1 << 18)
        packer.begin(where, older, window)
        nbytes, counts, frames = packer.pack()
        assert packer.pack() is None
        assert nbytes == len(window)
        kinds = {number: kind for kind, _, table, _ in frames for number in rows(table)}
        assert sorted(kinds) == list(numbers)
        assert counts == tuple(list(kinds.values()).count(kind) for kind in (ZERO, DELTA))
        changes = {kind: bytes(data) for kind, _, _, data in frames}
        whole = b"".join(window[i * PAGE :][:PAGE].tobytes() for i, n in enumerate(numbers) if kinds[n] == WHOLE)
        assert changes.get(WHOLE, b"") == whole
        return [kinds[number] for number in numbers], changes.get(DELTA, b"")


def lay_deltas(data, where, target):
    """Lay deltas over pages that have come."""
    came = np.full(-(-len(target) // PAGE // 64) or 1, (1 << 64) - 1, np.uint64)
    taker = Taker([(0, target)], len(target), PAGE, came)
    taker.left = len(target)
    taker.apply(DELTA, where.astype("<i8"), data)


def page(*changes, fill=7):
    made = np.full(PAGE, fill, np.uint8)
    for at, value in changes:
        made[at] = value
    return made


def extents(*pages):
    return np.array([[number * PAGE, PAGE] for number in pages], np.int64).reshape(-1, 2)


@given(st.data())
def test_a_delta_makes_the_new_page_of_the_old_one(data):
    rng = np.random.default_rng(data.draw(st.integers(0, 1 << 30)))
    npages = data.draw(st.integers(1, 5))
    old = rng.integers(0, 3, npages * PAGE, np.uint8)
    cache = Cache(npages)
    cache.sort(old, range(npages))
    new = old.copy()
    for _ in range(data.draw(st.integers(0, 12))):
        start = data.draw(st.integers(0, new.size - 1))
        new[start : start + data.draw(st.integers(1, 200))] = rng.integers(0, 256)
    kinds, changes = cache.sort(new, range(npages))
    copy = old.copy()
    if DELTA in kinds:
        lay_deltas(changes, extents(*[i for i in range(npages) if kinds[i] == DELTA]), copy)
    for i in range(npages):
        part = slice(i * PAGE, i * PAGE + PAGE)
        if kinds[i] != DELTA:
            copy[part] = new[part]
        assert (kinds[i] == ZERO) == (not new[part].any())
    assert (copy == new).all()
    # What the cache has is what the other end has: the next delta is taken of that.
    kept = [i for i in range(npages) if kinds[i] != ZERO]
    assert all((cache.data[i * PAGE :][:PAGE] == new[i * PAGE :][:PAGE]).all() for i in kept)
    assert len(changes) <= PAGE * 3 // 4 * kinds.count(DELTA)


def number(value):
    made = []
    while value >= 128:
        made.append(value & 127 | 128)
        value >>= 7
    return bytes([*made, value])


def delta(old, new):
    """Return what a delta of a page is: a change ends where five bytes, or all that are left, are as they were."""
    differ = [a != b for a, b in zip(old, new, strict=True)]
    made, start = b"", 0
    while start < len(new):
        at = differ.index(True, start) if True in differ[start:] else len(new)
        end = at
        while any(differ[end : end + 5]):
            end += 1
        made += number(at - start) + number(end - at) + bytes(new[at:end])
        start = end
    return made


@given(st.lists(st.tuples(st.integers(0, PAGE - 1), st.integers(1, 80)), max_size=12))
def test_a_change_ends_where_enough_bytes_are_as_they_were(changes):
    new = page()
    for start, length in changes:
        new[start : start + length] += 1
    cache = Cache(1)
    cache.sort(page(), [0])
    due = delta(page(), new)
    kinds, made = cache.sort(new, [0])
    if kinds == [WHOLE]:
        # Three quarters of a page, less what numbers may take.
        assert len(due) > PAGE // 2
    else:
        assert made == due


def test_a_delta_takes_the_bytes_that_changed_and_a_few_more():
    cache = Cache(1)
    cache.sort(page(), [0])
    assert cache.sort(page(), [0]) == ([DELTA], b"\x80\x04\x00")
    assert cache.sort(page((100, 1)), [0]) == ([DELTA], b"\x64\x01\x01\x9b\x03\x00")
    # Two changes with few bytes between them are one.
    assert cache.sort(page((100, 1), (103, 2), (511, 3)), [0])[1] == b"\x67\x01\x02\x97\x03\x01\x03"
    changed = np.random.default_rng(0).integers(8, 256, 64, np.uint8)
    kinds, changes = cache.sort(page(*enumerate(changed, 200)), [0])
    assert kinds == [DELTA]
    assert len(changes) < 64 + 16


def test_pages_are_zero_whole_or_deltas_by_what_that_takes():
    cache = Cache(4)
    rng = np.random.default_rng(1)
    window = np.concatenate([page(), np.zeros(PAGE, np.uint8), rng.integers(0, 256, PAGE, np.uint8), page()])
    assert cache.sort(window, [0, 1, 2, 3]) == ([WHOLE, ZERO, WHOLE, WHOLE], b"")
    window = np.concatenate([page((3, 3)), page(), rng.integers(0, 256, PAGE, np.uint8), np.zeros(PAGE, np.uint8)])
    assert cache.sort(window, [0, 1, 2, 3])[0] == [DELTA, WHOLE, WHOLE, ZERO]
    # A page that was zero, or that went whole, is taken from there.
    assert cache.sort(window, [0, 1, 2, 3])[0] == [DELTA, DELTA, DELTA, ZERO]
    assert cache.sort(np.tile(page(), 4), [0, 1, 2, 3])[0] == [DELTA, DELTA, WHOLE, WHOLE]


def test_a_page_has_one_place_and_takes_it_when_it_may():
    cache = Cache(2)
    assert cache.sort(np.tile(page(), 2), [0, 1], older=-1)[0] == [WHOLE, WHOLE]
    assert cache.sort(np.tile(page(), 2), [0, 1], older=-1)[0] == [WHOLE, WHOLE]
    assert cache.sort(np.tile(page(), 3), [0, 1, 2])[0] == [WHOLE, WHOLE, WHOLE]
    assert cache.sort(np.tile(page(), 3), [0, 1, 2])[0] == [WHOLE, DELTA, WHOLE]
    assert cache.held.tolist() == [2, 1]
    # What went lately keeps it.
    cache.frames[:] = [5, 4]
    assert cache.sort(np.tile(page(), 2), [4, 5], older=5)[0] == [WHOLE, WHOLE]
    assert cache.held.tolist() == [2, 5]
    assert Cache(0).sort(np.tile(page(), 2), [0, 1])[0] == [WHOLE, WHOLE]


def test_the_last_page_may_be_cut_and_is_never_a_delta():
    cache = Cache(2)
    window = np.concatenate([page(), page()[:100]])
    cache.sort(window, [0, 1])
    assert cache.sort(window, [0, 1])[0] == [DELTA, WHOLE]


@pytest.mark.parametrize(
    "data",
    [
        b"", b"\x00", b"\x00\x00", b"\x80", b"\x80\x04", b"\x80\x04\x00\x00", b"\x81\x04\x00", b"\xff\x03\x02aa",
        b"\x80\x80\x80\x80\x01\x00", b"\x80\x84\x00\x00", b"\xff\xff\xff\xff\xff\xff", b"\x00\x80\x04",
        b"\x00\x80\x04" + b"a" * 511, b"\x00\x80\x04" + b"a" * 513, b"\x80\x02\x00\x00\x00\x80\x02\x00",
        b"\xff\x03\x01",
    ],
)  # fmt: skip
def test_what_is_no_delta_writes_nothing(data):
    target = np.arange(2 * PAGE).astype(np.uint8)
    before = target.copy()
    # The first page's delta is right.
    with pytest.raises(ValueError, match="not the deltas of these pages"):
        lay_deltas(b"\x00\x02zz\xfe\x03\x00" + data, extents(0, 1), target)
    assert (target == before).all()
    lay_deltas(b"\x00\x02zz\xfe\x03\x00", extents(0), target)
    assert target[:3].tobytes() == b"zz\x02"


@given(st.binary(max_size=40), st.integers(1, 3))
def test_any_bytes_are_deltas_or_refused(data, npages):
    target = np.zeros(npages * PAGE + 1, np.uint8)
    target[-1] = 9
    try:
        lay_deltas(data, np.array([[0, npages * PAGE]]), target[:-1])
    except ValueError:
        assert not target[:-1].any()
    assert target[-1] == 9


def test_what_does_not_fit_is_refused():
    cache = Cache(1)

    def packer(nbytes=PAGE, granule=PAGE, room=1 << 18, held=cache.held, regions=()):
        return Packer(regions, nbytes, granule, cache.data, held, np.zeros(len(held), np.int64), room)

    for extent, message in (
        ([-512, 512], "offset -512"),
        ([0, 1024], "the memory has 512 bytes"),
        ([5, 500], "does not ascend in whole pages"),
        ([0, 500], "is not of whole pages"),
        ([0, 0], "does not ascend in whole pages"),
    ):
        with pytest.raises((IndexError, ValueError), match=message):
            packer().begin(np.array([extent]), 0, page())
    with pytest.raises(ValueError, match="do not add up"):
        packer().begin(extents(0), 0, page()[1:])
    with pytest.raises(ValueError, match="there is no memory to read"):
        packer().begin(extents(0), 0)
    with pytest.raises(ValueError, match="granule is 0"):
        packer(granule=0)
    with pytest.raises(ValueError, match="room is 0"):
        packer(room=0)
    with pytest.raises(ValueError, match="too few for 2 places"):
        packer(held=np.array([-1, -1]))
    with pytest.raises(ValueError, match="frames has 0 places"):
        packer().remember(np.zeros(0, np.uint64))
    with pytest.raises(ValueError, match="region 0 begins at 1 and has 512 bytes"):
        packer(regions=[(1, page())])
    with pytest.raises(ValueError, match="1024 bytes in pages of 4 take 4 words"):
        Taker([(0, np.zeros(1024, np.uint8))], 1024, 4, np.zeros(3, np.uint64))
    with pytest.raises(ValueError, match="there are no regions"):
        Taker([], 1024, 4, np.zeros(4, np.uint64))
    with pytest.raises(ValueError, match="kind 5 has no pages"):
        Taker([(0, page())], PAGE, PAGE, np.zeros(1, np.uint64)).apply(5, b"")


# ---- frames over a line ----------------------------------------------------------------------------------------------


class Ends:
    """Memory at both ends of a line, with the arrays and gaps that a page space may have."""

    def __init__(self, rng, places=0, cut=0):
        self.sizes = [(0, 5 * PAGE - 100), (5 * PAGE, 9 * PAGE), (14 * PAGE, 300), (15 * PAGE, 40 * PAGE - cut)]
        self.nbytes = sum(self.sizes[-1])
        self.source = [rng.integers(0, 256, size, np.uint8) for _, size in self.sizes]
        self.target = [np.full(size, 7, np.uint8) for _, size in self.sizes]
        self.copies = np.zeros(places * PAGE, np.uint8), np.full(places, -1, np.int64), np.zeros(places, np.int64)
        self.seen = np.zeros(1, np.uint64)
        self.packer = Packer(self.regions(self.source), self.nbytes, PAGE, *self.copies, 4 * PAGE)
        self.taker = Taker(self.regions(self.target), self.nbytes, PAGE, self.seen)
        self.sequence = self.frames = 0

    def regions(self, arrays):
        return [(start, array) for (start, _), array in zip(self.sizes, arrays, strict=True)]

    def whole(self):
        return np.array([[0, self.nbytes]])

    def round(self, here, there, where, enough=1 << 30):
        """Send some pages and receive them; return how many granules were zero, and of how many deltas went."""
        self.packer.begin(where, 0)
        self.taker.left = self.nbytes
        why, nbytes, zeros, deltas = self.packer.send(here.fileno(), self.sequence, 1 << 30, 5, 0)
        frames, size, headers, _ = self.packer.gone
        assert (why, nbytes) == (PAUSE, where[:, 1].sum())
        kept = b""
        got, read, seen = 0, 0, b""
        while got < frames:
            due = self.sequence + got
            why, kept, more, taken, part = self.taker.receive(there.fileno(), kept, due, enough, 0.01, 0.01, 0)
            # With nothing more to come it waits for that in vain.
            assert why in (PAUSE, LATE)
            assert more > 0
            got, read, seen = got + more, read + taken, seen + part
        assert (kept, read, seen) == (b"", size, headers)
        self.sequence += frames
        return zeros, deltas

    def equal(self):
        return all((a == b).all() for a, b in zip(self.source, self.target, strict=True))


@pytest.fixture
def line():
    here, there = socket.socketpair()
    with here, there:
        for sock in (here, there):
            sock.settimeout(30)
        yield here, there


@pytest.mark.parametrize("enough", [1, 1 << 30])
@pytest.mark.parametrize("cut", [0, 77])
def test_pages_of_arrays_arrive_whatever_lies_between_them(line, cut, enough):
    rng = np.random.default_rng(cut)
    ends = Ends(rng, 55, cut)
    ends.source[3][PAGE : 9 * PAGE] = 0
    assert ends.round(*line, ends.whole(), enough) == (8, 0)
    assert ends.equal()
    for each in ends.source:
        each[::1000] += 1
    ends.source[1][: 2 * PAGE] = 0
    zeros, deltas = ends.round(*line, ends.whole(), enough)
    assert ends.equal()
    assert zeros == 2 + 4
    assert deltas > 40
    assert ends.taker.done == 2 * ends.nbytes


@pytest.mark.parametrize("nbytes", [20 * 4096, 20 * 4096 - 77, 4096, 700])
@pytest.mark.parametrize("offset", [0, 1, 16, 63])
def test_pages_are_laid_and_summed_wherever_memory_begins(line, offset, nbytes):
    here, there = line
    block = np.full(nbytes + 192, 7, np.uint8)
    begin = -block.ctypes.data % 64 + offset
    target, expected = block[begin : begin + nbytes], np.random.default_rng(8).integers(0, 256, nbytes, np.uint8)
    nothing = np.zeros(0, np.int64)
    packer = Packer([(0, expected)], nbytes, 4096, np.zeros(0, np.uint8), nothing, nothing, 1 << 18)
    taker = Taker([(0, target)], nbytes, 4096, np.zeros(1, np.uint64))
    # Some scattered, the rest in one piece.
    for where in ([[0, min(nbytes, 4096)]], [[start, min(4096, nbytes - start)] for start in range(0, nbytes, 8192)],
                  [[0, nbytes]]):  # fmt: skip
        taker.left = nbytes
        packer.begin(np.array(where), -1)
        packer.send(here.fileno(), taker.applied, 1 << 30, 5, 0)
        applied = taker.applied
        assert taker.receive(there.fileno(), b"", applied, sum(row[1] for row in where), 5, 5, 0)[0] == PAUSE
        for start, size in where:
            assert (target[start : start + size] == expected[start : start + size]).all()
    assert (target == expected).all()
    assert (block[:begin] == 7).all()
    assert (block[begin + nbytes :] == 7).all()


@pytest.mark.parametrize("granule", [1000, 4096])
def test_what_goes_is_what_its_checksum_says_whatever_is_written_meanwhile(line, granule):
    here, there = line
    memory = np.random.default_rng(5).integers(1, 255, 8 * granule, np.uint8)
    target, nothing = np.zeros_like(memory), np.zeros(0, np.int64)
    packer = Packer([(0, memory)], memory.nbytes, granule, np.zeros(0, np.uint8), nothing, nothing, 2 * granule)
    taker = Taker([(0, target)], memory.nbytes, granule, np.zeros(1, np.uint64))
    over, sequence = threading.Event(), 0

    def write():
        with open("/dev/urandom", "rb", buffering=0) as source:
            while not over.is_set():
                # Again and again, without the GIL.
                os.readv(source.fileno(), [memory] * 256)

    def goes():
        nonlocal sequence
        taker.left = memory.nbytes
        packer.begin(np.array([[0, memory.nbytes]]), -1)
        gone, came, kept = 0, 0, b""
        # A call ends after a tenth of a second, however little it has done.
        while packer.send(here.fileno(), sequence + gone, 1 << 30, 5, 0)[1]:
            gone += packer.gone[0]
        assert gone == 4
        while came < gone:
            why, kept, frames, *_ = taker.receive(there.fileno(), kept, sequence + came, 1, 5, 5, 0)
            assert why == PAUSE
            came += frames
        assert kept == b""
        sequence += gone

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(3000):
            goes()
    finally:
        over.set()
        writer.join()
    goes()
    assert (target == memory).all()


def test_what_is_not_of_pages_or_not_right_is_left_to_others_byte_for_byte(line):
    here, there = line
    ends = Ends(np.random.default_rng(1))
    ends.packer.begin(ends.whole(), -1)
    ends.taker.left = ends.nbytes
    ends.packer.send(here.fileno(), 0, 1 << 30, 5, 0)
    good = there.recv(1 << 20)
    before = [each.copy() for each in ends.target]
    for at in (0, 4, 5, 6, 8, 12, 20, 24, 28, 31, 32, 45, 200):
        bad = bytearray(good[: 24 + 8 + 16 + 4 * PAGE + 30])
        bad[at] ^= 0x40
        here.sendall(bad)
        why, kept, frames, _, _ = ends.taker.receive(there.fileno(), b"", 0, 1 << 30, 0.01, 0.01, 0)
        assert why in (FOREIGN, ODD) or at == 12
        assert frames == 0
        assert bad.startswith(kept)
        there.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            there.recv(1 << 20)
        # Pages are summed while they are laid: where nothing but the sum is wrong they lie there, and have not come.
        assert all((a == b).all() for a, b in zip(ends.target, before, strict=True)) == (at not in (20, 200))
        assert not ends.seen.any()
        for target, kept in zip(ends.target, before, strict=True):
            target[:] = kept


def test_a_damaged_frame_takes_back_what_its_channel_has_carried_and_no_more(line):
    here, there = line
    memory = np.random.default_rng(6).integers(1, 255, 256 * PAGE, np.uint8)
    target, seen, filled = np.zeros_like(memory), np.zeros(4, np.uint64), np.zeros(4, np.uint64)
    nothing, nbytes, odd = np.zeros(0, np.int64), memory.nbytes, np.array([[64, 64], [192, 64]]) * PAGE
    shares = [(channel, 2, 64) for channel in range(2)]
    packers = [
        Packer([(0, memory)], nbytes, PAGE, np.zeros(0, np.uint8), nothing, nothing, 8 * PAGE, share)
        for share in shares
    ]
    takers = [Taker([(0, target)], nbytes, PAGE, seen, filled, share) for share in shares]

    def goes(channel, where, spoil=None):
        packer, taker = packers[channel], takers[channel]
        packer.begin(where, -1)
        packer.send(here.fileno(), 0, 1 << 30, 5, 0)
        if spoil is not None:
            data = bytearray(there.recv(1 << 20))
            data[spoil] ^= 1
            here.sendall(data)
        taker.left = nbytes
        return taker.receive(there.fileno(), b"", 0, where[:, 1].sum(), 5, 5, 0)[0]

    for channel, where in enumerate((odd - 64 * PAGE * np.array([1, 0]), odd)):
        assert goes(channel, where) == PAUSE
    assert (target == memory).all()
    assert [taker.applied for taker in takers] == [16, 16]
    assert goes(1, odd[1:, :] + [[0, -56 * PAGE]], 24 + 8 + 16 + 100) == ODD
    everything = 2**64 - 1
    assert seen.tolist() == [everything, 0, everything, 0]
    assert [taker.applied for taker in takers] == [16, 0]
    # What has to be zero is looked at: bytes lie there.
    assert filled.tolist() == [everything] * 4
    assert (target != memory).sum() == 1
    # What changed in a page is of no use where nobody knows the page.
    with pytest.raises(ValueError, match="pages that never came"):
        takers[1].apply(DELTA, extents(64), b"\x00\x01x\xff\x03\x00")
    there.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        there.recv(1 << 20)
    there.setblocking(True)
    assert goes(1, odd) == PAUSE
    assert (target == memory).all()
    assert seen.tolist() == [everything] * 4


def test_bytes_of_a_damaged_frame_are_not_taken_for_zeros(line):
    here, there = line
    memory, seen, filled = np.zeros(64 * PAGE, np.uint8), np.zeros(1, np.uint64), np.zeros(1, np.uint64)
    taker = Taker([(0, memory)], memory.nbytes, PAGE, seen, filled)
    taker.left = memory.nbytes
    megabytes(8 * PAGE).send(here.fileno(), 0, 1 << 30, 5, 0)
    data = bytearray(there.recv(1 << 20))
    data[-1] ^= 1
    here.sendall(data)
    assert taker.receive(there.fileno(), b"", 0, 1, 5, 5, 0)[0] == ODD
    assert memory.any()
    taker.apply(ZERO, np.array([[0, memory.nbytes]]))
    assert not memory.any()


def test_a_line_that_ends_or_rests_says_so(line):
    here, there = line
    ends = Ends(np.random.default_rng(2))
    assert ends.taker.receive(there.fileno(), b"", 0, 1, 0.01, 0.01, 0)[0] == LATE
    assert ends.taker.receive(there.fileno(), b"", 0, 1, 5, 5, 0.01)[0] == OVER
    here.sendall(b"dlog\x03")
    why, kept, *_ = ends.taker.receive(there.fileno(), b"", 0, 1, 0.01, 0.01, 0)
    assert (why, kept) == (LATE, b"dlog\x03")
    here.close()
    assert ends.taker.receive(there.fileno(), b"", 0, 1, 5, 5, 0)[0] == ENDED
    there.close()
    ends.packer.begin(ends.whole(), -1)
    assert ends.packer.send(0x7FFFFFFF, 0, 1, 5, 0)[0] == -errno.EBADF
    assert ends.packer.gone == (0, 0, b"", False)


def test_a_wait_is_for_the_rest_of_a_frame_and_the_socket_stays_as_it_was():
    server = socket.create_server(("127.0.0.1", 0))
    with server, socket.create_connection(server.getsockname()) as here, server.accept()[0] as there:
        ends = Ends(np.random.default_rng(9))
        ends.taker.left = ends.nbytes
        megabytes(64 * PAGE).send(here.fileno(), 0, 1 << 30, 5, 0)
        with memoryview(bytearray(1 << 20)) as frame:
            size = there.recv_into(frame)
            here.sendall(frame[:100])
            waits = []

            def look():
                waits.append(there.getsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT))
                raise InterruptedError

            there.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 3)
            with pytest.raises(InterruptedError):
                ends.taker.receive(there.fileno(), b"", 0, 1 << 30, 0, 0, 0, look)
        assert waits == [size - 100]
        assert there.getsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT) == 3


def test_a_signal_is_heard_while_a_line_rests(line):
    ends = Ends(np.random.default_rng(3))

    due = []

    def interrupt(*_):
        if due:
            due.pop()
            raise KeyboardInterrupt

    with signalled(interrupt, every=0.01):
        with pytest.raises(KeyboardInterrupt):  # noqa: PT012
            due.append(None)
            ends.taker.receive(line[1].fileno(), b"", 0, 1, 0, 0, 0)
        with pytest.raises(KeyboardInterrupt):  # noqa: PT012
            due.append(None)
            while True:
                ends.packer.begin(ends.whole(), -1)
                ends.packer.send(line[0].fileno(), 0, 1 << 30, 0, 0)


def test_zeros_of_memory_that_is_new_are_neither_read_nor_written():
    memory = np.zeros(64 * PAGE, np.uint8)
    filled = np.zeros(1, np.uint64)
    taker = Taker([(0, memory)], memory.nbytes, PAGE, np.zeros(1, np.uint64), filled)
    taker.left = 1 << 30
    taker.apply(ZERO, np.array([[0, 64 * PAGE]]))
    assert taker.cleared == 0
    taker.apply(WHOLE, np.array([[3 * PAGE, PAGE]]), page())
    assert memory.any()
    taker.apply(ZERO, np.array([[0, 64 * PAGE]]))
    assert taker.cleared == 1
    assert not memory.any()


def megabytes(nbytes):
    """Return a packer that has begun with so many bytes, in frames of 256 KiB."""
    memory = np.random.default_rng(4).integers(0, 256, nbytes, np.uint8)
    nothing = np.zeros(0, np.int64)
    packer = Packer([(0, memory)], nbytes, PAGE, np.zeros(0, np.uint8), nothing, nothing, 64 * PAGE)
    packer.begin(np.array([[0, nbytes]]), -1)
    return packer


def test_a_call_ends_soon_however_slowly_the_line_takes_it(line):
    here, there = line
    packer, read = megabytes(4 << 20), []
    # Each look comes after a tenth of a second in which nothing went: then the call ends with the frames under way.
    why, nbytes, *_ = packer.send(here.fileno(), 0, 1 << 30, 5, 0, lambda: read.append(there.recv(1 << 20)))
    assert why == PAUSE
    assert read
    assert 0 < nbytes < 4 << 20
    assert packer.gone[3] is False


def test_it_says_whether_a_part_of_a_frame_has_gone(line):
    here, _ = line
    # Less than a frame.
    here.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 13)
    packer = megabytes(1 << 20)
    with pytest.raises(ZeroDivisionError):
        packer.send(here.fileno(), 0, 1 << 30, 5, 0, lambda: 1 / 0)
    assert packer.gone[3] is True
