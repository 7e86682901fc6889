"""Arrays by name and the caller's own state in one migration, over lines that break, and from senders that lie."""

import contextlib
import itertools
import json
import re
import socket
import struct

import numpy as np
import pytest

from dirtylog import DirtyBitmap, DirtyLog
from dirtylog.sinks.migrate import MigrationError, send
from dirtylog.sinks.migrate.payloads import HELLO, ROUND
from dirtylog.sinks.migrate.wire import MAX_LAYOUT, Channel, Kind

from .test_migrate import Destination

PAGE = 4096


class Arrays:
    """Arrays of many kinds, each with a log of its own pages in one page space."""

    def __init__(self):
        rng = np.random.default_rng(5)
        self.arrays = {
            "weights": rng.random((3, 700)),
            "tiny": np.array([7], np.uint8),
            "turned": np.asfortranarray(rng.integers(0, 99, (40, 33), np.int32)),
            "mixed": np.zeros(5, [("a", "<i4"), ("b", "S3")]),
            "empty pages": np.zeros(5 * PAGE, np.uint8),
        }
        log = DirtyLog()
        self.bitmaps, first = {}, 0
        for name, array in self.arrays.items():
            self.bitmaps[name] = DirtyBitmap(-(-array.nbytes // PAGE))
            log.attach(self.bitmaps[name], first_page=first)
            first += self.bitmaps[name].npages
        self.observer = log.observer("migration")

    def pause(self):
        self.arrays["tiny"][0] = 9
        self.bitmaps["tiny"].mark(0)
        self.arrays["turned"][:, 32] = 5
        self.bitmaps["turned"].mark_range(1, 1)

    def migrated(self, receiver=None, **options):
        here, there = socket.socketpair()
        for sock in (here, there):
            sock.settimeout(60)
        states = []
        destination = Destination(there, **{"state": states.append, **(receiver or {})})
        with here:
            try:
                outcome = send(here, self.arrays, self.observer, pause=self.pause, **options)
            except Exception as error:
                outcome = error
        destination.join()
        return outcome, destination.answer, states

    def check(self, copy):
        assert list(copy) == list(self.arrays)
        for name, array in self.arrays.items():
            assert (copy[name] == array).all(), name
            assert (copy[name].dtype, copy[name].shape) == (array.dtype, array.shape)
            assert copy[name].flags.f_contiguous == array.flags.f_contiguous


@pytest.mark.parametrize("compress", [False, True])
def test_arrays_arrive_by_name_with_their_types_shapes_order_and_a_state(compress):
    source = Arrays()
    state = {"registers": b"\x00\x01\xff", "step": 7, "notes": ["a", None, 1.5]}
    _, copy, states = source.migrated(state=state, compress=compress)
    source.check(copy)
    assert states == [state]


def test_a_state_that_only_the_pause_knows_is_asked_for_after_it():
    source = Arrays()
    _, copy, states = source.migrated(state=lambda: {"tiny": int(source.arrays["tiny"][0])})
    source.check(copy)
    assert states == [{"tiny": 9}]


def test_arrays_arrive_in_the_callers_own():
    source = Arrays()
    mine = {name: np.full_like(array, 3) for name, array in reversed(source.arrays.items())}
    _, copy, states = source.migrated({"out": mine})
    assert copy is mine
    source.check({name: mine[name] for name in source.arrays})
    assert states == [None]


def test_one_piece_of_memory_can_be_made_for_all_arrays():
    source = Arrays()
    made = []
    _, copy, _ = source.migrated({"out": lambda nbytes: made.append(bytearray(nbytes)) or made[0]})
    source.check(copy)
    assert np.shares_memory(copy["weights"], np.frombuffer(made[0], np.uint8))


def test_a_large_state_goes_in_parts_and_one_too_large_is_refused_before_anything_is_sent():
    source = Arrays()
    state = {"blob": bytes(1 << 20)}
    _, _, states = source.migrated(state=state)
    assert states == [state]
    outcome, answer, _ = source.migrated(state={"blob": bytes(12_582_913)})
    assert isinstance(outcome, ValueError)
    assert "at most 16777216 are kept" in str(outcome)
    assert "ended in the middle" in str(answer)


def test_a_state_that_cannot_be_sent_after_the_pause_lets_the_source_go_on():
    source = Arrays()
    resumed = []
    outcome, answer, states = source.migrated(state=lambda: {"not JSON": object()}, resume=lambda: resumed.append(1))
    assert isinstance(outcome, TypeError)
    assert "the source gave up" in str(answer)
    assert (resumed, states) == ([1], [])


def test_a_receiver_that_cannot_use_the_state_says_so_before_the_copy_may_run():
    source = Arrays()

    def state(state):
        raise RuntimeError("these registers are of another CPU")

    outcome, answer, _ = source.migrated({"state": state}, state=[1])
    assert "these registers are of another CPU" in str(outcome)
    assert isinstance(answer, RuntimeError)


@pytest.mark.parametrize(
    ("out", "message"),
    [
        (bytearray(10 * PAGE), "arrays by name; out is the other"),
        ({"weights": np.zeros((3, 700))}, "out has"),
        ("short", r"out\['tiny'\] has 2"),
    ],
)
def test_memory_that_the_arrays_do_not_fit_is_refused(out, message):
    source = Arrays()
    if out == "short":
        out = {name: np.zeros(array.nbytes + (name == "tiny"), np.uint8) for name, array in source.arrays.items()}
    outcome, answer, _ = source.migrated({"out": out})
    assert isinstance(answer, MigrationError)
    assert re.search(message, str(answer))
    assert isinstance(outcome, MigrationError)


def test_pages_that_are_not_those_of_the_arrays_are_refused():
    log = DirtyLog()
    log.attach(DirtyBitmap(3))
    here, there = socket.socketpair()
    with here, there, pytest.raises(ValueError, match="the observer has 3 pages of 4096 bytes; the memory has 2"):
        send(here, {"a": np.zeros(9, np.uint8), "b": np.zeros(9, np.uint8)}, log.observer("migration"))


# ---- senders that lie ------------------------------------------------------------------------------------------------

ROWS = [["a", "<f8", [2, 3], "C", 0, 48], ["b", "|u1", [9], "C", PAGE, 9]]


def changed(*path, to):
    rows = json.loads(json.dumps(ROWS))
    place = rows
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = to
    return json.dumps(rows).encode()


def refusal(*frames, nbytes=PAGE + 9, announced=None, limit=1 << 20):
    """Say what a receiver answers to frames, and what it allocated for the memory."""
    here, there = socket.socketpair()
    made = []
    for sock in (here, there):
        sock.settimeout(60)
    destination = Destination(there, out=lambda size: made.append(size) or bytearray(size), limit=limit)
    with here:
        channel = Channel(here)
        text = frames[0] if frames else b""
        announced = len(text) if announced is None else announced
        # It may have hung up by then.
        with contextlib.suppress(OSError):
            channel.send(Kind.HELLO, HELLO.pack(bytes(16), nbytes, PAGE, 0, 0, 0, announced))
            for kind, payload in [(Kind.LAYOUT, text), *frames[1:]]:
                channel.send(kind, payload)
            here.shutdown(socket.SHUT_WR)
        destination.join()
    assert isinstance(destination.answer, MigrationError), destination.answer
    return str(destination.answer), made


def test_the_liar_can_tell_the_truth_about_arrays():
    answer, made = refusal(changed(0, 0, to="a"))
    assert "ended in the middle" in answer
    assert made == [PAGE + 9]


@pytest.mark.parametrize(
    "text",
    [
        b"", b"[]", b"{}", b"nonsense", b"[" * 100_000, b"[" + b"[]," * 300_000 + b"[]]", b"[1e999]", b"\xff",
        changed(0, 0, to=7), changed(1, 0, to="a"), changed(0, 1, to="O"), changed(0, 1, to="<f4"),
        changed(0, 1, to="no type"), changed(0, 1, to=[["x", "|O"]]), changed(0, 2, to=[3, 3]),
        changed(0, 2, to=[-2, -3]), changed(0, 2, to=[1 << 60, 1 << 60]), changed(0, 2, to=[1] * 65),
        changed(0, 3, to="D"), changed(0, 3, to=[0, 0]), changed(1, 4, to=0), changed(1, 4, to=PAGE + 1),
        changed(1, 5, to=10), changed(1, 5, to=True), changed(0, to=[]),
    ],
)  # fmt: skip
def test_arrays_that_cannot_be_are_refused_before_there_is_memory_for_them(text):
    if len(text) > MAX_LAYOUT:
        text = text[: MAX_LAYOUT - 1] + b"]"
    _, made = refusal(text, announced=max(len(text), 1))
    assert made == []


def test_a_layout_longer_than_allowed_or_than_announced_is_refused():
    assert "announces a layout of" in refusal(b"", announced=MAX_LAYOUT + 1)[0]
    assert "5 were announced" in refusal(changed(0, 0, to="a"), announced=5)[0]
    assert "the limit is 100" in refusal(changed(0, 0, to="a"), limit=100)[0]


def zeros(*extents):
    return Kind.ZEROS, b"".join(struct.pack("<qq", *extent) for extent in extents)


ROUND_1 = (Kind.ROUND, ROUND.pack(1))


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        ([(Kind.STATE, b"1")], "before the first round"),
        ([ROUND_1, (Kind.STATE, b"")], "a part of the state is empty"),
        ([ROUND_1, (Kind.STATE, b"1"), zeros((0, PAGE))], "pages come after the state"),
        ([ROUND_1, *[(Kind.STATE, bytes(1 << 20))] * 17], "more than 16777216 bytes"),
    ],
)
def test_a_state_out_of_its_bounds_is_refused(frames, message):
    assert message in refusal(changed(0, 0, to="a"), *frames)[0]


