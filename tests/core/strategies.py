"""Sizes, page numbers and words that the tests of the core draw from."""

import numpy as np
from hypothesis import strategies as st

# Round every unit that some loop of the core works in: a word (64 pages), a
# cache line of words (512), a page of words (32768), a word of the summary (32768
# again: 64 lines), and what a vector register takes at a time in between.
EDGES = (64, 128, 256, 512, 1024, 4096, 32768)
EDGE_SIZES = sorted({1, 2, *(edge + step for edge in EDGES for step in (-1, 0, 1))})

sizes = st.one_of(st.sampled_from(EDGE_SIZES), st.integers(1, 3000))


def page_sets(npages):
    """Sets of pages: scattered, in runs, at the edges, none, all."""
    page = st.integers(0, npages - 1)
    edge = st.sampled_from([p for p in (0, 63, 64, 511, 512, 4095, npages // 2, npages - 1) if p < npages])
    run = st.tuples(page, st.integers(1, 700)).map(lambda r: set(range(r[0], min(r[0] + r[1], npages))))
    return st.one_of(
        st.sets(st.one_of(page, edge), max_size=40),
        st.lists(run, max_size=4).map(lambda runs: set().union(*runs)),
        st.just(set()),
        st.just(set(range(npages))),
    )


@st.composite
def sized_page_sets(draw, count=1):
    """A size, and page sets of it."""
    npages = draw(sizes)
    return npages, *(draw(page_sets(npages)) for _ in range(count))


@st.composite
def ranges_of(draw, npages):
    """A range inside `npages` pages, empty ones too."""
    first = draw(st.integers(0, npages))
    return first, draw(st.integers(0, npages - first))


def words_of(pages, npages):
    """Words with these pages' bits set, made by numpy alone."""
    bits = np.zeros(-(-npages // 64) * 64, dtype=np.uint8)
    bits[sorted(pages)] = 1
    return np.packbits(bits, bitorder="little").view("<u8").astype(np.uint64)


def runs_of(pages):
    """Runs of a set of pages, by going through it."""
    runs = []
    for page in sorted(pages):
        if runs and sum(runs[-1]) == page:
            runs[-1][1] += 1
        else:
            runs.append([page, 1])
    return runs
