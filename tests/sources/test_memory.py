"""track(): what every back end promises, whatever it is made of."""

import mmap
import os
import threading
import warnings
from multiprocessing import shared_memory

import numpy as np
import pytest

import dirtylog as dl
from dirtylog.sinks.profile.own_memory import large_areas
from dirtylog.sources.memory import _tracking

PAGE = mmap.PAGESIZE


def pages(npages):
    """Pages that hold something: the compare back end sees contents, not writes."""
    array = dl.empty(npages * PAGE, np.uint8)
    array[:] = 7
    return array


def dirty(tracker):
    return tracker.harvest().indices().tolist()


def test_a_tracker_starts_clean_and_reports_each_write_once(backend):
    array = pages(100)
    with dl.track(array, backend) as tracker:
        assert (tracker.npages, tracker.page_size, tracker.backend) == (100, PAGE, backend)
        assert dirty(tracker) == []
        array[[0, 5 * PAGE, 64 * PAGE - 1, 64 * PAGE, 99 * PAGE + 17]] = 1
        assert dirty(tracker) == [0, 5, 63, 64, 99]
        assert dirty(tracker) == []
        array[5 * PAGE] = 2
        assert dirty(tracker) == [5]


def test_peek_reports_and_the_harvest_reports_it_again(backend):
    array = pages(70)
    with dl.track(array, backend) as tracker:
        array[66 * PAGE] = 1
        assert tracker.peek() == tracker.peek()
        assert tracker.peek().indices().tolist() == [66]
        assert dirty(tracker) == [66]
        assert not tracker.peek()


def test_the_answer_is_exact_and_of_the_trackers_size(backend):
    array = pages(65)
    with dl.track(array, backend) as tracker:
        array[:] = 8
        answer = tracker.harvest()
        assert (answer.npages, answer.page_size, answer.exact, answer.count) == (65, PAGE, True, 65)


def test_every_third_page_of_more_runs_than_one_scan_holds_is_reported(backend):
    npages = 3 * 9000
    array = pages(npages)
    with dl.track(array, backend) as tracker:
        array[:: 3 * PAGE] = 1
        assert np.array_equal(tracker.harvest().indices(), np.arange(0, npages, 3))
        assert not tracker.harvest()
        array[:: 3 * PAGE] = 2
        assert tracker.peek().count == 9000
        assert tracker.harvest().count == 9000


OFFSETS = [1, 16, 720, PAGE - 1]
SIZES = [1, 17, PAGE - 1, PAGE, PAGE + 1, 2 * PAGE, 63 * PAGE - 5, 64 * PAGE, 64 * PAGE + 1, 65 * PAGE, 130 * PAGE]


