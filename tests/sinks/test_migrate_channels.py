"""A migration over several channels: a page over the same one each time, and nothing is done before all of them are."""

import contextlib
import gc
import mmap
import queue
import random
import re
import socket
import struct
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dirtylog import DirtyBitmap, DirtyLog
from dirtylog.sinks.migrate import Control, Listener, MigrationError, Policy, connect, others, receive, send
from dirtylog.sinks.migrate._frames import Taker
from dirtylog.sinks.migrate.lane import Lane
from dirtylog.sinks.migrate.payloads import HELLO, JOIN, PAGES, READY, ROUND
from dirtylog.sinks.migrate.share import Share
from dirtylog.sinks.migrate.wire import Channel, Kind, WireError

from .test_migrate import Destination, Source, ticks
from .test_migrate_control import Clock
from .test_migrate_deltas import Scribbler
from .test_migrate_door import certificate
from .test_migrate_regions import Cut

PAGE = 4096
NPAGES = 6 * 256 + 3


class Hub:
    """Makes connected pairs: one end for who asks, the other for who waits."""

    def __init__(self, budgets=()):
        self.waiting, self.made, self.budgets = queue.Queue(), [], iter(budgets)

    def connect(self, breaks=0):
        here, there = socket.socketpair()
        for sock in (here, there):
            sock.settimeout(15)
        budget = next(self.budgets, None)
        if budget is not None:
            here = Cut(fileno=here.detach())
            here.settimeout(15)
            here.budget = budget
        self.made.append(here)
        self.waiting.put(there)
        return here

    def accept(self, breaks=0):
        sock = self.waiting.get(timeout=30)
        if sock is None:
            raise TimeoutError("nobody comes any more")
        return sock


ROUNDS = {"policy": Policy(downtime=0.0, max_rounds=3, force=True)}


def migrated(source, channels, hub=None, receiver=None, **options):
    hub = hub or Hub()
    with hub.connect() as here:
        destination = Destination(hub.accept(), another=hub.accept, **(receiver or {}))
        try:
            outcome = send(
                here,
                source.memory,
                source.observer,
                pause=source.pause,
                resume=source.resume,
                channels=channels,
                another=hub.connect,
                **options,
            )
        except Exception as error:
            outcome = error
        hub.waiting.put(None)
        destination.join()
    return outcome, destination.answer


@pytest.mark.thread_unsafe(reason="it disables the garbage collector")
@pytest.mark.parametrize("cut", [(), (None, 300_000), (None, None, 300_000), (300_000,)])
@pytest.mark.parametrize("channels", [1, 3])
def test_memory_is_its_owners_when_the_calls_have_returned(channels, cut):
    """And not when the garbage collector comes, whichever channel has broken meanwhile."""
    source, hub = Scribbler(7, NPAGES), Hub(cut)
    sent, out = (mmap.mmap(-1, NPAGES * PAGE) for _ in range(2))
    sent[:] = source.memory.tobytes()
    source.memory = np.frombuffer(sent, np.uint8)
    gc.disable()
    try:
        receiver = {"out": out, "reconnect": hub.accept}
        result, memory = migrated(source, channels, hub, receiver, reconnect=hub.connect, **ROUNDS)
        assert memory is out
        assert result.breaks == (0 < len(cut) <= channels)
        out.close()
        del source.memory
        sent.close()
    finally:
        gc.enable()


@pytest.mark.thread_unsafe(reason="it disables the garbage collector")
@pytest.mark.parametrize(("channels", "cut"), [(1, (300_000,)), (3, (300_000,)), (3, (None, 300_000))])
def test_memory_is_its_owners_when_the_calls_have_failed(channels, cut):
    source, hub, failed = Scribbler(7, NPAGES), Hub(cut), []
    sent, out = (mmap.mmap(-1, NPAGES * PAGE) for _ in range(2))
    sent[:] = source.memory.tobytes()

    def fail(end, *args, **options):
        try:
            end(*args, **options)
        except MigrationError:
            failed.append(end)

    gc.disable()
    try:
        with hub.connect() as here, hub.accept() as there:
            more = {"out": out, "another": hub.accept}
            copy = threading.Thread(target=fail, args=(receive, there), kwargs=more)
            copy.start()
            fail(send, here, sent, source.observer, channels=channels, another=hub.connect, **ROUNDS)
            hub.waiting.put(None)
            copy.join()
        assert len(failed) == 2
        out.close()
        sent.close()
    finally:
        gc.enable()