@pytest.mark.parametrize("text", [b"nonsense", b"[" * 5000, b'{"$bytes":"?"}', b"[" + b"[]," * 300_000 + b"0]"])
def test_a_state_that_is_none_is_refused_before_the_copy_is_complete(text):
    here, there = socket.socketpair()
    for sock in (here, there):
        sock.settimeout(60)
    arrived = []
    destination = Destination(there, arrived=arrived.append, state=arrived.append)
    with here:
        channel = Channel(here)
        channel.send(Kind.HELLO, HELLO.pack(bytes(16), PAGE, PAGE, 0, 0, 0, 0))
        channel.send(*ROUND_1)
        channel.send(*zeros((0, PAGE)))
        channel.send(Kind.STATE, text)
        channel.send(Kind.END, channel.digest())
        destination.join()
    assert "the state cannot be used" in str(destination.answer)
    assert arrived == []


# ---- lines that break ------------------------------------------------------------------------------------------------


def test_arrays_and_a_state_survive_a_line_that_is_cut_anywhere():
    for cut in itertools.chain(range(0, 700, 41), range(700, 60_000, 4999)):
        source = Arrays()
        lines = [socket.socketpair() for _ in range(2)]
        for sock in itertools.chain(*lines):
            sock.settimeout(60)
        short, there = lines[0]
        with short, Cut(fileno=short.detach()) as here:
            here.settimeout(60)
            here.budget = cut
            states = []
            destination = Destination(there, state=states.append, reconnect=lambda breaks, to=lines[1][1]: to)
            result = send(
                here, source.arrays, source.observer, pause=source.pause, reconnect=lambda breaks, to=lines[1][0]: to,
                state={"large": bytes(20_000)},
            )  # fmt: skip
            destination.join()
        for sock in itertools.chain(*lines):
            sock.close()
        source.check(destination.answer)
        assert states == [{"large": bytes(20_000)}]
        assert result.breaks == (1 if cut < result.wire_bytes else 0), cut


class Cut(socket.socket):
    """A socket that carries so many bytes and then breaks."""

    budget = 0

    def send(self, data):
        part = data[: self.budget]
        super().sendall(part)
        self.budget -= len(data)
        if len(part) < len(data):
            self.shutdown(socket.SHUT_RDWR)
            raise ConnectionResetError(104, "cut")
        return len(data)
