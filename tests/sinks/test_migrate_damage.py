"""A line that changes a bit: what came is given up or was never touched, and never run as it is."""

import contextlib
import queue
import socket
import threading

import numpy as np
import pytest

from dirtylog import DirtyBitmap, DirtyLog
from dirtylog.sinks.migrate import MigrationError, Policy, receive, send

PAGE = 4096
NPAGES = 256


class Lines:
    """Plain sockets, and what carries bytes between them; on the first line one bit is changed."""

    def __init__(self, spoil=None, back=None):
        self.spoil, self.carried, self.breaks = (spoil, back), [0, 0], 0
        self.waiting, self.threads, self.between = queue.Queue(), [], []
        self.lock, self.closed = threading.Lock(), False

    def connect(self, breaks=0):
        with self.lock:
            if self.closed:
                raise ConnectionRefusedError(111, "nobody listens any more")
            return self._connect(breaks)

    def close(self):
        """Nobody accepts any more."""
        with self.lock:
            self.closed = True
            while not self.waiting.empty():
                self.waiting.get().close()

    def _connect(self, breaks):
        near, here = socket.socketpair()
        there, far = socket.socketpair()
        near.settimeout(60)
        far.settimeout(60)
        self.breaks, first = breaks, not self.threads
        self.between += [here, there]
        for way in ((here, there, 0), (there, here, 1)):
            self.threads.append(threading.Thread(target=self.carry, args=(*way, first)))
            self.threads[-1].start()
        self.waiting.put(far)
        return near

    def accept(self, breaks=0):
        return self.waiting.get(timeout=60)

    def join(self):
        for thread in self.threads:
            thread.join()
        for sock in self.between:
            sock.close()

    def carry(self, source, target, way, first):
        at, spoil = 0, self.spoil[way] if first else None
        with contextlib.suppress(OSError):
            while data := bytearray(source.recv(1 << 16)):
                if spoil is not None and at <= spoil < at + len(data):
                    data[spoil - at] ^= 16
                at += len(data)
                target.sendall(data)
        for sock, how in ((target, socket.SHUT_WR), (source, socket.SHUT_RD)):
            with contextlib.suppress(OSError):
                sock.shutdown(how)
        if first:
            self.carried[way] = at


def migrate(spoil=None, back=None):
    """Migrate memory that is written after a round; return the lines, what was sent, and what each end answers."""
    memory = np.random.default_rng(0).integers(1, 256, NPAGES * PAGE, np.uint8)
    memory[10 * PAGE : 20 * PAGE] = 0
    bitmap = DirtyBitmap(NPAGES)
    log = DirtyLog()
    log.attach(bitmap)
    lines, answers = Lines(spoil, back), [None, None]

    def writes(each):
        if not each.final:
            memory[1000 : 100 * PAGE : PAGE] += 1
            bitmap.mark_range(0, 100)
            # Some are zero now, and some not any more.
            memory[30 * PAGE : 35 * PAGE] = 0

    def ends(index, end):
        try:
            answers[index] = end()
        except MigrationError as error:
            answers[index] = error

    here, there = lines.connect(), lines.accept()
    out = np.empty_like(memory)
    out[:] = 7
    policy = Policy(downtime=0.0, max_rounds=3, force=True)

    def receives():
        try:
            ends(0, lambda: receive(there, out=out, reconnect=lines.accept))
        finally:
            lines.close()

    copy = threading.Thread(target=receives)
    copy.start()
    with here, there:
        ends(1, lambda: send(here, memory, log.observer("migration"), policy=policy, progress=writes,
                             reconnect=lines.connect))  # fmt: skip
        copy.join()
    lines.join()
    return lines, memory, answers


@pytest.fixture(scope="module")
def whole():
    lines, memory, (copy, result) = migrate()
    assert (copy == memory).all()
    assert [each.delta_pages for each in result.rounds] == [0, 85]
    return lines.carried, result.wire_bytes


@pytest.mark.parametrize("part", range(8))
def test_a_bit_that_changes_on_the_way_ends_in_an_equal_copy_or_in_none(whole, part):
    (carried, _), wire_bytes = whole
    mended = 0
    # From the first round on; the bytes of whole pages are most.
    for spoil in range(200 + 7 * part, carried, 8 * 16411):
        lines, memory, (copy, result) = migrate(spoil)
        if isinstance(result, MigrationError):
            # A header that says something else: nobody runs but the source.
            assert isinstance(copy, MigrationError), spoil
            assert not result.uncertain, spoil
            continue
        assert (copy == memory).all(), spoil
        assert lines.breaks == 1, spoil
        # Once more than all of it at most.
        assert result.wire_bytes < 2 * wire_bytes + (1 << 16), spoil
        mended += 1
    assert mended > 4


# DONE, HAVE and READY, seen from the end; what changed in the last round, END and RUN.
@pytest.mark.parametrize(
    "where",
    [{"back": at} for at in (10, 50, 100, 140)] + [{"spoil": at} for at in (16, 60, 400, *range(41000, 42000, 100))],
)
def test_a_bit_that_changes_in_what_changed_or_in_a_word_ends_so_too(whole, where):
    (name, before_end), (forth, back) = next(iter(where.items())), whole[0]
    lines, memory, (copy, result) = migrate(**{name: (forth if name == "spoil" else back) - before_end})
    if isinstance(result, MigrationError):
        assert isinstance(copy, MigrationError) or result.uncertain
    else:
        assert (copy == memory).all()
        assert lines.breaks == 1
