"""Pages that go again: only what changed goes, out of a bounded cache, whatever breaks; and from senders that lie."""

import itertools
import queue
import random
import socket
import struct

import numpy as np
import pytest
import zstandard

from dirtylog.sinks.migrate import MigrationError, Policy, receive, send
from dirtylog.sinks.migrate import filling as receiving
from dirtylog.sinks.migrate import lane as sending
from dirtylog.sinks.migrate.payloads import HELLO, PAGES, ROUND
from dirtylog.sinks.migrate.wire import Channel, Kind

from .test_migrate import NPAGES, Destination, Source, migrated, ticks
from .test_migrate_regions import Cut

PAGE = 4096


class Scribbler(Source):
    """A source that changes 64 bytes of every third page in each round; at first half of them are zero."""

    def __init__(self, seed=0, npages=NPAGES, page_size=PAGE, width=64):
        super().__init__(seed, page_size, npages=npages)
        self.width = width
        self.workload = self.scribble

    def scribble(self, number):
        for page in range(0, self.bitmap.npages, 3):
            start = page * self.page_size + int(self.rng.integers(0, self.page_size - self.width))
            self.memory[start : start + self.width] = self.rng.integers(0, 256, self.width, np.uint8)
            self.bitmap.mark(page)

    def pause(self):
        self.paused = True


ROUNDS = {"clock": ticks(), "policy": Policy(downtime=0.0, max_rounds=5, force=True)}


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("page_size", [512, 4096, 1 << 16])
def test_of_a_page_that_changed_a_little_only_that_goes(page_size, compress):
    source = Scribbler(1, 30 if page_size > PAGE else 120, page_size)
    result, memory = migrated(source, compress=compress, **ROUNDS)
    assert (memory == source.memory).all()
    # The page that was zero goes whole once, and what is larger than a frame is compared in parts.
    for each in result.rounds[1:]:
        assert each.wire_bytes < (each.pages - each.delta_pages - each.zero_pages) * page_size + each.pages * 110 + 500
    assert all(each.delta_pages == each.pages for each in result.rounds[2:])


def test_a_cache_takes_no_more_pages_than_it_may_and_none_is_none():
    sizes = []
    for cache in (0, 100, 10 * PAGE, 1 << 26):
        source = Scribbler(2)
        result, memory = migrated(source, delta_cache=cache, **ROUNDS)
        assert (memory == source.memory).all()
        sizes.append(sum(each.delta_pages for each in result.rounds))
    # 200 pages in each of five rounds.
    assert sizes[0] == sizes[1] == 0
    # Ten of them keep their places, from the third round on.
    assert sizes[2] == 40
    assert sizes[3] > 900
    assert "delta_cache is -1" in str(migrated(source, delta_cache=-1)[0])


def test_what_changed_by_more_than_three_quarters_goes_whole():
    source = Scribbler(3, 60, width=3500)
    result, memory = migrated(source, **ROUNDS)
    assert (memory == source.memory).all()
    assert sum(each.delta_pages for each in result.rounds) == 0


@pytest.mark.parametrize("cache", [20 * PAGE, 1 << 26])
def test_lines_that_are_cut_anywhere_never_leave_a_copy_that_is_not_the_others(cache, monkeypatch):
    # Several frames of each window.
    monkeypatch.setattr(sending, "IN_A_FRAME", 4 * PAGE)
    rng = random.Random(4)
    for _ in range(12):
        source = Scribbler(rng.random().as_integer_ratio()[0] % 1000, 60)
        cuts = iter([rng.randrange(60_000) for _ in range(6)])
        waiting = queue.Queue()

        def connect(breaks, cuts=cuts, waiting=waiting):
            here, there = socket.socketpair()
            for sock in (here, there):
                sock.settimeout(15)
            waiting.put(there)
            cut = Cut(fileno=here.detach())
            cut.settimeout(15)
            cut.budget = next(cuts, 1 << 40)
            return cut

        def accept(breaks, waiting=waiting):
            return waiting.get(timeout=10)

        with connect(0) as here:
            destination = Destination(accept(0), reconnect=accept)
            result = send(
                here, source.memory, source.observer, pause=source.pause, reconnect=connect, delta_cache=cache, **ROUNDS
            )
            destination.join()
        assert result.breaks > 2
        assert sum(each.delta_pages for each in result.rounds) > 0
        assert (destination.answer == source.memory).all()


def test_zeros_for_memory_that_is_new_touch_nothing_of_it(monkeypatch):
    takers = []
    make = receiving.Taker
    monkeypatch.setattr(receiving, "Taker", lambda *a: takers.append(make(*a)) or takers[-1])
    source = Source(5)
    source.workload = lambda number: source.bitmap.mark_range(100, 100)

    def pause():
        source.memory[120 * PAGE : 130 * PAGE] = 0
        source.memory[140 * PAGE : 141 * PAGE] = 0
        source.paused = True

    source.pause = pause
    _, memory = migrated(source, clock=ticks(), policy=Policy(downtime=0.0, max_rounds=1, force=True))
    assert (memory == source.memory).all()
    # What had come with something in it, and became zero; 150 pages were zero all the time.
    assert takers.pop().cleared == 11
    _, memory = migrated(source, {"out": np.full(source.memory.nbytes, 9, np.uint8)})
    assert (memory == source.memory).all()
    assert takers.pop().cleared == 161


