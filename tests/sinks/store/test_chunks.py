"""Dirty pages to dirty chunks, against an oracle that looks at every byte."""

from math import prod

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import dirtylog as dl
from dirtylog.sinks.store import ChunkMap


def chunks_by_looking_at_every_byte(shape, chunks, itemsize, offset, order, pages):
    nbytes = prod(shape) * itemsize
    dirty = np.zeros(pages.npages * pages.page_size, bool).reshape(pages.npages, pages.page_size)
    dirty[pages.indices()] = True
    item_of = np.arange(nbytes) // itemsize  # in the order of memory
    items = np.unique(item_of[dirty.reshape(-1)[offset : offset + nbytes]])
    places = dict(zip(order, np.unravel_index(items, [shape[axis] for axis in order]), strict=True))
    grid = [-(-size // chunk) for size, chunk in zip(shape, chunks, strict=True)]
    return np.unique(np.ravel_multi_index([places[axis] // chunk for axis, chunk in enumerate(chunks)], grid)).tolist()


def random_grid(rng):
    naxes = int(rng.integers(1, 5))
    shape = tuple(rng.integers(1, 9, naxes).tolist())
    chunks = tuple(int(rng.integers(1, size + 3)) for size in shape)
    itemsize, page_size = int(rng.choice([1, 2, 3, 8])), int(rng.choice([1, 2, 4, 16, 64]))
    offset = int(rng.integers(0, 3 * page_size))
    order = tuple(rng.permutation(naxes).tolist()) if rng.random() < 0.5 else tuple(range(naxes))
    npages = -(-(offset + prod(shape) * itemsize) // page_size) + int(rng.integers(0, 3))
    density = rng.choice([0.01, 0.1, 0.5, 0.95])
    pages = dl.DirtyPages.from_indices(np.flatnonzero(rng.random(npages) < density), npages, page_size)
    return shape, chunks, itemsize, offset, order, pages


def check(shape, chunks, itemsize, offset, order, pages):
    mapped = ChunkMap(shape, chunks, itemsize, offset=offset, order=order)
    found = mapped.of_pages(pages)
    assert found.dtype == np.int64
    assert found.tolist() == chunks_by_looking_at_every_byte(shape, chunks, itemsize, offset, order, pages)


def test_random_grids_agree_with_the_oracle():
    rng = np.random.default_rng(16)
    for _ in range(1000):
        check(*random_grid(rng))


@given(st.data())
def test_any_grid_agrees_with_the_oracle(data):
    shape = data.draw(st.lists(st.integers(1, 7), min_size=1, max_size=4))
    chunks = [data.draw(st.integers(1, size + 2)) for size in shape]
    order = data.draw(st.permutations(range(len(shape))))
    itemsize, page_size = data.draw(st.integers(1, 9)), data.draw(st.sampled_from([1, 2, 8, 32]))
    offset = data.draw(st.integers(0, 40))
    npages = -(-(offset + prod(shape) * itemsize) // page_size)
    dirty = data.draw(st.sets(st.integers(0, npages - 1)))
    check(shape, chunks, itemsize, offset, order, dl.DirtyPages.from_indices(sorted(dirty), npages, page_size))


def test_work_follows_runs_of_pages_and_not_their_length():
    # Two items per row in different chunks: the number changes at every item, a billion times.
    mapped = ChunkMap((500_000_000, 2), (250_000_000, 1), 8)
    everything = dl.DirtyPages.from_runs([[1, mapped.nbytes // 4096 - 2]], mapped.nbytes // 4096)
    assert mapped.of_pages(everything).tolist() == [0, 1, 2, 3]


def test_an_array_without_axes_is_one_chunk():
    mapped = ChunkMap((), (), 8, offset=4096)
    assert mapped.count == 1
    assert mapped.slices(0) == ()
    assert mapped.nbytes_of([0]) == 8
    assert mapped.of_pages(dl.DirtyPages.from_indices([1], 2)).tolist() == [0]
    assert mapped.of_pages(dl.DirtyPages.from_indices([0], 2)).tolist() == []


def test_an_array_without_items_has_no_chunks():
    mapped = ChunkMap((0, 3), (5, 5), 8)
    assert mapped.count == 0
    assert mapped.of_pages(dl.DirtyPages.from_indices([], 0)).tolist() == []


def test_slices_and_bytes_cover_the_array_once():
    mapped = ChunkMap((7, 5, 3), (3, 2, 3), 4)
    seen = np.zeros(mapped.shape, int)
    for number in range(mapped.count):
        seen[mapped.slices(number)] += 1
        assert mapped.nbytes_of(number) == seen[mapped.slices(number)].size * 4
    assert (seen == 1).all()
    assert mapped.nbytes_of(range(mapped.count)) == mapped.nbytes


@pytest.mark.parametrize("number", [-1, 2, 10**20])
def test_a_chunk_that_is_not_there_is_an_index_error(number):
    mapped = ChunkMap((4,), (2,), 1)
    with pytest.raises(IndexError, match="there are 2"):
        mapped.slices(number)
    if abs(number) < 2**63:
        with pytest.raises(IndexError, match="there are 2"):
            mapped.nbytes_of([0, number])


@pytest.mark.parametrize(
    ("arguments", "options", "said"),
    [
        (((4, 4), (2,), 8), {}, "one extent for each axis"),
        (((4, -1), (2, 2), 8), {}, "negative dimensions"),
        (((4,), (0,), 8), {}, "at least 1"),
        (((4,), (2,), 0), {}, "itemsize is 0"),
        (((4,), (2,), 8), {"offset": -1}, "offset -1"),
        (((4,), (2,), 8), {"order": "A"}, "'C', 'F'"),
        (((4, 4), (2, 2), 8), {"order": (0, 0)}, "each of the 2 axes once"),
        (((2**62,), (2,), 8), {}, r"2\*\*63"),
    ],
)
def test_a_grid_that_cannot_be_is_refused(arguments, options, said):
    with pytest.raises(ValueError, match=said):
        ChunkMap(*arguments, **options)


def test_pages_of_a_shorter_memory_are_refused():
    mapped = ChunkMap((1024,), (16,), 8, offset=4096)
    with pytest.raises(ValueError, match="ends at byte 12288 and the memory of these pages at 8192"):
        mapped.of_pages(dl.DirtyPages.from_indices([0], 2))
    with pytest.raises(TypeError, match="must be DirtyPages"):
        mapped.of_pages([0])


def test_fortran_order_is_the_axes_from_the_last():
    pages = dl.DirtyPages.from_indices([0], 4, 16)
    assert ChunkMap((4, 4), (4, 1), 4, order="F").of_pages(pages).tolist() == [0]
    assert ChunkMap((4, 4), (4, 1), 4).of_pages(pages).tolist() == [0, 1, 2, 3]