@pytest.mark.thread_unsafe(reason="it disables the garbage collector")
@pytest.mark.parametrize("call", ["progress", "start"])
@pytest.mark.parametrize("channels", [1, 3])
def test_memory_is_its_owners_when_what_the_receiver_calls_has_raised(channels, call):
    source, hub, failed = Scribbler(7, NPAGES), Hub(), []
    out = mmap.mmap(-1, NPAGES * PAGE)

    def mistaken(*_):
        raise ZeroDivisionError

    def fail(end, *args, **options):
        try:
            end(*args, **options)
        except (MigrationError, ZeroDivisionError) as error:
            failed.append(type(error))

    gc.disable()
    try:
        with hub.connect() as here, hub.accept() as there:
            more = {"out": out, "another": hub.accept, call: mistaken}
            copy = threading.Thread(target=fail, args=(receive, there), kwargs=more)
            copy.start()
            fail(send, here, source.memory, source.observer, channels=channels, another=hub.connect, **ROUNDS)
            hub.waiting.put(None)
            copy.join()
        assert ZeroDivisionError in failed
        out.close()
    finally:
        gc.enable()


@pytest.mark.parametrize(("channels", "compress", "cache"), [(2, False, 0), (5, True, 3 << 20), (3, False, 1 << 26)])
def test_memory_arrives_over_several_channels(channels, compress, cache):
    source = Scribbler(channels, NPAGES)
    hub = Hub()
    options = {"compress": compress, "delta_cache": cache, "clock": ticks()}
    result, memory = migrated(source, channels, hub, **options, **ROUNDS)
    assert (memory == source.memory).all()
    assert len(hub.made) == channels
    assert all(sock.fileno() < 0 for sock in hub.made)
    assert result.rounds[0].pages == NPAGES
    deltas = sum(each.delta_pages for each in result.rounds[1:])
    # What fits is kept, whichever channel it goes over.
    assert deltas == 0 if not cache else deltas > 200
    if cache > source.memory.nbytes:
        assert all(each.delta_pages == each.pages for each in result.rounds[2:])


