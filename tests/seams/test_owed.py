"""I5: what was taken and not handed out is in the next answer, whatever broke in between."""

import contextlib
import functools
import itertools
import os
import threading
import warnings

import numpy as np
import pytest

import dirtylog as dl
from dirtylog._bits.owed import Owed, take_all
from dirtylog.sinks import snapshot
from dirtylog.sinks.snapshot import staged, writer

pytestmark = pytest.mark.thread_unsafe(reason="signals and traces belong to the process")
PAGE = 4096


def pages(*numbers, npages=64, exact=True):
    return dl.DirtyPages.from_indices(numbers, npages, exact=exact)


# ---- a signal handler that raises during the call ------------------------------------


@pytest.mark.parametrize("npages", [64, 1 << 16])
def test_an_interrupted_harvest_of_a_bitmap_marks_its_pages_again(raising_signal, npages):
    bitmap = dl.DirtyBitmap(npages)
    bitmap.mark_pages([0, 5, npages - 1])
    with pytest.raises(KeyboardInterrupt):
        bitmap.harvest(raising_signal)
    assert bitmap.harvest().indices().tolist() == [0, 5, npages - 1]


def test_an_interrupted_dense_harvest_marks_its_pages_again(raising_signal):
    bitmap = dl.DirtyBitmap(1 << 12)
    bitmap.fill()
    with pytest.raises(KeyboardInterrupt):
        bitmap.harvest(raising_signal)
    assert bitmap.harvest().count == 1 << 12