@pytest.mark.parametrize("start", [0, *OFFSETS])
def test_page_i_is_the_buffers_own_bytes_wherever_it_begins(backend, start):
    """I9: what was written is reported, and at most one page beside it; nothing beside it where that can be known."""
    for size in SIZES:
        whole = pages(-(-(start + size) // PAGE))
        array = whole[start : start + size]
        with dl.track(array, backend) as tracker:
            assert tracker.npages == -(-size // PAGE)
            assert dirty(tracker) == []
            for byte in {
                0,
                PAGE - start,
                PAGE - 1,
                PAGE,
                63 * PAGE,
                64 * PAGE - 1,
                64 * PAGE - start,
                size // 2,
                size - 1,
            }:
                if not 0 <= byte < size:
                    continue
                array[byte] += 1
                peeked, answer = tracker.peek(), tracker.harvest()
                assert peeked == answer
                assert answer.npages == tracker.npages
                # What the pages of the address space show, by arithmetic; a comparison sees the bytes.
                page = (start + byte) // PAGE * PAGE - start
                exact = backend == "compare" or start == 0
                shown = {byte // PAGE} if exact else {page // PAGE, (page + PAGE - 1) // PAGE}
                assert set(answer.indices().tolist()) == {page for page in shown if 0 <= page < tracker.npages}
                assert byte // PAGE in answer
                assert dirty(tracker) == []
            array += 1
            assert tracker.harvest().count == tracker.npages


@pytest.mark.parametrize("start", OFFSETS)
def test_many_pages_of_an_unaligned_buffer_agree_with_arithmetic(backend, start):
    npages = 1000
    whole = pages(npages + 1)
    array = whole[start : start + npages * PAGE]
    with dl.track(array, backend) as tracker:
        chosen = np.random.default_rng(start).choice(npages * PAGE, 150, replace=False)
        array[chosen] += 1
        shown = (start + chosen) // PAGE
        expected = np.union1d(shown[shown < npages], shown[shown > 0] - 1)
        answer = tracker.harvest().indices()
        if backend == "compare":
            expected = np.unique(chosen // PAGE)
        assert np.array_equal(answer, expected)


@pytest.mark.parametrize("page", [511, 512, 513, 1023, 1024])
def test_pages_at_the_edge_of_a_line_of_words_are_reported(backend, page):
    """I9: the line before may be clean, and its last page is dirty all the same."""
    whole = pages(1500)
    array = whole[16 : 1400 * PAGE]
    with dl.track(array, backend) as tracker:
        whole[page * PAGE] += 1
        assert dirty(tracker) == ([page - 1] if backend == "compare" else [page - 1, page])


def test_a_neighbour_on_the_same_page_is_reported_too(backend):
    array = pages(1)
    with dl.track(array[:10], backend) as tracker:
        array[100] = 1
        assert dirty(tracker) == ([] if backend == "compare" else [0])


@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_of_either_order_and_any_dtype_are_tracked(backend_of_any_memory, order):
    array = np.zeros((300, 400), np.float64, order=order)
    with dl.track(array, backend_of_any_memory) as tracker:
        tracker.harvest()
        array[299, 399] = 1.5
        assert (array.nbytes - 1) // PAGE in tracker.harvest()


def test_a_bytearray_and_a_small_array_are_tracked(backend_of_any_memory):
    for buffer in (bytearray(100), np.zeros(3)):
        view = memoryview(buffer).cast("B")
        with dl.track(buffer, backend_of_any_memory) as tracker:
            tracker.harvest()
            view[view.nbytes - 1] ^= 1
            assert (view.nbytes - 1) // PAGE in tracker.harvest()


@pytest.mark.parametrize("flags", [mmap.MAP_PRIVATE, mmap.MAP_SHARED])
def test_an_anonymous_mmap_is_tracked(backend, flags):
    with mmap.mmap(-1, 5 * PAGE, flags=flags | mmap.MAP_ANONYMOUS) as memory, dl.track(memory, backend) as tracker:
        memory[3 * PAGE] = 1
        assert dirty(tracker) == [3]


@pytest.mark.parametrize("flags", [mmap.MAP_PRIVATE, mmap.MAP_SHARED])
def test_a_mapped_file_is_tracked(backend, flags, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(5 * PAGE))
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0, flags=flags) as memory:
        tracker = dl.track(memory, backend)
        memory[3 * PAGE] = 1
        assert dirty(tracker) == [3]
        tracker.close()


def test_shared_memory_and_memfd_are_tracked(backend):
    segment = shared_memory.SharedMemory(create=True, size=3 * PAGE)
    try:
        with dl.track(segment.buf, backend) as tracker:
            segment.buf[2 * PAGE] = 1
            assert dirty(tracker) == [2]
    finally:
        segment.close()
        segment.unlink()
    descriptor = os.memfd_create("tracked")
    os.ftruncate(descriptor, 2 * PAGE)
    with mmap.mmap(descriptor, 0) as memory, dl.track(memory, backend) as tracker:
        memory[PAGE] = 1
        assert dirty(tracker) == [1]
    os.close(descriptor)


def test_auto_compares_memory_that_other_processes_can_map():
    descriptor = os.memfd_create("tracked")
    os.ftruncate(descriptor, 2 * PAGE)
    with mmap.mmap(descriptor, 0) as memory, dl.track(memory) as tracker:
        os.pwrite(descriptor, b"x", PAGE)
        assert tracker.backend == "compare"
        assert "memfd:tracked" in tracker.refused["userfaultfd"]
        assert dirty(tracker) == [1]
    os.close(descriptor)


def test_auto_takes_the_first_back_end_that_works(monkeypatch):
    array = pages(2)
    real = _tracking.Span
    # Threads of libraries that other tests have loaded may block signals, and "auto" would pass over mprotect.
    monkeypatch.setattr("dirtylog.sources.memory.tracker.blocks_faults", lambda: 0)

    def refusing(*names):
        def span(name, *rest):
            if name in names:
                raise OSError(1, f"no {name} today")
            return real(name, *rest)

        return span

    if not _tracking.probe("userfaultfd"):
        with dl.track(array) as tracker:
            assert (tracker.backend, tracker.refused) == ("userfaultfd", {})
    monkeypatch.setattr(_tracking, "Span", refusing("userfaultfd"))
    if not _tracking.probe("mprotect"):
        with dl.track(array) as tracker:
            assert (tracker.backend, tracker.refused) == ("mprotect", {"userfaultfd": "no userfaultfd today"})
    with dl.track(array[1:]) as tracker:
        assert tracker.backend == "compare"
        assert "EFAULT" in tracker.refused["mprotect"]
    monkeypatch.setattr(_tracking, "Span", refusing("userfaultfd", "mprotect"))
    with dl.track(array) as tracker:
        assert tracker.backend == "compare"
    with pytest.raises(dl.BackendUnavailable, match=r"userfaultfd is not available here: no userfaultfd today; try"):
        dl.track(array, "userfaultfd")


def test_what_would_fill_the_memory_with_page_tables_is_refused_before_it_is_armed():
    # 0x4000: MAP_NORESERVE. AddressSanitizer's shadow is such a mapping: 16 TiB would need 32 GiB.
    with mmap.mmap(-1, 64 << 40, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000) as memory:
        assert not any(area.end - area.start >= 64 << 40 for area in large_areas())
        with pytest.raises(dl.BackendUnavailable, match=r"would need 137438953472 bytes of page tables"):
            dl.track(memory, "userfaultfd")


def test_the_buffer_is_kept_alive_and_in_place_until_close(backend_of_any_memory):
    memory = mmap.mmap(-1, PAGE)
    tracker = dl.track(memory, backend_of_any_memory)
    with pytest.raises(BufferError):
        memory.close()
    tracker.close()
    memory.close()
    array = bytearray(b"x" * PAGE)
    with dl.track(array, backend_of_any_memory), pytest.raises(BufferError):
        array.extend(b"more")
    array.extend(b"more")


def test_closing_twice_is_fine_and_a_closed_tracker_refuses(backend):
    array = pages(1)
    tracker = dl.track(array, backend)
    assert not tracker.closed
    tracker.close()
    tracker.close()
    assert tracker.closed
    array[0] = 1
    for call in (tracker.harvest, tracker.peek, tracker.__enter__):
        with pytest.raises(ValueError, match="the Tracker is closed; open another one"):
            call()


def test_a_forgotten_tracker_warns_and_is_closed(backend):
    array = pages(1)
    open_before = _tracking.open_spans(backend) if backend != "compare" else 0
    tracker = dl.track(array, backend)
    with pytest.warns(ResourceWarning, match="unclosed <Tracker: 1 pages"):
        del tracker
    if backend != "compare":
        assert _tracking.open_spans(backend) == open_before


def test_a_tracked_buffer_can_be_tracked_again_after_close(backend):
    array = pages(3)
    for _ in range(3):
        with dl.track(array, backend) as tracker:
            array[PAGE] += 1
            assert dirty(tracker) == [1]


def test_copying_by_the_log_while_threads_write_ends_in_equal_memory(backend):
    npages, rounds = 512, 60
    original = dl.zeros((npages, PAGE // 8), np.uint64)
    replica = np.zeros_like(original)
    barrier = threading.Barrier(4)

    def write(seed):
        random = np.random.default_rng(seed)
        barrier.wait()
        for value in range(1, rounds):
            original[random.integers(0, npages, 20), :] = value * 3 + seed

    with dl.track(original, backend) as tracker:
        writers = [threading.Thread(target=write, args=(seed,)) for seed in range(3)]
        for writer in writers:
            writer.start()
        barrier.wait()
        while any(writer.is_alive() for writer in writers):
            found = tracker.harvest().indices()
            replica[found] = original[found]
        for writer in writers:
            writer.join()
        last = tracker.harvest().indices()
        replica[last] = original[last]
        assert not tracker.harvest()
    assert np.array_equal(replica, original)


def test_harvests_in_several_threads_share_the_pages_out_and_lose_none(backend):
    array = pages(600)
    found = [[] for _ in range(3)]
    done = threading.Event()

    def harvest(into):
        while not done.is_set():
            into.append(tracker.harvest().indices())

    with dl.track(array, backend) as tracker:
        threads = [threading.Thread(target=harvest, args=(into,)) for into in found]
        for thread in threads:
            thread.start()
        array[:: 2 * PAGE] = 9
        done.set()
        for thread in threads:
            thread.join()
        rest = tracker.harvest().indices()
    together = np.concatenate([rest, *(part for into in found for part in into)])
    assert np.array_equal(np.unique(together), np.arange(0, 600, 2))


def test_what_has_no_buffer_is_a_type_error(backend):
    for wrong in (3, "text", None, [1, 2]):
        with pytest.raises(TypeError, match="which has no memory of its own"):
            dl.track(wrong, backend)


def test_empty_and_scattered_buffers_are_value_errors(backend):
    with pytest.raises(ValueError, match="is empty; at least one byte"):
        dl.track(np.zeros(0), backend)
    with pytest.raises(ValueError, match="not contiguous"):
        dl.track(np.zeros((10, 10))[:, ::2], backend)


def test_an_unknown_back_end_names_those_there_are():
    with pytest.raises(ValueError, match="no back end 'soft-dirty'; choose 'auto' or one of 'userfaultfd'"):
        dl.track(bytearray(10), "soft-dirty")


def test_a_failed_track_lets_go_of_the_buffer(monkeypatch):
    memory = bytearray(10)
    with pytest.raises(ValueError, match="back end"):
        dl.track(memory, "none")
    monkeypatch.setattr("dirtylog.sources.memory.tracker.Compare", _refuse)
    with pytest.raises(dl.BackendUnavailable, match="no room for the copy"):
        dl.track(memory, "compare")
    memory.extend(b"still resizable")


def _refuse(*_):
    raise OSError(12, "no room for the copy")


def test_an_inexact_answer_warns_where_it_was_asked_for(backend):
    array = pages(2)
    with dl.track(array, backend) as tracker, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        engine = tracker._engine
        tracker._engine = _Vague(engine)
        assert tracker.harvest().exact is False
        tracker._engine = engine
    assert [warning.category for warning in caught] == [dl.IncompleteLogWarning]
    assert caught[0].filename == __file__


def test_where_warnings_are_errors_the_pages_are_kept_for_the_next_harvest(backend):
    """I5."""
    array = pages(3)
    with dl.track(array, backend) as tracker:
        engine = tracker._engine
        tracker._engine = _Vague(engine)
        for call in (tracker.peek, tracker.harvest):
            with pytest.raises(dl.IncompleteLogWarning):
                call()
        tracker._engine = engine
        assert tracker.peek().count == 3
        assert dirty(tracker) == [0, 1, 2]
        assert dirty(tracker) == []


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_whatever_the_warning_hook_raises_the_pages_are_kept_for_the_next_harvest(backend, error, monkeypatch):
    """I5: the hook that shows warnings is the program's own code."""

    def hook(*arguments, **options):
        raise error

    array = pages(3)
    with dl.track(array, backend) as tracker, warnings.catch_warnings():
        warnings.simplefilter("always")
        monkeypatch.setattr(warnings, "showwarning", hook)
        engine = tracker._engine
        tracker._engine = _Vague(engine)
        with pytest.raises(error):
            tracker.harvest()
        tracker._engine = engine
        array[PAGE] += 1
        assert dirty(tracker) == [0, 1, 2]
        assert dirty(tracker) == []


def test_what_a_tracker_owes_is_in_its_next_answer(backend):
    """I5: by the one mechanism that all sources share."""
    array = pages(3)
    with dl.track(array, backend) as tracker:
        tracker._owed.owe(dl.DirtyPages.from_indices([2], 3, PAGE))
        array[PAGE] += 1
        assert tracker.peek().indices().tolist() == [1, 2]
        assert dirty(tracker) == [1, 2]
        assert dirty(tracker) == []


class _Vague:
    def __init__(self, engine):
        self.engine = engine

    def collect(self, take):
        answer = self.engine.collect(take)
        return dl.DirtyPages.from_runs([(0, answer.npages)], answer.npages, answer.page_size, exact=False)
