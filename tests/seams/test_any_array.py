"""I9 with what people really have: arrays of every dtype, shape, order and offset are rebuilt byte for byte."""

import mmap
import operator
import socket
import threading
from multiprocessing.shared_memory import SharedMemory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dirtylog as dl
from dirtylog._core import compare_pages
from dirtylog.sinks import snapshot
from dirtylog.sinks.migrate import receive, send

PAGE = mmap.PAGESIZE
DTYPES = ["u1", "i2", "<f4", ">f8", "c16", "?", "M8[s]", "S7", "U3", [("a", "<i4"), ("b", "u1")]]
BACKENDS = ["userfaultfd", "mprotect", "compare"]


@pytest.fixture(scope="module", params=BACKENDS)
def backend(request):
    try:
        dl.track(dl.zeros(PAGE), request.param).close()
    except dl.BackendUnavailable as missing:
        pytest.skip(str(missing))
    return request.param


@st.composite
def layouts(draw):
    """A dtype, a shape of a few pages, an order, and where in a page the memory begins."""
    dtype = np.dtype(draw(st.sampled_from(DTYPES)))
    rows = draw(st.integers(1, 60))
    columns = draw(st.integers(1, max(1, 6 * PAGE // (rows * dtype.itemsize))))
    shape = draw(
        st.sampled_from(
            [(rows * columns,), (rows, columns), (rows, 1, columns), (rows, columns, 1), (2, rows, columns)]
        )
    )
    order = draw(st.sampled_from(["C", "F", "swapped"] if len(shape) == 3 else "CF"))
    offset = draw(st.sampled_from([0, 1, 16, 720, PAGE - 1]))
    return dtype, shape, order, offset


def made(layout):
    """An array of that layout in pages of its own, so that mprotect may have them, and its bytes in memory's order."""
    dtype, shape, order, offset = layout
    nbytes = int(np.prod(shape)) * dtype.itemsize
    block = dl.zeros(offset + nbytes + PAGE, dtype=np.uint8)
    flat = block[offset : offset + nbytes]
    flat[:] = np.arange(nbytes) % 251
    if order == "swapped":  # neither C nor Fortran order, and no gap either
        return flat.view(dtype).reshape(shape[1], shape[0], shape[2]).swapaxes(0, 1), flat
    return flat.view(dtype).reshape(shape, order=order), flat


def in_memory(array):
    """The bytes of an array in the order of their addresses."""
    return array.transpose(np.argsort([-step for step in array.strides], kind="stable")).tobytes()


writes = st.lists(st.tuples(st.integers(0, 1 << 30), st.integers(1, 900)), max_size=5)


def written(flat, places):
    for place, length in places:
        start = place % len(flat)
        flat[start : start + length] ^= 0x55


@settings(max_examples=25)
@given(layout=layouts(), rounds=st.lists(writes, min_size=1, max_size=3))
def test_copies_snapshots_and_epochs_rebuild_any_array(backend, tmp_path_factory, layout, rounds):
    array, flat = made(layout)
    replica, mirror = np.empty_like(array), np.empty_like(array)
    directory = tmp_path_factory.mktemp("chain")
    with dl.track(array, backend) as tracker:
        assert tracker.npages == -(-array.nbytes // PAGE)
        log = dl.DirtyLog()
        log.attach(tracker)
        observer = log.observer("copy", everything=True)
        previous = directory / "0"
        snapshot.save(previous, array)
        with observer.collect() as epoch:
            epoch.pages.copy(array, replica)
        mirror[...] = array
        for number, places in enumerate(rounds, 1):
            written(flat, places)
            with observer.collect() as epoch:
                epoch.pages.copy(array, replica)
                for rows in epoch.pages.row_runs(array):
                    mirror[rows] = array[rows]
                assert set(epoch.pages.rows(array)) == {
                    row for rows in epoch.pages.row_runs(array) for row in range(rows.start, rows.stop)
                }
                diff = directory / str(number)
                snapshot.save_diff(diff, array, epoch.pages, parent=previous)
            previous = diff
            assert in_memory(replica) == in_memory(array) == flat.tobytes()
            assert mirror.tobytes() == array.tobytes()
            out = np.empty_like(array)
            snapshot.restore(diff, out=out)
            assert in_memory(out) == flat.tobytes()


@settings(max_examples=15)
@given(layout=layouts(), places=writes)
def test_a_migration_moves_any_array(backend, layout, places):
    array, flat = made(layout)
    out = np.empty_like(array)
    ours, theirs = socket.socketpair()
    with ours, theirs, dl.track(array, backend) as tracker:
        log = dl.DirtyLog()
        log.attach(tracker)
        observer = log.observer("migration", everything=True)
        got = []
        receiver = threading.Thread(target=lambda: got.append(receive(theirs, out=out)))
        receiver.start()
        send(ours, array, observer, pause=lambda: written(flat, places), resume=lambda: None)
        receiver.join()
    assert got
    assert in_memory(out) == flat.tobytes()


def rows_by_brute_force(pages, array):
    """Row by row, byte by byte."""
    found = []
    for row in range(len(array)):
        places = list(np.ndindex(*array.shape[1:]))
        first = [row * array.strides[0] + int(np.dot(place, array.strides[1:])) for place in places]
        if any((byte + k) // PAGE in pages for byte in first for k in (0, array.itemsize - 1)):
            found.append(row)
    return found


@settings(max_examples=60)
@given(layout=layouts(), chosen=st.sets(st.integers(0, 6)))
def test_rows_are_those_that_a_look_at_every_byte_finds(layout, chosen):
    array, _ = made(layout)
    npages = -(-array.nbytes // PAGE)
    pages = dl.DirtyPages.from_indices([page for page in chosen if page < npages], npages)
    assert pages.rows(array).tolist() == rows_by_brute_force(pages, array)


def test_a_page_that_goes_round_from_the_last_row_to_the_first_has_both():
    """512 items a page, 700 rows in Fortran order; and three axes of which the first is in the middle."""
    columns = np.zeros((700, 5), order="F")
    middle = np.zeros((2, 700, 3)).transpose(1, 0, 2)
    for array in (columns, middle):
        npages = -(-array.nbytes // PAGE)
        for page in range(npages):
            pages = dl.DirtyPages.from_indices([page], npages)
            assert pages.rows(array).tolist() == rows_by_brute_force(pages, array)
        pages = dl.DirtyPages.from_indices([0, 2, 4], npages)
        assert pages.rows(array).tolist() == rows_by_brute_force(pages, array)


# ---- what has memory ------------------------------------------------------------------------------------


class Interface:
    """Lends its memory by __array_interface__."""

    def __init__(self, array):
        self.array = array
        self.__array_interface__ = array.__array_interface__


class Copies:
    """Makes an array each time it is asked for one."""

    def __array__(self, dtype=None, copy=None):
        return np.zeros(10_000)


def lenders():
    yield "interface", np.zeros(10_000), Interface
    yield "memoryview", np.zeros(10_000), memoryview
    yield "fortran memoryview", np.zeros((100, 100), order="F"), memoryview
    yield "ctypes", np.zeros(10_000), lambda array: (np.ctypeslib.ctypes.c_double * 10_000).from_buffer(array)
    try:
        import pandas
    except ImportError:
        pass
    else:
        yield "pandas", np.zeros(10_000), lambda array: pandas.Series(array, copy=False)
    import pyarrow

    yield "pyarrow", np.zeros(10_000), lambda array: pyarrow.py_buffer(array)
    try:
        import torch
    except ImportError:
        pass
    else:
        yield "torch", np.zeros(10_000), torch.from_numpy


@pytest.mark.parametrize(("array", "lend"), [pytest.param(a, lend, id=name) for name, a, lend in lenders()])
def test_whatever_lends_its_memory_is_tracked_and_copied(array, lend):
    lent = lend(array)
    replica = array.copy(order="K")
    with dl.track(lent) as tracker:
        array.reshape(-1, order="A")[9_000] = 3
        pages = tracker.harvest()
        assert 9_000 * 8 // PAGE in pages
        pages.copy(lent, replica)
    assert (replica == array).all()


def test_shared_memory_itself_is_tracked():
    segment = SharedMemory(create=True, size=3 * PAGE)
    try:
        with dl.track(segment) as tracker:
            segment.buf[2 * PAGE] = 1
            assert tracker.harvest().indices().tolist() == [2]
    finally:
        segment.close()
        segment.unlink()


def test_torch_tensors_are_tracked():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    tensor = torch.zeros(50_000)
    with dl.track(tensor) as tracker:
        tensor[40_000] = 1
        assert 40_000 * 4 // PAGE in tracker.harvest()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3fn", "bool", "complex64"])
def test_a_tensor_of_any_dtype_is_its_memory(dtype):
    """One that numpy lacks is taken as integers of its size: the rows are the tensor's own."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    tensor = torch.zeros((5000, 3), dtype=getattr(torch, dtype))
    replica = torch.zeros_like(tensor)
    with dl.track(tensor) as tracker:
        tensor[4321, 1] = 1
        pages = tracker.harvest()
        assert 4321 in pages.rows(tensor)
        pages.copy(tensor, replica)
    assert torch.equal(tensor.view(torch.uint8), replica.view(torch.uint8))


def test_a_parameter_is_tracked_like_its_values():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    weights = torch.nn.Linear(100, 100).weight
    with dl.track(weights) as tracker, torch.no_grad():
        weights[50, 0] += 1
        assert 50 * 400 // PAGE in tracker.harvest()


def test_a_tensor_elsewhere_or_with_gaps_is_refused():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    with pytest.raises(ValueError, match="copy on the CPU that you keep"):
        dl.track(torch.zeros(10, device="meta"))
    with pytest.raises(ValueError, match="not contiguous"):
        dl.track(torch.zeros((10, 10))[:, 1])


@pytest.mark.parametrize("dtype", [object, [("a", "i4"), ("b", object)]])
def test_python_objects_are_refused_everywhere(dtype, tmp_path):
    array = np.zeros(1000, dtype)
    pages = dl.DirtyPages.from_indices([0], 2)
    for use in (
        lambda: dl.track(array),
        lambda: snapshot.save(tmp_path / "s", array),
        lambda: pages.copy(array, array.copy()),
    ):
        with pytest.raises(TypeError, match="Python objects"):
            use()
    assert not list(tmp_path.iterdir())


def test_objects_inside_a_memoryviews_items_are_refused():
    with pytest.raises(TypeError, match="Python objects"):
        dl.track(memoryview(np.zeros(10, [("xO", "i4"), ("b", object)])))
    dl.track(memoryview(np.zeros(10, [("O", "i4"), ("TOO", "f8")]))).close()


def test_a_masked_array_is_refused():
    """Its mask would be left out without a word."""
    with pytest.raises(TypeError, match=r"pass its \.data, and its \.mask"):
        dl.track(np.ma.zeros(10))


def test_a_table_of_two_dtypes_is_refused_and_its_columns_are_not():
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    one = pandas.DataFrame(np.zeros((2000, 3)))
    with dl.track(one) as tracker:
        one.iloc[1500, 2] = 1
        assert 1500 in tracker.harvest().rows(one)
    with pytest.raises(ValueError, match="hands out copies"):
        dl.track(pandas.DataFrame({"a": np.zeros(10), "b": np.zeros(10, int)}))


def test_what_hands_out_copies_is_refused():
    with pytest.raises(ValueError, match="hands out copies"):
        dl.track(Copies())


def test_an_array_that_holds_its_own_tracker_is_collected():
    import gc
    import weakref

    class Holder(np.ndarray):
        pass

    array = np.zeros(5000).view(Holder)
    array.tracker = dl.track(array)
    alive = weakref.ref(array)
    array.tracker.close()
    del array
    gc.collect()
    assert alive() is None


# ---- what DirtyPages say to people ------------------------------------------------------------------------


def test_an_array_of_dirty_pages_is_their_numbers():
    pages = dl.DirtyPages.from_indices([3, 5], 10)
    assert np.asarray(pages).tolist() == [3, 5]
    assert np.asarray(pages, dtype=np.uint8).dtype == np.uint8
    assert np.arange(10)[np.asarray(pages)].tolist() == [3, 5]
    with pytest.raises(ValueError, match="without a copy"):
        pages.__array__(copy=False)


def test_pages_and_an_array_of_numbers_do_not_combine_unnoticed():
    pages = dl.DirtyPages.from_indices([3, 5], 10)
    for combine in (operator.or_, operator.and_, operator.sub, operator.xor):
        for pair in ((pages, np.array([1, 2])), (np.array([1, 2]), pages)):
            with pytest.raises(TypeError, match=r"unsupported operand|__array_ufunc__=None"):
                combine(*pair)
    assert pages != np.array([3, 5])


def test_an_empty_copy_copies_nothing():
    none = dl.DirtyPages.from_indices([], 0)
    assert none.copy(np.zeros(0), np.zeros(0)) == 0


def test_pages_of_arrays_in_different_orders_are_not_compared():
    with pytest.raises(ValueError, match="different orders"):
        compare_pages(np.zeros((64, 128)), np.zeros((64, 128), order="F"))


def test_byte_runs_are_cut_where_the_memory_ends():
    pages = dl.DirtyPages.from_runs([[1, 2], [4, 1]], 5)
    assert pages.byte_runs(5 * PAGE - 7).tolist() == [[PAGE, 2 * PAGE], [4 * PAGE, PAGE - 7]]
    with pytest.raises(ValueError, match="a memory of 5"):
        pages.byte_runs(3 * PAGE)


def test_copies_refuse_what_does_not_fit_before_a_byte_moves():
    pages = dl.DirtyPages.from_indices([0, 1], 2)
    source, target = np.ones(2 * PAGE, np.uint8), np.zeros(2 * PAGE, np.uint8)
    read_only = target.view()
    read_only.flags.writeable = False
    for wrong, match in (
        ((source, target[:-1]), "both must be one size"),
        ((source[: PAGE // 2], target[: PAGE // 2]), "a memory of 2"),
        ((source, read_only), "read-only"),
        ((source, source), "overlap"),
        ((np.ones(4 * PAGE, np.uint8)[::2], target), "not contiguous"),
        ((np.ones((64, 128), np.uint8), np.zeros((64, 128), np.uint8, order="F")), "different orders"),
    ):
        with pytest.raises(ValueError, match=match):
            pages.copy(*wrong)
    assert not target.any()
    assert pages.copy(source, target) == 2 * PAGE
    assert target.all()


def test_rows_refuse_what_has_none():
    pages = dl.DirtyPages.from_indices([0], 1)
    with pytest.raises(ValueError, match="no rows"):
        pages.rows(np.array(3.0))
    assert pages.rows(bytearray(10)).tolist() == list(range(10))
    with pytest.raises(TypeError, match="no memory"):
        pages.rows([1, 2])
    assert dl.DirtyPages.from_indices([], 0).rows(np.zeros((0, 5))).tolist() == []


def test_rows_of_many_runs_in_any_order_are_found_in_one_go():
    """A hundred thousand runs, of a thousand rows that each lies in most pages, or in one."""
    npages = 200_000
    pages = dl.DirtyPages.from_indices(np.arange(0, npages, 2), npages)
    flat = dl.empty(npages * PAGE, np.uint8)  # not touched
    assert len(pages.rows(flat.reshape(1000, -1, order="F"))) == 1000
    assert pages.row_runs(flat.reshape(1000, -1))[0] == slice(0, 1000)
    assert pages.rows(flat.reshape(npages, PAGE)).tolist() == pages.indices().tolist()


def test_items_in_another_byte_order_are_not_copied():
    dirty = dl.DirtyPages.from_indices([0], 2)
    with pytest.raises(ValueError, match="byte orders"):
        dirty.copy(np.zeros(1024, "<f8"), np.zeros(1024, ">f8"))
    assert dirty.copy(np.zeros(1024, "<f8"), np.zeros(8192, "u1")) == 4096


class MaskedColumn:
    """Like a pandas Series of dtype Int64: it shares its values, and what is missing is in a mask."""

    dtype = "Int64"

    def __init__(self):
        self.values = np.zeros(1000)

    def __array__(self, dtype=None, copy=None):
        return self.values


def test_values_beside_a_mask_are_not_tracked_without_it():
    with pytest.raises(TypeError, match="a MaskedColumn of Int64, which keeps a mask"):
        dl.track(MaskedColumn())


@pytest.mark.parametrize("dtype", ["Int64", "boolean", "float64[pyarrow]"])
def test_a_series_of_an_extension_type_is_refused(dtype):
    pandas = pytest.importorskip("pandas")
    if "pyarrow" in dtype:
        pytest.importorskip("pyarrow")
    with pytest.raises(TypeError, match=r"a Series of .*, which keeps a mask"):
        dl.track(pandas.Series([1] * 1000, dtype=dtype))


@pytest.mark.parametrize("offsets", [[0, 2], [8, 0]])
def test_a_type_that_cannot_be_written_down_is_refused_with_a_way_out(tmp_path, offsets):
    fields = {"names": ["a", "b"], "formats": ["<u4", "<u4"], "offsets": offsets, "itemsize": 16}
    array = np.zeros(300, np.dtype(fields))
    array["a"] = 7
    with pytest.raises(TypeError, match=r"\.view\(numpy\.uint8\)"):
        snapshot.save(tmp_path / "a", {"x": array})
    assert not list(tmp_path.iterdir())
    snapshot.save(tmp_path / "a", {"x": array.view(np.uint8)})
    assert np.array_equal(snapshot.restore(tmp_path / "a")["x"].view(array.dtype)["a"], array["a"])
