"""Ten thousand arrays: what a tracker costs does not grow with how many others there are; one block for all of them."""

import mmap

import numpy as np
import pytest

import dirtylog as dl
from dirtylog.sources.memory import _tracking

from ..tracing import traced

PAGE = mmap.PAGESIZE


def test_an_arena_is_arrays_by_name_in_one_block():
    arena = dl.arena(
        {"w": ((3, 5000), "f4"), "b": (7, "i8"), "c": ((), "u1"), "none": ((0, 3), "f8"), "x": (PAGE, "u1")}
    )
    assert isinstance(arena, dict)
    assert {name: (a.shape, a.dtype.str) for name, a in arena.items()} == {
        "w": ((3, 5000), "<f4"),
        "b": ((7,), "<i8"),
        "c": ((), "|u1"),
        "none": ((0, 3), "<f8"),
        "x": ((PAGE,), "|u1"),
    }
    assert all(not a.any() and a.flags.c_contiguous for a in arena.values())
    assert arena.block.ctypes.data % PAGE == arena["w"].ctypes.data % PAGE == arena["x"].ctypes.data % PAGE == 0
    assert (arena.pages("w"), arena.pages("b"), arena.pages("none")) == (range(15), range(14, 15), range(0))
    assert "5 arrays in" in repr(arena)


def test_an_arena_is_tracked_at_once_and_tells_which_arrays_changed():
    arena = dl.arena({f"a{i}": (100, "f8") for i in range(1000)} | {"big": (3 * PAGE, "u1")})
    with dl.track(arena.block) as tracker:
        assert arena.changed(tracker.harvest()) == []
        arena["a500"][3] = 1
        arena["big"][2 * PAGE] = 1
        changed = arena.changed(tracker.harvest())
    assert {"a500", "big"} <= set(changed)
    assert len(changed) < 10
    with pytest.raises(ValueError, match="2 pages were harvested"):
        arena.changed(dl.DirtyPages.from_indices([0], 2))


@pytest.mark.parametrize(
    ("request_", "match"), [({}, "0 arrays of 0 bytes"), ({"a": (0, "f8")}, "0 bytes"), ({"a": (2, object)}, "objects")]
)
def test_an_arena_of_nothing_or_of_objects_is_refused(request_, match):
    with pytest.raises(ValueError, match=match):
        dl.arena(request_)


def steps(operation):
    """Bytecode lines of the library that an operation runs: a count, where a clock would be noise."""
    count = 0

    def trace(frame, event, argument):
        nonlocal count
        if "dirtylog" not in frame.f_code.co_filename:
            return None
        count += 1
        return trace

    with traced(trace):
        operation()
    return count


@pytest.mark.skipif(bool(_tracking.probe("userfaultfd")), reason="the back end of many small arrays")
def test_what_a_tracker_costs_does_not_grow_with_how_many_there_are():
    def one_more():
        with dl.track(np.ones(2000), "userfaultfd") as tracker:
            tracker.harvest()

    one_more()
    alone = steps(one_more)
    arrays = [np.ones(2000) for _ in range(300)]
    trackers = [dl.track(array, "userfaultfd") for array in arrays]
    assert _tracking.open_spans("userfaultfd") == 300
    among_many = steps(one_more)
    for array, tracker in zip(arrays, trackers, strict=True):
        array[1000] = 5
        assert tracker.harvest().count >= 1
    for tracker in trackers:
        tracker.close()
    assert _tracking.open_spans("userfaultfd") == 0
    # A few more where its memory lies in several mappings; one line per tracker would be 300 more.
    assert among_many < alone + 100
