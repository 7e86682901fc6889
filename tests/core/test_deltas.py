"""What changed inside pages: as many bytes as changed, whatever changed; and nothing is written of what cannot be."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dirtylog._bits.deltas import DELTA, WHOLE, ZERO, extents_of, lay_deltas, sort_pages

PAGE = 512


class Cache:
    """Copies of as many pages as there are places."""

    def __init__(self, places):
        self.data = np.zeros(places * PAGE, np.uint8)
        self.held = np.full(places, -1, np.int64)
        self.frames = np.zeros(places, np.int64)

    def sort(self, window, numbers, older=1):
        out = np.full(len(window), 0xAA, np.uint8)
        where = extents(*numbers)
        where[-1, 1] = len(window) - (len(numbers) - 1) * PAGE
        how = {"older": older, "out": out}
        found, kinds, used = sort_pages(window, where, self.data, self.held, self.frames, PAGE, **how)
        assert found.tolist() == list(numbers)
        return kinds.tolist(), out[:used].tobytes()


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
    lay_deltas(changes, extents(*[i for i in range(npages) if kinds[i] == DELTA]), PAGE, copy)
    for i in range(npages):
        part = slice(i * PAGE, i * PAGE + PAGE)
        if kinds[i] != DELTA:
            copy[part] = new[part]
        assert (kinds[i] == ZERO) == (not new[part].any())
    assert (copy == new).all()
    # What the cache has is what the other end has: the next delta is taken of that.
    assert all((cache.data[i * PAGE :][:PAGE] == new[i * PAGE :][:PAGE]).all() for i in range(npages) if kinds[i])
    assert len(changes) <= PAGE * 3 // 4 * kinds.count(DELTA)


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
        lay_deltas(b"\x00\x02zz\xfe\x03\x00" + data, extents(0, 1), PAGE, target)
    assert (target == before).all()
    lay_deltas(b"\x00\x02zz\xfe\x03\x00", extents(0), PAGE, target)
    assert target[:3].tobytes() == b"zz\x02"


@given(st.binary(max_size=40), st.integers(1, 3))
def test_any_bytes_are_deltas_or_refused(data, npages):
    target = np.zeros(npages * PAGE + 1, np.uint8)
    target[-1] = 9
    try:
        lay_deltas(data, np.array([[0, npages * PAGE]]), PAGE, target[:-1])
    except ValueError:
        assert not target[:-1].any()
    assert target[-1] == 9


def test_what_does_not_fit_is_refused():
    with pytest.raises(IndexError, match="target has 512 bytes"):
        lay_deltas(b"\x80\x04\x00", extents(1), PAGE, np.zeros(PAGE, np.uint8))
    with pytest.raises(ValueError, match="page_size is 0"):
        lay_deltas(b"", extents(), 0, np.zeros(PAGE, np.uint8))
    cache = Cache(1)
    with pytest.raises(IndexError, match="offset -512"):
        cache.sort(page(), [-1])
    for extent in ([0, 511], [0, 1024]):
        with pytest.raises(ValueError, match="do not add up"):
            sort_pages(page(), np.array([extent]), cache.data, cache.held, cache.frames, PAGE, older=0, out=page())
    with pytest.raises(ValueError, match="not of whole pages"):
        sort_pages(page(), np.array([[5, 512]]), cache.data, cache.held, cache.frames, PAGE, older=0, out=page())
    with pytest.raises(ValueError, match="page_size is 0"):
        sort_pages(page(), extents(0), cache.data, cache.held, cache.frames, 0, older=0, out=page())
    with pytest.raises(ValueError, match="too few"):
        sort_pages(page(), extents(0), cache.data, np.array([-1, -1]), np.zeros(2, int), PAGE, older=0, out=page())


def test_pages_of_a_kind_are_joined_where_they_are_neighbours():
    numbers = np.array([0, 1, 3, 4, 5, 9])
    kinds = np.array([1, 1, 1, 2, 1, 1], np.uint8)
    assert extents_of(numbers, kinds, 1, 10, 1000).tolist() == [[0, 20], [30, 10], [50, 10], [90, 10]]
    assert extents_of(numbers, kinds, 1, 10, 97).tolist()[-1] == [90, 7]
    assert extents_of(numbers, kinds, 0, 10, 1000).shape == (0, 2)
    with pytest.raises(ValueError, match="5 kinds for 6 pages"):
        extents_of(numbers, kinds[:5], 1, 10, 1000)
