"""A copy that is tracked while it fills: what is written is reported, and what is filled is not."""

import re
import threading

import numpy as np
import pytest

import dirtylog as dl
from dirtylog import BackendUnavailable
from dirtylog.sources.memory.probe import blocks_faults

from .test_migrate_postcopy import LIBC, PAGE, Copy, Relay, Source, guarded, send

pytestmark = pytest.mark.skipif(bool(guarded()), reason=guarded())
# In the middle of a granule of 64 KiB, side by side, at its ends and on both sides of one.
WRITTEN = [0, 5, 17, 31, 32, 33, 79, 80, 200]


class Tracked(Copy):
    """Is tracked before any of it has come, and written page by page while it comes."""

    def __init__(self, relay, **options):
        self.relay, self.tracker, self.during, self.refusal = relay, None, set(), ""
        # Other packages' threads may: pyarrow's allocator has one.
        self.blocked, self.blocks = blocks_faults(), None
        super().__init__(relay.accept(), **options)

    def begin(self, memory):
        # What "auto" looks at. Named, since the comparing back end would wait for all of it.
        self.blocks = blocks_faults()
        try:
            dl.track(memory, "userfaultfd")
        except BackendUnavailable as error:
            self.refusal = str(error)
        self.tracker = dl.track(memory, "mprotect")
        for page in WRITTEN:
            place = memory.ctypes.data + page * PAGE + 7
            self.users.append(threading.Thread(target=LIBC.memset, args=(place, 0, 1), daemon=True))
            self.users[-1].start()
        # Nothing has come so far, and nothing is reported that nobody wrote.
        self.during |= set(self.tracker.harvest())
        self.relay.free.set()


@pytest.mark.parametrize("page_size", [PAGE, 1 << 16, 1 << 20])
def test_what_is_written_while_memory_fills_is_reported_and_what_is_filled_is_not(page_size):
    source, relay = Source((16 << 20) // page_size, page_size), Relay()
    relay.holds = True
    with relay.connect() as here:
        copy = Tracked(relay)
        send(here, source.memory, source.observer, postcopy=0)
    copy.join()
    relay.join()
    assert not isinstance(copy.answer, Exception), copy.answer
    with copy.tracker as tracker:
        assert re.search("another userfaultfd has this memory: .*; try backend='mprotect'", copy.refusal)
        assert copy.blocks == copy.blocked
        assert copy.during | set(tracker.harvest()) == set(WRITTEN)
        assert not tracker.harvest()
        copy.answer[1000 * PAGE] += 1
        assert list(tracker.harvest()) == [1000]
        copy.answer[1000 * PAGE] -= 1
        # The other kind takes over, and between the two nothing is missed.
        try:
            second = dl.track(copy.answer, "userfaultfd")
        except BackendUnavailable:
            second = tracker
        copy.answer[1001 * PAGE] += 1
        assert list(tracker.harvest()) == [1000, 1001]
    with second:
        copy.answer[1001 * PAGE] -= 1
        assert second is tracker or list(second.harvest()) == [1001]
    expected = source.memory.copy()
    expected[np.array(WRITTEN) * PAGE + 7] = 0
    assert (copy.answer == expected).all()


def test_once_it_has_everything_it_is_tracked_as_any_memory_is():
    source, relay = Source(), Relay()
    with relay.connect() as here:
        copy = Copy(relay.accept())
        send(here, source.memory, source.observer, postcopy=0)
    copy.join()
    relay.join()
    try:
        with dl.track(copy.answer, "userfaultfd") as tracker:
            copy.answer[5 * PAGE] = 1
            assert list(tracker.harvest()) == [5]
    except BackendUnavailable as error:
        pytest.skip(str(error))