def test_arrays_and_the_state_arrive_over_several_channels():
    rng = np.random.default_rng(0)
    arrays = {"a": rng.random(200_000), "b": rng.integers(0, 9, 17, np.uint8), "c": rng.random((700, 999)).T}
    npages = sum(-(-each.nbytes // PAGE) for each in arrays.values())
    bitmap = DirtyBitmap(npages)
    log = DirtyLog()
    log.attach(bitmap)
    hub, states = Hub(), []
    with hub.connect() as here:
        destination = Destination(hub.accept(), another=hub.accept, state=states.append)
        send(here, arrays, log.observer("m"), channels=3, another=hub.connect, state={"rip": 7})
        destination.join()
    assert states == [{"rip": 7}]
    assert all((destination.answer[name] == each).all() for name, each in arrays.items())


def test_it_arrives_over_tls_from_one_listener():
    source = Source(3, npages=NPAGES)
    with Listener(("127.0.0.1", 0), certificate("receiver"), timeout=30) as listener:
        answers = []

        def run():
            with listener.accept(30) as sock:
                answers.append(receive(sock, another=lambda: listener.accept(30)))

        thread = threading.Thread(target=run)
        thread.start()

        def another(breaks=0):
            return connect(listener.address, certificate("sender"), timeout=30)

        with another() as sock:
            send(sock, source.memory, source.observer, channels=3, another=another)
        thread.join()
    assert (answers[0] == source.memory).all()


@pytest.mark.parametrize("seed", range(2))
def test_channels_that_are_cut_anywhere_lose_nothing(seed):
    rng = random.Random(seed)
    source = Scribbler(seed, NPAGES)
    # Three channels for each line; the first lines break soon, whichever of their channels does.
    hub = Hub([rng.randrange(1_000_000) if each < 3 or rng.random() < 0.5 else None for each in range(15)])
    receiver = {"reconnect": hub.accept}
    again = {"reconnect": hub.connect, "clock": ticks()}
    result, memory = migrated(source, 3, hub, receiver, **again, **ROUNDS)
    assert not isinstance(result, Exception), result
    assert result.breaks > 0
    assert (memory == source.memory).all()
    assert not source.pending()


@pytest.mark.parametrize("at", [0, 100, 900_000])
@pytest.mark.parametrize("channel", [0, 1, 2])
def test_a_channel_that_is_cut_and_not_replaced_leaves_the_source_as_it_was(channel, at):
    source = Source(7, npages=NPAGES)
    hub = Hub([at if each == channel else None for each in range(3)])
    outcome, answer = migrated(source, 3, hub)
    assert isinstance(outcome, MigrationError)
    assert not outcome.uncertain
    assert isinstance(answer, MigrationError)
    assert not answer.uncertain
    assert not source.paused
    assert all(sock.fileno() < 0 for sock in hub.made)
    if outcome.rounds or at > 1000:
        assert source.pending().count == NPAGES


@pytest.mark.parametrize("channel", [0, 1, 2])
def test_what_one_channel_raises_ends_it_and_is_no_broken_line(channel, monkeypatch):
    whole = Lane.round

    def no_room(lane, *args):
        if lane.share.index == channel:
            raise MemoryError("no room for a window")
        return whole(lane, *args)

    monkeypatch.setattr(Lane, "round", no_room)
    source, hub = Source(7, npages=NPAGES), Hub()
    again = []
    outcome, answer = migrated(source, 3, hub, reconnect=lambda breaks: again.append(breaks) or hub.connect())
    assert not again
    causes = [outcome, outcome.__cause__, outcome.__context__]
    assert "no room for a window" in [str(cause) for cause in causes]
    assert isinstance(answer, MigrationError)
    assert not source.paused


def test_a_sender_that_gives_up_is_no_broken_line_whichever_channel_ends_first(monkeypatch):
    whole = others.Others.hang_up

    def hang_up(beside, channel):
        # The others have seen their ends before it is asked what was wrong with them.
        beside.wait()
        return whole(beside, channel)

    monkeypatch.setattr(others.Others, "hang_up", hang_up)
    source, again = Source(7, npages=NPAGES), []
    source.pause = lambda: 1 / 0
    outcome, answer = migrated(source, 3, receiver={"reconnect": again.append})
    assert isinstance(outcome, ZeroDivisionError)
    assert isinstance(answer, MigrationError)
    assert not again


def test_it_is_limited_and_cancelled_over_all_channels():
    source = Source(8, npages=NPAGES)
    clock = Clock()

    def sleep(seconds):
        clock.sleep(seconds)
        if control.wire_bytes > 1 << 20:
            control.cancel()

    control = Control(1 << 20, clock=clock, sleep=sleep)
    outcome, answer = migrated(source, 3, control=control)
    assert "was cancelled in round 1" in str(outcome)
    assert isinstance(answer, MigrationError)
    # What went last of each channel need not be waited for.
    assert control.wire_bytes <= clock.now * (1 << 20) + (4 << 18)
    assert source.pending().count == NPAGES


def test_numbers_of_channels_that_cannot_be_are_refused():
    source = Scribbler(9, 10)
    for channels, options in ((0, {}), (65, {"another": socket.socket}), (2, {})):
        with pytest.raises(ValueError, match=f"channels is {channels}; it must be 1 to 64"):
            send(None, source.memory, source.observer, channels=channels, **options)
    hub = Hub()
    with hub.connect() as here:
        destination = Destination(hub.accept())
        with pytest.raises(MigrationError, match="comes with 2 channels; this side takes one: pass another="):
            send(here, source.memory, source.observer, channels=2, another=hub.connect)
        destination.join()


# ---- senders that lie ------------------------------------------------------------------------------------------------


class Liar:
    """A sender of two channels that says what it is told to."""

    def __init__(self, reconnect=False):
        self.hub, self.nbytes = Hub(), 4 << 20
        here = self.hub.connect()
        options = {"reconnect": self.hub.accept} if reconnect else {}
        self.destination = Destination(self.hub.accept(), another=self.hub.accept, **options)
        self.hello(here)

    def hello(self, sock=None):
        self.first = Channel(sock or self.hub.connect())
        self.first.send(Kind.HELLO, HELLO.pack(bytes(16), self.nbytes, PAGE, 0, 2, 0, 0))
        _, answer = self.first.receive(Kind.READY, counted=False)
        self.nonce = READY.unpack(answer)[3]

    def join(self, nonce=None, session=bytes(16), index=1):
        channel = Channel(self.hub.connect())
        channel.send(Kind.JOIN, JOIN.pack(session, nonce or self.nonce, index))
        channel.receive(Kind.READY, counted=False)
        return channel

    def zeros(self, channel, *stripes):
        channel.send(Kind.ROUND, ROUND.pack(1))
        for stripe in stripes:
            channel.send(Kind.ZEROS, struct.pack("<2q", stripe << 20, 1 << 20))

    def whole(self, second):
        self.zeros(self.first, 0, 2)
        self.zeros(second, 1, 3)
        for channel in (self.first, second):
            channel.send(Kind.END, channel.digest())
        self.first.receive(Kind.HAVE, counted=False)
        self.first.send(Kind.RUN, bytes(16))

    def end(self):
        self.destination.join()
        for sock in self.hub.made:
            sock.close()
        return self.destination.answer


def test_the_liar_can_tell_the_truth():
    liar = Liar()
    liar.whole(liar.join())
    assert not liar.end().any()


@pytest.mark.parametrize("what", ["session", "nonce", "index", "first"])
def test_a_connection_that_is_not_of_this_line_is_hung_up_on_and_the_right_one_is_let_in(what):
    liar = Liar()
    wrong = {"session": b"x" * 16, "nonce": b"x" * 16, "index": 2, "first": 0}[what]
    with pytest.raises(WireError, match="not a channel of this line"):
        liar.join(**{"index" if what == "first" else what: wrong})
    second = liar.join()
    liar.zeros(second, 0)
    assert "channel that it does not belong to" in str(liar.end())


def test_what_ends_on_one_channel_is_not_the_end_of_all():
    liar = Liar()
    second = liar.join()
    liar.zeros(liar.first, 0, 2)
    liar.zeros(second, 1)
    liar.first.send(Kind.END, liar.first.digest())
    # The rest never comes: nothing is complete before that.
    liar.hub.made[1].close()
    answer = liar.end()
    assert isinstance(answer, MigrationError)
    assert not answer.uncertain
    assert "the connection ended in the middle" in str(answer)


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        ((Kind.STATE, b"{}"), "a STATE frame where"),
        ((Kind.END, bytes(32)), "digest differs"),
        ((Kind.ZEROS, struct.pack("<2q", 1 << 20, 2 << 20)), "at most|outside|channel"),
        ((Kind.PAGES, PAGES.pack(1, 0) + struct.pack("<2q", 2 << 20, PAGE) + bytes(PAGE)), "channel that it does not"),
        ((Kind.ZEROS, struct.pack("<2q", (2 << 20) - PAGE, 2 * PAGE)), "channel that it does not"),
        ((Kind.ROUND, ROUND.pack(3)), "round 2 was due"),
        ((Kind.REFUSED, b"no room"), "the peer refused: no room"),
    ],
)
def test_a_second_channel_that_lies_ends_all_of_it_with_its_reason(frame, message):
    liar = Liar()
    second = liar.join()
    liar.zeros(liar.first, 0)
    second.send(Kind.ROUND, ROUND.pack(1))
    second.send(*frame)
    answer = liar.end()
    assert isinstance(answer, MigrationError)
    assert re.search(message, str(answer))


