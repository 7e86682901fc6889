"""Writes to tracked memory from several threads, while other trackers come and go and the process forks."""

import os

import numpy as np
import pytest

import dirtylog as dl
from dirtylog.errors import BackendUnavailable

pytestmark = [
    pytest.mark.stress,
    # Forking beside threads is what is tested; the child touches memory and ends.
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]

NPAGES = 2048
WRITERS = 2


@pytest.mark.parametrize("backend", ["userfaultfd", "mprotect", "compare"])
def test_no_write_is_missed_while_trackers_come_and_go(stress, replica, backend):
    array = dl.zeros((NPAGES, 512), np.uint64)
    try:
        tracker = dl.track(array, backend)
    except BackendUnavailable as missing:
        pytest.skip(str(missing))
    values = array[:, 7]
    copy = replica(values)
    opened = written = 0
    with tracker, stress.signal_storm():
        for number in stress.rounds():
            generators = np.random.default_rng(number).spawn(WRITERS)
            before = copy.values.copy()

            def write(writer, generators=generators, number=number):
                # Each its own pages, a neighbour's between two of them.
                mine = np.arange(writer, NPAGES, WRITERS)
                for turn in range(4):
                    some = mine[generators[writer].random(mine.size) < 0.5]
                    array[some, 7] = number * 4 + turn

            def come_and_go():
                nonlocal opened
                for _ in range(4):
                    other = dl.zeros((16, 512), np.uint64)
                    with dl.track(other, backend) as brief:
                        other[3] = 1
                        assert 3 in brief.harvest()
                    opened += 1

            def fork():
                child = os.fork()
                if child == 0:
                    array[:, 7] = 1
                    os._exit(0)
                assert os.waitpid(child, 0)[1] == 0

            parts = [lambda w=w: write(w) for w in range(WRITERS)]
            with stress.side_by_side(*parts, come_and_go, *([fork] if number % 8 == 0 else [])) as busy:
                while busy():
                    copy.take(tracker.harvest())
            copy.take(tracker.harvest())
            copy.check()
            written += int((copy.values != before).sum())
    stress.count("pages written", written)
    stress.count("trackers opened", opened)
