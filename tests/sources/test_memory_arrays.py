"""dl.empty and dl.zeros: whole pages, huge pages advised, freed with the array."""

import gc
import mmap
import weakref

import numpy as np
import pytest

import dirtylog as dl
from dirtylog.sources.memory import arrays
from dirtylog.sources.memory.probe import mappings_of

PAGE = mmap.PAGESIZE
MAKERS = [dl.empty, dl.zeros]


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("shape", [1, 5, (3, 4), [2, 3, 4], np.array([2, 5]), np.int64(7), (), (PAGE,), (1000, 1000)])
@pytest.mark.parametrize("dtype", [float, "u1", np.complex128, "i4,f8", "S7", bool])
def test_it_is_numpys_array_on_a_page_of_its_own(make, shape, dtype):
    array = make(shape, dtype)
    twin = np.zeros(shape, dtype)
    assert (array.shape, array.dtype, array.strides) == (twin.shape, twin.dtype, twin.strides)
    assert array.ctypes.data % PAGE == 0
    assert array.flags.c_contiguous
    assert array.flags.writeable
    assert np.array_equal(array, twin)


def test_the_default_dtype_is_float():
    assert dl.empty(2).dtype == dl.zeros(2).dtype == np.float64


@pytest.mark.parametrize("make", MAKERS)
def test_an_array_without_elements_is_numpys(make):
    assert make((3, 0, 2), "i2").shape == (3, 0, 2)
    assert make(0).size == 0


def test_from_2_mib_on_huge_pages_are_aligned_and_advised(monkeypatch):
    advised = []

    class Recording(mmap.mmap):
        def madvise(self, option):
            advised.append(option)
            return super().madvise(option)

    monkeypatch.setattr(
        arrays, "_private", lambda nbytes: Recording(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    )
    assert dl.empty((2 << 20) - 1, "u1").ctypes.data % PAGE == 0
    assert advised == []
    # Sizes that the system itself would not align, all alive at once.
    large = [dl.empty((2 << 20) + number * PAGE, "u1") for number in range(1, 9)]
    assert [array.ctypes.data % (2 << 20) for array in large] == [0] * 8
    assert advised == [mmap.MADV_HUGEPAGE] * 8


def test_the_memory_is_private_and_goes_with_the_last_view():
    array = dl.zeros(3 << 20, "u1")
    address = array.ctypes.data
    (mapping,) = mappings_of(address, array.nbytes)
    assert (mapping.permissions, mapping.writers) == ("rw-p", "private")
    memory = array
    while not isinstance(memory, mmap.mmap):
        memory = memory.base if isinstance(memory, np.ndarray) else memory.obj
    gone = weakref.ref(memory)
    view = array[5:10]
    del array, memory
    gc.collect()
    view[0] = 1
    assert gone() is not None
    del view
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("make", MAKERS)
def test_bad_shapes_and_dtypes_are_refused_as_numpy_does(make):
    with pytest.raises(ValueError, match="negative dimensions are not allowed"):
        make(-1)
    with pytest.raises(ValueError, match="negative dimensions are not allowed"):
        make((3, -2))
    with pytest.raises(TypeError):
        make(1.5)
    with pytest.raises(TypeError):
        make((2, "3"))
    with pytest.raises(TypeError):
        make(3, "no such type")
    with pytest.raises(ValueError, match="holds Python objects"):
        make(3, object)
    with pytest.raises(MemoryError, match="no room for an array"):
        make(1 << 60)
    with pytest.raises(MemoryError, match="no room for an array"):
        make((1 << 40, 1 << 40))