# ---- lines that are replaced while they are made ---------------------------------------------------------------------


def test_a_line_that_breaks_while_its_channels_join_is_replaced():
    source, hub, failures = Source(7, npages=NPAGES), Hub(), [1, 0]

    def another():
        if failures and failures.pop():
            raise ConnectionResetError(104, "the network was down")
        return hub.connect()

    with hub.connect() as here:
        destination = Destination(hub.accept(), another=hub.accept, reconnect=hub.accept)
        options = {"pause": source.pause, "channels": 3, "another": another, "reconnect": hub.connect}
        result = send(here, source.memory, source.observer, **options)
        destination.join()
    assert result.breaks == 1
    assert (destination.answer == source.memory).all()
    assert all(sock.fileno() < 0 for sock in hub.made)


def test_a_sender_that_comes_again_is_no_channel_where_no_line_can_be_replaced():
    liar = Liar()
    again = Channel(liar.hub.connect())
    again.send(Kind.HELLO, HELLO.pack(bytes(16), liar.nbytes, PAGE, 0, 2, 0, 0))
    with pytest.raises(WireError, match="not a channel of this line"):
        again.receive(Kind.READY, counted=False)
    second = liar.join()
    for channel in (liar.first, second):
        channel.cut()
    assert isinstance(liar.end(), MigrationError)


