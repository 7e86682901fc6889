"""Trackers where a page has 16 or 64 KiB, as on some Arm and POWER systems: that is given out as the system's size.

The kernel below still has its own pages, several of which make one of these.
"""

import mmap

import numpy as np
import pytest

import dirtylog as dl
from dirtylog.sinks import snapshot
from dirtylog.sources.memory import arrays


@pytest.fixture(params=[16 << 10, 64 << 10])
def page(request, monkeypatch):
    if request.param <= mmap.PAGESIZE:
        pytest.skip(f"this system's own pages have {mmap.PAGESIZE} bytes")
    monkeypatch.setattr(mmap, "PAGESIZE", request.param)
    # So that arrays begin on such a page.
    monkeypatch.setattr(arrays, "HUGE_PAGE", request.param)
    return request.param


def filled(npages, page):
    array = dl.empty(npages * page, np.uint8)
    array[:] = 7
    return array


def dirty(pages):
    assert pages.exact
    return pages.indices().tolist()


def test_every_write_is_reported_once_by_its_page(backend, page):
    array = filled(70, page)
    with dl.track(array, backend) as tracker:
        assert (tracker.page_size, tracker.npages) == (page, 70)
        array[[0, 5 * page + 4096, 64 * page - 1, 64 * page, 69 * page + 8191]] = 1
        assert dirty(tracker.harvest()) == [0, 5, 63, 64, 69]
        assert dirty(tracker.harvest()) == []
        array[5 * page + 4096] = 2
        assert dirty(tracker.peek()) == [5]
        assert dirty(tracker.harvest()) == [5]
        array[5 * page + page - 1] = 3
        tracker.mark(7 * page - 1, 2)
        assert dirty(tracker.harvest()) == [5, 6, 7]


def test_two_trackers_of_one_memory_both_hear_of_it(backend, page):
    array = filled(10, page)
    with dl.track(array, backend) as whole, dl.track(array[2 * page : 6 * page], backend) as part:
        array[[page, 3 * page + 4097]] = 1
        assert dirty(whole.harvest()) == [1, 3]
        assert dirty(part.harvest()) == [1]


def test_memory_that_begins_inside_a_page_reports_at_most_one_beside(backend, page):
    array = filled(10, page)[4096:-4096]
    with dl.track(array, backend) as tracker:
        array[3 * page] = 1
        assert 3 in tracker.harvest()
        array[3 * page] = 2
        assert set(dirty(tracker.harvest())) <= {2, 3, 4}


def test_a_snapshot_and_a_checkpoint_hold_what_such_pages_say(page, tmp_path):
    array = filled(70, page)
    with dl.track(array) as tracker:
        snapshot.save(tmp_path / "base", array, page_size=page)
        array[[5 * page + 4096, 69 * page]] = 9
        snapshot.save_diff(tmp_path / "next", array, tracker.harvest(), parent=tmp_path / "base")
    assert (snapshot.restore(tmp_path / "next") == array).all()
    # Whole pages of this size are mapped for it, as such a system's mmap would have done.
    weights = dl.zeros(4 * page // 8)[: 3 * page // 8 + 100]
    with dl.Checkpoint(tmp_path / "steps", {"weights": weights}) as checkpoint:
        for step in range(3):
            weights[step * page // 8 + 700] = step + 1
            checkpoint.save(step=step)
    assert (dl.Checkpoint.load(tmp_path / "steps")["weights"] == weights).all()
