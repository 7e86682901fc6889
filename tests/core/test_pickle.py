"""Pickles of DirtyPages: small, checked, and readable by later versions wherever the class is defined then."""

import pickle
import pickletools

import pytest

import dirtylog as dl

# Written by dirtylog 0.1.0 with protocol 4. They have to load for as long as there is a dirtylog.DirtyPages.
SPARSE = (
    b"\x80\x04\x95?\x00\x00\x00\x00\x00\x00\x00\x8c\x08dirtylog\x94\x8c\nDirtyPages\x94\x93\x94)\x81\x94(KdM\x00\x10"
    b"\x88C\x08\x00\x00\x00\x00\x00\x00\x00\x00\x94C\x08\x82\x00\x00\x00\x00\x00\x00\x00\x94Nt\x94b."
)
DENSE = (
    b"\x80\x04\x955\x00\x00\x00\x00\x00\x00\x00\x8c\x08dirtylog\x94\x8c\nDirtyPages\x94\x93\x94)\x81\x94(K@M\x00\x02"
    b"\x89NNC\x08\xff\x00\x00\x00\x00\x00\x00\x80\x94t\x94b."
)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("dense", [False, True], ids=["sparse", "dense"])
def test_pages_come_back_from_every_protocol(protocol, dense):
    pages = dl.DirtyPages.from_indices([1, 7, 64, 99], 100, 512)
    if dense:
        pages = dl.DirtyPages.from_words(pages.words, 100, 512, exact=False)
    again = pickle.loads(pickle.dumps(pages, protocol))
    assert again == pages
    assert (again.npages, again.page_size, again.exact, again.count) == (100, 512, not dense, 4)


def test_a_pickle_names_the_public_class_and_nothing_private():
    for pages in (dl.DirtyPages.from_indices([1], 100), dl.DirtyPages.from_words(bytes_of_words(), 64)):
        texts = {
            argument
            for _, argument, _ in pickletools.genops(pickle.dumps(pages, 4))
            if isinstance(argument, str) and argument
        }
        assert texts == {"dirtylog", "DirtyPages"}


def bytes_of_words():
    import numpy as np

    return np.array([5], np.uint64)


def test_pickles_of_earlier_versions_load():
    sparse, dense = pickle.loads(SPARSE), pickle.loads(DENSE)
    assert (sparse.indices().tolist(), sparse.npages, sparse.page_size, sparse.exact) == ([1, 7], 100, 4096, True)
    assert dense.runs().tolist() == [[0, 8], [63, 1]]
    assert (dense.npages, dense.page_size, dense.exact) == (64, 512, False)