# ---- senders that lie ------------------------------------------------------------------------------------------------


def deltas(extents, data, codec=0, count=None):
    table = struct.pack(f"<{2 * len(extents)}q", *itertools.chain(*extents))
    return Kind.DELTAS, PAGES.pack(len(extents) if count is None else count, codec) + table + data


UNCHANGED = b"\x80\x20\x00"
BOMB = zstandard.ZstdCompressor().compress(bytes(1 << 26))


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (deltas([(0, PAGE)], b""), "not the deltas of these pages"),
        (deltas([(0, PAGE)], UNCHANGED * 2), "not the deltas of these pages"),
        (deltas([(0, 2 * PAGE)], UNCHANGED), "not the deltas of these pages"),
        (deltas([(0, PAGE)], b"\x81\x20\x00"), "not the deltas of these pages"),
        (deltas([(0, PAGE)], b"\x00\x02zz" + bytes(2) * 50), "not the deltas of these pages"),
        (deltas([(2 * PAGE, PAGE)], UNCHANGED), "pages that never came"),
        (deltas([(PAGE, 2 * PAGE)], UNCHANGED * 2), "pages that never came"),
        (deltas([(1, PAGE)], UNCHANGED), "not of whole pages"),
        (deltas([(4 * PAGE, PAGE)], UNCHANGED), "outside of the memory"),
        (deltas([(0, PAGE), (0, PAGE)], UNCHANGED * 2), "overlap"),
        (deltas([(0, PAGE)], UNCHANGED, codec=3), "codec 3"),
        (deltas([(0, PAGE)], UNCHANGED, count=1 << 31), "extents, codec"),
        (deltas([(0, PAGE)], BOMB, codec=1), "more than the 4096 bytes"),
        (deltas([(0, PAGE)], b"nonsense", codec=1), "cannot be unpacked"),
        ((Kind.DELTAS, b""), "a frame of pages has 0 bytes"),
    ],
)
@pytest.mark.parametrize("arrays", [False, True])
def test_what_is_no_delta_is_refused_and_writes_nothing(frame, message, arrays):
    here, there = socket.socketpair()
    out = (
        {"a": np.full(PAGE, 7, np.uint8), "b": np.full(3 * PAGE, 7, np.uint8)} if arrays else np.full(4 * PAGE, 7, "u1")
    )
    layout = b'[["a","|u1",[4096],"C",0,4096],["b","|u1",[12288],"C",4096,12288]]' if arrays else b""
    with here, there:
        channel = Channel(here)
        channel.send(Kind.HELLO, HELLO.pack(bytes(16), 4 * PAGE, PAGE, 1, 0, 0, len(layout)))
        if layout:
            channel.send(Kind.LAYOUT, layout)
        channel.send(Kind.ROUND, ROUND.pack(1))
        channel.send(Kind.PAGES, PAGES.pack(1, 0), struct.pack("<2q", 0, 2 * PAGE), bytes([8]) * 2 * PAGE)
        channel.send(Kind.ROUND, ROUND.pack(2))
        channel.send(*frame)
        here.shutdown(socket.SHUT_WR)
        with pytest.raises(MigrationError, match=message):
            receive(there, out=out)
    whole = np.concatenate(list(out.values())) if arrays else out
    assert (whole[: 2 * PAGE] == 8).all()
    assert (whole[2 * PAGE :] == 7).all()


def test_a_delta_behind_the_end_of_an_array_goes_nowhere():
    here, there = socket.socketpair()
    memory = bytearray(2 * PAGE)
    out = {"a": np.frombuffer(memory, np.uint8)[:10], "b": np.frombuffer(memory, np.uint8)[PAGE:]}
    layout = b'[["a","|u1",[10],"C",0,10],["b","|u1",[4096],"C",4096,4096]]'
    with here, there:
        channel = Channel(here)
        channel.send(Kind.HELLO, HELLO.pack(bytes(16), 2 * PAGE, PAGE, 0, 0, 0, len(layout)))
        channel.send(Kind.LAYOUT, layout)
        channel.send(Kind.ROUND, ROUND.pack(1))
        channel.send(Kind.PAGES, PAGES.pack(1, 0), struct.pack("<2q", 0, 2 * PAGE), bytes([8]) * 2 * PAGE)
        channel.send(Kind.ROUND, ROUND.pack(2))
        channel.send(*deltas([(0, PAGE)], b"\x02\x90\x01" + b"z" * 144 + b"\xee\x1e\x00"))
        channel.send(Kind.END, channel.digest())
        channel.send(Kind.RUN, bytes(16))
        receive(there, out=out)
    assert bytes(out["a"]) == b"\x08\x08zzzzzzzz"
    assert memory[10:PAGE] == bytes(PAGE - 10)