@pytest.mark.parametrize("fraction", [1, 1000], ids=["dense", "sparse"])
def test_an_interrupted_quiescent_harvest_marks_its_pages_again(raising_signal, fraction):
    npages = 1 << 16
    dirty = np.arange(0, npages, fraction)
    bitmap = dl.DirtyBitmap(npages)
    bitmap.mark_pages(dirty)
    with pytest.raises(KeyboardInterrupt):
        bitmap.harvest(raising_signal, quiescent=True)
    assert np.array_equal(bitmap.harvest(quiescent=True), dirty)
    with pytest.raises(ZeroDivisionError):
        bitmap.mark_pages(dirty) or (bitmap.harvest(quiescent=True), 1 // 0)
    assert np.array_equal(bitmap.harvest(quiescent=True), dirty)


def test_an_interrupted_harvest_of_a_part_leaves_the_rest(raising_signal):
    bitmap = dl.DirtyBitmap(4096)
    bitmap.mark_pages([1, 3000])
    with pytest.raises(KeyboardInterrupt):
        bitmap.harvest(raising_signal, 100)
    assert bitmap.harvest(0, 100).indices().tolist() == [1]
    assert bitmap.harvest().indices().tolist() == [3000]


def test_an_interrupted_harvest_of_a_shared_log_marks_its_pages_again(raising_signal):
    with dl.SharedLog.create(1000) as log:
        log.mark_pages([0, 999])
        with pytest.raises(KeyboardInterrupt):
            log.harvest(raising_signal)
        assert log.harvest().indices().tolist() == [0, 999]


@pytest.mark.parametrize("quiescent", [False, True])
def test_an_interrupted_harvest_of_words_sets_its_bits_again(raising_signal, quiescent):
    class SignalsOnDtype(np.ndarray):
        _as_parameter_ = 0
        dtype = property(raising_signal.__index__)

    words = np.array([5, 0, 1 << 63], np.uint64)
    out = np.zeros(3, np.uint64).view(SignalsOnDtype)
    with pytest.raises(KeyboardInterrupt):
        dl.harvest_words(words, out, quiescent=quiescent)
    assert words.tolist() == [5, 0, 1 << 63]


def test_an_interrupted_harvest_of_the_model_leaves_the_snapshot_to_be_put_back(raising_signal):
    vm = dl.VM()
    vm.set_memory_region(0, base_gfn=0, npages=64)
    vm.vcpus[0].touch([3, 9])
    with vm.slots_lock:
        vm.mmu.harvest(0)
        with pytest.raises(KeyboardInterrupt):
            vm.mmu.hand_out(raising_signal)
        vm.mmu.put_back(0)
    assert vm.get_dirty_log(0).indices().tolist() == [3, 9]


def test_an_interrupted_answer_is_owed(raising_signal):
    source, owed = dl.DirtyBitmap(64), Owed(64)
    source.mark(3)
    with pytest.raises(KeyboardInterrupt):
        # A peek does not look for signals, so this stands for an engine that has taken its pages.
        owed.take(source.peek, raising_signal)
    assert owed
    assert owed.take(dl.DirtyBitmap(64).harvest).indices().tolist() == [3]
    assert not owed


# ---- every other reason ------------------------------------------------------------


def test_what_is_owed_is_joined_to_the_next_answer_once():
    owed = Owed(64)
    owed.owe(pages(1))
    owed.owe(pages(2, 63))
    assert owed.take(lambda: pages(5)).indices().tolist() == [1, 2, 5, 63]
    assert owed.take(lambda: pages(5)).indices().tolist() == [5]


def test_a_peek_shows_what_is_owed_and_keeps_it():
    owed = Owed(64)
    owed.owe(pages(1, exact=False))
    assert owed.peek(pages(7)).indices().tolist() == [1, 7]
    assert not owed.peek(pages(7)).exact
    assert owed.take(pages).indices().tolist() == [1]


def test_an_inexact_answer_that_is_owed_makes_the_next_one_inexact():
    owed = Owed(64)
    owed.owe(pages(1, exact=False))
    answer = owed.take(pages)
    assert answer == pages(1)
    assert not answer.exact
    assert owed.take(pages).exact


def test_everything_can_be_owed():
    owed = Owed(70)
    owed.owe_everything()
    answer = owed.take(functools.partial(pages, npages=70))
    assert answer.count == 70
    assert not answer.exact


def test_a_warning_that_is_an_error_costs_one_answer_and_is_not_shown_again():
    shown = []

    def warn(answer):
        shown.append(answer.count)
        raise UserWarning

    owed = Owed(64)
    with pytest.raises(UserWarning):
        owed.take(lambda: pages(1, 2, exact=False), warn=warn)
    answer = owed.take(lambda: pages(3), warn=warn)
    assert answer.indices().tolist() == [1, 2, 3]
    assert not answer.exact
    assert shown == [2]


def test_a_source_that_raises_leaves_what_is_owed_alone():
    owed = Owed(64)
    owed.owe(pages(1))

    def broken():
        raise OSError(5, "no answer")

    with pytest.raises(OSError, match="no answer"):
        owed.take(broken)
    with pytest.raises(dl.DirtyLogError, match="named"):
        owed.take(broken, failure=lambda error: dl.DirtyLogError("named"))
    assert owed.take(pages).indices().tolist() == [1]


def test_pages_of_another_source_are_refused():
    owed = Owed(64)
    with pytest.raises(ValueError, match="65 pages"):
        owed.owe(pages(npages=65))
    with pytest.raises(ValueError, match="65 pages"):
        owed.take(functools.partial(pages, npages=65))
    with pytest.raises(TypeError):
        owed.take(list)


def test_several_sources_are_taken_all_or_none():
    first, second = Owed(64), Owed(64)

    def broken():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        take_all([(1, first, lambda: pages(1)), (2, second, broken)])
    assert take_all([(1, first, pages), (2, second, lambda: pages(2))]) == {1: pages(1), 2: pages(2)}
    assert not first


def test_several_inexact_answers_are_warned_of_together_and_once():
    """Where warnings are errors, the second call has all of them, however many sources warn."""
    shown = []

    def warn(key, answer):
        shown.append((key, answer.count))
        raise UserWarning

    first, second, third = Owed(64), Owed(64), Owed(64)
    vague = functools.partial(pages, 1, exact=False)
    with pytest.raises(UserWarning):
        take_all([(1, first, vague), (2, second, functools.partial(pages, 2)), (3, third, vague)], {}, warn)
    answers = take_all([(1, first, pages), (2, second, pages), (3, third, pages)], None, warn)
    assert {key: (answer.indices().tolist(), answer.exact) for key, answer in answers.items()} == {
        1: ([1], False),
        2: ([2], True),
        3: ([1], False),
    }
    assert shown == [(1, 1)]


def test_an_interrupt_after_several_were_taken_owes_them(raising_signal):
    owed, taken = Owed(64), {}

    last = functools.partial(dl.DirtyBitmap(64).peek, raising_signal)  # raises its signal in C, and looks away
    with pytest.raises(KeyboardInterrupt):
        take_all([(1, owed, functools.partial(pages, 5)), (2, Owed(64), last)], taken)
    assert taken == {}
    assert owed.take(pages).indices().tolist() == [5]


def test_a_peek_that_warns_takes_nothing():
    shown = []

    def warn(answer):
        shown.append(answer.count)
        raise UserWarning

    owed = Owed(64)
    owed.owe_everything()
    with pytest.raises(UserWarning):
        owed.peek(pages(1), warn)
    with pytest.raises(UserWarning):
        owed.take(pages, warn=warn)
    assert owed.peek(pages(1), warn).count == 64
    assert owed.take(pages, warn=warn).count == 64
    assert owed.peek(pages(1), warn).exact
    assert shown == [64, 64]


def test_threads_that_owe_and_take_lose_nothing_and_take_nothing_twice():
    owed = Owed(4096)
    none = dl.DirtyPages.from_indices([], 4096)
    taken, start = [], threading.Barrier(4)

    def owe(first):
        start.wait()
        for page in range(first, 4096, 2):
            owed.owe(pages(page, npages=4096))

    def take():
        start.wait()
        for _ in range(500):
            taken.append(owed.take(lambda: none))

    threads = [threading.Thread(target=owe, args=(n,)) for n in (0, 1)]
    threads += [threading.Thread(target=take) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    taken.append(owed.take(lambda: none))
    found = np.concatenate([answer.indices() for answer in taken])
    assert sorted(found.tolist()) == list(range(4096))


# ---- every place in the Python of a source -----------------------------------------


def test_a_comparing_harvest_interrupted_anywhere_has_its_pages_in_the_next(interrupted_at):
    """But for the jump to the return, and the return: no handler runs there."""
    array = dl.zeros((4, PAGE), "u1")
    with dl.track(array, "compare") as tracker:
        lost, place, interrupted = [], 0, True
        while interrupted:
            array[place % 4, 0] += 1
            interrupted = interrupted_at(place, lambda: tracker._engine.collect(True), ("compare.py",))
            if place % 4 not in tracker.harvest():
                lost.append(place)
            place += 1
    # The last call was not interrupted, and nobody kept its answer.
    assert lost == list(range(lost[0], place))
    assert len(lost) <= 4
    assert place > 30


def test_a_harvest_in_a_signal_handler_of_its_own_thread_does_not_wait_for_itself():
    """A comparing tracker is harvested in the middle of its own harvest."""
    array = dl.zeros((4, PAGE), "u1")
    with dl.track(array, "compare") as tracker:
        engine = tracker._engine
        inner = []
        array[2] = 1
        with engine._lock:
            inner.append(engine.collect(True))
        assert inner[0].indices().tolist() == [2]


def test_warnings_as_errors_lose_no_page_of_a_tracker():
    array = dl.zeros((4, PAGE), "u1")
    with dl.track(array) as tracker:
        array[1] = 1
        tracker._owed.owe_everything()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(dl.IncompleteLogWarning):
                tracker.harvest()
            assert tracker.harvest().count == 4
        assert tracker.harvest().count == 0


def test_a_harvest_of_rings_that_is_interrupted_anywhere_has_its_pages_in_the_next(interrupt_class):
    vm = dl.VM(dirty_ring=128)
    vm.set_memory_region(0, base_gfn=0, npages=64)
    for ask in (lambda: vm.harvest_rings()[0], vm.slot(0).harvest):
        for n in itertools.count(1):
            vm.vcpus[0].touch([5])
            taken = []
            interrupt = interrupt_class(n, "vm/rings.py", "vm/machine.py")
            with contextlib.suppress(KeyboardInterrupt), interrupt.active():
                taken.append(ask())
            if not interrupt.where:
                break
            vm.vcpus[0].touch([7])
            assert vm.harvest_rings()[0].indices().tolist() == ([7] if taken else [5, 7]), interrupt.where
        assert n > 10


def _too_late(*_, **__):
    raise TimeoutError("the time is over")  # as a handler of SIGALRM does; it is an OSError


def test_what_a_signal_handler_raises_is_not_taken_for_an_error_of_the_memory(monkeypatch):
    array = dl.zeros((4, PAGE), "u1")
    with dl.track(array, "compare") as tracker:
        array[2] = 1
        monkeypatch.setattr(tracker._engine, "_check", _too_late)
        for call in (tracker.harvest, tracker.peek):
            with pytest.raises(TimeoutError, match="the time is over"):
                call()
        monkeypatch.undo()
        assert tracker.harvest().indices().tolist() == [2]


@pytest.mark.parametrize("call", ["ftruncate", "fsync"])
def test_what_a_signal_handler_raises_is_not_taken_for_an_error_of_the_disk(monkeypatch, tmp_path, call):
    monkeypatch.setattr(staged.os, call, _too_late)
    with pytest.raises(TimeoutError, match="the time is over"):
        snapshot.save(tmp_path / "base", dl.zeros(PAGE, "u1"))
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []


def test_what_a_signal_handler_raises_while_a_target_is_looked_at_arrives_as_well(monkeypatch, tmp_path):
    array = dl.zeros(PAGE, "u1")
    snapshot.save(tmp_path / "base", array, sync=False)
    look, looks = os.stat, iter([_too_late])
    monkeypatch.setattr(writer.os, "stat", lambda *where, **how: next(looks, look)(*where, **how))
    with pytest.raises(TimeoutError, match="the time is over"):
        snapshot.save(tmp_path / "base", array, replace=True)
