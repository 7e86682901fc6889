"""I9 with what people really have: arrays of every dtype, shape, order and offset are rebuilt byte for byte."""

import mmap
import socket
import threading
from multiprocessing.shared_memory import SharedMemory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dirtylog as dl
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
    shape = draw(st.sampled_from([(rows * columns,), (rows, columns), (rows, 1, columns)]))
    order = draw(st.sampled_from("CF"))
    offset = draw(st.sampled_from([0, 1, 16, 720, PAGE - 1]))
    return dtype, shape, order, offset


def made(layout):
    """An array of that layout in pages of its own, so that mprotect may have them, and its bytes in memory's order."""
    dtype, shape, order, offset = layout
    nbytes = int(np.prod(shape)) * dtype.itemsize
    block = dl.zeros(offset + nbytes + PAGE, dtype=np.uint8)
    flat = block[offset : offset + nbytes]
    flat[:] = np.arange(nbytes) % 251
    return flat.view(dtype).reshape(shape, order=order), flat


writes = st.lists(st.tuples(st.integers(0, 1 << 30), st.integers(1, 900)), max_size=5)


def written(flat, places):
    for place, length in places:
        start = place % len(flat)
        flat[start : start + length] ^= 0x55


@settings(max_examples=60)
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
            assert replica.tobytes("A") == array.tobytes("A") == flat.tobytes()
            assert mirror.tobytes() == array.tobytes()
            out = np.empty_like(array)
            snapshot.restore(diff, out=out)
            assert out.tobytes("A") == flat.tobytes()


@settings(max_examples=15)
@given(layout=layouts(), places=writes)
def test_a_migration_moves_any_array(layout, places):
    array, flat = made(layout)
    out = np.empty_like(array)
    ours, theirs = socket.socketpair()
    with ours, theirs, dl.track(array, "compare") as tracker:
        log = dl.DirtyLog()
        log.attach(tracker)
        observer = log.observer("migration", everything=True)
        got = []
        receiver = threading.Thread(target=lambda: got.append(receive(theirs, out=out)))
        receiver.start()
        send(ours, array, observer, pause=lambda: written(flat, places), resume=lambda: None)
        receiver.join()
    assert got
    assert out.tobytes("A") == flat.tobytes()


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
    with pytest.raises(ValueError, match="detach"):
        dl.track(torch.zeros(10, requires_grad=True))
    with pytest.raises(ValueError, match=r"view\(torch\.uint8\)"):
        dl.track(torch.zeros(10, dtype=torch.bfloat16))
    dl.track(torch.zeros(10, dtype=torch.bfloat16).view(torch.uint8)).close()


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
    with pytest.raises(TypeError, match="NumPy array"):
        pages.rows(bytearray(10))
    assert dl.DirtyPages.from_indices([], 0).rows(np.zeros((0, 5))).tolist() == []