def test_a_sender_of_another_session_is_hung_up_on_while_channels_join():
    liar = Liar(reconnect=True)
    stranger = Channel(liar.hub.connect())
    stranger.send(Kind.HELLO, HELLO.pack(b"x" * 16, liar.nbytes, PAGE, 0, 2, 0, 0))
    with pytest.raises(WireError, match="not a channel of this line"):
        stranger.receive(Kind.READY, counted=False)
    liar.whole(liar.join())
    assert not liar.end().any()


def test_a_channel_of_an_older_line_that_comes_late_does_not_end_the_migration():
    liar = Liar(reconnect=True)
    second = liar.join()
    late = Channel(liar.hub.connect())
    late.send(Kind.JOIN, JOIN.pack(bytes(16), liar.nonce, 1))
    for channel in (liar.first, second):
        channel.cut()
    with pytest.raises(WireError, match="it is a channel of a line that broke"):
        late.receive(Kind.READY, counted=False)
    liar.hello()
    liar.whole(liar.join())
    assert not liar.end().any()


# ---- channels that rest while others are busy ------------------------------------------------------------------------


def two_channels(patience):
    """Return two channels that are one line, and for each the channel at the other end."""
    ends, others = zip(*(map(Channel, socket.socketpair()) for _ in range(2)), strict=True)
    for channel in (*ends, *others):
        channel.sock.settimeout(patience)
    busy = ends[0]
    return busy, busy.beside(ends[1].sock), others


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("in_c", [False, True])
def test_a_channel_that_rests_is_given_up_when_all_of_its_line_do(in_c, alone):
    # Longer than what happens between two looks takes beside other work, or the busy one is late by itself.
    busy, idle, (to_busy, to_idle) = two_channels(0.3)
    waits = []

    def look():
        # Its time is over. Of the other one a frame has come meanwhile, three times.
        waits.append(None)
        if alone:
            return
        to_busy.send(Kind.ROUND, ROUND.pack(1))
        busy.receive(Kind.ROUND)
        if len(waits) == 3:
            to_idle.send(Kind.ROUND, ROUND.pack(7))

    idle.look = look
    taker = Taker([(0, bytearray(PAGE))], PAGE, PAGE, np.zeros(1, np.uint64))
    with contextlib.ExitStack() as stack:
        for channel in (busy, idle, to_busy, to_idle):
            stack.enter_context(channel.sock)
        if alone:
            stack.enter_context(pytest.raises(TimeoutError, match="timed out waiting for a frame"))
        while in_c and idle.take_pages(taker, 1 << 20):
            pass
        assert idle.receive(Kind.ROUND)[1] == ROUND.pack(7)
    assert len(waits) >= (1 if alone else 3)


def test_a_frame_that_has_begun_is_not_waited_for_because_others_are_busy():
    busy, idle, (to_busy, to_idle) = two_channels(0.02)
    to_idle.sock.sendall(b"dlog")

    def look():
        to_busy.send(Kind.ROUND, ROUND.pack(1))
        busy.receive(Kind.ROUND)

    idle.look = look
    with busy.sock, idle.sock, to_busy.sock, to_idle.sock, pytest.raises(TimeoutError, match="timed out waiting"):
        idle.receive(Kind.ROUND)


# ---- whose page is whose ---------------------------------------------------------------------------------------------


@given(st.data())
def test_each_page_is_of_one_channel(data):
    granule = data.draw(st.sampled_from([512, 4096, 1 << 16, 1 << 20]))
    channels = data.draw(st.integers(1, 7))
    shares = Share.all(channels, granule)
    granules = data.draw(st.integers(1, 40 * shares[0].stripe))
    cuts = sorted(data.draw(st.sets(st.integers(0, granules), min_size=2, max_size=9)))
    extents = np.array([[a * granule, (b - a) * granule] for a, b in zip(cuts[::2], cuts[1::2], strict=False)])
    extents = extents[extents[:, 1] > 0]
    assert sum(share.count(granules) for share in shares) == granules
    owners = shares[0].owners(granules)
    assert [share.count(granules) for share in shares] == np.bincount(owners, minlength=channels).tolist()
    seen = np.full(granules, -1)
    for share in shares:
        before = 0
        for offset, length in share.of(extents):
            assert offset >= before
            assert length > 0
            before = offset + length
            part = slice(offset // granule, before // granule)
            assert (seen[part] == -1).all()
            seen[part] = share.index
    wanted = np.full(granules, -1)
    for offset, length in extents:
        part = slice(offset // granule, (offset + length) // granule)
        wanted[part] = owners[part]
    assert (seen == wanted).all()
